"""What the engine needs to know of labelled slices: their volumes, where their structures are, and how large."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ..labelled_slices import LabelledSlices, parts_of
from .training_plan import DataFacts

EXTENT_SHARE = 0.95  # of the volumes whose structures fit into the extent


def volumes_of(data: LabelledSlices) -> list[slice]:
    """The slices of each volume; without known volumes, every slice is one."""
    return parts_of(len(data.images), np.arange(len(data.images)) if data.volume is None else data.volume)


def data_facts(parts: Sequence[LabelledSlices], *, anisotropy: float = 1.0, colour: bool = False) -> DataFacts:
    """What a training plan follows from, of labelled slices of one size.

    Args:
        parts: slices that are trained on together.
        anisotropy: distance of neighbouring slices in pixels.
        colour: whether the channels are red, green and blue.
    """
    sides = [
        int(max(np.ptp(axis) for axis in np.nonzero(shown)) + 1)
        for data in parts
        for shown in (data.labels[part].any(0) for part in volumes_of(data))
        if shown.any()
    ]
    extent = math.ceil(float(np.quantile(sides, EXTENT_SHARE))) if sides else None
    first = parts[0]
    return DataFacts(
        size=first.images.shape[-1],
        extent=extent,
        classes=first.classes,
        anisotropy=anisotropy,
        channels=first.channels,
        colour=colour,
    )


def structure_centres(data: LabelledSlices) -> np.ndarray:
    """(N, 2) float32 row and column of the structures' centre in each slice's volume; the middle without structures."""
    middle = (data.images.shape[-1] - 1) / 2
    centres = np.full((len(data.images), 2), middle, np.float32)
    for part in volumes_of(data):
        shown = data.labels[part].any(0)
        if shown.any():
            centres[part] = [places.mean() for places in np.nonzero(shown)]
    return centres
