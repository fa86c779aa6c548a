"""Pictures as images: one slice, red, green and blue or one grey channel, and no millimetres."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np

from ...errors import VolumeError
from ..case_files import ImageFile
from ..images import FAR_OUTSIDE, STORED, Box, Image, ImageFacts, Intensities, StoredSlices, digest_of_array
from ..slice_format import BACKGROUND, PICTURE_SIDE, SliceFormat
from ..slice_grid import BLUR, SliceGrid
from .decoding import MAX_PIXELS, Picture, decode_content, facts_of, is_picture, read_content, read_header
from .headers import Header

SAMPLED = 128  # pixels along each axis from which grey levels are counted
FINEST = 4  # pixels for each pixel of a slice, at least, of what is blurred
ON_EDGE = 1e-3  # pixels by which an edge of the slice may miss that of a pixel


def is_picture_file(file: ImageFile) -> bool:
    """Whether a file of a case is a picture, by its name."""
    return isinstance(file, Path) and is_picture(file)


def picture_affine(rows: int, columns: int) -> np.ndarray:
    """(4, 4), pixel (row, column, 0) to the millimetres that stand for it: the longer side is `PICTURE_SIDE`."""
    pixel = PICTURE_SIDE / max(rows, columns)
    return np.diag([pixel, pixel, 1.0, 1.0])


class PictureImage(Image):
    """A picture, whose pixels are read when they are first needed.

    Colours have an absolute meaning: no light is 0 and full light 1. Grey pictures (ultrasound, radiographs) are
    standardised as volumes are.

    Args:
        path: of the file.
        content: its bytes.
        header: of the file.
        channels: 3 for red, green and blue, 1 for grey; None takes the file's own.
        at_least: pixels that the longer side must have; None reads all.
    """

    deferred = True

    def __init__(
        self, path: Path, content: bytes, header: Header, *, channels: int | None, at_least: int | None
    ) -> None:
        facts = facts_of(header)
        self.path, self.channels, self.at_least = path, channels or facts.channels, at_least
        self.colour = self.channels == 3
        self.shape, self.affine = (facts.rows, facts.columns, 1), picture_affine(facts.rows, facts.columns)
        self._content, self._header = content, header

    @cached_property
    def picture(self) -> Picture:
        """The decoded picture."""
        return decode_content(self._content, self.path, self._header, channels=self.channels, at_least=self.at_least)

    def box(self, *, plane: str, crop: str, published: bool) -> Box:
        """The whole picture."""
        return tuple((0, n) for n in self.shape)

    def facts(self, *, plane: str, box: Box) -> ImageFacts:
        """See `Image`. Digest and grey levels are those of every k-th pixel, at most 128 along each axis."""
        pixels = self.picture.pixels
        step = -(-max(pixels.shape[:2]) // SAMPLED)
        sample = np.ascontiguousarray(pixels[::step, ::step])
        try:
            found = tuple(self._intensities(sample[..., channel]) for channel in range(self.channels))
        except VolumeError as error:
            raise VolumeError(f"{self.path}: {error}; give a picture with contrast") from None
        blank = all(facts.low == facts.high for facts in found) and bool((pixels == pixels[0, 0]).all())
        return ImageFacts(voxels=digest_of_array(sample), intensities=found, blank=int(blank))

    def _intensities(self, values: np.ndarray) -> Intensities:
        """Grey levels of the pixels of one channel, uint8 or uint16."""
        if values.dtype == np.uint8:
            return Intensities.of_bytes(values, absolute=self.colour)
        return Intensities.of(values.astype(np.float32) / np.iinfo(values.dtype).max, absolute=self.colour)

    @property
    def contents(self) -> Mapping[Path, bytes]:
        """See `Image`."""
        return {self.path: self._content}

    def inner(self, grid: SliceGrid) -> np.ndarray:
        """See `Image`."""
        planes = self._planes(grid)
        _, rows, columns = grid.kept_pixels
        return planes[None, :, rows, columns] / np.float32(np.iinfo(planes.dtype).max)

    def stored(self, grid: SliceGrid, intensities: Sequence[Intensities]) -> StoredSlices:
        """See `Image`. Of 8 bits there are 256 grey levels: each is scaled once."""
        planes = self._planes(grid)
        if planes.dtype != np.uint8:
            return super().stored(grid, intensities)
        levels = np.arange(256, dtype=np.float32)[None].repeat(self.channels, 0) / np.float32(255)
        for channel, values in enumerate(intensities):
            levels[channel] -= np.float32(values.mean)
            levels[channel] /= np.float32(values.deviation)
        scaled = grid.fmt.scale(levels[None])[0].astype(STORED)
        _, rows, columns = grid.kept_pixels
        images = np.full((1, *planes.shape), BACKGROUND, STORED)
        low, high, far, total = [], [], 0, 0
        for channel, plane in enumerate(planes):
            inside = plane[rows, columns]
            # OpenCV's tables take any two bytes, numpy's indexing four times as long.
            shown = cv2.LUT(np.ascontiguousarray(inside), scaled[channel].view(np.uint16)).view(STORED)
            images[0, channel, rows, columns] = shown
            (darkest, brightest), level = grid.fmt.window[channel], levels[channel]
            slack = FAR_OUTSIDE * (brightest - darkest)
            outside = (level < darkest - slack) | (level > brightest + slack)
            if outside.any():  # not of colours
                far += int(np.bincount(inside.ravel(), minlength=256)[outside].sum())
            total += inside.size
            low.append(float(level[inside.min()]))
            high.append(float(level[inside.max()]))
        return StoredSlices(images, tuple(low), tuple(high), far / max(1, total))

    def _planes(self, grid: SliceGrid) -> np.ndarray:
        """(channels, size, size) of the file's type, on the grid; edges are replicated outside of the picture.

        Blurred first where pixels of the slice are coarser, then cubic interpolation, all by OpenCV.
        """
        rows, columns = grid.axes[:2]
        pixels, reduction = self.picture.pixels, self.picture.reduction
        # A blur's time grows with the picture and with its width: that of a long strip would take minutes.
        block = max(1, int(rows.ratio / reduction / FINEST))
        pixels, reduction = _block_means(pixels, block), reduction * block
        ratio = rows.ratio / reduction  # pixels from one pixel of the slice to the next
        if ratio > 1:
            done = (1 - 1 / block**2) / 12  # variance of the mean over a block, in its own pixels
            blur = float(np.sqrt(BLUR**2 * (ratio**2 - 1 / block**2) - done))
            pixels = cv2.GaussianBlur(pixels, (0, 0), blur, borderType=cv2.BORDER_REPLICATE)
        # Pixel j of the reduced picture is the mean of pixels k j to k j + k - 1.
        start = [(axis.offset - (reduction - 1) / 2) / reduction for axis in (columns, rows)]
        size = (columns.count, rows.count)
        found = _resized(pixels, start, ratio, size)
        if found is None:
            to_picture = np.array([[ratio, 0, start[0]], [0, ratio, start[1]]])
            flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
            found = cv2.warpAffine(pixels, to_picture, size, flags=flags, borderMode=cv2.BORDER_REPLICATE)
        return np.ascontiguousarray(found.reshape(rows.count, columns.count, self.channels).transpose(2, 0, 1))

    def shown(self) -> np.ndarray:
        """See `Image`."""
        pixels = self.picture.pixels
        values = pixels.astype(np.float32) / np.iinfo(pixels.dtype).max
        return np.broadcast_to(values, (*values.shape[:2], 3))


def _resized(pixels: np.ndarray, start: list[float], ratio: float, size: tuple[int, int]) -> np.ndarray | None:
    """The slice of a picture by `cv2.resize`, which takes a fifth of the time of `cv2.warpAffine`.

    It knows whole pictures alone, so the slice's edges must lie between pixels.

    Args:
        pixels: (rows, columns, channels).
        start: column and row of the centre of the slice's first pixel.
        ratio: pixels from one pixel of the slice to the next.
        size: columns and rows of the slice.

    Returns: (rows, columns[, channels]) of the same type; None if an edge crosses a pixel.
    """
    edges = [
        (first + 0.5 - ratio / 2, first + 0.5 - ratio / 2 + ratio * count)
        for first, count in zip(start, size, strict=True)
    ]
    if any(abs(edge - round(edge)) > ON_EDGE for pair in edges for edge in pair):
        return None
    (left, right), (top, bottom) = ((round(low), round(high)) for low, high in edges)
    rows, columns = pixels.shape[:2]
    margins = [max(0, -top), max(0, bottom - rows), max(0, -left), max(0, right - columns)]
    if any(margins):
        pixels = cv2.copyMakeBorder(pixels, *margins, cv2.BORDER_REPLICATE)
    whole = pixels[max(0, top) : bottom + margins[0], max(0, left) : right + margins[2]]
    return cv2.resize(whole, size, interpolation=cv2.INTER_CUBIC)


def _block_means(pixels: np.ndarray, side: int) -> np.ndarray:
    """Means over blocks of side x side pixels of (rows, columns, channels); the last ones repeat the border."""
    if side == 1:
        return pixels
    rows, columns = pixels.shape[:2]
    whole = cv2.copyMakeBorder(pixels, 0, -rows % side, 0, -columns % side, cv2.BORDER_REPLICATE)
    size = (whole.shape[1] // side, whole.shape[0] // side)
    return cv2.resize(whole, size, interpolation=cv2.INTER_AREA)


def read_picture_image(
    files: Sequence[ImageFile], *, fmt: SliceFormat | None = None, max_pixels: int | None = None
) -> PictureImage:
    """Read a picture.

    Args:
        files: its one file.
        fmt: of the slices that are wanted, see `read_image`; None reads all pixels in the file's own channels.
        max_pixels: see `read_picture`.

    Raises: VolumeError naming the file that cannot be used.
    """
    path = files[0]
    if len(files) > 1 or not is_picture_file(path):
        raise VolumeError(f"{path}: is one of {len(files)} channels; a picture must be one file, grey or in colour")
    content = read_content(path)
    header = read_header(content, path, MAX_PIXELS if max_pixels is None else max_pixels)
    channels, least = (None, None) if fmt is None else (fmt.channels, fmt.size)
    return PictureImage(path, content, header, channels=channels, at_least=least)
