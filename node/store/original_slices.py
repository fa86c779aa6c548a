"""Slices that the published program prepared, as a store. They are pickled, so a loader that knows arrays only."""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np

from ...errors import UsageError, VolumeError
from ...imaging.case_files import CaseFiles, Found, printable
from ...imaging.images import ImageFacts, Intensities, StandardisedSlices, digest_of_array
from ...imaging.patients import patient_of
from ...imaging.slice_choices import UNLABELLED
from ...imaging.slice_format import SliceFormat
from .case_slices import CaseSlices, LabelFacts, Survey, digest_of, label_facts
from .prepare import Preparation, prepare_cases
from .prepare_config import PrepareConfig
from .reference_runs import to_runs

HEADERS = Lock()  # numpy reads them by `ast`, which fails now and then where several threads do it
NAME = re.compile(r"(?P<case>.+)_slice(?P<number>\d{3,})\.npy")
MAX_BYTES = 1 << 28  # of one file
ARRAY_PARTS = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),  # how old protocols write bytes
}


def import_slices(
    source: str | Path, out: str | Path, config: PrepareConfig, *, slice_spacing: float = 1.0, workers: int = 1
) -> Preparation:
    """Slices `<case>_slice<NNN>.npy` of the published program as a store. Nothing in the files is executed.

    Such a file is a pickled dictionary: `data` (S, S, 1) in [-1, 1], one-hot `mask` (S, S, C), and `weight` (S, S, 1)
    or None, whose zeros become unlabelled pixels.

    Args:
        config: domain, height bins, split, and `spacing` (millimetres per pixel, default 1); the size is the slices'.
        slice_spacing: millimetres from slice to slice, which the files do not hold.

    Raises: as `prepare`.
    """
    found = _find(Path(source))
    config = replace(
        config, size=_size(found), spacing=config.spacing or 1.0, plane="stored", crop="none", window=(-1.0, 1.0)
    )
    affine = np.diag([config.spacing, config.spacing, slice_spacing, 1.0])

    def survey(case: CaseFiles, config: PrepareConfig) -> Survey:
        data, labels = _read_case(case, config.size)
        known = ImageFacts(  # padding is expected, so no slice counts as blank
            voxels=digest_of_array(data), intensities=(Intensities.of(data, absolute=True),), blank=0
        )
        return Survey(
            digest=digest_of(case),
            patient=patient_of(case.name, config.patient_pattern),
            labelled=labels is not None,
            shape=(*data.shape[1:], len(data)),
            affine=affine,
            channels=1,
            box=tuple((0, n) for n in (*data.shape[1:], len(data))),
            centre=None,
            spacing=np.diag(affine)[:3],
            image=known,
        )

    def cut(
        case: CaseFiles, seen: Survey, fmt: SliceFormat, *, config: PrepareConfig, held_out: bool, **_: bool
    ) -> CaseSlices:
        data, labels = _read_case(case, config.size)
        voxel = float(np.prod(seen.spacing))
        facts = LabelFacts() if labels is None else label_facts(labels, voxel=voxel, lost=0.0)
        reference = to_runs(np.moveaxis(labels, 0, -1)) if held_out and labels is not None else None
        height = len(data) * slice_spacing
        return CaseSlices(
            standardised=StandardisedSlices(data[:, None], tuple(slice(0, n) for n in data.shape), len(data)),
            image=seen.image,
            labels=labels,
            reference=reference,
            height=height,
            facts=facts,
        )

    return prepare_cases(found, out, config, source=source, workers=workers, survey=survey, cut=cut)


def _find(source: Path) -> Found:
    files: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(source.iterdir()) if source.is_dir() else ():
        if match := NAME.fullmatch(path.name):
            files[printable(match["case"])][int(match["number"])] = path
    if not files:
        raise UsageError(f"{source}: holds no slices; their names must be CASE_slice000.npy and so on")
    found = Found()
    for case, parts in files.items():
        if sorted(parts) == list(range(len(parts))):
            found.cases.append(CaseFiles(case, (tuple(parts[n] for n in range(len(parts))),)))
        else:  # height bins would be wrong
            found.problems[case] = f"{source}: the slices of {case} are not numbered 0, 1, 2, ..."
    found.cases.sort(key=lambda case: case.name)
    return found


def _size(found: Found) -> int:
    """Pixels per side of the first readable slice."""
    for case in found.cases:
        try:
            return len(_read_record(case.files[0])["data"])
        except VolumeError:
            continue
    return 1  # every case will be refused with its own reason


def _read_case(case: CaseFiles, size: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(n, S, S) float32 images and uint8 labels. Raises VolumeError naming the slice that cannot be used."""
    images, labels = [], []
    for path in case.files:
        record = _read_record(path)
        data, mask, weight = record["data"], record.get("mask"), record.get("weight")
        if data.shape != (size, size, 1) or not np.isfinite(data).all() or np.abs(data).max() > 1 + 1e-4:
            raise VolumeError(f"{path}: its image is {data.shape}; it must be ({size}, {size}, 1), from -1 to 1")
        images.append(data[..., 0].astype(np.float32))
        if mask is not None:
            if mask.ndim != 3 or mask.shape[:2] != (size, size) or not 1 <= mask.shape[2] < UNLABELLED:
                raise VolumeError(f"{path}: its mask is {mask.shape}, expected ({size}, {size}, classes)")
            label = mask.argmax(axis=2).astype(np.uint8)
            if weight is not None:
                if weight.shape != (size, size, 1):
                    raise VolumeError(f"{path}: its weights are {weight.shape}, expected ({size}, {size}, 1)")
                label[weight[..., 0] == 0] = UNLABELLED
            labels.append(label)
    if labels and len(labels) != len(images):
        raise VolumeError(f"{case.files[0].parent}: only some slices of {case.name} have a mask")
    return np.stack(images), np.stack(labels) if labels else None


def _read_record(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a slice: "data" (S, S, 1), and where they exist "mask" (S, S, C) and "weight" (S, S, 1)."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise VolumeError(f"{path}: has more than {MAX_BYTES} bytes; give a slice of the published program")
        with path.open("rb") as file:
            major = np.lib.format.read_magic(file)[0]
            header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            with HEADERS:
                shape, _, dtype = header(file)
            if shape != () or not dtype.hasobject:
                raise VolumeError(f"{path}: a plain array; it must be a dictionary, as the published program writes it")
            record = _ArraysOnly(file).load()
        record = record.item() if isinstance(record, np.ndarray) and record.shape == () else record
        arrays = {key: value for key, value in record.items() if value is not None}
        if "data" not in arrays or not all(_is_plain(value) for value in arrays.values()):
            raise VolumeError(f"{path}: not a slice of the published program; it must hold 'data', and arrays only")
        return arrays
    except VolumeError:
        raise
    except Exception as error:  # unpickling raises whatever the bytes lead to
        reason = (str(error) or type(error).__name__).splitlines()[0][:150]
        raise VolumeError(f"{path}: cannot be read as a slice ({reason}); give one that is readable") from None


def _is_plain(value: Any) -> bool:
    return type(value) is np.ndarray and value.dtype.kind in "fbiu"


class _ArraysOnly(pickle.Unpickler):
    """Knows how arrays are put together, and nothing else: foreign bytes cannot call anything."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAY_PARTS:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which is no part of an array")
        return super().find_class(module, name)
