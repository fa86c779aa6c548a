"""What a TIFF file says of itself, checked against its structure without decoding it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from .headers import DAMAGED, ORIENTATION, TIFF, TRUNCATED, Header, PictureDefect, refuse_without_profile

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 256, 257, 258, 259, 262
STRIPS, SAMPLES, STRIP_BYTES, PLANAR, COLOURS = 273, 277, 279, 284, 320
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_BYTES = 322, 323, 324, 325
SUBFILE, FORMAT, PROFILE = 254, 339, 34675
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
KINDS = {1: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}  # unsigned integers and bytes, by the number of their type
NUMBERS = {2: "signed", 3: "floating-point", 5: "complex", 6: "complex"}
MAX_TILE = 4096 * 4096  # pixels of a tile, unless the picture is larger


@dataclass(frozen=True)
class _Value:
    """Where the value of a tag is: position, type and count."""

    position: int
    kind: int
    count: int


class _File:
    """The bytes of a TIFF file with its byte order and widths of numbers."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.order = "<" if content[:2] == b"II" else ">"
        self.big = 43 in content[2:4]

    def unpack(self, form: str, position: int) -> tuple:
        if position + struct.calcsize(self.order + form) > len(self.content):
            raise PictureDefect(TRUNCATED)
        return struct.unpack_from(self.order + form, self.content, position)

    def pages(self) -> list[dict[int, _Value]]:
        """Tags of all pages."""
        (following,) = self.unpack("Q", 8) if self.big else self.unpack("I", 4)
        pages: list[dict[int, _Value]] = []
        seen: set[int] = set()
        while following:
            if following in seen:
                raise PictureDefect(DAMAGED)
            seen.add(following)
            tags, following = self._page(following)
            pages.append(tags)
            if len(pages) > 1 and not self.first(tags, SUBFILE, 0) & 5:  # 1 is a preview, 4 a transparency mask
                raise PictureDefect("has several pages; give one file for each picture")
        if not pages:
            raise PictureDefect(DAMAGED)
        return pages

    def _page(self, start: int) -> tuple[dict[int, _Value], int]:
        count_form, entry_form, next_form, inline = ("Q", "HHQQ", "Q", 8) if self.big else ("H", "HHII", "I", 4)
        (count,) = self.unpack(count_form, start)
        position = start + struct.calcsize("<" + count_form)
        tags: dict[int, _Value] = {}
        for _ in range(count):
            tag, kind, number, value = self.unpack(entry_form, position)
            position += struct.calcsize("<" + entry_form)
            width = struct.calcsize("<" + KINDS[kind]) if kind in KINDS else 0
            at = position - inline if width * number <= inline else value
            if width and at + width * number > len(self.content):
                raise PictureDefect(TRUNCATED)
            tags.setdefault(tag, _Value(at, kind, number))
        return tags, self.unpack(next_form, position)[0]

    def values(self, tags: dict[int, _Value], tag: int) -> tuple[int, ...]:
        """All numbers of a tag; none if it is missing."""
        value = tags.get(tag)
        if value is None:
            return ()
        if value.kind not in KINDS:
            raise PictureDefect(DAMAGED)
        return self.unpack(f"{value.count}{KINDS[value.kind]}", value.position)

    def first(self, tags: dict[int, _Value], tag: int, default: int) -> int:
        return next(iter(self.values(tags, tag)), default)


def tiff_header(content: bytes) -> Header:
    """Of a TIFF or BigTIFF file of one page whose strips or tiles lie inside the file; raises: PictureDefect."""
    file = _File(content)
    tags = file.pages()[0]
    rows, columns, samples = file.first(tags, HEIGHT, 0), file.first(tags, WIDTH, 0), file.first(tags, SAMPLES, 1)
    for number in set(file.values(tags, FORMAT)) & NUMBERS.keys():
        raise PictureDefect(f"holds {NUMBERS[number]} numbers; save it with whole numbers of 8 or 16 bits")
    depths = set(file.values(tags, BITS)) or {1}
    bits = max(depths)
    colours = file.first(tags, PHOTOMETRIC, BLACK_IS_ZERO)
    if len(depths) > 1 or bits not in (1, 2, 4, 8, 16):
        raise PictureDefect(
            f"has channels of {', '.join(map(str, sorted(depths)[:3]))} bits; save it with 8 or 16 bits"
        )
    known = {WHITE_IS_ZERO: (1, 2), BLACK_IS_ZERO: (1, 2), RGB: (3, 4), PALETTE: (1,), CMYK: (4,), YCBCR: (3,)}
    fitting = samples in known.get(colours, ()) and (
        bits < 16 or (samples != 2 and colours not in (PALETTE, CMYK, YCBCR))
    )
    if not fitting or (bits == 16 and samples > 1 and file.first(tags, PLANAR, 1) != 1):
        raise PictureDefect(f"is a TIFF of {samples} channels of kind {colours} and {bits} bits; save it as PNG")
    if colours == CMYK:
        refuse_without_profile(PROFILE in tags)
    _refuse_missing_pixels(file, tags, (rows * -(-columns * samples * bits // 8), rows * columns))
    turn = file.first(tags, ORIENTATION, 1)
    return Header(
        TIFF,
        rows,
        columns,
        1 if colours <= BLACK_IS_ZERO or (colours == PALETTE and _grey_colours(file, tags)) else 3,
        bits,
        turn if 1 <= turn <= 8 else 1,
        palette=colours == PALETTE,
        cmyk=colours == CMYK,
        white_is_zero=colours == WHITE_IS_ZERO,
        turn_at=(tags[ORIENTATION].position, file.order + KINDS[tags[ORIENTATION].kind]) if turn != 1 else None,
    )


def _refuse_missing_pixels(file: _File, tags: dict[int, _Value], size: tuple[int, int]) -> None:
    """Raises: PictureDefect if a strip or a tile is not inside the file, or too few for `size` (bytes, pixels)."""
    tiled = TILES in tags
    starts = file.values(tags, TILES if tiled else STRIPS)
    counts = file.values(tags, TILE_BYTES if tiled else STRIP_BYTES)
    if not starts or len(starts) != len(counts) or not all(counts):
        raise PictureDefect(DAMAGED)
    tile = file.first(tags, TILE_WIDTH, 0) * file.first(tags, TILE_HEIGHT, 0)
    if tiled and not 0 < tile <= max(size[1], MAX_TILE):
        raise PictureDefect(DAMAGED)
    if any(start + count > len(file.content) for start, count in zip(starts, counts, strict=True)):
        raise PictureDefect(TRUNCATED)
    if file.first(tags, COMPRESSION, 1) == 1 and sum(counts) < size[0]:
        raise PictureDefect(TRUNCATED)


def _grey_colours(file: _File, tags: dict[int, _Value]) -> bool:
    """Whether a palette, which holds all reds, then all greens, then all blues, is grey."""
    palette = file.values(tags, COLOURS)
    third = len(palette) // 3
    return palette[:third] == palette[third : 2 * third] == palette[2 * third :]
