"""Weighted sums of voxels along three axes: products of small matrices, many times faster than interpolating voxels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

AT_ONCE = 4  # planes that are worked on at once, so that they stay in the processor's cache
BAND = 32  # samples that are computed by one product, from the few voxels that have a weight in them


def weighted(planes: np.ndarray, weights: list[np.ndarray | None]) -> np.ndarray:
    """Samples of voxels.

    Args:
        planes: (z, x, y) voxels.
        weights: of the voxels in each sample, (count, n) float32 for rows, columns and slices; None for slices that
            are the planes themselves.

    Returns: (slices, rows, columns) float32.
    """
    rows, columns, places = weights
    if places is not None and len(places) < len(planes):  # fewer planes are left for the other two axes
        planes, places = _across(places, planes), None
    # The axis whose voxels lie next to each other in memory comes first: no copy in another order is needed.
    turned = abs(planes.strides[1]) < abs(planes.strides[2])
    first, second = (rows, columns) if turned else (columns, rows)
    first_bands, second_bands = list(_bands(first)), list(_bands(second))
    planes = planes.swapaxes(1, 2) if turned else planes
    if planes.dtype != np.float32 or planes.strides[2] != planes.itemsize:  # such as flipped ones
        planes = np.ascontiguousarray(planes, dtype=np.float32)
    slices = np.empty((len(planes), len(rows), len(columns)), np.float32)
    for start in range(0, len(planes), AT_ONCE):
        part = slice(start, start + AT_ONCE)
        half = np.empty((len(planes[part]), planes.shape[1], len(first)), np.float32)
        for samples, voxels in first_bands:
            np.matmul(planes[part, :, voxels], first[samples, voxels].T, out=half[:, :, samples])
        for samples, voxels in second_bands:
            if turned:
                np.matmul(half[:, voxels].swapaxes(1, 2), second[samples, voxels].T, out=slices[part, :, samples])
            else:
                np.matmul(second[samples, voxels], half[:, voxels], out=slices[part, samples])
    return slices if places is None else _across(places, slices)


def _across(places: np.ndarray, planes: np.ndarray) -> np.ndarray:
    """(count, x, y) float32: the planes (n, x, y) weighted by `places` (count, n), in their order in memory."""
    turned = abs(planes.strides[1]) < abs(planes.strides[2])
    planes = planes.swapaxes(1, 2) if turned else planes
    found = np.empty((len(places), *planes.shape[1:]), np.float32)
    # Row by row: small products need no copy of the voxels in another order.
    np.matmul(places, planes.swapaxes(0, 1), out=found.swapaxes(0, 1))
    return found.swapaxes(1, 2) if turned else found


def _bands(weights: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Samples of weights (count, n), at most `BAND` at a time, and the voxels outside of which they have no weight."""
    for first in range(0, len(weights), BAND):
        touched = np.flatnonzero(weights[first : first + BAND].any(axis=0))
        voxels = slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0)
        yield slice(first, min(first + BAND, len(weights))), voxels
