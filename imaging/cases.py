"""Finding the cases of a hospital's folder: medical-folder layout, nnU-Net raw data set, or a plain folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UsageError
from .dicom import find_series, is_dicom
from .volume_files import case_name, is_volume

LABEL_PICTURES = (".png", ".tif", ".tiff", ".bmp", ".gif")  # kinds of pictures that keep label values as they are
LABEL_ENDINGS = ("_segmentation", "_mask")  # of label pictures' names in public data sets, after the picture's name
CHANNEL_DIGITS = 4  # nnU-Net names channels case_0000.nii.gz, case_0001.nii.gz, ...
TABLE = ".csv"


ImageFile = Path | tuple[Path, ...]  # a NIfTI file or a picture; or the files of a DICOM series in slice order


@dataclass(frozen=True)
class LabelFile:
    """A file with labels.

    Attributes:
        path: label map, table of numbers, mask, or DICOM object.
        value: label of everything that the file marks; None if the file tells the labels itself.
    """

    path: Path
    value: int | None = None


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case.

    Attributes:
        name: name of the subject, file or series, made printable.
        channels: the image's files, one for each channel; a colour picture is one file. None for a channel that the
            case lacks and that is to be filled with background.
        labels: of the label map or table; several masks are united. Empty if the case has none.
        mask: brain or body mask; None if the case has none.
    """

    name: str
    channels: tuple[ImageFile | None, ...]
    labels: tuple[LabelFile, ...] = ()
    mask: Path | None = None

    @property
    def files(self) -> list[Path]:
        """All files of the case, in a fixed order."""
        images = [path for image in self.channels if image for path in (image if isinstance(image, tuple) else [image])]
        return images + [label.path for label in self.labels] + ([self.mask] if self.mask is not None else [])


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        cases: the usable cases.
        problems: for every unusable case the reason, in one sentence.
        without_image: names of subjects that lack the modality of the image.
    """

    cases: list[CaseFiles] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)


def find_cases(
    source: Path, *, image_key: str = "image", label_key: str | None = "label", mask_key: str | None = None
) -> Found:
    """All cases below `source`, sorted by name.

    Args:
        source: a folder in Fed-BioMed's medical-folder layout (`subject/modality/`, each modality one NIfTI file or one
            DICOM series), an nnU-Net raw data set (`dataset.json`, `imagesTr`, `labelsTr`), or a folder with NIfTI
            files or DICOM series in it or in its subfolders (no labels).
        image_key: modality folder of the image; for nnU-Net its channel number, or "image" for channel 0.
        label_key: modality folder of the label map or table; None reads no labels.
        mask_key: modality folder of the brain or body mask; None reads none.

    Raises: UsageError if the folder is missing or unreadable, or holds no case at all.
    """
    source = Path(source)
    if not source.is_dir():
        raise UsageError(f"{source}: no such folder; give a folder of cases")
    try:
        if (source / "dataset.json").is_file():
            if mask_key is not None:
                raise UsageError(f"mask_key is '{mask_key}', but {source} is an nnU-Net data set; use None")
            found = _nnunet(source, image_key, label_key)
        else:
            found = _medical_folder(source, image_key=image_key, label_key=label_key, mask_key=mask_key)
            if not found.cases and not found.problems:
                found = _plain(source)
    except _Unusable as error:
        raise UsageError(str(error)) from None
    if not found.cases and not found.problems:
        raise UsageError(
            f"{source}: no case found; expected SUBJECT/{image_key}/ with a NIfTI file or DICOM series, an nnU-Net "
            "dataset.json, NIfTI files, or folders of DICOM files"
        )
    found.cases.sort(key=lambda case: case.name)
    return found


def find_images(paths: Sequence[str | Path], *, image_key: str = "image") -> Found:
    """Images without their labels, in the order of the paths.

    Args:
        paths: NIfTI files, folders with one DICOM series, or whole data sets, see `find_cases`.
        image_key: modality folder of the images in a data set.

    Returns: images under the names that `find_cases` gives to cases, or of their file or folder.
    Raises: UsageError if two images have the same name, or a folder is unreadable or has no image.
    """
    found = Found()
    for path in map(Path, paths):
        if not path.is_dir():
            found.cases.append(CaseFiles(printable(case_name(path)), path))
        elif len(series := find_series(path)) == 1:
            found.cases.append(CaseFiles(printable(path.name), next(iter(series.values()))))
        else:
            part = find_cases(path, image_key=image_key, label_key=None)
            if not part.cases and not part.problems:
                raise UsageError(f"{path}: holds no image; give NIfTI files, DICOM series or a data set")
            found.cases += part.cases
            found.problems |= part.problems
    names = [file_name(case.name) for case in found.cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UsageError(f"the name of {len(twice)} images, such as '{twice[0]}', is not unique; use different folders")
    return found


def file_name(case: str) -> str:
    """The name of a case as part of a file's name."""
    return case.replace("/", "_")


