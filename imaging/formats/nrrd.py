"""The header of NRRD files (`.nrrd`, or `.nhdr` with its voxels in a file of their own)."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ...errors import VolumeError
from .content import LEAST, what_instead
from .raw_volume import MILLIMETRES, RawVolume, affine_of, beside, numbers, read_start, whole_numbers

MAGIC = b"NRRD000"
NAMES_OF_TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
TYPES = {name: code for code, names in NAMES_OF_TYPES.items() for name in names.split(", ")}
ENCODINGS = {"raw": "raw", "gz": "gzip", "gzip": "gzip", "bz2": "bzip2", "bzip2": "bzip2"}
SAME_FIELD = {"datafile": "data file", "lineskip": "line skip", "byteskip": "byte skip"}
RAS = ("right-anterior-superior", "ras")
LPS = ("left-posterior-superior", "lps", "scanner-xyz", "")
LAS = ("left-anterior-superior", "las")
VECTOR = re.compile(r"\(([^()]*)\)|none")
COLOURS = re.compile(r"rgb|hsv|xyz|color|vector|normal|gradient|matrix|complex|quaternion")
SEGMENTS = "Segment0_ID"  # a key that segmentations of 3D Slicer have


def nrrd(path: Path) -> RawVolume:
    """What the header of an NRRD file says.

    Raises: VolumeError if it is none, or of an image that is not one real number per voxel in three dimensions.
    """
    fields, keys, end = _fields(path, read_start(path))
    for name in ("type", "dimension", "sizes", "encoding"):
        if name not in fields:
            raise VolumeError(f"{path}: its header lacks '{name}'; write the file again")
    (dimension,) = whole_numbers(path, "dimension", fields["dimension"], 1)
    stored = whole_numbers(path, "sizes", fields["sizes"], dimension)
    frame_axis = _frame_axis(path, fields, stored, segments=SEGMENTS in keys)
    if fields["type"] not in TYPES:
        raise VolumeError(f"{path}: type is '{fields['type'][:40]}'; write the voxels as float or whole numbers")
    if fields["encoding"].lower() not in ENCODINGS:
        raise VolumeError(
            f"{path}: encoding is '{fields['encoding'][:20]}'; write the file with raw, gzip or bzip2 voxels"
        )
    dtype = np.dtype(TYPES[fields["type"]])
    if dtype.itemsize > 1:
        if fields.get("endian") not in ("little", "big"):
            raise VolumeError(f"{path}: endian is '{fields.get('endian')}'; it must be little or big")
        dtype = dtype.newbyteorder("<" if fields["endian"] == "little" else ">")
    (lines,) = whole_numbers(path, "line skip", fields.get("line skip", "0"), 1)
    (skip,) = whole_numbers(path, "byte skip", fields.get("byte skip", "0"), 1)
    encoding = ENCODINGS[fields["encoding"].lower()]
    if lines or skip < -1 or (skip and encoding != "raw"):
        raise VolumeError(f"{path}: skips lines or bytes before its voxels; write it again without")
    attached = "data file" not in fields
    return RawVolume(
        path=path,
        stored=tuple(stored),
        frame_axis=frame_axis,
        dtype=dtype,
        affine=_affine(path, fields, dimension),
        data=path if attached else beside(path, fields["data file"]),
        start=skip if skip < 0 else skip + (end if attached else 0),
        encoding=encoding,
    )


def _fields(path: Path, start: bytes) -> tuple[dict[str, str], set[str], int]:
    """The header's fields by name, the names of its keys, and the number of its bytes, the empty line included."""
    if not start.startswith(MAGIC):
        found = f"it {instead}" if (instead := what_instead(start[:LEAST])) else "write it as NIfTI, NRRD or MetaImage"
        raise VolumeError(f"{path}: is no NRRD file; {found}")
    fields: dict[str, str] = {}
    keys: set[str] = set()
    place = start.find(b"\n") + 1
    while 0 < place < len(start):
        end = start.find(b"\n", place)
        line = start[place : end if end >= 0 else len(start)].decode("utf-8", "replace").strip()
        place = end + 1
        if not line:
            return fields, keys, place
        if line.startswith("#"):
            continue
        name, sign, value = line.partition(":")
        if not sign:
            raise VolumeError(f"{path}: its header has the line '{line[:40]}'; it is damaged, copy the file again")
        if value.startswith("="):
            keys.add(name)
        else:
            name = name.strip().lower()
            fields[SAME_FIELD.get(name, name)] = value.strip()
    if "data file" not in fields:
        raise VolumeError(f"{path}: its header does not end; copy the file again")
    return fields, keys, place


