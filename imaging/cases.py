"""Finding the cases of a hospital's folder: medical-folder layout, nnU-Net raw data set, plain folder, or pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from .archive.object_kinds import kind_of_object
from .archive.series import find_series, is_dicom
from .case_files import CaseFiles, Found, LabelFile, Unusable, file_name, printable
from .layouts.folders import entries as _entries
from .layouts.folders import folders as _folders
from .layouts.folders import folders_below, volumes, volumes_of
from .layouts.known import find_known
from .layouts.label_names import is_label_name
from .layouts.nnunet import find_nnunet, is_nnunet
from .layouts.pairs import add_folder, is_label_folder, split_names, unread_labels, used_folders
from .layouts.wanted import LABEL_UNWANTED, Wanted, refuse_missing, remark_unlabelled, set_shared_labels_apart
from .pictures.decoding import is_mask, is_picture
from .pictures.finding import find_picture_cases
from .pictures.layout_names import without_mask_suffix
from .volume_files import case_name, is_volume

LOSSY = (".jpg", ".jpeg")  # pictures that do not keep label values as they are
CHANNEL_DIGITS = 4  # nnU-Net names channels case_0000.nii.gz, case_0001.nii.gz, ...
TABLE = ".csv"
DEEPEST = 5  # levels of folders that are searched for a hint where the data may be


def find_cases(
    source: Path,
    *,
    image_key: str = "image",
    label_key: str | None = "label",
    mask_key: str | None = None,
    fill_missing: bool = False,
) -> Found:
    """All cases below `source`, sorted by name.

    Args:
        source: a folder in Fed-BioMed's medical-folder layout (`subject/modality/`, each modality one NIfTI file or one
            DICOM series), an nnU-Net raw data set (`dataset.json`, `imagesTr`, `labelsTr`), or a folder with NIfTI
            files or DICOM series in it or in its subfolders (no labels). If it holds no volumes: pictures, see
            `fedfactory.imaging.pictures.finding`.
        image_key: modality folder of the image; several, separated by commas, make one image of several channels. For
            nnU-Net its channel numbers, or "image" for all of them.
        label_key: modality folder of the label map or table; None reads no labels.
        mask_key: modality folder of the brain or body mask; None reads none.
        fill_missing: whether a case that lacks some of several channels is a case all the same; otherwise it is named
            among the problems.

    Raises: UsageError if the folder is missing or unreadable, or holds no case at all.
    """
    source = Path(source)
    if not source.is_dir():
        raise UsageError(f"{source}: no such folder; give a folder of cases")
    keys = tuple(key.strip() for key in image_key.split(","))
    if not all(keys) or len(set(keys)) < len(keys):
        raise UsageError(f"image_key is '{image_key}'; give names of modalities, each once, separated by commas")
    try:
        found = _find_volumes(source, keys, label_key=label_key, mask_key=mask_key, fill_missing=fill_missing)
        if not found.cases and not found.problems:
            found = find_picture_cases(source, image_key=image_key, label_key=label_key) or found
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
            "dataset.json, NIfTI files, folders of DICOM files, or pictures in images/" + _deeper(source)
        )
    found.cases.sort(key=lambda case: case.name)
    return found


def _deeper(source: Path) -> str:
    """Where volumes lie deeper than they are looked for, as the end of a message; "" if nowhere."""
    for folder in folders_below(source, DEEPEST):
        if folder != source and (is_nnunet(folder) or volumes_of(folder)):
            top = folder if is_nnunet(folder) else folder.parent
            return (
                f"; volumes lie deeper, in {folder.relative_to(source)}: give {source.name}/{top.relative_to(source)}"
            )
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
    source: Path, keys: tuple[str, ...], *, label_key: str | None, mask_key: str | None, fill_missing: bool
) -> Found:
    wanted = Wanted(keys, label_key, fill_missing)
    if is_nnunet(source):
        if mask_key is not None:
            raise UsageError(f"mask_key is '{mask_key}', but {source} is an nnU-Net data set; use None")
        return find_nnunet(source, wanted)
    found = _medical_folder(source, keys, label_key=label_key, mask_key=mask_key, fill_missing=fill_missing)
    if found.cases or found.problems:
        return found
    return find_known(source, wanted, mask_key=mask_key) or _plain(source, wanted)


def find_images(
    paths: Sequence[str | Path], *, image_key: str = "image", channels: int = 1, fill_missing: bool = False
) -> Found:
    """Images without their labels, in the order of the paths.

    Args:
        paths: NIfTI files, pictures, folders with one DICOM series, or whole data sets, see `find_cases`.
        image_key: modality folders of the images in a data set, see `find_cases`.
        channels: that an image has. If it has several, files whose names end in the numbers of channels (_0000, _0001
            and so on, as nnU-Net writes them) are one image.
        fill_missing: see `find_cases`.

    Returns: images under the names that `find_cases` gives to cases, or of their file or folder.
    Raises: UsageError if two images have the same name, or a folder is unreadable or has no image.
    """
    found = Found()
    wanted = Wanted(tuple(key.strip() for key in image_key.split(",")), None, fill_missing)
    files = [path for path in map(Path, paths) if not path.is_dir()]
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
        elif len(series := _image_series(path)) == 1:
            found.cases.append(CaseFiles(printable(path.name), tuple(series.values())))
        else:
            part = find_cases(path, image_key=image_key, label_key=None, fill_missing=fill_missing)
            if not part.cases and not part.problems:
                raise UsageError(f"{path}: holds no image; give NIfTI files, DICOM series, pictures or a data set")
            found.cases += part.cases
            found.problems |= part.problems
            found.remarks |= part.remarks
            found.passed_over |= part.passed_over
    found.cases = [*_image_files(files, channels, fill_missing=fill_missing), *found.cases]
    names = [file_name(case.name) for case in found.cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the name of {len(twice)} images, such as '{twice[0]}', is not unique; use different folders")
    return found


def _medical_folder(
    source: Path, keys: tuple[str, ...], *, label_key: str | None, mask_key: str | None, fill_missing: bool
) -> Found:
    found, absent = Found(), []
    for subject in _folders(source):
        name = printable(subject.name)
        try:
            for key in keys:
                _remark_objects(subject / key, f"{name}/{key}", found)
            channels = {key: _only_image(subject / key) for key in keys}
            if not any(channels.values()):
                absent.append(name)
                continue
            refuse_missing(subject, channels, fill_missing=fill_missing)
            labels = _only_label(subject / label_key) if label_key else ()
            mask = _only_volume(subject / mask_key) if mask_key else None
            for path in channels.values():
                if isinstance(path, Path) and is_label_name(case_name(path)):
                    found.remarks[name] = f"has an image of the name {printable(path.name)}, as label maps have it"
            if label_key and not labels:
                found.passed_over |= unread_labels(subject, (*keys, label_key, mask_key or ""))
            found.cases.append(CaseFiles(name, tuple(channels.values()), labels, mask))
        except Unusable as error:
            found.problems[name] = str(error)
    if found.cases or found.problems:
        found.without_image = absent
    return found


def _only_label(folder: Path) -> tuple[LabelFile, ...]:
    """The label map, table or DICOM object of a modality folder."""
    files = [path for path in _entries(folder) if is_volume(path) or _is_table(path) or is_dicom(path)]
    if len(files) > 1:
        raise Unusable(f"{folder}: holds {len(files)} label files, expected one")
    return tuple(LabelFile(path) for path in files)


def _only_image(folder: Path) -> Path | tuple[Path, ...] | None:
    """The volume of a modality folder: one NIfTI file or one DICOM series."""
    volume = _only_volume(folder)
    if volume is not None or not _has_dicom(folder):
        return volume
    series = _readable_series(folder)
    if len(series) != 1:
        raise Unusable(f"{folder}: holds {len(series)} DICOM series, expected one")
    return next(iter(series.values()))


def _readable_series(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The image series of a folder.

    Raises: Unusable if a DICOM file belongs to no series: it is damaged, so a series may lack a slice.
    """
    series = _image_series(folder)
    belonging = {path.name for files in series.values() for path in files}
    others = (path for path in _entries(folder) if is_dicom(path) and path.name not in belonging)
    damaged = [path.name for path in others if kind_of_object(path) is None]
    if damaged:
        raise Unusable(f"{folder}: {len(damaged)} DICOM files cannot be read, such as {damaged[0]}; copy them again")
    return series


