"""The slice store: memory-mapped arrays and one JSON index, readable by several processes, without pickles."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...common.json_text import read_json
from ...common.names import check_label, check_name
from ...common.progress import track
from ...common.records import read_record, record_to_dict
from ...errors import ConfigError, StoreError
from ...generative.config import FactoryConfig
from ...imaging.accounting.account import Accounting
from ...imaging.formats.label_values import parse_label_values
from ...imaging.images import Intensities
from ...imaging.slice_format import SliceFormat
from ...imaging.slice_grid import SliceGrid
from ...imaging.volumes import Volume
from ..store_index import INDEX, require_store
from .patient_split import SPLITS
from .prepare_config import LABEL_KINDS, SiteSettings
from .reference_runs import from_runs

FORMAT_VERSION = 5
ARRAY_OF = {"image": "presence", "gaze": "gaze"}  # where labels of a kind lie; all others are label maps
DTYPES = {"images": np.float16, "labels": np.uint8, "presence": np.uint8, "gaze": np.float32, "references": np.uint32}


@dataclass(frozen=True, kw_only=True)
class CaseFacts:
    """What the quality page and the warnings show of a case.

    Attributes:
        spacing: millimetres along the turned axes.
        blank: number of slices in which all voxels are equal.
        clipped: share of the voxels far outside the intensity window, in [0, 1].
        label_volumes: millilitres by label value.
        label_loss: share of the annotated voxels that lie outside the slices, in [0, 1].
        cut_labels: label value to the number of slices in which it touches the border of the image.
        marks: whether the labels mark anything.
        remarks: what is unusual about the label file, one sentence each.
    """

    spacing: tuple[float, float, float]
    blank: int
    clipped: float
    label_volumes: dict[str, float]
    label_loss: float
    cut_labels: dict[str, int]
    marks: bool
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Case:
    """One volume or picture of a store.

    Attributes:
        name: of the case at this site.
        patient: equal for all volumes of one patient.
        split: "train", "validation" or "test".
        first: index of its first slice.
        count: number of its slices.
        label_kind: of its labels; "none" without any.
        label_rule: how the values in its label file were read, see `PrepareConfig.label_rule`.
        shape: of the stored volume.
        affine: (4, 4) of the stored volume.
        box: first and last + 1 index of the part that was kept, along the turned axes.
        centre: voxel in the middle of the slices, along the first two turned axes; None is the middle of the box.
        localiser: SHA-256 of the localiser that found the centre; None if a table gives it, or there is none.
        intensities: grey levels of each channel.
        height: millimetres along the slice axis.
        digest: SHA-256 over its files.
        voxels: SHA-256 over its voxels.
        checksum: SHA-256 over its slices and labels in the store.
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
    centre: tuple[float, float] | None = None
    localiser: str | None = None
    label_rule: str = ""
    intensities: tuple[Intensities, ...]
    height: float
    digest: str
    voxels: str
    checksum: str
    facts: CaseFacts

    @property
    def labelled(self) -> bool:
        return self.label_kind != "none"

    @property
    def has_reference(self) -> bool:
        """Whether the store keeps its label map on the volume's own grid, for scores."""
        return self.split == "test" and self.label_kind == "dense"

    @property
    def span(self) -> slice:
        return slice(self.first, self.first + self.count)

    def __post_init__(self) -> None:
        for name, known in (("split", SPLITS), ("label_kind", LABEL_KINDS)):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ConfigError(f"{name} of case {self.name!r} is '{value}'; choose one of {', '.join(known)}")
        for name in ("first", "count"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} of case {self.name!r} is {getattr(self, name)}; it must not be negative")


@dataclass(frozen=True, kw_only=True)
class StoreIndex:
    """The content of `store.json`.

    Attributes:
        version: of the store's layout, see FORMAT_VERSION.
        made_by: program and version.
        domain: see `SliceStore`.
        classes: see `SliceStore`.
        class_names: see `SliceStore`.
        height: see `SliceStore`.
        site: see `SliceStore`.
        format: see `SliceStore`.
        arrays: file names by kind of array.
        warnings: what is unusual about the volumes, one sentence each.
        cases: sorted by name.
        z_bin: height bin of each slice.
        accounting: see `SliceStore`.
    """

    version: int
    made_by: str
    domain: str
    classes: int
    class_names: dict[str, str]
    height: float
    site: SiteSettings
    format: SliceFormat
    arrays: dict[str, str]
    warnings: tuple[str, ...]
    cases: tuple[Case, ...]
    z_bin: tuple[int, ...]
    accounting: Accounting | None = None

    def __post_init__(self) -> None:
        check_name("domain", self.domain)
        for value, name in self.class_names.items():
            check_label(f"the name of class {value[:80]}", name)

    def with_patients(self, renamed: Mapping[str, str]) -> StoreIndex:
        """The index with other names for some patients, in its sentences too."""
        warnings = self.warnings
        for before, after in renamed.items():
            warnings = tuple(text.replace(before, after) for text in warnings)
        cases = tuple(replace(case, patient=renamed.get(case.patient, case.patient)) for case in self.cases)
        return replace(self, cases=cases, warnings=warnings)

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return record_to_dict(self)


