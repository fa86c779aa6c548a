"""Reading and writing medical volumes: NIfTI files, and DICOM series through `archive.series`."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import nibabel as nib
import numpy as np

from ..common.files import atomic_file
from ..errors import UsageError, VolumeError
from .archive.series import read_series
from .nifti.geometry import NiftiGeometry
from .volumes import MAX_VOXELS, Volume

SUFFIXES = (".nii", ".nii.gz")
MAX_GZIP_RATIO = 1032  # largest compression ratio of deflate
MAX_TRAILING_BYTES = 1 << 20  # of padding after the voxels
LABEL_TOLERANCE = 1e-3  # largest deviation from whole numbers, which scaling factors of the file cause


def is_volume(path: Path) -> bool:
    """Whether a path has the name of a NIfTI volume and is no folder; a broken link fails when it is read."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and not os.path.isdir(path)


def case_name(path: Path) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def read_volume(path: str | os.PathLike | tuple[Path, ...], *, integer: bool = False) -> Volume:
    """Read a 3-D volume.

    Args:
        path: `.nii` or `.nii.gz` file (a fourth axis of length 1 is dropped), or the files of a DICOM series in slice
            order.
        integer: True reads a label map of whole numbers from 0 to 65535 as uint16; False reads float32.

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
        raise UsageError(f"{path}: no such file, or no regular file; give a NIfTI file")
    try:
        image, geometry = _open_nifti(path)
        shape, affine = tuple(image.shape), np.asarray(image.affine, dtype=np.float64)
        with np.errstate(all="ignore"):  # values that overflow become infinite, and are refused below
            data = np.asarray(image.dataobj) if integer else np.asarray(image.dataobj, dtype=np.float32)
    except VolumeError:
        raise
    except Exception as error:  # nibabel raises many types for damaged files, all with one meaning here
        raise VolumeError(f"{path}: cannot be read as NIfTI ({_first_line(error)}); copy it again") from None
    data = data.reshape(shape[:3])
    _refuse_bad_values(path, Volume(data, affine))
    return Volume(_whole_numbers(path, data) if integer else data, affine, geometry)


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


def _open_nifti(path: Path) -> tuple[nib.Nifti1Image, NiftiGeometry]:
    """The image, unpacked into memory, and the geometry of its header before nibabel repairs it.

    The whole file is read, so that gzip compares its checksum.
    """
    nib.imageglobals.logger.setLevel("CRITICAL")  # it reports repairs of headers; what matters is checked here
    with gzip.open(path) if path.name.lower().endswith(".gz") else path.open("rb") as file:
        start = file.read(nib.Nifti2Header.sizeof_hdr)
        kind = next((kind for kind in (nib.Nifti1Image, nib.Nifti2Image) if _is_single_file(start, kind)), None)
        if kind is None:
            raise VolumeError(f"{path}: is no NIfTI file; give a single-file NIfTI-1 or NIfTI-2 image")
        header = kind.header_class(start[: kind.header_class.sizeof_hdr], check=False)
        expected = _checked_size(path, header)
        rest = file.read(max(0, expected - len(start)) + MAX_TRAILING_BYTES + 1)
    if len(start) + len(rest) > expected + MAX_TRAILING_BYTES:
        raise VolumeError(f"{path}: has more than the {expected} bytes of its header; write it again")
    return kind.from_bytes(start + rest), NiftiGeometry.of_header(header)


def _is_single_file(start: bytes, kind: type[nib.Nifti1Image]) -> bool:
    """Whether a file with these first bytes is a single-file image of the given NIfTI version."""
    header = kind.header_class
    if len(start) < header.sizeof_hdr or int.from_bytes(start[:4], "little") not in _either_order(header.sizeof_hdr):
        return False
    return header(start[: header.sizeof_hdr], check=False)["magic"].item() == header.single_magic


def _either_order(number: int) -> tuple[int, int]:
    """The number, and the number that its bytes give in the other byte order."""
    return number, int.from_bytes(number.to_bytes(4, "big"), "little")


def _checked_size(path: Path, header: nib.Nifti1Header) -> int:
    """Number of bytes that the unpacked file should have.

    Raises: VolumeError if the header is not that of a 3-D image of real numbers.
    """
    shape = tuple(int(n) for n in header.get_data_shape())
    try:
        dtype = header.get_data_dtype()
    except KeyError:
        raise VolumeError(f"{path}: voxels have unknown type {header['datatype']}; write them as float32") from None
    if len(shape) != 3 and not (len(shape) == 4 and shape[3] == 1):
        raise VolumeError(f"{path}: is {len(shape)}-D {shape}, expected a 3-D volume")
    if min(shape) < 1:
        raise VolumeError(f"{path}: is empty, shape {shape}; every axis must have at least one voxel")
    if dtype.names or dtype.kind == "c":
        raise VolumeError(f"{path}: voxels are {dtype}, expected one real number each")
    voxels = math.prod(shape)
    if voxels > MAX_VOXELS:
        raise VolumeError(f"{path}: its header claims {voxels} voxels; at most {MAX_VOXELS} are read")
    most = path.stat().st_size * (MAX_GZIP_RATIO if path.name.lower().endswith(".gz") else 1)
    if voxels * dtype.itemsize > most:
        raise VolumeError(f"{path}: its header claims {shape} voxels, more than the file can hold; copy it again")
    spacing = header["pixdim"][1:4]
    if header["sform_code"] == 0 and not (spacing > 0).all():  # nibabel takes 1 mm for 0, and drops signs
        sides = " x ".join(f"{side:g}" for side in spacing)
        raise VolumeError(f"{path}: its header gives voxels of {sides} mm; all must be positive, repair the header")
    return int(header["vox_offset"]) + voxels * dtype.itemsize


def _refuse_bad_values(path: Path, volume: Volume) -> None:
    if not np.isfinite(volume.affine).all() or not abs(np.linalg.det(volume.affine[:3, :3])) >= 1e-9:
        raise VolumeError(f"{path}: its affine cannot be inverted; use a file with a repaired header")
    if volume.data.dtype.kind == "f" and (bad := int(np.size(volume.data) - np.isfinite(volume.data).sum())):
        raise VolumeError(f"{path}: {bad} voxels are NaN or infinite; replace them before you use the volume")


def _whole_numbers(path: Path, data: np.ndarray) -> np.ndarray:
    """Label values of any shape as uint16.

    Raises: VolumeError if they are not whole numbers from 0 to 65535.
    """
    whole = np.round(data) if data.dtype.kind == "f" else data
    rounded = data.dtype.kind == "f" and (abs(data - whole) > LABEL_TOLERANCE).any()
    if rounded or whole.min() < 0 or whole.max() > np.iinfo(np.uint16).max:
        raise VolumeError(
            f"{path}: values go from {whole.min():g} to {whole.max():g}; labels must be whole numbers from 0 to 65535"
        )
    return whole.astype(np.uint16)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
