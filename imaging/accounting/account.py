"""What became of every entry of a folder of cases, in numbers that add up."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..case_files import UNREAD, CaseFiles, Found, LabelFile, printable
from ..formats.kinds import voxel_file
from ..pictures.layout_names import LABEL_FOLDERS, LIKE_MASKS, plain, stem, without_mask_suffix
from ..volume_files import SUFFIXES, case_name
from .entries import Entry, entries_of
from .recognised import MUST_CHANGE, passed_over, what_it_is

Fate = Literal["used", "left out", "passed over", "not read"]
FATES: tuple[Fate, ...] = ("used", "left out", "passed over", "not read")
NAMED = 5  # entries of a group that are named on the terminal
SHOWN = {".png": "pictures of the label maps", ".dcm": "DICOM segmentations of the label maps"}  # by `segment`
TEST_PART = ("imagesTs", "labelsTs")  # of an nnU-Net data set


@dataclass(frozen=True, kw_only=True)
class EntryGroup:
    """Entries of a folder that had the same fate for the same reason.

    Attributes:
        fate: one of FATES.
        reason: a short phrase; of used ones what they are: "images", "labels", "masks" or "files of voxels".
        count: number of entries.
        names: their paths below the folder, printable and sorted; none of used ones, whose cases are known.
    """

    fate: str
    reason: str
    count: int
    names: tuple[str, ...] = ()

    def line(self) -> str:
        """One line for a person, which names a few entries."""
        more = f" and {self.count - NAMED} more" if self.count > NAMED else ""
        return f"{self.fate} ({self.count}): {self.reason}: {', '.join(self.names[:NAMED])}{more}"


@dataclass(frozen=True, kw_only=True)
class Accounting:
    """What became of every entry of one or several folders; each entry is in exactly one group.

    Attributes:
        entries: number of all entries: files, and folders and links into which nobody looked.
        groups: by fate and reason.
    """

    entries: int = 0
    groups: tuple[EntryGroup, ...] = ()

    def count(self, fate: Fate) -> int:
        """Number of entries with a fate."""
        return sum(group.count for group in self.groups if group.fate == fate)

    def summary(self) -> str:
        """The numbers in one line, such as "17 entries: 12 used (6 images, 6 labels), 3 passed over, 2 not read"."""
        used = ", ".join(f"{group.count} {group.reason}" for group in self.groups if group.fate == "used")
        parts = [f"{self.count('used')} used" + (f" ({used})" if used else "")]
        words = {"left out": "of cases that are left out", "passed over": "passed over", "not read": "not read"}
        parts += [f"{count} {text}" for fate, text in words.items() if (count := self.count(fate))]
        return f"{self.entries} entries: {', '.join(parts)}"

    def lines(self, *, apart_from: Iterable[str] = ()) -> list[str]:
        """One line for each group of entries that were passed over or not read.

        Args:
            apart_from: reasons that were told already.
        """
        told = set(apart_from)
        shown = [group for group in self.groups if group.fate in ("passed over", "not read")]
        return [group.line() for group in shown if group.reason not in told]

    def __add__(self, other: Accounting) -> Accounting:
        """Both together, of different folders."""
        named: dict[tuple[str, str], list[EntryGroup]] = defaultdict(list)
        for group in (*self.groups, *other.groups):
            named[group.fate, group.reason].append(group)
        groups = [
            EntryGroup(
                fate=fate,
                reason=reason,
                count=sum(group.count for group in parts),
                names=tuple(sorted(name for group in parts for name in group.names)),
            )
            for (fate, reason), parts in named.items()
        ]
        return Accounting(entries=self.entries + other.entries, groups=_in_order(groups))


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is read of a folder, which decides about the words for the rest.

    Attributes:
        image_keys: names of the modality folders of images.
        label_key: name of the folder of labels; None if no labels are read.
        failed: by name of a case that was left out, the reason; also of cases that are in `Found`.
        excluded: names of the cases that the user leaves out.
        other: absolute paths of files and folders that are recognised, with the reason: the store that is written.
    """

    image_keys: tuple[str, ...] = ("image",)
    label_key: str | None = "label"
    failed: Mapping[str, str] = field(default_factory=dict)
    excluded: Sequence[str] = ()
    other: Mapping[str, str] = field(default_factory=dict)


def account_for(source: str | Path, found: Found, wanted: Wanted | None = None) -> Accounting:
    """What became of every entry of a folder of cases.

    Args:
        source: the folder that was searched.
        found: in it, with the cases that could not be used.
        wanted: what was read, and which cases were left out.

    Returns: entries in the groups of their fate; files of cases outside of the folder count too.
    """
    return _Folder(str(source), found, wanted or Wanted()).account()


