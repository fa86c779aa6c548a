"""One predicted label map against its reference: overlap, surface distances and volume of every class.

One rule for a class that is absent in a case holds everywhere. Absent in prediction and reference: nothing is defined,
and the case is left out of the class's means and counted. Absent in one of the two: Dice is 0, and the distances are
undefined and counted. The volume error is undefined where the reference lacks the class.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance

from ...imaging.volumes import Volume

MEASURES = {"dice": "Dice", "hd95": "HD95 (mm)", "assd": "ASSD (mm)", "volume_error": "volume error"}
ABSENT = {(True, True): "", (False, True): "prediction", (True, False): "reference", (False, False): "both"}


@dataclass(frozen=True, kw_only=True)
class Score:
    """One class of one case; NaN where a measure is undefined.

    Attributes:
        case: name of the case.
        patient: equal for all cases of one patient.
        label: class.
        absent_in: where the class is absent: "", "prediction", "reference" or "both".
        dice: in [0, 1].
        hd95: 95 % Hausdorff distance, millimetres.
        assd: average symmetric surface distance, millimetres.
        volume_error: (predicted - reference) / reference, from -1.
    """

    case: str
    patient: str
    label: int
    absent_in: str
    dice: float
    hd95: float
    assd: float
    volume_error: float


def score_case(
    case: str,
    predicted: Volume,
    reference: Volume,
    *,
    patient: str | None = None,
    classes: Iterable[int] | None = None,
) -> list[Score]:
    """Scores of one case, one per class.

    Args:
        case: name of the case.
        predicted: label map on the grid of the image.
        reference: label map on the same grid.
        patient: default: the case is its own patient.
        classes: label values to score; default: those in either label map, without background.
    """
    if classes is None:
        classes = [int(v) for v in np.union1d(np.unique(predicted.data), np.unique(reference.data)) if v > 0]
    spacing, name = reference.spacing, case if patient is None else patient
    return [
        _class_score(case, name, label, ours=predicted.data == label, theirs=reference.data == label, spacing=spacing)
        for label in classes
    ]


def with_absent_classes(scores: list[Score], patients: Mapping[str, str]) -> list[Score]:
    """The scores, with one added for every class that other cases have and a case lacks in both label maps.

    Args:
        scores: of the classes that a case has in either label map.
        patients: all cases, each with its patient.
    """
    classes = sorted({score.label for score in scores})
    known = {(score.case, score.label): score for score in scores}
    return [
        known.get((case, label)) or _undefined(case, patient, label)
        for case, patient in patients.items()
        for label in classes
    ]


def dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Dice of two masks (...) bool: 0 if one of them is empty, NaN if both are."""
    if not (ours.any() and theirs.any()):
        return 0.0 if ours.any() or theirs.any() else math.nan
    pair = (torch.from_numpy(np.ascontiguousarray(mask)).reshape(1, 1, -1, 1).float() for mask in (ours, theirs))
    return float(compute_dice(*pair, include_background=True))


def _class_score(
    case: str, patient: str, label: int, *, ours: np.ndarray, theirs: np.ndarray, spacing: np.ndarray
) -> Score:
    """Score of one class, from its masks (X, Y, Z) bool and the voxels' spacing (3,) in millimetres."""
    present = bool(ours.any()), bool(theirs.any())
    hd95, assd = _distances(ours, theirs, spacing) if all(present) else (math.nan, math.nan)
    return Score(
        case=case,
        patient=patient,
        label=label,
        absent_in=ABSENT[present],
        dice=dice(ours, theirs),
        hd95=hd95,
        assd=assd,
        volume_error=float(ours.sum() / theirs.sum() - 1) if present[1] else math.nan,
    )


def _undefined(case: str, patient: str, label: int) -> Score:
    """The score of a class that neither label map has."""
    nan = math.nan
    return Score(
        case=case, patient=patient, label=label, absent_in="both", dice=nan, hd95=nan, assd=nan, volume_error=nan
    )


def _distances(ours: np.ndarray, theirs: np.ndarray, spacing: np.ndarray) -> tuple[float, float]:
    """HD95 and ASSD in millimetres of two masks (X, Y, Z) bool, neither of them empty."""
    pair = [torch.from_numpy(np.ascontiguousarray(mask))[None, None].float() for mask in (ours, theirs)]
    options = {"include_background": True, "spacing": spacing.tolist()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)  # MONAI's own
        hd95 = compute_hausdorff_distance(*pair, percentile=95, **options)
        assd = compute_average_surface_distance(*pair, symmetric=True, **options)
    return float(hd95), float(assd)
