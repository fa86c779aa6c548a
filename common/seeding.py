"""Reproducible random numbers: seeds made of several numbers, and global generators seeded for a while."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*numbers: int) -> int:
    """One seed from several numbers (not negative); neighbouring numbers give unrelated random sequences."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@contextmanager
def drawing_on(device: torch.device) -> Iterator[torch.Generator]:
    """The global generator of a device, which `torch.manual_seed` seeds too. Tensors that are made inside, random ones
    and others, are on this device."""
    if device.type != "cuda":
        yield torch.default_generator
        return
    torch.cuda.init()
    with device:
        yield torch.cuda.default_generators[device.index or 0]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and PyTorch's global generators inside, and restore them afterwards.

    Sampling of slices and some methods draw from the second, networks are initialised from the third.
    """
    python, array, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(torch_state)
