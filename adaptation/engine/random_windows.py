"""Random windows of labelled slices: position, rotation, size, mirroring and elastic deformation in one resampling.

One call for the whole batch leaves the time to the network: batchgenerators resamples one slice after the other with
SciPy, and MONAI's transforms take one after the other as well (`benchmarks/segmentation_engine_speed.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import ConfigError

ELASTIC_NODES = 5  # per side of the grid of random displacements


@dataclass(frozen=True, kw_only=True)
class WindowVariation:
    """How random windows vary. Raises: ConfigError if a value is out of range.

    Attributes:
        rotation: largest angle, radians; pi where scans have no common orientation.
        mirror: whether windows are flipped, left to right where the plane has a left and a right.
        scale: smallest and largest magnification.
        elastic: probability of an elastic deformation, 0 to 1.
        elastic_share: standard deviation of its displacements at the grid's nodes, as a share of the window's side;
            drawn windows have .3 to 1 times as much.
        shift_share: largest distance of the window's centre from the structures' centre along each axis, as a share of
            the window's side.
        anywhere: share of windows with a centre anywhere in the middle three fifths of the slice, 0 to 1.
    """

    rotation: float = math.pi
    mirror: bool = True
    scale: tuple[float, float] = (0.7, 1.4)
    elastic: float = 0.5
    elastic_share: float = 0.025
    shift_share: float = 0.15
    anywhere: float = 0.2

    def __post_init__(self) -> None:
        for name in ("elastic", "anywhere"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; choose from 0 to 1")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale is {self.scale}; it must be two positive numbers, the smaller one first")


def draw_centres(
    centres: Tensor, size: int, *, window: int, variation: WindowVariation, rng: torch.Generator
) -> Tensor:
    """Centres of random windows.

    Args:
        centres: (B, 2), row and column of the structures' centre in each slice, pixels.
        size: pixels per side of the slices.
        window: pixels per side of the windows.
        variation: `shift_share` and `anywhere` are used.
        rng: random generator.

    Returns: (B, 2), row and column, pixels.
    """
    near = centres + variation.shift_share * window * (2 * torch.rand(centres.shape, generator=rng) - 1)
    somewhere = size * (0.2 + 0.6 * torch.rand(centres.shape, generator=rng))
    chosen = torch.rand(len(centres), 1, generator=rng) < variation.anywhere
    return torch.where(chosen, somewhere, near)


def random_windows(
    images: Tensor, labels: Tensor, centres: Tensor, *, window: int, variation: WindowVariation, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Windows of slices, or of stacks of D neighbouring slices, and of their labels, varied alike.

    Args:
        images: (B, C, S, S), or stacks (B, C, D, S, S), in [0, 1]; outside of the slice there is 0.
        labels: (B, L, S, S), or (B, L, D, S, S), integer, below 2^24; outside of the slice there is 0.
        centres: (B, 2), row and column of the windows' centres, pixels.
        window: pixels per side of the windows.
        variation: what is varied, and how much.
        rng: random generator on the CPU.

    Returns: images in [0, 1], linearly interpolated, and labels int64 of the nearest pixels, of the given shapes but
        for their sides, which are `window`.
    """
    batch, side = len(images), images.shape[-1]
    positions = sampling_positions(batch, window, variation, rng=rng) + centres[:, None, None]
    # grid_sample wants x before y, and -1 and 1 at the outer edges of the outermost pixels.
    grid = (positions.flip(-1) * 2 + 1) / side - 1
    shown, found = (
        F.grid_sample(
            given.flatten(1, -3).to(images.dtype), grid, mode=mode, padding_mode="zeros", align_corners=False
        ).view(*given.shape[:-2], window, window)
        for given, mode in ((images, "bilinear"), (labels, "nearest"))
    )
    return shown, found.long()


def sampling_positions(batch: int, window: int, variation: WindowVariation, *, rng: torch.Generator) -> Tensor:
    """(batch, window, window, 2) row and column, relative to the window's centre, at which each pixel is read."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        """Numbers of the given shape (batch, ...)."""
        return torch.rand(*shape, generator=rng) * (high - low) + low

    axis = torch.arange(window) - (window - 1) / 2
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")
    positions = torch.stack([rows, columns], -1)[None]
    nodes = torch.randn(batch, 2, ELASTIC_NODES, ELASTIC_NODES, generator=rng)
    strength = variation.elastic_share * window * uniform(0.3, 1, batch, 1, 1, 1)
    strength = strength * (uniform(0, 1, batch, 1, 1, 1) < variation.elastic)
    bent = F.interpolate(nodes * strength, (window, window), mode="bicubic", align_corners=True)
    positions = positions + bent.movedim(1, -1)
    angle = uniform(-variation.rotation, variation.rotation, batch)
    magnification = torch.exp(uniform(math.log(variation.scale[0]), math.log(variation.scale[1]), batch))
    flip = torch.where(uniform(0, 1, batch) < 0.5 * variation.mirror, -1.0, 1.0)
    cosine, sine = angle.cos() / magnification, angle.sin() / magnification
    matrix = torch.stack([cosine * flip, -sine, sine * flip, cosine], -1).view(batch, 2, 2)
    return torch.einsum("bij,bhwj->bhwi", matrix, positions)
