"""Losses and grades of HSSF (Ma et al., IEEE TMI 2024, doi 10.1109/TMI.2023.3348982)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GRADES = ("dice", "pixel_accuracy")
EDGE_WINDOW = 31 / 384  # share of the slice's side: the neighbourhood in which edges are found
EDGE_WEIGHT = 5.0


def segmentation_loss(logits: Tensor, truth: Tensor, gate: Tensor | None = None) -> Tensor:
    """Cross entropy + edge-weighted IoU loss of every slice, mean over the slices; a scalar.

    wIoU = 1 - (I + 1) / (U - I + 1), I = sum p y m, U = sum (p + y) m, m = 1 + 5 |mean of y around - y|, mean over
    the classes. The published loss for two classes sums over both, in which a small structure among several vanishes.

    Args:
        logits: (B, C, S, S).
        truth: (B, S, S) classes; negative where the class is not known.
        gate: (B,) 0 or 1; a slice with 0 adds nothing. None counts all slices.
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
    """Mean of the mean binary cross entropies of right and of wrong pixels, a scalar; where all pixels are right, or
    all are wrong, the mean over these. The published loss is N_right / N times the sum, which vanishes when all pixels
    are wrong.

    Args:
        right_logits: (...) logits of a pixel's class being right.
        right: shape of `right_logits`, bool, whether it is.
    """
    each = F.binary_cross_entropy_with_logits(right_logits, right.to(right_logits.dtype), reduction="none")
    parts = [each[group].mean() for group in (right, ~right) if group.any()]
    return torch.stack(parts).mean()


def distillation(teacher: Tensor, student: Tensor, gate: Tensor, *, temperature: float) -> Tensor:
    """KL(teacher || student) of softmax at a temperature, mean over classes and pixels, times the gate, mean over the
    slices; a scalar.

    Args:
        teacher: (B, C, S, S) logits; they receive no gradient.
        student: (B, C, S, S) logits.
        gate: (B,) 0 or 1.
        temperature: of both softmaxes, above 0.
    """
    q = torch.log_softmax(teacher.detach() / temperature, 1)
    p = torch.log_softmax(student / temperature, 1)
    return ((q.exp() * (q - p)).mean((1, 2, 3)) * gate).mean()


def perturbation_loss(logits: Tensor, perturbed: Tensor, gate: Tensor) -> Tensor:
    """Mean over classes of (share of the class) x (mean squared difference of the logits), mean over the slices; a
    scalar.

    Args:
        logits: (B, C, S, S).
        perturbed: (B, C, S, S), logits of features with missing channels.
        gate: (B,) 0 or 1; a slice with 0 adds nothing. The published loss counts all slices: where no pseudo-label is
            accepted, it is the only loss, and it is lowest where the network finds no structure at all.
    """
    area = torch.softmax(perturbed, 1).mean((2, 3))
    return (area * (logits - perturbed).square().mean((2, 3)) * gate[:, None]).mean()


def grades(logits: Tensor, truth: Tensor, kind: str) -> Tensor:
    """(B,) scores in [0, 1] of predictions.

    Args:
        logits: (B, C, S, S).
        truth: (B, S, S) classes.
        kind: "dice", the mean over the structures in prediction or truth, 1 without any; or "pixel_accuracy" as
            published, which an empty prediction of small structures passes.
    """
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
    strong: tuple[Tensor, Tensor], weak: tuple[Tensor, Tensor], min_confidence: float
) -> tuple[Tensor, Tensor]:
    """Pseudo-labels (B, S, S) of two views of the same slices, and the confidence (B, S, S) in them.

    Each pixel takes the view with the higher confidence. Where neither reaches `min_confidence`, two classes are
    swapped; with more classes it is not known which one is right, and the pseudo-label is -1.

    Args:
        strong: logits (B, C, S, S) and probabilities of being right (B, S, S) of the strongly augmented view.
        weak: the same of the weakly augmented view.
        min_confidence: smallest confidence with which a pixel keeps its pseudo-label, in [0, 1].
    """
    (strong_logits, strong_right), (weak_logits, weak_right) = strong, weak
    labels = torch.where(strong_right > weak_right, strong_logits.argmax(1), weak_logits.argmax(1))
    confidence = torch.maximum(strong_right, weak_right)
    other = 1 - labels if strong_logits.shape[1] == 2 else torch.full_like(labels, -1)
    return torch.where(confidence < min_confidence, other, labels), confidence


def foreground_confidence(views: tuple[Tensor, Tensor], confidence: Tensor) -> Tensor:
    """(B,) confidence in the structures of slices: the mean over each structure's pixels, mean over the structures.

    A structure's pixels are those where either view finds it; those where only one of them does count as 0. 0 for a
    slice in which neither view finds any structure. The published mean over the slice is that of background, of which
    nearly all networks are sure.

    Args:
        views: logits (B, C, S, S) of the strongly and of the weakly augmented view.
        confidence: (B, S, S) in [0, 1], see `reliable_labels`.
    """
    first, second = (F.one_hot(logits.argmax(1), logits.shape[1])[..., 1:] for logits in views)
    pixels = (first | second).sum((1, 2))
    means = ((first & second) * confidence[..., None]).sum((1, 2)) / pixels.clamp(min=1)
    return means.sum(1) / (pixels > 0).sum(1).clamp(min=1)


def assessor_accuracy(right_logits: Tensor, found: Tensor, truth: Tensor) -> float:
    """How often the assessment is correct, in [0, 1]: the mean of its accuracies on right and on wrong pixels.

    Pixels that are background in prediction and truth do not count. An assessment that trusts everything has .5. Where
    all pixels are right, or all are wrong, it is the accuracy on these; 0 without any structure.

    Args:
        right_logits: (B, S, S) logits of a pixel's class being right.
        found: (B, S, S) predicted classes.
        truth: (B, S, S) classes.
    """
    shown, right, trusted = (found > 0) | (truth > 0), found == truth, right_logits > 0
    groups = [shown & right, shown & ~right]
    parts = [(trusted == right)[group].double().mean() for group in groups if group.any()]
    return float(torch.stack(parts).mean()) if parts else 0.0


def _mean_around(y: Tensor) -> Tensor:
    """Mean of y (B, C, S, S) over the neighbourhood of every pixel, of the same shape."""
    window = max(3, 2 * round(y.shape[-1] * EDGE_WINDOW / 2) + 1)
    # Pixels outside of the slice do not count, because zeros there would make every border an edge.
    return F.avg_pool2d(y, window, 1, window // 2, count_include_pad=False)
