"""Where the samples of a slice lie along one axis of a volume, and the weights of the voxels in each sample."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

EDGE = 0.5 + 1e-6  # a voxel reaches half a voxel beyond its centre
PADDING = 12  # voxels by which SciPy replicates the edges before it finds the coefficients of a spline
NEGLIGIBLE = 1e-8  # weights below it are rounding; without them equal grids copy values exactly


@dataclass(frozen=True)
class Axis:
    """Samples along an axis: sample k lies at voxel `offset` + `ratio` * k.

    Attributes:
        start: first kept voxel.
        stop: voxel after the last kept one.
        count: number of samples.
        ratio: voxels from sample to sample.
        offset: position of sample 0, in voxels.
    """

    start: int
    stop: int
    count: int
    ratio: float
    offset: float

    @property
    def inside(self) -> slice:
        """The samples that lie in a kept voxel."""
        places = self.offset + self.ratio * np.arange(self.count)
        chosen = np.flatnonzero((places >= self.start - EDGE) & (places <= self.stop - 1 + EDGE))
        return slice(int(chosen[0]), int(chosen[-1]) + 1) if len(chosen) else slice(0, 0)

    @property
    def is_copy(self) -> bool:
        return self.ratio == 1 and self.offset == self.start and self.count == self.stop - self.start

    def forward(self, order: int, blur: float = 0.0) -> np.ndarray:
        """(count, stop - start) weights of the kept voxels in each sample; edges are replicated."""
        kept, offset = self.stop - self.start, self.offset - self.start
        return _weights(kept, self.count, ratio=self.ratio, offset=offset, order=order, blur=blur)

    def backward(self, order: int) -> np.ndarray:
        """(stop - start, count) weights of the samples in each kept voxel."""
        offset = (self.start - self.offset) / self.ratio
        kept = self.stop - self.start
        return _weights(self.count, kept, ratio=1 / self.ratio, offset=offset, order=order, blur=0.0)

    def covered(self) -> np.ndarray:
        """(stop - start,) whether a sample covers the voxel."""
        places = (np.arange(self.start, self.stop) - self.offset) / self.ratio
        return (places >= -EDGE) & (places <= self.count - 1 + EDGE)

    def containing(self) -> np.ndarray:
        """(count, stop - start) 1 where a voxel's centre lies in a sample; the nearest voxel for finer samples."""
        if self.ratio <= 1:
            return self.forward(order=0)
        voxels = np.arange(self.start, self.stop)
        nearest = np.round((voxels - self.offset) / self.ratio).astype(int)
        return (nearest[None] == np.arange(self.count)[:, None]).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _weights(n: int, count: int, *, ratio: float, offset: float, order: int, blur: float) -> np.ndarray:
    """(count, n) float32: weight of each of n voxels in sample k, which lies at offset + ratio * k."""
    impulses = np.eye(n)
    if blur:
        impulses = ndimage.gaussian_filter1d(impulses, blur, axis=0, mode="nearest")
    if order == 3:
        weights = _cubic(impulses, offset + ratio * np.arange(count))
    else:
        weights = ndimage.affine_transform(
            impulses, [ratio, 1.0], [offset, 0.0], output_shape=(count, n), order=order, mode="nearest"
        )
    weights[np.abs(weights) < NEGLIGIBLE] = 0
    weights = weights.astype(np.float32)
    weights.setflags(write=False)  # the cache returns the same array to all callers
    return weights


def _cubic(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Cubic splines through the columns of values (n, m) at places (count,) along the first axis, (count, m) float64.

    What `ndimage.affine_transform` gives in its mode "nearest", which takes three times as long: it interpolates along
    the second axis too, where nothing moves.
    """
    last = len(values) + 2 * PADDING - 1
    padded = np.pad(values, ((PADDING, PADDING), (0, 0)), mode="edge")
    coefficients = ndimage.spline_filter1d(padded, 3, axis=0, mode="nearest")
    places = np.clip(places + PADDING, 0, last)
    before = np.floor(places).astype(np.intp)
    t = (places - before)[:, None]
    basis = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3)  # times 6, B-splines
    found = np.zeros((len(places), values.shape[1]))
    for step, share in zip((-1, 0, 1, 2), basis, strict=True):
        part = coefficients[np.clip(before + step, 0, last)]
        part *= share / 6
        found += part
    return found
