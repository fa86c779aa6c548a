"""Predicted against reference label maps: overlap, surface distances and volume, per case and class."""

from __future__ import annotations

import csv
import html
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance

from ..common.files import atomic_file
from ..common.html_pages import pixels, table, write_page
from ..common.progress import track
from ..errors import UsageError, VolumeError
from ..imaging.cases import find_labels
from ..imaging.overlays import strip
from ..imaging.volume_files import read_volume
from ..imaging.volumes import Volume

MEASURES = {"dice": "Dice", "hd95": "HD95 (mm)", "assd": "ASSD (mm)", "volume_error": "volume error"}
PROBABILITIES = "_probabilities"  # ending of the case name of what `segment` may write beside its label maps
RESAMPLES = 2000
WORST = 5


@dataclass(frozen=True)
class Score:
    """One class of one case; NaN where a measure is undefined (class absent)."""

    case: str
    label: int
    dice: float  # 0..1
    hd95: float  # mm
    assd: float  # mm, symmetric
    volume_error: float  # (predicted - reference) / reference


@dataclass(frozen=True)
class Summary:
    """One measure of one class over all cases where it is defined.

    Attributes:
        label: class, or 0 for the mean of a case's classes.
        mean, low, high: and the ends of its 95 % confidence interval (bootstrap over cases).
        cases, undefined: how many it was taken over, and left out of.
    """

    label: int
    measure: str
    mean: float
    low: float
    high: float
    cases: int
    undefined: int


def evaluate(predictions: str | Path, references: str | Path, out: str | Path | None = None) -> list[Score]:
    """Score every predicted label map that has a reference of the same case name.

    Args:
        predictions: a label map, a folder of them, or a medical-folder layout with `label` folders. The probabilities
            that `segment` may leave beside its label maps are passed over.
        references: the same kinds.
        out: CSV file with one row per case and class; beside it, with the ending `.html`, a page with means, intervals
            and pictures of the worst cases.

    Raises: UsageError if nothing matches, VolumeError if grids differ or a file is unreadable.
    """
    predicted, reference = find_labels(Path(predictions)), find_labels(Path(references))
    predicted = {case: path for case, path in predicted.items() if not case.endswith(PROBABILITIES)}
    missing = sorted(predicted.keys() - reference.keys())
    if missing:
        raise UsageError(f"{references}: has no label map for {', '.join(missing[:3])} ({len(missing)} in all)")
    scores: list[Score] = []
    for case in track(sorted(predicted), "evaluating"):
        ours, theirs = (read_volume(files[case], integer=True) for files in (predicted, reference))
        if ours.data.shape != theirs.data.shape or not np.allclose(ours.affine, theirs.affine, atol=1e-2):
            raise VolumeError(f"{predicted[case]}: lies on another grid than {reference[case]}")
        scores += score_case(case, ours, theirs)
    if out is not None:
        with atomic_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Score)])
            writer.writeheader()
            writer.writerows(asdict(score) for score in scores)
        _write_page(Path(out).with_suffix(".html"), scores, predicted=predicted, reference=reference)
    return scores


def summarise(scores: list[Score], *, seed: int = 0) -> list[Summary]:
    """Means with confidence intervals, of every class and of each case's mean over its classes."""
    rows = []
    labels = sorted({score.label for score in scores})
    by_case: dict[str, list[Score]] = {}
    for score in scores:
        by_case.setdefault(score.case, []).append(score)
    for measure in MEASURES:
        for label in [0, *labels]:
            if label:
                values = [getattr(score, measure) for score in scores if score.label == label]
            else:
                values = [_mean([getattr(score, measure) for score in own]) for own in by_case.values()]
            found = np.array(values)[np.isfinite(values)]
            low, high = _interval(found, seed)
            rows.append(Summary(label, measure, _mean(found), low, high, len(found), len(values) - len(found)))
    return rows


def _mean(values: Sequence[float] | np.ndarray) -> float:
    """Mean of the finite values (N,); NaN if there are none."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def _interval(values: np.ndarray, seed: int) -> tuple[float, float]:
    """Bootstrap percentiles 2.5 and 97.5 % of the mean of values (N,); NaN for fewer than two."""
    if len(values) < 2:
        return float("nan"), float("nan")
    means = np.random.default_rng(seed).choice(values, (RESAMPLES, len(values))).mean(axis=1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def _write_page(path: Path, scores: list[Score], *, predicted: dict[str, Path], reference: dict[str, Path]) -> None:
    rows = []
    for row in summarise(scores):
        name = f"class {row.label}" if row.label else "mean of classes"
        interval = f"{row.mean:.3f} ({row.low:.3f} to {row.high:.3f})"
        rows.append([MEASURES[row.measure], name, interval, str(row.cases), str(row.undefined)])
    by_case: dict[str, list[float]] = {}
    for score in scores:
        by_case.setdefault(score.case, []).append(score.dice)
    worst = sorted(by_case, key=lambda case: np.mean(by_case[case]))[:WORST]
    body = [
        f"<h1>{len(by_case)} cases</h1><p>Mean, and its 95 % confidence interval over cases. Undefined: the class is "
        "missing in one of the two label maps, so that there is no distance.</p>",
        table(["measure", "class", "mean", "cases", "undefined"], rows),
        "<h2>The worst cases</h2><p>Upper row: predicted; lower row: reference.</p>",
    ]
    for case in worst:
        ours, theirs = (read_volume(files[case], integer=True).turned("axial").data for files in (predicted, reference))
        title = f"{case}, mean Dice {np.mean(by_case[case]):.3f}"
        body.append(f"<p>{html.escape(title)}<br>{pixels(strip(np.zeros(ours.shape), ours, theirs), title)}</p>")
    write_page(path, "evaluation", body)


def score_case(case: str, predicted: Volume, reference: Volume) -> list[Score]:
    """Scores of every class that is in either label map; background is left out."""
    classes = [int(v) for v in np.union1d(np.unique(predicted.data), np.unique(reference.data)) if v > 0]
    spacing = reference.spacing
    return [
        _class_scores(case, label, ours=predicted.data == label, theirs=reference.data == label, spacing=spacing)
        for label in classes
    ]


def _class_scores(case: str, label: int, *, ours: np.ndarray, theirs: np.ndarray, spacing: np.ndarray) -> Score:
    """Scores of one class, from its masks (X, Y, Z) bool and the voxels' spacing (3,) in millimetres."""
    pair = [torch.from_numpy(mask)[None, None].float() for mask in (ours, theirs)]
    options = {"include_background": True, "spacing": spacing.tolist()}
    both, nan = ours.any() and theirs.any(), float("nan")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)  # MONAI's own
        hd95 = float(compute_hausdorff_distance(*pair, percentile=95, **options)) if both else nan
        assd = float(compute_average_surface_distance(*pair, symmetric=True, **options)) if both else nan
    return Score(
        case=case,
        label=label,
        dice=float(compute_dice(*pair, include_background=True)) if theirs.any() else 0.0,
        hd95=hd95,
        assd=assd,
        volume_error=float(ours.sum() / theirs.sum() - 1) if theirs.any() else nan,
    )


def mean_dice(scores: list[Score]) -> float:
    """Mean over cases of each case's mean foreground Dice. Raises UsageError without any score."""
    by_case: dict[str, list[float]] = {}
    for score in scores:
        by_case.setdefault(score.case, []).append(score.dice)
    if not by_case:
        raise UsageError("there are 0 scores, for no case has foreground; give at least one labelled case")
    return float(np.mean([np.mean(values) for values in by_case.values()]))