def account_for_images(
    paths: Sequence[str | Path],
    found: Found,
    *,
    image_keys: tuple[str, ...],
    failed: Mapping[str, str] | None = None,
) -> Accounting:
    """What became of every entry of the folders, and of the files, that were given as images without labels.

    Args:
        paths: files and folders.
        found: in all of them.
        image_keys: names of the modality folders that were read.
        failed: by name of a case that was left out, the reason.
    """
    failed = failed or {}
    given = sorted({os.path.abspath(path) for path in paths})
    folders = [path for path in given if os.path.isdir(path)]
    total = Accounting()
    for folder in folders:
        if not any(_is_below(folder, other) for other in folders if other != folder):
            inside = [case for case in found.cases if _is_below(os.path.abspath(case.files[0]), folder)]
            wanted = Wanted(image_keys=image_keys, label_key=None, failed=failed)
            total += account_for(folder, replace(found, cases=inside), wanted)
    files = [path for path in given if path not in folders and not any(_is_below(path, other) for other in folders)]
    without = {os.path.abspath(path): case.name for case in found.cases if case.name in failed for path in case.files}
    for path in files:
        group = EntryGroup(fate="used", reason="images", count=1)
        if path in without:
            reason = f"of case {without[path]}, which cannot be used"
            group = EntryGroup(fate="left out", reason=reason, count=1, names=(printable(os.path.basename(path)),))
        total += Accounting(entries=1, groups=(group,))
    return total


def account_for_labels(folder: str | Path, used: Mapping[str, Path], unused: Mapping[Path, str]) -> Accounting:
    """What became of every entry of a folder of label maps, or of one label map.

    Args:
        folder: the folder or file.
        used: label maps by case.
        unused: label maps that were not used, with the reason.
    """
    if not os.path.isdir(folder):
        return Accounting(entries=1, groups=(EntryGroup(fate="used", reason="labels", count=1),))
    cases = [with_voxels(CaseFiles(case, (None,), (LabelFile(path),))) for case, path in used.items()]
    beside = {Path(folder) / "contours": "pictures of the label maps"}
    for path in used.values():
        shown = {path.with_name(f"{case_name(path)}{ending}"): text for ending, text in SHOWN.items()}
        beside |= {other: text for other, text in shown.items() if other != path}
    return account_for(folder, Found(cases, passed_over={**beside, **unused}), Wanted(image_keys=()))


def with_voxels(case: CaseFiles) -> CaseFiles:
    """The case with the files of voxels that belong to headers of NRRD and MetaImage."""
    files = [file for file in case.channels if isinstance(file, Path)] + [label.path for label in case.labels]
    files += [case.mask] if case.mask is not None else []
    voxels = [data for file in files if (data := voxel_file(file)) is not None]
    return replace(case, voxels=tuple(voxels)) if voxels else case


