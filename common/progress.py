"""Progress bars for everything that takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from ..errors import one_line

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` with a bar on standard error.

    There is no bar if standard error is no terminal or rich is not installed.

    Args:
        items: what is iterated over.
        description: text beside the bar.
        total: number of items, if `len(items)` is not defined.
    """
    try:
        from rich.console import Console  # the networks must run with PyTorch alone
        from rich.markup import escape
        from rich.progress import track as rich_track
    except ImportError:
        yield from items
        return
    console = Console(stderr=True)
    if not console.is_terminal:  # bars would fill a log file
        yield from items
        return
    title = escape(one_line(description))
    yield from rich_track(items, title, total=total, console=console, transient=True)


def watch(description: str, total: int, *, completed: Callable[[], int], running: Callable[[], bool]) -> None:
    """Show a bar for the work of another process until that process ends.

    Args:
        description: text beside the bar.
        total: amount of work.
        completed: returns the amount of work that is done.
        running: returns False when the process has ended; may raise.
    """

    def moments() -> Iterator[None]:
        done = 0
        while running():
            for _ in range(completed() - done):
                done += 1
                yield
            time.sleep(0.2)

    for _ in track(moments(), description, total):
        pass
