"""Finding the cases of a hospital's folder: medical-folder layout, nnU-Net raw data set, or a plain folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .errors import UsageError
from .volumes import case_name, is_volume

CHANNEL_DIGITS = 4  # nnU-Net names channels case_0000.nii.gz, case_0001.nii.gz, ...


@dataclass(frozen=True)
class CaseFiles:
    """Files of one case; `label` is None where the case has none."""

    name: str
    image: Path
    label: Path | None


def find_cases(source: Path, *, image_key: str = "image", label_key: str | None = "label") -> list[CaseFiles]:
    """All cases below `source`, sorted by name.

    Args:
        source: Fed-BioMed medical-folder layout (`subject/modality/one NIfTI file`), an nnU-Net raw data set
            (`dataset.json`, `imagesTr`, `labelsTr`), or a folder with NIfTI files in it (no labels).
        image_key: modality folder of the image; for nnU-Net its channel number, or "image" for channel 0.
        label_key: modality folder of the label map; None reads no labels.

    Raises: UsageError if the folder is missing, holds no case, or a case has several candidates.
    """
    source = Path(source)
    if not source.is_dir():
        raise UsageError(f"{source}: no such folder")
    if (source / "dataset.json").is_file():
        cases = _nnunet(source, image_key, label_key)
    else:
        cases = _medical_folder(source, image_key, label_key) or _plain(source)
    if not cases:
        raise UsageError(
            f"{source}: no case found; expected SUBJECT/{image_key}/*.nii.gz, an nnU-Net dataset.json, or NIfTI files"
        )
    return cases


def _medical_folder(source: Path, image_key: str, label_key: str | None) -> list[CaseFiles]:
    cases = []
    for subject in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        image = _only_volume(subject / image_key)
        if image is not None:
            cases.append(CaseFiles(subject.name, image, _only_volume(subject / label_key) if label_key else None))
    return cases


def _only_volume(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    volumes = sorted(path for path in folder.iterdir() if is_volume(path))
    if len(volumes) > 1:
        raise UsageError(f"{folder}: holds {len(volumes)} volumes, expected one")
    return volumes[0] if volumes else None


def _nnunet(source: Path, image_key: str, label_key: str | None) -> list[CaseFiles]:
    try:
        json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{source / 'dataset.json'}: not readable as JSON ({error})") from None
    if not (source / "imagesTr").is_dir():
        raise UsageError(f"{source}: has a dataset.json but no imagesTr folder")
    channel = "0" if image_key == "image" else image_key
    if not channel.isdigit():
        raise UsageError(f"--image-key {image_key}: an nnU-Net data set numbers its channels, such as 0")
    cases = []
    for path in sorted(p for p in (source / "imagesTr").iterdir() if is_volume(p)):
        name, _, digits = case_name(path).rpartition("_")
        has_channel = len(digits) == CHANNEL_DIGITS and digits.isdigit()
        if has_channel and int(digits) != int(channel):
            continue
        name = name if has_channel else case_name(path)
        label = next((p for s in (".nii.gz", ".nii") if (p := source / "labelsTr" / f"{name}{s}").is_file()), None)
        cases.append(CaseFiles(name, path, label if label_key else None))
    return cases


def _plain(source: Path) -> list[CaseFiles]:
    return [CaseFiles(case_name(path), path, None) for path in sorted(source.iterdir()) if is_volume(path)]


def find_labels(source: Path, label_key: str = "label") -> dict[str, Path]:
    """Label maps by case name: one file, a folder of files, or `case/label_key/one file`.

    Raises: UsageError if there is none.
    """
    source = Path(source)
    if source.is_file():
        return {case_name(source): source}
    if not source.is_dir():
        raise UsageError(f"{source}: no such file or folder")
    found = {case_name(path): path for path in sorted(source.iterdir()) if is_volume(path)}
    for subject in sorted(path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")):
        label = _only_volume(subject / label_key)
        if label is not None:
            found[subject.name] = label
    if not found:
        raise UsageError(f"{source}: no label map found; expected NIfTI files or CASE/{label_key}/*.nii.gz")
    return found
