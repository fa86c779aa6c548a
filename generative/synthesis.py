"""From one latent to the slices of a whole volume."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UsageError
from .generator import Generator, Synthesis


def slice_heights(z_depth: int, slices_per_bin: int) -> Tensor:
    """((z_depth - 1) * slices_per_bin,) evenly spaced heights from bin 0 to bin z_depth - 1.

    Raises: UsageError if that is less than two slices.
    """
    count = (z_depth - 1) * slices_per_bin
    if z_depth < 2 or slices_per_bin < 1 or count < 2:
        raise UsageError(f"{z_depth} bins with {slices_per_bin} slices each make no volume; at least two are needed")
    return torch.linspace(0, z_depth - 1, count)


@torch.no_grad()
def synthesise_volume(
    generator: Generator, heights: Tensor, *, domain: int, rng: torch.Generator, batch_size: int
) -> Iterator[Synthesis]:
    """One subject, slice by slice: one latent for the whole volume, only the height changes.

    Args:
        heights: (N,) in [0, z_bins - 1].
        rng: CPU generator; the result does not depend on `batch_size`.

    Yields: batches of at most `batch_size` slices, in order.
    """
    config, device = generator.config, generator.constant.device
    if heights.max() > config.z_bins - 1:
        raise UsageError(f"heights go up to {heights.max():.0f}, this factory has bins 0 to {config.z_bins - 1}")
    z = torch.randn(1, config.latent_dim, generator=rng).to(device)
    noise = torch.randn(len(heights), 1, config.image_size, config.image_size, generator=rng)
    for part, noise_part in zip(heights.split(batch_size), noise.split(batch_size), strict=True):
        height = part.to(device)
        w = generator.latent_at(z.expand(len(part), -1), height)
        domains = torch.full((len(part),), domain, device=device)
        yield generator.synthesise(w, generator.constant_at(height), domains, noise_part.to(device))
