"""Reading pictures as arrays, and writing them."""

from __future__ import annotations

import io
import os
import struct
import warnings
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageCms, UnidentifiedImageError

from ...common.files import atomic_file
from ...errors import UsageError, VolumeError
from ..formats.unpacking import PICTURE_BYTES, refuse_bomb
from .headers import (
    BMP,
    DAMAGED,
    GIF,
    JPEG,
    PNG,
    TIFF,
    Header,
    PictureDefect,
    bmp_header,
    gif_header,
    jpeg_header,
    kind_of,
    png_header,
)
from .tiff_header import tiff_header

PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK_ENDINGS = (*PICTURE_ENDINGS, ".gif")
MAX_PIXELS = 100_000_000
MAX_BYTES = 1 << 30  # of a file
HEADERS = {PNG: png_header, JPEG: jpeg_header, TIFF: tiff_header, BMP: bmp_header, GIF: gif_header}
JPEG_GREY = 128  # what the decoder of JPEG shows where a file ends too early
FILLING = b"\x55\x2a\x93\x4c" * 256  # no bytes with a meaning of their own in a scan
CORNER = 4  # pixels; less than the smallest block of a picture decoded at half its size
# Colour as red, green, blue, or grey; at 1/2, 1/4 or 1/8 of the size. IMREAD_COLOR_RGB replaces the bit that means BGR.
REDUCED_GREY = {2: cv2.IMREAD_REDUCED_GRAYSCALE_2, 4: cv2.IMREAD_REDUCED_GRAYSCALE_4, 8: cv2.IMREAD_REDUCED_GRAYSCALE_8}
FLAGS = {(1, 1): cv2.IMREAD_GRAYSCALE, (3, 1): cv2.IMREAD_COLOR_RGB}
FLAGS |= {(1, k): flag for k, flag in REDUCED_GREY.items()}
FLAGS |= {(3, k): flag | cv2.IMREAD_COLOR_RGB for k, flag in REDUCED_GREY.items()}

# Messages reach users as errors that name the file; OpenCV would also print its own.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


@dataclass(frozen=True)
class PictureFacts:
    """Facts of a picture, upright.

    Attributes:
        rows: number of rows of pixels.
        columns: number of columns of pixels.
        channels: 1 (grey) or 3 (red, green, blue); opacity is not counted, and a grey palette is grey.
        bits: 8 or 16 for each channel.
    """

    rows: int
    columns: int
    channels: int
    bits: int


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        pixels: (rows, columns, channels) uint8 or uint16, upright, red first; one channel is grey.
        facts: of the file; its size is the full one.
        reduction: 1, 2, 4 or 8. Pixel j of an axis stands for the pixels reduction * j to reduction * j + reduction - 1
            of the full picture; the last one may stand for fewer.
    """

    pixels: np.ndarray
    facts: PictureFacts
    reduction: int


def is_picture(path: Path) -> bool:
    """Whether a path has the name of a picture, is not hidden and no folder; a broken link fails when it is read."""
    return _is_named(path, PICTURE_ENDINGS)


def is_mask(path: Path) -> bool:
    """Whether a path has the name of a mask, which may also be a GIF."""
    return _is_named(path, MASK_ENDINGS)


def picture_facts(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> PictureFacts:
    """Facts of a picture from the file's structure, without decoding it.

    Raises: as `read_picture`, except for damage that shows only when the pixels are decoded.
    """
    return facts_of(read_header(read_content(path), path, max_pixels))


def read_picture(
    path: str | os.PathLike, *, channels: int | None = None, max_pixels: int = MAX_PIXELS, at_least: int | None = None
) -> np.ndarray:
    """Read a PNG, JPEG, TIFF or BMP picture; which of them it is, its content tells and not its name.

    Args:
        path: of the file, of 8 or 16 bits, grey, colour or palette. Transparent pixels are shown over black, and the
            EXIF orientation is applied.
        channels: 1 turns colour into luminance (0.299 R + 0.587 G + 0.114 B), 3 repeats grey; None keeps the file's.
        max_pixels: the largest picture that is decoded.
        at_least: pixels of the longer side that the caller needs. A JPEG is then decoded at 1/2, 1/4 or 1/8 of its size
            if that is enough, which is faster; `decode_picture` tells which.

    Returns: (rows, columns, channels) uint8 or uint16, channels red, green, blue or grey.
    Raises:
        UsageError: there is no such file.
        VolumeError: no picture, truncated or damaged, empty, too large, several pages or an animation, numbers other
            than whole ones of 1 to 16 bits, or printer's colours without an ICC profile.
    """
    content = read_content(path)
    return decode_picture(content, path, channels=channels, max_pixels=max_pixels, at_least=at_least).pixels


def decode_picture(
    content: bytes,
    path: str | os.PathLike,
    *,
    channels: int | None = None,
    max_pixels: int = MAX_PIXELS,
    at_least: int | None = None,
) -> Picture:
    """The picture in the bytes of a file, as `read_picture`; `path` is named in errors.

    Raises: VolumeError, see `read_picture`.
    """
    header = read_header(content, path, max_pixels)
    return decode_content(content, path, header, channels=channels, at_least=at_least)


def decode_content(
    content: bytes, path: str | os.PathLike, header: Header, *, channels: int | None, at_least: int | None
) -> Picture:
    """`decode_picture` where the header is known already."""
    facts = facts_of(header)
    wanted = channels or facts.channels
    reduction = 1
    if header.kind == JPEG and at_least is not None and not header.cmyk:
        longer = max(facts.rows, facts.columns)
        reduction = next((k for k in (8, 4, 2) if -(-longer // k) >= at_least), 1)
    try:
        pixels = _upright_pixels(content, header, wanted, reduction)
    except PictureDefect as error:
        raise VolumeError(f"{path}: {error}") from None
    except Exception as error:  # decoders raise many types for damaged files, all with one meaning here
        raise VolumeError(f"{path}: cannot be decoded ({_first_line(error)}); copy it again") from None
    expected = (-(-facts.rows // reduction), -(-facts.columns // reduction))
    if pixels.shape[:2] != expected:
        raise VolumeError(f"{path}: decodes to {pixels.shape[:2]} pixels, its header claims {expected}; copy it again")
    return Picture(pixels, facts, reduction)


def write_picture(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Write a picture as PNG, atomically.

    Args:
        path: of the file, ending in .png.
        pixels: (rows, columns), (rows, columns, 1) or (rows, columns, 3), red first, uint8 or uint16.

    Raises: UsageError for another array or ending.
    """
    array = np.asarray(pixels)
    known = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))
    if not known or array.dtype not in (np.uint8, np.uint16) or not array.size:
        raise UsageError(f"pixels are {array.dtype} {array.shape}; they must be uint8 or uint16, grey or RGB")
    if Path(path).suffix.lower() != ".png":
        raise UsageError(f"{path}: pictures are written as PNG; choose a name that ends in .png")
    stored = cv2.cvtColor(array, cv2.COLOR_RGB2BGR) if array.shape[2:] == (3,) else np.ascontiguousarray(array)
    with atomic_file(path) as temporary:
        temporary.write_bytes(cv2.imencode(".png", stored)[1].tobytes())


