"""Whether one latent gives the same anatomy in every domain, measured without labels, on the generator alone."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..networks.generator import Generator

GREY_LEVELS = 16  # of the joint histograms, over [-1, 1]
MAX_SLICES, MAX_SIDE = 128, 64  # so many slices up to this side, fewer above to limit the time
MAX_HEIGHTS = 12
SEED = 20_241_006  # all runs and rounds are measured on the same latents


@torch.no_grad()
def shared_anatomy(generator: Generator, *, batch_size: int = 32) -> dict[tuple[str, str], float]:
    """Shared anatomy of every pair of domains: how far one domain's slice determines the other's for equal latents.

    Mutual information of the grey levels of the two slices, above that of slices of two *different* latents at the
    same height (chance: outlines agree anyway), as a share of the largest possible value (a normalisation similar to
    Studholme et al. 1999). About 0: at chance, so labels cannot carry over. 1: each slice determines the other. The
    grey level of an image of several channels is their mean.

    A high score shows that two domains have the same anatomy, not that it is realistic: see `quality.site_quality`.

    Args:
        generator: in evaluation mode; its fixed noise is used.
        batch_size: slices that are generated at once.

    Returns: the score by pair of domain names, each pair once, at most 1.
    """
    config, device = generator.config, next(generator.parameters()).device
    rng = torch.Generator().manual_seed(SEED)
    heights = torch.linspace(0, config.z_bins - 1, min(MAX_HEIGHTS, config.z_bins)).round().long()
    each = max(2, round(MAX_SLICES * min(1.0, MAX_SIDE / config.image_size) / len(heights)))
    z_bin = heights.repeat_interleave(each).to(device)
    z = torch.randn(len(z_bin), config.latent_dim, generator=rng).to(device)
    other = torch.arange(len(z_bin)).view(-1, each).roll(1, dims=1).flatten()  # another latent, same height
    shown = {}
    for index, name in enumerate(config.domains):
        parts = []
        for start in range(0, len(z), batch_size):
            part = slice(start, start + batch_size)
            domain = torch.full_like(z_bin[part], index)
            parts.append(generator(z[part], z_bin[part], domain, noise=generator.fixed_noise()).mean(dim=1).cpu())
        shown[name] = grey_levels(torch.cat(parts))
    scores = {}
    for a, b in itertools.combinations(config.domains, 2):
        same, most = mutual_information(shown[a], shown[b])
        chance, _ = mutual_information(shown[a], shown[b][other])
        room = float((most - chance).mean())
        scores[a, b] = float((same - chance).mean()) / room if room > 1e-6 else 0.0
    return scores


def grey_levels(images: Tensor) -> Tensor:
    """Slices (N, H, W) in [-1, 1] as integers 0 .. GREY_LEVELS - 1."""
    return ((images.clamp(-1, 1) + 1) / 2 * GREY_LEVELS).long().clamp(max=GREY_LEVELS - 1)


def mutual_information(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Mutual information of pairs of slices.

    Args:
        first: (N, H, W) integers from 0 to GREY_LEVELS - 1.
        second: (N, H, W), as `first`.

    Returns: the mutual information of each pair and its upper bound, the smaller entropy; both (N,), in bits.
    """
    number = torch.arange(len(first))[:, None, None].expand_as(first)
    cells = GREY_LEVELS**2
    index = (number * cells + first * GREY_LEVELS + second).flatten()
    joint = torch.bincount(index, minlength=len(first) * cells).double().view(-1, GREY_LEVELS, GREY_LEVELS)
    joint = joint / joint.sum(dim=(1, 2), keepdim=True)
    of_first, of_second = entropy(joint.sum(dim=2)), entropy(joint.sum(dim=1))
    return of_first + of_second - entropy(joint.flatten(1)), torch.minimum(of_first, of_second)


def entropy(shares: Tensor) -> Tensor:
    """Entropy (N,) in bits of distributions (N, k), which sum to 1 over k."""
    return -torch.special.xlogy(shares, shares).sum(dim=1) / torch.log(torch.tensor(2.0, dtype=shares.dtype))
