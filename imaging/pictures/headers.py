"""What a PNG, JPEG, BMP or GIF file says of itself, checked against its structure without decoding it."""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

PNG, JPEG, TIFF, BMP, GIF = "PNG", "JPEG", "TIFF", "BMP", "GIF"
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": PNG, b"\xff\xd8\xff": JPEG, b"II*\0": TIFF, b"MM\0*": TIFF, b"II+\0": TIFF, b"MM\0+": TIFF,
    b"BM": BMP, b"GIF87a": GIF, b"GIF89a": GIF,
}  # fmt: skip
ORIENTATION = 274  # number of the EXIF and TIFF tag
MAX_PARTS = 1_000_000  # chunks of a PNG file and blocks of a GIF file
MAX_SEGMENTS = 2000  # of a JPEG file; each scan makes the decoder pass over the whole picture
NEXT_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # inside a scan, FF00 is data and FFD0 to FFD7 are restarts

TRUNCATED = "is truncated; copy it again"
DAMAGED = "is damaged; copy it again"


class PictureDefect(Exception):
    """Why a file cannot be used and what to do, to be put after the file's name."""


@dataclass(frozen=True)
class Header:
    """What a file says of its picture.

    Attributes:
        kind: PNG, JPEG, TIFF, BMP or GIF.
        rows: number of rows as stored, before it is turned.
        columns: number of columns as stored.
        channels: 1 (grey) or 3 (colour), opacity not counted.
        bits: per channel, or per index of a palette.
        turn: EXIF orientation, 1 to 8.
        palette: whether the pixels are indices of a palette.
        cmyk: whether the colours are those of a printer; an ICC profile is there then.
        white_is_zero: whether grey values fall with brightness.
        transparent_grey: stored grey value that stands for a transparent pixel.
        turn_at: where a TIFF file stores `turn` (position in bytes, format of `struct`).
        end: where a JPEG file has its end mark (position in bytes).
    """

    kind: str
    rows: int
    columns: int
    channels: int
    bits: int
    turn: int = 1
    palette: bool = False
    cmyk: bool = False
    white_is_zero: bool = False
    transparent_grey: int | None = None
    turn_at: tuple[int, str] | None = None
    end: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise PictureDefect(f"has {self.rows} x {self.columns} pixels; give a picture that is not empty")


def kind_of(content: bytes) -> str | None:
    """The kind of file that content begins; None if it is none of those known here."""
    return next((kind for signature, kind in SIGNATURES.items() if content.startswith(signature)), None)


def png_header(content: bytes) -> Header:
    """Of a PNG file whose chunks are whole to the last; raises: PictureDefect."""
    chunks: dict[bytes, bytes] = {}
    position = 8
    for _ in range(MAX_PARTS):
        length, name = _unpack(">I4s", content, position)
        end = position + 8 + length
        (checksum,) = _unpack(">I", content, end)
        if zlib.crc32(memoryview(content)[position + 4 : end]) != checksum:
            raise PictureDefect(DAMAGED)
        if name != b"IDAT":
            chunks.setdefault(name, content[position + 8 : end])
        else:
            chunks[name] = b""  # pixels are read by the decoder
        position = end + 4
        if name == b"IEND":
            break
    if next(iter(chunks)) != b"IHDR" or not {b"IDAT", b"IEND"} <= chunks.keys() or len(chunks[b"IHDR"]) != 13:
        raise PictureDefect(DAMAGED)
    columns, rows, bits, colour, *_ = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    depths = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
    if bits not in depths.get(colour, ()) or (colour == 3 and not chunks.get(b"PLTE")):
        raise PictureDefect(DAMAGED)
    if b"acTL" in chunks and int.from_bytes(chunks[b"acTL"][:4], "big") > 1:
        raise PictureDefect("is an animation; give one file for each picture")
    palette = chunks[b"PLTE"] if colour == 3 else b""
    grey = _is_grey(palette, 3) if palette else colour in (0, 4)
    transparent = int.from_bytes(chunks[b"tRNS"][:2], "big") if colour == 0 and b"tRNS" in chunks else None
    turn = exif_orientation(chunks.get(b"eXIf", b""))
    return Header(PNG, rows, columns, 1 if grey else 3, bits, turn, palette=bool(palette), transparent_grey=transparent)


