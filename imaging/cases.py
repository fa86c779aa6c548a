"""Finding the cases of a hospital's folder: medical-folder layout, nnU-Net raw data set, plain folder, or pictures."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..common.fault_log import faults_named
from ..common.files import require_folder
from ..errors import UsageError
from .accounting.account import with_voxels
from .accounting.clashes import set_apart
from .accounting.recognised import MUST_CHANGE, UNREAD_IMAGE, what_it_is
from .archive.finding import (
    Choice,
    join_parts,
    nested_cases,
    note_beside,
    read_content,
    read_nested_content,
    refuse_damaged,
    series_cases,
)
from .archive.headers import is_dicom, looks_like_dicom
from .case_files import (
    CaseFiles,
    Found,
    LabelFile,
    Unusable,
    file_name,
    is_label_table,
    printable,
    problem_text,
)
from .layouts.folders import entries, entries_of_any, folders, folders_below, only_volume, volumes, volumes_of
from .layouts.known import find_known
from .layouts.label_names import is_label_name
from .layouts.nnunet import find_nnunet, is_nnunet
from .layouts.pairs import add_folder, is_label_folder, split_names, unread_labels, used_folders
from .layouts.wanted import LABEL_UNWANTED, Wanted, refuse_missing, remark_unlabelled, set_shared_labels_apart
from .pictures.decoding import is_picture
from .pictures.finding import find_picture_cases
from .volume_files import case_name, is_volume

CHANNEL_DIGITS = 4  # nnU-Net names channels case_0000.nii.gz, case_0001.nii.gz, ...
WORKBOOKS = (".xlsx", ".xls", ".ods")
DEEPEST = 5  # levels of folders that are searched for a hint where the data may be


def find_cases(
    source: Path,
    *,
    image_key: str = "image",
    label_key: str | None = "label",
    mask_key: str | None = None,
    fill_missing: bool = False,
    series: str | None = None,
) -> Found:
    """All cases below `source`, sorted by name.

    Args:
        source: a folder in Fed-BioMed's medical-folder layout (`subject/modality/`, each modality one NIfTI, NRRD or
            MetaImage file or one DICOM series), a data set as it is published (see `imaging.layouts`), or a folder with
            such files or series in it or in its subfolders; DICOM series may lie deeper, as in exports with
            PATIENT/STUDY/SERIES. If it holds no volumes: pictures, see `fedfactory.imaging.pictures.finding`.
        image_key: modality folder of the image; several, separated by commas, make one image of several channels. For
            nnU-Net its channel numbers, or "image" for all of them.
        label_key: modality folder of the label map or table; None reads no labels.
        mask_key: modality folder of the brain or body mask; None reads none.
        fill_missing: whether a case that lacks some of several channels is a case all the same; otherwise it is named
            among the problems.
        series: of several DICOM series in a folder, the one to use, see `Choice`: "largest", or a description or UID.
            None accepts one series in a modality folder, and takes each as a case in a plain folder.

    Raises: UsageError if the folder is missing or unreadable, or holds no case at all.
    """
    source = Path(source)
    require_folder(source, "give a folder of cases")
    keys = tuple(key.strip() for key in image_key.split(","))
    if not all(keys) or len(set(keys)) < len(keys):
        raise UsageError(f"image_key is '{image_key}'; give names of modalities, each once, separated by commas")
    with faults_named(source):
        try:
            found = _find_volumes(
                source, keys, label_key=label_key, mask_key=mask_key, fill_missing=fill_missing, choice=Choice(series)
            )
            if not found.cases and not found.problems:
                found = find_picture_cases(source, image_key=image_key, label_key=label_key) or found
            set_apart(source, found)
        except Unusable as error:
            raise UsageError(str(error)) from None
    if not found.cases and not found.problems and found.passed_over:
        path, reason = next(iter(found.passed_over.items()))
        raise UsageError(
            f"{source}: no image found; {len(found.passed_over)} entries were passed over, such as {path.name} "
            f"({reason}); put images in SUBJECT/{image_key}/, or give single files"
        )
    if not found.cases and not found.problems:
        raise UsageError(
            f"{source}: no case found; expected SUBJECT/{image_key}/ with a NIfTI file or DICOM series, an nnU-Net "
            "dataset.json, NIfTI, NRRD or MetaImage files, folders of DICOM files, or pictures in images/"
            + _deeper(source)
        )
    found.cases = sorted(map(with_voxels, found.cases), key=lambda case: case.name)
    used = {path for case in found.cases for path in case.files}
    found.passed_over = {path: text for path, text in found.passed_over.items() if path not in used}
    return found


def _deeper(source: Path) -> str:
    """What may be meant, as the end of a message: other modality folders, volumes that lie deeper, or other files."""
    shared = Counter(inner.name for subject in folders(source) for inner in folders(subject) if volumes_of(inner))
    if several := sorted(printable(name) for name, count in shared.items() if count > 1):
        return f"; its subjects have the folders {', '.join(several[:8])}: choose by --image-key and --label-key"
    for folder in folders_below(source, DEEPEST):
        if folder != source and (is_nnunet(folder) or volumes_of(folder)):
            top = folder if is_nnunet(folder) else folder.parent
            return (
                f"; volumes lie deeper, in {folder.relative_to(source)}: give {source.name}/{top.relative_to(source)}"
            )
    for folder in folders_below(source, DEEPEST):
        for path in filter(os.path.isfile, entries_of_any(folder)):
            if (what := what_it_is(str(path))) in (*MUST_CHANGE.values(), UNREAD_IMAGE):
                return f"; {printable(str(path.relative_to(source)))} is {what}"
    return ""


def _image_files(files: Sequence[Path], channels: int, *, fill_missing: bool) -> list[CaseFiles]:
    """Images whose files are given; several channels are told by the numbers that end their names."""
    if channels == 1:
        names = [path.stem if is_picture(path) else case_name(path) for path in files]
        return [CaseFiles(printable(name), (path,)) for name, path in zip(names, files, strict=True)]
    parts: dict[str, dict[int, Path]] = {}
    for path in files:
        name, number = _channel_of(case_name(path), channels) or (case_name(path), 0)
        if (other := parts.setdefault(name, {}).setdefault(number, path)) != path:
            raise UsageError(f"{other} and {path}: are both channel {number} of {name}; give one of them")
    for name, known in parts.items():
        lacking = [number for number in range(channels) if number not in known]
        if lacking and not fill_missing:
            raise UsageError(
                f"{next(iter(known.values()))}: {name} has no file {name}_{lacking[0]:0{CHANNEL_DIGITS}d}; "
                f"an image has {channels} channels here, give all of them (or --missing-channels fill)"
            )
    return [CaseFiles(printable(name), tuple(known.get(n) for n in range(channels))) for name, known in parts.items()]


def _channel_of(name: str, channels: int) -> tuple[str, int] | None:
    """Name of the case and number of the channel, if a file's name ends in the number of a channel."""
    case, _, digits = name.rpartition("_")
    if case and len(digits) == CHANNEL_DIGITS and digits.isdecimal() and int(digits) < channels:
        return case, int(digits)
    return None


