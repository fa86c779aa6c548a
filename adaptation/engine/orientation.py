"""How alike the labelled structures of a site lie in the plane of the slice; rotation and mirroring follow from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from ..labelled_slices import LabelledSlices
from .labelled_volumes import volumes_of

LEAST_VOLUMES = 3  # fewer tell nothing about others
LEAST_DISTANCE = 0.25  # of two structures' centres, as a share of the extent, for their direction to be an orientation
LARGEST_RATIO = 0.85  # of the short to the long axis of all structures, for the long one to be an orientation


def orientation_spread(parts: Sequence[LabelledSlices]) -> tuple[float, float] | None:
    """Circular standard deviations of the structures' orientation over the volumes, radians.

    The orientation of a volume is the direction from one structure's centre to another's, of the two that are furthest
    apart on average; where structures lie around one centre, the direction of the long axis of all of them.

    Args:
        parts: labelled slices of one size and the same classes.

    Returns: the deviation over the volumes, and over the volumes and their mirror images together; None where the
        labels show no orientation, or there are fewer than three volumes.
    """
    volumes = [data.labels[part] for data in parts for part in volumes_of(data)]
    volumes = [labels for labels in volumes if labels.any()]
    if len(volumes) < LEAST_VOLUMES:
        return None
    found = _directions(volumes, parts[0].classes)
    if found is None:
        return None
    angles, period = found
    factor = 2 * math.pi / period
    turns = np.exp(1j * factor * angles)
    both = np.concatenate([turns, turns.conj()])  # mirroring exchanges an angle and its negative
    return _deviation(turns) / factor, _deviation(both) / factor


def _directions(volumes: Sequence[np.ndarray], classes: int) -> tuple[np.ndarray, float] | None:
    """Angles (volumes,) of the volumes' labels (n, S, S), radians, and their period: 2 pi for directions from one
    structure to another, pi for axes."""
    centres = np.array([_centres(labels, classes) for labels in volumes])  # (volumes, classes - 1, 2)
    axes = [_axes(labels) for labels in volumes]
    extent = float(np.mean([4 * long for _, long, _ in axes]))  # about the length of an ellipse with this deviation
    best, furthest = None, LEAST_DISTANCE * extent
    for first, second in combinations(range(classes - 1), 2):
        arrows = centres[:, second] - centres[:, first]
        arrows = arrows[~np.isnan(arrows).any(1)]
        distance = float(np.linalg.norm(arrows, axis=1).mean()) if len(arrows) >= LEAST_VOLUMES else 0.0
        if distance > furthest:
            best, furthest = np.arctan2(arrows[:, 0], arrows[:, 1]), distance
    if best is not None:
        return best, 2 * math.pi
    if float(np.mean([short / long if long else 1.0 for short, long, _ in axes])) > LARGEST_RATIO:
        return None
    return np.array([angle for _, _, angle in axes]), math.pi


def _centres(labels: np.ndarray, classes: int) -> np.ndarray:
    """(classes - 1, 2) row and column of each class's centre in (n, S, S); NaN for absent classes."""
    found = np.full((classes - 1, 2), np.nan)
    for label in range(1, classes):
        _, rows, columns = np.nonzero(labels == label)
        if len(rows):
            found[label - 1] = rows.mean(), columns.mean()
    return found


def _axes(labels: np.ndarray) -> tuple[float, float, float]:
    """Standard deviations along the short and long axis, pixels, and the long axis's angle, radians, of the outline of
    all structures in (n, S, S)."""
    points = np.stack(np.nonzero(labels.any(0)))
    values, vectors = np.linalg.eigh(np.cov(points)) if points.shape[1] > 1 else (np.zeros(2), np.eye(2))
    short, long = np.sqrt(values.clip(0))
    return float(short), float(long), math.atan2(vectors[0, 1], vectors[1, 1])


def _deviation(turns: np.ndarray) -> float:
    """Circular standard deviation of unit vectors (n,) in the complex plane (Mardia and Jupp 2000), radians."""
    length = min(1.0, abs(turns.mean()))
    return math.sqrt(-2 * math.log(length)) if length > 0 else math.inf
