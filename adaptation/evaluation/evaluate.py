"""Label maps in files against references: a table of scores, and warnings about references that mislead.

The files are NIfTI volumes or pictures; one evaluation holds one of the two, for their distances have other units.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np

from ...common.progress import track
from ...common.tables import write_table
from ...errors import UsageError
from ...imaging.accounting.account import Accounting, account_for_labels
from ...imaging.accounting.case_sizes import CaseSize, cut_labels, size_warnings
from ...imaging.case_files import printable
from ...imaging.class_names import check_names
from ...imaging.formats.label_values import LabelValues, suggestion
from ...imaging.images import on_grid_of
from ...imaging.patients import check_pattern, patient_of
from ...imaging.pictures.colour_table import Colour
from ...imaging.pictures.layout_names import without_picture_suffix
from ...imaging.volumes import Volume
from .cross_check import CrossCheck
from .label_files import LOSSY, find_labels, is_label_picture, read_labels
from .page import EvaluationPage
from .scores import Score, Unit, score_case, with_absent_classes

PROBABILITIES = "_probabilities"  # ending of the case name of what `segment` may write beside its label maps
NAMED = 10  # cases or classes in a message


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
    values: LabelValues | None = None,
    names: Mapping[int, str] | None = None,
    colours: Mapping[Colour, int] | None = None,
    check: bool = False,
) -> Evaluation:
    """Score every predicted label map against the reference of the same case name, on the grid of the image.

    A prediction that is stored in another axis order than its reference is turned, as `prepare` turns labels. A picture
    `21_training` belongs to the reference `21_manual1`, too: without the endings that pictures and masks have. A
    reference without a prediction gets no score, and a warning names it.

    Args:
        predictions: a label map, a folder of them, or a medical-folder layout with `label` folders; NIfTI files or
            pictures, see `find_labels` and `read_label_picture`. The probabilities and pictures that `segment` may
            leave beside its label maps are passed over.
        references: the same kinds; the cases of one site, drawn on the grids of their images.
        out: CSV file with one row per case and class; beside it, with the ending `.html`, a page with warnings, means,
            intervals and pictures of the worst cases.
        patient_pattern: regular expression that finds the patient in a case's name, see `patient_of`; default: every
            case is a patient of its own.
        values: class of each value in the references; None takes their values for class numbers. Predictions have class
            numbers, as `segment` writes them.
        names: class to its name, which the table and the page show.
        colours: class of each colour or grey value of references that are pictures, see `read_mask`.
        check: compute the scores a second time by another library, see `cross_check`; the result is in `check`.

    Pictures get no warnings about their size: their pixels have none, and what they show often reaches the border.

    Raises: UsageError if a prediction has no reference or pictures are mixed with volumes, VolumeError if grids differ
        or a file is unreadable.
    """
    check_pattern(patient_pattern)
    names = check_names(names or {})
    predicted, reference = find_labels(Path(predictions)), find_labels(Path(references))
    probabilities = {path: "probabilities" for case, path in predicted.items() if case.endswith(PROBABILITIES)}
    predicted = {case: path for case, path in predicted.items() if path not in probabilities}
    given = reference
    reference, missing = _matched(predicted, given, references)
    patients = {case: patient_of(case, patient_pattern) if patient_pattern else case for case in sorted(predicted)}
    unit = _unit([*predicted.values(), *(reference[case] for case in predicted)])
    if values is not None and unit == "px":
        raise UsageError("label_values is given, but the label maps are pictures, which it does not read; leave it out")
    second = CrossCheck(unit) if check else None
    scores: list[Score] = []
    sizes: list[CaseSize] = []
    for case in track(list(patients), "evaluating"):
        theirs = read_labels(reference[case], values=values, colours=colours)
        ours = on_grid_of(theirs, read_labels(predicted[case]), predicted[case], image_path=reference[case])
        found = score_case(case, ours, theirs, patient=patients[case], unit=unit)
        scores += found
        if unit == "mm":
            sizes.append(_size_of(case, theirs, names))
        if second is not None:
            second.add(found, ours, theirs)
    scores = with_absent_classes(scores, patients)
    warnings = [
        *_lossy(reference),
        *([f"{len(missing)} of {len(given)} references have no prediction: {_listed(missing)}"] if missing else []),
        *size_warnings(sizes),
        *_unmatched(patients, patient_pattern),
        *_other_values(scores),
    ]
    if out is not None:
        _write_table(Path(out), scores, names)
        page = EvaluationPage(scores, names=names, warnings=warnings, check=second, values=values, colours=colours)
        page.write(Path(out).with_suffix(".html"), predicted=predicted, reference=reference)
    entries = {
        "predictions": account_for_labels(predictions, predicted, probabilities),
        "references": account_for_labels(
            references,
            {case: reference[case] for case in predicted},
            {given[case]: "a reference without a prediction" for case in missing},
        ),
    }
    return Evaluation(scores=scores, warnings=warnings, check=second, entries=entries)


def _matched(
    predicted: Mapping[str, Path], reference: Mapping[str, Path], place: str | Path
) -> tuple[dict[str, Path], list[str]]:
    """The reference of each predicted case, and the cases of the other references.

    Raises: UsageError if a prediction has no reference.
    """
    found: dict[str, Path] = {}
    used: set[str] = set()
    for case, path in predicted.items():
        short = without_picture_suffix(case) if is_label_picture(path) else case
        if (name := next((name for name in (case, short) if name in reference), None)) is not None:
            found[case] = reference[name]
            used.add(name)
    if lacking := sorted(predicted.keys() - found.keys()):
        raise UsageError(f"{place}: has no label map for {_listed(lacking)} ({len(lacking)} in all)")
    return found, sorted(reference.keys() - used)


def _lossy(files: Mapping[str, Path]) -> list[str]:
    """A warning that names the cases whose label maps are JPEG files."""
    cases = sorted(case for case, path in files.items() if path.suffix.lower() in LOSSY)
    if not cases:
        return []
    return [f"{len(cases)} references are JPEG files, so their values were split at 128: {_listed(cases)}"]


def _listed(cases: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(cases) - NAMED} more" if len(cases) > NAMED else ""
    return ", ".join(map(printable, cases[:NAMED])) + more


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


def _other_values(scores: Sequence[Score]) -> list[str]:
    """A warning if references and predictions have no class in common: one of them may hold other values."""
    theirs = sorted({score.label for score in scores if score.absent_in in ("", "prediction")})
    ours = sorted({score.label for score in scores if score.absent_in in ("", "reference")})
    if not theirs or not ours or set(theirs) & set(ours):
        return []
    shown = [", ".join(map(str, values[:NAMED])) for values in (ours, theirs)]
    return [
        f"predictions hold the classes {shown[0]} and references {shown[1]}, none in common; if these are values of "
        f"the references' files, give their classes, such as {suggestion(theirs)}"
    ]


def _write_table(out: Path, scores: list[Score], names: Mapping[int, str]) -> None:
    columns = [field.name for field in fields(Score)]
    rows = ([*asdict(score).values(), *([names.get(score.label, "")] if names else [])] for score in scores)
    write_table(out, [*columns, "name"] if names else columns, rows)