def _find_volumes(
    source: Path,
    keys: tuple[str, ...],
    *,
    label_key: str | None,
    mask_key: str | None,
    fill_missing: bool,
    choice: Choice,
) -> Found:
    wanted = Wanted(keys, label_key, fill_missing)
    if is_nnunet(source):
        if mask_key is not None:
            raise UsageError(f"mask_key is '{mask_key}', but {source} is an nnU-Net data set; use None")
        return find_nnunet(source, wanted)
    found = _medical_folder(
        source, keys, label_key=label_key, mask_key=mask_key, fill_missing=fill_missing, choice=choice
    )
    if found.cases or found.problems:
        return found
    return find_known(source, wanted, mask_key=mask_key) or _plain(source, wanted, choice)


def find_images(
    paths: Sequence[str | Path],
    *,
    image_key: str = "image",
    channels: int = 1,
    fill_missing: bool = False,
    series: str | None = None,
) -> Found:
    """Images without their labels, in the order of the paths.

    Args:
        paths: files of volumes, pictures, folders with one DICOM series, or whole data sets, see `find_cases`.
        image_key: modality folders of the images in a data set, see `find_cases`.
        channels: that an image has. If it has several, files whose names end in the numbers of channels (_0000, _0001
            and so on, as nnU-Net writes them) are one image.
        fill_missing, series: see `find_cases`.

    Returns: images under the names that `find_cases` gives to cases, or of their file or folder.
    Raises: UsageError if two images have the same name, or a folder is unreadable or has no image.
    """
    found, choice = Found(), Choice(series)
    wanted = Wanted(tuple(key.strip() for key in image_key.split(",")), None, fill_missing)
    files = [path for path in map(Path, paths) if not path.is_dir()]
    for path in filter(is_dicom, files):
        raise UsageError(f"{path}: is one file of a DICOM series; give the folder of the series")
    for path in map(Path, paths):
        if not path.is_dir():
            continue
        if channels > 1 and not is_nnunet(path) and (inside := volumes(path)) and not find_known(path, wanted):
            images, labels = split_names(inside)
            if not images:
                raise UsageError(
                    f"{path}: all its volumes, such as {labels[0].name}, look like label maps; give images"
                )
            files += images
            found.passed_over |= {label: LABEL_UNWANTED for label in labels}
        elif not _only_series(path, choice, found):
            part = find_cases(path, image_key=image_key, label_key=None, fill_missing=fill_missing, series=series)
            if not part.cases and not part.problems:
                raise UsageError(f"{path}: holds no image; give NIfTI files, DICOM series, pictures or a data set")
            found.cases += part.cases
            found.problems |= part.problems
            found.remarks |= part.remarks
            found.passed_over |= part.passed_over
    images = map(with_voxels, _image_files(files, channels, fill_missing=fill_missing))
    found.cases = [*images, *found.cases]
    names = [file_name(case.name) for case in found.cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the name of {len(twice)} images, such as '{twice[0]}', is not unique; use different folders")
    return found


def _only_series(folder: Path, choice: Choice, found: Found) -> bool:
    """Add the DICOM series of a folder as an image with the folder's name, or what is wrong with it as a problem.

    Returns: whether the folder is one image; otherwise nothing is added.
    """
    with faults_named(folder):
        try:
            content = read_content(folder)
        except Unusable as error:
            raise UsageError(str(error)) from None
    several = len(content.series) > 1 and choice.wanted is None
    if any(map(is_volume, entries(folder))) or several or not (content.series or content.damaged):
        return False
    name = printable(folder.name)
    note_beside(folder, content, name, found)
    try:
        found.cases.append(CaseFiles(name, (choice.of(folder, content, found).files,)))
    except Unusable as error:
        found.problems[name] = str(error)
    return True


def _medical_folder(
    source: Path,
    keys: tuple[str, ...],
    *,
    label_key: str | None,
    mask_key: str | None,
    fill_missing: bool,
    choice: Choice,
) -> Found:
    found, absent = Found(), []
    for subject in folders(source):
        name = printable(subject.name)
        try:
            channels = {key: _only_image(subject / key, f"{name}/{key}", choice, found) for key in keys}
            if not any(channels.values()):
                absent.append(name)
                continue
            refuse_missing(subject, channels, fill_missing=fill_missing)
            labels = _only_label(subject / label_key, found) if label_key else ()
            mask = only_volume(subject / mask_key) if mask_key else None
            for path in channels.values():
                if isinstance(path, Path) and is_label_name(case_name(path)):
                    found.remarks[name] = f"has an image of the name {printable(path.name)}, as label maps have it"
            if label_key and not labels:
                found.passed_over |= unread_labels(subject, (*keys, label_key, mask_key or ""))
            found.cases.append(CaseFiles(name, tuple(channels.values()), labels, mask))
        except Exception as error:
            found.problems[name] = problem_text(error, subject)
    if found.cases or found.problems:
        found.without_image = absent
    return found


def _only_label(folder: Path, found: Found) -> tuple[LabelFile, ...]:
    """The label map, table or DICOM object of a modality folder."""
    content = read_content(folder)
    refuse_damaged(folder, content)
    if content.series:
        raise Unusable(f"{folder}: holds DICOM images; labels are read from a SEG or RTSTRUCT object, NIfTI or a table")
    files = [path for path in entries(folder) if is_volume(path) or is_label_table(path)] + content.labels
    if len(files) > 1:
        raise Unusable(f"{folder}: holds {len(files)} label files, expected one")
    if not files and content.passed_over:
        path, phrase = next(iter(content.passed_over.items()))
        raise Unusable(f"{folder}: {path.name} is {phrase}, which holds no labels; give a SEG, an RTSTRUCT or NIfTI")
    if not files and (books := [path for path in entries(folder) if path.suffix.lower() in WORKBOOKS]):
        raise Unusable(f"{books[0]}: is the workbook of a spreadsheet; save it as 'CSV UTF-8' (Excel)")
    found.passed_over |= content.passed_over
    return tuple(LabelFile(path) for path in files)


def _only_image(folder: Path, place: str, choice: Choice, found: Found) -> Path | tuple[Path, ...] | None:
    """The volume of a modality folder: one NIfTI file or one DICOM series."""
    content = read_nested_content(folder)
    note_beside(folder, content, place, found)
    volume = only_volume(folder)
    if volume is not None:
        files = [*content.damaged, *(file for one in content.series for file in one.files)]
        found.passed_over |= dict.fromkeys(files, f"beside {printable(volume.name)}, which is the image")
        return volume
    if not (content.series or content.damaged or content.labels or content.passed_over):
        return None
    return choice.of(folder, content, found).files


def _plain(source: Path, wanted: Wanted, choice: Choice) -> Found:
    found = Found()
    add_folder(source, "", wanted, found)
    if _has_dicom(source):
        series_cases(source, "", choice, found)
    done = used_folders(source)
    for folder in folders(source):
        try:
            inside = volumes(folder)
            if is_label_folder(folder) and folder not in done and inside:
                found.passed_over[folder] = "looks like a folder of label maps, without one of images beside it"
            elif folder not in done:
                add_folder(folder, folder.name, wanted, found)
            if _has_dicom(folder):
                series_cases(folder, folder.name, choice, found)
            elif not inside:
                nested_cases(source, folder, choice, found)
        except Exception as error:
            found.problems[printable(folder.name)] = problem_text(error, folder)
    join_parts(found)
    set_shared_labels_apart(found)
    remark_unlabelled(found)
    return found


def _has_dicom(folder: Path) -> bool:
    return any(map(looks_like_dicom, entries(folder)))
