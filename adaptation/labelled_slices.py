"""Slices with labels, and how well two label maps agree."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ..errors import ConfigError


@dataclass(frozen=True)
class LabelledSlices:
    """Training data.

    Attributes:
        images: (N, C, S, S) float in [-1, 1]; slices of one channel may be given as (N, S, S).
        labels: (N, S, S) integer below `classes`.
        classes: number of label values, background included.
        volume: (N,) integer, which volume a slice belongs to; a volume's slices follow each other in order. None
            where that is not known: then no 3-D network can be trained on them.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    volume: np.ndarray | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", with_channels(self.images))

    @property
    def channels(self) -> int:
        """Number of channels of a slice."""
        return self.images.shape[1]

    def part(self, chosen: np.ndarray) -> LabelledSlices:
        """The chosen slices: indices (n,) or a mask (N,) bool."""
        volume = None if self.volume is None else self.volume[chosen]
        return LabelledSlices(self.images[chosen], self.labels[chosen], self.classes, volume)


def with_channels(images: np.ndarray) -> np.ndarray:
    """Slices (N, C, S, S); slices of one channel may be given as (N, S, S)."""
    return images[:, None] if images.ndim == 3 else images


def joined(first: LabelledSlices, second: LabelledSlices) -> LabelledSlices:
    """Both together, the smaller set repeated so that each makes about half; volumes are no longer known."""
    longer = max(len(first.images), len(second.images))
    parts = [part for given in (first, second) for part in [given] * max(1, round(longer / len(given.images)))]
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return LabelledSlices(images, labels, first.classes)


def parts_of(count: int, volume: np.ndarray | None) -> list[slice]:
    """The slices of each volume.

    Args:
        count: number of slices.
        volume: (count,) integer, which volume a slice belongs to; None: all are of one.
    """
    starts = [0] if volume is None else np.flatnonzero(np.r_[True, np.diff(volume) != 0]).tolist()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], count], strict=True)]


@dataclass(frozen=True, kw_only=True)
class LabelAgreement:
    """How far two ways of labelling agree on the same slices. Raises: ConfigError for a value out of range.

    Attributes:
        equal_pixels: share of the pixels to which both give the same class, in [0, 1].
        dice: of every foreground class, in [0, 1]; NaN of a class that neither gives to any pixel.
        slices: number of slices that were compared.
    """

    equal_pixels: float
    dice: tuple[float, ...]
    slices: int

    def __post_init__(self) -> None:
        if not 0 <= self.equal_pixels <= 1:
            raise ConfigError(f"equal_pixels is {self.equal_pixels}; it must be from 0 to 1")
        if any(score < 0 or score > 1 for score in self.dice):
            raise ConfigError(f"dice is {list(self.dice)}; it must be from 0 to 1, or NaN")


def label_agreement(ours: Tensor, theirs: Tensor, classes: int) -> LabelAgreement:
    """The agreement of label maps (B, S, S) below `classes`."""
    dice = tuple(_dice(ours == value, theirs == value) for value in range(1, classes))
    return LabelAgreement(equal_pixels=float((ours == theirs).double().mean()), dice=dice, slices=len(ours))


def foreground_dice(ours: Tensor, theirs: Tensor, classes: int) -> float:
    """Mean Dice over the foreground classes that occur, of label maps (B, S, S); NaN if none does."""
    scores = [_dice(ours == value, theirs == value) for value in range(1, classes)]
    found = [score for score in scores if not np.isnan(score)]
    return float(np.mean(found)) if found else float("nan")


def _dice(ours: Tensor, theirs: Tensor) -> float:
    """Of two masks of equal shape; NaN if both are empty."""
    total = ours.sum() + theirs.sum()
    return float(2 * (ours & theirs).sum() / total) if total > 0 else float("nan")
