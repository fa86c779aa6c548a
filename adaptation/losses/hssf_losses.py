"""Losses and grades of HSSF (Ma et al., IEEE TMI 2024, doi 10.1109/TMI.2023.3348982)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRADES = ("dice", "pixel_accuracy")
WINDOW = 31 / 384  # of the slice's side: the neighbourhood that says where edges are
EDGE_WEIGHT = 5.0


def segmentation_loss(logits: Tensor, truth: Tensor, gate: Tensor | None = None) -> Tensor:
    """Cross entropy + edge-weighted IoU loss of every slice, mean over the slices; one with a gate of 0 adds nothing.

    wIoU = 1 - (I + 1) / (U - I + 1), I = sum p y m, U = sum (p + y) m, m = 1 + 5 |mean of y around - y|, mean over
    the classes. Published, for two classes, are sums over both: in those a small structure among several vanishes.

    Args:
        logits: (B, C, S, S). truth: (B, S, S) classes; negative where none is known. gate: (B,) 0 or 1.
    """
    known = truth >= 0
    each = F.cross_entropy(logits, truth.clamp(min=0), reduction="none")
    entropy = (each * known).sum((1, 2)) / known.sum((1, 2)).clamp(min=1)
    y = F.one_hot(truth.clamp(min=0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    weights = (1 + EDGE_WEIGHT * (_mean_around(y) - y).abs()) * known[:, None]
    p = torch.softmax(logits, 1)
    inter, union = (p * y * weights).sum((2, 3)), ((p + y) * weights).sum((2, 3))
    loss = entropy + 1 - ((inter + 1) / (union - inter + 1)).mean(1)
    return loss.mean() if gate is None else (loss * gate).mean()


def assessment_loss(right_logits: Tensor, right: Tensor) -> Tensor:
    """Mean of the mean binary cross entropies of right pixels and of wrong ones; of one kind where there is no other.

    Published is N_right / N times their sum, which vanishes when all is wrong.
    """
    each = F.binary_cross_entropy_with_logits(right_logits, right.to(right_logits.dtype), reduction="none")
    parts = [each[group].mean() for group in (right, ~right) if group.any()]
    return torch.stack(parts).mean()


def distillation(teacher: Tensor, student: Tensor, gate: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) of softmax at a temperature, mean over classes and pixels, times the gate (B,), mean over
    the slices. The teacher gets no gradient."""
    q = torch.log_softmax(teacher.detach() / temperature, 1)
    p = torch.log_softmax(student / temperature, 1)
    return ((q.exp() * (q - p)).mean((1, 2, 3)) * gate).mean()


def perturbation_loss(logits: Tensor, perturbed: Tensor) -> Tensor:
    """Mean over classes of (share of the class) x (mean squared difference of the logits), mean over the slices."""
    area = torch.softmax(perturbed, 1).mean((2, 3))
    return (area * (logits - perturbed).square().mean((2, 3))).mean()


def grades(logits: Tensor, truth: Tensor, kind: str) -> Tensor:
    """(B,) score in [0, 1] of what the logits say. "dice": mean over the structures that prediction or truth show, 1
    where both show none; "pixel_accuracy": as published, which an empty answer passes on small structures."""
    found = logits.argmax(1)
    if kind == "pixel_accuracy":
        return (found == truth).double().mean((1, 2))
    classes = torch.arange(1, logits.shape[1], device=logits.device)[None, :, None, None]
    a, b = found[:, None] == classes, truth[:, None] == classes
    total = (a.sum((2, 3)) + b.sum((2, 3))).double()
    dice = 2 * (a & b).sum((2, 3)) / total.clamp(min=1)
    shown = total > 0
    return torch.where(shown.any(1), (dice * shown).sum(1) / shown.sum(1).clamp(min=1), 1.0)


def reliable_labels(
    strong: Tensor, strong_right: Tensor, weak: Tensor, weak_right: Tensor, doubt: float
) -> tuple[Tensor, Tensor]:
    """Pseudo labels (B, S, S) of two views of the same slices, and the confidence in them.

    Each pixel takes the view that trusts itself more. Where neither reaches `doubt`, two classes are swapped; of more
    than two nobody knows which is right: -1.

    Args:
        strong, weak: logits (B, C, S, S). strong_right, weak_right: probabilities of being right (B, S, S).
    """
    labels = torch.where(strong_right > weak_right, strong.argmax(1), weak.argmax(1))
    confidence = torch.maximum(strong_right, weak_right)
    other = 1 - labels if strong.shape[1] == 2 else torch.full_like(labels, -1)
    return torch.where(confidence < doubt, other, labels), confidence


def _mean_around(y: Tensor) -> Tensor:
    window = max(3, 2 * round(y.shape[-1] * WINDOW / 2) + 1)
    # Pixels outside of the slice do not count: zeros there would make every border an edge.
    return F.avg_pool2d(y, window, 1, window // 2, count_include_pad=False)
