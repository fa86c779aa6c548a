"""Between a volume's own grid and the pixels of its slices: both ways, for images, label maps and single points.

Grids are parallel to each other, so resampling goes along one axis after the other, see `resampling`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .resampling.axis import Axis
from .resampling.labels import interpolated_labels
from .resampling.products import weighted
from .slice_choices import UNLABELLED
from .slice_format import SliceFormat
from .volumes import Volume, orientation, turned_affine, turned_back, turned_positions

BLUR = 0.42  # standard deviation of the blur before coarser sampling, as a share of the new pixel


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

    def inner_image(self, volume: Volume) -> np.ndarray:
        """(m, h, w) float32 of a volume on those of this grid's pixels that lie in it, see `kept_pixels`.

        Cubic splines, blurred first where pixels are coarser than voxels, cut to the voxels' own range.
        """
        data = self.kept(volume)
        weights = self._weights(lambda axis: axis.forward(3, self._blur(axis))[axis.inside])
        values = weighted(np.moveaxis(data, 2, 0), weights)
        return np.clip(values, data.min(), data.max(), out=values)

    def label_slices(self, volume: Volume) -> np.ndarray:
        """(slices, size, size) uint8 of a label map on this grid: the label with the largest interpolated share.

        Each label's indicator is interpolated linearly. As published, the highest label with a share of at least one
        half wins instead.
        """
        rows, columns, places = self.axes
        planes = np.moveaxis(self.kept(volume), 2, 0)
        labels = interpolated_labels(planes, (places, rows, columns), at_least_half=self.fmt.published)
        return self.padded(labels[:, None], 0)[:, 0]

    def sparse_label_slices(self, volume: Volume) -> np.ndarray:
        """(slices, size, size) uint8 of a sparse label map; 255 where nobody annotated.

        Every annotated voxel marks the pixel its centre lies in, however coarse the pixels are; among several labels
        the most frequent wins.

        Args:
            volume: label map with 255 where nobody annotated.
        """
        data = self.kept(volume)
        weights = self._weights(lambda axis: axis.containing()[axis.inside])
        result = np.full([part.stop - part.start for part in self.kept_pixels], UNLABELLED, dtype=np.uint8)
        best = np.zeros(result.shape, np.float32)
        for value in np.unique(data):
            if value == UNLABELLED:
                continue
            part = weighted(np.moveaxis(data == value, 2, 0), weights)
            better = part > best
            np.copyto(result, value, where=better)
            np.copyto(best, part, where=better)
        return self.padded(result[:, None], UNLABELLED)[:, 0]

    def labels_to_volume(self, probabilities: np.ndarray) -> np.ndarray:
        """(slices, classes, size, size) probabilities to a uint8 label map in the volume's stored axis order.

        Probabilities, not labels, are interpolated; voxels outside of the slices are background.
        """
        weights = self._weights(lambda axis: axis.backward(1))
        kept = np.zeros(tuple(stop - start for start, stop in self.box), dtype=np.uint8)
        best = np.full(kept.shape, -np.inf, dtype=np.float32)
        for value in range(probabilities.shape[1]):
            candidate = np.moveaxis(weighted(probabilities[:, value], weights), 0, 2)
            better = candidate > best
            np.copyto(kept, value, where=better)
            np.copyto(best, candidate, where=better)
        kept[~self._covered()] = 0
        return self._stored(kept, 0)

    def probabilities_to_volume(self, probabilities: np.ndarray) -> np.ndarray:
        """(slices, classes, size, size) to (classes, X, Y, Z) float32 in the volume's stored axis order.

        They sum to one everywhere; voxels outside of the slices are background for certain.
        """
        weights, outside = self._weights(lambda axis: axis.backward(1)), ~self._covered()
        volumes = []
        for value in range(probabilities.shape[1]):
            kept = np.moveaxis(weighted(probabilities[:, value], weights), 0, 2).copy()
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
        weights = self._weights(lambda axis: axis.backward(3))
        kept = np.moveaxis(weighted(np.pad(inside, around, mode="edge"), weights), 0, 2).copy()
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

    def padded(self, inner: np.ndarray, outside: float) -> np.ndarray:
        """(slices, channels, size, size) of values (m, channels, h, w) of `kept_pixels`; `outside` in all others."""
        places, rows, columns = self.kept_pixels
        whole = np.full(
            (self.axes[2].count, inner.shape[1], *(axis.count for axis in self.axes[:2])), outside, inner.dtype
        )
        whole[places, :, rows, columns] = inner
        return whole

    def _weights(self, of: Callable[[Axis], np.ndarray]) -> list[np.ndarray | None]:
        """The weights of rows, columns and slices; None for slices where they were acquired."""
        rows, columns, places = self.axes
        return [of(rows), of(columns), None if places.is_copy else of(places)]

    def _covered(self) -> np.ndarray:
        """(X, Y, Z) bool: which kept voxels a slice covers."""
        rows, columns, slices = (axis.covered() for axis in self.axes)
        return rows[:, None, None] & columns[None, :, None] & slices[None, None]

    def _stored(self, kept: np.ndarray, outside: float) -> np.ndarray:
        """Kept voxels (x, y, z) in the whole volume, in stored axis order; the others are `outside`."""
        whole = np.full(self.shape, outside, dtype=kept.dtype)
        whole[tuple(slice(*ends) for ends in self.box)] = kept
        return turned_back(whole, self.affine, self.fmt.plane)


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
