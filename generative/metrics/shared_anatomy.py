"""Is one latent the same anatomy in every domain? Measured without a label, on the generator alone."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..networks.generator import Generator

GREY_LEVELS = 16  # of the joint histograms, over [-1, 1]
SLICES, SIDE = 128, 64  # so many up to this side, fewer above: a look must stay cheap
HEIGHTS = 12
SEED = 20_241_006  # all runs and rounds are measured on the same latents


@torch.no_grad()
def shared_anatomy(generator: Generator, *, batch_size: int = 32) -> dict[tuple[str, str], float]:
    """How much the slices of one latent in two domains tell about each other, for every pair of domains.

    Mutual information of the grey levels of the two slices, above that of slices of two *different* latents at the
    same height (chance: outlines agree anyway), as a share of what is possible (Studholme et al. 1999 normalise
    alike). About 0: at chance, so labels cannot carry over. 1: each slice determines the other.

    It says that two domains show the same anatomy, not that either shows a real one: see `quality.site_quality`.
    Heights are evenly spread; noise is the network's own.
    """
    config, device = generator.config, next(generator.parameters()).device
    rng = torch.Generator().manual_seed(SEED)
    heights = torch.linspace(0, config.z_bins - 1, min(HEIGHTS, config.z_bins)).round().long()
    each = max(2, round(SLICES * min(1.0, SIDE / config.image_size) / len(heights)))
    z_bin = heights.repeat_interleave(each).to(device)
    z = torch.randn(len(z_bin), config.latent_dim, generator=rng).to(device)
    other = torch.arange(len(z_bin)).view(-1, each).roll(1, dims=1).flatten()  # another latent, same height
    shown = {}
    for index, name in enumerate(config.domains):
        parts = []
        for start in range(0, len(z), batch_size):
            part = slice(start, start + batch_size)
            domain = torch.full_like(z_bin[part], index)
            parts.append(generator(z[part], z_bin[part], domain, noise=generator.fixed_noise())[:, 0].cpu())
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
    """Of grey levels (N, H, W), slice by slice, in bits; and the most it can be, the smaller entropy. Both (N,)."""
    number = torch.arange(len(first))[:, None, None].expand_as(first)
    cells = GREY_LEVELS**2
    index = (number * cells + first * GREY_LEVELS + second).flatten()
    joint = torch.bincount(index, minlength=len(first) * cells).double().view(-1, GREY_LEVELS, GREY_LEVELS)
    joint = joint / joint.sum(dim=(1, 2), keepdim=True)
    of_first, of_second = entropy(joint.sum(dim=2)), entropy(joint.sum(dim=1))
    return of_first + of_second - entropy(joint.flatten(1)), torch.minimum(of_first, of_second)


def entropy(shares: Tensor) -> Tensor:
    """(N, k) shares that sum to one along k, to bits (N,)."""
    return -torch.special.xlogy(shares, shares).sum(dim=1) / torch.log(torch.tensor(2.0, dtype=shares.dtype))
