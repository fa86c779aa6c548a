"""Voxels behind a text header, as in NRRD and MetaImage files: where they lie, and reading them.

The headers are untrusted. Sizes are compared with the file before anything is read, packed voxels are unpacked no
further than the header announces, and a header may name no file but one beside it. ITK, which reads these formats too,
follows a header to any path and loads its parts while other threads read; the tests compare both.
"""

from __future__ import annotations

import bz2
import gzip
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ...errors import VolumeError
from ..volumes import MAX_VOXELS
from .nifti import MAX_GZIP_RATIO, chosen_frame
from .unpacking import IMAGE_BYTES, LABEL_BYTES, read_into, refuse_bomb, unpack_into

MAX_HEADER = 1 << 20  # bytes
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0])
# Bytes of voxels for each byte of a file. bzip2 packs runs a million times: there `read` refuses what is too large.
MAX_RATIOS = {"raw": 1, "gzip": MAX_GZIP_RATIO, "zlib": MAX_GZIP_RATIO, "bzip2": math.inf}
AUTO_ZLIB = 47  # window bits with which zlib tells its own header from that of gzip
MILLIMETRES = {"mm": 1.0, "cm": 10.0, "m": 1000.0, "um": 0.001, "µm": 0.001, "μm": 0.001, "micron": 0.001}


@dataclass(frozen=True, kw_only=True)
class RawVolume:
    """What a text header says of the voxels. Raises: VolumeError if they are no volumes that can be read.

    Attributes:
        path: of the header.
        stored: length of each stored axis, the fastest first.
        frame_axis: the stored axis along which volumes follow each other; None for one volume.
        dtype: of a voxel, with its byte order.
        affine: (4, 4), voxel index to millimetres (RAS+).
        data: file of the voxels, which may be the header's own.
        start: bytes before the first voxel; -1 if the voxels end the file.
        encoding: "raw", "gzip", "zlib" or "bzip2".
    """

    path: Path
    stored: tuple[int, ...]
    frame_axis: int | None
    dtype: np.dtype
    affine: np.ndarray
    data: Path
    start: int
    encoding: str

    def __post_init__(self) -> None:
        if min(self.stored) < 1:
            raise VolumeError(f"{self.path}: is empty, shape {self.stored}; every axis must have at least one voxel")
        if (voxels := math.prod(self.stored)) > MAX_VOXELS:
            raise VolumeError(f"{self.path}: its header claims {voxels} voxels; at most {MAX_VOXELS} are read")
        if not os.path.isfile(self.data):
            raise VolumeError(f"{self.path}: its voxels are in {self.data.name}, which is not there; copy it too")
        held = self.data.stat().st_size - max(0, self.start)
        if self.size > held * MAX_RATIOS[self.encoding]:
            raise VolumeError(
                f"{self.path}: its header claims {self.stored} voxels, more than the file can hold; copy it again"
            )

    @property
    def size(self) -> int:
        """Bytes of all voxels, unpacked."""
        return math.prod(self.stored) * self.dtype.itemsize

    @property
    def frames(self) -> int:
        """Number of volumes."""
        return 1 if self.frame_axis is None else self.stored[self.frame_axis]

    @property
    def shape(self) -> tuple[int, ...]:
        """(3,) of one volume."""
        return tuple(length for axis, length in enumerate(self.stored) if axis != self.frame_axis)

    def read(self, frame: int | None = None, *, integer: bool = False) -> np.ndarray:
        """The voxels (X, Y, Z) of a frame, counted from 1, or of the only one, in the type of the file.

        Args:
            frame: its number; needed where there are several.
            integer: whether they are labels, which pack better than images.

        Raises: VolumeError if the file is shorter or longer than its header says, would become much larger than it is,
            or no frame is chosen.
        """
        place = chosen_frame(self.path, self.shape, frames=self.frames, frame=frame)
        if self.encoding != "raw":
            held, most = self.data.stat().st_size, LABEL_BYTES if integer else IMAGE_BYTES
            needed = math.prod(self.stored) * max(self.dtype.itemsize, 2 if integer else 4)
            refuse_bomb(self.path, packed=held, unpacked=needed, most=most)
        content = bytearray(self.size)
        with self.data.open("rb") as file:
            file.seek(-self.size if self.start < 0 else self.start, os.SEEK_END if self.start < 0 else os.SEEK_SET)
            count = self._read_into(file, memoryview(content))
        if count != self.size:
            raise VolumeError(
                f"{self.path}: holds {count} bytes of voxels, its header claims {self.size}; copy it again"
            )
        voxels = np.frombuffer(content, self.dtype).reshape(self.stored, order="F")
        return voxels if self.frame_axis is None else np.take(voxels, place, axis=self.frame_axis)

    def _read_into(self, file: BinaryIO, content: memoryview) -> int:
        """Fill memory with the voxels. Returns: bytes that are there, at most one more, so that a longer file shows."""
        if self.encoding == "raw":
            return read_into(file, content)
        if self.encoding == "zlib":
            return unpack_into(file, zlib.decompressobj(AUTO_ZLIB), content)
        with bz2.open(file) if self.encoding == "bzip2" else gzip.open(file) as unpacked:
            return read_into(unpacked, content) + len(unpacked.read(1))


def read_start(path: Path) -> bytes:
    """The part of a file in which its text header must lie."""
    with path.open("rb") as file:
        return file.read(MAX_HEADER)


def beside(path: Path, name: str) -> Path:
    """The file that a header names as that of its voxels.

    Raises: VolumeError unless it is a plain name of a file in the header's folder.
    """
    if not name or Path(name).name != name or "\\" in name or "\0" in name:
        raise VolumeError(
            f"{path}: its voxels are in '{name[:80]}'; only one file in the folder of its header is read, so save both "
            "together"
        )
    return path.parent / name


def affine_of(path: Path, axes: np.ndarray, origin: np.ndarray, *, ras: bool = False) -> np.ndarray:
    """(4, 4), voxel index to millimetres (RAS+).

    Args:
        path: of the header, for messages.
        axes: (3, 3), row k is the step from voxel to voxel along axis k, millimetres.
        origin: (3,), place of the first voxel, millimetres.
        ras: whether both are right-anterior-superior; otherwise left-posterior-superior, as DICOM's.

    Raises: VolumeError for an axis without length.
    """
    if not np.linalg.norm(axes, axis=1).all():
        raise VolumeError(f"{path}: its header gives an axis of 0 mm; repair the header")
    turn = np.eye(3) if ras else LPS_TO_RAS
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn @ axes.T, turn @ origin
    return affine


def numbers(path: Path, field: str, text: str, count: int | None = None) -> list[float]:
    """The numbers of a header's field. Raises: VolumeError if there are others than `count` numbers."""
    try:
        values = [float(part) for part in text.split()]
    except ValueError:
        values = []
    if not values or len(values) != (count or len(values)):
        wanted = f"{count} numbers" if count else "numbers"
        raise VolumeError(f"{path}: {field} is '{text[:80]}'; it must be {wanted}, repair the header")
    return values


def whole_numbers(path: Path, field: str, text: str, count: int | None = None) -> list[int]:
    """See `numbers`; these are whole ones."""
    values = numbers(path, field, text, count)
    if any(not math.isfinite(value) or value != int(value) for value in values):
        raise VolumeError(f"{path}: {field} is '{text[:80]}'; it must be whole numbers, repair the header")
    return [int(value) for value in values]
