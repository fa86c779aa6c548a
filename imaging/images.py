"""The interface through which images are read: volumes and pictures, of one or several channels."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from ..errors import VolumeError
from .cropping import crop_box, refuse_centre_in_air
from .nifti.geometry import NiftiGeometry
from .slice_format import BACKGROUND, PART, SliceFormat, count_bins, count_bytes, count_whole, mean_and_deviation
from .slice_grid import SliceGrid
from .volumes import Volume, corner_distance, grid_tolerance, in_plane, turned_affine

HISTOGRAM_BINS = 64
STORED = np.float16  # type of the intensities in a store
FAR_OUTSIDE = 0.05  # of the window's width
BLANK_STEP = 8  # voxels, along both axes, between those that are looked at first
HALF_BY_OPENCV = int(cv2.__version__.split(".")[0]) >= 5  # earlier versions have no sums of this type

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Intensities:
    """The grey levels of one channel of an image; v becomes (v - mean) / deviation.

    Attributes:
        mean: of the kept voxels; 0 where grey levels have an absolute meaning, and for a channel that is missing.
        deviation: standard deviation of the kept voxels; 1 where `mean` is 0 for one of these reasons.
        low: lowest kept voxel.
        high: highest kept voxel.
        counts: (64,) histogram of the kept voxels in equal bins from `low` to `high`.
    """

    mean: float
    deviation: float
    low: float
    high: float
    counts: tuple[int, ...]

    @classmethod
    def of(cls, values: np.ndarray, *, absolute: bool = False) -> Intensities:
        """Grey levels of voxels of any shape.

        Raises: VolumeError if all are equal, unless their meaning is absolute.
        """
        low, high = float(values.min()), float(values.max())
        if (counts := count_whole(values, low, high)) is not None:
            found = np.flatnonzero(counts)
            return cls._of_levels((found + low).astype(np.float32), counts[found], absolute=absolute)
        mean, deviation = (0.0, 1.0) if absolute else mean_and_deviation(values)
        return cls(mean=mean, deviation=deviation, low=low, high=high, counts=tuple(histogram(values, low, high)))

    @classmethod
    def of_bytes(cls, values: np.ndarray, *, absolute: bool = False) -> Intensities:
        """`of(values / 255)` for uint8 values of any shape, each of whose 256 grey levels is looked at once.

        Raises: as `of`.
        """
        counts = count_bytes(values)
        found = np.flatnonzero(counts)
        return cls._of_levels(found.astype(np.float32) / np.float32(255), counts[found], absolute=absolute)

    @classmethod
    def _of_levels(cls, levels: np.ndarray, counts: np.ndarray, *, absolute: bool) -> Intensities:
        """Of the grey levels (n,) float32 that occur, ascending, and how often each of them does."""
        low, high = float(levels[0]), float(levels[-1])
        mean, deviation = (0.0, 1.0) if absolute else mean_and_deviation(levels, counts)
        binned = np.bincount(histogram_bins(levels, low, high), weights=counts, minlength=HISTOGRAM_BINS).astype(int)
        return cls(mean=mean, deviation=deviation, low=low, high=high, counts=tuple(binned.tolist()))


MISSING = Intensities(mean=0.0, deviation=1.0, low=0.0, high=0.0, counts=(0,) * HISTOGRAM_BINS)


@dataclass(frozen=True, kw_only=True)
class ImageFacts:
    """What is known of an image's voxels.

    Attributes:
        voxels: SHA-256 over the voxels and the shape alone.
        intensities: grey levels of each channel.
        blank: number of slices of the kept part in which all voxels are equal, in every channel.
    """

    voxels: str
    intensities: tuple[Intensities, ...]
    blank: int


@dataclass(frozen=True)
class StoredSlices:
    """Slices as stores keep them.

    Attributes:
        images: (slices, channels, size, size) float16 in [-1, 1]; -1 outside the image.
        low: lowest standardised intensity of each channel.
        high: highest standardised intensity of each channel.
        clipped: share of the voxels far outside the intensity window.
    """

    images: np.ndarray
    low: tuple[float, ...]
    high: tuple[float, ...]
    clipped: float


@dataclass(frozen=True)
class StandardisedSlices:
    """Slices before their intensities are brought to a window, without their padding.

    Attributes:
        values: (m, channels, h, w) float32 standardised intensities; NaN in a channel that is missing.
        inside: the slices, rows and columns that these are.
        count: number of slices, with those that are padding alone.
    """

    values: np.ndarray
    inside: tuple[slice, slice, slice]
    count: int

    @cached_property
    def low(self) -> tuple[float, ...]:
        """Lowest value of each channel, 0 for one that is missing."""
        return self._ends(np.fmin)

    @cached_property
    def high(self) -> tuple[float, ...]:
        """Highest value of each channel, 0 for one that is missing."""
        return self._ends(np.fmax)

    def _ends(self, pick: np.ufunc) -> tuple[float, ...]:
        channels = range(self.values.shape[1])
        if not self.values.size:
            return (0.0,) * len(channels)
        ends = np.array([pick.reduce(self.values[:, channel], axis=None) for channel in channels])
        return tuple(np.nan_to_num(ends).astype(float).tolist())

    def stored(self, fmt: SliceFormat) -> np.ndarray:
        """(count, channels, size, size) float16 on the [-1, 1] scale; -1 outside the image."""
        places, rows, columns = self.inside
        images = np.full((self.count, fmt.channels, fmt.size, fmt.size), BACKGROUND, STORED)
        for place, values in zip(range(places.start, places.stop), self.values, strict=True):
            # One by one: what is worked on stays in the processor's cache.
            images[place, :, rows, columns] = half_precision(fmt.scale(values[None])[0])
        return images

    def clipped(self, fmt: SliceFormat) -> float:
        """Share of the voxels that lie far outside of the window."""
        cut = 0
        for channel, (darkest, brightest) in enumerate(fmt.window):
            slack = FAR_OUTSIDE * (brightest - darkest)  # air a little darker than the site's darkest loses nothing
            ends, values = (darkest - slack, brightest + slack), self.values[:, channel]
            cut += np.count_nonzero(values < ends[0]) if self.low[channel] < ends[0] else 0
            cut += np.count_nonzero(values > ends[1]) if self.high[channel] > ends[1] else 0
        return cut / max(1, np.count_nonzero(np.isfinite(self.values))) if cut else 0.0


class Image(ABC):
    """An image of one or several channels, on one grid.

    Attributes:
        path: of its first file, for messages.
        shape: (3,) of the stored image; that of a picture is (rows, columns, 1).
        affine: (4, 4), voxel index to millimetres (RAS+).
        channels: number of channels.
        geometry: what the header of its first NIfTI file says about the grid; None for other files.
        deferred: whether voxels are read only when they are needed, for the slices' format does not follow from them.
    """

    path: Path
    shape: tuple[int, ...]
    affine: np.ndarray
    channels: int
    geometry: NiftiGeometry | None = None
    deferred: bool = False

    def volume(self, data: np.ndarray) -> Volume:
        """Values (X, Y, Z, ...) for the stored voxels of the image as a volume on its grid, with its geometry."""
        return Volume(data, self.affine, self.geometry)

    def turned_spacing(self, plane: str) -> np.ndarray:
        """(3,) millimetres along the turned axes, see `orientation`."""
        return np.linalg.norm(turned_affine(self.affine, self.shape, plane=plane)[:3, :3], axis=0)

    @property
    def contents(self) -> Mapping[Path, bytes]:
        """All bytes of those of its files that were read whole, so that nobody reads them again."""
        return {}

    @abstractmethod
    def box(self, *, plane: str, crop: str, published: bool) -> Box:
        """First and last + 1 index of the part that is kept, along the turned axes, see `SliceFormat`."""

    @abstractmethod
    def facts(self, *, plane: str, box: Box) -> ImageFacts:
        """What is known of the kept part.

        Raises: VolumeError for a channel without contrast.
        """

    @abstractmethod
    def inner(self, grid: SliceGrid) -> np.ndarray:
        """(m, channels, h, w) float32, the grid's pixels that lie in the image, in the image's own grey levels.

        NaN in a channel that is missing.
        """

    @abstractmethod
    def shown(self) -> np.ndarray:
        """What people are shown: (X, Y, Z) of the first channel, or (rows, columns, 3) of a picture, in [0, 1]."""

    def grid(self, fmt: SliceFormat, *, centre: np.ndarray | None = None) -> SliceGrid:
        """Where the slices lie in the image.

        Args:
            fmt: of the slices.
            centre: (3,) voxel of the stored image in the middle of the slices; None takes that of the kept part.

        Raises: VolumeError if the centre is in the air that is cropped away.
        """
        box, middle = self.box(plane=fmt.plane, crop=fmt.crop, published=fmt.published), None
        if centre is not None:
            middle = in_plane(centre, self.shape, affine=self.affine, plane=fmt.plane)
            refuse_centre_in_air("the centre", middle, box)
        return SliceGrid(self.shape, self.affine, box=box, fmt=fmt, centre=middle)

    def standardised(self, grid: SliceGrid, intensities: Sequence[Intensities]) -> StandardisedSlices:
        """The slices with every channel's grey levels v as (v - mean) / deviation."""
        values = self.inner(grid)
        for channel, levels in enumerate(intensities):
            if (levels.mean, levels.deviation) == (0.0, 1.0):
                continue
            values[:, channel] -= np.float32(levels.mean)
            values[:, channel] /= np.float32(levels.deviation)
        return StandardisedSlices(values, grid.kept_pixels, grid.axes[2].count)

    def scaled(self, grid: SliceGrid, intensities: Sequence[Intensities]) -> np.ndarray:
        """(slices, channels, size, size) float32 on the [-1, 1] scale of the grid's format; -1 outside the image."""
        values = self.standardised(grid, intensities).values
        return grid.padded(grid.fmt.scale(values), BACKGROUND)

    def stored(self, grid: SliceGrid, intensities: Sequence[Intensities]) -> StoredSlices:
        """The slices on the [-1, 1] scale of the grid's format, as stores keep them."""
        slices = self.standardised(grid, intensities)
        return StoredSlices(slices.stored(grid.fmt), slices.low, slices.high, slices.clipped(grid.fmt))


