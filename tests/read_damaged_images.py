"""A program for the fuzzer: damages images of one kind, reads them, and prints what came of it as JSON.

Arguments: "nifti" or "dicom", the folder of sound files, and the number of mutations.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import time
import traceback
import zlib
from pathlib import Path

from fedfactory.errors import FedFactoryError
from fedfactory.imaging.archive.series import find_series, patient_digest, read_grid, read_series
from fedfactory.imaging.case_files import Reading
from fedfactory.imaging.cases import find_cases
from fedfactory.imaging.formats.kinds import frames_of, marked_frames
from fedfactory.imaging.image_reader import read_image
from fedfactory.imaging.volume_files import read_volume
from hostile_images import damaged_dicom, damaged_nifti

FRAME = Reading(frame=1, nan="background")


def read_nifti(content: bytes, folder: Path) -> None:
    path = folder / "damaged.nii.gz"
    path.write_bytes(content)
    frames_of(path)
    attempts = (
        lambda: read_volume(path),
        lambda: read_volume(path, integer=True, reading=FRAME),
        lambda: read_image([path], reading=FRAME).facts(plane="axial", box=((0, 1), (0, 1), (0, 1))),
    )
    refusals = []
    for attempt in attempts:
        try:
            attempt()
        except FedFactoryError as error:
            refusals.append(error)
    usable = len(refusals) < len(attempts)
    try:
        marked_frames(path)
    except (
        FedFactoryError,
        OSError,
        EOFError,
        ValueError,
        zlib.error,
    ) as error:  # which `choose_reading` turns into one line
        refusals.append(FedFactoryError(str(error)[:300]))
    raise_first(refusals, usable=usable)


def read_dicom(content: bytes, folder: Path) -> None:
    place = folder / "series"
    path = sorted(place.iterdir())[1]
    path.write_bytes(content)
    refusals: list[FedFactoryError] = []
    found = find_cases(place)
    refusals += [FedFactoryError(problem) for problem in found.problems.values()]
    series = list(find_series(place).values()) or [tuple(sorted(place.iterdir()))]
    for files in (*series, tuple(sorted(place.iterdir())), (path,)):
        patient_digest(files)
        for read in (read_series, read_grid, lambda files: read_image([files])):
            try:
                read(files)
            except FedFactoryError as error:
                refusals.append(error)
    raise_first(refusals, usable=not refusals)


def raise_first(refusals: list[FedFactoryError], *, usable: bool) -> None:
    """Check the messages, and raise the first unless the file could be used all the same."""
    for error in refusals:
        if not str(error).isprintable() or len(str(error)) > 12_000 or "unforeseen" in str(error):
            raise AssertionError(f"an odd message: {str(error)[:500]!r}")
    if refusals and not usable:
        raise refusals[0]


def main(kind: str, folder: Path, count: int) -> None:
    path = folder / "image.nii" if kind == "nifti" else sorted((folder / "series").iterdir())[1]
    damage, read = (damaged_nifti, read_nifti) if kind == "nifti" else (damaged_dicom, read_dicom)
    original, rng = path.read_bytes(), random.Random(kind)
    read(original, folder)  # sound, and the libraries are loaded
    faults, longest, done = [], 0.0, {"read": 0, "refused": 0}
    for number in range(count):
        content = damage(original, rng)
        started = time.process_time()
        print(number, file=sys.stderr, flush=True)  # the last number tells which one ended the process
        try:
            read(content, folder)
            done["read"] += 1
        except FedFactoryError:
            done["refused"] += 1
        except Exception:
            faults.append(f"{number}: {traceback.format_exc()[-1500:]}")
        took, memory = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
        print(f"{took:.1f} s, {memory} MiB", file=sys.stderr, flush=True)
        longest = max(longest, took)
        path.write_bytes(original)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"faults": faults, "longest": longest, "memory": memory, **done}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
