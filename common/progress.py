"""Progress bars for everything that takes longer than a moment."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
    """Iterate over `items` with a bar on standard error; silent where that is no terminal, or rich is not installed.

    Args:
        total: number of items, where `len(items)` is not defined.
    """
    try:
        from rich.console import Console  # the networks must run where only PyTorch is
        from rich.progress import track as rich_track
    except ImportError:
        yield from items
        return
    console = Console(stderr=True)
    if not console.is_terminal:  # a log file wants no bars
        yield from items
        return
    yield from rich_track(items, description, total=total, console=console, transient=True)


def watch(description: str, total: int, *, completed: Callable[[], int], running: Callable[[], bool]) -> None:
    """A bar over work that another process does, until it does not run any more.

    Args:
        total: amount of work. completed: how much of it is done. running: False ends the watch; may raise.
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