class VolumeImage(Image):
    """A volume of one or several channels.

    Args:
        path: of its first file, for messages.
        volumes: one for each channel, of one grid; None for a channel that is filled with background.
        paths: of the first file of each channel, for messages about one of them; None takes `path`.
    """

    def __init__(
        self, path: Path, volumes: Sequence[Volume | None], *, paths: Sequence[Path | None] | None = None
    ) -> None:
        self.path, self.volumes = path, tuple(volumes)
        self.paths = tuple(paths or [path] * len(self.volumes))
        self.present = [volume for volume in self.volumes if volume is not None]
        self.shape, self.affine = self.present[0].data.shape, self.present[0].affine
        self.geometry = self.present[0].geometry
        self.channels = len(self.volumes)

    def box(self, *, plane: str, crop: str, published: bool) -> Box:
        """See `Image`; that of several channels holds all their boxes."""
        boxes = [crop_box(volume.turned(plane).data, crop, published=published) for volume in self.present]
        return tuple(
            (min(start for start, _ in ends), max(stop for _, stop in ends)) for ends in zip(*boxes, strict=True)
        )

    def facts(self, *, plane: str, box: Box) -> ImageFacts:
        """See `Image`."""
        part = tuple(slice(*ends) for ends in box)
        kept = [None if volume is None else volume.turned(plane).data[part] for volume in self.volumes]
        intensities = tuple(map(self._intensities, kept, self.paths))
        blank = [_blank(values) for values in kept if values is not None]
        digests = ["missing" if volume is None else digest_of_array(volume.data) for volume in self.volumes]
        whole = digests[0] if len(digests) == 1 else hashlib.sha256(" ".join(digests).encode()).hexdigest()
        return ImageFacts(voxels=whole, intensities=intensities, blank=int(np.all(blank, axis=0).sum()))

    @staticmethod
    def _intensities(values: np.ndarray | None, path: Path | None) -> Intensities:
        """Grey levels of the kept voxels (X, Y, Z) of a channel."""
        if values is None:
            return MISSING
        try:
            return Intensities.of(values)
        except VolumeError as error:
            raise VolumeError(f"{path}: {error}") from None

    def inner(self, grid: SliceGrid) -> np.ndarray:
        """See `Image`."""
        if self.channels == 1:  # without a copy
            return grid.inner_image(self.present[0])[:, None]
        missing = np.full([part.stop - part.start for part in grid.kept_pixels], np.nan, np.float32)
        return np.stack([missing if v is None else grid.inner_image(v) for v in self.volumes], axis=1)

    def shown(self) -> np.ndarray:
        """See `Image`."""
        return self.present[0].data


