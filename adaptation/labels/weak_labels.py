"""Weaker labels made from dense ones, for studies of what annotation is worth.

Slices (S, S) of label values in, label maps of the kinds that `fedfactory prepare` reads out. Real annotators are less
regular; where a data set brings its own scribbles, as ACDC does, take those.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.morphology import skeletonize

from ...common.files import atomic_folder
from ...common.progress import track
from ...errors import UsageError
from ...imaging.cases import find_cases
from ...imaging.slice_format import UNLABELLED
from ...imaging.volume_files import read_volume, write_volume
from ...imaging.volumes import Volume
from .candidate_labels import boxes_of

POINT_RADIUS = 1.5  # pixels
BLOCKS, BLOCK_SIDE = 3, 5  # squares in a slice, and their side
BACKGROUND_DISTANCE = 4.0  # pixels from the structures, at least, at which background is marked
KEPT = 0.7  # of a structure's skeleton


def points(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small disc inside of every structure and one in the background."""
    marked = np.full(labels.shape, UNLABELLED, np.uint8)
    grid = np.indices(labels.shape)
    for value, place in _places(labels, rng).items():
        disc = np.hypot(*(axis - at for axis, at in zip(grid, place, strict=True))) <= POINT_RADIUS
        marked[disc & (labels == value)] = value
    return marked


def scribbles(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A thin curve inside of every structure, and one around them."""
    marked = np.full(labels.shape, UNLABELLED, np.uint8)
    for value in np.unique(labels[labels > 0]):
        line = skeletonize(_largest_part(labels == value))
        marked[_part_of(line, KEPT, rng)] = value
    outside = ndimage.distance_transform_edt(labels == 0)
    ring = (outside >= BACKGROUND_DISTANCE) & (outside < BACKGROUND_DISTANCE + 1)
    if not (labels > 0).any():
        ring = np.zeros(labels.shape, bool)
        ring[len(ring) // 2] = True
    marked[_part_of(ring, KEPT, rng)] = 0
    return marked


def blocks(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A few small squares, densely labelled, centred on the structures."""
    marked = np.full(labels.shape, UNLABELLED, np.uint8)
    inside = np.argwhere(labels > 0)
    among = inside if len(inside) else np.argwhere(labels == 0)
    for row, column in among[rng.choice(len(among), min(BLOCKS, len(among)), replace=False)]:
        square = tuple(slice(max(0, at - BLOCK_SIDE // 2), at + BLOCK_SIDE // 2 + 1) for at in (row, column))
        marked[square] = labels[square]
    return marked


def boxes(labels: np.ndarray, rng: np.random.Generator, *, margin: int = 0) -> np.ndarray:
    """One box around every structure, painted from the largest to the smallest.

    Args:
        margin: each side is moved outwards by up to so many pixels, at random.
    """
    marked = np.zeros(labels.shape, np.uint8)
    found = boxes_of(labels, int(labels.max()) + 1)
    wide = {value: tuple(_widened(side, margin, length, rng) for side, length in zip(box, labels.shape, strict=True))
            for value, box in found.items()}  # fmt: skip
    for value in sorted(wide, key=lambda one: -np.prod([side.stop - side.start for side in wide[one]])):
        marked[wide[value]] = value
    return marked


CONVERTERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "point": points,
    "scribble": scribbles,
    "block": blocks,
    "box": boxes,
}


def weaken(volume: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """A dense label map (X, Y, Z) as one of another kind, slice by slice along its third axis; 255 where nobody would
    have annotated.

    Raises: UsageError for a kind that cannot be made.
    """
    if kind not in CONVERTERS:
        raise UsageError(f"dense labels become {', '.join(CONVERTERS)}, not '{kind}'")
    rng = np.random.default_rng(seed)
    return np.stack([CONVERTERS[kind](volume[..., z], rng) for z in range(volume.shape[2])], axis=2)


def weaken_folder(source: str | Path, out: str | Path, kind: str, *, label_key: str = "label", seed: int = 0) -> int:
    """A copy of a data set with weaker labels, for studies; cases without labels are left out.

    Args:
        source: as `fedfactory prepare` reads it. out: new folder, SUBJECT/image and SUBJECT/label.
        kind: see `weaken`. Prepare the copy with it, and with 255 as the unlabelled value (but for boxes).

    Returns: number of cases. Raises: UsageError or VolumeError; then no folder is left.
    """
    if kind not in CONVERTERS:
        raise UsageError(f"dense labels become {', '.join(CONVERTERS)}, not '{kind}'")
    labelled = [case for case in find_cases(Path(source), label_key=label_key).cases if case.label is not None]
    if not labelled:
        raise UsageError(f"{source}: no case with a label map under '{label_key}'")
    with atomic_folder(out) as folder:
        for number, case in enumerate(track(labelled, f"making {kind} labels")):
            image, label = read_volume(case.image), read_volume(case.label, integer=True)
            weak = weaken(label.data.astype(np.uint8), kind, seed=seed + number)
            write_volume(folder / case.name / "image" / "image.nii.gz", image)
            write_volume(folder / case.name / "label" / f"{kind}.nii.gz", Volume(weak, label.affine))
    return len(labelled)


def _places(labels: np.ndarray, rng: np.random.Generator) -> dict[int, tuple[int, int]]:
    """By value, a pixel well inside: one of those at more than half of the largest distance to the border."""
    found = {}
    for value in np.unique(labels):
        depth = ndimage.distance_transform_edt(np.pad(labels == value, 1))[1:-1, 1:-1]
        candidates = np.argwhere(depth > depth.max() / 2)
        found[int(value)] = tuple(candidates[rng.integers(len(candidates))])
    return found


def _largest_part(mask: np.ndarray) -> np.ndarray:
    parts, count = ndimage.label(mask)
    return mask if count < 2 else parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))


def _part_of(line: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A piece of a curve: the pixels nearest to one of its own."""
    pixels = np.argwhere(line)
    if not len(pixels):
        return line
    far = np.abs(pixels - pixels[rng.integers(len(pixels))]).sum(1)
    kept = pixels[np.argsort(far, kind="stable")[: max(1, round(share * len(pixels)))]]
    piece = np.zeros_like(line)
    piece[tuple(kept.T)] = True
    return piece


def _widened(side: slice, margin: int, length: int, rng: np.random.Generator) -> slice:
    before, after = rng.integers(0, margin + 1, 2)
    return slice(max(0, side.start - int(before)), min(length, side.stop + int(after)))
