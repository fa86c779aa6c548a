"""What a box says beyond its candidates: its structure reaches every row and column of it, and fills a share of it.

Candidates alone are also fulfilled by background everywhere but in the certain core. The tightness of a box as bags of
pixels of which one at least is positive is that of Hsu et al. 2019 (NeurIPS); Kervadec et al. 2020 (MIDL,
arXiv 2004.06816) constrain the same rows and columns, and the size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def tightness(logits: Tensor, allowed: Tensor, lines: Tensor) -> Tensor:
    """-log of the largest probability of a box's class in each row and each column that crosses the box.

    Rows and columns are those of the slice before it was rotated and bent, because a box is tight along these only.
    Lines that the window cuts do not count: the structure may lie in the missing part.

    Args:
        logits: (B, C, S, S).
        allowed: (B, C, S, S) bool, candidates; where a foreground class is allowed is its box.
        lines: (B, 2, S, S) integers, row and column + 1 of each pixel in the slice as it was; 0 outside of it, and
            everywhere in slices without boxes.

    Returns: mean over the rows and columns of all boxes of the batch, a scalar; 0 without any.
    """
    found = F.log_softmax(logits, 1)[:, 1:].flatten(2)
    inside = _inside(allowed, lines).flatten(2)
    cut = (inside.unflatten(2, lines.shape[2:]) & _border(lines)).flatten(2)
    count = int(lines.max()) + 1
    total, number = logits.new_zeros(()), logits.new_zeros(())
    for line in lines.flatten(2).unbind(1):
        # Line 0 gathers what lies in no box.
        index = line[:, None] * inside
        best = _largest(found, index, count)
        whole = _largest(inside.to(found), index, count) > 0
        whole &= _largest(cut.to(found), index, count) <= 0
        total = total - torch.where(whole, best, 0.0)[..., 1:].sum()
        number = number + whole[..., 1:].sum()
    return total / number.clamp(min=1)


def missing_size(logits: Tensor, allowed: Tensor, lines: Tensor, *, share: float) -> Tensor:
    """By which part a box's class falls short of a least share of its box: max(0, 1 - mean probability / share).

    Boxes that the window cuts do not count.

    Args:
        logits: (B, C, S, S).
        allowed: (B, C, S, S) bool, candidates; where a foreground class is allowed is its box.
        lines: (B, 2, S, S), see `tightness`; only tells which slices have boxes.
        share: least share of a box that its structure fills, above 0.

    Returns: mean over all boxes of the batch, a scalar in [0, 1]; 0 without any.
    """
    inside = _inside(allowed, lines)
    pixels = inside.sum(dim=(2, 3))
    whole = (pixels > 0) & ~(inside & _border(lines)).any(dim=3).any(dim=2)
    mean = (torch.softmax(logits, 1)[:, 1:] * inside).sum(dim=(2, 3)) / pixels.clamp(min=1)
    return torch.where(whole, F.relu(1 - mean / share), 0.0).sum() / whole.sum().clamp(min=1)


def _inside(allowed: Tensor, lines: Tensor) -> Tensor:
    """(B, C - 1, S, S) bool, true in the boxes of each foreground class."""
    return allowed[:, 1:] & (lines[:, :1] > 0)


def _border(lines: Tensor) -> Tensor:
    """(S, S) bool, true for the outermost pixels."""
    border = torch.ones(lines.shape[2:], dtype=torch.bool, device=lines.device)
    border[1:-1, 1:-1] = False
    return border


def _largest(values: Tensor, index: Tensor, count: int) -> Tensor:
    """(B, K, count), the largest of the values (B, K, N) with each index (B, K, N); 0 where there is none."""
    empty = values.new_zeros(*values.shape[:2], count)
    return empty.scatter_reduce(2, index, values, "amax", include_self=False)
