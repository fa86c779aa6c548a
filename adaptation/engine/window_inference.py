"""Segmenting whole slices by windows: first in the middle, then where the structures were found."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

from .random_appearance import standardised

WINDOWS_AT_ONCE = 32
PASSES = 2  # the window of the second one is centred on what the first one found


@torch.no_grad()
def volume_probabilities(network: nn.Module, images: Tensor, *, window: int, views: int = 1) -> Tensor:
    """Probabilities of the slices of one volume.

    Args:
        network: windows (B, 1, W, W) with mean 0 and deviation 1 to logits (B, classes, W, W), in evaluation mode.
        images: (N, 1, S, S) in [0, 1], all slices of the volume.
        window: pixels per side of the windows; smaller slices are padded with zeros.
        views: number of views that are averaged, 1 to 8: quarter turns, then their mirror images.

    Returns: (N, classes, S, S) float32, summing to one over the classes; background outside of the window.
    """
    size = images.shape[-1]
    missing = max(0, window - size)
    first = missing // 2
    padded = F.pad(images, (first, missing - first, first, missing - first))
    row = column = (padded.shape[-1] - window) // 2
    for _ in range(PASSES):
        found = averaged_views(network, padded[:, :, row : row + window, column : column + window], views=views)
        centre = largest_object_centre(found.argmax(1).numpy() > 0)
        placed = (row, column)
        if centre is None:
            break
        row, column = (
            int(np.clip(round(start + place - window / 2), 0, padded.shape[-1] - window))
            for start, place in zip(placed, centre, strict=True)
        )
    row, column = placed
    result = torch.zeros(len(images), found.shape[1], *padded.shape[2:])
    result[:, 0] = 1
    result[:, :, row : row + window, column : column + window] = found
    return result[:, :, first : first + size, first : first + size]


def averaged_views(network: nn.Module, windows: Tensor, *, views: int) -> Tensor:
    """Mean probabilities (N, classes, W, W) of `views` turned and mirrored views of windows (N, 1, W, W)."""
    total: Tensor | float = 0.0
    for view in range(views):
        turns, mirrored = view % 4, view >= 4
        shown = torch.rot90(standardised(windows), turns, (2, 3))
        shown = shown.flip(3) if mirrored else shown
        found = torch.cat([network(part).float().softmax(1) for part in shown.split(WINDOWS_AT_ONCE)])
        found = found.flip(3) if mirrored else found
        total = total + torch.rot90(found, -turns, (2, 3))
    return total / views


def largest_object_centre(foreground: np.ndarray) -> tuple[float, float] | None:
    """Row and column of the centre of the largest connected object in a volume (N, W, W) bool; None without any."""
    objects, count = ndimage.label(foreground)
    if not count:
        return None
    largest = 1 + int(np.argmax(np.bincount(objects.ravel())[1:]))
    _, row, column = ndimage.center_of_mass(objects == largest)
    return float(row), float(column)