class SliceStore:
    """Read access to a prepared site.

    Attributes:
        domain: name of the site's scanner, modality or organ.
        format: size, spacing, window and bins of the slices.
        label_kind: of the labelled training cases (of all, if none of those is labelled); "mixed" if they differ,
            "none" for a site without labels.
        classes: number of label values including background; 0 without labels.
        class_names: name by label value, of the classes that have one.
        label_values: class of each value in label maps; None where values are class numbers.
        height: median extent of the volumes along the slice axis, millimetres.
        cases: the volumes, sorted by name.
        site: settings of this store beside the slice format.
        warnings: what is unusual about the volumes, one sentence each.
        accounting: what became of every entry of the folder of the last run; None in a store of an earlier version.
        files: file names by kind of array.
        images: (N, C, S, S) float16 memory map, in [-1, 1].
        labels: (N, S, S) uint8 memory map, 255 where nobody annotated; or None.
        presence: (N, classes) uint8 memory map, 1 where a slice shows the class, for image-level labels; or None.
        gaze: (M, 4) float32 memory map: slice, row, column, milliseconds of each fixation; or None.
        references: (R, 4) uint32 memory map: first slice of a densely labelled test case, and a run of its label map
            on the volume's own grid, see `to_runs`; or None.
        z_bin: (N,) int64 height bin of each slice.

    Args:
        path: folder of the store.
        index: content of its index, if it is known; None reads it.

    Raises:
        UsageError: there is no store at `path`.
        StoreError: it is damaged or of another version.
    """

    def __init__(self, path: str | Path, *, index: StoreIndex | None = None) -> None:
        self.path = Path(path)
        try:
            index = index or self.read_index()
            self.domain, self.classes, self.height = index.domain, index.classes, index.height
            self.class_names = {int(value): name for value, name in index.class_names.items()}
            self.label_values = parse_label_values(index.site.label_values) if index.site.label_values else None
            self.site, self.format, self.files = index.site, index.format, index.arrays
            self.cases, self.warnings = list(index.cases), list(index.warnings)
            self.accounting = index.accounting
            self.label_kind = _common_kind(self.cases)
            arrays = {kind: self._open(kind) for kind in DTYPES}
            self.z_bin = np.asarray(index.z_bin, dtype=np.int64)
            self.images, self.labels = arrays["images"], arrays["labels"]
            self.presence, self.gaze, self.references = arrays["presence"], arrays["gaze"], arrays["references"]
            self._check()
        except (OSError, EOFError, ArithmeticError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise self._damaged(error) from None
        except ConfigError as error:
            raise self._damaged(error) from None

    def _damaged(self, error: Exception) -> StoreError:
        return StoreError(f"{self.path}: the store is damaged ({error}); run `fedfactory prepare` again")

    def read_index(self) -> StoreIndex:
        """The content of the index as it is on the disk now. Raises as the class."""
        require_store(self.path)
        content = read_json(self.path / INDEX)
        if content["version"] != FORMAT_VERSION:
            raise StoreError(
                f"{self.path}: store version {content['version']}, this program reads {FORMAT_VERSION}; run "
                "`fedfactory prepare` again, into a new folder"
            )
        return read_record(StoreIndex, content)

    def _open(self, kind: str) -> np.ndarray | None:
        """The array of a kind as a memory map, shaped as the attributes of the class; None if there is none."""
        name = self.files.get(kind)
        if name is None:
            return None
        if Path(name).name != name:  # an index must not point out of its store
            raise ValueError(f"{kind} lie in {name!r}")
        try:
            array = np.load(self.path / name, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # numpy parses the header with Python's own parser, which raises many types
            raise ValueError(f"{name} is no readable array ({error})") from None
        if array.dtype != DTYPES[kind]:
            raise ValueError(f"{kind} are {array.dtype}; they must be {np.dtype(DTYPES[kind])}")
        return array

    def _check(self) -> None:
        total = sum(case.count for case in self.cases)
        slices = (total, self.format.size, self.format.size)
        starts = np.cumsum([0, *(case.count for case in self.cases)])[:-1]
        ok = (
            self.images.shape == (total, self.format.channels, *slices[1:])
            and (self.labels is None or self.labels.shape == slices)
            and (self.presence is None or self.presence.shape == (total, self.classes))
            and (self.gaze is None or self.gaze.shape[1:] == (4,))
            and (self.references is None or self.references.shape[1:] == (4,))
            and all(getattr(self, ARRAY_OF.get(c.label_kind, "labels")) is not None for c in self.cases if c.labelled)
            and len(self.z_bin) == total
            and all(case.first == start for case, start in zip(self.cases, starts, strict=True))
        )
        if not ok:
            raise ValueError(f"the arrays do not have the shapes of {total} slices that the index must describe")
        if total and not 0 <= self.z_bin.min() <= self.z_bin.max() < self.format.z_bins:
            raise ValueError(
                f"z_bin is {self.z_bin.min()} to {self.z_bin.max()}; it must be 0 to {self.format.z_bins - 1}"
            )

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

    def volume_of_slices(self) -> np.ndarray:
        """(N,) int64, number of the case that each slice belongs to."""
        return np.repeat(np.arange(len(self.cases)), [case.count for case in self.cases])

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

    @property
    def card_entries(self) -> dict[str, dict]:
        """What the card of a segmenter of these labels records of them: `class_names` and `original_values`."""
        originals = {} if self.label_values is None else self.label_values.originals
        return {
            "class_names": {str(label): name for label, name in self.class_names.items()},
            "original_values": {str(label): value for label, value in originals.items()},
        }

    @property
    def centred(self) -> bool:
        """Whether slices are cut around given places, such as a localiser's."""
        return any(case.centre is not None for case in self.cases)

    def grid(self, case: Case) -> SliceGrid:
        """Where the slices of a case lie in its volume: for bringing predictions back to it."""
        return SliceGrid(case.shape, np.array(case.affine), box=case.box, fmt=self.format, centre=case.centre)

    def require_factory(self, config: FactoryConfig) -> None:
        """Raises StoreError if the slices do not fit a factory's networks: size, number of bins and channels."""
        fmt = self.format
        if fmt.channels != config.image_channels:
            raise StoreError(
                f"{self.path}: slices have {fmt.channels} channels, the factory needs {config.image_channels}; run "
                "`fedfactory prepare` with other channels (--image-key, --colour)"
            )
        if (fmt.size, fmt.z_bins) != (config.image_size, config.z_bins):
            raise StoreError(
                f"{self.path}: slices are {fmt.size} px in {fmt.z_bins} bins, the factory needs {config.image_size} px "
                f"in {config.z_bins}; run `fedfactory prepare --size {config.image_size} --z-bins {config.z_bins}`"
            )

    def verify(self) -> None:
        """Compare all slices with their checksums. Raises StoreError naming the first case that differs."""
        for case in track(self.cases, "checking the store"):
            if checksum(self.parts(case)) != case.checksum:
                raise StoreError(f"{self.path}: the slices of case {case.name} have changed since they were prepared")

    def parts(self, case: Case) -> dict[str, np.ndarray]:
        """The arrays of one case by kind, shaped as the attributes of the class; labels only if it has some.

        Slice numbers in "gaze" count from the first slice of the case; "references" has the runs of `to_runs`.
        """
        found = {"images": self.images[case.span]}
        array = ARRAY_OF.get(case.label_kind, "labels")
        if case.labelled and array == "labels":
            found["labels"] = self.labels[case.span]
        elif case.labelled and array == "presence":
            found["presence"] = self.presence[case.span]
        elif case.labelled:
            inside = (self.gaze[:, 0] >= case.first) & (self.gaze[:, 0] < case.first + case.count)
            found["gaze"] = self.gaze[inside] - np.array([case.first, 0, 0, 0], np.float32)
        if case.has_reference and self.references is not None:
            found["references"] = self.references[self.references[:, 0] == case.first][:, 1:]
        return found

    def reference(self, case: Case) -> Volume:
        """The label map of a densely labelled test case on the volume's own grid, uint8, 255 where nobody annotated.

        Raises: StoreError if the store has none.
        """
        runs = self.parts(case).get("references")
        if runs is None:
            raise StoreError(
                f"{self.path}: case {case.name} has no reference; only densely labelled test cases have one"
            )
        return Volume(from_runs(runs, case.shape), np.array(case.affine))


def _common_kind(cases: list[Case]) -> str:
    labelled = [case for case in cases if case.labelled]
    kinds = {case.label_kind for case in labelled if case.split == "train"} or {case.label_kind for case in labelled}
    return "none" if not kinds else kinds.pop() if len(kinds) == 1 else "mixed"


def checksum(parts: dict[str, np.ndarray]) -> str:
    """SHA-256 over the arrays (n, ...) of a case; columns of "presence" without a 1 do not count."""
    digest = hashlib.sha256()
    for kind in sorted(parts):
        array = parts[kind]
        if kind == "presence":
            array = np.argwhere(array)
        digest.update(f"{kind} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
