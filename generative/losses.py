"""The factory's losses: pure functions of tensors, one per equation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_logistic(real: Tensor, fake: Tensor) -> Tensor:
    """mean softplus(-real) + mean softplus(fake) (Goodfellow et al. 2014); scores (B,), returns a scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def generator_non_saturating(fake: Tensor) -> Tensor:
    """mean softplus(-fake) (Goodfellow et al. 2014); scores (B,), returns a scalar."""
    return F.softplus(-fake).mean()


def r1_penalty(score: Tensor, real: Tensor) -> Tensor:
    """Squared slope of the discriminator at real slices (Mescheder et al. 2018).

    Args:
        score: (B,), unbounded, computed from `real`.
        real: (B, 1, H, W), requiring gradients.

    Returns: (B,), not yet averaged or weighted.
    """
    (slope,) = torch.autograd.grad(score.sum(), real, create_graph=True)
    return slope.square().sum(dim=(1, 2, 3))
