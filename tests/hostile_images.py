"""Damaging NIfTI and DICOM files where their headers say something: structured mutations for the fuzzer."""

from __future__ import annotations

import gzip
import math
import random
import struct

from mutations import damaged_bytes

ODD_INTEGERS = (0, 1, -1, 2, 7, 255, 256, 32767, -32768)
ODD_FLOATS = (0.0, -0.0, -1.0, 1e-45, 1e38, -1e38, math.nan, math.inf, -math.inf, 0.5, 352.0, 1e6)
# NIfTI-1: name, offset, form of `struct`, number of values.
NIFTI_FIELDS = (
    ("sizeof_hdr", 0, "i", 1), ("dim", 40, "h", 8), ("intent_p", 56, "f", 3), ("intent_code", 68, "h", 1),
    ("datatype", 70, "h", 1), ("bitpix", 72, "h", 1), ("slice_start", 74, "h", 1), ("pixdim", 76, "f", 8),
    ("vox_offset", 108, "f", 1), ("scl", 112, "f", 2), ("slice_end", 120, "h", 1), ("slice_code", 122, "b", 1),
    ("xyzt_units", 123, "b", 1), ("cal", 124, "f", 2), ("qform_code", 252, "h", 1), ("sform_code", 254, "h", 1),
    ("quatern", 256, "f", 3), ("qoffset", 268, "f", 3), ("srow", 280, "f", 12),
)  # fmt: skip
DATATYPES = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, 2304, -2)
VRS = (
    b"AE",
    b"CS",
    b"DS",
    b"FD",
    b"IS",
    b"LO",
    b"OB",
    b"OW",
    b"PN",
    b"SQ",
    b"UI",
    b"UL",
    b"UN",
    b"US",
    b"UT",
    b"ZZ",
    b"\0\0",
)
LENGTHS = (0, 1, 2, 3, 8, 255, 256, 65534, 65535, 1 << 20, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF)
SYNTAXES = (
    b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99",
    b"1.2.840.10008.1.2.4.50", b"1.2.840.10008.1.2.4.57", b"1.2.840.10008.1.2.4.70", b"1.2.840.10008.1.2.4.80",
    b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.100", b"1.2.840.10008.1.2.5", b"1.2.3.4", b"",
)  # fmt: skip
ITEM, ITEM_END, SEQUENCE_END = (struct.pack("<HHI", 0xFFFE, tag, 0) for tag in (0xE000, 0xE00D, 0xE0DD))


def damaged_nifti(content: bytes, rng: random.Random) -> bytes:
    """An unpacked NIfTI-1 file with odd numbers in its header, an odd extension, or damaged bytes; packed or not."""
    changed = bytearray(content)
    kind = rng.randrange(8)
    if kind == 0:
        changed = bytearray(damaged_bytes(content, rng))
    elif kind == 1:  # an extension that lies about its size
        size = rng.choice([0, 8, 15, 16, 24, 1 << 20, -16, 0x7FFFFFF0])
        changed[348:352] = b"\1\0\0\0"
        changed[352:352] = struct.pack("<ii", size, rng.choice([0, 2, 4, 6, 44])) + bytes(rng.choice([0, 8, 200]))
        changed[108:112] = struct.pack("<f", rng.choice([352.0, 368.0, 1000.0, float(1 << 24)]))
    else:
        for _ in range(rng.randint(1, 2)):
            name, offset, form, count = rng.choice(NIFTI_FIELDS)
            for place in rng.sample(range(count), rng.randint(1, min(count, 2))):
                at = offset + place * struct.calcsize(form)
                odd = rng.choice(ODD_FLOATS if form == "f" else DATATYPES if name == "datatype" else ODD_INTEGERS)
                if form == "b":
                    odd = max(-128, min(127, int(odd)))
                changed[at : at + struct.calcsize(form)] = struct.pack("<" + form, odd)
    if kind == 7:  # the other byte order, in part
        changed[:4] = changed[:4][::-1]
    result = bytes(changed)
    if rng.random() < 0.5:
        result = gzip.compress(result, 1)
        if rng.random() < 0.3:
            result = damaged_bytes(result, rng)
    return result


