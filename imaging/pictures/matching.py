"""Matching pictures and their masks by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..case_files import CaseFiles, Found, LabelFile, is_label_table, printable
from .layout_names import OTHER_SUFFIX, stem, without_mask_suffix, without_picture_suffix


@dataclass
class Group:
    """Pictures of one folder with the files that may be their masks.

    Attributes:
        name: of the folder, for cases whose names are not unique otherwise.
        pictures: the pictures.
        labels: masks and tables; None if the folder has none at all, and an empty list if it should have some.
        label_key: what the names of masks may end in, besides the usual.
        class_folders: names of the folders of single classes that hold the masks.
        matched: the labels of every picture, once `match` has found them.
    """

    name: str
    pictures: list[Path]
    labels: list[LabelFile] | None = None
    label_key: str | None = None
    class_folders: list[str] = field(default_factory=list)
    matched: dict[Path, list[LabelFile]] = field(default_factory=dict)

    def match(self, found: Found) -> int:
        """Give every picture its labels; what has no partner is remarked in `found`. Returns the number of matches."""
        self._pass_over(found)
        self.matched = {picture: [] for picture in self.pictures}
        whole = _by_name((stem(picture), picture) for picture in self.pictures)
        short = _by_name((without_picture_suffix(stem(picture)), picture) for picture in self.pictures)
        for label in self.labels or []:
            name = stem(label.path)
            base = without_mask_suffix(name, self.label_key)
            partners = whole.get(name.casefold()) or whole.get(base.casefold())
            partners = partners or short.get(base.casefold()) or short.get(name.casefold()) or []
            if not partners:
                found.remarks[place(label.path)] = "has no picture of its name, so it is not used"
            for picture in partners:
                self.matched[picture].append(label)
        return sum(map(len, self.matched.values()))

    def _pass_over(self, found: Found) -> None:
        """Leave out files that are known to be neither pictures nor the labels that are wanted."""
        names = {stem(picture).casefold() for picture in self.pictures}
        for picture in list(self.pictures):
            base = OTHER_SUFFIX.sub("", stem(picture))
            if base != stem(picture) and base.casefold() in names:
                self.pictures.remove(picture)
                found.remarks[place(picture)] = "belongs to another picture and is no mask of it, so it is not used"
        for label in list(self.labels or []):
            if OTHER_SUFFIX.search(stem(label.path)):
                self.labels.remove(label)
                found.remarks[place(label.path)] = "is a second observer's mask or no mask, so it is not used"


def add_cases(groups: list[Group], found: Found) -> None:
    """The cases of all groups, named by their files, and by their folders too where names would not be unique."""
    names = [name for group in groups for name in {stem(picture).casefold() for picture in group.matched}]
    unique = len(set(names)) == len(names)
    for group in groups:
        same = _by_name((stem(picture), picture) for picture in group.matched)
        for picture, labels in group.matched.items():
            name = printable(stem(picture) if unique else f"{group.name}/{stem(picture)}")
            twins = same[stem(picture).casefold()]
            if len(twins) > 1:
                found.problems[name] = f"{' and '.join(map(str, twins))}: have the same name; keep one of them"
            elif problem := label_problem(labels):
                found.problems[name] = problem
            else:
                found.cases.append(CaseFiles(name, (picture,), tuple(labels)))
                if group.labels is not None and not labels:
                    found.remarks[name] = "has no mask, so it counts as unlabelled"


def label_problem(labels: list[LabelFile]) -> str | None:
    """What is wrong with the labels of one picture; None if nothing is.

    A table can be united with nothing, and two masks of one name are a mask and another version of it.
    """
    if len(labels) > 1 and any(is_label_table(label.path) for label in labels):
        names = ", ".join(sorted(label.path.name for label in labels))
        return f"{labels[0].path.parent}: holds {names} for one picture; keep one table or masks"
    for twins in _by_name((str(label.path.parent / stem(label.path)), label.path) for label in labels).values():
        if len(twins) > 1:
            return f"{' and '.join(map(str, twins))}: have the same name; keep one of them"
    return None


def place(path: Path) -> str:
    """A file's name with its folder's."""
    return printable(f"{path.parent.name}/{path.name}")


def _by_name(pictures: Iterable[tuple[str, Path]]) -> dict[str, list[Path]]:
    """Pictures by name, in lower case: some programs write .JPG beside .png."""
    names: dict[str, list[Path]] = {}
    for name, picture in pictures:
        names.setdefault(name.casefold(), []).append(picture)
    return names
