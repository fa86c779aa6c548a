"""Pictures with the outlines of their labels."""

from __future__ import annotations

import cv2
import numpy as np

from ..overlays import COLOURS, LEAST_SIDE, shown_slice
from ..slice_choices import UNLABELLED
from ..volumes import Volume

SIDE_PER_WIDTH = 256  # pixels of the longer side for each pixel of a contour's width


def with_contours(picture: np.ndarray, labels: np.ndarray, *, width: int | None = None) -> np.ndarray:
    """A picture with the contour of every class in the class's colour.

    Args:
        picture: (rows, columns, 1 or 3) uint8 or uint16, grey or red, green, blue.
        labels: (rows, columns) integers; 0 and 255 (unlabelled) get no contour.
        width: of the contours in pixels; None takes one for every 256 pixels of the longer side, at least one.

    Returns: (rows, columns, 3) uint8.
    """
    shown = (picture >> 8).astype(np.uint8) if picture.dtype == np.uint16 else picture
    shown = np.ascontiguousarray(np.broadcast_to(shown, (*shown.shape[:2], 3))).copy()
    thickness = width or max(1, round(max(labels.shape) / SIDE_PER_WIDTH))
    found, areas = np.unique(labels[(labels > 0) & (labels != UNLABELLED)], return_counts=True)
    for label in found[np.argsort(-areas, kind="stable")]:  # so that none covers a smaller one beside it
        outlines, _ = cv2.findContours((labels == label).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        colour = tuple(round(255 * float(share)) for share in COLOURS[(int(label) - 1) % len(COLOURS)])
        cv2.drawContours(shown, outlines, -1, colour, thickness)
    return shown


def thumbnail(
    picture: np.ndarray,
    labels: np.ndarray,
    *,
    side: int,
    pixel: tuple[float, float] = (1.0, 1.0),
    width: int | None = None,
) -> np.ndarray:
    """A picture enlarged or reduced to a common size, with the contour of every class.

    Args:
        picture: (rows, columns, 1 or 3) in [0, 1]; others are clipped.
        labels: (rows, columns) integers.
        side: pixels of the longer side of the result.
        pixel: height and width of a pixel, in any unit; pixels of the result are square.
        width: of the contours, see `with_contours`.

    Returns: (rows, columns, 3) uint8.
    """
    extent = np.multiply(labels.shape, pixel)
    rows, columns = (max(1, round(side * length / max(extent))) for length in extent)
    shown = (np.broadcast_to(np.clip(picture, 0, 1), (*labels.shape, 3)) * 255).round().astype(np.uint8)
    reduced = rows * columns < labels.size
    shown = cv2.resize(shown, (columns, rows), interpolation=cv2.INTER_AREA if reduced else cv2.INTER_NEAREST)
    found = cv2.resize(labels.astype(np.uint8), (columns, rows), interpolation=cv2.INTER_NEAREST_EXACT)
    return with_contours(shown, found, width=width)


def volume_thumbnails(
    image: Volume, *labels: Volume, plane: str, side: int, width: int | None = None
) -> list[np.ndarray]:
    """One slice of a volume with the contours of each of several label maps: where the first has most labelled voxels.

    Args:
        image: (X, Y, Z), any intensities.
        labels: label maps on its grid.
        plane: of the slice, see `orientation`.
        side: pixels of the longer side.
        width: of the contours, see `with_contours`.

    Returns: for each label map (rows, columns, 3) uint8, the front of the body, or its top, up.
    """
    turned, maps = image.turned(plane), [label.turned(plane).data for label in labels]
    counts = np.count_nonzero(maps[0], axis=(0, 1))
    place = int(counts.argmax()) if counts.any() else len(counts) // 2
    low, high = np.percentile(turned.data, (0.5, 99.5))
    grey = (turned.data[..., place] - low) / max(float(high - low), 1e-12)
    grey, pixel = np.flipud(grey.T)[..., None], (turned.spacing[1], turned.spacing[0])
    return [thumbnail(grey, np.flipud(found[..., place].T), side=side, pixel=pixel, width=width) for found in maps]


def slice_with_contours(image: np.ndarray, label: np.ndarray, *, picture: bool) -> tuple[np.ndarray, np.ndarray]:
    """A slice as people are shown it, alone and with the contours of its label; small slices are enlarged.

    Args:
        image: (C, S, S) in [-1, 1], see `shown_slice`.
        label: (S, S) integers.
        picture: whether it is a picture and not a slice of a volume.

    Returns: both (side, side, 3) uint8, side a multiple of S.
    """
    side = -(-LEAST_SIDE // len(label)) * len(label)
    shown, label = shown_slice(image, picture=picture), label if picture else np.rot90(label)
    return thumbnail(shown, np.zeros_like(label), side=side), thumbnail(shown, label, side=side)
