"""Finding the cases of a folder of pictures, in the layouts that public data sets have."""

from __future__ import annotations

import os
from pathlib import Path

from ...errors import UsageError
from ..case_files import ARCHIVE_EXTRAS, CaseFiles, Found, LabelFile, is_label_table, printable
from .decoding import is_mask, is_picture
from .layout_names import (
    LIKE_MASKS,
    MANUAL_FOLDERS,
    OTHER_MASKS,
    is_image_folder,
    is_label_folder,
    plain,
    stem,
    without_mask_suffix,
    without_picture_suffix,
)
from .matching import Group, add_cases, label_problem, place

IMAGE_KEY, LABEL_KEY = "image", "label"  # with these, the usual names of folders are tried
BACKGROUND_FOLDERS = ("background", "bg")
UNREAD_ENDINGS = (".gif", ".webp", ".jp2", ".heic", ".avif")


def find_picture_cases(source: Path, *, label_key: str | None, image_key: str = IMAGE_KEY) -> Found | None:
    """All pictures of a folder with their masks, sorted by name.

    The layouts are:
    - `SUBJECT/image/` with one picture and `SUBJECT/label/` with its masks;
    - a folder of pictures beside a folder of masks (`images/` and `masks/`, and other usual names), or pictures with
      the folder of masks among them;
    - pictures and masks in one folder, told by their names (`NAME.jpg`, `NAME_mask.png`), or pictures alone.

    The last two may also be in several folders, such as `training` and `test`. A folder of masks may have a folder for
    each class, whose labels are 1, 2, ... in the order of their names, or the names themselves if all are numbers. A
    mask has its picture's name, or that and a usual suffix (`_mask`, `_mask_1`, `_segmentation`, ...); several masks of
    a picture are united. A table may stand for masks.

    Args:
        source: the folder.
        label_key: name of the folder of masks; "label" tries the usual names too, None reads no masks.
        image_key: name of the folder of pictures; "image" tries the usual names too.

    Returns: cases; None if there are no pictures in any of these layouts. What is missing or was not used is in
        `Found.problems` and `Found.remarks`.
    Raises: UsageError if a folder is unreadable, the layout is ambiguous, or no mask of a folder fits a picture.
    """
    source = Path(source)
    found = _subjects(source, image_key, label_key) or _folders_of_pictures(source, image_key, label_key)
    if found is not None:
        found.cases.sort(key=lambda case: case.name)
    return found


def _subjects(source: Path, image_key: str, label_key: str | None) -> Found | None:
    """Cases of `SUBJECT/image/x.png`; None if most of the folders do not hold one picture each."""
    pictures = {subject: _pictures(subject / image_key) for subject in _folders(source)}
    holding = [subject for subject, files in pictures.items() if files]
    if 2 * sum(len(pictures[subject]) == 1 for subject in holding) <= len(holding):
        return None
    found = Found()
    for subject, files in pictures.items():
        name = printable(subject.name)
        labels = [LabelFile(path) for path in (_label_files(subject / label_key) if label_key else [])]
        if not files:
            found.without_image.append(name)
        elif len(files) > 1:
            found.problems[name] = f"{subject / image_key}: holds {len(files)} pictures; expected one"
        elif problem := label_problem(labels):
            found.problems[name] = problem
        else:
            found.cases.append(CaseFiles(name, (files[0],), tuple(labels)))
    if any(case.labels for case in found.cases):
        text = f"has no mask in {label_key}/, so it counts as unlabelled"
        found.remarks.update({case.name: text for case in found.cases if not case.labels})
    return found


def _folders_of_pictures(source: Path, image_key: str, label_key: str | None) -> Found | None:
    """Cases of the folder itself, or of its subfolders."""
    found = Found()
    groups = _groups(source, image_key, label_key, found)
    if not groups:
        subfolders = _folders(source)
        manual = any(plain(sub.name) in MANUAL_FOLDERS for folder in subfolders for sub in _folders(folder))
        groups = [g for folder in subfolders for g in _groups(folder, image_key, label_key, found, manual=manual)]
        like_masks = [folder for folder in subfolders if LIKE_MASKS.search(plain(folder.name)) and _masks(folder)]
        if groups and like_masks:
            names = ", ".join(folder.name for folder in subfolders)
            raise UsageError(f"{source}: which of {names} holds the pictures is unclear; give image_key and label_key")
    if not groups:
        return None
    if label_key not in (None, LABEL_KEY) and all(group.labels is None for group in groups):
        raise UsageError(f"label_key is '{label_key}'; {source} has no such folder and no file that ends in it")
    _number_classes(groups, found)
    for group in groups:
        matches = group.match(found)
        if group.labels and not matches:
            raise _no_match(group.labels[0].path.parent, [label.path for label in group.labels])
    if len(groups) > 1 and any(group.labels for group in groups):
        text = "has no masks, so its pictures count as unlabelled"
        found.remarks.update({printable(group.name): text for group in groups if group.labels is None})
    add_cases(groups, found)
    return found


