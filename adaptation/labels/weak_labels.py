"""Weak labels made from dense labels, for studies of how much annotation a method needs.

Each converter takes a slice (S, S) of label values and returns a label map of a kind that `fedfactory prepare` reads.
Real annotators are less regular; if a data set has its own scribbles, as ACDC has, use those.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from scipy import ndimage
from skimage.morphology import skeletonize

from ...common.files import atomic_folder
from ...common.progress import track
from ...errors import UsageError, VolumeError
from ...imaging.accounting.account import Accounting, Wanted, account_for
from ...imaging.case_files import CaseFiles, file_name
from ...imaging.cases import find_cases
from ...imaging.formats.label_values import LabelValues, suggestion
from ...imaging.image_reader import read_image
from ...imaging.label_maps import read_label_map
from ...imaging.pictures.decoding import write_picture
from ...imaging.pictures.picture_image import is_picture_file
from ...imaging.slice_choices import UNLABELLED
from ...imaging.volume_files import read_volume, write_volume
from ...imaging.volumes import Volume
from .boxes import boxes_of, is_inside

POINT_RADIUS = 1.5  # pixels
BLOCKS_PER_SLICE, BLOCK_SIDE = 3, 5  # squares, and their side in pixels
BACKGROUND_DISTANCE = 4.0  # smallest distance of background scribbles from the structures, pixels
UNLABELLED_IMAGE = "an image without labels, which is not copied"
SCRIBBLE_LENGTH = 0.7  # share of a structure's skeleton that a scribble covers


def points(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mark a small disc inside each structure and one in the background.

    Takes label values (S, S) uint8; returns (S, S) uint8 with 255 where nothing is marked.
    """
    marked = np.full(labels.shape, UNLABELLED, np.uint8)
    grid = np.indices(labels.shape)
    for value, centre in _interior_pixels(labels, rng).items():
        disc = np.hypot(*(axis - at for axis, at in zip(grid, centre, strict=True))) <= POINT_RADIUS
        marked[disc & (labels == value)] = value
    return marked


