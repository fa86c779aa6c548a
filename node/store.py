"""The slice store: memory-mapped arrays and one JSON index, readable by several processes, without pickles."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, StoreError, UsageError
from ..slicing import SliceFormat

INDEX, IMAGES, LABELS = "store.json", "images.npy", "labels.npy"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Case:
    """One volume of a store: slices first .. first + count - 1."""

    name: str
    first: int
    count: int
    labelled: bool


class SliceStore:
    """Read access to a prepared site.

    Attributes:
        domain: name of the site's scanner, modality or organ.
        format: size, spacing, window and bins of the slices.
        label_kind: "dense", or "none" for a site without labels.
        classes: number of label values including background; 0 without labels.
        height: median extent of the volumes along the slice axis, millimetres.
        images: (N, S, S) float16 memory map, in [-1, 1].
        labels: (N, S, S) uint8 memory map, or None.
        z_bin: (N,) int64 height bin of each slice.

    Raises:
        UsageError: there is no store at `path`.
        StoreError: it is damaged or of another version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / INDEX).is_file():
            raise UsageError(
                f"{self.path}: no slice store here ({INDEX} is missing); make one with `fedfactory prepare`"
            )
        try:
            index = json.loads((self.path / INDEX).read_text(encoding="utf-8"))
            if index["version"] != FORMAT_VERSION:
                raise StoreError(f"{self.path}: store version {index['version']}, this program reads {FORMAT_VERSION}")
            self.domain: str = index["domain"]
            self.label_kind: str = index["label_kind"]
            self.classes: int = index["classes"]
            self.height: float = index["height"]
            self.format = SliceFormat.from_dict(index["format"])
            self.cases = [Case(**case) for case in index["cases"]]
            self.images = np.load(self.path / IMAGES, mmap_mode="r", allow_pickle=False)
            has_labels = self.label_kind != "none"
            self.labels = np.load(self.path / LABELS, mmap_mode="r", allow_pickle=False) if has_labels else None
            self.z_bin = np.asarray(index["z_bin"], dtype=np.int64)
        except (OSError, EOFError, ValueError, KeyError, TypeError, ConfigError) as error:
            raise StoreError(f"{self.path}: the store is damaged ({error}); run `fedfactory prepare` again") from None
        self._check()

    def _check(self) -> None:
        shape = (sum(case.count for case in self.cases), self.format.size, self.format.size)
        arrays = [self.images] if self.labels is None else [self.images, self.labels]
        if any(array.shape != shape for array in arrays) or len(self.z_bin) != shape[0]:
            raise StoreError(f"{self.path}: arrays and index disagree; run `fedfactory prepare` again")
        if len(self.z_bin) and not 0 <= self.z_bin.min() <= self.z_bin.max() < self.format.z_bins:
            raise StoreError(f"{self.path}: a slice height lies outside of the {self.format.z_bins} bins")

    def __len__(self) -> int:
        return len(self.images)

    def labelled_slices(self) -> np.ndarray:
        """Indices of the slices of labelled cases, (n,). Raises StoreError if there are none."""
        chosen = [np.arange(c.first, c.first + c.count) for c in self.cases if c.labelled]
        if not chosen:
            raise StoreError(f"{self.path}: no case of this store has labels")
        return np.concatenate(chosen)

    def require(self, *, size: int, z_bins: int) -> None:
        """Raises StoreError if the slices do not fit a network of this size and number of bins."""
        if self.format.size != size or self.format.z_bins != z_bins:
            raise StoreError(
                f"{self.path}: slices are {self.format.size} px in {self.format.z_bins} bins, the factory needs "
                f"{size} px in {z_bins}; run `fedfactory prepare --size {size} --z-bins {z_bins}`"
            )


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """Write the index last: a folder without it is not a store."""
    text = json.dumps({"version": FORMAT_VERSION, **index}, indent=1, ensure_ascii=False)
    (folder / INDEX).write_text(text, encoding="utf-8")
