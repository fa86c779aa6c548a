"""Label maps in files against references: a table of scores, and warnings about references that mislead.

The files are NIfTI volumes or pictures; one evaluation holds one of the two, for their distances have other units.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from ...common.files import atomic_file
from ...common.progress import track
from ...errors import UsageError, VolumeError
from ...imaging.accounting.account import Accounting, account_for_labels
from ...imaging.case_sizes import CaseSize, cut_labels, size_warnings
from ...imaging.cases import find_labels, is_label_picture
from ...imaging.class_names import check_names
from ...imaging.patients import check_pattern, patient_of
from ...imaging.volumes import Volume
from .cross_check import CrossCheck
from .label_files import read_labels
from .page import EvaluationPage
from .scores import Score, Unit, score_case, with_absent_classes

PROBABILITIES = "_probabilities"  # ending of the case name of what `segment` may write beside its label maps
AFFINE_TOLERANCE = 1e-2  # millimetres


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        scores: one for every case and class.
        warnings: sentences about references that are cut, or of a size unlike the others, and about patients.
        check: how the scores compare with those of a second library; None if that was not asked for.
        entries: what became of every entry of the folders "predictions" and "references".
    """

    scores: list[Score]
    warnings: list[str]
    check: CrossCheck | None = None
    entries: dict[str, Accounting] = field(default_factory=dict)


def evaluate(
    predictions: str | Path,
    references: str | Path,
    out: str | Path | None = None,
    *,
    patient_pattern: str | None = None,
    names: Mapping[int, str] | None = None,
    check: bool = False,
) -> Evaluation:
    """Score every predicted label map that has a reference of the same case name, on the grid of the image.

    Args:
        predictions: a label map, a folder of them, or a medical-folder layout with `label` folders; NIfTI files or
            pictures, see `find_labels` and `read_label_picture`. The probabilities and pictures that `segment` may
            leave beside its label maps are passed over.
        references: the same kinds; the cases of one site, drawn on the grids of their images.
        out: CSV file with one row per case and class; beside it, with the ending `.html`, a page with warnings, means,
            intervals and pictures of the worst cases.
        patient_pattern: regular expression that finds the patient in a case's name, see `patient_of`; default: every
            case is a patient of its own.
        names: class to its name, which the table and the page show.
        check: compute the scores a second time by another library, see `cross_check`; the result is in `check`.

    Pictures get no warnings about their size: their pixels have none, and what they show often reaches the border.

    Raises: UsageError if nothing matches or pictures are mixed with volumes, VolumeError if grids differ or a file is
        unreadable.
    """
    check_pattern(patient_pattern)
    names = check_names(names or {})
    predicted, reference = find_labels(Path(predictions)), find_labels(Path(references))
    probabilities = {path: "probabilities" for case, path in predicted.items() if case.endswith(PROBABILITIES)}
    predicted = {case: path for case, path in predicted.items() if path not in probabilities}
    missing = sorted(predicted.keys() - reference.keys())
    if missing:
        raise UsageError(f"{references}: has no label map for {', '.join(missing[:3])} ({len(missing)} in all)")
    patients = {case: patient_of(case, patient_pattern) if patient_pattern else case for case in sorted(predicted)}
    unit = _unit([*predicted.values(), *(reference[case] for case in predicted)])
    second = CrossCheck(unit) if check else None
    scores: list[Score] = []
    sizes: list[CaseSize] = []
    for case in track(list(patients), "evaluating"):
        ours, theirs = (read_labels(files[case]) for files in (predicted, reference))
        if ours.data.shape != theirs.data.shape or not np.allclose(ours.affine, theirs.affine, atol=AFFINE_TOLERANCE):
            raise VolumeError(f"{predicted[case]}: lies on another grid than {reference[case]}{_sides(ours, theirs)}")
        found = score_case(case, ours, theirs, patient=patients[case], unit=unit)
        scores += found
        if unit == "mm":
            sizes.append(_size_of(case, theirs, names))
        if second is not None:
            second.add(found, ours, theirs)
    scores = with_absent_classes(scores, patients)
    warnings = size_warnings(sizes) + _unmatched(patients, patient_pattern)
    if out is not None:
        _write_table(Path(out), scores, names)
        page = EvaluationPage(scores, names=names, warnings=warnings, check=second)
        page.write(Path(out).with_suffix(".html"), predicted=predicted, reference=reference)
    entries = {
        "predictions": account_for_labels(predictions, predicted, probabilities),
        "references": account_for_labels(
            references,
            {case: reference[case] for case in predicted},
            {path: "a reference without a prediction" for case, path in reference.items() if case not in predicted},
        ),
    }
    return Evaluation(scores=scores, warnings=warnings, check=second, entries=entries)


def _unit(files: Sequence[Path]) -> Unit:
    """The unit of distances: pixels if all files are pictures.

    Raises: UsageError if only some of them are.
    """
    pictures = {is_label_picture(path): path for path in files}
    if len(pictures) > 1:
        raise UsageError(
            f"{pictures[True]} is a picture and {pictures[False]} a volume; evaluate pictures and volumes apart"
        )
    return "px" if True in pictures else "mm"


def _sides(ours: Volume, theirs: Volume) -> str:
    """Both shapes in words, if they differ."""
    shapes = [" x ".join(map(str, volume.data.shape)) for volume in (ours, theirs)]
    return f" ({shapes[0]}, not {shapes[1]})" if shapes[0] != shapes[1] else ""


def _size_of(case: str, label: Volume, names: Mapping[int, str]) -> CaseSize:
    """The size of a case, from its label map."""
    voxel = float(np.prod(label.spacing)) / 1000
    return CaseSize(
        name=case,
        shape=label.data.shape,
        spacing=label.spacing.tolist(),
        foreground=np.count_nonzero(label.data) * voxel,
        cut_labels={
            names.get(int(value), value): slices
            for value, slices in cut_labels(label.data, label.spacing.tolist()).items()
        },
    )


def _unmatched(cases: dict[str, str], pattern: str | None) -> list[str]:
    """A warning that names the cases in whose names the pattern finds no patient."""
    names = [case for case in cases if pattern and not re.match(pattern, case)]
    if not names:
        return []
    return [f"{len(names)} of {len(cases)} cases have no patient by '{pattern}' and count alone: {', '.join(names)}"]


def _write_table(out: Path, scores: list[Score], names: Mapping[int, str]) -> None:
    with atomic_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        columns = [field.name for field in fields(Score)]
        writer = csv.DictWriter(file, [*columns, "name"] if names else columns)
        writer.writeheader()
        for score in scores:
            writer.writerow(asdict(score) | ({"name": names.get(score.label, "")} if names else {}))
