"""The files of a case, and what a folder of cases holds."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from unicodedata import normalize

from ..common.fault_log import unforeseen
from ..common.names import as_file_name
from ..common.tables import known_in_heading
from ..errors import FedFactoryError, UsageError
from .class_names import numbers_of

UNREAD = "looks like"  # how the reasons in `Found.passed_over` begin of what may be labels that nobody could place
ARCHIVE_EXTRAS = ("__MACOSX",)  # folders that macOS adds to archives; they mirror the others
# Folders of operating systems and storages, which hold nothing of the user's, or what he deleted.
SYSTEM_FOLDERS = ("$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir", "#recycle", "#snapshot")
TABLES = (".csv", ".tsv")
TEXT = ".txt"  # may be a table, or notes
TABLE_COLUMNS = ("LABEL", "CURRENT_FIX_X")  # one of them is in every table of labels
NAN = ("refuse", "background")
EACH, FIRST = "each", "first"  # of the frames of a file; or the number of one

ImageFile = Path | tuple[Path, ...]  # a volume's file or a picture; or the files of a DICOM series in slice order


@dataclass(frozen=True)
class Reading:
    """How the volumes of a case are read.

    Attributes:
        frame: number of the volume, from 1, in files that hold several; None for files of one.
        nan: "refuse" makes NaN and infinite voxels of images an error, "background" gives them the lowest finite value
            of their channel.
    """

    frame: int | None = None
    nan: str = NAN[0]


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
        reading: how its volumes are read.
        subject: name of what several frames were cut from, in which the patient is looked for; None takes `name`.
        voxels: files of the voxels of those that are headers alone (`.mhd`, `.nhdr`).
    """

    name: str
    channels: tuple[ImageFile | None, ...]
    labels: tuple[LabelFile, ...] = ()
    mask: Path | None = None
    reading: Reading = Reading()
    subject: str | None = None
    voxels: tuple[Path, ...] = ()

    @property
    def files(self) -> list[Path]:
        """All files of the case, in a fixed order."""
        images = [path for image in self.channels if image for path in (image if isinstance(image, tuple) else [image])]
        masks = [self.mask] if self.mask is not None else []
        return [*images, *(label.path for label in self.labels), *masks, *self.voxels]


@dataclass
class Found:
    """What a folder holds.

    Attributes:
        cases: the usable cases.
        problems: for every unusable case the reason, in one sentence.
        without_image: names of subjects that lack the modality of the image.
        remarks: what was not used or is missing, by case, file or folder: each a reason in one sentence.
        class_names: names of the classes, where folders, files or a description tell them.
        passed_over: files and folders that were recognised and left alone, each with the reason as a short phrase.
        class_files: whether each class of a case has a file of its own, of which a site may want some only.
    """

    cases: list[CaseFiles] = field(default_factory=list)
    problems: dict[str, str] = field(default_factory=dict)
    without_image: list[str] = field(default_factory=list)
    remarks: dict[str, str] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)
    passed_over: dict[Path, str] = field(default_factory=dict)
    class_files: bool = False

    def number_classes(self, wanted: Mapping[int, str]) -> None:
        """Give the classes the numbers that the site gives to their names.

        Files of single classes get the site's number; of `class_files`, those that the site does not name are passed
        over. Label maps keep the values that a description has named, so that the site may rename but not renumber.

        Args:
            wanted: name of each label value at this site; without any, or where nothing tells a class, all stays.

        Raises: UsageError for a class that has no number at the site, or another one than in the label maps.
        """
        if not wanted or not self.class_names:
            return
        if not any(label.value is not None for case in self.cases for label in case.labels):
            self._refuse_other_numbers(wanted)
            self.class_names |= wanted
            return
        chosen = self.class_names
        if self.class_files:
            names = {name.casefold() for name in wanted.values()}
            known = {name.casefold() for name in chosen.values()}
            if unknown := [name for name in wanted.values() if name.casefold() not in known]:
                there = ", ".join(chosen.values())
                raise UsageError(f"class_names has '{unknown[0]}', which is none of the classes there: {there}")
            chosen = {value: name for value, name in chosen.items() if name.casefold() in names}
        changed = numbers_of(chosen, wanted)
        for number, case in enumerate(self.cases):
            labels = []
            for file in case.labels:
                if file.value in self.class_names and file.value not in chosen:
                    self.passed_over[file.path] = "a class that class_names lacks"
                    continue
                labels.append(file if file.value is None else replace(file, value=changed.get(file.value, file.value)))
            self.cases[number] = replace(case, labels=tuple(labels))
        self.class_names = dict(wanted)

    def _refuse_other_numbers(self, wanted: Mapping[int, str]) -> None:
        there = {name.casefold(): value for value, name in self.class_names.items()}
        for value, name in wanted.items():
            if there.get(name.casefold(), value) != value:
                raise UsageError(
                    f"class_names has '{name}' as label {value}, but it is {there[name.casefold()]} in the label maps; "
                    "give their numbers"
                )


def check_reading(frames: str | None, nan: str | None) -> None:
    """Raises: UsageError if one of them is no choice, see `formats.frames`; None is the default of either."""
    if frames not in (None, EACH, FIRST) and not is_frame_number(frames):
        raise UsageError(f"frames is '{frames}'; choose {EACH}, {FIRST}, or the number of a frame, from 1 up")
    if nan not in (None, *NAN):
        raise UsageError(f"nan is '{nan}'; choose {' or '.join(NAN)}")


def is_frame_number(frames: str) -> bool:
    """Whether this is the number of a frame."""
    return frames.isascii() and frames.isdecimal() and len(frames) < 7 and int(frames) > 0


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
    return as_file_name(case)


def printable(name: str) -> str:
    """The name with everything that could break a line or an encoding written as an escape, and composed (NFC)."""
    text = normalize("NFC", os.fsencode(name).decode("utf-8", "backslashreplace"))
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def is_label_table(path: Path) -> bool:
    """Whether a path has the name of a table of labels, and is a file. A text needs the heading of one, too."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or suffix not in (*TABLES, TEXT) or not path.is_file():
        return False
    return suffix in TABLES or bool(known_in_heading(path, TABLE_COLUMNS))


def link_to_nothing(path: str | os.PathLike[str]) -> str | None:
    """What is wrong with a link that leads nowhere, in words; None for every other path, even if it does not exist."""
    if not os.path.islink(path) or os.path.exists(path):
        return None
    try:
        return f"a link to nothing ({printable(os.readlink(os.fspath(path)))} is not there, or cannot be reached)"
    except OSError:
        return "a link to nothing"


def entries(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; none of no folder. Raises: Unusable if it cannot be read, or leads nowhere."""
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)  # paths themselves take ten times as long
    except (FileNotFoundError, NotADirectoryError):
        if (reason := link_to_nothing(folder)) is not None:
            raise Unusable(f"{folder}: is {reason}; connect the share or repair the link") from None
        return []
    except OSError as error:
        raise Unusable(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
