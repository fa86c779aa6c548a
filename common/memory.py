"""How the process treats memory that it has freed, and what it looks through for memory to free."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # numbers of glibc's `mallopt`
KEPT, MAPPED = 256 << 20, 32 << 20  # bytes; no larger threshold for mapping is accepted


def keep_freed_memory() -> None:
    """Let the C library keep up to 256 MiB of freed memory for the next arrays of this process, where it is glibc.

    Otherwise each picture or slice array of some megabytes is handed back to the system when it is freed, and the next
    one is given page by page again, which takes as long as decoding half of a JPEG and stops other threads meanwhile.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return
    mallopt(MMAP_THRESHOLD, MAPPED)
    mallopt(TRIM_THRESHOLD, KEPT)


@contextmanager
def nothing_old_collected() -> Iterator[None]:
    """Keep the garbage collector from looking through what is there already, such as all imported modules.

    Work on thousands of small items makes it do so every few seconds, in vain, while all threads wait.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
