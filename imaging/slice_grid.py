"""Between a volume's own grid and the pixels of its slices: both ways, for images, label maps and single points.

Grids are parallel to each other, so resampling is one small matrix per axis. The matrices are made by SciPy's own
interpolation of unit impulses; applying them is matrix multiplication, many times faster than interpolating voxels.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from .slice_choices import UNLABELLED
from .slice_format import SliceFormat
from .volumes import Volume, orientation, turned_affine, turned_back, turned_positions

BLUR = 0.42  # standard deviation of the blur before coarser sampling, as a share of the new pixel
EDGE = 0.5 + 1e-6  # a voxel reaches half a voxel beyond its centre
NEGLIGIBLE = 1e-8  # weights below it are rounding; without them equal grids copy values exactly
BAND = 32  # samples that are computed by one product, from the few voxels that have a weight in them


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
    weights = ndimage.affine_transform(
        impulses, [ratio, 1.0], [offset, 0.0], output_shape=(count, n), order=order, mode="nearest"
    )
    weights[np.abs(weights) < NEGLIGIBLE] = 0
    weights = weights.astype(np.float32)
    weights.setflags(write=False)  # the cache returns the same array to all callers
    return weights


class SliceGrid:
    """Where the pixels of size x size slices lie in a volume.

    Args:
        shape: shape of the volume as stored.
        affine: (4, 4), of the volume as stored.
        box: (start, stop) of the kept part along each reoriented axis, see `crop_box`.
        fmt: size, spacing and plane of the slices.
        centre: voxel in the middle of the slices, along the first two reoriented axes, fractional; None takes the
            middle of the box.

    Attributes:
        axes: the three turned axes: rows, columns, slices.
        height: millimetres from the first to the last slice, both included.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        affine: np.ndarray,
        *,
        box: tuple[tuple[int, int], ...],
        fmt: SliceFormat,
        centre: tuple[float, float] | None = None,
    ) -> None:
        self.affine, self.fmt, self.box, self.stored_shape = affine, fmt, box, shape
        turn = orientation(affine, fmt.plane)
        self.shape = tuple(int(n) for n in np.asarray(shape)[np.argsort(turn[:, 0])])
        self.spacing = np.linalg.norm(affine[:3, :3], axis=0)[np.argsort(turn[:, 0])]
        place = _published_axis if fmt.published else _centred_axis
        rows, columns = (
            place(*box[a], middle=centre and centre[a], voxel=self.spacing[a], pixel=fmt.spacing, count=fmt.size)
            for a in (0, 1)
        )
        if fmt.slice_spacing is None:
            start, stop = box[2]
            slices = Axis(start, stop, stop - start, 1.0, float(start))
        else:
            slices = place(*box[2], middle=None, voxel=self.spacing[2], pixel=fmt.slice_spacing, count=None)
        self.axes = (rows, columns, slices)
        self.height = float((box[2][1] - box[2][0]) * self.spacing[2])

    def kept(self, volume: Volume) -> np.ndarray:
        """The cropped voxels (X, Y, Z) in reoriented axis order, a view."""
        return volume.turned(self.fmt.plane).data[tuple(slice(*ends) for ends in self.box)]

    def covered_part(self, volume: Volume) -> np.ndarray:
        """The voxels (X, Y, Z) of a volume that lie in a slice, in reoriented axis order."""
        rows, columns, slices = (np.flatnonzero(axis.covered()) for axis in self.axes)
        kept = self.kept(volume)
        if not (len(rows) and len(columns) and len(slices)):
            return kept[:0]
        return kept[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1, slices[0] : slices[-1] + 1]

    def image_slices(self, volume: Volume) -> np.ndarray:
        """(slices, size, size) float32 of a volume on this grid; NaN outside the volume.

        Cubic splines, blurred first where pixels are coarser than voxels, cut to the voxels' own range.
        """
        data = self.kept(volume)
        weights = [axis.forward(3, self._blur(axis)) for axis in self.axes]
        slices = self._apply(np.moveaxis(data, 2, 0).astype(np.float32), weights)
        np.clip(slices, data.min(), data.max(), out=slices)
        return self._only_inside(slices, np.nan)

    def label_slices(self, volume: Volume) -> np.ndarray:
        """(slices, size, size) uint8 of a label map on this grid: the label with the largest interpolated share.

        Each label's indicator is interpolated linearly. As published, the highest label with a share of at least one
        half wins instead.
        """
        data = self.kept(volume)
        weights = [axis.forward(1) for axis in self.axes]
        result = np.zeros((self.axes[2].count, *(axis.count for axis in self.axes[:2])), dtype=np.uint8)
        best, rest = np.zeros(result.shape, np.float32), np.ones(result.shape, np.float32)
        for value, box in _objects(data):
            target, part = self._patch(data[box] == value, box, weights)
            if self.fmt.published:
                result[target][part >= 0.5] = value
                continue
            better = part > best[target]
            np.copyto(result[target], value, where=better)
            np.copyto(best[target], part, where=better)
            rest[target] -= part
        if not self.fmt.published:
            result[rest >= best] = 0
        return self._only_inside(result, 0)

    def sparse_label_slices(self, volume: Volume) -> np.ndarray:
        """(slices, size, size) uint8 of a sparse label map; 255 where nobody annotated.

        Every annotated voxel marks the pixel its centre lies in, however coarse the pixels are; among several labels
        the most frequent wins.

        Args:
            volume: label map with 255 where nobody annotated.
        """
        data = self.kept(volume)
        weights = [axis.containing() for axis in self.axes]
        result = np.full((self.axes[2].count, *(axis.count for axis in self.axes[:2])), UNLABELLED, dtype=np.uint8)
        best = np.zeros(result.shape, np.float32)
        for value in np.unique(data):
            if value == UNLABELLED:
                continue
            part = self._apply(np.moveaxis(data == value, 2, 0).astype(np.float32), weights)
            better = part > best
            np.copyto(result, value, where=better)
            np.copyto(best, part, where=better)
        return self._only_inside(result, UNLABELLED)

    def labels_to_volume(self, probabilities: np.ndarray) -> np.ndarray:
        """(slices, classes, size, size) probabilities to a uint8 label map in the volume's stored axis order.

        Probabilities, not labels, are interpolated; voxels outside of the slices are background.
        """
        weights = [axis.backward(1) for axis in self.axes]
        kept = np.zeros(tuple(stop - start for start, stop in self.box), dtype=np.uint8)
        best = np.full(kept.shape, -np.inf, dtype=np.float32)
        for value in range(probabilities.shape[1]):
            candidate = np.moveaxis(self._apply(probabilities[:, value], weights), 0, 2)
            better = candidate > best
            np.copyto(kept, value, where=better)
            np.copyto(best, candidate, where=better)
        kept[~self._covered()] = 0
        return self._stored(kept, 0)

    def probabilities_to_volume(self, probabilities: np.ndarray) -> np.ndarray:
        """(slices, classes, size, size) to (classes, X, Y, Z) float32 in the volume's stored axis order.

        They sum to one everywhere; voxels outside of the slices are background for certain.
        """
        weights, outside = [axis.backward(1) for axis in self.axes], ~self._covered()
        volumes = []
        for value in range(probabilities.shape[1]):
            kept = np.moveaxis(self._apply(probabilities[:, value], weights), 0, 2).copy()
            kept[outside] = value == 0
            volumes.append(self._stored(kept, float(value == 0)))
        whole = np.stack(volumes).clip(0)
        return whole / whole.sum(0)

    def image_to_volume(self, slices: np.ndarray) -> np.ndarray:
        """(slices, size, size) values to float32 in the volume's stored axis order, cubic; NaN outside the slices.

        Padding is not used: splines would ring from its edge into the image.
        """
        rows, columns, places = (axis.inside for axis in self.axes)
        inside = slices[places, rows, columns].astype(np.float32)
        around = [(s.start, n - s.stop) for s, n in zip((places, rows, columns), slices.shape, strict=True)]
        weights = [axis.backward(3) for axis in self.axes]
        kept = np.moveaxis(self._apply(np.pad(inside, around, mode="edge"), weights), 0, 2).copy()
        kept[~self._covered()] = np.nan
        return self._stored(kept, np.nan)

    def pixels_of(self, voxels: np.ndarray) -> np.ndarray:
        """(n, 3) positions in stored voxel indices to (slice, row, column), fractional; may lie outside."""
        turned = turned_positions(voxels, self.stored_shape, affine=self.affine, plane=self.fmt.plane)
        rows, columns, slices = ((turned[:, a] - axis.offset) / axis.ratio for a, axis in enumerate(self.axes))
        return np.stack([slices, rows, columns], axis=1)

    def millimetres_of(self, pixel: tuple[float, float, float]) -> tuple[float, float, float]:
        """The place of a (slice, row, column), fractional, in scanner millimetres."""
        turned = [axis.offset + axis.ratio * pixel[place] for axis, place in zip(self.axes, (1, 2, 0), strict=True)]
        affine = turned_affine(self.affine, self.stored_shape, plane=self.fmt.plane)
        x, y, z = (affine @ [*turned, 1.0])[:3].tolist()
        return x, y, z

    @property
    def pixel_volume(self) -> float:
        """Cubic millimetres of a pixel, in which a slice is as thick as slices are apart."""
        return float(np.prod([axis.ratio * mm for axis, mm in zip(self.axes, self.spacing, strict=True)]))

    @property
    def kept_pixels(self) -> tuple[slice, slice, slice]:
        """The slices, rows and columns that lie in the kept part of the volume; the rest is padding."""
        rows, columns, slices = (axis.inside for axis in self.axes)
        return slices, rows, columns

    def _blur(self, axis: Axis) -> float:
        return 0.0 if self.fmt.published or axis.ratio <= 1 else BLUR * float(np.sqrt(axis.ratio**2 - 1))

    def _patch(
        self, indicator: np.ndarray, box: tuple[slice, ...], weights: list[np.ndarray]
    ) -> tuple[tuple[slice, ...], np.ndarray]:
        """Interpolate a part of the volume.

        Args:
            indicator: (x, y, z) bool, the part.
            box: where the part lies in the kept voxels.
            weights: of rows, columns and slices.

        Returns: the (slices, rows, columns) it touches, and its share of each pixel there, float32 in [0, 1].
        """
        parts, target = [], []
        for weight, span in zip(weights, box, strict=True):
            part = weight[:, span]
            touched = np.flatnonzero(part.any(axis=1))
            rows = slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0)
            parts.append(part[rows])
            target.append(rows)
        shares = self._apply(np.moveaxis(indicator, 2, 0).astype(np.float32), parts)
        return (target[2], target[0], target[1]), shares

    def _apply(self, planes: np.ndarray, weights: list[np.ndarray]) -> np.ndarray:
        """(slices, rows, columns) float32 of (z, x, y) by the weights of rows, columns and slices.

        The axis whose voxels lie next to each other in memory comes first: no copy in another order is needed.
        """
        rows, columns, places = weights
        turned = abs(planes.strides[1]) < abs(planes.strides[2])
        first, second = (rows, columns) if turned else (columns, rows)
        planes = np.ascontiguousarray(planes.swapaxes(1, 2) if turned else planes)
        if not self.axes[2].is_copy:
            planes = np.tensordot(places, planes, axes=(1, 0))
        half = np.empty((*planes.shape[:2], len(first)), np.float32)
        # Not -1, which is not defined where no voxel is kept along an axis.
        flat, flat_half = (array.reshape(np.prod(array.shape[:2]), array.shape[2]) for array in (planes, half))
        for samples, voxels in _bands(first):
            np.matmul(flat[:, voxels], first[samples, voxels].T, out=flat_half[:, samples])
        slices = np.empty((len(half), len(rows), len(columns)), np.float32)
        for samples, voxels in _bands(second):
            if turned:
                np.matmul(half[:, voxels].swapaxes(1, 2), second[samples, voxels].T, out=slices[:, :, samples])
            else:
                np.matmul(second[samples, voxels], half[:, voxels], out=slices[:, samples])
        return slices

    def _only_inside(self, slices: np.ndarray, outside: float) -> np.ndarray:
        """The given slices (slices, rows, columns), changed: `outside` in pixels that lie in no kept voxel."""
        rows, columns, places = (axis.inside for axis in self.axes)
        for axis, inside in enumerate((places, rows, columns)):
            along = np.moveaxis(slices, axis, 0)
            along[: inside.start], along[inside.stop :] = outside, outside
        return slices

    def _covered(self) -> np.ndarray:
        """(X, Y, Z) bool: which kept voxels a slice covers."""
        rows, columns, slices = (axis.covered() for axis in self.axes)
        return rows[:, None, None] & columns[None, :, None] & slices[None, None]

    def _stored(self, kept: np.ndarray, outside: float) -> np.ndarray:
        """Kept voxels (x, y, z) in the whole volume, in stored axis order; the others are `outside`."""
        whole = np.full(self.shape, outside, dtype=kept.dtype)
        whole[tuple(slice(*ends) for ends in self.box)] = kept
        return turned_back(whole, self.affine, self.fmt.plane)


