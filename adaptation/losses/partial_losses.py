"""Losses of a segmenter whose labels are incomplete."""

from __future__ import annotations

import torch
from monai.losses import MaskedDiceLoss
from torch import Tensor

_dice = MaskedDiceLoss(softmax=True, batch=True)


def informative(allowed: Tensor) -> Tensor:
    """(B, S, S) where labels (B, C, S, S) say anything: some classes are allowed, but not all."""
    count = allowed.sum(1)
    return (count > 0) & (count < allowed.shape[1])


def candidate_cross_entropy(logits: Tensor, allowed: Tensor) -> Tensor:
    """-log of the probability that a pixel belongs to one of its allowed classes.

    Where a single class is allowed this is cross entropy, so that on sparse label maps it is the partial cross entropy
    of FedICRA (arXiv 2304.05635). Pixels of which nothing is known take no part.

    Args:
        logits: (B, C, S, S). allowed: (B, C, S, S) bool.

    Returns: mean over informative pixels; 0, with a gradient of 0, if there is none.
    """
    known = informative(allowed)
    one = torch.logsumexp(logits, 1) - torch.logsumexp(logits.masked_fill(~allowed, -torch.inf), 1)
    # Not multiplied by the mask: where nothing is allowed, the term is infinite.
    return torch.where(known, one, 0.0).sum() / known.sum().clamp(min=1)


def partial_dice(logits: Tensor, allowed: Tensor) -> Tensor:
    """1 - Dice of the batch over pixels of which one class alone is allowed (MONAI's masked Dice); 0 without any."""
    sure = allowed.sum(1, keepdim=True) == 1
    if not sure.any():
        return logits.sum() * 0
    return _dice(logits, (allowed & sure).float(), sure.float())


def partial_loss(logits: Tensor, allowed: Tensor) -> Tensor:
    """Sum of the two."""
    return candidate_cross_entropy(logits, allowed) + partial_dice(logits, allowed)
