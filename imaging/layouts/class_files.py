"""Label maps with one file for each class beside the image, as TotalSegmentator publishes its data set."""

from __future__ import annotations

from pathlib import Path

from ..case_files import Found, LabelFile, Unusable, printable
from ..pictures.layout_names import LABEL_FOLDERS, plain
from ..volume_files import case_name
from .folders import folders, folders_below, volumes_of
from .label_names import is_label_name, without_label_words
from .wanted import LABEL_UNWANTED, Wanted, add_case, ask_for_image, refuse_missing, remark_unlabelled

DEPTH = 2  # of the cases
BACKGROUND = ("background", "bg")


def find_class_files(source: Path, wanted: Wanted) -> Found | None:
    """Cases of `SUBJECT/ct.nii.gz` and `SUBJECT/segmentations/*.nii.gz`.

    The files are masks, one for each class, which is named by the file. Classes are 1, 2, ... in the order of all names
    of the data set. A single file is a mask of its class where other cases have several, and otherwise a label map.

    Args:
        source: the data set, a part of it, or one case.
        wanted: of the images the name without ending, such as `ct` or `mri`; of the labels the name of their folder.

    Returns: cases; None if no folder has an image and a folder of masks beside it.
    Raises: UsageError if several images of a case could be meant.
    """
    holding = [folder for folder in folders_below(source, DEPTH) if volumes_of(folder)]
    masks = {folder: inner for folder in holding if (inner := _mask_folder(folder, wanted)) is not None}
    if not masks:
        return None
    beside = {folder.parent for folder in masks}
    cases = [folder for folder in holding if folder in masks or (folder.parent in beside and folder != source)]
    return _found(source, [folder for folder in cases if folder not in masks.values()], masks, wanted)


def _mask_folder(folder: Path, wanted: Wanted) -> Path | None:
    """The folder of masks in the folder of a case."""
    try:
        inner = folders(folder)
    except Unusable:
        return None
    holding = [sub for sub in inner if volumes_of(sub)]
    if wanted.chosen_label is not None:
        return next((sub for sub in holding if sub.name == wanted.chosen_label), None)
    usual = [sub for sub in holding if plain(sub.name) in LABEL_FOLDERS]
    images = {case_name(path).casefold() for path in volumes_of(folder)}
    of_images = any(
        without_label_words(case_name(path)).casefold() in images for sub in usual for path in volumes_of(sub)
    )
    return usual[0] if len(usual) == 1 == len(holding) and not of_images else None


def _found(source: Path, cases: list[Path], masks: dict[Path, Path], wanted: Wanted) -> Found:
    found = Found()
    twice = len({folder.name for folder in cases}) < len(cases)
    files = {folder: volumes_of(inner) for folder, inner in masks.items()}
    several = any(len(paths) > 1 for paths in files.values())
    names = sorted({case_name(path) for paths in files.values() for path in paths} if several else ())
    values = {name: n for n, name in enumerate((n for n in names if n.lower() not in BACKGROUND), start=1)}
    found.class_names = {value: printable(name) for name, value in values.items()} if wanted.label_key else {}
    found.class_files = several and wanted.label_key is not None
    keys = _keys(source, cases, wanted)
    for folder in cases:
        name = printable(folder.relative_to(source).as_posix() if twice else folder.name)
        images = {case_name(path).casefold(): path for path in volumes_of(folder) if not is_label_name(case_name(path))}
        channels = {key: images.get(key.casefold()) for key in keys} if keys else dict(list(images.items())[:1])
        for path in volumes_of(folder):
            if path not in channels.values():
                label = is_label_name(case_name(path))
                found.passed_over[path] = LABEL_UNWANTED if label else "another image than the chosen one"
        labels: tuple[LabelFile, ...] = ()
        if folder in masks and wanted.label_key is None:
            found.passed_over[masks[folder]] = "masks, which are not wanted"
        elif folder in masks:
            labels = _labels(files[folder], values, found) if several else (LabelFile(files[folder][0]),)
            lacking = len(values) - len(labels) if several else 0
            if lacking:
                found.remarks[name] = f"lacks the masks of {lacking} of {len(values)} classes, which count as absent"
        try:
            if any(channels.values()):
                refuse_missing(folder, channels, fill_missing=wanted.fill_missing)
            add_case(found, name, channels, labels)
        except Unusable as error:
            found.problems[name] = str(error)
    remark_unlabelled(found)
    return found


def _labels(paths: list[Path], values: dict[str, int], found: Found) -> tuple[LabelFile, ...]:
    """The masks of a case with the values of their classes."""
    labels: dict[int, LabelFile] = {}
    for path in paths:
        value = values.get(case_name(path))
        if value is None:
            found.passed_over[path] = "a mask of the background"
        elif value in labels:
            found.passed_over[path] = f"a second mask of a class, beside {labels[value].path.name}"
        else:
            labels[value] = LabelFile(path, value)
    return tuple(labels[value] for value in sorted(labels))


def _keys(source: Path, cases: list[Path], wanted: Wanted) -> tuple[str, ...]:
    """Names of the images that are wanted; none if every case has one, whatever its name.

    Raises: UsageError if a case has several and none was chosen.
    """
    if not wanted.any_image:
        return wanted.keys
    for folder in cases:
        names = [case_name(path) for path in volumes_of(folder) if not is_label_name(case_name(path))]
        if len(names) > 1:
            raise ask_for_image(source, "this data set", names)
    return ()
