"""The files of a case, and what a folder of cases holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..common.fault_log import unforeseen
from ..errors import FedFactoryError, UsageError
from .class_names import numbers_of

ARCHIVE_EXTRAS = ("__MACOSX",)  # folders that macOS adds to archives; they mirror the others
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
        remarks: what was not used or is missing, by case, file or folder: each a reason in one sentence.
        class_names: names of the classes, where folders tell them.
        passed_over: files or folders that were recognised and left alone, each with the reason as a short phrase, such
            as "a presentation state, no image".
    """

    cases: list[CaseFiles] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)
    passed_over: dict[Path, str] = field(default_factory=dict)

    def number_classes(self, wanted: Mapping[int, str]) -> None:
        """Give the classes that folders tell the numbers that the site gives to their names.

        Args:
            wanted: name of each label value at this site; without any, or where no folder tells a class, all stays.

        Raises: UsageError for a folder of a class that has no number at the site.
        """
        if not wanted or not self.class_names:
            return
        changed = numbers_of(self.class_names, wanted)
        for number, case in enumerate(self.cases):
            labels = [
                file if file.value is None else replace(file, value=changed.get(file.value, file.value))
                for file in case.labels
            ]
            self.cases[number] = replace(case, labels=tuple(labels))
        self.class_names = dict(wanted)


class Unusable(Exception):
    """The files of one case among many are unusable."""


def problem_text(error: Exception, where: Path) -> str:
    """The reason for which the files of a case are unusable, in one line; what nobody foresaw is logged too.

    Raises: the error itself if the user's request is to blame for it.
    """
    if isinstance(error, UsageError):
        raise error
    return str(error) if isinstance(error, (Unusable, FedFactoryError)) else unforeseen(error, where)


def file_name(case: str) -> str:
    """The name of a case as part of a file's name."""
    return case.replace("/", "_")


def printable(name: str) -> str:
    """The name with everything that could break a line or an encoding written as an escape."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
