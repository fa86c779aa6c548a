"""Pictures with the outlines of their labels."""

from __future__ import annotations

import cv2
import numpy as np

from ..overlays import COLOURS, LEAST_SIDE, shown_slice
from ..slice_format import UNLABELLED

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
    for label in np.unique(labels[(labels > 0) & (labels != UNLABELLED)]):
        outlines, _ = cv2.findContours((labels == label).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        colour = tuple(round(255 * float(share)) for share in COLOURS[(int(label) - 1) % len(COLOURS)])
        cv2.drawContours(shown, outlines, -1, colour, thickness)
    return shown


def slice_with_contours(image: np.ndarray, label: np.ndarray, *, picture: bool) -> tuple[np.ndarray, np.ndarray]:
    """A slice as people are shown it, alone and with the contours of its label; small slices are enlarged.

    Args:
        image: (C, S, S) in [-1, 1], see `shown_slice`.
        label: (S, S) integers.
        picture: whether it is a picture and not a slice of a volume.

    Returns: both (side, side, 3) uint8, side a multiple of S.
    """
    times = -(-LEAST_SIDE // len(label))
    shown = (255 * shown_slice(image, picture=picture)).round().astype(np.uint8)
    shown, label = (
        part.repeat(times, axis=0).repeat(times, axis=1) for part in (shown, label if picture else np.rot90(label))
    )
    return shown, with_contours(shown, label)
