"""From one latent to the slices of a whole volume."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UsageError
from .config import FactoryConfig
from .networks.generator import Generator, Style, Synthesis

# Pixels of the slices that are synthesised at once. On a CPU small groups stay in its cache: at 64 px, a slice in a
# group of 8 takes half as long as in a group of 32.
GROUP_PIXELS = {"cpu": 2**15, "cuda": 2**20}
LARGEST_GROUP = 32
CENTRE_DRAWS, CENTRE_SEED = 256, 20_241_121  # latents whose mean is the centre of truncation, per height


def slice_heights(z_depth: int, slices_per_bin: int) -> Tensor:
    """Heights of the slices of a volume, evenly spaced from bin 0 to bin z_depth - 1.

    Returns: ((z_depth - 1) * slices_per_bin,) float32.
    Raises: UsageError if these are less than two slices.
    """
    count = (z_depth - 1) * slices_per_bin
    if z_depth < 2 or slices_per_bin < 1 or count < 2:
        raise UsageError(f"{z_depth} bins with {slices_per_bin} slices each make no volume; at least two are needed")
    return torch.linspace(0, z_depth - 1, count)


def subject_heights(config: FactoryConfig, slices_per_bin: int) -> Tensor:
    """Heights of all slices of one subject: those of `slice_heights`, or the single height of a picture.

    Returns: (N,) float32 in [0, z_bins - 1].
    """
    return torch.zeros(1) if config.pictures else slice_heights(config.z_bins, slices_per_bin)


def group_size(config: FactoryConfig, device: torch.device) -> int:
    """Number of slices that are synthesised at once.

    It depends on factory and kind of device alone: libraries choose other algorithms for other batch sizes, and the
    same volume would differ in its last bits.
    """
    return max(1, min(LARGEST_GROUP, GROUP_PIXELS.get(device.type, GROUP_PIXELS["cpu"]) // config.image_size**2))


def between_latents(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Spherical interpolation of two normal latents (White 2016).

    The length stays that of a latent, whereas a straight line would pass near zero.

    Args:
        first: (1, d), returned for share 0.
        second: (1, d), returned for share 1.
        share: in [0, 1].

    Returns: (1, d).
    """
    if not 0 < share < 1:
        return first if share <= 0 else second
    a, b = first.double(), second.double()
    cosine = ((a * b).sum() / (a.norm() * b.norm())).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if angle < 1e-4:
        return torch.lerp(first, second, share)
    mixed = (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)
    return mixed.to(first.dtype)


@torch.no_grad()
def centre_style(generator: Generator, domain: int, encoding: Tensor | None = None) -> Tensor:
    """Mean styles of every height bin, the centre of truncation.

    Args:
        generator: in evaluation mode.
        domain: index of the domain.
        encoding: (encoding_dim,), the domain's mean embedding, or None.

    Returns: (z_bins, n_latent, latent_dim).
    """
    config, device = generator.config, next(generator.parameters()).device
    rng = torch.Generator().manual_seed(CENTRE_SEED)
    z = torch.randn(CENTRE_DRAWS, config.latent_dim, generator=rng).to(device)
    domains = torch.full((CENTRE_DRAWS,), domain, device=device)
    given = None if encoding is None else encoding.to(device).expand(CENTRE_DRAWS, -1)
    means = [
        generator.style_of(z, torch.full_like(domains, z_bin), domains, encoding=given).w.mean(dim=0)
        for z_bin in range(config.z_bins)
    ]
    return torch.stack(means)


@torch.no_grad()
def synthesise_slices(generator: Generator, domain: Tensor, *, rng: torch.Generator) -> Synthesis:
    """Slices of as many subjects, at random heights.

    Args:
        generator: in evaluation mode, on the CPU.
        domain: (B,) integers, the domain of each slice.
        rng: of latents, heights and noise.
    """
    config, size = generator.config, len(domain)
    z = torch.randn(size, config.latent_dim, generator=rng)
    height = torch.rand(size, generator=rng) * (config.z_bins - 1)
    noise = generator.draw_noise(size, rng)
    return generator.synthesise(generator.style_at(z, height, domain), noise)


@torch.no_grad()
def synthesise_volume(
    generator: Generator,
    heights: Tensor,
    *,
    domain: int,
    rng: torch.Generator,
    z: Tensor | None = None,
    encoding: Tensor | None = None,
    truncation: float = 1.0,
) -> Iterator[Synthesis]:
    """One subject, slice by slice: the whole volume has one latent, only the height changes.

    Args:
        generator: in evaluation mode.
        heights: (N,) in [0, z_bins - 1].
        domain: index of the domain.
        rng: CPU generator of the noise, and of the latent if z is None.
        z: (1, latent_dim), the subject's latent; None draws one.
        encoding: (encoding_dim,), the domain's mean embedding, or None.
        truncation: 1 leaves the latent as it is, 0 gives the mean subject (Karras et al. 2019); smaller values give
            less variety and fewer artefacts.

    Yields: groups of slices, in order.
    Raises: UsageError if a height is above the highest bin.
    """
    config, device = generator.config, next(generator.parameters()).device
    if heights.max() > config.z_bins - 1:
        raise UsageError(f"heights go up to {heights.max():.0f}; they must be from 0 to {config.z_bins - 1}")
    if z is None:
        z = torch.randn(1, config.latent_dim, generator=rng)
    z, size = z.to(device), group_size(config, device)
    noise = [layer.to(device) for layer in generator.draw_noise(len(heights) if generator.grain else 1, rng)]
    # The subject at every bin, once; between bins its latents lie on straight lines.
    bins = torch.arange(config.z_bins, device=device)
    given = None if encoding is None else encoding.to(device).expand(len(bins), -1)
    subject = generator.style_of(z.expand(len(bins), -1), bins, torch.full_like(bins, domain), encoding=given)
    if truncation != 1:
        towards = torch.lerp(centre_style(generator, domain, encoding), subject.w, truncation)
        subject = Style(towards, subject.constant, subject.domain)
    for start in range(0, len(heights), size):
        # The last group is filled up with its last slice, so that every group is computed alike.
        chosen = torch.arange(start, start + size).clamp(max=len(heights) - 1)
        style = subject.at(heights[chosen].to(device))
        parts = [layer[chosen.to(device)] if generator.grain else layer for layer in noise]
        made, kept = generator.synthesise(style, parts), min(size, len(heights) - start)
        yield made.first(kept)
