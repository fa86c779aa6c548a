"""Latent inversion: finding the latents from which the generator draws given slices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, l1_loss

from ...common.progress import track
from ...generative.networks.generator import Generator, Style
from ...generative.synthesis import centre_style

STEPS, LEARNING_RATE, BATCH_SIZE = 100, 0.05, 32
SCALES = (1, 2, 4)  # slices are compared at full, half and quarter resolution: layout first, then detail


def invert(generator: Generator, images: Tensor, z_bin: Tensor, *, domain: int, steps: int = STEPS) -> Style:
    """Optimise one latent per styled layer (W+) for every slice with Adam, from the mean latent of its height bin.

    Args:
        generator: frozen.
        images: (N, C, S, S) in [-1, 1].
        z_bin: (N,) integers, height bins.
        domain: index of the domain of all slices.
        steps: of Adam.

    Returns: w (N, n_latent, latent_dim) with the constants (N, c, r, r) and domains (N,) of the slices, no gradients.
    """
    centre, noise = centre_style(generator, domain), [layer_noise.detach() for layer_noise in generator.fixed_noise()]
    styles = []
    starts = range(0, len(images), BATCH_SIZE)
    for start in track(starts, "inverting slices", len(starts)):
        real, bins = images[start : start + BATCH_SIZE], z_bin[start : start + BATCH_SIZE]
        domains = torch.full((len(real),), domain)
        with torch.no_grad():
            initial = generator.style_of(torch.zeros(len(real), generator.config.latent_dim), bins, domains)
        constant = initial.constant.detach()
        w = centre[bins].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([w], lr=LEARNING_RATE)
        for _ in range(steps):
            synthetic = generator.synthesise(Style(w, constant, domains), noise).image
            loss = sum(l1_loss(avg_pool2d(synthetic, k), avg_pool2d(real, k)) for k in SCALES) * len(real)
            (w.grad,) = torch.autograd.grad(loss, w)
            optimizer.step()
        styles.append(Style(w.detach(), constant, domains))
    return Style(*(torch.cat([getattr(style, name) for style in styles]) for name in ("w", "constant", "domain")))
