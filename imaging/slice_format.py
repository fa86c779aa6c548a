"""The format that all slices of a site share: size, spacing, plane, intensity window and height bins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from ..errors import ConfigError, VolumeError
from .compatibility import COMPATIBILITY
from .cropping import CROPS

PLANES = ("axial", "coronal", "sagittal", "acquired", "stored")  # see `fedfactory.imaging.volumes.orientation`

BACKGROUND = -1.0  # value of padding, the darkest of the [-1, 1] scale
UNLABELLED = 255  # label of pixels that nobody annotated
WINDOW_BINS = 256
WINDOW_SHARES = (0.001, 0.999)  # of all voxels, below the window's ends


@dataclass(frozen=True, kw_only=True)
class SliceFormat:
    """The format of all slices of a store, which new images are brought to as well.

    Attributes:
        size: pixels per side.
        spacing: millimetres per pixel, both in-plane axes.
        slice_spacing: millimetres from slice to slice; None leaves the slices where they were acquired.
        window: lowest and highest standardised intensity, which are mapped to -1 and 1.
        z_bins: number of height bins that a volume is divided into.
        plane: orientation of the slices, see `fedfactory.imaging.volumes.orientation`.
        crop: "air" removes the air around the patient first, "none" does not.
        compatibility: "published" crops and resamples as the published program did, "none" does not.
    """

    size: int
    spacing: float
    window: tuple[float, float]
    z_bins: int
    slice_spacing: float | None = None
    plane: str = "axial"
    crop: str = "air"
    compatibility: str = "none"

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", tuple(float(value) for value in self.window))
        for name in ("size", "z_bins"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.spacing > 0:
            raise ConfigError(f"spacing is {self.spacing} mm; it must be positive")
        if not (self.slice_spacing is None or self.slice_spacing > 0):
            raise ConfigError(f"slice_spacing is {self.slice_spacing} mm; it must be positive or None")
        if len(self.window) != 2:
            raise ConfigError(f"window has {len(self.window)} values; it must have two")
        if not self.window[1] > self.window[0]:
            raise ConfigError(f"window is {self.window}; its second value must be above its first")
        for name, value, known in (
            ("plane", self.plane, PLANES),
            ("crop", self.crop, CROPS),
            ("compatibility", self.compatibility, COMPATIBILITY),
        ):
            if value not in known:
                raise ConfigError(f"{name} is '{value}'; choose one of {', '.join(known)}")

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
        return {**asdict(self), "window": list(self.window)}

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
        """Standardised intensities of any shape (...,) to float32 in [-1, 1]; NaN (outside the image) becomes -1."""
        low, high = self.window
        scaled = standardised.astype(np.float32)  # a copy: the rest happens in place
        np.clip(scaled, low, high, out=scaled)
        scaled -= np.float32(low)
        scaled *= np.float32(2 / (high - low))
        scaled -= 1
        return np.nan_to_num(scaled, copy=False, nan=BACKGROUND)

    def unscale(self, scaled: np.ndarray) -> np.ndarray:
        """Values of any shape (...,) in [-1, 1] back to standardised intensities, float32."""
        low, high = self.window
        return (scaled.astype(np.float32) + 1) / 2 * (high - low) + low


def mean_and_deviation(data: np.ndarray) -> tuple[float, float]:
    """Mean and population standard deviation of an image of any shape.

    Raises: VolumeError for a constant image.
    """
    mean = float(data.mean(dtype=np.float64))
    deviation = float(np.sqrt(np.square(data - np.float32(mean)).mean(dtype=np.float64)))
    if deviation < 1e-6 * max(1.0, abs(mean)):
        raise VolumeError(f"all voxels have the same value (deviation {deviation:.1g}); use an image with contrast")
    return mean, deviation


def z_bins_of(num_slices: int, z_bins: int) -> np.ndarray:
    """Height bin of each slice, (num_slices,) integers: floor(z_bins * s / num_slices) for slice s."""
    return (np.arange(num_slices) * z_bins) // num_slices


def count_intensities(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Histogram of values of any shape in 256 equal bins from low to high, (256,); other values and NaN are ignored."""
    # numpy's own histogram is three times slower here: it corrects every value for the rounding of its bin.
    inside = values[(values >= low) & (values <= high)]
    scaled = (inside - np.float32(low)) * np.float32(WINDOW_BINS / (high - low))
    return np.bincount(np.minimum(scaled, WINDOW_BINS - 1).astype(np.uint16), minlength=WINDOW_BINS)


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
