"""Slices with labels, and how well two label maps agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class LabelledSlices:
    """Training data.

    Attributes:
        images: (N, S, S) float in [-1, 1].
        labels: (N, S, S) integer below `classes`.
        classes: number of label values, background included.
        volume: (N,) integer, which volume a slice belongs to; a volume's slices follow each other in order. None
            where that is not known: then no 3-D network can be trained on them.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    volume: np.ndarray | None = None

    def part(self, chosen: np.ndarray) -> LabelledSlices:
        """The chosen slices: indices (n,) or a mask (N,) bool."""
        volume = None if self.volume is None else self.volume[chosen]
        return LabelledSlices(self.images[chosen], self.labels[chosen], self.classes, volume)


def foreground_dice(ours: Tensor, theirs: Tensor, classes: int) -> float:
    """Mean Dice over the foreground classes that occur, of label maps (B, S, S); NaN if none does."""
    scores = []
    for value in range(1, classes):
        both, total = ((ours == value) & (theirs == value)).sum(), (ours == value).sum() + (theirs == value).sum()
        if total > 0:
            scores.append(float(2 * both / total))
    return float(np.mean(scores)) if scores else float("nan")
