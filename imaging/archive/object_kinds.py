"""What kind of labels a DICOM file holds, from its first bytes; needs no optional package."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Literal

from .headers import MAGIC, PREAMBLE, is_dicom, read_header

ObjectKind = Literal["seg", "rtstruct"]
BINARY_OR_FRACTIONAL_UID = "1.2.840.10008.5.1.4.1.1.66.4"
LABEL_MAP_UID = "1.2.840.10008.5.1.4.1.1.66.7"  # since DICOM 2024d; pydicom 3.0 has no name for it
STRUCTURE_SET_UID = "1.2.840.10008.5.1.4.1.1.481.3"
LABEL_KINDS: dict[str, ObjectKind] = {
    BINARY_OR_FRACTIONAL_UID: "seg",
    LABEL_MAP_UID: "seg",
    STRUCTURE_SET_UID: "rtstruct",
}
CLASS_TAG = (0x0002, 0x0002)
META_BYTES = 4096  # the class is the third element of the file meta information, after some twenty bytes
LONG_FORMS = (b"OB", b"UN")  # of the elements of this group, those whose length has four bytes


def kind_of_object(path: Path) -> ObjectKind | None:
    """Whether a file is a DICOM segmentation ("seg"), a structure set ("rtstruct"), or neither (None).

    Reads the SOP class of the file meta information, or of the header where that is missing; never raises, for damaged
    files neither.
    """
    if not is_dicom(path):
        return None
    try:
        with path.open("rb") as file:
            start = file.read(PREAMBLE + len(MAGIC))
            if start[PREAMBLE:] != MAGIC:  # without file meta information
                header = read_header(path)
                return LABEL_KINDS.get(header.sop_class) if header is not None else None
            return LABEL_KINDS.get(_class_uid(file.read(META_BYTES)))
    except (OSError, struct.error):
        return None


def is_segmentation_object(path: Path) -> bool:
    """Whether a file is a DICOM segmentation; never raises."""
    return kind_of_object(path) == "seg"


def _class_uid(meta: bytes) -> str:
    """Media Storage SOP Class UID from the start of a file's meta information (explicit, little endian), or ""."""
    place = 0
    while place < len(meta):
        group, element, form, length = struct.unpack_from("<HH2sH", meta, place)
        place += 8
        if form in LONG_FORMS:
            (length,) = struct.unpack_from("<I", meta, place)
            place += 4
        if (group, element) == CLASS_TAG:
            return meta[place : place + length].decode("ascii", errors="replace").rstrip("\0 ")
        place += length
    return ""
