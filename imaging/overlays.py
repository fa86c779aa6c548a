"""Slices as pictures with their labels in colour."""

from __future__ import annotations

import numpy as np

# Paul Tol's "bright" scheme, which colour-blind readers can tell apart: red, blue, yellow, green, purple.
CLASS_COLOURS = ("#ee6677", "#4477aa", "#ccbb44", "#228833", "#aa3377")  # of classes 1, 2, ...; repeated after the last
COLOURS = np.array([[int(colour[k : k + 2], 16) for k in (1, 3, 5)] for colour in CLASS_COLOURS]) / 255  # (5, 3)
OPACITY = 0.45
SHOWN = 5  # slices of a volume in one strip
LEAST_SIDE = 192  # pixels; smaller slices are enlarged


def coloured(image: np.ndarray, label: np.ndarray) -> np.ndarray:
    """A picture with labels in colour.

    Args:
        image: (..., 3) colours or (..., 1) grey levels in [0, 1]; others are clipped.
        label: (...), integers; 0 is not coloured.

    Returns: (..., 3) uint8.
    """
    shown = np.broadcast_to(np.clip(image, 0, 1), (*label.shape, 3)).copy()
    marked = label > 0
    shown[marked] = (1 - OPACITY) * shown[marked] + OPACITY * COLOURS[(label[marked].astype(int) - 1) % len(COLOURS)]
    return (shown * 255).astype(np.uint8)


def shown_slice(image: np.ndarray, *, picture: bool) -> np.ndarray:
    """A slice as people are shown it: a picture in its colours, a volume's slice in grey with the front of the body up.

    Args:
        image: (C, S, S) in [-1, 1]; of a volume, or a picture without three channels, the first one is shown.
        picture: whether it is a picture; otherwise its rows go from left to right.

    Returns: (S, S, 3) in [0, 1].
    """
    colours = np.moveaxis(image, 0, -1) if picture and len(image) == 3 else np.stack([image[0]] * 3, axis=-1)
    return ((colours if picture else np.rot90(colours)).astype(np.float32).clip(-1, 1) + 1) / 2


def strip(image: np.ndarray, *labels: np.ndarray) -> np.ndarray:
    """Evenly spaced slices that hold a label, side by side, one row per label map.

    Args:
        image: (X, Y, Z), any intensities, axes in turned order with slices last.
        labels: label maps, (X, Y, Z) integers each.

    Returns: (rows, columns, 3) uint8.
    """
    held = np.flatnonzero(np.any([label.any(axis=(0, 1)) for label in labels], axis=0))
    places = held if len(held) else np.arange(image.shape[2])
    places = places[np.linspace(0, len(places) - 1, min(SHOWN, len(places))).round().astype(int)]
    low, high = np.percentile(image, (0.5, 99.5))
    grey = (image - low) / max(float(high - low), 1e-12)
    rows = [
        np.concatenate([_upright(coloured(grey[..., k, None], label[..., k])) for k in places], axis=1)
        for label in labels
    ]
    enlarged = -(-LEAST_SIDE // max(image.shape[:2]))
    return np.concatenate(rows).repeat(enlarged, axis=0).repeat(enlarged, axis=1)


def _upright(slice_: np.ndarray) -> np.ndarray:
    """(X, Y, 3) as (Y, X, 3) with anterior up, for axes that rise to the right and to the front."""
    return np.flipud(np.swapaxes(slice_, 0, 1))