def read_content(path: str | os.PathLike) -> bytes:
    """All bytes of a picture's file.

    Raises: UsageError if there is no such file; VolumeError if it is empty, too large or cannot be read.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file, or no regular file; give a picture")
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = file.read(min(size, MAX_BYTES) + 1)  # memory for as much is reserved first
    except OSError as error:
        raise VolumeError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not content:
        raise VolumeError(f"{path}: is empty; copy it again")
    if len(content) > MAX_BYTES:
        raise VolumeError(f"{path}: has more than {MAX_BYTES} bytes; save it smaller")
    return content


def read_header(content: bytes, path: str | os.PathLike, max_pixels: int, *, gif: bool = False) -> Header:
    """The header of a picture's bytes, checked; `path` is named in errors.

    Args:
        gif: whether a GIF is accepted.

    Raises: VolumeError.
    """
    kind = kind_of(content)
    if kind is None or (kind == GIF and not gif):
        raise VolumeError(f"{path}: is no PNG, JPEG, TIFF{', BMP or GIF' if gif else ' or BMP'} file; save it as PNG")
    try:
        header = HEADERS[kind](content)
    except PictureDefect as error:
        raise VolumeError(f"{path}: {error}") from None
    except (struct.error, IndexError, OverflowError, MemoryError):
        raise VolumeError(f"{path}: {DAMAGED}") from None
    if header.rows * header.columns > max_pixels:
        size = f"{header.rows} x {header.columns}"
        raise VolumeError(f"{path}: its header claims {size} pixels; at most {max_pixels} are read, make it smaller")
    stored = (1 if header.channels == 1 else 4) * (2 if header.bits == 16 else 1)  # bytes of a pixel with its opacity
    unpacked = stored * header.rows * header.columns
    refuse_bomb(path, packed=len(content), unpacked=unpacked, most=PICTURE_BYTES)
    return header


def facts_of(header: Header) -> PictureFacts:
    """The facts that a header tells."""
    rows, columns = (header.rows, header.columns) if header.turn < 5 else (header.columns, header.rows)
    return PictureFacts(rows, columns, header.channels, 16 if header.bits == 16 else 8)


def open_with_pillow(content: bytes, header: Header) -> Image.Image:
    """The picture of a file, loaded, by the decoder of its kind alone.

    Raises: PictureDefect, and what Pillow raises for damaged files.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on large pictures and odd tags; what matters is checked in the header
        try:
            image = Image.open(io.BytesIO(content), formats=[header.kind])
        except UnidentifiedImageError:
            raise PictureDefect("cannot be decoded; copy it again") from None
        image.load()
    return image


def upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    """Pixels (rows, columns, ...) turned as their EXIF orientation says, contiguous."""
    if turn >= 5:
        pixels = np.swapaxes(pixels, 0, 1)
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def not_turning(content: bytes, header: Header) -> bytes:
    """The file without the orientation of a TIFF: decoders apply that, or not, whatever they are asked."""
    if header.turn_at is None:
        return content
    position, form = header.turn_at
    return content[:position] + struct.pack(form, 1) + content[position + struct.calcsize(form) :]


def decode_with_opencv(content: bytes, flags: int) -> np.ndarray:
    """Pixels by OpenCV, not turned; raises: PictureDefect if it gives none."""
    pixels = cv2.imdecode(
        np.frombuffer(content, np.uint8), flags | (cv2.IMREAD_IGNORE_ORIENTATION if flags >= 0 else 0)
    )
    if pixels is None:
        raise PictureDefect("cannot be decoded; copy it again")
    return pixels


def _upright_pixels(content: bytes, header: Header, channels: int, reduction: int) -> np.ndarray:
    content = not_turning(content, header)
    if header.kind == JPEG and not header.cmyk:
        pixels = _jpeg_pixels(content, header, FLAGS[channels, reduction])
    elif header.kind == PNG or (header.kind == TIFF and header.bits == 16):
        pixels = _opencv_pixels(content, header)
    else:
        pixels = _pillow_pixels(content, header)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    if pixels.shape[2] == 3 and channels == 1:
        grey = header.channels == 1
        pixels = pixels[..., :1] if grey else cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY)[..., None]
    elif pixels.shape[2] == 1 and channels == 3:
        pixels = pixels.repeat(3, axis=2)
    return upright(pixels, header.turn)


def _jpeg_pixels(content: bytes, header: Header, flags: int) -> np.ndarray:
    """Pixels of a JPEG.

    The decoder fills what a cut scan lacks with grey. If the last pixels are of this grey, the scan is also decoded
    with more bytes at its end: these change a scan that was cut, and nothing else. Pillow does that without a word.
    """
    pixels = decode_with_opencv(content, flags)
    if (pixels[-CORNER:, -CORNER:] == JPEG_GREY).all():
        longer = content[: header.end] + FILLING + content[header.end :]
        if open_with_pillow(content, header).tobytes() != open_with_pillow(longer, header).tobytes():
            raise PictureDefect("is truncated; copy it again")
    return pixels


def _opencv_pixels(content: bytes, header: Header) -> np.ndarray:
    """Pixels of a PNG or of a TIFF of 16 bits, transparent ones over black."""
    pixels = decode_with_opencv(content, cv2.IMREAD_UNCHANGED)
    if header.transparent_grey is not None and pixels.ndim == 2:
        scale = 255 // ((1 << header.bits) - 1) if header.bits < 8 else 1
        pixels[pixels == header.transparent_grey * scale] = 0
    if header.white_is_zero:
        pixels = np.iinfo(pixels.dtype).max - pixels
    if pixels.ndim == 2:
        return pixels
    if pixels.shape[2] == 3:
        return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)
    return _over_black(cv2.cvtColor(pixels, cv2.COLOR_BGRA2RGBA))[..., : header.channels]


def _pillow_pixels(content: bytes, header: Header) -> np.ndarray:
    """Pixels of a BMP, of a TIFF of 8 bits, or of printer's colours."""
    image = open_with_pillow(content, header)
    if header.cmyk:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info.get("icc_profile", b"")))
        image = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    elif image.mode in ("1", "L", "P", "LA", "YCbCr"):
        image = image.convert({"1": "L", "P": "RGB", "YCbCr": "RGB"}.get(image.mode, image.mode))
    elif image.mode not in ("RGB", "RGBA"):
        raise PictureDefect(f"has pixels of kind {image.mode}; save it as PNG")
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[2] in (2, 4):
        pixels = _over_black(pixels)
    return pixels if pixels.ndim == 2 else pixels[..., : header.channels]


def _over_black(pixels: np.ndarray) -> np.ndarray:
    """Pixels (rows, columns, C + 1) whose last channel is their opacity, as (rows, columns, C) over black."""
    colours, opacity = pixels[..., :-1], pixels[..., -1:]
    most = int(np.iinfo(pixels.dtype).max)
    if (opacity == most).all():
        return np.ascontiguousarray(colours)
    shown = np.empty(colours.shape, pixels.dtype)
    for row in range(len(pixels)):  # numbers of four bytes for all pixels may not fit into memory
        shown[row] = (colours[row].astype(np.uint32) * opacity[row] + most // 2) // most
    return shown


def _is_named(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings) and not path.name.startswith(".") and not os.path.isdir(path)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
