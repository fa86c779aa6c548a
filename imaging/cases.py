"""Finding the cases of a hospital's folder: medical-folder layout, nnU-Net raw data set, plain folder, or pictures."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..common.fault_log import faults_named
from ..errors import UsageError
from .accounting.clashes import set_apart
from .accounting.entries import link_to_nothing
from .archive.object_kinds import kind_of_object
from .archive.series import find_series, is_dicom
from .case_files import (
    ARCHIVE_EXTRAS,
    CaseFiles,
    Found,
    ImageFile,
    LabelFile,
    Unusable,
    file_name,
    printable,
    problem_text,
)
from .pictures.decoding import is_mask, is_picture
from .pictures.finding import find_picture_cases
from .pictures.layout_names import without_mask_suffix
from .slice_format import MAX_CHANNELS
from .volume_files import case_name, is_volume

LOSSY = (".jpg", ".jpeg")  # pictures that do not keep label values as they are
CHANNEL_DIGITS = 4  # nnU-Net names channels case_0000.nii.gz, case_0001.nii.gz, ...
TABLE = ".csv"


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
    with faults_named(source):
        try:
            found = _find_volumes(source, keys, label_key=label_key, mask_key=mask_key, fill_missing=fill_missing)
            if not found.cases and not found.problems:
                found = find_picture_cases(source, image_key=image_key, label_key=label_key) or found
            set_apart(source, found)
        except Unusable as error:
            raise UsageError(str(error)) from None
    if not found.cases and not found.problems:
        raise UsageError(
            f"{source}: no case found; expected SUBJECT/{image_key}/ with a NIfTI file or DICOM series, an nnU-Net "
            "dataset.json, NIfTI files, folders of DICOM files, or pictures in images/"
        )
    found.cases.sort(key=lambda case: case.name)
    return found


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
    if (source / "dataset.json").is_file():
        if mask_key is not None:
            raise UsageError(f"mask_key is '{mask_key}', but {source} is an nnU-Net data set; use None")
        return _nnunet(source, keys, label_key, fill_missing=fill_missing)
    found = _medical_folder(source, keys, label_key=label_key, mask_key=mask_key, fill_missing=fill_missing)
    return found if found.cases or found.problems else _plain(source)


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
    files = [path for path in map(Path, paths) if not path.is_dir()]
    for path in map(Path, paths):
        if not path.is_dir():
            continue
        if channels > 1 and not (path / "dataset.json").is_file() and any(map(is_volume, _entries(path))):
            files += [file for file in _entries(path) if is_volume(file)]
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
            _refuse_missing(subject, channels, fill_missing=fill_missing)
            labels = _only_label(subject / label_key) if label_key else ()
            mask = _only_volume(subject / mask_key) if mask_key else None
            found.cases.append(CaseFiles(name, tuple(channels.values()), labels, mask))
        except Exception as error:
            found.problems[name] = problem_text(error, subject)
    if found.cases or found.problems:
        found.without_image = absent
    return found


def _refuse_missing(where: Path, channels: Mapping[str, ImageFile | None], *, fill_missing: bool) -> None:
    """Raises: Unusable if a case lacks some of its channels and they are not to be filled."""
    missing = [key for key, image in channels.items() if image is None]
    if missing and not fill_missing:
        raise Unusable(
            f"{where}: has no channel {', '.join(missing)}; add the files, or fill them with background "
            "(--missing-channels fill)"
        )


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
    with faults_named(folder):
        return {uid: files for uid, files in find_series(folder).items() if kind_of_object(files[0]) is None}


def _remark_objects(folder: Path, place: str, found: Found) -> None:
    """Name the segmentations and structure sets beside images."""
    for path in _entries(folder):
        if kind_of_object(path) is not None:
            text = "holds labels in DICOM beside images, so it is not used; labels are read from SUBJECT/label/"
            found.remarks[printable(f"{place}/{path.name}")] = text


def _only_volume(folder: Path) -> Path | None:
    volumes = [path for path in _entries(folder) if is_volume(path)]
    if len(volumes) > 1:
        raise Unusable(f"{folder}: holds {len(volumes)} volumes, expected one")
    return volumes[0] if volumes else None


def _nnunet(source: Path, keys: tuple[str, ...], label_key: str | None, *, fill_missing: bool) -> Found:
    try:
        described = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{source / 'dataset.json'}: not readable as JSON ({error}); copy it again") from None
    if not (source / "imagesTr").is_dir():
        raise UsageError(f"{source}: has a dataset.json but no imagesTr folder; add the images")
    label_files = _nnunet_labels(source)
    files = _numbered_channels(source, _number_of_channels(described), label_files)
    known = sorted({number for channels in files.values() for number in channels})
    chosen = known if keys == ("image",) else [_channel_number(key) for key in keys]
    found = Found()
    for name, channels in files.items():
        images = {str(number): channels.get(number) for number in chosen}
        if not any(images.values()):
            found.without_image.append(printable(name))
            continue
        try:
            _refuse_missing(source / "imagesTr" / name, images, fill_missing=fill_missing)
        except Unusable as error:
            found.problems[printable(name)] = str(error)
            continue
        labels = tuple(map(LabelFile, label_files.get(name, ()))) if label_key else ()
        if len(labels) > 1:
            twins = " and ".join(str(label.path) for label in labels)
            found.problems[printable(name)] = f"{twins}: are label maps of one case; keep one of them"
            continue
        found.cases.append(CaseFiles(printable(name), tuple(images.values()), labels))
    return found


def _number_of_channels(described: object) -> int:
    """How many channels the description of an nnU-Net data set names (today's or the first version's key)."""
    values = described if isinstance(described, dict) else {}
    names = values.get("channel_names") or values.get("modality")
    return len(names) if isinstance(names, (dict, list)) and names else MAX_CHANNELS


def _numbered_channels(source: Path, channels: int, labels: Mapping[str, Sequence[Path]]) -> dict[str, dict[int, Path]]:
    """Files of an nnU-Net data set by case and channel number.

    Four digits at the end of a name are the channel if there can be such a channel, and no label map of the whole name:
    otherwise they number the cases, and the file is channel 0.
    """
    files: dict[str, dict[int, Path]] = {}
    for path in (p for p in _entries(source / "imagesTr") if is_volume(p)):
        whole = case_name(path)
        numbered = None if whole in labels else _channel_of(whole, channels)
        case, number = numbered or (whole, 0)
        if (other := files.setdefault(case, {}).setdefault(number, path)) != path:
            raise UsageError(f"{other} and {path}: are both channel {number} of {case}; keep one of them")
    return files


def _nnunet_labels(source: Path) -> dict[str, list[Path]]:
    """The label maps of an nnU-Net data set by case; several of one case are twins such as x.nii and x.nii.gz."""
    found: dict[str, list[Path]] = {}
    for path in filter(is_volume, _entries(source / "labelsTr")):
        found.setdefault(case_name(path), []).append(path)
    return found


def _channel_number(key: str) -> int:
    if not key.isdecimal():
        raise UsageError(
            f"image_key is '{key}'; an nnU-Net data set numbers its channels, choose numbers such as 0 or 0,1"
        )
    return int(key)


def _plain(source: Path) -> Found:
    found = Found([CaseFiles(printable(case_name(path)), (path,)) for path in _entries(source) if is_volume(path)])
    found.cases += _series(source, "") if _has_dicom(source) else []
    _remark_objects(source, source.name, found)
    for folder in _folders(source):
        try:
            _remark_objects(folder, folder.name, found)
            files = [path for path in _entries(folder) if is_volume(path)]
            found.cases += [CaseFiles(printable(f"{folder.name}/{case_name(path)}"), (path,)) for path in files]
            found.cases += _series(folder, folder.name) if _has_dicom(folder) else []
        except Exception as error:
            found.problems[printable(folder.name)] = problem_text(error, folder)
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


def _folders(source: Path) -> list[Path]:
    skipped = (".", *ARCHIVE_EXTRAS)
    return [path for path in _entries(source) if os.path.isdir(path) and not path.name.startswith(skipped)]


def _entries(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; nothing if there is no such folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        if (reason := link_to_nothing(folder)) is not None:
            raise Unusable(f"{folder}: is {reason}; connect the share or repair the link") from None
        return []
    except OSError as error:
        raise Unusable(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None


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
        found = _label_pictures(source) | _label_volumes(source)
        for subject in _folders(source):
            label = _only_volume(subject / label_key) or _only_label_picture(subject / label_key)
            if label is not None and (other := found.setdefault(subject.name, label)) != label:
                raise Unusable(f"{other} and {label}: are label maps of one case; keep one of them")
    except Unusable as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(
            f"{source}: no label map found; expected NIfTI files, PNG, TIFF, BMP or GIF pictures, or "
            f"CASE/{label_key}/ with one such file each"
        )
    return found


def _label_volumes(folder: Path) -> dict[str, Path]:
    """Case name to the NIfTI file of that case in a folder."""
    found: dict[str, Path] = {}
    for path in filter(is_volume, _entries(folder)):
        if (other := found.setdefault(case_name(path), path)) != path:
            raise Unusable(f"{other} and {path}: are label maps of one case; keep one of them")
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
