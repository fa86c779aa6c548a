"""The label of each pixel: the one with the largest share of it, with every label's indicator interpolated linearly.

Where all voxels around a pixel have one label, which is nearly everywhere, the pixel has it too. Only the pixels on the
border of a structure are interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from .axis import NEGLIGIBLE, Axis

MIXED = 255  # where voxels have several labels; voxels of this very label are interpolated too, which is right as well
EQUAL = 1e-6  # difference up to which shares are equal: they are sums of rounded products
AT_ONCE = 1 << 14  # pixels that are interpolated at once


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
    found = np.empty((len(places.low), len(inner.low), len(outer.low)), np.uint8)
    last, above = -1, np.empty(found.shape[1:], np.uint8)
    for plane, low, high, share in zip(found, places.low, places.high, places.share, strict=True):
        below = above if low == last else _in_plane(planes[low], outer, inner)
        if high > low:
            last, above = high, _in_plane(planes[high], outer, inner)
        plane[:] = below
        if high > low:
            _decide(plane, above, share, at_least_half=at_least_half)
    border = np.flatnonzero(found == MIXED)
    for first in range(0, len(border), AT_ONCE):
        part = border[first : first + AT_ONCE]
        slice_, at_inner, at_outer = np.unravel_index(part, found.shape)
        corners, weights = _corners(planes, ((places, slice_), (outer, at_outer), (inner, at_inner)))
        found.ravel()[part] = _winners(corners, weights, at_least_half=at_least_half)
    return found if turned else np.ascontiguousarray(found.swapaxes(1, 2))


def _in_plane(plane: np.ndarray, outer: _Taps, inner: _Taps) -> np.ndarray:
    """(inner, outer) uint8: the label of the voxels (outer, inner) around each sample, or `MIXED` if they differ."""
    codes = plane.copy()
    if outer.between:
        codes[:-1] |= _marked(plane[:-1] != plane[1:])
    if inner.between:  # cells that are mixed already differ from every label, or stay so
        codes[:, :-1] |= _marked(codes[:, :-1] != codes[:, 1:])
    # Whole rows are copied, and the plane is transposed in between: single values take several times as long.
    return cv2.transpose(codes[outer.low])[inner.low]


def _marked(where: np.ndarray) -> np.ndarray:
    """uint8 of a boolean array: all bits, which are `MIXED`, or none."""
    return np.negative(where.view(np.uint8))


def _decide(below: np.ndarray, above: np.ndarray, share: np.float32, *, at_least_half: bool) -> None:
    """Bring the labels of a slice that lies between two planes into those of the plane below.

    Args:
        below: (inner, outer) labels of the plane below, or `MIXED`; changed.
        above: of the plane above.
        share: weight of the plane above, in (0, 1).
        at_least_half: see `interpolated_labels`.
    """
    either = (below == MIXED) | (above == MIXED)
    if share > 0.5 + EQUAL:
        below[:] = above
    elif share >= 0.5 - EQUAL:
        (np.maximum if at_least_half else np.minimum)(below, above, out=below)
    below |= _marked(either)


def _corners(planes: np.ndarray, samples: Sequence[tuple[_Taps, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The voxels around samples.

    Args:
        planes: (z, x, y) labels, contiguous.
        samples: for each axis its taps, and the numbers (n,) of the samples.

    Returns: labels (m, n) uint8 of the voxels around each sample, and their weights (m, n) float32.
    """
    steps = (planes.shape[1] * planes.shape[2], planes.shape[2], 1)
    voxels, weights = [np.intp(0)], [np.float32(1)]
    for step, (taps, numbers) in zip(steps, samples, strict=True):
        share = taps.share[numbers]
        sides = [(taps.low[numbers] * step, 1 - share)]
        if taps.between:
            sides.append((taps.high[numbers] * step, share))
        voxels = [voxel + side for voxel in voxels for side, _ in sides]
        weights = [weight * side for weight in weights for _, side in sides]
    return planes.ravel()[np.stack(voxels)], np.stack(weights)


def _winners(corners: np.ndarray, weights: np.ndarray, *, at_least_half: bool) -> np.ndarray:
    """(n,) uint8 labels of samples, see `interpolated_labels`, from those of the voxels around them, see `_corners`."""
    low, high = corners.min(axis=0), corners.max(axis=0)
    of_high = corners == high
    share = np.multiply(weights, of_high).sum(axis=0)
    winners = np.where(share >= 0.5 - EQUAL if at_least_half else share > 0.5 + EQUAL, high, low)
    several = np.flatnonzero(~(of_high | (corners == low)).all(axis=0))  # more than two labels, which is rare
    winners[several] = _winners_of_several(corners[:, several], weights[:, several], at_least_half=at_least_half)
    return winners


def _winners_of_several(corners: np.ndarray, weights: np.ndarray, *, at_least_half: bool) -> np.ndarray:
    """`_winners` of samples with any number of labels around them."""
    best = np.zeros(corners.shape[1], np.float32)
    winners = np.zeros(corners.shape[1], np.uint8)
    for value in np.flatnonzero(np.bincount(corners.ravel(), minlength=1)):
        share = np.multiply(weights, corners == value).sum(axis=0)
        better = share >= 0.5 - EQUAL if at_least_half else share > best + EQUAL
        winners[better] = value
        best[better] = share[better]
    return winners
