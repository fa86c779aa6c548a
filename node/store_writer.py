"""Writing a slice store: cut cases in a working folder, the arrays, and the moment from which they are the store."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FedFactoryError, UsageError
from ..files import refuse_existing, write_json
from ..slicing import UNLABELLED, SliceFormat
from .case_slices import CaseSlices
from .prepare_config import FORMAT_FILE
from .quality_page import QUALITY_PAGE, write_quality_page
from .store import DTYPES, INDEX, Case, SliceStore

WORK, STAGED = ".partial", "store"
ARRAY_NAME = re.compile(rf"({'|'.join(DTYPES)})-[0-9a-f]{{12}}\.npy")
FAR_OUTSIDE = 0.05  # of the window's width
OF_EARLIER_SLICES = ("embedding.npy", "embedding.json")


@contextmanager
def working_folder(out: Path) -> Iterator[Path]:
    """The folder inside a store where it is made or extended, for one run at a time.

    It stays after a crash, a kill or a full disk: the next run goes on from there. An error of the request or the data
    removes what this run has made.

    Raises: UsageError if `out` holds something that is no store, or another run is at work.
    """
    work = out / WORK
    if not (out / INDEX).exists() and not work.is_dir():
        refuse_existing(out)
    work.mkdir(parents=True, exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{out}: another `fedfactory prepare` is working on this store") from None
        yield work
    except FedFactoryError:
        if not (out / INDEX).exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    finally:
        os.close(handle)
        for folder in (work, out):  # go if nothing came of it
            with suppress(OSError):
                folder.rmdir()


class CutCase:
    """One case's standardised slices and labels in the working folder; complete once its facts are there."""

    def __init__(self, work: Path, key: str) -> None:
        self.work, self.key = work, key

    @property
    def complete(self) -> bool:
        return self._path("facts.json").exists()

    @property
    def facts(self) -> dict[str, Any]:
        return json.loads(self._path("facts.json").read_text(encoding="utf-8"))

    def write(self, slices: CaseSlices) -> None:
        arrays = {"labels": slices.labels, "presence": slices.presence, "gaze": slices.gaze}
        arrays = {kind: array for kind, array in arrays.items() if array is not None}
        for kind, array in {"standardised": slices.standardised, **arrays}.items():
            with self._path(f"{kind}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
        facts = {
            **slices.facts,
            "count": len(slices.standardised),
            "low": float(np.nanmin(slices.standardised)),
            "high": float(np.nanmax(slices.standardised)),
            "kinds": list(arrays),
            "classes": slices.facts["highest_label"] + 1 if arrays else 0,
        }
        write_json(self._path("facts.json"), facts)

    def standardised(self) -> np.ndarray:
        """(n, S, S) float32, NaN outside the volume."""
        return self._load("standardised")

    def scaled(self, fmt: SliceFormat) -> tuple[dict[str, np.ndarray], float]:
        """The arrays as the store has them, and the share of voxels that lie far outside of the window."""
        raw = self.standardised()
        finite = np.isfinite(raw).sum()
        low, high = fmt.window
        slack = FAR_OUTSIDE * (high - low)  # air a little darker than the site's darkest loses nothing
        cut = (raw < low - slack).sum() + (raw > high + slack).sum()
        arrays = {"images": fmt.scale(raw).astype(np.float16)}
        arrays |= {kind: self._load(kind) for kind in self.facts["kinds"]}
        return arrays, float(cut / max(1, finite))

    def _load(self, kind: str) -> np.ndarray:
        return np.load(self._path(f"{kind}.npy"), allow_pickle=False)

    def _path(self, ending: str) -> Path:
        return self.work / f"{self.key}.{ending}"


class StoreArrays:
    """The arrays of a store that is being made.

    Args:
        work: working folder. count: slices. size: pixels per side. classes: columns of `presence`.
        kinds: which arrays there are.
    """

    def __init__(self, work: Path, count: int, size: int, classes: int, kinds: Iterable[str]) -> None:
        self.staged = work / STAGED
        shutil.rmtree(self.staged, ignore_errors=True)  # of a killed run
        self.staged.mkdir()
        shapes = {"images": (count, size, size), "labels": (count, size, size), "presence": (count, classes)}
        self.arrays = {kind: self._reserve(kind, shape) for kind, shape in shapes.items() if kind in kinds}
        self.gaze: dict[int, np.ndarray] | None = {} if "gaze" in kinds else None

    def _reserve(self, kind: str, shape: tuple[int, ...]) -> np.memmap:
        path = self.staged / f"{kind}.npy"
        array = np.lib.format.open_memmap(path, "w+", DTYPES[kind], shape)
        with path.open("rb+") as file:  # a full disk must be an error now, not a crash while the map is written
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        if kind == "labels":
            array[:] = UNLABELLED
        return array

    def put(self, first: int, values: dict[str, np.ndarray]) -> None:
        """Arrays of the case whose first slice is `first`."""
        for kind, array in values.items():
            if kind == "gaze":
                self.gaze[first] = array + np.array([first, 0, 0, 0], np.float32)
            elif kind == "presence":
                self.arrays[kind][first : first + len(array), : array.shape[1]] = array
            else:
                self.arrays[kind][first : first + len(array)] = array

    def close(self, cases: list[Case]) -> dict[str, str]:
        """Give the files names that tell their content. Returns the names by kind."""
        for array in self.arrays.values():
            array.flush()
        if self.gaze is not None:
            rows = [self.gaze[first] for first in sorted(self.gaze)]
            with (self.staged / "gaze.npy").open("wb") as file:
                np.save(file, np.concatenate([np.empty((0, 4), np.float32), *rows]), allow_pickle=False)
        content = hashlib.sha256("".join(case.checksum for case in cases).encode()).hexdigest()[:12]
        kinds = [*self.arrays, *(["gaze"] if self.gaze is not None else [])]
        self.arrays = {}
        for kind in kinds:
            os.replace(self.staged / f"{kind}.npy", self.staged / f"{kind}-{content}.npy")
        return {kind: f"{kind}-{content}.npy" for kind in kinds}


def commit(out: Path, work: Path, index: dict[str, Any]) -> None:
    """Make the staged arrays and `index` the store. Until the index is renamed, the old store is complete."""
    staged = work / STAGED
    write_json(staged / INDEX, index)
    write_json(staged / FORMAT_FILE, {key: index[key] for key in ("made_by", "domain", "format")})
    write_quality_page(SliceStore(staged), staged / QUALITY_PAGE)
    for name in OF_EARLIER_SLICES:
        (out / name).unlink(missing_ok=True)
    for name in (*index["arrays"].values(), FORMAT_FILE, QUALITY_PAGE, INDEX):
        os.replace(staged / name, out / name)


def tidy(out: Path, store: SliceStore) -> None:
    """Remove the working folder's content and arrays that the index does not name any more."""
    for path in (out / WORK).iterdir():
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()
    for path in out.iterdir():
        if ARRAY_NAME.fullmatch(path.name) and path.name not in store.files.values():
            path.unlink()
