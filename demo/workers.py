"""Segmenters of the demonstration are trained in processes of their own, one per core."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from ..adaptation.engine.segmenter_config import SegmenterConfig
from ..node.labelling import train_on_store
from ..node.site_adaptation import Adaptation, adapt_site
from ..node.store.slice_store import SliceStore

MAX_WORKERS = 2  # each takes about a gigabyte


@contextmanager
def training_workers() -> Iterator[ProcessPoolExecutor]:
    """Processes for `train` and `adapt`. They have ended when the block is left, however it is left."""
    count = min(MAX_WORKERS, os.cpu_count() or 1)
    pool = ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)
    try:
        yield pool
    except BaseException:
        for process in multiprocessing.active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def train(store: Path, config: SegmenterConfig, out: Path) -> None:
    """Train a segmenter on a store's labels, see `train_on_store`, and write it."""
    train_on_store(SliceStore(store), config).save(out)


def adapt(store: Path, labelled_file: Path, adaptation: Adaptation, out: Path) -> None:
    """Train a site's own segmenter and write it, see `adapt_site`."""
    adapt_site(store, out, factory_file=labelled_file, adaptation=adaptation)


def _begin() -> None:
    """In each process: one thread, because the processes fill the cores; no progress bars, which would overwrite those
    of the other processes."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (open until the process ends)