def jpeg_header(content: bytes) -> Header:
    """Of a JPEG file whose segments and scans are whole to the end mark; raises: PictureDefect.

    What follows the end mark is not read: phones put a second picture there.
    """
    frame, turn, profile = b"", 1, False
    unscanned: set[int] = set()
    position = 2
    for _ in range(MAX_SEGMENTS):
        position = content.find(b"\xff", position)
        if position < 0:
            raise PictureDefect(TRUNCATED)
        while _byte(content, position) == 0xFF:
            position += 1
        marker = content[position]
        if marker == 0xD9:
            break
        length = 0 if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD7 else _unpack(">H", content, position + 1)[0]
        segment = content[position + 3 : position + 1 + length]
        if length and len(segment) != length - 2:
            raise PictureDefect(TRUNCATED)
        position += 1 + length
        if marker == 0xDA:
            unscanned -= (
                {segment[1 + 2 * k] for k in range(segment[0]) if 1 + 2 * k < len(segment)} if segment else set()
            )
            following = NEXT_MARKER.search(content, position)
            if following is None:
                raise PictureDefect(TRUNCATED)
            position = following.start()
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if frame or marker not in (0xC0, 0xC1, 0xC2, 0xC9, 0xCA) or len(segment) < 6 + 3 * sum(segment[5:6]):
                raise PictureDefect("is a damaged or an unusual JPEG; save it as PNG")
            frame = segment
            unscanned = {frame[6 + 3 * k] for k in range(frame[5])}
        elif marker == 0xE1 and segment.startswith(b"Exif\0\0"):
            turn = exif_orientation(segment[6:])
        elif marker == 0xE2 and segment.startswith(b"ICC_PROFILE\0"):
            profile = True
    else:
        raise PictureDefect(f"has more than {MAX_SEGMENTS} segments; save it as PNG")
    if not frame or unscanned:
        raise PictureDefect(TRUNCATED)
    bits, rows, columns, components = struct.unpack(">BHHB", frame[:6])
    if bits != 8 or components not in (1, 3, 4):
        raise PictureDefect(f"is a JPEG of {components} components of {bits} bits; save it as PNG")
    if components == 4:
        refuse_without_profile(profile)
    return Header(JPEG, rows, columns, 1 if components == 1 else 3, 8, turn, cmyk=components == 4, end=position - 1)


def bmp_header(content: bytes) -> Header:
    """Of a BMP file that holds as many bytes as its rows need; raises: PictureDefect."""
    start, size = _unpack("<II", content, 10)
    if size == 12:
        columns, rows, _, bits = _unpack("<HHHH", content, 18)
        compression, stored, colours = 0, 0, 0
    elif size in (40, 52, 56, 64, 108, 124):
        columns, rows, _, bits, compression, stored, _, _, colours = _unpack("<iiHHIIiiI", content, 18)
    else:
        raise PictureDefect(DAMAGED)
    if compression not in (0, 1, 2, 3, 6) or bits not in (1, 4, 8, 16, 24, 32):
        raise PictureDefect(f"is a BMP of {bits} bits with compression {compression}; save it as PNG")
    rows = abs(rows)
    needed = stored if compression in (1, 2) else (columns * bits + 31) // 32 * 4 * rows
    if start + max(needed, 1) > len(content):
        raise PictureDefect(TRUNCATED)
    if bits > 8:
        return Header(BMP, rows, columns, 3, 8)
    entry = 3 if size == 12 else 4
    palette = content[14 + size : 14 + size + entry * min(colours or 1 << bits, 1 << bits)]
    return Header(BMP, rows, columns, 1 if _is_grey(palette, entry) else 3, bits, palette=True)


def gif_header(content: bytes) -> Header:
    """Of a GIF file with one picture whose blocks are whole to the last; raises: PictureDefect."""
    columns, rows, flags = _unpack("<HHB", content, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    pictures = 0
    for _ in range(MAX_PARTS):
        block = _byte(content, position)
        if block == 0x3B:
            break
        if block == 0x2C:
            pictures += 1
            local = _byte(content, position + 9)
            position += 11 + (3 << (local & 7) + 1 if local & 0x80 else 0)
        elif block == 0x21:
            position += 2
        else:
            raise PictureDefect(DAMAGED)
        while length := _byte(content, position):
            position += 1 + length
        position += 1
    if pictures != 1:
        raise PictureDefect(f"holds {pictures} pictures; give one file for each picture")
    return Header(GIF, rows, columns, 3, 8, palette=True)


def refuse_without_profile(has_profile: bool) -> None:
    """Raises: PictureDefect for printer's colours that nothing defines."""
    if not has_profile:
        raise PictureDefect("has printer's colours (CMYK) without an ICC profile; save it as RGB")


def exif_orientation(content: bytes) -> int:
    """The orientation of an EXIF block, 1 to 8; 1 if it has none or cannot be read."""
    order = {b"II": "<", b"MM": ">"}.get(content[:2])
    try:
        if order:
            (start,) = struct.unpack_from(order + "I", content, 4)
            (count,) = struct.unpack_from(order + "H", content, start)
            for k in range(count):
                tag, _, _, value = struct.unpack_from(order + "HHIH", content, start + 2 + 12 * k)
                if tag == ORIENTATION:
                    return value if 1 <= value <= 8 else 1
    except struct.error:
        pass  # cameras write such blocks; the picture itself is whole
    return 1


def _is_grey(palette: bytes, entry: int) -> bool:
    """Whether the first three bytes of all entries are equal."""
    return palette[0::entry] == palette[1::entry] == palette[2::entry]


def _byte(content: bytes, position: int) -> int:
    if position >= len(content):
        raise PictureDefect(TRUNCATED)
    return content[position]


def _unpack(form: str, content: bytes, position: int) -> tuple:
    if position + struct.calcsize(form) > len(content):
        raise PictureDefect(TRUNCATED)
    return struct.unpack_from(form, content, position)
