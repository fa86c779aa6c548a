"""Consistency between modalities that are not aligned (CMC, arXiv 2408.07341, with its released faults mended)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DESCRIPTORS = ("gram", "pooled", "block")
AGREEMENTS = ("prototype", "voxel", "off")
TEMPERATURE = 0.5
POOLED = 3  # sides of a channel's picture
BLOCKS = 8  # parts of a channel
LEAST_MASS = 1.0  # pixels of a class, below which it is not compared


def channel_consistency(first: Tensor, second: Tensor, descriptor: str) -> Tensor:
    """Contrastive loss between the channels of two modalities' deepest features (B, C, h, w), mean over pairs of
    slices; 1 is chance.

    descriptor: "gram": a channel is its row of the channels' correlations with others, which needs no alignment;
    "pooled": its picture at 3 x 3; "block": each eighth of it by itself, as published. Means are taken away before:
    features after a ReLU all point the same way.
    """
    described = (_described(one, descriptor) for one in (first, second))
    return torch.stack([contrast(a, b) for a, b in zip(*described, strict=True)]).mean()


def class_agreement(first: Tensor, second: Tensor) -> Tensor:
    """1 - mean over structures of the soft Dice of two modalities' logits (B, C, S, S) on one grid; structures that
    neither shows are left out, 0 without any."""
    p, q = torch.softmax(first, 1)[:, 1:], torch.softmax(second, 1)[:, 1:]
    shown = (p + q).sum((2, 3)) / 2 >= LEAST_MASS
    if not shown.any():
        return (first.sum() + second.sum()) * 0
    dice = 2 * (p * q).sum((2, 3)) / (p.square() + q.square()).sum((2, 3)).clamp(min=1e-6)
    return 1 - dice[shown].mean()


def prototype_agreement(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Contrastive loss between classes' mean features in two modalities, which need show neither the same patients nor
    the same places; 1 is chance, 0 where fewer than two classes are shown in both.

    Args:
        first, second: logits (B, C, S, S) and decoder features (B, K, S, S).
    """
    means, masses = zip(*(_prototypes(*one) for one in (first, second)), strict=True)
    shown = (masses[0] >= LEAST_MASS) & (masses[1] >= LEAST_MASS)
    if shown.sum() < 2:
        return (first[0].sum() + second[0].sum()) * 0
    return contrast(means[0][shown], means[1][shown])


def contrast(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent of N pairs of rows (N, d), divided by ln(2 N - 1): rows must find their pair among all others.

    One product of matrices: the released form of it needs 128 GiB at its own setting.
    """
    count = len(first)
    rows = torch.cat([first, second])
    rows = F.normalize(rows - rows.mean(1, keepdim=True), dim=1)
    similar = (rows @ rows.mT / temperature).fill_diagonal_(-torch.inf)
    pairs = torch.arange(2 * count, device=rows.device).roll(count)
    return F.cross_entropy(similar, pairs) / math.log(2 * count - 1)


def _described(features: Tensor, descriptor: str) -> Tensor:
    """(B, N, d) embeddings of channels (B, C, h, w)."""
    if descriptor == "pooled":
        return F.adaptive_avg_pool2d(features, POOLED).flatten(2)
    rows = features.flatten(2)
    if descriptor == "block":
        length = rows.shape[-1] // BLOCKS
        return rows[..., : length * BLOCKS].reshape(len(rows), -1, length)
    rows = F.normalize(rows - rows.mean(-1, keepdim=True), dim=-1, eps=1e-6)
    # A channel's correlation with itself would tell its number, and find its pair whatever the others say.
    return (rows @ rows.mT) * (1 - torch.eye(rows.shape[1], device=rows.device))


def _prototypes(logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    p = torch.softmax(logits, 1)
    mass = p.sum((0, 2, 3))
    return torch.einsum("bchw,bkhw->ck", p, features) / mass.clamp(min=1e-6)[:, None], mass
