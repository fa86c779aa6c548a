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
    generator: Generator,
    heights: Tensor,
    *,
    domain: int,
    rng: torch.Generator,
    batch_size: int,
    encoding: Tensor | None = None,
) -> Iterator[Synthesis]:
    """One subject, slice by slice: one latent for the whole volume, only the height changes.

    Args:
        heights: (N,) in [0, z_bins - 1].
        encoding: (encoding_dim,), the domain's mean embedding, or None.
        rng: CPU generator; the result does not depend on `batch_size`.

    Yields: batches of at most `batch_size` slices, in order.
    """
    config, device = generator.config, next(generator.parameters()).device
    if heights.max() > config.z_bins - 1:
        raise UsageError(f"heights go up to {heights.max():.0f}, this factory has bins 0 to {config.z_bins - 1}")
    z = torch.randn(1, config.latent_dim, generator=rng).to(device)
    count = len(heights) if generator.grain else 1
    noise = [one.to(device) for one in generator.draw_noise(count, rng)]
    for start in range(0, len(heights), batch_size):
        height = heights[start : start + batch_size].to(device)
        domains = torch.full((len(height),), domain, device=device)
        encodings = None if encoding is None else encoding.to(device).expand(len(height), -1)
        style = generator.style_at(z.expand(len(height), -1), height, domains, encodings)
        parts = [one[start : start + batch_size] if generator.grain else one for one in noise]
        yield generator.synthesise(style, parts)
