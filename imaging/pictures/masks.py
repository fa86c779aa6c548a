"""Reading masks as label maps."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import cv2
import numpy as np

from ...errors import VolumeError
from ..case_files import LabelFile
from .colour_table import MAX_CLASS, UNLABELLED, Colour
from .decoding import (
    MAX_PIXELS,
    decode_picture,
    facts_of,
    not_turning,
    open_with_pillow,
    read_content,
    read_header,
    upright,
)
from .headers import JPEG, Header, PictureDefect

OPTION = "--mask-colours"
JPEG_MIDDLE = (64, 191)  # grey values that are neither near black nor near white
PLATEAU = np.ones((5, 5), np.uint8)  # an area of this size is no blur of an edge
SAME_GREY = 16  # largest difference between the channels of a grey JPEG
SHOWN = 5  # values in a message


@dataclass(frozen=True)
class _Mask:
    """A mask as its file has it.

    Attributes:
        values: (rows, columns) uint8 or uint16 grey values, or indices of a palette; None if it is a colour picture.
        colours: (rows, columns, 3) uint8 or uint16; None if it is grey and has no palette.
        white: the value that stands for "marked" if the only other one is 0.
        lossy: whether it is a JPEG, whose values are not exact.
    """

    values: np.ndarray | None
    colours: np.ndarray | None
    white: int
    lossy: bool

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        rows, columns = (self.colours if self.values is None else self.values).shape[:2]
        return rows, columns


def read_mask(
    files: Sequence[LabelFile],
    size: tuple[int, int] | None = None,
    *,
    colours: Mapping[Colour, int] | None = None,
    class_numbers: bool = False,
) -> tuple[np.ndarray, list[str]]:
    """The label map of a picture from one or several masks.

    A mask of black and white (0 and 255, or 0 and 65535, or one bit) has classes 0 and 1; another one has class numbers
    from 0 to 63. A palette's indices are its class numbers, unless the colours in use are black and white, or are grey
    and themselves class numbers. A JPEG is split at 128, if all its values lie near black and white apart from the
    edges. A colour mask whose channels are equal counts as grey.

    Files with a `value` mark one class each, wherever they are not zero. Where such files overlap, the later one
    counts, but one that lies wholly inside another keeps its place. Files without a value are united: they may overlap
    only where they agree; 0, or with `class_numbers` 255, is what each leaves to the others.

    Args:
        files: one or more masks.
        size: rows and columns of the picture, upright; None takes those of the first mask.
        colours: class of every colour (red, green, blue), or of every grey value, of masks without `value`; None for
            masks of numbers.
        class_numbers: whether 255 is no white but means "unlabelled", as in scribbles.

    Returns: labels (rows, columns) uint16, 0 to 63, or 255 for what is unlabelled; and warnings, one line each.
    Raises:
        UsageError: a file is missing.
        VolumeError: as `read_picture`; another size; values or colours that are no classes; masks that disagree.
    """
    warnings: list[str] = []
    marked: list[tuple[LabelFile, np.ndarray]] = []
    maps: list[tuple[LabelFile, np.ndarray]] = []
    for file in files:
        mask = _read(file.path, size)
        size = size or mask.size
        try:
            if mask.lossy:
                mask = _split_jpeg(mask, file.value is None and (colours is not None or class_numbers))
                warnings.append(f"{file.path}: is a JPEG, so its values were split at 128; masks should be PNG")
            if file.value is not None:
                marked.append((file, _marked(mask)))
            elif colours is not None:
                maps.append((file, _by_table(mask, colours, class_numbers)))
            else:
                maps.append((file, _by_number(mask, class_numbers)))
        except PictureDefect as error:
            raise VolumeError(f"{file.path}: {error}") from None
    if len(maps) == len(files) == 1:
        return maps[0][1], warnings
    rest = UNLABELLED if class_numbers else 0
    labels = _painted(marked, np.full(size, rest, np.uint16))
    for file, area in marked:
        if area.any() and not (labels[area] == file.value).any():
            warnings.append(f"{file.path}: class {file.value} is wholly covered by other masks of this picture")
    for file, more in maps:
        labels = _united(labels, file, more, rest)
    return labels, warnings


def _read(path: str | os.PathLike, size: tuple[int, int] | None) -> _Mask:
    content = read_content(path)
    most_pixels = MAX_PIXELS if size is None else max(size[0] * size[1], 1 << 20)
    header = read_header(content, path, most_pixels, gif=True)
    facts = facts_of(header)
    if size is not None and (facts.rows, facts.columns) != tuple(size):
        raise VolumeError(
            f"{path}: has {facts.rows} x {facts.columns} pixels, but its picture {size[0]} x {size[1]}; "
            "give a mask of the picture's size"
        )
    lossy = header.kind == JPEG
    if header.palette:
        return _read_palette(path, content, header)
    pixels = decode_picture(content, path, max_pixels=header.rows * header.columns).pixels
    if pixels.shape[2] == 3:
        spread = cv2.absdiff(pixels[..., 0], pixels[..., 1]).max(), cv2.absdiff(pixels[..., 0], pixels[..., 2]).max()
        if max(spread) > (SAME_GREY if lossy else 0):
            return _Mask(None, pixels, 255, lossy)
    most = (1 << header.bits) - 1
    # Decoders scale grey of 1, 2 and 4 bits to 8. Black and white stay so, class numbers are those of the file.
    return _Mask(pixels[..., 0] // (255 // most) if most < 255 else pixels[..., 0], None, most, lossy)


def _read_palette(path: str | os.PathLike, content: bytes, header: Header) -> _Mask:
    """A mask with a palette: its grey values where these mean something, otherwise its indices and colours."""
    try:
        image = open_with_pillow(not_turning(content, header), header)
        if image.mode == "P":
            indices = np.asarray(image)
            shown = np.asarray(image.convert("RGB"))
        else:  # Pillow itself reads a grey palette as grey
            indices = np.asarray(image.convert("L"))
            shown = indices[..., None].repeat(3, axis=2)
    except PictureDefect as error:
        raise VolumeError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise many types for damaged files, all with one meaning here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise VolumeError(f"{path}: cannot be decoded ({reason}); copy it again") from None
    indices, shown = upright(indices, header.turn), upright(shown, header.turn)
    grey = shown[..., 0]
    if (shown == grey[..., None]).all() and (grey.max() <= MAX_CLASS or not ((grey > 0) & (grey < 255)).any()):
        return _Mask(grey, shown, 255, lossy=False)
    return _Mask(indices, shown, 256, lossy=False)


def _split_jpeg(mask: _Mask, exact: bool) -> _Mask:
    """The mask of a JPEG with values 0 and 255 alone.

    Raises: PictureDefect if it may be something else than black and white.
    """
    if exact or mask.values is None:
        raise PictureDefect("is a JPEG, which changes colours and class numbers; save it as PNG")
    low, high = JPEG_MIDDLE
    middle = ((mask.values >= low) & (mask.values <= high)).astype(np.uint8)
    plateau = cv2.erode(middle, PLATEAU, borderValue=1) > 0
    faint = bool(mask.values.any()) and int(mask.values.max()) <= high
    if faint or plateau.any():
        shown = _listed(np.unique(mask.values[plateau if plateau.any() else mask.values > 0]))
        raise PictureDefect(f"is a JPEG with values such as {shown}, neither black nor white; save it as PNG")
    return _Mask(np.where(mask.values >= 128, 255, 0).astype(np.uint8), None, 255, lossy=True)


def _marked(mask: _Mask) -> np.ndarray:
    """(rows, columns) bool: where the mask is not zero."""
    return (mask.values if mask.values is not None else mask.colours.max(axis=2)) > 0


def _by_number(mask: _Mask, class_numbers: bool) -> np.ndarray:
    """Labels (rows, columns) uint16 of a mask of numbers."""
    if mask.values is None:
        colours = np.unique(mask.colours.reshape(-1, 3), axis=0)
        shown = ", ".join(str(tuple(map(int, colour))) for colour in colours[:SHOWN])
        raise PictureDefect(
            f"is a colour mask with {len(colours)} colours such as {shown}; give their classes by {OPTION}"
        )
    values = _values_in(mask.values)
    whites = {255, mask.white} if mask.values.dtype == np.uint16 else {mask.white}
    if len(values) <= 2 and set(values.tolist()) - {0} <= whites and not (class_numbers and mask.white >= 255):
        return (mask.values > 0).astype(np.uint16)
    unknown = values[(values > MAX_CLASS) & ~(class_numbers & (values == UNLABELLED))]
    if len(unknown):
        raise PictureDefect(
            f"has values such as {_listed(unknown)}; classes are 0 to {MAX_CLASS}, or black and white alone; "
            f"give the classes of other values by {OPTION}"
        )
    return mask.values.astype(np.uint16)


def _by_table(mask: _Mask, table: Mapping[Colour, int], class_numbers: bool) -> np.ndarray:
    """Labels (rows, columns) uint16 by the table of colours or grey values."""
    grey = {key: label for key, label in table.items() if isinstance(key, int)}
    shown = mask.colours if mask.colours is not None else mask.values[..., None].repeat(3, axis=2)
    if grey:
        # A palette's grey values count, and its indices only if it has colours.
        values = shown[..., 0] if (shown == shown[..., :1]).all() else mask.values
        if values is None:
            raise PictureDefect(f"is a colour mask; the table of {OPTION} needs the columns R,G,B,CLASS")
        codes, classes = values.astype(np.uint64), grey
    else:
        codes, classes = _codes(shown), {_code(cast(tuple, key)): label for key, label in table.items()}
    labels = np.zeros(codes.shape, np.uint16)
    known = np.zeros(codes.shape, bool)
    for code, label in classes.items():
        found = codes == code
        labels[found] = label
        known |= found
    if not known.all():
        first = np.unravel_index(int(np.argmin(known)), known.shape)
        value = int(values[first]) if grey else tuple(int(v) for v in shown[first])
        raise PictureDefect(
            f"has {'value' if grey else 'colour'} {value}, which the table of {OPTION} lacks; add its class"
        )
    if not class_numbers and (labels == UNLABELLED).any():
        raise PictureDefect(
            f"has pixels of class {UNLABELLED}, unlabelled; this is for sparse labels, give them a class"
        )
    return labels


def _codes(colours: np.ndarray) -> np.ndarray:
    """One number for each colour of (rows, columns, 3)."""
    wide = colours.astype(np.uint64)
    return wide[..., 0] << np.uint64(32) | wide[..., 1] << np.uint64(16) | wide[..., 2]


def _code(colour: tuple[int, int, int]) -> int:
    return colour[0] << 32 | colour[1] << 16 | colour[2]


def _painted(marked: list[tuple[LabelFile, np.ndarray]], labels: np.ndarray) -> np.ndarray:
    """The labels with classes painted one over the other, but a mask inside another one over that one."""
    order: list[tuple[LabelFile, np.ndarray]] = []
    for file, area in marked:
        inner = (k for k, (_, other) in enumerate(order) if not (other & ~area).any() and (area & ~other).any())
        order.insert(next(inner, len(order)), (file, area))
    for file, area in order:
        labels[area] = file.value
    return labels


def _united(labels: np.ndarray, file: LabelFile, more: np.ndarray, rest: int) -> np.ndarray:
    """Labels put together with those of a file; where one of them has the value `rest`, the other counts.

    Raises: VolumeError if they differ elsewhere.
    """
    clash = (labels != more) & (labels != rest) & (more != rest)
    if clash.any():
        first = np.unravel_index(int(np.argmax(clash)), clash.shape)
        raise VolumeError(
            f"{file.path}: gives class {more[first]} to pixels of class {labels[first]} in another mask of this "
            f"picture ({int(clash.sum())} pixels); let the masks agree"
        )
    return np.where(labels == rest, more, labels)


def _values_in(values: np.ndarray) -> np.ndarray:
    """Values that occur in an array of uint8 or uint16, rising. OpenCV counts them several times faster than numpy."""
    bins = int(np.iinfo(values.dtype).max) + 1
    counts = cv2.calcHist([np.ascontiguousarray(values)], [0], None, [bins], [0, bins])
    return np.flatnonzero(counts)


def _listed(values: np.ndarray) -> str:
    return ", ".join(str(int(value)) for value in values[:SHOWN])
