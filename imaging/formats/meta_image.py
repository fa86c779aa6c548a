"""The header of MetaImage files (`.mha`, or `.mhd` with its voxels in a file of their own)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...errors import VolumeError
from .content import LEAST, what_instead
from .raw_volume import MILLIMETRES, RawVolume, affine_of, beside, numbers, read_start, whole_numbers

TYPES = {
    "MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4",
    "MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8", "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}  # fmt: skip
AXES, ORIGIN = ("TransformMatrix", "Rotation", "Orientation"), ("Offset", "Position", "Origin")
SPACING = ("ElementSpacing", "ElementSize")
ORDER = ("BinaryDataByteOrderMSB", "ElementByteOrderMSB")
LAST = "ElementDataFile"  # of the header's fields; the voxels follow it


def meta_image(path: Path) -> RawVolume:
    """What the header of a MetaImage file says.

    Raises: VolumeError if it is none, or of an image that is not one real number per voxel in three dimensions.
    """
    fields, end = _fields(path, read_start(path))
    if fields.get("ObjectType", "Image") != "Image" or "DimSize" not in fields:
        raise VolumeError(f"{path}: is no MetaImage file of an image; write it as NIfTI, NRRD or MetaImage")
    stored = whole_numbers(path, "DimSize", fields["DimSize"])
    dimensions = len(stored)
    while len(stored) > 3 and stored[-1] == 1:
        stored.pop()
    if len(stored) not in (3, 4):
        raise VolumeError(f"{path}: is {len(stored)}-D {tuple(stored)}, expected a 3-D volume")
    if (count := fields.get("ElementNumberOfChannels", "1")) != "1":
        raise VolumeError(f"{path}: holds {count[:20]} numbers for each voxel, expected one; write a grey image")
    if fields.get("ElementType") not in TYPES:
        raise VolumeError(f"{path}: ElementType is '{fields.get('ElementType')}'; choose one of {', '.join(TYPES)}")
    if not _yes(fields.get("BinaryData", "True")):
        raise VolumeError(f"{path}: holds its voxels as text; write them as binary data")
    order = ">" if any(_yes(fields.get(name, "False")) for name in ORDER) else "<"
    data, start = path, end
    if fields[LAST] != "LOCAL":
        data = beside(path, fields[LAST])
        (start,) = whole_numbers(path, "HeaderSize", fields.get("HeaderSize", "0"), 1)
    packed = _yes(fields.get("CompressedData", "False"))
    if start < -1 or (packed and start < 0):
        raise VolumeError(f"{path}: HeaderSize is {start}; it must be 0 or more, repair the header")
    return RawVolume(
        path=path,
        stored=tuple(stored),
        frame_axis=3 if len(stored) == 4 else None,
        dtype=np.dtype(order + TYPES[fields["ElementType"]]),
        affine=_affine(path, fields, dimensions),
        data=data,
        start=start,
        encoding="zlib" if packed else "raw",
    )


def _fields(path: Path, start: bytes) -> tuple[dict[str, str], int]:
    """The header's fields by name, and the number of its bytes. Raises: VolumeError if the last one is missing."""
    fields: dict[str, str] = {}
    place = 0
    while LAST not in fields:
        end = start.find(b"\n", place)
        line = start[place : end if end >= 0 else len(start)]
        name, sign, value = line.decode("latin-1").partition("=")
        if not sign or len(name) > 80:
            instead = "" if fields else what_instead(start[:LEAST])
            found = f"; it {instead}" if instead else ", or its header is damaged; copy it again"
            raise VolumeError(f"{path}: is no MetaImage file{found}")
        fields[name.strip()] = value.strip()
        place = end + 1
        if end < 0 and LAST not in fields:
            raise VolumeError(f"{path}: its header ends before {LAST}; copy it again")
    return fields, place


def _affine(path: Path, fields: dict[str, str], dimensions: int) -> np.ndarray:
    """(4, 4), voxel index to millimetres. Raises: VolumeError if the header gives no voxel size."""
    spacing = next((numbers(path, name, fields[name], dimensions) for name in SPACING if name in fields), None)
    if spacing is None:
        raise VolumeError(f"{path}: its header gives no voxel size; add ElementSpacing")
    if not all(side > 0 for side in spacing):
        raise VolumeError(f"{path}: its header gives voxels of {spacing} mm; all must be positive, repair the header")
    turn, origin = np.eye(dimensions), np.zeros(dimensions)
    for name in AXES:
        if name in fields:
            turn = np.reshape(numbers(path, name, fields[name], dimensions**2), (dimensions, dimensions))
            break
    for name in ORIGIN:
        if name in fields:
            origin = np.array(numbers(path, name, fields[name], dimensions))
            break
    unit = fields.get("DistanceUnits", "mm")
    factor = 1.0 if unit in ("?", "") else MILLIMETRES.get(unit)
    if factor is None:
        raise VolumeError(f"{path}: DistanceUnits is '{unit[:20]}'; choose one of {', '.join(MILLIMETRES)}")
    axes = turn[:3, :3] * np.array(spacing[:3])[:, None]
    return affine_of(path, axes * factor, origin[:3] * factor)


def _yes(text: str) -> bool:
    return text[:1] in ("T", "t", "1")
