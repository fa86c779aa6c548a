"""How many threads libraries use for one step, where several items are worked on at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cv2
from threadpoolctl import threadpool_limits


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let matrix products and OpenCV use the calling thread alone.

    Where as many items are worked on as there are cores, helping threads only wait for each other.
    """
    before = cv2.getNumThreads()  # threadpoolctl does not know OpenCV's own threads
    cv2.setNumThreads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        cv2.setNumThreads(before)
