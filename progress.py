"""Progress bars for everything that takes longer than a moment."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
