"""Headers of DICOM files, read without any package: what a file is, and where its slices lie.

Written after DICOM PS3.5 and PS3.10. Headers are read once, up to the pixels, so a series of hundreds of files is
looked through in a moment; the pixels themselves are decoded by ITK, see `series`.
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from ..formats.unpacking import IMAGE_BYTES, MAX_RATIO, unpacks_beyond

MAGIC, PREAMBLE = b"DICM", 128
DIRECTORY = "DICOMDIR"
MEMORY_FAULTS = ("claims ", "is deflated ", "has packed pixels ")  # how those begin for which memory would be taken
ENDINGS = (".dcm", ".dicom", ".ima", ".dic")
BUFFERS = (1 << 14, 1 << 18, 1 << 22, 1 << 26)  # bytes of a file that are tried until its header is whole
DEFLATED = "1.2.840.10008.1.2.1.99"
LONG_FORMS = frozenset((b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"))
FORM = re.compile(rb"[A-Z]{2}")
JPEG_2000 = b"\xff\x4f\xff\x51"  # how its code begins
FRAME_MARKS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC} | {0xF7}  # of JPEG and JPEG-LS, before the size
CODE_BYTES = 1 << 16  # of a fragment, in which its size must stand
MAX_BESIDE, USUAL_RATIO = 16 << 20, 6  # bytes beside the pixels of a deflated file, and how well text packs
FORMS = LONG_FORMS | frozenset(b"AE AS AT CS DA DS DT FD FL IS LO LT PN SH SL SS ST TM UI UL US".split())
UNDEFINED = 0xFFFFFFFF
MAX_DEPTH = 16  # of sequences in sequences; a header that has more is damaged or hostile
MAX_FRAMES = 1 << 16
FIRST_LENGTH = 256  # bytes of the first element of a file without preamble, at most
ITEM, ITEM_END, SEQUENCE_END = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD
PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
SHARED_GROUPS, FRAME_GROUPS = 0x52009229, 0x52009230
# Elements that are read, and how they are stored: as text, or as numbers of a form of `struct`.
ELEMENTS = {
    0x00020002: ("MediaClass", ""),
    0x00020010: ("TransferSyntax", ""),
    0x00080008: ("ImageType", ""),
    0x00080016: ("SOPClassUID", ""),
    0x00080018: ("SOPInstanceUID", ""),
    0x00080022: ("AcquisitionDate", ""),
    0x00080032: ("AcquisitionTime", ""),
    0x00080060: ("Modality", ""),
    0x0008103E: ("SeriesDescription", ""),
    0x00100010: ("PatientName", ""),
    0x00100020: ("PatientID", ""),
    0x00180024: ("SequenceName", ""),
    0x00180050: ("SliceThickness", ""),
    0x00180080: ("RepetitionTime", ""),
    0x00180081: ("EchoTime", ""),
    0x00180082: ("InversionTime", ""),
    0x00180086: ("EchoNumbers", ""),
    0x00180088: ("SpacingBetweenSlices", ""),
    0x00181060: ("TriggerTime", ""),
    0x00181164: ("ImagerPixelSpacing", ""),
    0x00181210: ("ConvolutionKernel", ""),
    0x00181314: ("FlipAngle", ""),
    0x00189087: ("DiffusionBValue", "d"),
    0x0019100C: ("SiemensBValue", ""),
    0x0020000D: ("StudyInstanceUID", ""),
    0x0020000E: ("SeriesInstanceUID", ""),
    0x00200011: ("SeriesNumber", ""),
    0x00200012: ("AcquisitionNumber", ""),
    0x00200013: ("InstanceNumber", ""),
    0x00200032: ("ImagePositionPatient", ""),
    0x00200037: ("ImageOrientationPatient", ""),
    0x00200100: ("TemporalPositionIdentifier", ""),
    0x00280002: ("SamplesPerPixel", "H"),
    0x00280004: ("PhotometricInterpretation", ""),
    0x00280008: ("NumberOfFrames", ""),
    0x00280010: ("Rows", "H"),
    0x00280011: ("Columns", "H"),
    0x00280030: ("PixelSpacing", ""),
    0x00280100: ("BitsAllocated", "H"),
    0x00281052: ("RescaleIntercept", ""),
    0x00281053: ("RescaleSlope", ""),
    0x00431039: ("GEBValue", ""),
}
# Sequences of the functional groups of a frame, and the elements in them that are read.
GROUPS = {
    0x00189114: {0x00189082: ("EchoTime", "d")},
    0x00189117: {0x00189087: ("DiffusionBValue", "d")},
    0x00189118: {0x00209153: ("TriggerTime", "d")},
    0x00209111: {0x00209056: ("StackID", ""), 0x00209128: ("TemporalPositionIndex", "I")},
    0x00209113: {0x00200032: ("ImagePositionPatient", "")},
    0x00209116: {0x00200037: ("ImageOrientationPatient", "")},
    0x00289110: {0x00280030: ("PixelSpacing", ""), 0x00180050: ("SliceThickness", "")},
    0x00289145: {0x00281052: ("RescaleIntercept", ""), 0x00281053: ("RescaleSlope", "")},
}


@dataclass(frozen=True, kw_only=True)
class Header:
    """The header of a DICOM file.

    Attributes:
        path: of the file.
        values: elements that the file has, as text, by keyword of DICOM.
        frames: of a file with functional groups, the values of each frame that differ from, or add to, `values`.
        pixels: place of the pixels in the file and their number of bytes, -1 where they are compressed; None if the
            file has none.
        fault: what is wrong with the file, as a part of a sentence; empty for a sound file.
    """

    path: Path
    values: dict[str, str]
    frames: tuple[dict[str, str], ...] = ()
    pixels: tuple[int, int] | None = None
    fault: str = ""

    @property
    def sop_class(self) -> str:
        """What kind of object the file is (SOP Class UID); empty if it does not say."""
        return self.values.get("SOPClassUID") or self.values.get("MediaClass", "")

    def number(self, keyword: str, missing: int = 0) -> int:
        """A whole number; `missing` if the file does not have it."""
        try:
            return int(self.values.get(keyword, ""))
        except ValueError:
            return missing


def is_dicom(path: Path) -> bool:
    """Whether a path is a visible file that is DICOM by its content: with the magic bytes of part 10, or without them.

    Files without preamble, as old archives and raw exports write them, are recognised by their first element.
    """
    if path.name.startswith(".") or path.name.upper() == DIRECTORY or not os.path.isfile(path):
        return False
    try:
        with path.open("rb") as file:
            start = file.read(PREAMBLE + len(MAGIC))
    except OSError:
        return False
    return start[PREAMBLE:] == MAGIC or _begins_with_element(start)


def looks_like_dicom(path: Path) -> bool:
    """Whether a visible file is DICOM by its content, or says so by its ending and may be a damaged one."""
    named = path.suffix.lower() in ENDINGS and not path.name.startswith(".") and not os.path.isdir(path)
    return named or is_dicom(path)


def read_header(path: Path) -> Header | None:
    """The header of a file; None if it is no DICOM file. What is wrong with it is in `Header.fault`.

    Raises: OSError if the file cannot be read.
    """
    with path.open("rb") as file:
        return _read_header(path, file)


def same_pixels(first: Header, second: Header) -> bool:
    """Whether two files hold the same stored pixels, scaled alike."""
    if first.pixels is None or second.pixels is None or first.pixels[1] != second.pixels[1]:
        return False
    alike = ("TransferSyntax", "Rows", "Columns", "BitsAllocated", "RescaleSlope", "RescaleIntercept")
    if any(first.values.get(name) != second.values.get(name) for name in alike):
        return False
    contents = []
    try:
        for place, length, path in ((*header.pixels, header.path) for header in (first, second) if header.pixels):
            with path.open("rb") as file:
                file.seek(place)
                contents.append(file.read(length))
    except OSError:
        return False
    return contents[0] == contents[1]


def _read_header(path: Path, file: BinaryIO) -> Header | None:
    size = os.fstat(file.fileno()).st_size
    data = b""
    for limit in BUFFERS:
        data += file.read(limit - len(data))
        if data[PREAMBLE : PREAMBLE + len(MAGIC)] != MAGIC and not _begins_with_element(data):
            return None
        parsed = _Parsed(data, whole=len(data) >= size)
        try:
            parsed.read()
        except _Short:
            if not parsed.whole:
                continue
            parsed.fault = "is cut off in its header"
        except (_Damaged, struct.error, zlib.error, RecursionError):
            parsed.fault = "has a damaged header"
        if not parsed.fault and (parsed.pixels is not None or parsed.deflated):
            parsed.fault = _pixel_fault(parsed, file, size)
        return Header(path=path, values=parsed.values, frames=parsed.frames(), pixels=parsed.pixels, fault=parsed.fault)
    return Header(path=path, values={}, fault="has a header that does not end")


def _pixel_fault(parsed: _Parsed, file: BinaryIO, size: int) -> str:
    """What is wrong with the length of the pixels, or of what a deflated file unpacks to."""
    place, length = parsed.pixels or (0, 0)
    values = parsed.values
    try:
        sides = [int(values.get(name, "0")) for name in ("Rows", "Columns", "BitsAllocated")]
        frames = int(values.get("NumberOfFrames") or 1)
    except ValueError:
        return "has a damaged header"
    expected = sides[0] * sides[1] * frames * sides[2] // 8
    if (parsed.deflated or length < 0) and expected > max(IMAGE_BYTES // 2, MAX_RATIO * size):  # 16 bits become 32
        return f"claims {expected >> 20} MiB of pixels, more than {MAX_RATIO} times its size"
    if parsed.deflated:
        return _deflated_fault(file, parsed.deflated_at, expected + MAX_BESIDE + USUAL_RATIO * size)
    if length < 0:
        return _fragments_fault(file, place, (sides[0], sides[1]))
    if place + length > size:
        return "is cut off in its pixels"
    if _claims_memory(parsed, file, place + length):
        return "claims more content after its pixels than it has"
    if values.get("SamplesPerPixel", "1") != "1" or not expected:
        return ""
    if expected > length:
        return f"has {length} bytes of pixels, fewer than the {expected} of its header"
    # A few bytes more are padding. Twice as many are frames, or wider numbers, of which the header does not know.
    if length >= 2 * expected and length % expected < 2:
        return f"has {length} bytes of pixels, {length // expected} times the {expected} of its header"
    return ""


def _claims_memory(parsed: _Parsed, file: BinaryIO, at: int) -> bool:
    """Whether an element after the pixels claims much more than the file has: GDCM takes the memory first."""
    file.seek(at)
    rest = _Parsed(file.read(BUFFERS[-1]), whole=True, order=parsed.order, forms=parsed.forms)
    place = 0
    try:
        while place + 8 <= len(rest.data):
            _, _, start, length = rest._element(place)
            if length == UNDEFINED:
                return False
            if start + length > len(rest.data) + MAX_BESIDE:
                return True
            place = start + length
    except (_Short, _Damaged):
        return False
    return False


def _deflated_fault(file: BinaryIO, at: int, limit: int) -> str:
    """What is wrong with a file whose deflated part, from `at` on, should unpack to no more bytes than a limit."""
    file.seek(at)
    try:
        beyond = unpacks_beyond(file, limit)
    except zlib.error:
        return "has damaged packed content"
    return f"is deflated and unpacks to more than {limit >> 20} MiB, beyond what its header claims" if beyond else ""


def _fragments_fault(file: BinaryIO, place: int, size: tuple[int, int]) -> str:
    """What is wrong with the fragments of compressed pixels: their end, or images of another size than the header's.

    Args:
        file, place: where the fragments begin.
        size: rows and columns by the header.
    """
    whole = os.fstat(file.fileno()).st_size
    while True:
        file.seek(place)
        start = file.read(8)
        if len(start) < 8:
            return "is cut off in its pixels"
        group, element, length = struct.unpack("<HHI", start)
        if (group << 16 | element) == SEQUENCE_END:
            return ""
        if (group << 16 | element) != ITEM or length > whole:
            return "is cut off in its pixels"
        found = coded_size(file.read(min(length, CODE_BYTES)))
        if found is not None and found != size:
            return f"has packed pixels of {found[0]} x {found[1]}, its header says {size[0]} x {size[1]}"
        place += 8 + length


def coded_size(code: bytes) -> tuple[int, int] | None:
    """Rows and columns that packed pixels name themselves (JPEG, JPEG-LS, JPEG 2000); None if they name none.

    Args:
        code: the first bytes of a fragment.
    """
    at = code.find(JPEG_2000) if code[:4] == JPEG_2000 or code[4:8] == b"jP  " else -1
    if at >= 0 and len(code) >= at + 24:
        right, lower, left, upper = struct.unpack_from(">IIII", code, at + 8)
        return lower - upper, right - left
    at = 2 if code[:2] == b"\xff\xd8" else len(code)
    while at + 9 <= len(code) and code[at] == 0xFF:
        if code[at + 1] == 0xFF:  # filling
            at += 1
            continue
        if code[at + 1] in FRAME_MARKS:
            rows, columns = struct.unpack_from(">HH", code, at + 5)
            return rows, columns
        at += 2 + struct.unpack_from(">H", code, at + 2)[0]
    return None


def _begins_with_element(start: bytes) -> bool:
    """Whether a file begins, without preamble, with an element of the groups 2 or 8 that another one follows."""
    if len(start) < 16:
        return False
    order = ">" if start[0] == 0 else "<"
    group, element = struct.unpack_from(f"{order}HH", start)
    if group not in (0x0002, 0x0008) or element > 0x0070:
        return False
    if FORM.fullmatch(start[4:6]):
        length = struct.unpack_from(f"{order}H", start, 6)[0]
    else:
        length = struct.unpack_from(f"{order}I", start, 4)[0]
    following = 8 + length
    if length > FIRST_LENGTH or length % 2:
        return False
    if following + 4 > len(start):
        return following >= PREAMBLE  # a long first element, which only text before the preamble's end can rule out
    next_group, next_element = struct.unpack_from(f"{order}HH", start, following)
    return next_group in (0x0002, 0x0008) and (next_group, next_element) > (group, element)


class _Short(Exception):
    """The buffer ends within the header."""


class _Damaged(Exception):
    """The header is none that could be."""


@dataclass
class _Parsed:
    """What the start of a file holds; `forms` tells whether its elements name their form (value representation)."""

    data: bytes
    whole: bool
    values: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    own: list[dict[str, str]] = field(default_factory=list)
    pixels: tuple[int, int] | None = None
    fault: str = ""
    deflated: bool = False
    deflated_at: int = 0
    order: str = "<"
    forms: bool = True

    def frames(self) -> tuple[dict[str, str], ...]:
        """Values of each frame."""
        return tuple({**self.shared, **own} for own in self.own)

    def read(self) -> None:
        """Read all elements up to the pixels. Raises: _Short or _Damaged; what was read so far is kept."""
        at = PREAMBLE + len(MAGIC) if self.data[PREAMBLE : PREAMBLE + len(MAGIC)] == MAGIC else 0
        while at + 8 <= len(self.data) and self.data[at : at + 2] == b"\2\0":  # explicit and little endian, always
            tag, explicit, start, length = self._element(at)
            if self.data[at + 4 : at + 6] not in FORMS:
                raise _Damaged
            self._keep(self.values, ELEMENTS, tag, start, start + length)
            at = start + length
        if at > len(self.data):
            raise _Short
        if self.values.get("TransferSyntax") == DEFLATED:
            self._inflate(at)
            at = 0
        if self.data[at : at + 2] == b"\0\x08":
            self.order = ">"
        # In a file without forms the length of an element may look like one.
        self.forms = FORM.fullmatch(self.data[at + 4 : at + 6]) is not None
        end = len(self.data)
        while at < end or not self.whole:
            tag, explicit, start, length = self._element(at)
            if self.forms and self.data[at + 4 : at + 6] not in FORMS and tag >> 16 != 0xFFFE:
                raise _Damaged
            if tag in PIXELS:
                self.pixels = start, -1 if length == UNDEFINED else length
                return
            at = self._end_of_value(start, length, explicit, depth=0)
            if tag in (SHARED_GROUPS, FRAME_GROUPS):
                groups = [self._groups(*item) for item in self._items(start, at, explicit)]
                if tag == SHARED_GROUPS:
                    self.shared = groups[0] if groups else {}
                else:
                    self.own = groups
            else:
                self._keep(self.values, ELEMENTS, tag, start, at)

    def _inflate(self, at: int) -> None:
        unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        try:
            self.data = unpacker.decompress(self.data[at:], BUFFERS[-1])
        except zlib.error:
            raise _Damaged from None
        self.whole, self.deflated = self.whole and (unpacker.eof or not unpacker.unconsumed_tail), True
        self.deflated_at = at

    def _element(self, at: int) -> tuple[int, bool, int, int]:
        """Tag of the element at a place, whether it names its form, where its value begins, and its length."""
        if at + 8 > len(self.data):
            raise _Short
        group, element = struct.unpack_from(f"{self.order}HH", self.data, at)
        form = self.data[at + 4 : at + 6]
        if self.forms and group != 0xFFFE and FORM.fullmatch(form) and form not in FORMS:
            raise _Damaged  # GDCM takes what follows for a length, and memory for it
        if group == 0xFFFE or not self.forms or not FORM.fullmatch(form):
            return group << 16 | element, False, at + 8, struct.unpack_from(f"{self.order}I", self.data, at + 4)[0]
        if form not in LONG_FORMS:
            return group << 16 | element, True, at + 8, struct.unpack_from(f"{self.order}H", self.data, at + 6)[0]
        if at + 12 > len(self.data):
            raise _Short
        length = struct.unpack_from(f"{self.order}I", self.data, at + 8)[0]
        return group << 16 | element, form != b"UN", at + 12, length

    def _end_of_value(self, start: int, length: int, explicit: bool, *, depth: int) -> int:
        """Where a value ends. One without a length is a sequence, which ends with a mark of its own."""
        if depth > MAX_DEPTH:
            raise _Damaged
        if length != UNDEFINED:
            if start + length > len(self.data):
                raise _Short
            return start + length
        at = start
        while True:
            tag, _, at, length = self._element(at)
            if tag == SEQUENCE_END:
                return at
            if tag != ITEM:
                raise _Damaged
            at = self._end_of_item(at, length, explicit, depth=depth + 1)

    def _end_of_item(self, start: int, length: int, explicit: bool, *, depth: int) -> int:
        if length != UNDEFINED:
            return self._end_of_value(start, length, explicit, depth=depth)
        at = start
        while True:
            tag, named, at, length = self._element(at)
            if tag == ITEM_END:
                return at
            at = self._end_of_value(at, length, named or explicit, depth=depth + 1)

    def _items(self, start: int, end: int, explicit: bool) -> Iterator[tuple[int, int]]:
        """Where the items of a sequence begin and end."""
        at, count = start, 0
        while at < end:
            tag, _, begin, length = self._element(at)
            if tag != ITEM:
                return
            at = self._end_of_item(begin, length, explicit, depth=0)
            count += 1
            if count > MAX_FRAMES:
                raise _Damaged
            yield begin, at

    def _groups(self, start: int, end: int) -> dict[str, str]:
        """The values of the functional groups of a frame, or of all frames."""
        found: dict[str, str] = {}
        for tag, explicit, begin, stop in self._inside(start, end):
            if tag in GROUPS:
                for item in self._items(begin, stop, explicit):
                    for inner, _, value, after in self._inside(*item):
                        self._keep(found, GROUPS[tag], inner, value, after)
                    break
        return found

    def _inside(self, start: int, end: int) -> Iterator[tuple[int, bool, int, int]]:
        """The elements of an item: tag, whether its form is named, and where its value begins and ends."""
        at = start
        while at < end:
            tag, explicit, begin, length = self._element(at)
            if tag == ITEM_END:
                return
            at = self._end_of_value(begin, length, explicit, depth=0)
            yield tag, explicit, begin, at

    def _keep(self, found: dict[str, str], wanted: dict[int, tuple[str, str]], tag: int, start: int, end: int) -> None:
        """Keep the value of an element that is wanted."""
        if tag not in wanted:
            return
        if end > len(self.data):
            raise _Short
        (keyword, form), value = wanted[tag], self.data[start:end]
        if form and len(value) >= struct.calcsize(form):
            found[keyword] = f"{struct.unpack_from(self.order + form, value)[0]:g}"
        elif not form:
            text = value.decode("utf-8", "replace") if _is_utf8(value) else value.decode("latin-1")
            found[keyword] = text.strip("\0 ")


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