def on_grid_of(image: Volume, other: Volume, path: Path, *, image_path: Path | None = None) -> Volume:
    """`other` in the stored axis order of the image, on the image's own grid.

    Grids are equal if no corner lies further off than `grid_tolerance` allows. Where the header of one of the two
    places its voxels in two ways, either may fit: what was drawn in a program that reads the image by its qform lies
    there, voxel for voxel.

    Args:
        image: has the grid.
        other: volume that is to lie on it.
        path: of `other`, for the message.
        image_path: of the image, for the message; None calls it "its image".

    Raises: VolumeError if it is of another grid.
    """
    if other is image:
        return other
    name, shape = image_path or "its image", image.data.shape
    reasons: list[str] = []
    for grid, placed in _pairs(image, other):
        turned = placed.ordered_like(grid)
        apart, allowed = corner_distance(turned.affine, grid.affine, shape), grid_tolerance(grid.affine)
        if turned.data.shape == shape and apart <= allowed:
            return Volume(turned.data, image.affine, image.geometry)
        if turned.data.shape != shape:
            sides = [" x ".join(map(str, volume.data.shape)) for volume in (turned, image)]
            reasons.append(
                f"shape is {turned.data.shape}, so it lies on another grid than {name} ({sides[0]}, not {sides[1]}); "
                "both must be equal"
            )
        else:
            reasons.append(
                f"its affine differs from that of {name}, so it lies on another grid: corners are up to {apart:.3g} mm "
                f"apart, {allowed:.2g} mm are allowed; export it on the grid of {name}"
            )
    raise VolumeError(f"{path}: {reasons[0]}")


