"""A volume to normalised axial slices of one size, and label maps of those slices back to the volume's own grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from .errors import ConfigError, VolumeError
from .volumes import Volume

BACKGROUND = -1.0  # value of padding, the darkest of the [-1, 1] scale
WINDOW_BINS = 256
WINDOW_SHARES = (0.001, 0.999)  # of all voxels, below the window's ends


@dataclass(frozen=True, kw_only=True)
class SliceFormat:
    """What all slices of a store have in common, and what a new image must be given to look like them.

    Attributes:
        size: pixels per side.
        spacing: millimetres per pixel, both in-plane axes.
        window: lowest and highest standardised intensity, mapped to -1 and 1.
        z_bins: number of slice heights a volume is divided into.
    """

    size: int
    spacing: float
    window: tuple[float, float]
    z_bins: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", tuple(float(value) for value in self.window))
        if self.size < 1 or self.z_bins < 1:
            raise ConfigError(f"size is {self.size} and z_bins {self.z_bins}; both must be at least 1")
        if not self.spacing > 0 or not self.window[1] > self.window[0]:
            raise ConfigError(f"spacing is {self.spacing} mm and window {self.window}: not usable")

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "window": list(self.window)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SliceFormat:
        """Raises: ConfigError for missing or unknown entries."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"slice format: {error}") from None

    def scale(self, standardised: np.ndarray) -> np.ndarray:
        """Standardised intensities to [-1, 1]; NaN (outside the image) becomes -1."""
        low, high = self.window
        scaled = 2 * (np.clip(standardised, low, high) - low) / (high - low) - 1
        return np.nan_to_num(scaled, nan=BACKGROUND).astype(np.float32)


def standardise(volume: Volume) -> Volume:
    """Zero mean and unit variance over all voxels. Raises VolumeError for a constant image."""
    data = volume.data.astype(np.float64)
    deviation = data.std()
    if deviation < 1e-8 * max(1.0, abs(data.mean())):
        raise VolumeError("all voxels have the same value")
    return Volume(((data - data.mean()) / deviation).astype(np.float32), volume.affine)


class SliceGrid:
    """Where the pixels of size x size slices lie in a volume: centred, resampled in-plane, heights as acquired.

    Args:
        volume: gives the grid; its canonical third axis is the slice axis.
        size: pixels per side of the slices.
        spacing: their millimetres per pixel.
    """

    def __init__(self, volume: Volume, size: int, spacing: float) -> None:
        self.volume, self.size = volume, size
        self.canonical = volume.to_canonical()
        self.shape = self.canonical.data.shape
        ratio = spacing / self.canonical.spacing[:2]  # voxels of the volume per pixel
        self.matrix = np.array([*ratio, 1.0])
        centre = (np.array(self.shape[:2]) - 1) / 2
        self.offset = np.array([*(centre - ratio * (size - 1) / 2), 0.0])

    def image_slices(self, volume: Volume) -> np.ndarray:
        """(slices, size, size) float32 of a volume on this grid, linear between voxels; NaN outside of it."""
        data = volume.to_canonical().data.astype(np.float32)
        # Without the blur, voxels between coarser pixels would be skipped (aliasing).
        blur = [0.42 * step if step > 1.01 else 0.0 for step in self.matrix]
        data = ndimage.gaussian_filter(data, blur, mode="nearest")
        slices = self._resample(data, cval=np.nan)
        return np.moveaxis(slices, 2, 0)

    def label_slices(self, volume: Volume) -> np.ndarray:
        """(slices, size, size) uint8 of a label map on this grid: the label with the largest interpolated share."""
        data = volume.to_canonical().data
        best = np.zeros((self.size, self.size, self.shape[2]), dtype=np.uint8)
        share = self._resample((data == 0).astype(np.float32), cval=1.0)
        for value in np.unique(data)[np.unique(data) > 0]:
            candidate = self._resample((data == value).astype(np.float32), cval=0.0)
            better = candidate > share
            best[better], share[better] = value, candidate[better]
        return np.moveaxis(best, 2, 0)

    def labels_to_volume(self, probabilities: np.ndarray) -> np.ndarray:
        """(slices, classes, size, size) probabilities to a uint8 label map in the volume's stored axis order.

        Probabilities, not labels, are interpolated; voxels outside of the slices are background.
        """
        inverse, offset = 1 / self.matrix, -self.offset / self.matrix
        best = np.zeros(self.shape, dtype=np.uint8)
        share = np.full(self.shape, -np.inf, dtype=np.float32)
        for value in range(probabilities.shape[1]):
            data = np.moveaxis(probabilities[:, value], 0, 2)
            candidate = ndimage.affine_transform(
                data, inverse, offset, output_shape=self.shape, order=1, mode="constant", cval=float(value == 0)
            )
            better = candidate > share
            best[better], share[better] = value, candidate[better]
        return self.volume.from_canonical(best)

    def _resample(self, data: np.ndarray, cval: float) -> np.ndarray:
        meets = np.allclose(self.matrix, 1) and np.allclose(self.offset, np.round(self.offset))
        order = 0 if meets else 1  # where pixels meet voxels, copying keeps values exactly
        shape = (self.size, self.size, self.shape[2])
        # mode "grid-constant" would blend half a pixel of padding into the border
        return ndimage.affine_transform(
            data, self.matrix, self.offset, output_shape=shape, order=order, mode="constant", cval=cval
        )


def z_bins_of(num_slices: int, z_bins: int) -> np.ndarray:
    """(num_slices,) height bin of each slice: floor(z_bins * s / num_slices)."""
    return (np.arange(num_slices) * z_bins) // num_slices


def intensity_window(low: float, high: float, counts: np.ndarray) -> tuple[float, float]:
    """Right edges of the first bins whose cumulative share reaches 0.1 % and 99.9 %.

    Args:
        low, high: range of the histogram. counts: (256,) voxels per equal bin.
    """
    edges = np.linspace(low, high, WINDOW_BINS + 1)[1:]
    share = np.cumsum(counts) / counts.sum()
    first, last = (int(np.argmax(share >= limit)) for limit in WINDOW_SHARES)
    return float(edges[first]), float(edges[max(last, first + 1)]) if first < WINDOW_BINS - 1 else float(high)
