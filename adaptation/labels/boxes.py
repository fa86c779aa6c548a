"""Boxes around structures: where they lie, which pixels they make certain, and their rows and columns as maps."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CENTRE = 1 / 3  # of a box's sides: the middle of a box, which is assumed to belong to the structure
RIM = 1 / 4  # of the gap between a box and the boxes inside of it: next to the outer box, nothing is assumed there

Box = tuple[slice, slice]


def boxes_of(labels: np.ndarray, classes: int) -> dict[int, Box]:
    """By class, the smallest rectangle around its pixels in a slice (S, S) of integer labels, as rows and columns."""
    found = {}
    for value in range(1, classes):
        rows, columns = np.nonzero(labels == value)
        if len(rows):
            found[value] = (slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1))
    return found


def is_inside(box: Box, other: Box) -> bool:
    """Whether `other` encloses `box`."""
    return all(b.start <= a.start and a.stop <= b.stop for a, b in zip(box, other, strict=True))


def middle_of(box: Box) -> Box:
    """The middle third of both sides of a box, where the structure is assumed or another one that hides it."""
    rows, columns = (_middle_third(side) for side in box)
    return rows, columns


def certain_core(value: int, boxes: dict[int, Box], shape: tuple[int, int]) -> np.ndarray:
    """Pixels that are assumed to belong to the structure of a box, as a mask of the given shape.

    They are the middle third of the box, without other boxes but those that enclose it. Where boxes inside of it cover
    its middle, the structure is assumed to surround them, as the myocardium surrounds its ventricle: from the middle of
    the inner boxes' sides straight out towards the sides of the box, but for the outermost quarter of the way.

    Args:
        value: class of the box.
        boxes: of all classes, see `boxes_of`.
        shape: of the slice.
    """
    box = boxes[value]
    core, others = np.zeros(shape, bool), np.zeros(shape, bool)
    middle = middle_of(box)
    core[middle] = True
    others_of_box = [other for other in boxes.values() if other != box]
    if inner := [other for other in others_of_box if is_inside(other, box)]:
        hull = tuple(
            slice(min(sides[axis].start for sides in inner), max(sides[axis].stop for sides in inner))
            for axis in (0, 1)
        )
        if all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(hull, middle, strict=True)):
            for arm in _arms(box, hull):
                core[arm] = True
    for other in others_of_box:
        if not is_inside(box, other):
            others[other] = True
    return core & ~others


def line_numbers(size: int) -> Tensor:
    """(2, size, size) int64, row and column + 1 of each pixel of a slice, so that 0 can mean that there is no slice."""
    return torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")) + 1


def _arms(box: Box, hull: Box) -> list[Box]:
    """The four ways from a box inside, `hull`, to the sides of the box: above, below, left and right of it."""
    arms = []
    for axis in (0, 1):
        across = [middle_of(sides)[1 - axis] for sides in (box, hull)]
        width = slice(max(side.start for side in across), min(side.stop for side in across))
        before, after = hull[axis].start - box[axis].start, box[axis].stop - hull[axis].stop
        for length in (
            slice(box[axis].start + int(np.ceil(RIM * before)), hull[axis].start),
            slice(hull[axis].stop, box[axis].stop - int(np.ceil(RIM * after))),
        ):
            arms.append((length, width) if axis == 0 else (width, length))
    # An empty side must not become a slice that counts from the end.
    return [arm for arm in arms if all(side.start < side.stop for side in arm)]


def _middle_third(side: slice) -> slice:
    rim = int((side.stop - side.start) * (1 - CENTRE) / 2)
    return slice(side.start + rim, side.stop - rim)