def scribbles(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mark a thin curve inside each structure, and one around all structures.

    Takes label values (S, S) uint8; returns (S, S) uint8 with 255 where nothing is marked.
    """
    marked = np.full(labels.shape, UNLABELLED, np.uint8)
    for value in np.unique(labels[labels > 0]):
        line = skeletonize(_largest_component(labels == value))
        marked[_piece_of(line, SCRIBBLE_LENGTH, rng)] = value
    outside = ndimage.distance_transform_edt(labels == 0)
    ring = (outside >= BACKGROUND_DISTANCE) & (outside < BACKGROUND_DISTANCE + 1)
    if not (labels > 0).any():
        ring = np.zeros(labels.shape, bool)
        ring[len(ring) // 2] = True
    marked[_piece_of(ring, SCRIBBLE_LENGTH, rng)] = 0
    return marked


def blocks(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mark a few small squares, densely labelled, centred on pixels of the structures.

    Takes label values (S, S) uint8; returns (S, S) uint8 with 255 outside of the squares.
    """
    marked = np.full(labels.shape, UNLABELLED, np.uint8)
    inside = np.argwhere(labels > 0)
    centres = inside if len(inside) else np.argwhere(labels == 0)
    for row, column in centres[rng.choice(len(centres), min(BLOCKS_PER_SLICE, len(centres)), replace=False)]:
        square = tuple(slice(max(0, at - BLOCK_SIDE // 2), at + BLOCK_SIDE // 2 + 1) for at in (row, column))
        marked[square] = labels[square]
    return marked


def boxes(labels: np.ndarray, rng: np.random.Generator, *, margin: int = 0) -> np.ndarray:
    """Paint one box around each structure, from the largest box to the smallest.

    A box inside of another one stays inside of it, so that it does not hide the other one.

    Args:
        labels: (S, S) uint8 label values.
        rng: draws how far each side is moved.
        margin: largest number of pixels by which a side is moved outwards.

    Returns: (S, S) uint8, 0 outside of all boxes.
    """
    marked = np.zeros(labels.shape, np.uint8)
    found = boxes_of(labels, int(labels.max()) + 1)
    wide = {
        value: tuple(
            _widened(side, length, margin=margin, rng=rng) for side, length in zip(box, labels.shape, strict=True)
        )
        for value, box in found.items()
    }
    for value, box in found.items():
        for around in found.values():
            if around != box and is_inside(box, around):
                sides = zip(wide[value], box, around, strict=True)
                wide[value] = tuple(_kept_inside(moved, own, outer) for moved, own, outer in sides)
    for value in sorted(wide, key=lambda value: -np.prod([side.stop - side.start for side in wide[value]])):
        marked[wide[value]] = value
    return marked


def _kept_inside(moved: slice, own: slice, outer: slice) -> slice:
    """A side of a widened box that leaves a pixel of the box around it, and covers the structure's own side."""
    return slice(
        max(moved.start, min(own.start, outer.start + 1)),
        min(moved.stop, max(own.stop, outer.stop - 1)),
    )


CONVERTERS: dict[str, Callable[[np.ndarray, np.random.Generator], np.ndarray]] = {
    "point": points,
    "scribble": scribbles,
    "block": blocks,
    "box": boxes,
}


def weaken(volume: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """Convert a dense label map to weak labels, slice by slice along its third axis.

    Args:
        volume: (X, Y, Z) label values, whole numbers from 0 to 254.
        kind: one of CONVERTERS.
        seed: of everything random.

    Returns: (X, Y, Z) uint8; except for boxes, 255 where nothing is annotated.
    Raises: UsageError for an unknown kind; VolumeError for a value above 254, which would read as another one.
    """
    _check_kind(kind)
    if (highest := int(volume.max(initial=0))) >= UNLABELLED:
        raise VolumeError(
            f"holds label {highest}; {UNLABELLED - 1} is the highest that is expected, and {UNLABELLED} means that "
            "nobody annotated: give the labels other values"
        )
    volume = volume.astype(np.uint8)
    rng = np.random.default_rng(seed)
    return np.stack([CONVERTERS[kind](volume[..., z], rng) for z in range(volume.shape[2])], axis=2)


def weaken_folder(
    source: str | Path,
    out: str | Path,
    kind: str,
    *,
    image_key: str = "image",
    label_key: str = "label",
    values: LabelValues | None = None,
    colours: Mapping[int | tuple[int, int, int], int] | None = None,
    seed: int = 0,
    tell: Callable[[Accounting], None] | None = None,
) -> int:
    """Write a copy of a data set with weak labels, for studies; cases without labels are left out.

    Args:
        source: a data set that `fedfactory prepare` reads.
        out: new folder, with SUBJECT/image (image0, image1, ... of several channels) and SUBJECT/label.
        kind: see `weaken`. Prepare the copy with the same kind, and with 255 as the unlabelled value unless it is box.
        image_key: modality folder of the images; several, separated by commas, see `find_cases`.
        label_key: modality folder of the label maps.
        values: class of each value in label maps of volumes; None takes the values for class numbers.
        colours: label of each colour or grey level of a picture's masks, see `read_mask`.
        seed: of everything random.
        tell: called with what becomes of every entry of the data set, before the first case is copied.

    Returns: number of cases. Raises: UsageError or VolumeError; then nothing is written.
    """
    _check_kind(kind)
    found = find_cases(Path(source), image_key=image_key, label_key=label_key)
    for problem in found.problems.values():
        raise UsageError(problem)
    labelled = [case for case in found.cases if case.labels]
    if not labelled:
        raise UsageError(f"{source}: no case has a label map under '{label_key}'; choose another label_key")
    names = [file_name(case.name) for case in labelled]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{source}: two cases would be '{twice[0]}' in the copy; rename one of them")
    if tell is not None:
        without = {
            os.path.abspath(path): UNLABELLED_IMAGE for case in found.cases if not case.labels for path in case.files
        }
        wanted = Wanted(image_keys=tuple(image_key.split(",")), label_key=label_key, other=without)
        tell(account_for(source, replace(found, cases=labelled), wanted))
    with atomic_folder(out) as folder:
        for number, case in enumerate(track(labelled, f"making {kind} labels")):
            image = read_image(case.channels)
            label = read_label_map(case, image, colours=colours, values=values).volume
            if (highest := int(label.data.max())) >= UNLABELLED:
                raise VolumeError(
                    f"{case.labels[0].path}: holds label {highest}; {UNLABELLED - 1} is the highest; give every value "
                    f"its class, such as {suggestion(np.unique(label.data))}"
                )
            weak = weaken(label.data, kind, seed=seed + number)
            _write_copy(folder / file_name(case.name), case, image.volume(weak), kind=kind)
    return len(labelled)


def _write_copy(folder: Path, case: CaseFiles, labels: Volume, *, kind: str) -> None:
    """Image and new labels of a case as SUBJECT/image and SUBJECT/label; several channels as image0, image1, ..."""
    several = len(case.channels) > 1
    for number, files in enumerate(case.channels):
        part = folder / (f"image{number}" if several else "image")
        if files is not None and is_picture_file(files):
            part.mkdir(parents=True)
            shutil.copyfile(files, part / f"image{files.suffix.lower()}")
        elif files is not None:
            write_volume(part / "image.nii.gz", read_volume(files))
    if is_picture_file(case.channels[0]):
        (folder / "label").mkdir()
        write_picture(folder / "label" / f"{kind}.png", labels.data[..., 0])
    else:
        write_volume(folder / "label" / f"{kind}.nii.gz", labels)


def _check_kind(kind: str) -> None:
    if kind not in CONVERTERS:
        raise UsageError(f"kind is '{kind}'; choose one of {', '.join(CONVERTERS)}")


def _interior_pixels(labels: np.ndarray, rng: np.random.Generator) -> dict[int, tuple[int, int]]:
    """By value of the labels (S, S), a random pixel deeper inside than half of the largest distance to the border."""
    found = {}
    for value in np.unique(labels):
        depth = ndimage.distance_transform_edt(np.pad(labels == value, 1))[1:-1, 1:-1]
        candidates = np.argwhere(depth > depth.max() / 2)
        found[int(value)] = tuple(candidates[rng.integers(len(candidates))])
    return found


def _largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest connected component of a mask (S, S), as a mask of the same shape."""
    parts, count = ndimage.label(mask)
    return mask if count < 2 else parts == 1 + int(np.argmax(np.bincount(parts.ravel())[1:]))


def _piece_of(line: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """A share of the pixels of a curve, given as a mask (S, S): those nearest to a random pixel of it."""
    pixels = np.argwhere(line)
    if not len(pixels):
        return line
    distance = np.abs(pixels - pixels[rng.integers(len(pixels))]).sum(1)
    kept = pixels[np.argsort(distance, kind="stable")[: max(1, round(share * len(pixels)))]]
    piece = np.zeros_like(line)
    piece[tuple(kept.T)] = True
    return piece


def _widened(side: slice, length: int, *, margin: int, rng: np.random.Generator) -> slice:
    """A side of a box with both ends moved outwards at random by up to `margin`, within an axis of `length` pixels."""
    before, after = rng.integers(0, margin + 1, 2)
    return slice(max(0, side.start - int(before)), min(length, side.stop + int(after)))
