"""Cases of files that hold several volumes, such as the frames of a cine: one case for each, or one frame of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...errors import VolumeError
from ..case_files import (
    EACH,
    FIRST,
    NAN,
    CaseFiles,
    Found,
    Reading,
    Unusable,
    check_reading,
    is_frame_number,
)
from .kinds import frames_of, marked_frames
from .unpacking import DAMAGED


def choose_reading(found: Found, *, frames: str | None, nan: str | None) -> None:
    """Tell the cases how their volumes are read.

    Args:
        found: the cases; those of several frames are replaced by one case for each frame that is asked for, or named
            among the problems. Cases of one volume stay.
        frames: "each" makes every frame a case, NAME_frame01 and so on, of one patient; its label map has as many
            frames, of which those that mark nothing are no labels, for often a few frames of a cine are drawn alone.
            "first" or a number, from 1, takes one frame under the case's own name; only for a number, which
            says where it belongs, the label map may be a single volume. None: files of several frames are errors when
            they are read.
        nan: see `Reading`; None refuses.
    """
    check_reading(frames, nan)
    reading = Reading(nan=nan or NAN[0])
    cases, found.cases = found.cases, []
    for case in cases:
        try:
            made = _cases_of(replace(case, reading=reading), frames)
            if blank := _take_labels(made):
                found.remarks[case.name] = (
                    f"{blank} of {len(made)} frames have no labels: their label maps mark nothing"
                )
            found.cases += made
        except Unusable as error:
            found.problems[case.name] = str(error)


def _cases_of(case: CaseFiles, frames: str | None) -> list[CaseFiles]:
    """The cases that a case becomes. Raises: Unusable if its files do not hold equally many frames."""
    images = [file for file in case.channels if isinstance(file, Path)]
    counts = {file: frames_of(file) for file in images} if frames is not None else {}
    count = max(counts.values(), default=1)
    if frames is None or count == 1:
        return [case]
    for file, held in counts.items():
        if held != count:
            raise Unusable(f"{file}: holds {held} frames, another channel {count}; give channels of equally many")
    for label in case.labels:
        held = frames_of(label.path)
        if held == 1 and not is_frame_number(frames):
            raise Unusable(
                f"{label.path}: is of one frame, the image has {count}; say which one by its number, such as --frames 1"
            )
        if held not in (1, count):
            raise Unusable(f"{label.path}: holds {held} frames, the image {count}; both must be equal")
    if frames == EACH:
        digits = max(2, len(str(count)))
        return [
            replace(
                case,
                name=f"{case.name}_frame{number:0{digits}d}",
                subject=case.name,
                reading=replace(case.reading, frame=number),
            )
            for number in range(1, count + 1)
        ]
    number = 1 if frames == FIRST else int(frames)
    if number > count:
        raise Unusable(f"{images[0]}: has no frame {number}; it has the frames 1 to {count}")
    return [replace(case, reading=replace(case.reading, frame=number))]


def _take_labels(cases: list[CaseFiles]) -> int:
    """Take the labels from the cases, the frames of one file, in whose frame no label map marks anything.

    A label map of a single volume stays.

    Returns: number of these cases. Raises: Unusable for a damaged label map.
    """
    marks = []
    for label in cases[0].labels:
        if cases[0].reading.frame is None or frames_of(label.path) == 1:
            return 0
        try:
            marks.append(marked_frames(label.path))
        except (VolumeError, OSError, EOFError, ValueError, *DAMAGED) as error:
            raise Unusable(f"{label.path}: cannot be read ({error}); copy it again") from None
    if not marks:
        return 0
    drawn = [any(frame) for frame in zip(*marks, strict=True)]
    blank = [place for place, case in enumerate(cases) if not drawn[case.reading.frame - 1]]
    for place in blank:
        cases[place] = replace(cases[place], labels=())
    return len(blank)
