"""The classes of the values in label maps, where these are no class numbers: 205=1,420=2, or 255=1."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...errors import UsageError, VolumeError
from ..slice_choices import UNLABELLED

FORM = 'VALUE=CLASS,VALUE=CLASS, such as 205=1,420=2; or a JSON file such as {"205": 1, "420": 2}'
OPTION = "--label-values"
REST = "*"  # stands for all values that are not named
HIGHEST = UNLABELLED - 1
LARGEST = 2**31 - 1  # of the values in a file
SHOWN = 8  # values that a message names
PART = 1 << 22  # values that are worked on at once
MAX_BYTES = 1 << 20  # of a JSON file
ENTRY, CLASS = re.compile(r"-?[0-9]{1,10}|\*"), re.compile(r"[0-9]{1,4}")


@dataclass(frozen=True)
class LabelValues:
    """The class of each value in label maps. Raises: UsageError if a value or class is out of range, or none is named.

    0 is the background unless it is named, and a value that is not named is an error unless `rest` says its class.

    Attributes:
        classes: class of each value, in the order in which they were named.
        rest: class of all values that are not named; None if they are errors.
    """

    classes: Mapping[int, int]
    rest: int | None = None

    def __post_init__(self) -> None:
        if not self.classes and self.rest is None:
            raise UsageError(f"label_values names no value; write {FORM}")
        for value in self.classes:
            if abs(value) > LARGEST:
                raise UsageError(f"label_values names {value}; values must be from -{LARGEST} to {LARGEST}")
        for label in (*self.classes.values(), *(() if self.rest is None else (self.rest,))):
            if not 0 <= label <= UNLABELLED:
                raise UsageError(
                    f"label_values has class {label}; classes are 0 (background) to {HIGHEST}, and {UNLABELLED} is "
                    "what nobody annotated"
                )

    @property
    def text(self) -> str:
        """What `parse_label_values` reads as the same."""
        rest = [] if self.rest is None else [f"{REST}={self.rest}"]
        return ",".join([*(f"{value}={label}" for value, label in self.classes.items()), *rest])

    @property
    def originals(self) -> dict[int, int]:
        """The value to write for each class: the first that was named for it; 0 for the background if 0 means that."""
        found: dict[int, int] = {} if 0 in self.classes else {0: 0}
        for value, label in self.classes.items():
            if value == label == 0:
                found[0] = 0
            found.setdefault(label, value)
        found.pop(UNLABELLED, None)
        return found

    def with_unlabelled(self, value: int) -> LabelValues:
        """The same mapping, but `value` stands for what nobody annotated."""
        return replace(self, classes={**self.classes, value: UNLABELLED})

    def apply(self, values: np.ndarray) -> np.ndarray:
        """Classes of the voxels, uint16.

        Args:
            values: whole numbers up to `LARGEST` of any shape and number type.

        Raises: VolumeError for values that are not named, unless `rest` is given.
        """
        table = {0: 0, **self.classes}
        low, high = int(values.min()), int(values.max())
        flat = values.reshape(-1, order="A")
        parts = [slice(first, first + PART) for first in range(0, flat.size, PART)]
        if high - low < 1 << 16:  # counting is many times faster than sorting
            counts = sum(np.bincount(flat[p].astype(np.int64) - low, minlength=high - low + 1) for p in parts)
            present = np.flatnonzero(counts) + low
        else:
            present = np.unique(np.concatenate([np.unique(flat[part].astype(np.int64)) for part in parts]))
        unknown = [int(value) for value in present if int(value) not in table]
        if unknown and self.rest is None:
            raise VolumeError(
                f"holds the value{'s' if len(unknown) > 1 else ''} {_listed(unknown)}, which {OPTION} does not name; "
                f"add {'its class' if len(unknown) == 1 else 'their classes'}, or {REST}=0 for background"
            )
        classes = np.array([table.get(int(value), self.rest) for value in present], np.uint16)
        found = np.empty(flat.size, np.uint16)
        by_offset = np.zeros(high - low + 1 if high - low < 1 << 16 else 0, np.uint16)
        if by_offset.size:
            by_offset[present - low] = classes
        for part in parts:
            whole = flat[part].astype(np.int64)
            found[part] = by_offset[whole - low] if by_offset.size else classes[np.searchsorted(present, whole)]
        return found.reshape(values.shape, order="F" if values.flags.f_contiguous else "C")


def parse_label_values(text: str) -> LabelValues:
    """The mapping that an option gives: as text, or as the path of a JSON file.

    Raises: UsageError if it has another form, names a value twice, or the file cannot be read.
    """
    if text.strip().lower().endswith(".json"):
        return _from_json(Path(text.strip()))
    pairs = [tuple(side.strip() for side in part.split("=", 1)) for part in text.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise UsageError(f"label_values is '{text[:80]}'; write {FORM}")
    return _from_pairs(text[:80], pairs)


def original_values(values: np.ndarray, originals: Mapping[int, int]) -> np.ndarray:
    """Label maps in the values of the labelled site's files.

    Args:
        values: class numbers of any shape.
        originals: value of each class, see `LabelValues.originals`.

    Returns: integers of the smallest type that holds all values, of a kind that NIfTI has.
    Raises: UsageError for a class without a value.
    """
    if unknown := sorted(set(np.unique(values).tolist()) - originals.keys()):
        raise UsageError(f"class {unknown[0]} has no original value; leave original_values out")
    table = np.zeros(max(originals) + 1, np.int64)
    for label, value in originals.items():
        table[label] = value
    low, high = min(originals.values()), max(originals.values())
    kinds = (np.uint8, np.int16, np.int32)
    kind = next(k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max)
    return table.astype(kind)[values]


def suggestion(values: Iterable[int]) -> str:
    """The option that gives the values of a label map classes from 1 up, for messages.

    Args:
        values: that occur in a label map.
    """
    others = sorted({int(value) for value in values} - {0})
    shown = ",".join(f"{value}={label}" for label, value in enumerate(others[:SHOWN], start=1))
    return f"{OPTION} {shown}{',...' if len(others) > SHOWN else ''}"


def _from_json(path: Path) -> LabelValues:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UsageError(f"{path}: is larger than {MAX_BYTES} bytes; give a JSON file of label values")
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}); write {FORM}") from None
    if not isinstance(found, list) or any(type(pair) is not tuple for pair in found):
        raise UsageError(f"{path}: must be one JSON object; write {FORM}")
    return _from_pairs(os.fspath(path), [(value.strip(), str(label)) for value, label in found])


def _from_pairs(where: str, pairs: list[tuple[str, ...]]) -> LabelValues:
    named: dict[str, int] = {}
    for value, label in pairs:
        if not (ENTRY.fullmatch(value) and CLASS.fullmatch(label)):
            raise UsageError(f"label_values is '{where}', which has '{value}={label[:20]}'; write {FORM}")
        key = value if value == REST else str(int(value))
        if key in named:
            raise UsageError(f"label_values is '{where}', which names {value} twice; give it one class")
        named[key] = int(label)
    rest = named.pop(REST, None)
    return LabelValues({int(value): label for value, label in named.items()}, rest)


def _listed(values: list[int]) -> str:
    return ", ".join(map(str, values[:SHOWN])) + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")
