"""The format that all slices of a site share: size, spacing, plane, intensity window and height bins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import ConfigError, VolumeError
from .case_files import NAN
from .slice_choices import COMPATIBILITY, CONTENTS, CROPS, MAX_CHANNELS, PLANES

PICTURE_SIDE = 100.0  # millimetres that stand for the longer side of a picture
BACKGROUND = -1.0  # value of padding, the darkest of the [-1, 1] scale
WINDOW_BINS = 256
PAIRS_PAY = 1 << 19  # bytes from which counting them in pairs is faster: the table of pairs is as large
COUNTED = 1 << 24  # values that are counted at once: OpenCV's counts are float32, which is exact up to here
LARGEST_EXACT = 1 << 24  # up to here float32 has all whole numbers
PART = 1 << 18  # bytes of the parts in which large arrays are worked on
WINDOW_SHARES = (0.001, 0.999)  # of all voxels, below the window's ends


@dataclass(frozen=True, kw_only=True)
class SliceFormat:
    """The format of all slices of a store, which new images are brought to as well.

    Attributes:
        size: pixels per side.
        spacing: millimetres per pixel, both in-plane axes.
        slice_spacing: millimetres from slice to slice; None leaves the slices where they were acquired.
        window: of each channel the lowest and the highest standardised intensity, which become -1 and 1. A single pair
            is that of one channel.
        z_bins: number of height bins that a volume is divided into.
        plane: orientation of the slices, see `fedfactory.imaging.volumes.orientation`.
        crop: "air" removes the air around the patient first, "none" does not.
        compatibility: "published" crops and resamples as the published program did, "none" does not.
        content: "volumes" or "pictures". The longer side of a picture counts as PICTURE_SIDE millimetres, for it has
            none; it is one slice, and is never turned or cropped.
        colour: whether the three channels are red, green and blue, which share one rule of intensity.
        nan: what becomes of NaN and infinite voxels, see `fedfactory.imaging.case_files.Reading`.
    """

    size: int
    spacing: float
    window: tuple[tuple[float, float], ...]
    z_bins: int
    slice_spacing: float | None = None
    plane: str = "axial"
    crop: str = "air"
    compatibility: str = "none"
    content: str = "volumes"
    colour: bool = False
    nan: str = NAN[0]

    def __post_init__(self) -> None:
        pairs = self.window if self.window and isinstance(self.window[0], (tuple, list)) else (self.window,)
        object.__setattr__(self, "window", tuple(tuple(float(value) for value in pair) for pair in pairs))
        for name in ("size", "z_bins"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.spacing > 0:
            raise ConfigError(f"spacing is {self.spacing} mm; it must be positive")
        if not (self.slice_spacing is None or self.slice_spacing > 0):
            raise ConfigError(f"slice_spacing is {self.slice_spacing} mm; it must be positive or None")
        if any(len(pair) != 2 for pair in self.window):
            raise ConfigError(f"window is {self.window}; it must have two values for each channel")
        if any(not high > low for low, high in self.window):
            raise ConfigError(f"window is {self.window}; of every pair the second value must be above the first")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ConfigError(f"window has {self.channels} channels; it must have 1 to {MAX_CHANNELS}")
        if self.colour and (self.channels != 3 or len(set(self.window)) != 1):
            raise ConfigError(f"colour is True, but window is {self.window}; it must be three times the same")
        for name, value, known in (
            ("plane", self.plane, PLANES),
            ("crop", self.crop, CROPS),
            ("compatibility", self.compatibility, COMPATIBILITY),
            ("content", self.content, CONTENTS),
            ("nan", self.nan, NAN),
        ):
            if value not in known:
                raise ConfigError(f"{name} is '{value}'; choose one of {', '.join(known)}")

    @property
    def channels(self) -> int:
        """Number of channels of a slice."""
        return len(self.window)

    @property
    def pictures(self) -> bool:
        """Whether the slices are pictures."""
        return self.content == "pictures"

    @property
    def published(self) -> bool:
        """Whether the published program is followed."""
        return self.compatibility == "published"

    @property
    def field_of_view(self) -> float:
        """Millimetres per side of a slice."""
        return self.size * self.spacing

    def to_dict(self) -> dict[str, object]:
        """JSON-able copy, the inverse of `from_dict`."""
        return {**asdict(self), "window": [list(pair) for pair in self.window]}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> SliceFormat:
        """The format that `to_dict` wrote.

        Raises: ConfigError for missing, unknown or unusable entries.
        """
        try:
            return cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"slice format: {error}; see SliceFormat for names and types") from None

    def scale(self, standardised: np.ndarray) -> np.ndarray:
        """Standardised intensities (n, channels, ...) to float32 in [-1, 1]; NaN (outside the image) becomes -1."""
        low, high = self._limits(standardised.ndim)
        scaled = standardised.astype(np.float32)  # a copy: the rest happens in place
        np.clip(scaled, low, high, out=scaled)
        scaled -= low
        scaled *= 2 / (high - low)
        scaled -= 1
        np.copyto(scaled, BACKGROUND, where=np.isnan(scaled))
        return scaled

    def unscale(self, scaled: np.ndarray) -> np.ndarray:
        """Values (n, channels, ...) in [-1, 1] back to standardised intensities, float32."""
        low, high = self._limits(scaled.ndim)
        return (scaled.astype(np.float32) + 1) / 2 * (high - low) + low

    def _limits(self, dimensions: int) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the windows, (channels, 1, ...) float32, for arrays with this number of axes."""
        ends = np.array(self.window, np.float32).reshape(-1, 2, *(1,) * (dimensions - 2))
        return ends[:, 0], ends[:, 1]