def damaged_dicom(content: bytes, rng: random.Random) -> bytes:
    """A DICOM file with an explicit little endian header, with other lengths, forms, values, nesting or syntax."""
    kind = rng.randrange(8)
    if kind == 0:
        return damaged_bytes(content, rng)
    places = list(elements(content))
    changed = bytearray(content)
    if kind == 7:
        return with_syntax(content, rng.choice(SYNTAXES))
    for _ in range(rng.randint(1, 3)):
        at, _, value, length = rng.choice(places)
        if kind == 1:  # another length
            wide = value - at == 12
            odd = rng.choice(LENGTHS)
            changed[value - (4 if wide else 2) : value] = struct.pack(
                "<I" if wide else "<H", odd if wide else odd & 0xFFFF
            )
        elif kind == 2:  # another form
            changed[at + 4 : at + 6] = rng.choice(VRS)
        elif kind == 3:  # another value of the same length
            filling = rng.choice([b"\0", b"\xff", b" ", b"9", b"-", b"\\", b"e", b"\x1b", b"nan\\", b"1e999"])
            changed[value : value + length] = (filling * (length + 1))[:length]
        elif kind == 4:  # another tag
            changed[at : at + 4] = struct.pack(
                "<HH",
                rng.choice([0, 2, 8, 0x28, 0x5200, 0x7FE0, 0xFFFE]),
                rng.choice([0, 2, 0x10, 0xE000, 0xE0DD, 0x9229, 0x9230]),
            )
    if kind == 5:  # sequences in sequences, with and without lengths
        at = rng.choice(places)[0]
        depth = rng.choice([1, 3, 15, 17, 200, 5000])
        tag = rng.choice([(0x5200, 0x9229), (0x5200, 0x9230), (0x0008, 0x1140), (0x0009, 0x1001)])
        start = struct.pack("<HH2sHI", *tag, b"SQ", 0, 0xFFFFFFFF) + struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
        ends = (ITEM_END + SEQUENCE_END) * rng.choice([0, 1, depth])
        changed[at:at] = start * depth + ends
    elif kind == 6:  # pixels of another size, packed or not
        at, _, value, length = next(place for place in places if content[place[0] : place[0] + 4] == b"\xe0\x7f\x10\0")
        if rng.random() < 0.5:
            del changed[value + rng.randrange(length + 1) :]
        else:
            fragments = struct.pack("<HHI", 0xFFFE, 0xE000, 0) + struct.pack(
                "<HHI", 0xFFFE, 0xE000, rng.choice([0, 16, 1 << 30, 0xFFFFFFFF])
            )
            start = rng.choice([b"\xff\xd8\xff\xc0", b"\xff\x4f\xff\x51", bytes(4), b"\xff\xd8"])
            changed[at:] = (
                content[at : at + 4]
                + b"OB\0\0\xff\xff\xff\xff"
                + fragments
                + start
                + bytes(rng.randrange(256) for _ in range(200))
                + SEQUENCE_END * rng.randrange(2)
            )
            return with_syntax(bytes(changed), rng.choice(SYNTAXES))
    return bytes(changed)


def elements(content: bytes) -> list[tuple[int, bytes, int, int]]:
    """Of each element of a file with an explicit header: where it begins, its form, where its value begins, length."""
    at, found = 132, []
    while at + 8 <= len(content):
        form = content[at + 4 : at + 6]
        if form in (b"OB", b"OW", b"OF", b"SQ", b"UN", b"UT"):
            (length,), value = struct.unpack_from("<I", content, at + 8), at + 12
        else:
            (length,), value = struct.unpack_from("<H", content, at + 6), at + 8
        found.append((at, form, value, length))
        at = value + length
    return found


def with_syntax(content: bytes, syntax: bytes) -> bytes:
    """The file with another transfer syntax, which need not be true."""
    at, _, value, length = next(p for p in elements(content) if content[p[0] : p[0] + 4] == b"\2\0\x10\0")
    padded = syntax + b"\0" * (len(syntax) % 2)
    return content[: at + 6] + struct.pack("<H", len(padded)) + padded + content[value + length :]
