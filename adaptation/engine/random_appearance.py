"""Random appearance of windows: colours, gamma, bias field, blur, resolution and noise, for a whole batch at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError
from .colours import random_colours, with_colours

BIAS_NODES = 3  # per side of the grid of a bias field
BLUR_REACH = 4  # pixels on each side of the kernel


@dataclass(frozen=True, kw_only=True)
class AppearanceVariation:
    """Probabilities and ranges of changes of appearance. Raises: ConfigError for a probability out of range.

    Attributes:
        gamma_probability: of a change of gamma, 0 to 1.
        gamma: smallest and largest exponent, drawn uniformly in its logarithm.
        bias_probability: of a smooth bias field, 0 to 1.
        bias: largest standard deviation of its logarithm.
        blur_probability: of a Gaussian blur, 0 to 1.
        blur: smallest and largest standard deviation, pixels.
        resolution_probability: of a lower resolution, 0 to 1.
        resolution: smallest and largest share of the pixels per side that are left.
        noise_probability: of noise, 0 to 1.
        noise: largest standard deviation, for intensities from 0 to 1.
        rician: share of the noise that is Rician, as in magnitude images of MRI, 0 to 1; the rest is Gaussian. There is
            no Rician noise in colour pictures.
        colour_probability: of other hues and saturation, in colour pictures, 0 to 1.
        hue: largest share of a whole turn by which hues move either way.
        saturation: smallest and largest factor.
    """

    gamma_probability: float
    gamma: tuple[float, float]
    bias_probability: float
    bias: float
    blur_probability: float
    blur: tuple[float, float]
    resolution_probability: float
    resolution: tuple[float, float]
    noise_probability: float
    noise: float
    rician: float
    colour_probability: float = 0.0
    hue: float = 0.0
    saturation: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        for part in ("gamma", "bias", "blur", "resolution", "noise", "colour"):
            value = getattr(self, f"{part}_probability")
            if not 0 <= value <= 1:
                raise ConfigError(f"{part}_probability is {value}; choose from 0 to 1")
        if not 0 <= self.rician <= 1:
            raise ConfigError(f"rician is {self.rician}; choose from 0 to 1")


# Colours: "strong" has the ranges of random contrast, see `random_contrast`; "mild" is what light and white balance of
# one camera change.
MILD = AppearanceVariation(
    gamma_probability=0.3, gamma=(0.6, 1.7), bias_probability=0.0, bias=0.0, blur_probability=0.2, blur=(0.3, 1.0),
    resolution_probability=0.2, resolution=(0.45, 0.9), noise_probability=0.15, noise=0.08, rician=0.5,
    colour_probability=0.3, hue=0.02, saturation=(0.8, 1.2),
)  # fmt: skip
STRONG = AppearanceVariation(
    gamma_probability=0.5, gamma=(0.5, 2.0), bias_probability=0.5, bias=0.35, blur_probability=0.4, blur=(0.3, 1.3),
    resolution_probability=0.15, resolution=(0.45, 0.9), noise_probability=0.6, noise=0.08, rician=0.5,
    colour_probability=0.5, hue=0.1, saturation=(0.6, 1.4),
)  # fmt: skip


UNCHANGED = AppearanceVariation(
    gamma_probability=0.0, gamma=(1.0, 1.0), bias_probability=0.0, bias=0.0, blur_probability=0.0, blur=(1.0, 1.0),
    resolution_probability=0.0, resolution=(1.0, 1.0), noise_probability=0.0, noise=0.0, rician=0.0,
)  # fmt: skip
PRESETS = {"mild": MILD, "strong": STRONG}


def random_appearance(
    windows: Tensor, variation: AppearanceVariation, *, rng: torch.Generator, colour: bool = False
) -> Tensor:
    """Windows, each with its own changes.

    Every channel has its own gamma and bias field; those of a colour picture share them. Blur and resolution are the
    same in all channels of a window, noise is different in each.

    Args:
        windows: (B, C, W, W), or stacks of D slices (B, C, D, W, W), about [0, 1].
        variation: probabilities and ranges.
        rng: random generator on the CPU.
        colour: whether the channels are red, green and blue.

    Returns: windows of the same shape.
    """
    shape, batch = windows.shape, len(windows)

    def uniform(low: float, high: float, count: int = batch) -> Tensor:
        """(count, 1, 1, 1) numbers."""
        return torch.rand(count, 1, 1, 1, generator=rng) * (high - low) + low

    def chosen(probability: float, count: int = batch) -> Tensor:
        """(count, 1, 1, 1) booleans."""
        return uniform(0, 1, count) < probability

    if colour:
        turn, saturation = random_colours(batch, variation.hue, variation.saturation, rng=rng)
        changed = chosen(variation.colour_probability).view(batch, *[1] * (windows.ndim - 1))
        windows = torch.where(changed, with_colours(windows, turn, saturation), windows)
    count = batch if colour else batch * shape[1]  # of what has a gamma and a bias field of its own
    windows = windows.reshape(count, -1, *shape[-2:])
    exponent = torch.exp(uniform(math.log(variation.gamma[0]), math.log(variation.gamma[1]), count))
    windows = torch.where(chosen(variation.gamma_probability, count), with_gamma(windows, exponent), windows)
    field = torch.randn(count, 1, BIAS_NODES, BIAS_NODES, generator=rng) * uniform(0, variation.bias, count)
    biased = windows * F.interpolate(field, windows.shape[2:], mode="bicubic", align_corners=True).exp()
    windows = torch.where(chosen(variation.bias_probability, count), biased, windows)
    windows = windows.view(batch, -1, *shape[-2:])
    width = uniform(*variation.blur).flatten()
    windows = torch.where(chosen(variation.blur_probability), blurred(windows, width), windows)
    shares = uniform(*variation.resolution).flatten()
    for index in torch.nonzero(chosen(variation.resolution_probability).flatten()).flatten().tolist():
        windows[index : index + 1] = with_resolution(windows[index : index + 1], float(shares[index]))
    deviation = uniform(0, variation.noise)
    real, imaginary = (deviation * torch.randn(windows.shape, generator=rng) for _ in range(2))
    noisy = windows + real
    noisy = torch.where(chosen(0.0 if colour else variation.rician), torch.hypot(noisy, imaginary), noisy)
    return torch.where(chosen(variation.noise_probability), noisy, windows).view(shape)


def with_gamma(windows: Tensor, exponent: Tensor) -> Tensor:
    """Windows (B, D, W, W) to the power of `exponent` (B, 1, 1, 1) between their own ends, which stay."""
    low = windows.amin((1, 2, 3), keepdim=True)
    width = (windows.amax((1, 2, 3), keepdim=True) - low).clamp(min=1e-6)
    return ((windows - low) / width).clamp(0, 1) ** exponent * width + low


def blurred(windows: Tensor, deviation: Tensor) -> Tensor:
    """Windows (B, D, W, W), each blurred by its own standard deviation (B,) in pixels; edges are replicated."""
    batch = len(windows)
    places = torch.arange(-BLUR_REACH, BLUR_REACH + 1)
    kernel = torch.exp(-(places**2) / (2 * deviation[:, None] ** 2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    rows = F.pad(windows.transpose(0, 1), (BLUR_REACH, BLUR_REACH, 0, 0), mode="replicate")
    rows = F.conv2d(rows, kernel[:, None, None], groups=batch)
    both = F.pad(rows, (0, 0, BLUR_REACH, BLUR_REACH), mode="replicate")
    return F.conv2d(both, kernel[:, None, :, None], groups=batch).transpose(0, 1)


def with_resolution(windows: Tensor, share: float) -> Tensor:
    """Windows (B, D, W, W) as if `share` of their pixels per side had been acquired; (B, D, W, W)."""
    side = windows.shape[-1]
    coarse = F.interpolate(windows, max(1, int(side * share)), mode="area")
    return F.interpolate(coarse, side, mode="bilinear", align_corners=False)


def standardised(windows: Tensor, *, colour: bool = False) -> Tensor:
    """Windows with mean 0 and deviation 1: what the network sees.

    Channels are standardised one by one, for sequences of MRI have scales of their own; those of a colour picture are
    together, so that colours are kept.

    Args:
        windows: (B, C, W, W), or stacks of D slices (B, C, D, W, W).
        colour: whether the channels are red, green and blue.

    Returns: windows of the same shape.
    """
    axes = tuple(range(1 if colour else 2, windows.ndim))
    mean, deviation = windows.mean(axes, keepdim=True), windows.std(axes, keepdim=True)
    return (windows - mean) / deviation.clamp(min=1e-5)
