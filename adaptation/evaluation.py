"""Predicted against reference label maps: overlap, surface distances and volume, per case and class."""

from __future__ import annotations

import csv
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance

from ..errors import UsageError, VolumeError
from ..files import atomic_file
from ..progress import track
from ..sources import find_labels
from ..volumes import Volume, read_volume


@dataclass(frozen=True)
class Score:
    """One class of one case; NaN where a measure is undefined (class absent)."""

    case: str
    label: int
    dice: float  # 0..1
    hd95: float  # mm
    assd: float  # mm, symmetric
    volume_error: float  # (predicted - reference) / reference


def evaluate(predictions: str | Path, references: str | Path, out: str | Path | None = None) -> list[Score]:
    """Score every predicted label map that has a reference of the same case name.

    Args:
        predictions: a label map, a folder of them, or a medical-folder layout with `label` folders.
        references: the same kinds.
        out: CSV file with one row per case and class.

    Raises: UsageError if nothing matches, VolumeError if grids differ or a file is unreadable.
    """
    predicted, reference = find_labels(Path(predictions)), find_labels(Path(references))
    missing = sorted(predicted.keys() - reference.keys())
    if missing:
        raise UsageError(f"{references}: has no label map for {', '.join(missing[:3])} ({len(missing)} in all)")
    scores: list[Score] = []
    for case in track(sorted(predicted), "evaluating"):
        ours, theirs = (read_volume(one[case], integer=True) for one in (predicted, reference))
        if ours.data.shape != theirs.data.shape or not np.allclose(ours.affine, theirs.affine, atol=1e-2):
            raise VolumeError(f"{predicted[case]}: lies on another grid than {reference[case]}")
        scores += score_case(case, ours, theirs)
    if out is not None:
        with atomic_file(out) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Score)])
            writer.writeheader()
            writer.writerows(asdict(score) for score in scores)
    return scores


def score_case(case: str, predicted: Volume, reference: Volume) -> list[Score]:
    """Scores of every class that is in either label map; background is left out."""
    classes = [int(v) for v in np.union1d(np.unique(predicted.data), np.unique(reference.data)) if v > 0]
    scores = []
    for label in classes:
        scores.append(_score_class(case, label, predicted.data == label, reference.data == label, reference.spacing))
    return scores


def _score_class(case: str, label: int, ours: np.ndarray, theirs: np.ndarray, spacing: np.ndarray) -> Score:
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
        raise UsageError("no foreground in any case: there is nothing to score")
    return float(np.mean([np.mean(values) for values in by_case.values()]))