def _directions(path: Path, fields: dict[str, str], dimension: int) -> list[list[float] | None]:
    """For every stored axis its step in space, or None if it is no axis of space. Raises: VolumeError."""
    found = [match.group(1) for match in VECTOR.finditer(fields["space directions"])]
    if len(found) != dimension:
        raise VolumeError(f"{path}: space directions must be {dimension} vectors; repair the header")
    vectors = [None if text is None else numbers(path, "space directions", text.replace(",", " ")) for text in found]
    return [None if vector is None or np.isnan(vector).all() else vector for vector in vectors]


def _frame_axis(path: Path, fields: dict[str, str], stored: list[int], *, segments: bool) -> int | None:
    """The stored axis along which volumes follow each other, if there are four axes.

    Raises: VolumeError if the axes are no three of space and at most one of time.
    """
    dimension = len(stored)
    if dimension == 3 and not ("space directions" in fields and None in _directions(path, fields, 3)):
        return None
    if dimension not in (3, 4):
        raise VolumeError(f"{path}: is {dimension}-D {tuple(stored)}, expected a 3-D volume")
    kinds = fields.get("kinds", "").lower().split()
    others = [3]
    if "space directions" in fields:
        others = [axis for axis, step in enumerate(_directions(path, fields, dimension)) if step is None]
    elif len(kinds) == 4 and any(kind not in ("domain", "space") for kind in kinds):
        others = [axis for axis, kind in enumerate(kinds) if kind not in ("domain", "space")]
    if dimension - len(others) != 3:
        raise VolumeError(f"{path}: has {dimension - len(others)} axes of space, expected 3; write it as a 3-D volume")
    (axis,) = others
    if len(kinds) == 4 and COLOURS.search(kinds[axis]) and stored[axis] > 1:
        raise VolumeError(f"{path}: holds {stored[axis]} numbers for each voxel, expected one; write a grey image")
    if segments and stored[axis] > 1:
        raise VolumeError(
            f"{path}: is a segmentation with {stored[axis]} layers of overlapping segments; export it as one label map"
        )
    return axis


def _affine(path: Path, fields: dict[str, str], dimension: int) -> np.ndarray:
    """(4, 4), voxel index to millimetres. Raises: VolumeError if the header gives no voxel size or an unknown space."""
    space = fields.get("space", "").lower()
    space = space.removesuffix("-time").removesuffix("t") if space not in LPS else space
    origin = np.zeros(3)
    if "space origin" in fields:
        text = fields["space origin"].strip("() ").replace(",", " ")
        origin = np.array(numbers(path, "space origin", text, 3))
    if "space directions" in fields:
        steps = [step for step in _directions(path, fields, dimension) if step is not None]
        if len(steps) != 3 or any(len(step) != 3 for step in steps):
            raise VolumeError(f"{path}: space directions must be three vectors of three numbers; repair the header")
        axes = np.array(steps)
    else:
        if "spacings" not in fields:
            raise VolumeError(f"{path}: its header gives no voxel size; add 'space directions' or 'spacings'")
        given = numbers(path, "spacings", fields["spacings"], dimension)
        sides = [side for side in given if not np.isnan(side)]
        if len(sides) < 3 or not all(side > 0 for side in sides):
            raise VolumeError(f"{path}: its header gives voxels of {given} mm; all must be positive")
        axes = np.diag(sides[:3])
    factors = np.array(_units(path, fields.get("space units", "")))
    if space not in (*RAS, *LPS, *LAS):
        raise VolumeError(f"{path}: space is '{space[:40]}'; write it as left-posterior-superior")
    if space in LAS:  # only the front differs from LPS
        axes, origin = axes * [1, -1, 1], origin * [1, -1, 1]
    return affine_of(path, axes * factors, origin * factors, ras=space in RAS)


def _units(path: Path, text: str) -> list[float]:
    """Millimetres of one unit along each axis of space."""
    names = re.findall(r'"([^"]*)"', text)[:3]
    known = {**MILLIMETRES, "": 1.0, "???": 1.0, "millimeter": 1.0, "millimetre": 1.0}
    if odd := [name for name in names if name not in known]:
        raise VolumeError(f"{path}: space units are '{odd[0][:20]}'; choose one of {', '.join(MILLIMETRES)}")
    return [known[name] for name in names] if len(names) == 3 else [1.0, 1.0, 1.0]
