"""What a folder of DICOM files holds: image series, objects that are no images, and files that cannot be read."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .headers import DIRECTORY, ENDINGS, Header, read_header, same_pixels
from .object_kinds import LABEL_KINDS
from .optional_packages import plain_text
from .series_checks import places_of
from .slices import Slice, slices_of, stacks_of

STORAGE = "1.2.840.10008.5.1.4.1.1."
SECONDARY_CAPTURE = STORAGE + "7"
IMAGE_MODALITIES = ("CR", "CT", "DX", "IO", "MG", "MR", "NM", "OP", "OPT", "PT", "PX", "RF", "US", "XA", "XC")
# Objects without slices of a scan, by the beginning of their class; a longer one counts before a shorter one.
NO_SCANS = {
    "1.2.840.10008.1.3.10": "the directory of a DICOM medium",
    f"{STORAGE}4.2": "MR spectra",
    f"{STORAGE}481.1": "a planar radiotherapy image (RTIMAGE)",
    f"{STORAGE}481.2": "a dose distribution (RTDOSE)",
    f"{STORAGE}481.": "a radiotherapy plan or record",
    f"{STORAGE}88.59": "a list of chosen objects (KO)",
    f"{STORAGE}88.": "a structured report (SR)",
    f"{STORAGE}11.": "a presentation state (PR)",
    f"{STORAGE}104.": "an encapsulated document, such as a PDF",
    f"{STORAGE}66.1": "a registration (REG)",
    f"{STORAGE}66.2": "fiducials",
    f"{STORAGE}66.3": "a registration (REG)",
    f"{STORAGE}66.5": "a surface segmentation",
    f"{STORAGE}66.6": "tracts",
    f"{STORAGE}66": "raw data",
    f"{STORAGE}67": "a real world value mapping",
    f"{STORAGE}9.": "a waveform, such as an ECG",
    f"{STORAGE}30": "a parametric map",
    f"{STORAGE}78.": "a measurement",
    f"{STORAGE}79.": "a measurement",
    f"{STORAGE}80.": "a measurement",
    f"{STORAGE}200.": "an implant template",
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """Images of one series in a folder that lie alike.

    Attributes:
        key: identifies the series in its folder; made of its UID and what it is scanned with, so it is not shown.
        uid: Series Instance UID.
        description: of the series, printable; may be empty.
        slices: in their order; one for each file, or for each frame of one file.
        stacks: all images of the series, by size and direction; more than one is no volume.
        copies: files that are equal to another one of the series, which is the value.
    """

    key: str
    uid: str
    description: str
    slices: tuple[Slice, ...]
    stacks: tuple[tuple[Slice, ...], ...]
    copies: dict[Path, Path] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files in the order of their slices, each once."""
        return tuple(dict.fromkeys(piece.header.path for piece in self.slices))

    @property
    def named(self) -> str:
        """The series in a message."""
        return f"'{self.description or 'without description'}' ({len(self.slices)} slices)"


@dataclass
class FolderContent:
    """What a folder holds, subfolders aside.

    Attributes:
        series: image series, in the order of their keys.
        labels: segmentations and structure sets.
        passed_over: other files that were recognised, and what each is.
        damaged: files that should be DICOM and cannot be read, and why, as a part of a sentence.
    """

    series: list[Series] = field(default_factory=list)
    labels: list[Path] = field(default_factory=list)
    passed_over: dict[Path, str] = field(default_factory=dict)
    damaged: dict[Path, str] = field(default_factory=dict)


def content_of(files: Sequence[Path]) -> FolderContent:
    """Look through the files of one folder; reads each header once.

    Args:
        files: regular files, and others that are passed over; in any order.
    """
    content, images, others = FolderContent(), [], {}
    for path in sorted(files):
        if path.name.startswith("."):
            continue
        if path.is_symlink() and not path.exists():
            others[path] = "is a link to nothing"
            continue
        if not path.is_file():
            continue
        if path.name.upper() == DIRECTORY:
            content.passed_over[path] = NO_SCANS["1.2.840.10008.1.3.10"]
            continue
        try:
            header = read_header(path)
        except OSError as error:
            others[path] = f"cannot be opened ({error.strerror})"
            continue
        if header is None:
            others[path] = "is no DICOM file" if path.stat().st_size else "is empty"
        elif header.sop_class in LABEL_KINDS:
            content.labels.append(path)
        elif phrase := _no_scan(header):
            content.passed_over[path] = phrase
        elif fault := header.fault or _lacks_image(header):
            content.damaged[path] = fault
        else:
            images.append(header)
    content.series = _series_of(images, content)
    _sort_others(others, images, content)
    return content


