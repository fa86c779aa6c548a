"""Several items worked on at once: how many threads a library uses for one of them, and how they take turns."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import cv2
from threadpoolctl import threadpool_limits

TURN = 1e-4  # seconds


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


@contextmanager
def quick_turns() -> Iterator[None]:
    """Let a thread that runs Python code make way for another one after 0.1 ms, in place of 5 ms.

    A thread that comes back from an array operation of 0.05 ms would otherwise wait a hundred times as long where
    another one imports a library.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(TURN, before))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