def mean_and_deviation(data: np.ndarray, counts: np.ndarray | None = None) -> tuple[float, float]:
    """Mean and population standard deviation of an image of any shape.

    Args:
        data: voxels, or grey levels.
        counts: how often each grey level occurs; None for voxels.

    Raises: VolumeError for a constant image.
    """
    if counts is None:
        mean = _sum(data) / data.size
        deviation = float(np.sqrt(_sum(data, squares_around=np.float32(mean)) / data.size))
    else:
        mean = float(np.average(data.astype(np.float64), weights=counts))
        deviation = float(np.sqrt(np.average(np.square(data - np.float32(mean), dtype=np.float64), weights=counts)))
    if deviation < 1e-6 * max(1.0, abs(mean)):
        raise VolumeError(f"all voxels have the same value (deviation {deviation:.1g}); use an image with contrast")
    return mean, deviation


def _sum(data: np.ndarray, *, squares_around: np.float32 | None = None) -> float:
    """The sum of voxels of any shape, or of the squares of their differences from a number."""
    total = 0.0
    for part in parts_of(data):
        if squares_around is not None:
            total += float(np.square(part - squares_around).sum(dtype=np.float64))
        else:
            total += float(part.sum(dtype=np.float64))
    return total


def parts_of(values: np.ndarray) -> Iterator[np.ndarray]:
    """An array of any shape in parts that fit into the processor's cache, in the order in which it lies in memory.

    Several steps for one part after the other take half the time of each step for the whole of a large array.
    """
    whole = values.transpose(np.argsort([-abs(step) for step in values.strides], kind="stable"))
    if whole.ndim < 2 or whole.nbytes <= PART:
        yield np.atleast_1d(whole)
        return
    several = max(1, PART * len(whole) // max(1, whole.nbytes))
    for first in range(0, len(whole), several):
        yield whole[first : first + several]


def z_bins_of(num_slices: int, z_bins: int) -> np.ndarray:
    """Height bin of each slice, (num_slices,) integers: floor(z_bins * s / num_slices) for slice s."""
    return (np.arange(num_slices) * z_bins) // num_slices


def count_intensities(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Histogram of values of any shape in 256 equal bins from low to high, (256,); other values and NaN are ignored."""

    def bins_of(part: np.ndarray) -> np.ndarray:
        all_inside = part.min(initial=high) >= low and part.max(initial=low) <= high  # False for NaN, too
        inside = part if all_inside else part[(part >= low) & (part <= high)]
        # numpy's own histogram is three times slower here: it corrects every value for the rounding of its bin.
        scaled = (inside - np.float32(low)) * np.float32(WINDOW_BINS / (high - low))
        return np.minimum(scaled, WINDOW_BINS - 1, out=scaled).astype(np.uint8)

    return count_bins(values, bins_of)


def count_bins(values: np.ndarray, bins_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """How many values of an array of any shape are in each bin, (256,) int64.

    Args:
        values: the array.
        bins_of: for values, the bins of those that count, uint8.
    """
    bins, done = np.empty(values.size, np.uint8), 0
    for part in parts_of(values):
        found = bins_of(part).ravel()
        bins[done : done + len(found)] = found
        done += len(found)
    return count_bytes(bins[:done])


def count_bytes(values: np.ndarray) -> np.ndarray:
    """How often each value occurs in a uint8 array of any shape, (256,) int64.

    In large arrays two values are counted at once, as a number of 16 bits: many equal values would wait for each other.
    """
    flat = values.ravel(order="K")
    if len(flat) < PAIRS_PAY:
        return _count(flat, 256)
    pairs = _count(flat[: len(flat) // 2 * 2].view(np.uint16), 1 << 16).reshape(256, 256)
    counts = pairs.sum(axis=0) + pairs.sum(axis=1)
    if len(flat) % 2:
        counts[flat[-1]] += 1
    return counts


def count_whole(values: np.ndarray, low: float, high: float) -> np.ndarray | None:
    """How often each whole number from low to high occurs in values of any shape that lie between them, (n,) int64.

    Returns: None if one of the values is no whole number, or there are more than 65536 numbers.
    """
    number = high - low + 1
    if not number <= 1 << 16 or low != round(low) or max(-low, high) > LARGEST_EXACT:  # so too for NaN
        return None
    found, done = np.empty(values.size, np.uint16), 0
    for part in parts_of(values):
        above = part - np.asarray(low, part.dtype)
        whole = found[done : done + part.size].reshape(part.shape)
        np.copyto(whole, above, casting="unsafe")
        if not np.array_equal(whole, above):
            return None
        done += part.size
    return _count(found, int(number))


def _count(values: np.ndarray, number: int) -> np.ndarray:
    """How often each value below `number` occurs in uint8 or uint16 values (n,), int64."""
    import cv2  # only here: messages about formats do not wait for it

    counts = np.zeros(number, np.int64)
    for first in range(0, len(values), COUNTED):
        # By OpenCV, which takes such values as they are; numpy makes an index of eight bytes of each one first.
        part = cv2.calcHist([values[None, first : first + COUNTED]], [0], None, [number], [0, number])
        counts += part.ravel().astype(np.int64)
    return counts


def intensity_window(low: float, high: float, counts: np.ndarray) -> tuple[float, float]:
    """The window between the 0.1 % and 99.9 % quantiles: right edges of the first bins that reach these shares.

    Args:
        low: lower end of the histogram.
        high: upper end of the histogram.
        counts: (256,) voxels in each of the equal bins.

    Returns: lower and upper end of the window.
    """
    edges = np.linspace(low, high, WINDOW_BINS + 1)[1:]
    share = np.cumsum(counts) / counts.sum()
    first, last = (int(np.argmax(share >= limit)) for limit in WINDOW_SHARES)
    return float(edges[first]), float(edges[max(last, first + 1)]) if first < WINDOW_BINS - 1 else float(high)
