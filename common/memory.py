"""How the process treats memory that it has freed."""

from __future__ import annotations

import ctypes

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
