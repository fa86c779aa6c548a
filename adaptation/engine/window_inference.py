"""Segmenting whole slices by windows: first in the middle, then where the structures of the volume were found."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import SlidingWindowInferer
from scipy import ndimage
from torch import Tensor, nn

from ..labelled_slices import foreground_dice, parts_of
from .random_appearance import standardised
from .training_plan import TrainingPlan

WINDOWS_AT_ONCE = 32
SHIFTS = ((3, 0), (-3, 0), (0, 3), (0, -3))  # rows and columns; odd, so that pixels are folded and halved differently
FIRST_SHIFTED_VIEW = 8
SHIFTED_VIEWS = tuple(range(FIRST_SHIFTED_VIEW, FIRST_SHIFTED_VIEW + len(SHIFTS)))


@torch.no_grad()
def window_probabilities(
    network: nn.Module,
    images: Tensor,
    plan: TrainingPlan,
    *,
    volume: np.ndarray | None = None,
    views: tuple[int, ...] = (0,),
) -> Tensor:
    """Probabilities of slices. All slices of a volume have the same window.

    Args:
        network: windows (B, C, W, W) with mean 0 and deviation 1 to logits (B, classes, W, W), in evaluation mode; a
            3-D network windows (B, C, D, W, W) to logits (B, classes, D, W, W).
        images: (N, C, S, S) in [0, 1]; smaller slices than the plan's windows are padded with zeros.
        plan: the network's.
        volume: (N,) integer, the volume that each slice belongs to; None: all slices are of one volume.
        views: which views are averaged: 0 to 3 quarter turns, 4 to 7 their mirror images, left to right, and 8 to 11
            shifted by a few pixels.

    Returns: (N, classes, S, S) float32, summing to one over the classes; background outside of the window.
    """
    size, window = images.shape[-1], plan.window
    missing = max(0, window - size)
    first = missing // 2
    padded = F.pad(images, (first, missing - first, first, missing - first))
    parts = parts_of(len(images), volume)
    room = padded.shape[-1] - window
    corners = [(room // 2, room // 2)] * len(parts)

    def probabilities(chosen: list[int]) -> list[Tensor]:
        """(n, classes, W, W) in the windows of the volumes with these indices."""
        places = [(parts[index], *corners[index]) for index in chosen]
        shown = [padded[part, :, row : row + window, column : column + window] for part, row, column in places]
        return averaged_views(network, shown, plan, views=views)

    found = probabilities(list(range(len(parts))))
    if room:
        centred = [_centred(values, place, room=room) for values, place in zip(found, corners, strict=True)]
        moved = [index for index, place in enumerate(centred) if place != corners[index]]
        corners = centred
        if moved:
            for index, values in zip(moved, probabilities(moved), strict=True):
                found[index] = values
    result = torch.zeros(len(images), plan.classes, *padded.shape[2:], device=images.device)
    result[:, 0] = 1
    for part, values, (row, column) in zip(parts, found, corners, strict=True):
        result[part, :, row : row + window, column : column + window] = values
    return result[:, :, first : first + size, first : first + size]


def averaged_views(
    network: nn.Module, windows: list[Tensor], plan: TrainingPlan, *, views: tuple[int, ...]
) -> list[Tensor]:
    """Mean probabilities over turned, mirrored and shifted views.

    Args:
        network, plan, views: see `window_probabilities`.
        windows: of each volume, (n, C, W, W) in [0, 1].

    Returns: of each volume, (n, classes, W, W).
    """
    shown = torch.cat(windows)
    counts = [len(part) for part in windows]
    total = torch.zeros(())
    for view in views:
        turned = turn(shown, view)
        if plan.dimensions == 2:
            parts = turned.split(WINDOWS_AT_ONCE)
            found = torch.cat([network(standardised(part, colour=plan.colour)).float().softmax(1) for part in parts])
        else:
            found = torch.cat([_stack_probabilities(network, part, plan) for part in turned.split(counts)])
        total = total + turn_back(found, view)
    return list((total / len(views)).split(counts))


def turn(images: Tensor, view: int) -> Tensor:
    """Images (N, C, W, W) as a view shows them: turned, then mirrored; or shifted, where what leaves at one side comes
    in at the other. See `window_probabilities`."""
    if view >= FIRST_SHIFTED_VIEW:
        return images.roll(SHIFTS[view - FIRST_SHIFTED_VIEW], (2, 3))
    turned = torch.rot90(images, view % 4, (2, 3))
    return turned.flip(2) if view >= 4 else turned


def turn_back(images: Tensor, view: int) -> Tensor:
    """The inverse of `turn`, (N, C, W, W)."""
    if view >= FIRST_SHIFTED_VIEW:
        rows, columns = SHIFTS[view - FIRST_SHIFTED_VIEW]
        return images.roll((-rows, -columns), (2, 3))
    return torch.rot90(images.flip(2) if view >= 4 else images, -(view % 4), (2, 3))


def view_agreement(label_maps: list[Tensor], mean_labels: Tensor, classes: int) -> float:
    """Mean foreground Dice, in [0, 1], of the label maps (N, S, S) of single views with that of their mean.

    Among independently trained segmenters it ranks Dice at a site without labels: rank correlation .94 and .66 at the
    two sites of the study. NaN if nothing was found.
    """
    return float(np.mean([foreground_dice(labels, mean_labels, classes) for labels in label_maps]))


def _stack_probabilities(network: nn.Module, stack: Tensor, plan: TrainingPlan) -> Tensor:
    """Probabilities (n, classes, W, W) of the windows (n, C, W, W) in [0, 1] of one volume by a 3-D network."""

    def logits(part: Tensor) -> Tensor:
        """Of (1, C, D, W, W): a whole stack is standardised, with the air beyond the volume's ends, as in training."""
        return network(standardised(part, colour=plan.colour))

    inferer = SlidingWindowInferer(
        (plan.slices, plan.window, plan.window), sw_batch_size=1, overlap=0.5, mode="gaussian", cval=0.0
    )
    return inferer(stack.movedim(0, 1)[None], logits)[0].movedim(0, 1).float().softmax(1)


def _centred(found: Tensor, corner: tuple[int, int], *, room: int) -> tuple[int, int]:
    """Corner of the window that is centred on what was found, (n, classes, W, W), in the window at `corner`; the same
    corner if nothing was found."""
    centre = largest_object_centre(found.argmax(1).cpu().numpy() > 0)
    if centre is None:
        return corner
    row, column = (
        int(np.clip(round(start + middle - found.shape[-1] / 2), 0, room))
        for start, middle in zip(corner, centre, strict=True)
    )
    return row, column


def largest_object_centre(foreground: np.ndarray) -> tuple[float, float] | None:
    """Row and column of the centre of the largest connected object in a volume (N, W, W) bool; None without any."""
    objects, count = ndimage.label(foreground)
    if not count:
        return None
    largest = 1 + int(np.argmax(np.bincount(objects.ravel())[1:]))
    _, row, column = ndimage.center_of_mass(objects == largest)
    return float(row), float(column)
