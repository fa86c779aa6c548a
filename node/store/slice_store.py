"""The slice store: memory-mapped arrays and one JSON index, readable by several processes, without pickles."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ...common.progress import track
from ...errors import ConfigError, StoreError, UsageError
from ...imaging.slice_format import SliceFormat
from ...imaging.slice_grid import SliceGrid
from .patient_split import SPLITS
from .prepare_config import LABEL_KINDS

INDEX = "store.json"
FORMAT_VERSION = 3
ARRAY_OF = {"image": "presence", "gaze": "gaze"}  # where labels of a kind lie; all others are label maps
DTYPES = {"images": np.float16, "labels": np.uint8, "presence": np.uint8, "gaze": np.float32}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One volume of a store.

    Attributes:
        name: of the case at this site. patient: equal for all volumes of one patient. split: "train", ...
        first, count: its slices are first .. first + count - 1.
        label_kind: of its labels; "none" without any.
        shape, affine: of the stored volume. box: what was kept of it, along the turned axes.
        mean, deviation: the intensities v became (v - mean) / deviation.
        height: millimetres along the slice axis.
        digest: SHA-256 over its files. voxels: over its voxels. checksum: over its slices and labels in the store.
        facts: what the quality page shows.
    """

    name: str
    patient: str
    split: str
    first: int
    count: int
    label_kind: str
    shape: tuple[int, int, int]
    affine: tuple[tuple[float, ...], ...]
    box: tuple[tuple[int, int], ...]
    mean: float
    deviation: float
    height: float
    digest: str
    voxels: str
    checksum: str
    facts: dict[str, Any]

    @property
    def labelled(self) -> bool:
        return self.label_kind != "none"

    @property
    def span(self) -> slice:
        return slice(self.first, self.first + self.count)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Case:
        case = cls(**{field.name: values[field.name] for field in fields(cls)})
        if (
            case.split not in SPLITS
            or case.label_kind not in LABEL_KINDS
            or case.count < 0
            or case.first < 0
            or len(case.shape) != 3
        ):
            raise ValueError(f"case {case.name!r} is not described properly")
        return case


