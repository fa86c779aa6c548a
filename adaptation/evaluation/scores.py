"""One predicted label map against its reference: overlap, surface distances and volume of every class.

One rule for a class that is absent in a case holds everywhere. Absent in prediction and reference: nothing is defined,
and the case is left out of the class's means and counted. Absent in one of the two: Dice and IoU are 0, and the
distances are undefined and counted. The volume error is undefined where the reference lacks the class.

A picture is a label map with one slice: its distances are those of outlines in the plane, in pixels, and its volume is
an area.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from monai.metrics import compute_average_surface_distance, compute_dice, compute_hausdorff_distance

from ...imaging.volumes import Volume

Unit = Literal["mm", "px"]  # of distances: millimetres in volumes, pixels in pictures
MEASURES = ("dice", "iou", "hd95", "assd", "volume_error")
DISTANCES = ("hd95", "assd")
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
        iou: intersection over union (Jaccard index), in [0, 1].
        hd95: 95 % Hausdorff distance, in `unit`.
        assd: average symmetric surface distance, in `unit`.
        volume_error: (predicted - reference) / reference, from -1; of areas in pictures.
        unit: of the distances: "mm", or "px" (pixels) for pictures.
    """

    case: str
    patient: str
    label: int
    absent_in: str
    dice: float
    iou: float
    hd95: float
    assd: float
    volume_error: float
    unit: Unit = "mm"


def measure_name(measure: str, unit: Unit) -> str:
    """What a table calls one of MEASURES, with the unit of distances."""
    error = "area error" if unit == "px" else "volume error"
    names = {"dice": "Dice", "iou": "IoU", "hd95": f"HD95 ({unit})", "assd": f"ASSD ({unit})", "volume_error": error}
    return names[measure]


def score_case(
    case: str,
    predicted: Volume,
    reference: Volume,
    *,
    patient: str | None = None,
    classes: Iterable[int] | None = None,
    unit: Unit = "mm",
) -> list[Score]:
    """Scores of one case, one per class.

    Args:
        case: name of the case.
        predicted: label map on the grid of the image.
        reference: label map on the same grid.
        patient: default: the case is its own patient.
        classes: label values to score; default: those in either label map, without background.
        unit: of the distances. "mm": the affine gives the voxels' size. "px": pixels, whatever the affine is.
    """
    if classes is None:
        classes = [int(v) for v in np.union1d(np.unique(predicted.data), np.unique(reference.data)) if v > 0]
    spacing = reference.spacing if unit == "mm" else np.ones(3)
    scores = []
    for label in classes:
        ours, theirs = predicted.data == label, reference.data == label
        present = bool(ours.any()), bool(theirs.any())
        hd95, assd = surface_distances(ours, theirs, spacing) if all(present) else (math.nan, math.nan)
        score = Score(
            case=case,
            patient=case if patient is None else patient,
            label=label,
            absent_in=ABSENT[present],
            dice=dice(ours, theirs),
            iou=iou(ours, theirs),
            hd95=hd95,
            assd=assd,
            volume_error=float(ours.sum() / theirs.sum() - 1) if present[1] else math.nan,
            unit=unit,
        )
        scores.append(score)
    return scores


def with_absent_classes(scores: list[Score], patients: Mapping[str, str]) -> list[Score]:
    """The scores, with one added for every class that other cases have and a case lacks in both label maps.

    Args:
        scores: of the classes that a case has in either label map.
        patients: all cases, each with its patient.
    """
    classes = sorted({score.label for score in scores})
    known = {(score.case, score.label): score for score in scores}
    unit: Unit = scores[0].unit if scores else "mm"
    return [
        known.get((case, label)) or _undefined(case, patient, label=label, unit=unit)
        for case, patient in patients.items()
        for label in classes
    ]


def dice(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Dice of two masks (...) bool: 0 if one of them is empty, NaN if both are."""
    if not (ours.any() and theirs.any()):
        return 0.0 if ours.any() or theirs.any() else math.nan
    pair = (torch.from_numpy(np.ascontiguousarray(mask)).reshape(1, 1, -1, 1).float() for mask in (ours, theirs))
    return float(compute_dice(*pair, include_background=True))


def iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Intersection over union of two masks (...) bool: 0 if one of them is empty, NaN if both are."""
    union = np.count_nonzero(ours | theirs)
    return float(np.count_nonzero(ours & theirs) / union) if union else math.nan


def surface_axes(shape: Sequence[int]) -> list[int]:
    """The axes along which a surface is looked for, in arrays of `shape` (3,): all, or the two of a single slice.

    A slice has an outline; in three dimensions every one of its voxels would be surface.
    """
    axes = [axis for axis in range(3) if shape[axis] > 1]
    return axes if len(axes) >= 2 else sorted(sorted(range(3), key=lambda axis: -shape[axis])[:2])


def surface_distances(ours: np.ndarray, theirs: np.ndarray, spacing: np.ndarray) -> tuple[float, float]:
    """HD95 and ASSD of two masks, neither of them empty.

    The surface of a mask consists of its voxels at the border of the array and of those beside a voxel that does not
    belong to it; voxels with a common face are neighbours. HD95 is the larger of the two directions' 95th percentiles,
    interpolated linearly; ASSD is the mean over the voxels of both surfaces.

    Args:
        ours: (X, Y, Z) bool; see `surface_axes` for a single slice.
        theirs: the same shape.
        spacing: (3,) size of a voxel, in the unit of the distances.
    """
    axes = surface_axes(ours.shape)
    shape = [ours.shape[axis] for axis in axes]
    pair = [torch.from_numpy(np.ascontiguousarray(mask)).reshape(1, 1, *shape).float() for mask in (ours, theirs)]
    options = {"include_background": True, "spacing": [float(spacing[axis]) for axis in axes]}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)  # MONAI's own
        hd95 = compute_hausdorff_distance(*pair, percentile=95, **options)
        assd = compute_average_surface_distance(*pair, symmetric=True, **options)
    return float(hd95), float(assd)


def _undefined(case: str, patient: str, *, label: int, unit: Unit) -> Score:
    """The score of a class that neither label map has."""
    nan = math.nan
    return Score(
        case=case,
        patient=patient,
        label=label,
        absent_in="both",
        dice=nan,
        iou=nan,
        hd95=nan,
        assd=nan,
        volume_error=nan,
        unit=unit,
    )
