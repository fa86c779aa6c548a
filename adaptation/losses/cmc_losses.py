"""Consistency between modalities that are not aligned (CMC, arXiv 2408.07341, with errors of its code corrected)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

DESCRIPTORS = ("gram", "pooled", "block")
AGREEMENTS = ("prototype", "voxel", "off")
TEMPERATURE = 0.5
POOLED_SIDE = 3  # pixels of a pooled channel
BLOCKS = 8  # parts into which a channel is divided
MIN_CLASS_PIXELS = 1.0  # a class with fewer pixels is not compared


def channel_consistency(first: Tensor, second: Tensor, descriptor: str) -> Tensor:
    """Contrastive loss between the channels of two modalities, mean over pairs of slices, a scalar; 1 is chance.

    Args:
        first: (B, C, h, w), deepest features in a modality.
        second: (B, C, h, w), deepest features in the other modality.
        descriptor: of a channel. "gram": its correlations with the other channels, which need no alignment; "pooled":
            its values pooled to 3 x 3; "block": each eighth of it by itself, as published.
    """
    described = (_described(features, descriptor) for features in (first, second))
    return torch.stack([contrast(a, b) for a, b in zip(*described, strict=True)]).mean()


def class_agreement(first: Tensor, second: Tensor) -> Tensor:
    """1 - mean over structures of the soft Dice of two modalities, a scalar; structures in neither are left out,
    0 without any.

    Args:
        first: (B, C, S, S) logits in a modality.
        second: (B, C, S, S) logits in the other modality, on the same grid.
    """
    p, q = torch.softmax(first, 1)[:, 1:], torch.softmax(second, 1)[:, 1:]
    shown = (p + q).sum((2, 3)) / 2 >= MIN_CLASS_PIXELS
    if not shown.any():
        return (first.sum() + second.sum()) * 0
    dice = 2 * (p * q).sum((2, 3)) / (p.square() + q.square()).sum((2, 3)).clamp(min=1e-6)
    return 1 - dice[shown].mean()


def prototype_agreement(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> Tensor:
    """Contrastive loss between the classes' mean features in two modalities, a scalar. The modalities may show other
    patients and other places. 1 is chance; 0 where fewer than two classes are shown in both.

    Args:
        first: logits (B, C, S, S) and decoder features (B, K, S, S) in a modality.
        second: the same in the other modality.
    """
    means, masses = zip(*(_prototypes(*outputs) for outputs in (first, second)), strict=True)
    shown = (masses[0] >= MIN_CLASS_PIXELS) & (masses[1] >= MIN_CLASS_PIXELS)
    if shown.sum() < 2:
        return (first[0].sum() + second[0].sum()) * 0
    return contrast(means[0][shown], means[1][shown])


def contrast(first: Tensor, second: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """NT-Xent loss of N pairs of rows, divided by ln(2 N - 1), a scalar: a row must find its pair among all others.

    A single product of matrices: the released code needs 128 GiB at its own setting.

    Args:
        first: (N, d); the mean of each row is subtracted, because features after a ReLU all point the same way.
        second: (N, d), the pair of each row.
        temperature: of the softmax, above 0.
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
        return F.adaptive_avg_pool2d(features, POOLED_SIDE).flatten(2)
    rows = features.flatten(2)
    if descriptor == "block":
        length = rows.shape[-1] // BLOCKS
        return rows[..., : length * BLOCKS].reshape(len(rows), -1, length)
    rows = F.normalize(rows - rows.mean(-1, keepdim=True), dim=-1, eps=1e-6)
    # A channel's correlation with itself would reveal its number, and with it its pair, whatever the other entries are.
    return (rows @ rows.mT) * (1 - torch.eye(rows.shape[1], device=rows.device))


def _prototypes(logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean features (C, K) and pixels (C,) of the classes, for logits (B, C, H, W) and features (B, K, H, W)."""
    p = torch.softmax(logits, 1)
    mass = p.sum((0, 2, 3))
    return torch.einsum("bchw,bkhw->ck", p, features) / mass.clamp(min=1e-6)[:, None], mass