def _pairs(image: Volume, other: Volume) -> Iterator[tuple[Volume, Volume]]:
    """Both volumes as they are, and then either of them by its qform, if it has another one.

    Never both: programs that move an image by its sform may leave the qform as it was, so equal ones prove nothing.
    """
    yield image, other
    for volume, pair in ((image, lambda moved: (moved, other)), (other, lambda moved: (image, moved))):
        qform = None if volume.geometry is None else volume.geometry.qform_affine
        if qform is not None and abs(np.linalg.det(qform[:3, :3])) >= 1e-9:
            yield pair(Volume(volume.data, qform))


def _blank(values: np.ndarray) -> np.ndarray:
    """(Z,) whether all voxels of a slice (X, Y) are equal."""
    few = values[::BLANK_STEP, ::BLANK_STEP]
    blank = few.max(axis=(0, 1)) == few.min(axis=(0, 1))
    for place in np.flatnonzero(blank):  # of the others a few voxels differ already
        blank[place] = values[..., place].max() == values[..., place].min()
    return blank


def histogram(values: np.ndarray, low: float, high: float) -> list[int]:
    """How many values of an array of any shape lie in each of 64 equal bins from low to high."""
    return count_bins(values, lambda part: histogram_bins(part, low, high))[:HISTOGRAM_BINS].tolist()


def histogram_bins(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """The bin of each value, 0 to 63 as uint8, see `histogram`."""
    scaled = values - np.float32(low)
    scaled *= np.float32(HISTOGRAM_BINS / max(high - low, 1e-30))
    return np.clip(scaled, 0, HISTOGRAM_BINS - 1, out=scaled).astype(np.uint8)


def digest_of_array(array: np.ndarray) -> str:
    """SHA-256 over shape and values."""
    digest = hashlib.sha256(str(array.shape).encode())
    whole = _depth_last(array)
    several = max(1, len(whole) * PART // max(1, whole.nbytes))
    for first in range(0, len(whole), several):
        digest.update(np.ascontiguousarray(whole[first : first + several]).data)
    return digest.hexdigest()


def _depth_last(array: np.ndarray) -> np.ndarray:
    """An array with the same values, for voxels (X, Y, Z) in the order of a NIfTI file one that numpy copies faster."""
    if array.ndim != 3 or array.flags.c_contiguous or not array.flags.f_contiguous:
        return array
    x, y, z = array.shape
    return cv2.transpose(array.T.reshape(z, y * x)).reshape(y, x, z).swapaxes(0, 1)


def half_precision(values: np.ndarray) -> np.ndarray:
    """float32 values of any shape as float16, rounded to the nearest as numpy does."""
    if not HALF_BY_OPENCV or not values.size:
        return values.astype(STORED)
    flat = np.ascontiguousarray(values).reshape(1, -1)
    # A twelfth of numpy's time, which rounds one number after the other.
    return cv2.add(flat, 0.0, dtype=cv2.CV_16F).reshape(values.shape)
