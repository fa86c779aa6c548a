"""Raw data sets of nnU-Net and of the Medical Segmentation Decathlon, AMOS and others that are laid out alike.

They have images in `imagesTr`, label maps in `labelsTr`, and mostly a `dataset.json`. Four digits at the end of an
image's name are a channel, as in `case_0000.nii.gz`, or number the cases.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UsageError
from ..case_files import Found, ImageFile, LabelFile, Unusable, printable
from ..pictures.decoding import is_mask, is_picture
from ..slice_choices import MAX_CHANNELS
from ..volume_files import is_volume
from .description import DESCRIPTION, Description, name_of, read_description
from .folders import entries
from .label_names import is_label_name, without_label_words
from .wanted import LABEL_UNWANTED, LABEL_WITHOUT_IMAGE, Wanted, add_case, refuse_missing

IMAGES, LABELS = "imagesTr", "labelsTr"
OTHER_FOLDERS = {
    "imagesTs": "images for testing; prepare that folder by itself",
    "labelsTs": "label maps of images for testing",
    "imagesVa": "images for validation; prepare that folder by itself",
    "labelsVa": "label maps of images for validation",
}
NUMBERED = re.compile(r"(.+)_(\d{4})")  # nnU-Net names channels case_0000.nii.gz, case_0001.nii.gz, ...


@dataclass
class _Case:
    """The files of a case: images by number of the channel, and the name of the file of its label map."""

    label: str
    channels: dict[int, Path] = field(default_factory=dict)


def is_nnunet(source: Path) -> bool:
    """Whether a folder is such a data set."""
    return (source / DESCRIPTION).is_file() or ((source / IMAGES).is_dir() and (source / LABELS).is_dir())


def find_nnunet(source: Path, wanted: Wanted) -> Found:
    """The cases of a data set of volumes, or of pictures.

    Args:
        source: the data set.
        wanted: of the images the numbers of channels; by default all.

    Raises: UsageError if the description is damaged, two files are one channel, or no label map fits an image.
    """
    described = read_description(source)
    if not (source / IMAGES).is_dir():
        raise UsageError(f"{source}: has a {DESCRIPTION} but no {IMAGES} folder; add the images")
    inside = entries(source / IMAGES)
    volumes = [path for path in inside if is_volume(path)]
    images = volumes or [path for path in inside if is_picture(path)]
    is_label = is_volume if volumes else is_mask
    masks = [path for path in entries(source / LABELS) if is_label(path)]
    labels = _by_name(masks)
    astray = _label_maps_among(images, {*labels, *described.listed})
    cases, beyond = _cases([path for path in images if path not in astray], labels, described)
    chosen = _chosen(wanted, cases)
    found = Found(passed_over={p: "a channel that the description does not name" for p in beyond})
    found.passed_over |= {path: f"looks like a label map, among the images; {LABELS} is for these" for path in astray}
    if wanted.label_key is not None:
        found.class_names = dict(described.class_names)
    for name, case in cases.items():
        where = source / IMAGES / name
        channels: dict[str, ImageFile | None] = {str(number): case.channels.get(number) for number in chosen}
        for number, path in case.channels.items():
            if number not in chosen:
                found.passed_over[path] = f"channel {number}, which is not chosen"
        given = labels.get(case.label, []) if wanted.label_key is not None else []
        try:
            if len(given) > 1:
                raise Unusable(f"{given[0]} and {given[1]}: are both label maps of {name}; keep one of them")
            if any(channels.values()):
                refuse_missing(where, channels, fill_missing=wanted.fill_missing)
            add_case(found, name, channels, tuple(map(LabelFile, given)))
        except Unusable as error:
            found.problems[printable(name)] = str(error)
    _account_for_labels(source, masks, cases, wanted=wanted, found=found)
    if remarks := [*described.remarks, *(_joined(described, cases) if volumes else [])]:
        found.remarks[DESCRIPTION] = "; it ".join(remarks)
    found.passed_over.update({source / name: text for name, text in OTHER_FOLDERS.items() if (source / name).is_dir()})
    return found


def _label_maps_among(images: Sequence[Path], known: Collection[str]) -> list[Path]:
    """Files among the images that have the name of a label map of one of them, and are no known image."""
    names = {name for path in images for name in (name_of(path), NUMBERED.sub(r"\1", name_of(path)))}
    return [
        path
        for path in images
        if is_label_name(name_of(path)) and name_of(path) not in known and without_label_words(name_of(path)) in names
    ]


def _by_name(labels: Sequence[Path]) -> dict[str, list[Path]]:
    """Label maps by the names of their files."""
    names: dict[str, list[Path]] = {}
    for path in labels:
        names.setdefault(name_of(path), []).append(path)
    return names


def _cases(
    images: Sequence[Path], labels: Collection[str], described: Description
) -> tuple[dict[str, _Case], list[Path]]:
    """The images by case and channel, and those that are a channel too many.

    Four digits at the end of a name number the cases where the description lists such an image, or a label map has such
    a name; and where there can be no such channel. But if all that has the four digits is a label map of the first
    channel, its name has the digits too.
    """
    beyond: list[Path] = []
    limit = described.channels or MAX_CHANNELS
    groups: dict[str, dict[int, list[Path]]] = {}
    cases: dict[str, _Case] = {}

    def add(name: str, label: str, number: int, path: Path) -> None:
        case = cases.setdefault(name, _Case(label))
        if (other := case.channels.setdefault(number, path)) != path:
            raise UsageError(f"{other} and {path}: are both channel {number} of {name}; keep one of them")

    for path in images:
        if match := NUMBERED.fullmatch(name_of(path)):
            groups.setdefault(match[1], {}).setdefault(int(match[2]), []).append(path)
        else:
            add(name_of(path), _label_of(name_of(path), labels), 0, path)
    any_first = any(0 in numbers for numbers in groups.values())  # channels begin at 0
    for base, numbers in groups.items():
        known = {n for n in numbers if f"{base}_{n:04d}" in labels or f"{base}_{n:04d}" in described.listed}
        named = base in labels or base in described.listed
        own = not named and (not known <= {0} or max(numbers) >= limit or not any_first)
        for number, paths in numbers.items():
            for path in paths:
                if own:
                    add(name_of(path), _label_of(name_of(path), labels), 0, path)
                elif number >= limit:
                    beyond.append(path)
                else:
                    first = f"{base}_0000"
                    add(base, first if not named and first in labels else _label_of(base, labels), number, path)
    return cases, beyond


def _label_of(case: str, labels: Collection[str]) -> str:
    """The name of the label map of a case: its own, or its own with a word such as `_seg`."""
    if case in labels:
        return case
    return next((label for label in sorted(labels) if without_label_words(label) == case), case)


def _chosen(wanted: Wanted, cases: dict[str, _Case]) -> list[int]:
    """Numbers of the wanted channels."""
    if wanted.any_image:
        return sorted({number for case in cases.values() for number in case.channels})
    for key in wanted.keys:
        if not key.isdecimal():
            raise UsageError(
                f"image_key is '{key}'; an nnU-Net data set numbers its channels, choose numbers such as 0 or 0,1"
            )
    return [int(key) for key in wanted.keys]


def _account_for_labels(
    source: Path, labels: Sequence[Path], cases: dict[str, _Case], *, wanted: Wanted, found: Found
) -> None:
    """Name the label maps of no case, and the cases without one.

    Raises: UsageError if there are label maps but none of an image.
    """
    if wanted.label_key is None:
        found.passed_over.update({path: LABEL_UNWANTED for path in labels})
        return
    of_cases = {case.label for case in cases.values()}
    others = [path for path in labels if name_of(path) not in of_cases]
    if labels and len(others) == len(labels) and cases:
        example = next(iter(cases))
        raise UsageError(
            f"{source / LABELS}: none of its {len(labels)} label maps, such as {labels[0].name}, has the name of a "
            f"case in {IMAGES}, such as {example}; rename them, or leave them out (--label-kind none)"
        )
    found.passed_over.update({path: LABEL_WITHOUT_IMAGE for path in others})
    if labels:
        text = f"has no label map in {LABELS}, so it counts as unlabelled"
        found.remarks.update({case.name: text for case in found.cases if not case.labels})


def _joined(described: Description, cases: dict[str, _Case]) -> list[str]:
    """Say that a data set of the Decathlon keeps its channels in one file."""
    if (described.channels or 1) > 1 and cases and all(list(case.channels) == [0] for case in cases.values()):
        text = f"names {described.channels} channels, but every case has one file; if it is 4-D, --frames N chooses one"
        return [text]
    return []
