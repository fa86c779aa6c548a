"""Which structures are one connected object, learnt from labels, and label maps that are corrected by this rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from ..labelled_slices import LabelledSlices
from .labelled_volumes import volumes_of

FOREGROUND = 0  # in a rule: all structures together
MIN_SHARE = 0.95  # of a structure's voxels in its largest object, where it counts as one object
MIN_VOLUMES = 0.95  # share of the volumes in which it must be one object


def learn_single_objects(data: LabelledSlices) -> tuple[int, ...]:
    """Labels of the structures that are one connected object in nearly every volume; FOREGROUND is all together.

    Without known volumes nothing is learnt: single slices of one object may have several parts.
    """
    if data.volume is None:
        return ()
    volumes = [data.labels[part] for part in volumes_of(data)]

    def is_single(label: int) -> bool:
        """Whether the structure, or the foreground, is one object."""
        shown = [volume > 0 if label == FOREGROUND else volume == label for volume in volumes]
        shares = [_largest_object(mask).sum() / mask.sum() for mask in shown if mask.any()]
        return bool(shares) and float(np.mean(np.array(shares) >= MIN_SHARE)) >= MIN_VOLUMES

    return tuple(label for label in range(data.classes) if is_single(label))


def keep_single_objects(labels: np.ndarray, single_objects: Sequence[int]) -> np.ndarray:
    """A label map (X, Y, Z) in which each of these structures is its largest connected object; the rest becomes 0."""
    result, removes = labels.copy(), True
    while removes:  # what is removed of a structure may have connected others to the foreground
        removes = False
        for label in sorted(single_objects):  # the foreground first
            mask = result > 0 if label == FOREGROUND else result == label
            if mask.any() and (others := mask & ~_largest_object(mask)).any():
                result[others], removes = 0, True
    return result


def _largest_object(mask: np.ndarray) -> np.ndarray:
    """(X, Y, Z) bool, the largest of the mask's connected objects; voxels touch by faces."""
    objects, _ = ndimage.label(mask)
    return objects == 1 + int(np.argmax(np.bincount(objects.ravel())[1:]))
