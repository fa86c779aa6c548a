"""Which series of a folder is the image of a case, and what lies beside it: for medical, plain and nested folders."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ...errors import VolumeError
from ..case_files import CaseFiles, Found, Unusable, entries, printable
from .folder_content import FolderContent, Series, content_of
from .headers import Header, looks_like_dicom, read_header
from .series import itk_library
from .series_checks import different_stacks, refuse_unusable

LARGEST = "largest"
MAX_DEPTH = 8  # of folders below a source; exports have PATIENT/STUDY/SERIES, and a folder or two around them
MAX_FOLDERS = 100_000
SHOWN = 6  # series that a message names
IDENTITY = ("SeriesInstanceUID", "StudyInstanceUID", "PatientID", "PatientName")  # equal in all parts of a series
WRAPPERS = ("dicom", "dicomdat", "images")  # folders of media in which the folders of patients lie


@dataclass(frozen=True)
class Choice:
    """Which series of a folder is wanted: the only one (None), the one with most slices (LARGEST), or one by name.

    A name is the description or the identifier (UID) of the series; `*` and `?` stand for other signs.
    """

    wanted: str | None = None

    def of(self, folder: Path, content: FolderContent, found: Found) -> Series:
        """The image series of a folder. What is not chosen is written down in `found.passed_over`.

        Raises: Unusable if a file is damaged, or if there is not exactly one such series, naming what is there.
        """
        refuse_damaged(folder, content)
        series = content.series
        if self.wanted == LARGEST and series:
            most = max(len(one.slices) for one in series)
            chosen = [one for one in series if len(one.slices) == most]
        else:
            chosen = [one for one in series if self._fits(one)]
        if len(chosen) != 1:
            raise Unusable(f"{folder}: {self._reason(series, chosen)}")
        (one,) = chosen
        if len(one.stacks) > 1 and self.wanted != LARGEST:
            raise Unusable(f"{folder}: {different_stacks(one.stacks)}")
        left = {piece.header.path for stack in one.stacks[1:] for piece in stack}
        found.passed_over |= dict.fromkeys(sorted(left), "of other size or direction than the slices of the series")
        for other in series:
            if other is not one:
                text = f"of another series than the chosen one: {other.named}"
                found.passed_over |= dict.fromkeys(_all_files(other), text)
        return one

    def _fits(self, series: Series) -> bool:
        if self.wanted is None:
            return True
        names = (series.description, series.uid)
        return self.wanted in names or any(fnmatchcase(name.lower(), self.wanted.lower()) for name in names)

    def _reason(self, series: Sequence[Series], chosen: Sequence[Series]) -> str:
        """Why no series can be chosen."""
        shown = chosen or series
        alike = len({one.description for one in shown}) < len(shown)
        names = ", ".join(f"{one.named}{f' {one.uid}' if alike else ''}" for one in shown[:SHOWN])
        names += f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
        if not series:
            return "holds no DICOM images, but other DICOM objects; give an image series"
        if self.wanted is None:
            return f"holds {len(series)} DICOM series, expected one: {names}; choose with --series largest, or NAME"
        if self.wanted == LARGEST:
            return f"{len(chosen)} DICOM series are the largest: {names}; choose with --series NAME"
        if chosen:
            return f"{len(chosen)} DICOM series are called '{self.wanted}': {names}; give the UID of one to --series"
        return f"holds no DICOM series '{self.wanted}', but {names}; give one of these names to --series"


def read_content(folder: Path) -> FolderContent:
    """What a folder holds as DICOM, without its subfolders. Loads ITK if there is an image, see `itk_library`.

    Raises: Unusable if the folder cannot be read.
    """
    return _content(entries(folder))


def read_nested_content(folder: Path) -> FolderContent:
    """What a folder holds as DICOM, or if it has none itself, what its subfolders hold."""
    files = entries(folder)
    if not any(map(looks_like_dicom, files)):
        files += [path for inner in dicom_folders(folder) for path in entries(inner)]
    return _content(files)


def note_beside(folder: Path, content: FolderContent, place: str, found: Found) -> None:
    """Write down what lies beside images: labels and copies of slices as remarks, other objects as passed over.

    Args:
        folder: for what lies below it.
        content: of the folder.
        place: of the folder in messages.
        found: is added to.
    """
    for path in content.labels:
        text = "holds labels in DICOM beside images, so it is not used; labels are read from SUBJECT/label/"
        found.remarks[printable(f"{place}/{path.relative_to(folder).as_posix()}")] = text
        found.passed_over[path] = "labels in DICOM beside images"
    found.passed_over |= content.passed_over
    copies = {path: first for series in content.series for path, first in series.copies.items()}
    if copies:
        found.remarks[printable(place)] = (
            f"{len(copies)} files are copies of other slices (same place, same pixels), so they are not used"
        )
        found.passed_over |= dict.fromkeys(copies, "a copy of another slice (same place, same pixels)")


def refuse_damaged(folder: Path, content: FolderContent) -> None:
    """Raises: Unusable if a DICOM file cannot be read, so that a series may lack a slice."""
    for path, fault in content.damaged.items():
        raise Unusable(
            f"{folder}: {len(content.damaged)} DICOM files cannot be read, such as {path.name}, which {fault}; copy "
            "them again, or remove what is no image"
        )


def series_cases(folder: Path, name: str, choice: Choice, found: Found) -> None:
    """Add the cases of a folder in which each DICOM series is one, or the chosen one.

    Several are distinguished by a digest of their identifiers, which are not stored.

    Args:
        folder: with DICOM files in it.
        name: of the case, if there is one series; empty for the source itself.
        choice: of the series.
        found: is added to.

    Raises: Unusable if a file is damaged or no series can be chosen.
    """
    content = read_content(folder)
    note_beside(folder, content, name or folder.name, found)
    refuse_damaged(folder, content)
    if not content.series:
        return
    if choice.wanted is not None or (len(content.series) == 1 and name):
        one = choice.of(folder, content, found)
        found.cases.append(CaseFiles(printable(name) if name else _digest_name("", one), (one.files,)))
        return
    for one in content.series:
        case = _digest_name(name, one)
        if len(one.stacks) > 1:
            found.problems[case] = f"{folder}: {different_stacks(one.stacks)}"
        else:
            found.cases.append(CaseFiles(case, (one.files,)))


def nested_cases(source: Path, top: Path, choice: Choice, found: Found) -> None:
    """Add the cases of folders in folders, such as PATIENT/STUDY/SERIES, each with one DICOM series or several.

    A case has the name of the first folder, that of the patient, if it is its only one, or else of all folders to it.

    Args:
        source: the folder that was given.
        top: folder in the source, whose own files are no DICOM.
        choice: of the series in each folder.
        found: is added to.
    """
    folders = list(dicom_folders(top))
    names = {folder: _parts(folder.relative_to(source).parts) for folder in folders}
    patients = [parts[0] for parts in names.values()]
    for folder, parts in names.items():
        name = parts[0] if patients.count(parts[0]) == 1 else "/".join(parts)
        try:
            series_cases(folder, name, choice, found)
        except Unusable as error:
            found.problems[printable(name)] = str(error)


def join_parts(found: Found) -> None:
    """Make one case of the cases that are parts of one series, which media may keep in several folders.

    Cases are joined if their images name one patient, study and series, and all together lie evenly as one volume.
    """
    parts: dict[tuple[str, ...], list[CaseFiles]] = defaultdict(list)
    for case in found.cases:
        if len(case.channels) == 1 and isinstance(case.channels[0], tuple):
            (header,) = _headers(case.channels[0][:1]) or (None,)
            if header is not None and header.values.get(IDENTITY[0]):
                parts[tuple(header.values.get(key, "") for key in IDENTITY)].append(case)
    for cases in parts.values():
        headers = _headers([path for case in cases for path in case.files]) if len(cases) > 1 else []
        try:
            slices = refuse_unusable(headers) if headers else []
        except VolumeError:
            slices = []
        if not slices:
            continue
        names = [case.name for case in cases]
        name = os.path.commonpath(names) or min(names)
        if len(slices) != len(headers) or name in {case.name for case in found.cases} - set(names):
            continue
        found.cases = [case for case in found.cases if case not in cases]
        found.cases.append(CaseFiles(name, (tuple(piece.header.path for piece in slices),)))
        found.remarks[name] = f"one series whose files lie in {len(cases)} folders, read as one"


def dicom_folders(folder: Path) -> Iterator[Path]:
    """Folders below a folder, at most MAX_DEPTH deep, that hold DICOM files. Links to folders are not followed.

    Raises: Unusable if there are more than MAX_FOLDERS.
    """
    count = 0
    for place, inner, names in os.walk(folder):
        path = Path(place)
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        count += len(inner)
        if count > MAX_FOLDERS:
            raise Unusable(f"{folder}: holds more than {MAX_FOLDERS} folders; give a smaller part of the archive")
        if len(path.relative_to(folder).parts) >= MAX_DEPTH:
            inner.clear()
        if path != folder and any(looks_like_dicom(path / name) for name in sorted(names)):
            yield path


def _headers(files: Sequence[Path]) -> list[Header]:
    """The headers of some files; nothing if one cannot be read, which reading the case reports."""
    try:
        found = [read_header(path) for path in files]
    except OSError:
        return []
    return [header for header in found if header is not None]


def _parts(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The folders that name a case, without those that wrap the patients on a medium."""
    return parts[1:] if len(parts) > 1 and parts[0].lower() in WRAPPERS else parts


def _digest_name(name: str, series: Series) -> str:
    digest = hashlib.sha256(series.key.encode()).hexdigest()[:8]
    return printable(f"{name}/{digest}" if name else f"series-{digest}")


def _all_files(series: Series) -> list[Path]:
    return sorted({piece.header.path for stack in series.stacks for piece in stack})


def _content(files: Sequence[Path]) -> FolderContent:
    content = content_of(files)
    if content.series:
        itk_library()
    return content