def _bands(weights: np.ndarray) -> Iterator[tuple[slice, slice]]:
    """Samples of weights (count, n), at most `BAND` at a time, and the voxels outside of which they have no weight."""
    for first in range(0, len(weights), BAND):
        touched = np.flatnonzero(weights[first : first + BAND].any(axis=0))
        voxels = slice(int(touched[0]), int(touched[-1]) + 1) if len(touched) else slice(0, 0)
        yield slice(first, min(first + BAND, len(weights))), voxels


def _objects(data: np.ndarray) -> list[tuple[int, tuple[slice, ...]]]:
    """Labels above zero of a label map (X, Y, Z), ascending, each with its bounding box."""
    boxes = ndimage.find_objects(data)
    return [(value, box) for value, box in enumerate(boxes, start=1) if box is not None]


def span_around(start: int, stop: int, middle: float | None) -> float:
    """How many voxels samples around `middle` must span to show all kept voxels.

    Args:
        start: first kept voxel.
        stop: voxel after the last kept one.
        middle: a voxel, fractional; None is the middle of the kept ones.
    """
    return stop - start if middle is None else 2 * max(middle + 0.5 - start, stop - 0.5 - middle)


def _centred_axis(
    start: int, stop: int, *, middle: float | None, voxel: float, pixel: float, count: int | None
) -> Axis:
    """Samples of exactly `pixel` millimetres around `middle`; as many as fit if count is None."""
    if count is None:
        count = max(1, round((stop - start) * voxel / pixel))
    ratio = float(pixel / voxel)
    if abs(ratio - 1) < 1e-6:  # equal spacings that were rounded differently
        ratio = 1.0
    middle = (start + stop - 1) / 2 if middle is None else middle
    offset = middle - ratio * (count - 1) / 2
    # Half a voxel off the middle does no harm, and then values are copied without interpolation.
    return Axis(start, stop, count, ratio, float(np.floor(offset + 0.5)) if ratio == 1 else offset)


def _published_axis(
    start: int, stop: int, *, middle: float | None, voxel: float, pixel: float, count: int | None
) -> Axis:
    """The kept voxels resized to a whole number of samples, then padded or cut to `count`, as published.

    The published program knows no other middle than that of the kept voxels; another one moves all samples.
    """
    kept = max(1, round(voxel / pixel * (stop - start)))
    ratio = (stop - start) / kept
    count = kept if count is None else count
    before = (count - kept) // 2 if kept <= count else -int(np.floor(kept / 2 - count / 2))
    moved = 0.0 if middle is None else middle - (start + stop - 1) / 2
    return Axis(start, stop, count, ratio, start + ratio / 2 - 0.5 - before * ratio + moved)
