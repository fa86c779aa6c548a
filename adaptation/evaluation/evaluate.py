"""Label maps in files against references: a table of scores, and warnings about references that mislead."""

from __future__ import annotations

import csv
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ...common.files import atomic_file
from ...common.progress import track
from ...errors import UsageError, VolumeError
from ...imaging.case_sizes import CaseSize, cut_labels, size_warnings
from ...imaging.cases import find_labels
from ...imaging.patients import check_pattern, patient_of
from ...imaging.volume_files import read_volume
from ...imaging.volumes import Volume
from .page import write_evaluation_page
from .scores import Score, score_case, with_absent_classes

PROBABILITIES = "_probabilities"  # ending of the case name of what `segment` may write beside its label maps
AFFINE_TOLERANCE = 1e-2  # millimetres


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        scores: one for every case and class.
        warnings: sentences about references that are cut, or of a size unlike the others, and about patients.
    """

    scores: list[Score]
    warnings: list[str]


def evaluate(
    predictions: str | Path,
    references: str | Path,
    out: str | Path | None = None,
    *,
    patient_pattern: str | None = None,
) -> Evaluation:
    """Score every predicted label map that has a reference of the same case name, on the grid of the image.

    Args:
        predictions: a label map, a folder of them, or a medical-folder layout with `label` folders. The probabilities
            that `segment` may leave beside its label maps are passed over.
        references: the same kinds; the cases of one site, drawn on the grids of their images.
        out: CSV file with one row per case and class; beside it, with the ending `.html`, a page with warnings, means,
            intervals and pictures of the worst cases.
        patient_pattern: regular expression that finds the patient in a case's name, see `patient_of`; default: every
            case is a patient of its own.

    Raises: UsageError if nothing matches, VolumeError if grids differ or a file is unreadable.
    """
    check_pattern(patient_pattern)
    predicted, reference = find_labels(Path(predictions)), find_labels(Path(references))
    predicted = {case: path for case, path in predicted.items() if not case.endswith(PROBABILITIES)}
    missing = sorted(predicted.keys() - reference.keys())
    if missing:
        raise UsageError(f"{references}: has no label map for {', '.join(missing[:3])} ({len(missing)} in all)")
    patients = {case: patient_of(case, patient_pattern) if patient_pattern else case for case in sorted(predicted)}
    scores, sizes = [], []
    for case in track(list(patients), "evaluating"):
        ours, theirs = (read_volume(files[case], integer=True) for files in (predicted, reference))
        if ours.data.shape != theirs.data.shape or not np.allclose(ours.affine, theirs.affine, atol=AFFINE_TOLERANCE):
            raise VolumeError(f"{predicted[case]}: lies on another grid than {reference[case]}")
        scores += score_case(case, ours, theirs, patient=patients[case])
        sizes.append(size_of(case, theirs))
    scores = with_absent_classes(scores, patients)
    warnings = size_warnings(sizes) + _unmatched(patients, patient_pattern)
    if out is not None:
        _write_table(Path(out), scores)
        page = Path(out).with_suffix(".html")
        write_evaluation_page(page, scores, warnings, predicted=predicted, reference=reference)
    return Evaluation(scores=scores, warnings=warnings)


def size_of(case: str, label: Volume) -> CaseSize:
    """The size of a case, from its label map."""
    voxel = float(np.prod(label.spacing)) / 1000
    return CaseSize(
        name=case,
        shape=label.data.shape,
        spacing=label.spacing.tolist(),
        foreground=np.count_nonzero(label.data) * voxel,
        cut_labels=cut_labels(label.data, label.spacing.tolist()),
    )


def _unmatched(cases: dict[str, str], pattern: str | None) -> list[str]:
    """A warning that names the cases in whose names the pattern finds no patient."""
    names = [case for case in cases if pattern and not re.match(pattern, case)]
    if not names:
        return []
    return [f"{len(names)} of {len(cases)} cases have no patient by '{pattern}' and count alone: {', '.join(names)}"]


def _write_table(out: Path, scores: list[Score]) -> None:
    with atomic_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Score)])
        writer.writeheader()
        writer.writerows(asdict(score) for score in scores)
