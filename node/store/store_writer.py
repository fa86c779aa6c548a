"""Writing a slice store: cut cases in a working folder, the arrays, and the moment from which they are the store."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from ...common.files import make_folder, open_for_writing, refuse_existing, sync, write_json
from ...common.json_text import parse_json
from ...common.records import read_record, write_record
from ...errors import FedFactoryError, UsageError
from ...imaging.images import ImageFacts, StandardisedSlices
from ...imaging.slice_choices import UNLABELLED
from ...imaging.slice_format import BACKGROUND, SliceFormat
from ..store_index import INDEX
from .case_slices import CaseSlices, LabelFacts, Survey
from .prepare_config import FORMAT_FILE
from .quality_page import QUALITY_PAGE, write_quality_page
from .slice_store import DTYPES, Case, CaseFacts, SliceStore, StoreIndex

WORK, STAGED = ".partial", "store"
CUT_LAYOUT = 2  # of the files in the working folder; those of another one are not used
ARRAY_NAME = re.compile(rf"({'|'.join(DTYPES)})-[0-9a-f]{{12}}\.npy")
FILL = {"images": BACKGROUND, "labels": UNLABELLED, "presence": 0}
LISTS = ("gaze", "references")
MADE_FROM_SLICES = {  # files beside the arrays, and the command that makes them
    "embedding.npy": "embed",
    "embedding.json": "embed",
    "gaze_candidates.npy": "gaze",
    "gaze_certainty.npy": "gaze",
    "gaze_candidates.json": "gaze",
    "pseudo_labels.npy": "pseudo-label",
    "pseudo_labels.json": "pseudo-label",
}


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """The folder inside a store where it is made or extended, for one run at a time.

    It stays after a crash, a kill or a full disk: the next run goes on from there. An error of the request or the data
    removes what this run has made.

    Raises: UsageError if `out` holds something that is no store, or another run is at work.
    """
    work = out / WORK
    try:
        refuse_existing(out)
    except UsageError:
        if not (out / INDEX).exists() and not work.is_dir():  # asked last: another run may have begun just now
            raise
    handle = _locked(work)
    try:
        yield work
    except FedFactoryError:
        if not (out / INDEX).exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        for folder in (work, out):  # go if nothing came of it
            with suppress(OSError):
                folder.rmdir()
        os.close(handle)  # the lock ends last: nobody else was at work in what went


def _locked(work: Path) -> int:
    """A handle of the folder `work`, made where it is missing, on which this process holds the lock.

    Raises: UsageError if another process holds it.
    """
    while True:
        make_folder(work)
        try:
            handle = os.open(work, os.O_RDONLY)
        except FileNotFoundError:  # another run has ended since
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if work.exists() and os.path.samestat(os.fstat(handle), work.stat()):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise UsageError(f"{work.parent}: another `fedfactory prepare` is working on this store") from None
        except FileNotFoundError:
            pass
        os.close(handle)  # of a folder that another run has removed since


@dataclass(frozen=True, kw_only=True)
class CutFacts:
    """What is known of a case in the working folder beside its arrays.

    Attributes:
        height: millimetres along the slice axis.
        labels: what is known of its labels.
        count: number of slices.
        image: what is known of its voxels.
        low: lowest standardised intensity of each channel.
        high: highest standardised intensity of each channel.
        inside: first and last + 1 of the slices, rows and columns that lie in the image; None for images that are as
            the store has them.
        clipped: share of the voxels far outside the intensity window; None where the window was not known yet.
        kinds: of the label arrays it has.
        classes: number of label values, background included; 0 without labels.
    """

    height: float
    labels: LabelFacts
    count: int
    image: ImageFacts
    low: tuple[float, ...]
    high: tuple[float, ...]
    inside: tuple[tuple[int, int], ...] | None
    clipped: float | None
    kinds: tuple[str, ...]
    classes: int


class CutCase:
    """One case's slices and labels in the working folder; complete once its file is there.

    The slices are kept as the store has them, or standardised where the site's intensity window is not known yet.
    """

    def __init__(self, work: Path, key: str) -> None:
        self.work, self.key = work, key

    @property
    def complete(self) -> bool:
        return self.path.exists()

    @cached_property
    def facts(self) -> CutFacts:
        """What is known beside the arrays, once they are complete."""
        with safe_open(self.path, "np") as file:
            return read_record(CutFacts, parse_json(file.metadata()["facts"]))

    def write(self, slices: CaseSlices) -> None:
        arrays = {
            "labels": slices.labels,
            "presence": slices.presence,
            "gaze": slices.gaze,
            "references": slices.reference,
        }
        arrays = {kind: array for kind, array in arrays.items() if array is not None}
        stored, raw = slices.stored, slices.standardised
        tensors = {"images": stored.images} if raw is None else {"inner": raw.values}
        tensors |= arrays
        facts = CutFacts(
            height=slices.height,
            labels=slices.facts,
            count=slices.count,
            image=slices.image,
            low=(stored if raw is None else raw).low,
            high=(stored if raw is None else raw).high,
            inside=None if raw is None else tuple((part.start, part.stop) for part in raw.inside),
            clipped=None if stored is None else stored.clipped,
            kinds=tuple(arrays),
            classes=slices.facts.highest_label + 1 if arrays else 0,
        )
        arrays = {kind: np.ascontiguousarray(array) for kind, array in tensors.items()}
        # One run at a time works in this folder, but two of its threads may cut cases with equal files.
        unfinished = self.path.with_suffix(f".{threading.get_ident()}.part")
        save_file(arrays, unfinished, {"facts": json.dumps(write_record(facts))})
        os.replace(unfinished, self.path)
        self.facts = facts  # so that they need not be read again

    def standardised(self) -> StandardisedSlices:
        """The slices, whose window was not known when they were cut."""
        assert self.facts.inside is not None
        inside = tuple(slice(*ends) for ends in self.facts.inside)
        return StandardisedSlices(self._load("inner"), inside, self.facts.count)

    def scaled(self, fmt: SliceFormat) -> tuple[dict[str, np.ndarray], float]:
        """The arrays (n, ...) as the store has them, and the share of voxels that lie far outside of the window."""
        arrays = {kind: self._load(kind) for kind in self.facts.kinds}
        if self.facts.clipped is not None:
            return {"images": self._load("images"), **arrays}, self.facts.clipped
        raw = self.standardised()
        return {"images": raw.stored(fmt), **arrays}, raw.clipped(fmt)

    def _load(self, kind: str) -> np.ndarray:
        """An array of the case, shaped (n, ...) as in `CaseSlices`."""
        # Not from `.npy`: its header is parsed by `ast`, which fails now and then where several threads do it.
        with safe_open(self.path, "np") as file:
            return file.get_tensor(kind)

    @property
    def path(self) -> Path:
        """Of its file: the arrays, with the facts beside them."""
        return self.work / f"{self.key}.safetensors"


def describe_case(
    name: str,
    seen: Survey,
    cut: CutFacts,
    *,
    label_kind: str,
    label_rule: str,
    split: str,
    first: int,
    clipped: float,
    digest: str,
) -> Case:
    """The entry of a case in the store's index."""
    return Case(
        name=name,
        patient=seen.patient,
        split=split,
        first=first,
        count=cut.count,
        label_kind=label_kind,
        label_rule=label_rule,
        shape=tuple(seen.shape),
        affine=tuple(tuple(row) for row in seen.affine.tolist()),
        box=seen.box,
        centre=seen.centre,
        localiser=seen.localiser,
        intensities=cut.image.intensities,
        height=cut.height,
        digest=seen.digest,
        voxels=cut.image.voxels,
        checksum=digest,
        facts=CaseFacts(
            spacing=tuple(seen.spacing.tolist()),
            blank=cut.image.blank,
            clipped=clipped,
            label_volumes=cut.labels.label_volumes,
            label_loss=cut.labels.label_loss,
            cut_labels=cut.labels.cut_labels,
            marks=cut.labels.marks,
            remarks=cut.labels.remarks,
        ),
    )


