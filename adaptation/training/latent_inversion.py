"""The latents whose slices look like given ones."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, l1_loss

from ...common.progress import track
from ...generative.networks.generator import Generator, Style
from ...generative.synthesis import centre_style

STEPS, RATE, BATCH = 100, 0.05, 32
SCALES = (1, 2, 4)  # the slices are compared at full, half and quarter side: layout first, then detail


def invert(generator: Generator, images: Tensor, z_bin: Tensor, domain: int, *, steps: int = STEPS) -> Style:
    """One latent per styled layer (W+) for every slice, found by Adam from the mean latent of its height.

    Args:
        images: (N, 1, S, S) in [-1, 1]. z_bin: (N,) integers. domain: index, the same for all.

    Returns: w (N, n_latent, latent_dim), with the constants and domains of the slices, without gradients.
    """
    centre, noise = centre_style(generator, domain), [one.detach() for one in generator.fixed_noise()]
    found = []
    starts = range(0, len(images), BATCH)
    for start in track(starts, "inverting slices", len(starts)):
        real, bins = images[start : start + BATCH], z_bin[start : start + BATCH]
        domains = torch.full((len(real),), domain)
        with torch.no_grad():
            given = generator.style_of(torch.zeros(len(real), generator.config.latent_dim), bins, domains)
        constant = given.constant.detach()
        w = centre[bins].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([w], lr=RATE)
        for _ in range(steps):
            made = generator.synthesise(Style(w, constant, domains), noise).image
            loss = sum(l1_loss(avg_pool2d(made, k), avg_pool2d(real, k)) for k in SCALES) * len(real)
            (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
        found.append(Style(w.detach(), constant, domains))
    parts = [[getattr(one, name) for one in found] for name in ("w", "constant", "domain")]
    return Style(*(torch.cat(part) for part in parts))
