"""A label map as runs of equal voxels: how a store keeps the references of its test cases on their own grids."""

from __future__ import annotations

import math

import numpy as np

from ...errors import StoreError


def to_runs(labels: np.ndarray) -> np.ndarray:
    """(r, 3) uint32 of a label map (X, Y, Z): first voxel, number of voxels, label of each run; background is left out.

    Voxels are numbered with the last axis fastest.
    """
    flat = labels.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1]).astype(np.int64)
    lengths = np.diff(np.append(starts, len(flat)))
    runs = np.stack([starts, lengths, flat[starts]], axis=1)
    return runs[runs[:, 2] > 0].astype(np.uint32)


def from_runs(runs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The label map (X, Y, Z) uint8 of `shape` that `to_runs` took apart.

    Args:
        runs: (r, 3), see `to_runs`.
        shape: of the label map.

    Raises: StoreError if the runs overlap or do not fit the shape.
    """
    starts, lengths, values = runs.astype(np.int64).T
    stops, voxels = starts + lengths, math.prod(shape)
    if len(runs) and (stops[-1] > voxels or (stops[:-1] > starts[1:]).any()):
        raise StoreError(
            f"the runs of a reference end at voxel {stops.max()}; they must follow each other up to {voxels}"
        )
    lengths_between = np.diff(np.concatenate([[0], np.stack([starts, stops], axis=1).ravel(), [voxels]]))
    labels = np.zeros(2 * len(runs) + 1, np.uint8)
    labels[1::2] = values
    return np.repeat(labels, lengths_between).reshape(shape)
