"""Data sets whose files tell by their names what they are: BraTS, ACDC, M&Ms, M&Ms-2, MM-WHS.

The names are those under which the organisers of the challenges publish the data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UsageError
from ..case_files import Found, LabelFile, Unusable, printable
from ..volume_files import case_name
from .folders import folders_below, volumes_of
from .label_names import is_label_name
from .wanted import Wanted, add_case, ask_for_image, refuse_missing, remark_unlabelled

DEPTH = 3  # such as training/HGG/CASE


@dataclass(frozen=True)
class NamedLayout:
    """A data set.

    Attributes:
        title: of the data set.
        image: of the names of images, with the group `case`, and `key` if there are several of a case. A further group
            `frame` becomes part of the case's name.
        label: of the names of label maps, with the same groups, but for a `key` that counts for all images of a case.
        keys: names of the images of a case, each with its other names.
        passed_over: what else there is, by the pattern of its names, with the reason why it is not read.
        least: number of files of one case by which the data set is recognised.
    """

    title: str
    image: re.Pattern[str]
    label: re.Pattern[str]
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    passed_over: Mapping[str, str] = field(default_factory=dict)
    least: int = 1

    def key(self, text: str | None) -> str:
        """The key under one of its names; the text itself for another one."""
        text = (text or "").casefold()
        return next((key for key, names in self.keys.items() if text in (key.casefold(), *names)), text)


CINE = "a whole cine, of which the frames are read"
BRATS_KEYS = {"flair": ("t2f",), "t1": ("t1n",), "t1ce": ("t1c", "t1gd"), "t2": ("t2w",)}  # names of 2023 and later
KNOWN = (
    NamedLayout(
        "BraTS",
        re.compile(r"(?P<case>.+)[_-](?P<key>flair|t1|t1ce|t2|t1c|t1n|t2f|t2w|t1gd)", re.I),
        re.compile(r"(?P<case>.+)[_-](?:seg|segm)", re.I),
        BRATS_KEYS,
        least=3,
    ),
    NamedLayout(
        "ACDC",
        re.compile(r"(?P<case>patient\d+_frame\d+)", re.I),
        re.compile(r"(?P<case>patient\d+_frame\d+)_gt", re.I),
        passed_over={r"patient\d+_4d": CINE},
    ),
    NamedLayout(
        "M&Ms-2",
        re.compile(r"(?P<case>\d{3})_(?P<key>SA|LA)_(?P<frame>ED|ES)", re.I),
        re.compile(r"(?P<case>\d{3})_(?P<key>SA|LA)_(?P<frame>ED|ES)_gt", re.I),
        {"SA": (), "LA": ()},
        passed_over={r"\d{3}_(SA|LA)_CINE": CINE},
    ),
    NamedLayout(
        "M&Ms",
        re.compile(r"(?P<case>[A-Z]\d[A-Z]\d[A-Z]\d)_sa", re.I),
        re.compile(r"(?P<case>[A-Z]\d[A-Z]\d[A-Z]\d)_sa_gt", re.I),
    ),
    NamedLayout(
        "MM-WHS",
        re.compile(r"(?P<case>(?:ct|mr)_(?:train|test)_\d+)_image", re.I),
        re.compile(r"(?P<case>(?:ct|mr)_(?:train|test)_\d+)_label", re.I),
    ),
)


@dataclass
class _Files:
    """The files of a case: images by key; label maps, each with the key that it counts for ("" for all)."""

    where: Path
    images: dict[str, list[Path]] = field(default_factory=dict)
    labels: list[tuple[str, Path]] = field(default_factory=list)


def find_named(source: Path, wanted: Wanted) -> Found | None:
    """The cases of a data set that is known by the names of its files.

    Args:
        source: the data set, a part of it, or one case.
        wanted: of BraTS the sequences (`flair`, `t1`, `t1ce`, `t2`; the names since 2023 are taken too), of M&Ms-2 the
            view (`SA` or `LA`).

    Returns: cases; None if the folder holds none of these data sets.
    Raises: UsageError if an image must be chosen, or the chosen one is none of the data set.
    """
    files = [path for folder in folders_below(source, DEPTH) for path in volumes_of(folder)]
    for layout in KNOWN:
        cases, others = _sorted_out(files, layout)
        if any(case.images and len(case.images) + len(case.labels) >= layout.least for case in cases.values()):
            return _found(source, layout, cases, others, wanted)
    return None


def _sorted_out(files: list[Path], layout: NamedLayout) -> tuple[dict[str, _Files], list[Path]]:
    """The files by case, and those that are neither image nor label map of one."""
    cases: dict[str, _Files] = {}
    others = []
    for path in files:
        name = case_name(path)
        image, label = layout.image.fullmatch(name), layout.label.fullmatch(name)
        match = label or image
        if match is None:
            others.append(path)
            continue
        groups = match.groupdict()
        case = "_".join(filter(None, (groups["case"], groups.get("frame"))))
        entry, key = cases.setdefault(case, _Files(path.parent)), layout.key(groups.get("key"))
        if label:
            entry.labels.append((key, path))
        else:
            entry.images.setdefault(key, []).append(path)
    for name in [name for name, case in cases.items() if not case.images]:
        others += [path for _, path in cases.pop(name).labels]
    return cases, others


def _found(source: Path, layout: NamedLayout, cases: dict[str, _Files], others: list[Path], wanted: Wanted) -> Found:
    keys = _chosen_keys(source, layout, cases, wanted)
    found = Found()
    _add_odd_labels(found, cases, others)
    for name, files in cases.items():
        for key, paths in files.images.items():
            if key not in keys:
                found.passed_over.update({path: f"another image ({key}) than the chosen one" for path in paths})
        labels = [path for key, path in files.labels if key == "" or key in keys]
        found.passed_over.update({path: "of an image that is not chosen" for _, path in files.labels})
        try:
            channels = {key: _only(files.images.get(key, []), f"{key or 'the image'} of {name}") for key in keys}
            label = None
            if wanted.label_key is None:
                found.passed_over.update({path: wanted.over() for path in labels})
            else:
                found.passed_over = {p: reason for p, reason in found.passed_over.items() if p not in labels}
                label = _only(labels, f"the label map of {name}")
            if any(channels.values()):
                refuse_missing(files.where / name, channels, fill_missing=wanted.fill_missing)
        except Unusable as error:
            found.problems[printable(name)] = str(error)
            continue
        add_case(found, name, channels, (LabelFile(label),) if label else ())
    remark_unlabelled(found)
    for path in others:
        found.passed_over.setdefault(path, _reason(case_name(path), layout, wanted))
    return found


def _chosen_keys(source: Path, layout: NamedLayout, cases: Mapping[str, _Files], wanted: Wanted) -> tuple[str, ...]:
    present = [key for key in layout.keys if any(key in case.images for case in cases.values())] or [""]
    if wanted.any_image:
        if len(present) > 1:
            raise ask_for_image(source, f"this {layout.title} data set", present)
        return tuple(present)
    chosen = tuple(layout.key(key) for key in wanted.keys)
    asked = ",".join(wanted.keys)
    if not layout.keys:
        raise UsageError(f"image_key is '{asked}', but {source} is {layout.title}, with one image a case; leave it out")
    if unknown := [key for key in chosen if key not in present]:
        raise UsageError(
            f"image_key is '{asked}', but {source} is {layout.title} without {unknown[0]}; choose of "
            f"{', '.join(present)}"
        )
    if len(set(chosen)) < len(chosen):
        raise UsageError(f"image_key is '{asked}', which names one image twice; name each once")
    return chosen


def _add_odd_labels(found: Found, cases: Mapping[str, _Files], others: list[Path]) -> None:
    """Give a label map of another name to the only case of its folder, if that has none (BraTS 2020, case 355)."""
    for path in list(others):
        inside = [(name, case) for name, case in cases.items() if case.where == path.parent]
        if len(inside) == 1 and not inside[0][1].labels and is_label_name(case_name(path)):
            name, case = inside[0]
            case.labels.append(("", path))
            others.remove(path)
            found.remarks[printable(name)] = f"has the label map {printable(path.name)}, the only one of its folder"


def _only(paths: list[Path], what: str) -> Path | None:
    """The only path, or None without any. Raises: Unusable for several."""
    if len(paths) > 1:
        raise Unusable(f"{paths[0]} and {paths[1]}: are both {what}; keep one of them")
    return paths[0] if paths else None


def _reason(name: str, layout: NamedLayout, wanted: Wanted) -> str:
    """Why a volume that is neither image nor label map of a case is passed over."""
    for pattern, reason in layout.passed_over.items():
        if re.fullmatch(pattern, name, re.I):
            return reason
    return wanted.over() if is_label_name(name) else f"has no name of an image of {layout.title}"