def _groups(folder: Path, image_key: str, label_key: str | None, found: Found, *, manual: bool = False) -> list[Group]:
    """Pictures of a folder with their possible masks; nothing if it has no pictures where they are expected.

    Args:
        manual: whether other folders of the data set have manual masks: what is called masks here is not these.
    """
    images = _image_folder(folder, image_key)
    loose = _pictures(folder)
    if images is None:
        if not loose or image_key != IMAGE_KEY:
            return []
        images = folder
    elif loose:
        found.remarks[printable(folder.name)] = f"{len(loose)} pictures beside {images.name}/ are not used"
    labels = _label_folder(folder, images, label_key, found, manual_elsewhere=manual)
    if images == folder and labels is None:
        return [_one_folder(folder, label_key)]
    deeper = [sub for sub in _folders(images) if _pictures(sub) and images != folder]
    parts = [Path(".")] if _pictures(images) else [Path(sub.name) for sub in deeper]
    if _pictures(images):
        found.remarks.update({place(sub): "holds pictures beside others, so it is not used" for sub in deeper})
    groups = []
    for part in parts:
        _remark_unread(images / part, found)
        group = Group((folder / part).name, _pictures(images / part), label_key=label_key)
        if labels is not None and (labels / part).is_dir():
            group.labels = [LabelFile(path) for path in _label_files(labels / part)]
            if not group.labels:  # a folder for each class; `_number_classes` gives their labels
                classes = [sub for sub in _folders(labels / part) if _masks(sub)]
                group.labels = [LabelFile(path) for sub in classes for path in _masks(sub)]
                group.class_folders = [sub.name for sub in classes]
        groups.append(group)
    return groups


def _one_folder(folder: Path, label_key: str | None) -> Group:
    """Pictures and masks side by side. Without a single pair, all are pictures."""
    names = {stem(path).casefold() for path in _pictures(folder)}
    names |= {without_picture_suffix(name) for name in names}
    suffixed = [path for path in _masks(folder) if without_mask_suffix(stem(path), label_key) != stem(path)]
    pairs = any(without_mask_suffix(stem(path), label_key).casefold() in names for path in suffixed)
    if not pairs:
        return Group(folder.name, _pictures(folder))
    pictures = [path for path in _pictures(folder) if path not in suffixed]
    others = [path for path in _masks(folder) if path not in suffixed and not is_picture(path)]
    labels = [LabelFile(path) for path in suffixed + others] if label_key else None
    return Group(folder.name, pictures, labels, label_key)


def _image_folder(folder: Path, image_key: str) -> Path | None:
    if _has_pictures(folder / image_key):
        return folder / image_key
    usual = [sub for sub in _folders(folder) if is_image_folder(sub) and _has_pictures(sub)]
    return _only(folder, usual, "image_key") if image_key == IMAGE_KEY else None


def _label_folder(
    folder: Path, images: Path, label_key: str | None, found: Found, *, manual_elsewhere: bool
) -> Path | None:
    if label_key is None:
        return None
    others = [sub for sub in _folders(folder) if sub != images and _has_labels(sub)]
    manual = [sub for sub in others if plain(sub.name) in MANUAL_FOLDERS]
    usual = [] if manual_elsewhere else [sub for sub in others if is_label_folder(sub)]
    exact = [sub for sub in others if sub.name == label_key]
    chosen = _only(folder, exact or (manual or usual if label_key == LABEL_KEY else []), "label_key")
    for sub in others:
        if sub != chosen:
            what = OTHER_MASKS.get(plain(sub.name)) if manual or manual_elsewhere else None
            reason = f"holds {what or 'pictures or tables'}, so it is not used; label_key chooses the folder of masks"
            found.remarks[place(sub)] = reason
    return chosen


def _only(folder: Path, candidates: list[Path], option: str) -> Path | None:
    if len(candidates) > 1:
        names = " and ".join(path.name for path in candidates)
        raise UsageError(f"{folder}: holds {names}; choose one of them by {option}")
    return candidates[0] if candidates else None


def _number_classes(groups: list[Group], found: Found) -> None:
    """Give the masks of class folders their labels, the same in all groups."""
    names = sorted({name for group in groups for name in group.class_folders})
    numbered = all(name.isdecimal() for name in names)
    classes = [name for name in names if numbered or plain(name) not in BACKGROUND_FOLDERS]
    values = {name: int(name) if numbered else classes.index(name) + 1 if name in classes else 0 for name in names}
    found.class_names = {value: printable(name) for name, value in values.items() if value and not numbered}
    for group in groups:
        if group.class_folders:
            group.labels = [LabelFile(label.path, values[label.path.parent.name]) for label in group.labels or []]
            group.labels.sort(key=lambda label: label.value or 0)


def _no_match(folder: Path, masks: list[Path]) -> UsageError:
    return UsageError(
        f"{folder}: none of its {len(masks)} masks, such as {masks[0].name}, has the name of a picture; name a mask as "
        "its picture, or NAME_mask"
    )


def _remark_unread(folder: Path, found: Found) -> None:
    for path in _entries(folder):
        if path.name.lower().endswith(UNREAD_ENDINGS):
            found.remarks[place(path)] = "is no PNG, JPEG, TIFF or BMP, so it is not used"


def _has_pictures(folder: Path) -> bool:
    return bool(_pictures(folder)) or any(map(_pictures, _folders(folder)))


def _has_labels(folder: Path) -> bool:
    return bool(_label_files(folder)) or any(map(_label_files, _folders(folder)))


def _pictures(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if is_picture(path)]


def _masks(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if is_mask(path)]


def _label_files(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if is_mask(path) or is_label_table(path)]


def _folders(folder: Path) -> list[Path]:
    skipped = (".", *ARCHIVE_EXTRAS)
    return [path for path in _entries(folder) if os.path.isdir(path) and not path.name.startswith(skipped)]


def _entries(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; nothing if there is no such folder."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name) if os.path.isdir(folder) else []
    except OSError as error:
        raise UsageError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
