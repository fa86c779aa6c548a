"""Slices as pictures with their labels in colour."""

from __future__ import annotations

import numpy as np

COLOURS = np.array([[0.93, 0.4, 0.47], [0.27, 0.47, 0.67], [0.8, 0.73, 0.27], [0.13, 0.53, 0.2], [0.67, 0.2, 0.47]])
OPACITY = 0.45
SHOWN = 5  # slices of a volume
LEAST_SIDE = 192  # pixels; smaller slices are enlarged


def coloured(grey: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(..., 3) uint8 picture of values in [0, 1], with labels above zero in colour."""
    shown = np.repeat(np.clip(grey, 0, 1)[..., None], 3, axis=-1)
    marked = label > 0
    shown[marked] = (1 - OPACITY) * shown[marked] + OPACITY * COLOURS[(label[marked].astype(int) - 1) % len(COLOURS)]
    return (shown * 255).astype(np.uint8)


def strip(image: np.ndarray, *labels: np.ndarray) -> np.ndarray:
    """(rows, columns, 3) uint8: evenly spaced slices that hold a label, side by side, one row per label map.

    Args:
        image: (X, Y, Z) in turned order, slices last. labels: of the same shape.
    """
    held = np.flatnonzero(np.any([label.any(axis=(0, 1)) for label in labels], axis=0))
    places = held if len(held) else np.arange(image.shape[2])
    places = places[np.linspace(0, len(places) - 1, min(SHOWN, len(places))).round().astype(int)]
    low, high = np.percentile(image, (0.5, 99.5))
    grey = (image - low) / max(float(high - low), 1e-12)
    rows = [np.concatenate([_upright(coloured(grey[..., k], one[..., k])) for k in places], axis=1) for one in labels]
    enlarged = -(-LEAST_SIDE // max(image.shape[:2]))
    return np.concatenate(rows).repeat(enlarged, axis=0).repeat(enlarged, axis=1)


def _upright(slice_: np.ndarray) -> np.ndarray:
    """Anterior up, for axes that rise to the right and to the front."""
    return np.flipud(np.swapaxes(slice_, 0, 1))
