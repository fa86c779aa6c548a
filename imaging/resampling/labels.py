"""The label of each pixel: the one with the largest share of it, with every label's indicator interpolated linearly.

Where all voxels around a pixel have one label, which is nearly everywhere, the pixel has it too. Only the pixels on the
border of a structure are interpolated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .axis import NEGLIGIBLE, Axis

MIXED = 255  # where voxels have several labels; voxels of this very label are interpolated too, which is right as well
AT_ONCE = 1 << 17  # pixels that are interpolated at once


@dataclass(frozen=True)
class _Taps:
    """The two voxels between which each sample of an axis lies.

    Attributes:
        low: (count,) number of the voxel before it, counted from the first kept one.
        high: (count,) number of the voxel after it; `low` again where the sample lies in a voxel's centre.
        share: (count,) float32 weight of the voxel after it, in [0, 1].
    """

    low: np.ndarray
    high: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, axis: Axis) -> _Taps:
        """Those of the samples that lie in a kept voxel; beyond the outermost centres these voxels count alone."""
        samples = np.arange(axis.inside.start, axis.inside.stop)
        last = axis.stop - axis.start - 1
        places = np.clip(axis.offset - axis.start + axis.ratio * samples, 0, last)
        nearest = np.round(places)
        places = np.where(np.abs(places - nearest) < NEGLIGIBLE, nearest, places)  # equal grids copy labels exactly
        low = np.floor(places).astype(np.intp)
        return cls(low, np.ceil(places).astype(np.intp), (places - low).astype(np.float32))

    @property
    def between(self) -> bool:
        """Whether a sample lies between voxels."""
        return bool((self.high > self.low).any())


def interpolated_labels(planes: np.ndarray, axes: Sequence[Axis], *, at_least_half: bool) -> np.ndarray:
    """The labels of the samples that lie in a kept voxel.

    Args:
        planes: (z, x, y) labels of the kept voxels, uint8; 0 is background.
        axes: of slices, rows and columns.
        at_least_half: False takes the label with the largest share, the lowest of equals. True takes, as published,
            the highest label above background that has a share of at least one half, and background without one.

    Returns: (slices, rows, columns) uint8.
    """
    places, rows, columns = (_Taps.of(axis) for axis in axes)
    if not (len(places.low) and len(rows.low) and len(columns.low)):
        return np.zeros((len(places.low), len(rows.low), len(columns.low)), np.uint8)
    turned = abs(planes.strides[1]) < abs(planes.strides[2])
    outer, inner = (columns, rows) if turned else (rows, columns)
    planes = np.ascontiguousarray(planes.swapaxes(1, 2) if turned else planes)
    codes = _codes(planes, between=(places.between, outer.between, inner.between))
    found = np.empty((len(places.low), len(inner.low), len(outer.low)), np.uint8)
    for plane, place in zip(found, places.low, strict=True):
        # Whole rows are copied, and the plane is transposed in between: single values take several times as long.
        plane[:] = cv2.transpose(codes[place][outer.low])[inner.low]
    border = np.flatnonzero(found == MIXED)
    for first in range(0, len(border), AT_ONCE):
        part = border[first : first + AT_ONCE]
        slice_, at_inner, at_outer = np.unravel_index(part, found.shape)
        corners, weights = _corners(planes, ((places, slice_), (outer, at_outer), (inner, at_inner)))
        found.ravel()[part] = _winners(corners, weights, at_least_half=at_least_half)
    return found if turned else np.ascontiguousarray(found.swapaxes(1, 2))


def _codes(planes: np.ndarray, *, between: Sequence[bool]) -> np.ndarray:
    """(z, x, y) uint8: the label of a voxel where it and those after it have one label, otherwise `MIXED`.

    Args:
        planes: (z, x, y) labels.
        between: for each axis, whether the voxels after it along this axis count.
    """
    codes = planes.copy()
    for axis, counts in enumerate(between):
        if counts:
            voxels = np.moveaxis(codes, axis, 0)
            # Cells of the axes before that are mixed already stay so: they differ from every label.
            np.copyto(voxels[:-1], MIXED, where=voxels[:-1] != voxels[1:])
    return codes


def _corners(planes: np.ndarray, samples: Sequence[tuple[_Taps, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The voxels around samples.

    Args:
        planes: (z, x, y) labels, contiguous.
        samples: for each axis its taps, and the numbers (n,) of the samples.

    Returns: labels (m, n) uint8 of the voxels around each sample, and their weights (m, n) float32.
    """
    steps = (planes.shape[1] * planes.shape[2], planes.shape[2], 1)
    sides = []
    for step, (taps, numbers) in zip(steps, samples, strict=True):
        share = taps.share[numbers]
        sides.append([(taps.low[numbers] * step, 1 - share)])
        if taps.between:
            sides[-1].append((taps.high[numbers] * step, share))
    labels, weights = [], []
    for (z, of_z), (x, of_x), (y, of_y) in itertools.product(*sides):
        labels.append(planes.ravel()[z + x + y])
        weights.append(of_z * of_x * of_y)
    return np.stack(labels), np.stack(weights)


def _winners(corners: np.ndarray, weights: np.ndarray, *, at_least_half: bool) -> np.ndarray:
    """(n,) uint8 labels of samples, see `interpolated_labels`, from those of the voxels around them, see `_corners`."""
    best = np.zeros(corners.shape[1], np.float32)
    winners = np.zeros(corners.shape[1], np.uint8)
    for value in np.flatnonzero(np.bincount(corners.ravel(), minlength=1)):
        share = np.multiply(weights, corners == value).sum(axis=0)
        if at_least_half:
            winners[share >= 0.5] = value
            continue
        better = share > best
        winners[better] = value
        best[better] = share[better]
    return winners