class StoreArrays:
    """The arrays of a store that is being made. Cases may be put from several threads.

    Args:
        work: working folder. count: slices. fmt: of the slices. classes: columns of `presence`.
        kinds: which arrays there are.
    """

    def __init__(self, work: Path, count: int, fmt: SliceFormat, *, classes: int, kinds: Iterable[str]) -> None:
        self.staged = work / STAGED
        shutil.rmtree(self.staged, ignore_errors=True)  # of a killed run
        make_folder(self.staged)
        side = (fmt.size, fmt.size)
        rows = {"images": (fmt.channels, *side), "labels": side, "presence": (classes,)}
        self.files = {kind: _ArrayFile(self._path(kind), kind, (count, *rows[kind])) for kind in rows if kind in kinds}
        # Of these a case has any number of rows, which follow the number of its first slice.
        self.lists: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in LISTS if kind in kinds}

    def _path(self, kind: str, content: str = "") -> Path:
        return self.staged / f"{kind}{content and '-'}{content}.npy"

    def put(self, case: Case, values: dict[str, np.ndarray]) -> None:
        """Write the arrays (n, ...) of a case; pixels without labels become unlabelled."""
        for kind, file in self.files.items():
            given, shape = values.get(kind), (case.count, *file.shape[1:])
            if given is None or given.shape != shape:
                filled = np.full(shape, FILL[kind], DTYPES[kind])
                if given is not None:
                    filled[..., : given.shape[-1]] = given  # `presence` has met more classes since
                given = filled
            file.write(case.first, given.astype(DTYPES[kind], copy=False))
        if "gaze" in values:
            self.lists["gaze"][case.first] = values["gaze"] + np.array([case.first, 0, 0, 0], np.float32)
        if "references" in values:
            numbered = np.insert(values["references"], 0, case.first, axis=1)
            self.lists["references"][case.first] = numbered

    def close(self, cases: list[Case]) -> dict[str, str]:
        """Rename the files after a hash of their content. Returns the names by kind."""
        for file in self.files.values():
            file.close()
        for kind, by_case in self.lists.items():
            rows = [by_case[first] for first in sorted(by_case)]
            with open_for_writing(self._path(kind)) as file:
                np.save(file, np.concatenate([np.empty((0, 4), DTYPES[kind]), *rows]), allow_pickle=False)
        content = hashlib.sha256("".join(case.checksum for case in cases).encode()).hexdigest()[:12]
        kinds = [*self.files, *self.lists]
        for kind in kinds:
            os.replace(self._path(kind), self._path(kind, content))
        return {kind: self._path(kind, content).name for kind in kinds}


