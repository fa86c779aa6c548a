"""The place around which the slices of each case are cut: who gives it, and the table in which a site gives it."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..common.files import atomic_file
from ..errors import UsageError, VolumeError

if TYPE_CHECKING:
    from .volumes import Image  # with it comes nibabel, which the command line does not need to check its options

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
        """The place of a case, (3,) in voxel indices of the stored volume, fractional.

        Args:
            case: name of the case.
            image: its volume, or one for each of its channels, which share their voxels.

        Raises: VolumeError if there is no place, or none inside of the volume.
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
        """See `voxel`, of a volume that was read."""
        from .volumes import first_channel

        volume = first_channel(image)
        return self.voxel(case, volume.data.shape, volume.affine)

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
    """The table of a comma-separated file with columns case,x,y,z (millimetres) or case,i,j,k (voxels).

    Raises: UsageError if the file cannot be read, lacks a column, or has a row without name, twice the same name, or a
        coordinate that is no finite number.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets write a byte order mark
            return _read(path, csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a table ({error}); give comma-separated values") from None


def write_centre_table(path: str | Path, places: Mapping[str, tuple[float, float, float]]) -> None:
    """Write a table in scanner millimetres, with two decimals, which `read_centre_table` reads.

    Args:
        path: file to write.
        places: millimetres by name of the case.
    """
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((NAME, *MILLIMETRES))
        writer.writerows((name, *(f"{value:.2f}" for value in place)) for name, place in places.items())


def _read(path: Path, rows: csv.DictReader[str]) -> CentreTable:
    found = set(rows.fieldnames or ())
    kinds = [columns for columns in (MILLIMETRES, VOXELS) if found.issuperset((NAME, *columns))]
    if len(kinds) != 1:
        raise UsageError(
            f"{path}: its columns are {','.join(rows.fieldnames or ()) or 'missing'}; they must be {HEADINGS}"
        )
    places: dict[str, tuple[float, float, float]] = {}
    for name, place in _places(path, rows, kinds[0]):
        if name in places:
            raise UsageError(f"{path}, line {rows.line_num}: {name} has a row already; give one row for each case")
        places[name] = place
    return CentreTable(path, kinds[0] == VOXELS, places)


def _places(
    path: Path, rows: csv.DictReader[str], columns: tuple[str, str, str]
) -> Iterator[tuple[str, tuple[float, float, float]]]:
    """Name and place of each row."""
    for row in rows:
        where = f"{path}, line {rows.line_num}"
        name = (row[NAME] or "").strip()
        if not name:
            raise UsageError(f"{where}: {NAME} is empty; give the name of a case")
        if None in row:
            raise UsageError(f"{where}: has more values than columns; write decimals with a point")
        x, y, z = (_coordinate(where, column, row[column]) for column in columns)
        yield name, (x, y, z)


def _coordinate(where: str, column: str, text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"{where}: {column} is '{text or ''}'; it must be a finite number")
    return value


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.6g}" for value in values)
