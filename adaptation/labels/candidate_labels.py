"""Labels of any kind as candidates: which classes a pixel may belong to, by what somebody has annotated.

A dense label allows one class, a pixel outside of all boxes background alone, one inside a box background or that
box's class, a slice of which only the structures are known any of these. What nobody annotated is unknown. So one loss
(`fedfactory.adaptation.losses.partial_losses`) serves all kinds, in one batch if need be.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, NodeDataError
from ...imaging.slice_format import UNLABELLED

MOST_CLASSES = 24  # a set is a whole number that must survive float32
UNKNOWN = 0
CORE = 1 / 3  # of a box's sides: its middle, which is taken for the structure


def check_classes(classes: int) -> None:
    """Raises: ConfigError if candidates of so many classes cannot be told."""
    if not 2 <= classes <= MOST_CLASSES:
        raise ConfigError(f"classes is {classes}; choose 2 to {MOST_CLASSES}, background included")


def candidates_from_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Sets of one class each, of label maps; UNKNOWN where nobody annotated.

    Args:
        labels: (..., S, S) uint8, 255 where nobody annotated.

    Returns: equal shape, bit c set where class c is allowed.
    Raises: NodeDataError for a label that is no class.
    """
    annotated = labels != UNLABELLED
    if annotated.any() and int(labels[annotated].max()) >= classes:
        raise NodeDataError(f"labels reach {int(labels[annotated].max())}, the method knows {classes} classes")
    # 255 is a shift too far: those pixels are shifted by nothing, then cleared.
    shifted = np.left_shift(np.ones_like(labels, dtype=_type(classes)), np.where(annotated, labels, 0))
    return np.where(annotated, shifted, UNKNOWN).astype(_type(classes))


def candidates_from_boxes(labels: np.ndarray, classes: int) -> np.ndarray:
    """Sets of a slice (S, S) whose labels are boxes, painted from the largest to the smallest.

    The smallest rectangle around a value is that class's box. Outside of all boxes there is background. Inside there
    is background or the box's class; in the middle of a box, where no other box lies but those around it, its class
    alone. A map with pixels that nobody annotated says so itself, and is read as any sparse label map.
    """
    if (labels == UNLABELLED).any():
        return candidates_from_labels(labels, classes)
    candidates_from_labels(labels, classes)  # checks
    boxes = boxes_of(labels, classes)
    candidates = np.ones(labels.shape, _type(classes))
    for value, box in boxes.items():
        candidates[box] |= np.array(1 << value, candidates.dtype)
    for value, box in boxes.items():
        others = np.zeros(labels.shape, bool)
        for other in boxes.values():
            if other != box and not _inside(box, other):
                others[other] = True
        middle = tuple(_middle(side) for side in box)
        free = ~others[middle] & (labels[middle] == value)
        candidates[middle] = np.where(free, 1 << value, candidates[middle])
    return candidates


def boxes_of(labels: np.ndarray, classes: int) -> dict[int, tuple[slice, slice]]:
    """By class, the smallest rectangle around its pixels of a slice (S, S)."""
    boxes = {}
    for value in range(1, classes):
        rows, columns = np.nonzero(labels == value)
        if len(rows):
            boxes[value] = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    return boxes


def candidates_from_presence(presence: np.ndarray, size: int, classes: int) -> np.ndarray:
    """Sets (N, size, size) of slices of which only the structures are known: (N, classes or fewer), 1 where present."""
    if presence.shape[1] > classes:
        raise NodeDataError(f"image labels of {presence.shape[1]} classes, the method knows {classes}")
    bits = np.left_shift(1, np.arange(presence.shape[1]))
    code = ((presence > 0) @ bits) | 1  # background is everywhere
    return np.broadcast_to(code[:, None, None], (len(code), size, size)).astype(_type(classes))


def candidates_of_all_structures(candidates: np.ndarray, classes: int) -> np.ndarray:
    """Sets of background and target (0 to 3) as candidates of classes: the target may be any structure."""
    target = (1 << classes) - 2
    return np.array([UNKNOWN, 1, target, target | 1], _type(classes))[candidates]


def candidate_masks(candidates: Tensor, classes: int) -> Tensor:
    """(B, S, S) candidates to (B, classes, S, S) booleans, true where a pixel may have the class; unknown: none."""
    bits = torch.arange(classes, device=candidates.device)[None, :, None, None]
    return torch.bitwise_right_shift(candidates.long()[:, None], bits) % 2 == 1


@dataclass(frozen=True)
class SiteSlices:
    """What a site trains with.

    Attributes:
        images: (N, S, S) float in [-1, 1].
        candidates: (N, S, S) unsigned integers, see above.
        kinds: (N,) kind of the labels of each slice, "none" without.
        classes: number of label values, background included.
    """

    images: np.ndarray
    candidates: np.ndarray
    kinds: np.ndarray
    classes: int

    def __len__(self) -> int:
        return len(self.images)

    @property
    def labelled_indices(self) -> np.ndarray:
        """Indices of the slices whose labels say anything."""
        everything = (1 << self.classes) - 1
        return np.flatnonzero([bool(((one != UNKNOWN) & (one != everything)).any()) for one in self.candidates])


def _inside(box: tuple[slice, slice], other: tuple[slice, slice]) -> bool:
    return all(b.start <= a.start and a.stop <= b.stop for a, b in zip(box, other, strict=True))


def _middle(side: slice) -> slice:
    length = side.stop - side.start
    rim = int(length * (1 - CORE) / 2)
    return slice(side.start + rim, side.stop - rim)


def _type(classes: int) -> np.dtype:
    check_classes(classes)
    return np.min_scalar_type((1 << classes) - 1)
