"""Reading and writing medical volumes: NIfTI files, and DICOM series through `dicom`."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from ..common.files import atomic_file
from ..errors import UsageError, VolumeError
from .dicom import read_series
from .volumes import MAX_VOXELS, Volume

SUFFIXES = (".nii", ".nii.gz")
MOST_GZIP_SHRINKS = 1032  # deflate cannot do better
MOST_TRAILING = 1 << 20  # bytes of padding behind the voxels
LABEL_TOLERANCE = 1e-3  # of whole numbers, where scaling factors of the file round


def is_volume(path: Path) -> bool:
    """True for what is named like a NIfTI volume and is no folder; a broken link is found out when it is read."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and not os.path.isdir(path)


def case_name(path: Path) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def read_volume(path: str | os.PathLike | tuple[Path, ...], *, integer: bool = False) -> Volume:
    """Read a 3-D volume.

    Args:
        path: `.nii` or `.nii.gz` file, of which a trailing fourth axis of length 1 is dropped; or the files of a DICOM
            series in slice order.
        integer: read a label map: values must be whole numbers from 0 to 65535; data is uint16. Otherwise float32.

    Raises:
        UsageError: there is no such file.
        VolumeError: not NIfTI, not 3-D, empty, complex or RGB, NaN or infinite voxels, an unusable affine, or a header
            that claims more voxels than the file can hold.
    """
    if isinstance(path, tuple):
        volume = read_series(path)
        _refuse_bad_values(path[0].parent, volume)
        return volume
    path = Path(path)
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file, or no regular one")
    try:
        image = _open_nifti(path)
        shape, affine = tuple(image.shape), np.asarray(image.affine, dtype=np.float64)
        with np.errstate(all="ignore"):  # values that overflow become infinite, and are refused below
            data = np.asarray(image.dataobj) if integer else np.asarray(image.dataobj, dtype=np.float32)
    except VolumeError:
        raise
    except Exception as error:  # nibabel raises many kinds for a damaged file; each is the same fact for the user
        raise VolumeError(f"{path}: cannot be read as NIfTI ({_first_line(error)})") from None
    data = data.reshape(shape[:3])
    _refuse_bad_values(path, Volume(data, affine))
    return Volume(_whole_numbers(path, data) if integer else data, affine)


def write_volume(path: str | os.PathLike, volume: Volume) -> None:
    """Write a volume as NIfTI (gzip if the name ends in `.gz`), atomically; integer data stays integer."""
    data = volume.data.astype(np.uint8) if volume.data.dtype == bool else volume.data
    image = nib.Nifti1Image(data, volume.affine)
    image.header.set_xyzt_units("mm")
    with atomic_file(path) as temporary:
        nib.save(image, temporary)


def _open_nifti(path: Path) -> nib.Nifti1Image:
    """The image, unpacked into memory. All of the file is read, so that its checksum is compared."""
    nib.imageglobals.logger.setLevel("CRITICAL")  # it repairs headers and says so; what matters is checked here
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
        kind = next((kind for kind in (nib.Nifti1Image, nib.Nifti2Image) if _is_single_file(start, kind)), None)
        if kind is None:
            raise VolumeError(f"{path}: is no NIfTI file")
        header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
        expected = _checked_size(path, header)
        rest = file.read(max(0, expected - len(start)) + MOST_TRAILING + 1)
    if len(start) + len(rest) > expected + MOST_TRAILING:
        raise VolumeError(f"{path}: is longer than its header says")
    return kind.from_bytes(start + rest)


def _is_single_file(start: bytes, kind: type[nib.Nifti1Image]) -> bool:
    header = kind.header_class
    if len(start) < header.sizeof_hdr or int.from_bytes(start[:4], "little") not in _either_order(header.sizeof_hdr):
        return False
    return header(start[: header.sizeof_hdr], check=False)["magic"].item() == header.single_magic


def _either_order(number: int) -> tuple[int, int]:
    return number, int.from_bytes(number.to_bytes(4, "big"), "little")


def _checked_size(path: Path, header: nib.Nifti1Header) -> int:
    """Bytes the unpacked file should have. Raises VolumeError for what no 3-D image of real numbers has."""
    shape = tuple(int(n) for n in header.get_data_shape())
    try:
        dtype = header.get_data_dtype()
    except KeyError:
        raise VolumeError(f"{path}: voxels are of unknown type {header['datatype']}") from None
    if len(shape) != 3 and not (len(shape) == 4 and shape[3] == 1):
        raise VolumeError(f"{path}: is {len(shape)}-D {shape}, expected a 3-D volume")
    if min(shape) < 1:
        raise VolumeError(f"{path}: is empty, shape {shape}")
    if dtype.names or dtype.kind == "c":
        raise VolumeError(f"{path}: voxels are {dtype}, expected one real number each")
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise VolumeError(f"{path}: its header claims {voxels} voxels; at most {MAX_VOXELS} are read")
    most = path.stat().st_size * (MOST_GZIP_SHRINKS if path.name.lower().endswith(".gz") else 1)
    if voxels * dtype.itemsize > most:
        raise VolumeError(f"{path}: its header claims {shape} voxels, more than the file can hold; it is cut off")
    spacing = header["pixdim"][1:4]
    if header["sform_code"] == 0 and not (spacing > 0).all():  # nibabel takes 1 mm for 0, and drops signs
        raise VolumeError(f"{path}: its header gives voxels of {' x '.join(f'{s:g}' for s in spacing)} mm")
    return int(header["vox_offset"]) + voxels * dtype.itemsize


def _refuse_bad_values(path: Path, volume: Volume) -> None:
    if not np.isfinite(volume.affine).all() or not abs(np.linalg.det(volume.affine[:3, :3])) >= 1e-9:
        raise VolumeError(f"{path}: its affine cannot be inverted; repair the header")
    if volume.data.dtype.kind == "f" and (bad := int(np.size(volume.data) - np.isfinite(volume.data).sum())):
        raise VolumeError(f"{path}: {bad} voxels are NaN or infinite; replace them before using the volume")


def _whole_numbers(path: Path, data: np.ndarray) -> np.ndarray:
    """uint16. Raises VolumeError for anything else than whole numbers from 0 to 65535."""
    whole = np.round(data) if data.dtype.kind == "f" else data
    rounded = data.dtype.kind == "f" and (abs(data - whole) > LABEL_TOLERANCE).any()
    if rounded or whole.min() < 0 or whole.max() > np.iinfo(np.uint16).max:
        raise VolumeError(f"{path}: a label map must hold whole numbers from 0 to 65535")
    return whole.astype(np.uint16)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
