"""The place around which the slices of each case are cut: who gives it, and the table in which a site gives it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..common.tables import read_table, write_table
from ..errors import UsageError, VolumeError

if TYPE_CHECKING:
    from .images import Image  # with it comes nibabel, which the command line does not need to check its options

NAME, MILLIMETRES, VOXELS = "case", ("x", "y", "z"), ("i", "j", "k")
HEADINGS = f"{','.join((NAME, *MILLIMETRES))} or {','.join((NAME, *VOXELS))}"
HALF_VOXEL = 0.5 + 1e-6  # a volume reaches half a voxel beyond the centres of its outer voxels


class CentreSource(Protocol):
    """What gives the place of each case: a table of the site, or a localiser."""

    @property
    def path(self) -> Path:
        """Of its file, for messages."""

    @property
    def digest(self) -> str | None:
        """SHA-256 of a localiser; None for a table, whose places can be compared themselves."""

    def voxel_in(self, case: str, image: Image) -> np.ndarray:
        """The place of a case, (3,) in voxel indices of the stored image, fractional.

        Args:
            case: name of the case.
            image: of the case.

        Raises: VolumeError if there is no place, or none inside of the image.
        """


@dataclass(frozen=True)
class CentreTable:
    """One place for each case.

    Attributes:
        path: of the file, for messages.
        in_voxels: True for voxel indices from 0 in stored axis order; False for scanner millimetres, the world
            coordinates of NIfTI (towards right, front and head).
        places: three finite numbers by name of the case.
    """

    path: Path
    in_voxels: bool
    places: dict[str, tuple[float, float, float]]

    @property
    def digest(self) -> None:
        """None, see `CentreSource`."""

    def voxel_in(self, case: str, image: Image) -> np.ndarray:
        """See `voxel`, of an image that was read."""
        return self.voxel(case, image.shape, image.affine)

    def voxel(self, case: str, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
        """The place of a case, (3,) in voxel indices of the stored volume, fractional.

        Args:
            case: name of the case.
            shape: of the stored volume.
            affine: (4, 4), of the stored volume.

        Raises: VolumeError if the table has no row for the case, or its place is outside of the volume.
        """
        if case not in self.places:
            raise VolumeError(f"{self.path}: has no row for {case}; add its centre")
        place = np.array(self.places[case])
        voxel = place if self.in_voxels else np.linalg.inv(affine)[:3] @ [*place, 1.0]
        if (voxel < -HALF_VOXEL).any() or (voxel > np.array(shape) - 1 + HALF_VOXEL).any():
            unit = "in voxels" if self.in_voxels else f"in millimetres, voxel ({_listed(voxel)})"
            raise VolumeError(
                f"{self.path}: the centre of {case} is ({_listed(place)}) {unit}; it must be inside of the volume of "
                f"{' x '.join(map(str, shape))} voxels"
            )
        return voxel


def read_centre_table(path: str | Path) -> CentreTable:
    """The table, see `read_table`, with columns case,x,y,z (millimetres) or case,i,j,k (voxels).

    Raises: UsageError if the file cannot be read, lacks a column, or has a row without name, twice the same name, or a
        coordinate that is no finite number.
    """
    path = Path(path)
    table = read_table(path, known=(NAME, *MILLIMETRES, *VOXELS))
    kinds = [columns for columns in (MILLIMETRES, VOXELS) if table.has((NAME, *columns))]
    if len(kinds) != 1:
        raise UsageError(f"{path}: its columns are {table.names}; they must be {HEADINGS}")
    places: dict[str, tuple[float, float, float]] = {}
    for row in table.rows():
        name = row.text(NAME)
        if not name:
            raise UsageError(f"{row.where}: {NAME} is empty; give the name of a case")
        if name in places:
            raise UsageError(f"{row.where}: {name} has a row already; give one row for each case")
        x, y, z = map(row.number, kinds[0])
        places[name] = x, y, z
    return CentreTable(path, kinds[0] == VOXELS, places)


def write_centre_table(path: str | Path, places: Mapping[str, tuple[float, float, float]]) -> None:
    """Write a table in scanner millimetres, to two decimals, which `read_centre_table` reads.

    Args:
        path: file to write.
        places: millimetres by name of the case.
    """
    rows = ((name, *(Decimal(f"{value:.2f}") for value in place)) for name, place in places.items())
    write_table(path, (NAME, *MILLIMETRES), rows)


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