class _Folder:
    """A folder whose entries are sorted into groups."""

    def __init__(self, source: str, found: Found, wanted: Wanted) -> None:
        self.root = os.path.abspath(source)
        self.found, self.wanted = found, wanted
        self.roles: dict[str, str] = {}  # of the files of cases that were used
        self.left_out: dict[str, str] = {}  # files of the others, and the reason
        for case in found.cases:
            self._take(case)
        self.known = {os.path.abspath(path): reason for path, reason in found.passed_over.items()}
        self.known |= wanted.other
        # Of used files: the folders that they lie in, and the subjects that have labels, for the words about others.
        self.label_folders = {os.path.dirname(path) for path, role in self.roles.items() if role == "labels"}
        self.labelled = {self._subject(path) for path, role in self.roles.items() if role == "labels"}
        self.subjects = {self._subject(path) for path in self.roles}
        images = (path for path, role in self.roles.items() if role == "images")
        self.channels = {(os.path.dirname(path), short) for path in images if (short := _without_channel(path))}
        self.lacking = set(found.without_image)

    def _take(self, case: CaseFiles) -> None:
        reason = None
        if case.name in self.wanted.excluded:
            reason = "the user leaves the case out"
        elif case.name in self.wanted.failed:
            reason = f"of case {case.name}, which cannot be used"
        images = [path for image in case.channels if image for path in (image if isinstance(image, tuple) else [image])]
        masks = [case.mask] if case.mask is not None else []
        labels = [file.path for file in case.labels]
        parts = (("images", images), ("labels", labels), ("masks", masks), ("files of voxels", case.voxels))
        for role, paths in parts:
            for path in map(os.path.abspath, paths):
                if reason is None:
                    self.left_out.pop(path, None)
                    self.roles.setdefault(path, role)
                elif path not in self.roles:
                    self.left_out[path] = reason

    def account(self) -> Accounting:
        of_cases = self.roles.keys() | self.left_out.keys()
        groups: dict[tuple[Fate, str], list[str]] = defaultdict(list)
        seen = set()
        for entry in entries_of(self.root, used=of_cases, known=self.known):
            groups[self._fate(entry)].append(entry.path)
            seen.add(entry.path)
        for path in of_cases - seen:  # elsewhere, or gone since
            groups[self._fate(Entry(path))].append(path)
        made = [
            EntryGroup(
                fate=fate,
                reason=reason,
                count=len(paths),
                names=() if fate == "used" else tuple(sorted(printable(self._below(path)) for path in paths)),
            )
            for (fate, reason), paths in groups.items()
        ]
        return Accounting(entries=sum(map(len, groups.values())), groups=_in_order(made))

    def _fate(self, entry: Entry) -> tuple[Fate, str]:
        path = entry.path
        if (role := self.roles.get(path)) is not None:
            return "used", role
        if (reason := self.left_out.get(path)) is not None:
            return "left out", reason
        if (reason := self.known.get(path)) is not None:
            unread = reason.startswith(UNREAD) and self.wanted.label_key is not None
            return ("not read" if unread else "passed over"), reason
        if (reason := self._remark(path)) is not None:
            return "passed over", reason
        if entry.passed_over:
            return "passed over", entry.passed_over
        if (case := self._unusable_case(path)) is not None:
            return "left out", f"of case {case}, which cannot be used"
        if entry.unusable:
            return "not read", entry.unusable
        return self._unrecognised(path)

    def _remark(self, path: str) -> str | None:
        """What was remarked about a file, or about a folder around it."""
        if not self.found.remarks:
            return None
        parts = self._below(path).split(os.sep)
        folders = [os.path.basename(self.root), *parts]
        for end in range(len(folders), 1, -1):
            for start in range(max(0, end - 3), end - 1):
                reason = self.found.remarks.get(printable("/".join(folders[start:end])))
                if reason is not None and "not used" in reason:
                    return reason
        return None

    def _unusable_case(self, path: str) -> str | None:
        """The name of the case that cannot be used to which a file belongs by its name or its folder's."""
        problems = self.found.problems
        if not problems:
            return None
        parts = self._below(path).split(os.sep)
        whole = [printable("/".join(parts[:end])) for end in range(1, len(parts))]
        name = case_name(Path(path)) if path.lower().endswith(SUFFIXES) else stem(Path(path))
        short = without_mask_suffix(name)
        channel = _without_channel(path) or name
        ends = {printable(text) for text in (name, short, channel, parts[-1])}
        names = [*whole, *ends, *(f"{folder}/{end}" for folder in whole for end in ends)]
        names += [f"{printable(parts[-2])}/{end}" for end in ends] if len(parts) > 1 else []
        return next((name for name in names if name in problems), None)

    def _unrecognised(self, path: str) -> tuple[Fate, str]:
        """The fate of a file that belongs to no case."""
        parts = self._below(path).split(os.sep)
        folder = parts[-2] if len(parts) > 1 else ""
        what, reason = what_it_is(path), passed_over(parts[-1])
        if what == "a file of a kind that is not read" and reason is not None:
            return "passed over", reason
        if fault := _fault(path):
            return "not read", fault
        if what in MUST_CHANGE.values():
            return "not read", what
        if (short := _without_channel(path)) and (os.path.dirname(path), short) in self.channels:
            return "passed over", "a channel that is not asked for"
        if parts[0] in TEST_PART:
            return "passed over", "the test part of an nnU-Net data set"
        like_labels = [part for part in parts[:-1] if self._is_for_labels(part)]
        if like_labels and self.wanted.label_key is None:
            return "passed over", "labels, which are not asked for"
        if like_labels and (os.path.dirname(path) in self.label_folders or like_labels[0] == "labelsTr"):
            return "not read", f"in {printable(like_labels[0])}/, but no image has its name"
        if like_labels and not (len(parts) > 2 and self._subject(path) in self.labelled):
            hint = printable(like_labels[0])
            return "not read", f"in {hint}/, which looks like labels, but they were not recognised as any image's"
        if reason is not None:
            return "passed over", reason
        if printable(parts[0]) in self.lacking:
            return "not read", f"in the folder of a subject without an image in {', '.join(self.wanted.image_keys)}/"
        if len(parts) == 3 and parts[0] in self.subjects and folder not in self.wanted.image_keys:
            return "passed over", f"in the modality folder {printable(folder)}/, which is not asked for"
        return "not read", f"{what} that belongs to no case" if what[-5:] != " read" else what

    def _is_for_labels(self, folder: str) -> bool:
        """Whether the name of a folder says that it holds labels."""
        known = folder in (self.wanted.label_key, "labelsTr") or plain(folder) in LABEL_FOLDERS
        return known or bool(LIKE_MASKS.search(plain(folder)))

    def _subject(self, path: str) -> str:
        """The first folder of a path below the source, or its name."""
        return self._below(path).split(os.sep, 1)[0]

    def _below(self, path: str) -> str:
        """A path as seen from the source."""
        if path == self.root:
            return "."
        start = self.root if self.root.endswith(os.sep) else self.root + os.sep
        return path[len(start) :] if path.startswith(start) else path


def _without_channel(path: str) -> str:
    """Name of a file without the number of its channel and its ending; "" if it has no such number."""
    name = os.path.basename(path).split(".")[0]
    return name[:-5] if name[-5:-4] == "_" and name[-4:].isdecimal() else ""


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def _fault(path: str) -> str | None:
    """Why nobody could read a file that no case has."""
    try:
        if os.path.getsize(path) == 0:
            return "an empty file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None if os.access(path, os.R_OK) else "cannot be read (no permission)"


def _in_order(groups: Iterable[EntryGroup]) -> tuple[EntryGroup, ...]:
    order = {fate: number for number, fate in enumerate(FATES)}
    return tuple(sorted(groups, key=lambda group: (order[group.fate], group.reason)))