def _no_scan(header: Header) -> str:
    """What an object without slices of a scan is; empty for images, and for files that are damaged."""
    classes = [start for start in NO_SCANS if header.sop_class.startswith(start)]
    exact = [start for start in classes if start.endswith(".") or _next_sign(header.sop_class, start) in ("", ".")]
    if exact:
        return NO_SCANS[max(exact, key=len)]
    if header.pixels is not None or header.fault or not header.sop_class:
        return ""
    modality = header.values.get("Modality", "")
    if header.sop_class.startswith(STORAGE) and modality in ("", *IMAGE_MODALITIES):
        return ""
    if not header.sop_class.startswith("1.2.840.10008."):
        return "a private object without an image"
    return f"an object without an image ({plain_text(modality)[:16] or 'no modality'})"


def _next_sign(text: str, start: str) -> str:
    return text[len(start) : len(start) + 1]


def _lacks_image(header: Header) -> str:
    """Why a file is no image; empty if it is one."""
    if header.pixels is None:
        return "has no pixels"
    if header.number("Rows") < 1 or header.number("Columns") < 1:
        return "has no size of its image"
    return ""


def _series_of(images: Sequence[Header], content: FolderContent) -> list[Series]:
    """The series of some images."""
    groups: dict[tuple[str, ...], list[Header]] = defaultdict(list)
    for header in images:
        values = header.values
        groups[tuple(values.get(k, "") for k in ("SeriesInstanceUID", "SeriesNumber", "SequenceName"))].append(header)
    placed = any("ImagePositionPatient" in piece.values for piece in slices_of(images))
    found: dict[str, Series] = {}
    for members in groups.values():
        captures = [header for header in members if placed and _is_screenshot(header)]
        content.passed_over |= {header.path: "a screenshot without a place in the body" for header in captures}
        headers = [header for header in members if not (placed and _is_screenshot(header))]
        if not headers:
            continue
        stacks = stacks_of(slices_of(headers))
        first = stacks[0][0].header
        kept, copies = _without_copies(stacks[0])
        series = Series(
            key=_key(first, found),
            uid=first.values.get("SeriesInstanceUID", ""),
            description=plain_text(first.values.get("SeriesDescription", ""))[:64],
            slices=tuple(kept),
            stacks=tuple(map(tuple, [kept, *stacks[1:]])),
            copies=copies,
        )
        found[series.key] = series
    return [found[key] for key in sorted(found)]


def _is_screenshot(header: Header) -> bool:
    known = header.sop_class == SECONDARY_CAPTURE or header.sop_class.startswith(f"{SECONDARY_CAPTURE}.")
    return known and "ImagePositionPatient" not in header.values and not header.frames


def _without_copies(stack: list[Slice]) -> tuple[list[Slice], dict[Path, Path]]:
    """The slices without those that are equal to another one at their place, if that leaves one at each place."""
    if len(stack) < 2 or any(piece.position is None or piece.directions is None for piece in stack):
        return stack, {}
    if len({piece.header.path for piece in stack}) < len(stack):
        return stack, {}
    places = places_of(stack)
    if len(places) == len(stack):
        return stack, {}
    copies: dict[Path, Path] = {}
    for first, *more in places:
        for piece in more:
            if not _is_copy(piece.header, first.header):
                return stack, {}
            copies[piece.header.path] = first.header.path
    return [group[0] for group in places], copies


def _is_copy(header: Header, first: Header) -> bool:
    """Whether an image is that of another one, of the same patient."""
    patients = [part.values.get("PatientID") for part in (header, first)]
    return patients[0] == patients[1] and same_pixels(header, first)


def _key(header: Header, taken: dict[str, Series]) -> str:
    """A name of the series as ITK's GDCMSeriesFileNames gives it, on which names of cases in stores depend."""
    values = header.values
    details = "".join(
        values.get(name, "") for name in ("SeriesNumber", "SequenceName", "SliceThickness", "Rows", "Columns")
    )
    key = re.sub(r"[^A-Za-z0-9.]", "", f"{values.get('SeriesInstanceUID', '')}.{details}")
    return key if key not in taken else f"{key}.{len(taken)}"


def _sort_others(others: Mapping[Path, str], images: Sequence[Header], content: FolderContent) -> None:
    """Tell files that should be DICOM from those that only lie beside it.

    A file without DICOM content is damaged if it has an ending of DICOM, or is named as the images are: but for digits,
    or where they have names without a pattern, with as many characters.
    """
    shapes = {_shape(header.path) for header in images}
    patterned = 2 * len(shapes) <= len(images)
    lengths = {(len(header.path.name), header.path.suffix) for header in images}
    for path, fault in others.items():
        alike = _shape(path) in shapes or (not patterned and (len(path.name), path.suffix) in lengths)
        if path.suffix.lower() in ENDINGS or alike:
            content.damaged[path] = fault
        elif images and not path.is_symlink():
            content.passed_over[path] = "no DICOM file"


def _shape(path: Path) -> str:
    """A file's name with all numbers alike."""
    return re.sub(r"\d+", "0", path.name.lower())