class _ArrayFile:
    """A `.npy` file written row by row in any order. A memory map would keep all of it resident."""

    def __init__(self, path: Path, kind: str, shape: tuple[int, ...]) -> None:
        self.shape, dtype = shape, np.dtype(DTYPES[kind])
        self.row_bytes = dtype.itemsize * int(np.prod(shape[1:]))
        self.file = open_for_writing(path)
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self.file, header)
        self.file.flush()
        self.start = self.file.tell()
        # A full disk is an error now, not after an hour.
        if hasattr(os, "posix_fallocate"):  # not on macOS
            os.posix_fallocate(self.file.fileno(), 0, self.start + shape[0] * self.row_bytes)

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write rows (n, ...) from row number `first` on."""
        left, place = memoryview(np.ascontiguousarray(rows)).cast("B"), self.start + first * self.row_bytes
        while left:
            written = os.pwrite(self.file.fileno(), left, place)
            left, place = left[written:], place + written

    def close(self) -> None:
        self.file.close()


def made_from_slices(out: Path) -> tuple[str, ...]:
    """The commands whose results a store has beside its arrays; `commit` removes these."""
    return tuple(dict.fromkeys(command for name, command in MADE_FROM_SLICES.items() if (out / name).exists()))


def commit(out: Path, work: Path, index: StoreIndex) -> SliceStore:
    """Make the staged arrays and `index` the store. Until the index is renamed, the old store is complete."""
    staged = work / STAGED
    content = index.to_dict()
    write_json(staged / INDEX, content, compact=True)  # hundreds of numbers for each case
    write_json(staged / FORMAT_FILE, {name: content[name] for name in ("made_by", "domain", "format")})
    store = SliceStore(staged, index=index)
    with ThreadPoolExecutor(1) as pool:  # the disk works while the page is drawn
        on_disk = [pool.submit(sync, staged / name) for name in index.arrays.values()]
        write_quality_page(store, staged / QUALITY_PAGE)
        for written in on_disk:
            written.result()
    for name in MADE_FROM_SLICES:
        (out / name).unlink(missing_ok=True)
    for name in (*index.arrays.values(), FORMAT_FILE, QUALITY_PAGE, INDEX):
        os.replace(staged / name, out / name)
    store.path = out  # its memory maps are of the same files
    return store


def update_index(out: Path, work: Path, index: StoreIndex) -> SliceStore:
    """Write a new index, and the quality page that follows from it, of a store whose slices stay as they are."""
    changed = SliceStore(out, index=index)
    write_quality_page(changed, work / QUALITY_PAGE)
    os.replace(work / QUALITY_PAGE, out / QUALITY_PAGE)
    write_json(out / INDEX, index.to_dict(), compact=True)
    return changed


def tidy(out: Path, store: SliceStore) -> None:
    """Remove the working folder's content and arrays that the index does not name any more."""
    for path in (out / WORK).iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for path in out.iterdir():
        if ARRAY_NAME.fullmatch(path.name) and path.name not in store.files.values():
            path.unlink()
