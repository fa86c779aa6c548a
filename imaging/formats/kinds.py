"""Which files are volumes, by the ending of their names, and what their headers tell without reading a voxel."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from ...errors import VolumeError
from .meta_image import meta_image
from .nifti import marked_frames as nifti_marks
from .nifti import nifti_layout
from .nrrd import nrrd
from .raw_volume import RawVolume
from .unpacking import DAMAGED

NIFTI = (".nii.gz", ".nii")
HEADERS: dict[str, Callable[[Path], RawVolume]] = {".mha": meta_image, ".mhd": meta_image, ".nrrd": nrrd, ".nhdr": nrrd}
SUFFIXES = (*NIFTI, *HEADERS)


def text_header(path: Path) -> RawVolume | None:
    """What the header of an NRRD or MetaImage file says; None for other files.

    Raises: VolumeError if it is damaged, OSError if the file cannot be read.
    """
    kind = HEADERS.get(path.suffix.lower())
    return None if kind is None else kind(path)


def voxel_file(path: Path) -> Path | None:
    """The file that holds the voxels of a header; None where the file has its own, or is not usable."""
    try:
        header = text_header(path) if os.path.isfile(path) else None
    except (VolumeError, OSError):  # reading the volume, which follows, reports what is wrong
        return None
    return None if header is None or header.data == path else header.data


def marked_frames(path: Path) -> list[bool]:
    """Of each frame of a label file, whether it marks anything.

    Raises: VolumeError, or an error of the system or of gzip, for a damaged file.
    """
    header = text_header(path)
    if header is None:
        return nifti_marks(path)
    return [bool(header.read(frame, integer=True).any()) for frame in range(1, header.frames + 1)]


def frames_of(path: Path) -> int:
    """Number of volumes that a file holds; 1 for files that are none or not usable, which reading reports."""
    try:
        if path.name.lower().endswith(NIFTI):
            return nifti_layout(path).frames if os.path.isfile(path) else 1
        header = text_header(path) if os.path.isfile(path) else None
    except (VolumeError, OSError, EOFError, ValueError, *DAMAGED):
        return 1
    return 1 if header is None else header.frames
