"""Where the slices of DICOM files lie: one record for each file, or for each frame of a file of several frames."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .headers import Header

SAME_DIRECTION = 0.02  # largest difference of cosines between slices of one stack, which are rounded in the headers


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice, as its header describes it.

    Attributes:
        header: of its file.
        frame: number of the frame in the file, from 0.
        values: elements that hold for this slice, as text, by keyword of DICOM.
    """

    header: Header
    frame: int
    values: Mapping[str, str]

    @cached_property
    def position(self) -> tuple[float, ...] | None:
        """(3,) millimetres (LPS+) of the centre of the first pixel; None if the header does not tell."""
        return self._numbers("ImagePositionPatient", 3)

    @cached_property
    def directions(self) -> tuple[float, ...] | None:
        """(6,) cosines of the directions of rows and columns; None if the header does not tell."""
        found = self._numbers("ImageOrientationPatient", 6)
        if found is None or not all(0.9 < math.hypot(*part) < 1.1 for part in (found[:3], found[3:])):
            return None
        return found if abs(sum(a * b for a, b in zip(found[:3], found[3:], strict=True))) < 0.1 else None

    @cached_property
    def spacing(self) -> tuple[float, ...] | None:
        """(2,) millimetres between rows and between columns; None if the header does not tell, or has no such size."""
        found = self._numbers("PixelSpacing", 2)
        return found if found is not None and min(found) > 0 else None

    @property
    def size(self) -> tuple[int, int]:
        """Columns and rows."""
        return self.header.number("Columns"), self.header.number("Rows")

    @property
    def place(self) -> float:
        """Millimetres along the normal of its plane. The slice must have a position and directions."""
        assert self.position is not None and self.directions is not None
        normal = np.cross(self.directions[:3], self.directions[3:])
        return float(normal @ self.position)

    @property
    def order(self) -> tuple[float, int, str, int]:
        """What slices are sorted by: their place, or without one the number of the image."""
        place = 0.0 if self.position is None or self.directions is None else self.place
        return place, self.header.number("InstanceNumber"), self.header.path.name, self.frame

    def lies_like(self, other: Slice) -> bool:
        """Whether two slices have one size and direction, so that they can be of one stack."""
        if self.size != other.size or (self.directions is None) != (other.directions is None):
            return False
        if self.directions is None or other.directions is None:
            return True
        pairs = zip(self.directions, other.directions, strict=True)
        return max(abs(one - two) for one, two in pairs) <= SAME_DIRECTION

    def _numbers(self, keyword: str, count: int) -> tuple[float, ...] | None:
        try:
            found = tuple(float(part) for part in self.values.get(keyword, "").split("\\"))
        except ValueError:
            return None
        return found if len(found) == count and all(map(math.isfinite, found)) else None


def slices_of(headers: Sequence[Header]) -> list[Slice]:
    """The slices of some files, in the files' order."""
    found = []
    for header in headers:
        if header.frames:
            found += [Slice(header, number, {**header.values, **own}) for number, own in enumerate(header.frames)]
        else:
            found += [
                Slice(header, number, header.values) for number in range(max(1, header.number("NumberOfFrames", 1)))
            ]
    return found


def stacks_of(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Slices that have one size and direction, each stack in the order of its slices; the first has most slices."""
    stacks: list[list[Slice]] = []
    for piece in slices:
        for stack in stacks:
            if stack[0].lies_like(piece):
                stack.append(piece)
                break
        else:
            stacks.append([piece])
    for stack in stacks:
        stack.sort(key=lambda piece: piece.order)
    return sorted(stacks, key=len, reverse=True)


def frames_affine(slices: Sequence[Slice]) -> np.ndarray:
    """(4, 4), voxel index to millimetres (LPS+), of slices in their order.

    Args:
        slices: on a line, and with position, directions and spacing.
    """
    first, last = slices[0], slices[-1]
    assert first.position and last.position and first.directions and first.spacing
    across, down = np.array(first.directions[:3]), np.array(first.directions[3:])
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = across * first.spacing[1], down * first.spacing[0]
    if len(slices) > 1:
        affine[:3, 2] = (np.array(last.position) - first.position) / (len(slices) - 1)
    else:
        affine[:3, 2] = np.cross(across, down) * _thickness(first)
    affine[:3, 3] = first.position
    return affine


def _thickness(piece: Slice) -> float:
    try:
        found = abs(float(piece.values.get("SliceThickness", "")))
    except ValueError:
        return 1.0
    return found if found > 0 and math.isfinite(found) else 1.0
