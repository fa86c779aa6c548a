"""The factory's losses: pure functions of tensors, one per equation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PATH_MEAN_STEP = 0.01
CHORD_FLOOR = 1e-12  # squared; keeps the derivative of the root finite for equal vectors
ARC_MARGIN = 1e-6  # keeps the derivative of the arc sine finite for opposite vectors


def discriminator_logistic(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(-real) + mean softplus(fake) (Goodfellow et al. 2014); scores (B, 1), returns a scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_non_saturating(fake: Tensor) -> Tensor:
    """mean softplus(-fake) (Goodfellow et al. 2014); scores (B, 1), returns a scalar."""
    return F.softplus(-fake).mean()


def r1_penalty(score: Tensor, real: Tensor) -> Tensor:
    """Squared slope of the discriminator at real slices (Mescheder et al. 2018).

    Args:
        score: (B, 1), unbounded, computed from `real`.
        real: (B, C, H, W), requiring gradients.

    Returns: (B,), not yet averaged or weighted.
    """
    (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    return slope.square().sum(dim=(1, 2, 3))


def path_lengths(image: Tensor, w: Tensor, noise: Tensor) -> Tensor:
    """How far slices move with the latents (Karras et al. 2020): |J^T y| per sample.

    Args:
        image: (B, C, H, W), computed from `w`.
        w: (B, n_latent, d), in the graph of `image`.
        noise: (B, C, H, W) unit normal; divided by the root of H W, whatever C, as published.

    Returns: (B,), root of the mean over layers of the squared length over d; can be differentiated.
    """
    direction = noise / (image.shape[2] * image.shape[3]) ** 0.5
    (slope,) = torch.autograd.grad((image * direction).sum(), w, create_graph=True)
    return slope.square().sum(dim=2).mean(dim=1).sqrt()


def path_penalty(lengths: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared distance of path lengths (B,) from their running mean.

    The running mean moves by a hundredth of the way first, and the gradient flows through that step, as published.

    Returns: the penalty and the new running mean without gradient, both scalars.
    """
    moved = mean + PATH_MEAN_STEP * (lengths.mean() - mean)
    return (lengths - moved).square().mean(), moved.detach()


def squared_angle(u: Tensor, v: Tensor) -> Tensor:
    """Squared angle in radians between unit vectors: (B, d) and (d,) or (B, d), returns (B,).

    2 arcsin(|u - v| / 2) instead of the arc cosine of the product, whose derivative is unbounded for equal vectors
    and which rounding can push out of its domain. Bounded gradients everywhere, also for opposite vectors.
    """
    half_chord = (u - v).square().sum(dim=-1).clamp_min(CHORD_FLOOR).sqrt() / 2
    return (2 * torch.arcsin(half_chord.clamp_max(1 - ARC_MARGIN))).square()
