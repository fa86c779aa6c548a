"""Labels of any kind as candidate labels: the set of classes that each pixel may have, given the annotation.

A dense label allows one class. A pixel outside of all boxes is background, a pixel inside a box is background or the
box's class, but for the middle of the box. In a slice with image-level labels, each pixel may have any of the classes
present. Pixels that nobody annotated are unknown. Thus one loss (`fedfactory.adaptation.losses.partial_losses`) serves
all kinds, also mixed in one batch. A set of classes is stored as an unsigned integer whose bit c is set if class c is
allowed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...errors import ConfigError, NodeDataError
from ...imaging.slice_choices import UNLABELLED
from .boxes import boxes_of, certain_core, middle_of

MAX_CLASSES = 24  # a set of classes is an integer that float32 must represent exactly
UNKNOWN = 0
MAX_CERTAINTY = 255  # of a pixel that is surely a structure


def check_classes(classes: int) -> None:
    """Raises: ConfigError if candidate labels cannot represent this number of classes."""
    if not 2 <= classes <= MAX_CLASSES:
        raise ConfigError(f"classes is {classes}; choose 2 to {MAX_CLASSES}, background included")


def refuse_other_labels(labels: np.ndarray, classes: int) -> None:
    """Raises: NodeDataError if label maps (uint8, 255 where nobody annotated) have one that is not below `classes`."""
    annotated = labels[labels != UNLABELLED]
    if annotated.size and int(annotated.max()) >= classes:
        raise NodeDataError(f"the largest label is {int(annotated.max())}; it must be below {classes} (classes)")


def candidates_from_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Candidate labels of label maps: one class per pixel, UNKNOWN where nobody annotated.

    Args:
        labels: (..., S, S) uint8, 255 where nobody annotated.
        classes: number of classes, background included.

    Returns: unsigned integers of the same shape, bit c set where class c is allowed.
    Raises: NodeDataError for a label that is not below `classes`.
    """
    refuse_other_labels(labels, classes)
    annotated = labels != UNLABELLED
    # Shifting by 255 would be undefined: pixels without annotation are shifted by 0 and then cleared.
    shifted = np.left_shift(np.ones_like(labels, dtype=_dtype(classes)), np.where(annotated, labels, 0))
    return np.where(annotated, shifted, UNKNOWN).astype(_dtype(classes))


def candidates_from_boxes(labels: np.ndarray, classes: int) -> np.ndarray:
    """Candidate labels of a slice whose labels are boxes, painted from the largest to the smallest.

    The smallest rectangle around the pixels of a value is that class's box. Outside of all boxes, pixels are
    background. Inside a box, they are background or the box's class; in the middle of a box, they are of some box's
    class, and in its `certain_core` of its own class alone. A map with pixels that nobody annotated is read as a sparse
    label map instead.

    Args:
        labels: (S, S) uint8.
        classes: number of classes, background included.

    Returns: unsigned integers (S, S), bit c set where class c is allowed.
    Raises: NodeDataError for a label that is not below `classes`.
    """
    if (labels == UNLABELLED).any():
        return candidates_from_labels(labels, classes)
    candidates_from_labels(labels, classes)  # only for its checks
    boxes = boxes_of(labels, classes)
    candidates = np.ones(labels.shape, _dtype(classes))
    for value, box in boxes.items():
        candidates[box] |= np.array(1 << value, candidates.dtype)
    for box in boxes.values():
        candidates[middle_of(box)] &= ~np.array(1, candidates.dtype)
    for value in boxes:
        # A box of which another one hides a part is not certain there, whatever the rectangles say.
        core = certain_core(value, boxes, labels.shape) & (labels == value)
        candidates[core] = 1 << value
    return candidates


def candidates_from_presence(presence: np.ndarray, size: int, classes: int) -> np.ndarray:
    """Candidate labels of slices with image-level labels.

    Args:
        presence: (N, C) with C at most `classes`, positive where a slice shows the class.
        size: side of the slices in pixels.
        classes: number of classes, background included.

    Returns: unsigned integers (N, size, size): each pixel may have any class present, or background.
    Raises: NodeDataError for image-level labels of more classes.
    """
    if presence.shape[1] > classes:
        raise NodeDataError(f"image-level labels have {presence.shape[1]} classes; the method needs at most {classes}")
    bits = np.left_shift(1, np.arange(presence.shape[1]))
    code = ((presence > 0) @ bits) | 1  # background is always possible
    return np.broadcast_to(code[:, None, None], (len(code), size, size)).astype(_dtype(classes))


def candidates_of_all_structures(candidates: np.ndarray, classes: int) -> np.ndarray:
    """Candidate labels of background and target (..., S, S), integers 0 to 3, as candidate labels of `classes` classes.

    Returns: unsigned integers of the same shape: the target may be any foreground class.
    """
    target = (1 << classes) - 2
    return np.array([UNKNOWN, 1, target, target | 1], _dtype(classes))[candidates]


def only_candidate(candidates: np.ndarray, classes: int) -> np.ndarray:
    """The class of pixels that may have one class alone.

    Args:
        candidates: unsigned integers of any shape, bit c set where class c is allowed.
        classes: number of classes, background included.

    Returns: uint8 of the same shape, 255 where several classes are allowed or nothing is known.
    """
    found = np.full(candidates.shape, UNLABELLED, np.uint8)
    for value in range(classes):
        found[candidates == 1 << value] = value
    return found


def candidate_masks(candidates: Tensor, classes: int) -> Tensor:
    """Candidate labels (B, S, S) to booleans (B, classes, S, S): which classes a pixel may have, none if unknown."""
    bits = torch.arange(classes, device=candidates.device)[None, :, None, None]
    return torch.bitwise_right_shift(candidates.long()[:, None], bits) % 2 == 1


@dataclass(frozen=True)
class SiteSlices:
    """A site's training slices with their candidate labels.

    Attributes:
        images: (N, C, S, S) float in [-1, 1]; slices of one channel may be given as (N, S, S).
        candidates: (N, S, S) unsigned integers, bit c set where class c is allowed, 0 where nothing is known.
        kinds: (N,) kind of each slice's labels, "none" for unlabelled slices.
        classes: number of classes, background included.
        patients: (N,) number of the patient of each slice; None where that is not known.
        certainty: (N, S, S) uint8, how certain a pixel that may be background or a structure is a structure, from 0 to
            MAX_CERTAINTY; None for labels without such grades.
    """

    images: np.ndarray
    candidates: np.ndarray
    kinds: np.ndarray
    classes: int
    patients: np.ndarray | None = None
    certainty: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.images.ndim == 3:
            object.__setattr__(self, "images", self.images[:, None])

    def __len__(self) -> int:
        return len(self.images)

    def require_channels(self, channels: int) -> None:
        """Raises: NodeDataError if the slices have another number of channels."""
        if self.images.shape[1] != channels:
            raise NodeDataError(
                f"channels is {self.images.shape[1]} in these slices; it must be {channels}, as in the method's "
                "settings: prepare the stores of all sites with the same channels"
            )

    @property
    def labelled_indices(self) -> np.ndarray:
        """Indices (n,) of slices with at least one pixel whose candidate labels exclude a class."""
        all_classes = (1 << self.classes) - 1
        informative = [((sets != UNKNOWN) & (sets != all_classes)).any() for sets in self.candidates]
        return np.flatnonzero(informative)


def _dtype(classes: int) -> np.dtype:
    """The smallest unsigned integer type with a bit for every class."""
    check_classes(classes)
    return np.min_scalar_type((1 << classes) - 1)
