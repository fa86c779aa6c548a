"""Images and label maps in folders that no other layout knows: what looks like a label map is never an image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..case_files import CaseFiles, Found, LabelFile, Unusable, printable
from ..pictures.layout_names import IMAGE_FOLDERS, LABEL_FOLDERS, plain
from ..volume_files import case_name
from .folders import entries, folders, volumes
from .label_names import (
    IMAGE_ENDING,
    SEPARATORS,
    before_ending,
    is_label_name,
    without_image_words,
    without_label_prefix,
    without_label_words,
)
from .wanted import Wanted, ask_for_image, refuse_missing

FEW = 8  # images of one subject, of which one must be chosen


def split_names(paths: Sequence[Path], label_key: str | None = None) -> tuple[list[Path], list[Path]]:
    """Images, and what looks like label maps by its name.

    Args:
        paths: volumes of one folder.
        label_key: another word that ends the names of label maps.
    """
    names = {case_name(path).casefold() for path in paths}

    def is_label(path: Path) -> bool:
        name = case_name(path)
        rest = without_label_prefix(name)
        return is_label_name(name, label_key) or (rest != name and rest.casefold() in names)

    labels = [path for path in paths if is_label(path)]
    return [path for path in paths if path not in labels], labels


def add_folder(folder: Path, prefix: str, wanted: Wanted, found: Found) -> None:
    """Add the cases of the volumes of a folder: one for each image, with the label map of its name.

    Images and label maps may also lie in folders of usual names, such as `images` and `labels`.

    Args:
        folder: holds images and label maps.
        prefix: of the names of cases; "" for none.
        wanted: images of several channels, or one of several images of a case, are chosen by the ends of their names.
        found: gets the cases, and what was passed over.

    Raises: Unusable if the folder cannot be read; UsageError if several images of one label map could be meant.
    """
    images, labels = split_names(volumes(folder), wanted.chosen_label)
    beside, there = _usual_folders(folder)
    if beside is not None:
        more, others = split_names(volumes(beside), wanted.chosen_label)
        images, labels = [*images, *more], [*labels, *others]
    if there is not None and (beside is not None or images):
        labels = [*labels, *volumes(there)]
    elif there is not None and not images:
        there = None
    matched = _match(folder, images, labels, wanted=wanted, found=found, prefix=prefix)
    of_labels = (
        matched.keys() if wanted.label_key is not None else _beside_labels(images, labels, wanted, prefix=prefix)
    )
    for name, channels in _channels(images, wanted, found):
        paths = [path for path in channels.values() if path is not None]
        own = list(dict.fromkeys(label for path in paths for label in matched.get(path, [])))
        labelled = any(path in of_labels for path in paths)
        case = _case_name(folder, name, paths, prefix=prefix, labelled=labelled)
        try:
            refuse_missing(folder / name, channels, fill_missing=wanted.fill_missing)
            if len(own) > 1:
                raise Unusable(
                    f"{folder}: {own[0].name} and {own[1].name} are label maps of {case}; keep one, or choose by the "
                    "end of its name (--label-key)"
                )
            found.cases.append(CaseFiles(printable(case), tuple(channels.values()), tuple(map(LabelFile, own))))
        except Unusable as error:
            found.problems[printable(case)] = str(error)


def is_label_folder(folder: Path) -> bool:
    """Whether a folder has a usual name of folders of label maps."""
    return plain(folder.name) in (*LABEL_FOLDERS, "labelstr", "labelsts")


def unread_labels(subject: Path, keys: Sequence[str]) -> dict[Path, str]:
    """What looks like labels in the folder of a subject whose labels were not found, with the way to read it.

    Args:
        subject: a folder with a folder for each modality.
        keys: the folders that are read.
    """
    others = [path for path in folders(subject) if path.name not in keys and any(entries(path))]
    found = {
        path: f"looks like labels, which --label-key {printable(path.name)} would read"
        for path in others
        if is_label_folder(path) or is_label_name(path.name)
    }
    _, loose = split_names(volumes(subject))
    return found | {path: "looks like a label map; put it in a folder label/ beside the image's" for path in loose}


def _usual_folders(folder: Path) -> tuple[Path | None, Path | None]:
    """The folder of images and the one of label maps in a folder, if it is clear by their names which these are."""
    inner = [sub for sub in folders(folder) if volumes(sub)]
    labels = [sub for sub in inner if is_label_folder(sub)]
    others = [sub for sub in inner if sub not in labels]
    images = [sub for sub in others if plain(sub.name) in (*IMAGE_FOLDERS, "imagestr")]
    if labels and len(others) == 1 and not volumes(folder):
        images = others
    return (images[0] if len(images) == 1 else None), (labels[0] if len(labels) == 1 else None)


def used_folders(folder: Path) -> list[Path]:
    """The folders in a folder whose volumes `add_folder` adds together with those of the folder itself."""
    images, labels = _usual_folders(folder)
    loose, _ = split_names(volumes(folder))
    return [sub for sub in (images, labels if images or loose else None) if sub is not None]


def _match(
    folder: Path, images: list[Path], labels: list[Path], *, wanted: Wanted, found: Found, prefix: str
) -> dict[Path, list[Path]]:
    """The label maps of every image. What fits no image is passed over."""
    matched: dict[Path, list[Path]] = {}
    if wanted.label_key is None:
        found.passed_over.update({path: wanted.over() for path in labels})
        return matched
    exact = {label: _of_same_name(label, images, wanted) for label in labels}
    taken = {image for fitting in exact.values() for image in fitting}
    rest = [image for image in images if image not in taken]
    for label in labels:
        fitting = exact[label] or _of_beginning(label, rest)
        if not fitting and prefix and len(labels) == 1 and len(images) <= FEW:  # the only one in a subject's folder
            fitting = rest
        if not exact[label] and len(fitting) > 1:
            fitting = _of_key(folder, label, fitting, wanted)
        for image in fitting:
            matched.setdefault(image, []).append(label)
        if not fitting:
            found.passed_over[label] = wanted.over()
    if (key := wanted.chosen_label) is not None:
        for image, own in matched.items():
            chosen = [label for label in own if before_ending(case_name(label), key) is not None]
            if chosen and len(own) > 1:
                found.passed_over.update(
                    {label: "another label map than the chosen one" for label in own if label not in chosen}
                )
                matched[image] = chosen
    return matched


def _beside_labels(images: list[Path], labels: list[Path], wanted: Wanted, *, prefix: str) -> set[Path]:
    """The images that have label maps, where these are not asked for: an image has one name for every command."""
    only = images if prefix and len(labels) == len(images) == 1 else []
    fitting = (_of_same_name(label, images, wanted) or _of_beginning(label, images) or only for label in labels)
    return {image for found in fitting for image in found}


def _of_same_name(label: Path, images: list[Path], wanted: Wanted) -> list[Path]:
    """The image that has the name of a label map but for what tells the two apart."""
    name = case_name(label)
    bases = dict.fromkeys((name, without_label_words(name, wanted.chosen_label), without_label_prefix(name)))
    for base in bases:
        if fitting := [image for image in images if case_name(image).casefold() == base.casefold()]:
            return fitting[:1]
    for base in bases:
        short = without_image_words(base).casefold()
        fitting = [image for image in images if without_image_words(case_name(image)).casefold() == short]
        if len(fitting) == 1:
            return fitting
    return []


def _of_beginning(label: Path, images: list[Path]) -> list[Path]:
    """Images whose names go on after the name that a label map has: `a_t1` and `a_t2` for `a_seg`."""
    base = without_label_words(case_name(label))
    if not base:
        return []
    return [image for image in images if case_name(image).casefold().startswith(_with_separators(base))]


def _with_separators(base: str) -> tuple[str, ...]:
    return tuple(base.casefold() + separator for separator in SEPARATORS)


def _of_key(folder: Path, label: Path, images: list[Path], wanted: Wanted) -> list[Path]:
    """Those images of a label map that are chosen. Raises: UsageError if none was chosen."""
    base = without_label_words(case_name(label))
    if not wanted.any_image:
        of_key = {i: [before_ending(case_name(i), key) for key in wanted.keys] for i in images}
        fitting = [image for image, names in of_key.items() if any(name is not None for name in names)]
        return [image for image in fitting if base in of_key[image]] or fitting
    names = [case_name(image) for image in images]
    if base and all(name.casefold().startswith(_with_separators(base)) for name in names):
        names = [name[len(base) :].lstrip(SEPARATORS) for name in names]
    raise ask_for_image(folder, f"the label map {printable(label.name)}", names)


def _channels(images: list[Path], wanted: Wanted, found: Found) -> list[tuple[str, dict[str, Path | None]]]:
    """The images by name and channel; what is not chosen is passed over, if any image has the name of a chosen one."""
    endings = {path: [key for key in wanted.keys if before_ending(case_name(path), key) is not None] for path in images}
    if wanted.any_image or not any(endings.values()):
        return [(case_name(path), {"": path}) for path in images]
    groups: dict[str, dict[str, Path | None]] = {}
    for path, keys in endings.items():
        if not keys:
            found.passed_over[path] = "another image than the chosen one"
            continue
        key = max(keys, key=len)
        name = before_ending(case_name(path), key) or ""
        channels = groups.setdefault(name, dict.fromkeys(wanted.keys))
        if channels[key] is not None:
            raise Unusable(f"{channels[key]} and {path}: are both {key} of one case; keep one of them")
        channels[key] = path
    return list(groups.items())


def _case_name(folder: Path, name: str, paths: list[Path], *, prefix: str, labelled: bool) -> str:
    """The name of a case: that of its image, and of the folder if that is a subject's."""
    short = IMAGE_ENDING.sub("", name) if labelled else name
    if not short:
        return prefix or folder.name
    return f"{prefix}/{short}" if prefix else short
