"""Reading and writing medical volumes: NIfTI, NRRD and MetaImage files, and DICOM series through `archive.series`."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from ..common.files import atomic_file
from ..errors import UsageError, VolumeError
from .archive.series import read_series
from .case_files import Reading
from .formats.kinds import NIFTI, SUFFIXES, text_header
from .formats.label_values import LARGEST, OPTION, LabelValues, suggestion
from .formats.nifti import read_nifti
from .nifti.geometry import NiftiGeometry
from .volumes import Volume

AS_STORED = Reading()
LABEL_TOLERANCE = 1e-3  # largest deviation from whole numbers, which scaling factors of the file cause


def is_volume(path: Path) -> bool:
    """Whether a path has the name of a volume and is no folder; a broken link fails when it is read."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and not os.path.isdir(path)


def case_name(path: Path) -> str:
    """File name without the ending of a volume, composed: macOS writes an umlaut as two characters, others as one."""
    ending = next((suffix for suffix in SUFFIXES if path.name.lower().endswith(suffix)), path.suffix)
    return normalize("NFC", path.name[: len(path.name) - len(ending)])


def read_volume(
    path: str | os.PathLike | tuple[Path, ...],
    *,
    integer: bool = False,
    reading: Reading = AS_STORED,
    values: LabelValues | None = None,
) -> Volume:
    """Read a 3-D volume.

    Args:
        path: NIfTI file (`.nii`, `.nii.gz`; packed or not is told by its content), NRRD (`.nrrd`, `.nhdr`) or
            MetaImage file (`.mha`, `.mhd`), or the files of a DICOM series in slice order. Axes of length 1 after the
            third one are dropped, and the unit of length that a header names is converted to millimetres.
        integer: True reads a label map of whole numbers from 0 to 65535 as uint16; False reads float32.
        reading: which frame of several is read, and what becomes of NaN and infinite voxels.
        values: of a label map, the class of each value, which may then be any whole number; None takes the values for
            class numbers.

    Raises:
        UsageError: there is no such file.
        VolumeError: of another format, not 3-D, several frames without a choice, empty, complex or RGB, NaN or infinite
            voxels unless they are background, no finite voxel, an unusable affine, a label value without a class, or a
            header that claims more voxels than the file can hold.
    """
    if isinstance(path, tuple):
        volume = read_series(path)
        return _finite(path[0].parent, volume, reading.nan)
    path = Path(path)
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file, or no regular file; give a NIfTI, NRRD or MetaImage file")
    try:
        with np.errstate(all="ignore"):  # values that overflow become infinite, and are refused below
            data, affine, geometry = _voxels(path, reading.frame, integer=integer)
    except VolumeError:
        raise
    except HeaderDataError as error:
        raise VolumeError(f"{path}: its header cannot be right ({_first_line(error)}); repair the header") from None
    except Exception as error:  # nibabel raises many types for damaged files, all with one meaning here
        kind = "NIfTI" if path.name.lower().endswith(NIFTI) else "NRRD or MetaImage"
        raise VolumeError(f"{path}: cannot be read as {kind} ({_first_line(error)}); copy it again") from None
    if integer and data.dtype.kind == "f" and not (known := np.isfinite(data)).all():
        raise VolumeError(
            f"{path}: {int(known.size - known.sum())} voxels are NaN or infinite; labels must be whole numbers, so "
            "write 0 there if they are background"
        )
    volume = _finite(path, Volume(data, affine, geometry), "refuse" if integer else reading.nan)
    if not integer:
        return volume
    return Volume(_whole_numbers(path, data, values), affine, geometry)


def write_volume(path: str | os.PathLike, volume: Volume) -> None:
    """Write a volume as NIfTI (gzip if the name ends in `.gz`), atomically; integer data stays integer.

    The header gets the volume's `geometry`, so that every program places it as it places the file with that header.
    Without one, it gets a qform and an sform in scanner millimetres. Nothing else of a header that was read is kept.
    """
    data = volume.data.astype(np.uint8) if volume.data.dtype == bool else volume.data
    geometry = volume.geometry or NiftiGeometry.of_affine(volume.affine)
    kind = nib.Nifti2Image if geometry.version == 2 else nib.Nifti1Image
    header = kind.header_class()
    header.set_data_dtype(data.dtype)
    geometry.write_into(header)
    image = kind(data, None, header)  # an affine would set the sform anew
    with atomic_file(path) as temporary:
        nib.save(image, temporary)


def _voxels(path: Path, frame: int | None, *, integer: bool) -> tuple[np.ndarray, np.ndarray, NiftiGeometry | None]:
    """Voxels (X, Y, Z) as float32 or, if `integer`, as they are stored; the affine (4, 4), and its NIfTI header."""
    header = text_header(path)
    if header is None:
        return read_nifti(path, frame, integer=integer)
    data = header.read(frame, integer=integer)
    return data if integer else np.asarray(data, dtype=np.float32), header.affine, None


def _finite(path: Path, volume: Volume, nan: str) -> Volume:
    """The volume, with NaN and infinite voxels as its lowest finite value if they are background.

    Raises: VolumeError for such voxels otherwise, for a volume of nothing else, and for an unusable affine.
    """
    # Relative to the voxel's sides, which are a thousand times smaller where the unit is the micrometre.
    sides = volume.spacing.prod() if np.isfinite(volume.affine).all() else 0.0
    if not sides > 0 or not abs(np.linalg.det(volume.affine[:3, :3])) >= 1e-9 * sides:
        raise VolumeError(f"{path}: its affine cannot be inverted; use a file with a repaired header")
    if volume.data.dtype.kind != "f":
        return volume
    if np.isfinite(volume.data.min()) and np.isfinite(volume.data.max()):  # NaN would be both
        return volume
    known = np.isfinite(volume.data)
    if not (bad := int(known.size - known.sum())):
        return volume
    if bad == known.size:
        raise VolumeError(f"{path}: all voxels are NaN or infinite; leave the volume out")
    if nan != "background":
        raise VolumeError(
            f"{path}: {bad} voxels are NaN or infinite; where they are background, --nan background fills them with "
            "the lowest value, otherwise replace them"
        )
    return replace(volume, data=np.where(known, volume.data, volume.data[known].min()))


def _whole_numbers(path: Path, data: np.ndarray, values: LabelValues | None = None) -> np.ndarray:
    """Label values of any shape as uint16, see `read_volume`; `data` of floating-point numbers is changed.

    Raises: VolumeError if they are not whole numbers from 0 to 65535, or without a class.
    """
    for place in range(data.shape[-1] if data.dtype.kind == "f" else 0):  # in place, for a copy may not fit
        part = data[..., place]
        whole = np.round(part)
        if (odd := abs(part - whole) > LABEL_TOLERANCE).any():
            value = float(part[odd].flat[0])
            raise VolumeError(f"{path}: holds values such as {value:g}; labels must be whole numbers from 0 to 65535")
        data[..., place] = whole
    low, high = data.min(), data.max()
    if low < -LARGEST or high > LARGEST:
        raise VolumeError(f"{path}: values go from {low:g} to {high:g}; labels must be whole numbers up to {LARGEST}")
    if values is not None:
        try:
            return values.apply(data)
        except VolumeError as error:
            raise VolumeError(f"{path}: {error}") from None
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise VolumeError(
            f"{path}: values go from {low:g} to {high:g}; labels must be whole numbers from 0 to 65535, or get classes "
            f"by {OPTION}, such as {suggestion(np.unique(data))}"
        )
    return data.astype(np.uint16)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
