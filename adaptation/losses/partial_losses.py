"""Losses of a segmenter whose labels are incomplete."""

from __future__ import annotations

import torch
from monai.losses import MaskedDiceLoss
from torch import Tensor

_dice = MaskedDiceLoss(softmax=True, batch=True)


def informative(allowed: Tensor) -> Tensor:
    """(B, S, S) bool, true where candidates (B, C, S, S) exclude some classes, but not all."""
    count = allowed.sum(1)
    return (count > 0) & (count < allowed.shape[1])


def uncertain(allowed: Tensor) -> Tensor:
    """(B, S, S) bool, true where candidates (B, C, S, S) do not tell a single class: the pixels of the energies."""
    return allowed.sum(1) != 1


def candidate_cross_entropy(logits: Tensor, allowed: Tensor) -> Tensor:
    """-log of the probability that a pixel belongs to one of its allowed classes.

    Where a single class is allowed this is cross entropy, so that on sparse label maps it is the partial cross entropy
    of FedICRA (arXiv 2304.05635). Pixels of which nothing is known do not count.

    Args:
        logits: (B, C, S, S).
        allowed: (B, C, S, S) bool, candidates.

    Returns: mean over informative pixels, a scalar; 0, with a gradient of 0, if there are none.
    """
    known = informative(allowed)
    each = torch.logsumexp(logits, 1) - torch.logsumexp(logits.masked_fill(~allowed, -torch.inf), 1)
    # Not multiplied by the mask: where nothing is allowed, the term is infinite.
    return torch.where(known, each, 0.0).sum() / known.sum().clamp(min=1)


def partial_dice(logits: Tensor, allowed: Tensor) -> Tensor:
    """1 - Dice of the batch over pixels with a single allowed class (MONAI's masked Dice), a scalar; 0 without any.

    Args:
        logits: (B, C, S, S).
        allowed: (B, C, S, S) bool, candidates.
    """
    single = allowed.sum(1, keepdim=True) == 1
    if not single.any():
        return logits.sum() * 0
    return _dice(logits, (allowed & single).float(), single.float())


def loss_per_slice(logits: Tensor, allowed: Tensor) -> Tensor:
    """Candidate cross entropy + partial Dice of each slice by itself, (B,), for logits and candidates (B, C, S, S).

    Unlike in `partial_loss`, no slice changes the loss of another. Dice is the mean over the classes that the slice
    shows: that of an absent class would be a matter of rounding.
    """
    known = informative(allowed)
    each = torch.logsumexp(logits, 1) - torch.logsumexp(logits.masked_fill(~allowed, -torch.inf), 1)
    entropy = torch.where(known, each, 0.0).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    single = allowed.sum(1, keepdim=True) == 1
    truth = (allowed & single).to(logits.dtype)
    found = torch.softmax(logits, 1) * single
    shown = truth.sum((2, 3))  # (B, C)
    dice = 2 * (found * truth).sum((2, 3)) / (found.sum((2, 3)) + shown).clamp(min=1)
    missed = torch.where(shown > 0, 1 - dice, 0.0)
    return entropy + missed.sum(1) / (shown > 0).sum(1).clamp(min=1)


def partial_loss(logits: Tensor, allowed: Tensor) -> Tensor:
    """Candidate cross entropy + partial Dice, a scalar, for logits and candidates (B, C, S, S)."""
    return candidate_cross_entropy(logits, allowed) + partial_dice(logits, allowed)
