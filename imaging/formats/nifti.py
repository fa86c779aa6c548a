"""NIfTI files: what their header says, checked before anything is read, and the whole image or one of its frames."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.arrayproxy import ArrayProxy
from nibabel.spatialimages import HeaderDataError

from ...errors import VolumeError
from ..nifti.geometry import MILLIMETRES, SPATIAL_UNITS, NiftiGeometry
from ..volumes import MAX_VOXELS
from .content import what_instead
from .unpacking import IMAGE_BYTES, LABEL_BYTES, read_into, refuse_bomb

GZIP = b"\x1f\x8b"
MAX_GZIP_RATIO = 1032  # largest compression ratio of deflate
MAX_EXTENSIONS = 1 << 26  # bytes between header and voxels
MAX_TRAILING_BYTES = 1 << 20  # of padding after the voxels
PART = 1 << 22  # voxels that are scaled at once
SCALED_BYTES = 8  # of a whole number in a file with a scale, at most
LARGEST_VOXEL = 500.0  # millimetres; above it the header's unit is not that of its numbers


@dataclass(frozen=True)
class NiftiLayout:
    """How a NIfTI file is laid out.

    Attributes:
        shape: (3,) of one frame.
        frames: number of volumes of this shape, 1 for a 3-D image.
        start: bytes before the first voxel.
        size: bytes of one frame.
    """

    shape: tuple[int, ...]
    frames: int
    start: int
    size: int


def nifti_layout(path: Path) -> NiftiLayout:
    """The layout of a NIfTI file, from its header alone. Raises: as `read_nifti`."""
    with _opened(path) as file:
        return _header(path, file)[2]


def read_nifti(
    path: Path, frame: int | None = None, *, integer: bool = False
) -> tuple[np.ndarray, np.ndarray, NiftiGeometry]:
    """The voxels (X, Y, Z), the affine (4, 4) in millimetres, and the geometry before nibabel repairs it.

    Whether a file is packed is told by its first bytes, for browsers unpack files and keep their names. Of a 3-D image
    the whole file is read, so that gzip compares its checksum; of a frame no more than what lies before it.

    Args:
        path: `.nii` or `.nii.gz` file. Axes of length 1 after the third one are dropped.
        frame: number of the volume to read, from 1; without effect on an image of one volume.
        integer: True gives the type of the file, or the one that its scaling needs; False gives float32.

    Raises:
        VolumeError: no NIfTI, empty, not one real number per voxel, more voxels than the file can hold or is likely to
            hold, or frames of which none is chosen.
        OSError, EOFError or another error of gzip and nibabel for a damaged file.
    """
    nib.imageglobals.logger.setLevel("CRITICAL")  # it reports repairs of headers; what matters is checked here
    with _opened(path) as file:
        start, header, layout = _header(path, file)
        place = chosen_frame(path, layout.shape, frames=layout.frames, frame=frame)
        _refuse_unlikely(path, header, layout, file, integer=integer)
        geometry = NiftiGeometry.of_header(header)
        header["dim"][0], header["dim"][4:] = 3, 1
        start = header.binaryblock + start[header.sizeof_hdr :]  # of one frame
        known = start + file.read(max(0, layout.start - len(start)))
        first = layout.start + place * layout.size
        _skip(file, max(0, first - len(known)))
        stored = bytearray(layout.size)
        there = known[first : first + layout.size]
        stored[: len(there)] = there
        count = len(there) + read_into(file, memoryview(stored)[len(there) :])
        if count < layout.size:
            raise EOFError(f"the file ends after {count} of {layout.size} bytes of voxels")
        if layout.frames == 1 and len(file.read(MAX_TRAILING_BYTES + 1)) > MAX_TRAILING_BYTES:  # to its checksum
            expected = layout.start + layout.size
            raise VolumeError(f"{path}: has more than the {expected} bytes of its header; write it again")
    kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
    image = kind.from_bytes(known[: layout.start])
    affine = _in_millimetres(path, np.asarray(image.affine, dtype=np.float64), header)
    return _scaled(stored, image, layout.shape, None if integer else np.dtype(np.float32)), affine, geometry


def marked_frames(path: Path) -> list[bool]:
    """Of each frame, whether a stored number in it is not 0. Raises: as `read_nifti`."""
    with _opened(path) as file:
        start, header, layout = _header(path, file)
        _refuse_unlikely(path, header, layout, file, integer=True)
        content = start[layout.start :]
        _skip(file, max(0, layout.start - len(start)))
        marked = []
        for _ in range(layout.frames):
            content += file.read(max(0, layout.size - len(content)))
            if len(content) < layout.size:
                raise VolumeError(f"{path}: ends before its last frame; copy it again")
            marked.append(bool(np.frombuffer(content[: layout.size], header.get_data_dtype()).any()))
            content = content[layout.size :]
        return marked


def chosen_frame(path: Path, shape: tuple[int, ...], *, frames: int, frame: int | None) -> int:
    """Place of the frame that is asked for, from 0.

    Args:
        path: of the file, for messages.
        shape: (3,) of one frame.
        frames: number of frames in the file.
        frame: number of the frame, from 1; None for a file of one frame.

    Raises: VolumeError if several frames are there and none is asked for, or the one asked for is missing.
    """
    if frames == 1:
        return 0
    sides = " x ".join(map(str, shape))
    if frame is None:
        raise VolumeError(
            f"{path}: is 4-D, {frames} frames of {sides} voxels, expected a 3-D volume; choose its frames by --frames "
            "each, first or a number (`prepare`, `segment`)"
        )
    if not 1 <= frame <= frames:
        raise VolumeError(f"{path}: has no frame {frame}; it has the frames 1 to {frames}")
    return frame - 1


def _refuse_unlikely(
    path: Path, header: nib.Nifti1Header, layout: NiftiLayout, file: BinaryIO, *, integer: bool
) -> None:
    """Raises: VolumeError for a packed file that would become much larger than it is, see `refuse_bomb`."""
    if isinstance(file, io.BufferedReader):
        return
    packed, most = path.stat().st_size, LABEL_BYTES if integer else IMAGE_BYTES
    try:
        slope, inter = header.get_slope_inter()
    except HeaderDataError as error:
        raise VolumeError(f"{path}: its header scales voxels by no number ({error}); repair the header") from None
    width = SCALED_BYTES if integer and not (slope in (None, 1) and inter in (None, 0)) else 2 if integer else 4
    voxels = math.prod(layout.shape)
    refuse_bomb(path, packed=packed, unpacked=max(layout.size, width * voxels), most=most)
    refuse_bomb(path, packed=packed, unpacked=layout.size * layout.frames, most=LABEL_BYTES)


def _scaled(stored: bytearray, image: nib.Nifti1Image, shape: tuple[int, ...], dtype: np.dtype | None) -> np.ndarray:
    """Voxels as nibabel scales them, but part by part: it would hold all of them in several types at once.

    Args:
        stored: of one frame.
        image: with its header.
        shape: (3,) of the frame.
        dtype: of the result; None takes the type of the file, or the one that its scaling needs.
    """
    proxy = image.dataobj
    voxels = np.frombuffer(stored, proxy.dtype)
    if (proxy.slope, proxy.inter) == (1, 0):
        return voxels.astype(proxy.dtype if dtype is None else dtype, copy=False).reshape(shape, order="F")
    whole: np.ndarray | None = None
    for first in range(0, voxels.size, PART):
        raw = voxels[first : first + PART]
        spec = (raw.shape, proxy.dtype, 0, proxy.slope, proxy.inter)
        part = np.asarray(ArrayProxy(io.BytesIO(raw.tobytes()), spec), dtype=dtype)
        if whole is None:
            whole = np.empty(voxels.size, part.dtype)
        whole[first : first + PART] = part
    assert whole is not None
    return whole.reshape(shape, order="F")


def _opened(path: Path) -> BinaryIO:
    """The file, unpacked as it is read if its first bytes are those of gzip."""
    file = path.open("rb")
    packed = file.read(len(GZIP)) == GZIP
    file.seek(0)
    if not packed:
        return file
    file.close()
    return igzip.open(path)


def _skip(file: BinaryIO, count: int) -> None:
    """Read past bytes without keeping them."""
    while count:
        part = len(file.read(min(count, 1 << 22)))
        if not part:
            raise EOFError("the file ends before its last frame")
        count -= part


def _header(path: Path, file: BinaryIO) -> tuple[bytes, nib.Nifti1Header, NiftiLayout]:
    """The first bytes of a file, its header, and its layout. Raises: VolumeError if it is no usable header."""
    start = file.read(nib.Nifti2Header.sizeof_hdr)
    kinds = (nib.Nifti1Image, nib.Nifti2Image)
    kind = next((kind.header_class for kind in kinds if _is_single_file(start, kind.header_class)), None)
    if kind is None:
        found = f"it {instead}" if (instead := what_instead(start)) else "give a single-file NIfTI-1 or NIfTI-2 image"
        raise VolumeError(f"{path}: is no NIfTI file; {found}")
    header = kind(start[: kind.sizeof_hdr], check=False)
    return start, header, _checked_layout(path, header, packed=not isinstance(file, io.BufferedReader))


def _is_single_file(start: bytes, header: type[nib.Nifti1Header]) -> bool:
    """Whether a file with these first bytes is a single-file image with such a header."""
    if len(start) < header.sizeof_hdr or int.from_bytes(start[:4], "little") not in _either_order(header.sizeof_hdr):
        return False
    return header(start[: header.sizeof_hdr], check=False)["magic"].item() == header.single_magic


def _either_order(number: int) -> tuple[int, int]:
    """The number, and the number that its bytes give in the other byte order."""
    return number, int.from_bytes(number.to_bytes(4, "big"), "little")


def _checked_layout(path: Path, header: nib.Nifti1Header, *, packed: bool) -> NiftiLayout:
    """The layout that a header describes.

    Raises: VolumeError if it is not that of 3-D images of real numbers which the file can hold.
    """
    shape = tuple(int(n) for n in header.get_data_shape())
    try:
        dtype = header.get_data_dtype()
    except KeyError:
        raise VolumeError(f"{path}: voxels have unknown type {header['datatype']}; write them as float32") from None
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 4:
        numbers = math.prod(shape[4:])
        raise VolumeError(
            f"{path}: is {len(shape)}-D {shape}, {numbers} numbers for each voxel, such as a vector field; expected a "
            "3-D volume, so write one of them as an image of its own"
        )
    if len(shape) < 3:
        raise VolumeError(f"{path}: is {len(shape)}-D {shape}, expected a 3-D volume; write it with a third axis")
    if min(shape) < 1:
        raise VolumeError(f"{path}: is empty, shape {shape}; every axis must have at least one voxel")
    if dtype.names or dtype.kind == "c":
        what = "colours" if dtype.names else "complex numbers"
        raise VolumeError(f"{path}: voxels are {what}, expected one real number each; write a grey image")
    voxels = math.prod(shape[:3])
    if voxels > MAX_VOXELS:
        raise VolumeError(f"{path}: its header claims {voxels} voxels; at most {MAX_VOXELS} are read")
    most = path.stat().st_size * (MAX_GZIP_RATIO if packed else 1)
    if math.prod(shape) * dtype.itemsize > most:
        raise VolumeError(f"{path}: its header claims {shape} voxels, more than the file can hold; copy it again")
    offset = float(header["vox_offset"])
    if not header.single_vox_offset <= offset <= MAX_EXTENSIONS:  # nibabel takes the header for voxels
        raise VolumeError(f"{path}: its header says that voxels begin at byte {offset:g}; repair the header")
    spacing = header["pixdim"][1:4]
    if header["sform_code"] == 0 and not (spacing > 0).all():  # nibabel takes 1 mm for 0, and drops signs
        sides = " x ".join(f"{side:g}" for side in spacing)
        raise VolumeError(f"{path}: its header gives voxels of {sides} mm; all must be positive, repair the header")
    frames = shape[3] if len(shape) == 4 else 1
    return NiftiLayout(shape[:3], frames, int(offset), voxels * dtype.itemsize)


def _in_millimetres(path: Path, affine: np.ndarray, header: nib.Nifti1Header) -> np.ndarray:
    """The affine (4, 4) in millimetres, from the unit that the header names.

    Raises: VolumeError if the voxels are then larger than any scanner's: the header names another unit than it has.
    """
    factor = MILLIMETRES.get(int(header["xyzt_units"]) & SPATIAL_UNITS, 1.0)
    if factor == 1:
        return affine
    affine = affine.copy()
    affine[:3] *= factor
    with np.errstate(all="ignore"):
        largest = float(np.sqrt((affine[:3, :3] ** 2).sum(axis=0)).max())
    if largest > LARGEST_VOXEL:
        raise VolumeError(
            f"{path}: its header names metres as the unit, which makes voxels of {largest:g} mm; repair the header"
        )
    return affine