def _image_series(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The series of a folder without those of labels, which archives keep beside the images."""
    return {uid: files for uid, files in find_series(folder).items() if kind_of_object(files[0]) is None}


def _remark_objects(folder: Path, place: str, found: Found) -> None:
    """Name the segmentations and structure sets beside images."""
    for path in _entries(folder):
        if kind_of_object(path) is not None:
            text = "holds labels in DICOM beside images, so it is not used; labels are read from SUBJECT/label/"
            found.remarks[printable(f"{place}/{path.name}")] = text


def _only_volume(folder: Path) -> Path | None:
    found = volumes(folder)
    if len(found) > 1:
        raise Unusable(f"{folder}: holds {len(found)} volumes, expected one")
    return found[0] if found else None


def _plain(source: Path, wanted: Wanted) -> Found:
    found = Found()
    add_folder(source, "", wanted, found)
    found.cases += _series(source, "") if _has_dicom(source) else []
    _remark_objects(source, source.name, found)
    done = used_folders(source)
    for folder in _folders(source):
        try:
            _remark_objects(folder, folder.name, found)
            if is_label_folder(folder) and folder not in done and volumes(folder):
                found.passed_over[folder] = "a folder of label maps by its name, without one of images beside it"
            elif folder not in done:
                add_folder(folder, folder.name, wanted, found)
            found.cases += _series(folder, folder.name) if _has_dicom(folder) else []
        except Unusable as error:
            found.problems[printable(folder.name)] = str(error)
    set_shared_labels_apart(found)
    remark_unlabelled(found)
    return found


def _series(folder: Path, name: str) -> list[CaseFiles]:
    """DICOM series of a folder. Several are distinguished by a digest of their identifiers, which are not stored."""
    series = _readable_series(folder)
    if name and len(series) == 1:
        return [CaseFiles(printable(name), (files,)) for files in series.values()]
    digests = {hashlib.sha256(uid.encode()).hexdigest()[:8]: files for uid, files in series.items()}
    return [CaseFiles(printable(f"{name}/{d}" if name else f"series-{d}"), (files,)) for d, files in digests.items()]


def _has_dicom(folder: Path) -> bool:
    return any(is_dicom(path) for path in _entries(folder))


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == TABLE and not path.name.startswith(".") and path.is_file()


def is_label_picture(path: Path) -> bool:
    """Whether a path has the name of a picture that can be a label map, and is no folder."""
    return is_mask(path) and path.suffix.lower() not in LOSSY


def find_labels(source: Path, label_key: str = "label") -> dict[str, Path]:
    """Label maps by case name: NIfTI files and pictures.

    The case of a label picture is its name without an ending that tells a mask, such as `_segmentation`. Such a picture
    is the label map of its case when another one has the plain name: that is the picture itself. A picture beside a
    NIfTI file of the same case shows that file (`segment --pictures`), and is no label map.

    Args:
        source: a file, a folder of files, or a folder of cases with one file each in `label_key`.
        label_key: name of the folder with a case's label map.

    Raises: UsageError if there is no label map, or a case has several.
    """
    source = Path(source)
    if source.is_file():
        return {_labelled_case(source)[0]: source}
    if not source.is_dir():
        raise UsageError(f"{source}: no such file or folder; give label maps")
    try:
        found = _label_pictures(source) | {case_name(path): path for path in _entries(source) if is_volume(path)}
        for subject in _folders(source):
            label = _only_volume(subject / label_key) or _only_label_picture(subject / label_key)
            if label is not None:
                found[subject.name] = label
    except Unusable as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(
            f"{source}: no label map found; expected NIfTI files, PNG, TIFF, BMP or GIF pictures, or "
            f"CASE/{label_key}/ with one such file each"
        )
    return found


def _label_pictures(folder: Path) -> dict[str, Path]:
    """Case name to the label picture of that case in a folder."""
    found: dict[str, Path] = {}
    marked: dict[str, bool] = {}
    for path in filter(is_label_picture, _entries(folder)):
        case, has_ending = _labelled_case(path)
        if case in found and marked[case] == has_ending:
            raise Unusable(f"{folder}: {found[case].name} and {path.name} are label maps of one case; keep one")
        if has_ending or case not in found:
            found[case], marked[case] = path, has_ending
    return found


def _only_label_picture(folder: Path) -> Path | None:
    pictures = list(filter(is_label_picture, _entries(folder)))
    if len(pictures) > 1:
        raise Unusable(f"{folder}: holds {len(pictures)} label pictures, expected one")
    return pictures[0] if pictures else None


def _labelled_case(path: Path) -> tuple[str, bool]:
    """The case of a label map, and whether the name of a picture tells that it is a mask."""
    name = case_name(path)
    case = without_mask_suffix(name) if is_label_picture(path) else name
    return case, case != name
