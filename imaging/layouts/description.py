"""The description of an nnU-Net data set or of one of the Medical Segmentation Decathlon: `dataset.json`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...common.json_text import parse_json
from ...errors import UsageError
from ..case_files import printable
from ..class_names import check_names
from ..pictures.layout_names import stem
from ..volume_files import case_name, is_volume

DESCRIPTION = "dataset.json"
BACKGROUND, IGNORED = "background", "ignore"


@dataclass(frozen=True)
class Description:
    """What a data set says about itself.

    Attributes:
        channels: number of channels; None if it is not told.
        class_names: name of each label value but 0.
        listed: names of the files of images, without their endings, if they are listed.
        remarks: what of it is not used, each in one sentence.
    """

    channels: int | None = None
    class_names: dict[int, str] = field(default_factory=dict)
    listed: frozenset[str] = frozenset()
    remarks: tuple[str, ...] = ()


def read_description(source: Path) -> Description:
    """The description of a data set, of either version of nnU-Net; an empty one if there is none.

    Raises: UsageError if it is no JSON.
    """
    path = source / DESCRIPTION
    if not path.is_file():
        return Description()
    try:
        content = parse_json(path.read_text(encoding="utf-8-sig"))  # Windows editors put a mark in front
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: not readable as JSON ({error}); copy it again") from None
    content = content if isinstance(content, dict) else {}
    named = content.get("channel_names") or content.get("modality")
    channels = len(named) if isinstance(named, (dict, list)) and named else None
    names, remarks = _class_names(content.get("labels"))
    return Description(channels, names, frozenset(_listed(content.get("training"))), remarks)


def _class_names(labels: Any) -> tuple[dict[int, str], tuple[str, ...]]:
    """Names by label value, from {"0": "background"} of the first version or {"background": 0} of the second."""
    names: dict[int, str] = {}
    regions, remarks = [], []
    for key, value in labels.items() if isinstance(labels, dict) else ():
        if isinstance(value, list):
            regions.append(str(key))
            continue
        name, number = (value, key) if isinstance(value, str) else (key, value)
        try:
            label = int(number)
        except (ArithmeticError, TypeError, ValueError):
            remarks.append(f"names a label {printable(str(key))} in another form than NAME: NUMBER, so it is not used")
            continue
        if name.casefold() == IGNORED and not isinstance(value, str):
            remarks.append(
                f"has the label {label} for voxels to ignore; --label-kind scribble --unlabelled-value {label} reads "
                "them as not annotated"
            )
        elif label > 0:
            names[label] = printable(name)
    if regions:
        shown = printable(", ".join(regions[:3]))
        remarks.append(f"has regions of several labels ({shown}), which are not used; label values stay as they are")
    try:
        return check_names(names), tuple(remarks)
    except UsageError as error:
        return {}, (*remarks, f"gives names to labels that cannot be used: {error}")


def _listed(training: Any) -> set[str]:
    """Names of files that a list of training cases has."""
    names = set()
    for entry in training if isinstance(training, list) else ():
        image = entry.get("image") if isinstance(entry, dict) else entry
        if isinstance(image, str) and image:
            names.add(name_of(Path(image.replace("\\", "/"))))
    return names


def name_of(path: Path) -> str:
    """The name of a volume or a picture without its ending."""
    return case_name(path) if is_volume(path) else stem(path)