def printable(name: str) -> str:
    """The name with everything that could break a line or an encoding written as an escape."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


class _Unusable(Exception):
    """The files of one case among many are unusable."""


def _medical_folder(source: Path, *, image_key: str, label_key: str | None, mask_key: str | None) -> Found:
    found, absent = Found(), []
    for subject in _folders(source):
        name = printable(subject.name)
        try:
            image = _only_image(subject / image_key)
            if image is None:
                absent.append(name)
                continue
            label = _only_volume(subject / label_key, tables=True) if label_key else None
            mask = _only_volume(subject / mask_key) if mask_key else None
            found.cases.append(CaseFiles(name, image, label, mask))
        except _Unusable as error:
            found.problems[name] = str(error)
    if found.cases or found.problems:
        found.without_image = absent
    return found


def _only_image(folder: Path) -> Path | tuple[Path, ...] | None:
    """The volume of a modality folder: one NIfTI file or one DICOM series."""
    volume = _only_volume(folder)
    if volume is not None or not _has_dicom(folder):
        return volume
    series = _readable_series(folder)
    if len(series) != 1:
        raise _Unusable(f"{folder}: holds {len(series)} DICOM series, expected one")
    return next(iter(series.values()))


def _readable_series(folder: Path) -> dict[str, tuple[Path, ...]]:
    """The series of a folder.

    Raises: _Unusable if a DICOM file belongs to no series: it is damaged, so a series may lack a slice.
    """
    series = find_series(folder)
    belonging = {path.name for files in series.values() for path in files}
    damaged = [path.name for path in _entries(folder) if is_dicom(path) and path.name not in belonging]
    if damaged:
        raise _Unusable(f"{folder}: {len(damaged)} DICOM files cannot be read, such as {damaged[0]}; copy them again")
    return series


def _only_volume(folder: Path, *, tables: bool = False) -> Path | None:
    volumes = [path for path in _entries(folder) if is_volume(path) or (tables and _is_table(path))]
    if len(volumes) > 1:
        raise _Unusable(f"{folder}: holds {len(volumes)} volumes, expected one")
    return volumes[0] if volumes else None


def _nnunet(source: Path, image_key: str, label_key: str | None) -> Found:
    try:
        json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{source / 'dataset.json'}: not readable as JSON ({error}); copy it again") from None
    if not (source / "imagesTr").is_dir():
        raise UsageError(f"{source}: has a dataset.json but no imagesTr folder; add the images")
    channel = "0" if image_key == "image" else image_key
    if not channel.isdecimal():
        raise UsageError(
            f"image_key is '{image_key}'; an nnU-Net data set numbers its channels, choose a number such as 0"
        )
    found = Found()
    for path in (p for p in _entries(source / "imagesTr") if is_volume(p)):
        name, _, digits = case_name(path).rpartition("_")
        has_channel = len(digits) == CHANNEL_DIGITS and digits.isdecimal()
        if has_channel and int(digits) != int(channel):
            continue
        name = name if has_channel else case_name(path)
        label = next((p for s in (".nii.gz", ".nii") if (p := source / "labelsTr" / f"{name}{s}").is_file()), None)
        found.cases.append(CaseFiles(printable(name), path, label if label_key else None))
    return found


def _plain(source: Path) -> Found:
    found = Found([CaseFiles(printable(case_name(path)), path) for path in _entries(source) if is_volume(path)])
    found.cases += _series(source, "") if _has_dicom(source) else []
    for folder in _folders(source):
        try:
            files = [path for path in _entries(folder) if is_volume(path)]
            found.cases += [CaseFiles(printable(f"{folder.name}/{case_name(path)}"), path) for path in files]
            found.cases += _series(folder, folder.name) if _has_dicom(folder) else []
        except _Unusable as error:
            found.problems[printable(folder.name)] = str(error)
    return found


def _series(folder: Path, name: str) -> list[CaseFiles]:
    """DICOM series of a folder. Several are distinguished by a digest of their identifiers, which are not stored."""
    series = _readable_series(folder)
    if name and len(series) == 1:
        return [CaseFiles(printable(name), files) for files in series.values()]
    digests = {hashlib.sha256(uid.encode()).hexdigest()[:8]: files for uid, files in series.items()}
    return [CaseFiles(printable(f"{name}/{d}" if name else f"series-{d}"), files) for d, files in digests.items()]


def _has_dicom(folder: Path) -> bool:
    return any(is_dicom(path) for path in _entries(folder))


def _folders(source: Path) -> list[Path]:
    return [path for path in _entries(source) if os.path.isdir(path) and not path.name.startswith(".")]


def _entries(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; nothing if there is no such folder."""
    try:
        return sorted(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        raise _Unusable(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None


def _is_table(path: Path) -> bool:
    return path.suffix.lower() == TABLE and not path.name.startswith(".") and path.is_file()


def is_label_picture(path: Path) -> bool:
    """Whether a path has the name of a picture that can be a label map, and is no folder."""
    return path.suffix.lower() in LABEL_PICTURES and not path.name.startswith(".") and not os.path.isdir(path)


def find_labels(source: Path, label_key: str = "label") -> dict[str, Path]:
    """Label maps by case name: NIfTI files and pictures.

    The case of a label picture is its name without `_segmentation` or `_mask`. Such a picture is the label map of its
    case when another one has the plain name: that is the picture itself. A picture beside a NIfTI file of the same
    case shows that file (`segment --pictures`), and is no label map.

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
    except _Unusable as error:
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
            raise _Unusable(f"{folder}: {found[case].name} and {path.name} are label maps of one case; keep one")
        if has_ending or case not in found:
            found[case], marked[case] = path, has_ending
    return found


def _only_label_picture(folder: Path) -> Path | None:
    pictures = list(filter(is_label_picture, _entries(folder)))
    if len(pictures) > 1:
        raise _Unusable(f"{folder}: holds {len(pictures)} label pictures, expected one")
    return pictures[0] if pictures else None


def _labelled_case(path: Path) -> tuple[str, bool]:
    """The case of a label map, and whether one of LABEL_ENDINGS follows it in the name of a picture."""
    name = case_name(path)
    ending = next(
        (e for e in LABEL_ENDINGS if is_label_picture(path) and name.lower().endswith(e) and len(name) > len(e)), ""
    )
    return name[: len(name) - len(ending)], bool(ending)