class SliceStore:
    """Read access to a prepared site.

    Attributes:
        domain: name of the site's scanner, modality or organ.
        format: size, spacing, window and bins of the slices.
        label_kind: of the labelled training cases (of all, if none of those is labelled); "mixed" if they differ,
            "none" for a site without labels.
        classes: number of label values including background; 0 without labels.
        height: median extent of the volumes along the slice axis, millimetres.
        cases: the volumes, sorted by name.
        site: settings of this store beside the slice format.
        images: (N, S, S) float16 memory map, in [-1, 1].
        labels: (N, S, S) uint8 memory map, 255 where nobody annotated; or None.
        presence: (N, classes) uint8 memory map, 1 where a slice shows the class, for image-level labels; or None.
        gaze: (M, 4) float32 memory map: slice, row, column, milliseconds of each fixation; or None.
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
                raise StoreError(
                    f"{self.path}: store version {index['version']}, this program reads {FORMAT_VERSION}; run "
                    "`fedfactory prepare` again"
                )
            self.domain: str = index["domain"]
            self.classes: int = index["classes"]
            self.height: float = index["height"]
            self.site: dict[str, Any] = index["site"]
            self.warnings: list[str] = index["warnings"]
            self.format = SliceFormat.from_dict(index["format"])
            self.cases = [Case.from_dict(case) for case in index["cases"]]
            self.label_kind = _common_kind(self.cases)
            self.files: dict[str, str] = index["arrays"]
            arrays = {kind: self._open(kind) for kind in DTYPES}
            self.z_bin = np.asarray(index["z_bin"], dtype=np.int64)
            self.images, self.labels = arrays["images"], arrays["labels"]
            self.presence, self.gaze = arrays["presence"], arrays["gaze"]
            self._check()
        except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise StoreError(f"{self.path}: the store is damaged ({error}); run `fedfactory prepare` again") from None

    def _open(self, kind: str) -> np.ndarray | None:
        name = self.files.get(kind)
        if name is None:
            return None
        if Path(name).name != name:  # an index must not point out of its store
            raise ValueError(f"{kind} lie in {name!r}")
        array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        if array.dtype != DTYPES[kind]:
            raise ValueError(f"{kind} are {array.dtype}")
        return array

    def _check(self) -> None:
        total = sum(case.count for case in self.cases)
        slices = (total, self.format.size, self.format.size)
        starts = np.cumsum([0, *(case.count for case in self.cases)])[:-1]
        ok = (
            self.images.shape == slices
            and (self.labels is None or self.labels.shape == slices)
            and (self.presence is None or self.presence.shape == (total, self.classes))
            and (self.gaze is None or self.gaze.shape[1:] == (4,))
            and len(self.z_bin) == total
            and all(case.first == start for case, start in zip(self.cases, starts, strict=True))
        )
        if not ok:
            raise ValueError("arrays and index disagree")
        if total and not 0 <= self.z_bin.min() <= self.z_bin.max() < self.format.z_bins:
            raise ValueError(f"a slice height lies outside of the {self.format.z_bins} bins")

    def __len__(self) -> int:
        return len(self.images)

    def slices(self, split: str | None = None, *, kinds: Collection[str] = LABEL_KINDS) -> np.ndarray:
        """Indices of slices, rising, (n,) int64.

        Args:
            split: "train", "validation" or "test"; None takes all.
            kinds: of the cases' labels; others are left out.
        """
        chosen = [
            np.arange(case.first, case.first + case.count)
            for case in self.cases
            if split in (None, case.split) and case.label_kind in kinds
        ]
        return np.concatenate(chosen) if chosen else np.empty(0, dtype=np.int64)

    def labelled_slices(self, split: str | None = "train") -> np.ndarray:
        """Indices of the slices of densely labelled cases, (n,). Raises StoreError if there are none."""
        chosen = self.slices(split, kinds=("dense",))
        if self.labels is None or not len(chosen):
            where = "" if split is None else f" in the {split} part"
            others = sorted({case.label_kind for case in self.cases if case.labelled} - {"dense"})
            also = f"; its labels are of kind {', '.join(others)}" if others else ""
            raise StoreError(f"{self.path}: no case of this store has dense labels{where}{also}")
        return chosen

    def label_kinds(self) -> dict[str, int]:
        """Training slices by kind of label: what a site announces, and what it is held to."""
        counts: dict[str, int] = {}
        for case in self.cases:
            if case.split == "train":
                counts[case.label_kind] = counts.get(case.label_kind, 0) + case.count
        return dict(sorted(counts.items()))

    def grid(self, case: Case) -> SliceGrid:
        """Where the slices of a case lie in its volume: for bringing predictions back to it."""
        box = tuple(tuple(ends) for ends in case.box)
        return SliceGrid(case.shape, np.array(case.affine), box=box, fmt=self.format)

    def require(self, *, size: int, z_bins: int) -> None:
        """Raises StoreError if the slices do not fit a network of this size and number of bins."""
        if self.format.size != size or self.format.z_bins != z_bins:
            raise StoreError(
                f"{self.path}: slices are {self.format.size} px in {self.format.z_bins} bins, the factory needs "
                f"{size} px in {z_bins}; run `fedfactory prepare --size {size} --z-bins {z_bins}`"
            )

    def verify(self) -> None:
        """Compare all slices with their checksums. Raises StoreError naming the first case that differs."""
        for case in track(self.cases, "checking the store"):
            if checksum(self.parts(case)) != case.checksum:
                raise StoreError(f"{self.path}: the slices of case {case.name} have changed since they were prepared")

    def parts(self, case: Case) -> dict[str, np.ndarray]:
        """The arrays of one case, by kind; of its labels only if it has some. Slices of `gaze` count from its first."""
        found = {"images": self.images[case.span]}
        array = ARRAY_OF.get(case.label_kind, "labels")
        if case.labelled and array == "labels":
            found["labels"] = self.labels[case.span]
        elif case.labelled and array == "presence":
            found["presence"] = self.presence[case.span]
        elif case.labelled:
            inside = (self.gaze[:, 0] >= case.first) & (self.gaze[:, 0] < case.first + case.count)
            found["gaze"] = self.gaze[inside] - np.array([case.first, 0, 0, 0], np.float32)
        return found


def _common_kind(cases: list[Case]) -> str:
    labelled = [case for case in cases if case.labelled]
    kinds = {case.label_kind for case in labelled if case.split == "train"} or {case.label_kind for case in labelled}
    return "none" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"


def checksum(parts: dict[str, np.ndarray]) -> str:
    """SHA-256 over the arrays of a case. Classes that no case had when it was prepared do not count."""
    digest = hashlib.sha256()
    for kind in sorted(parts):
        array = parts[kind]
        if kind == "presence":
            array = np.argwhere(array)
        digest.update(f"{kind} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
