"""Scores computed a second time, by the library of the Grand Challenge platform, which shares no code with MONAI.

`evalutils` 0.6 is the package `grand_challenge_metrics`. What its module `stats` offers, and how it differs from
`scores`:

* Dice and Jaccard index (IoU) from a confusion matrix, in float32. A class that is absent in one label map has 0 there
  as here; one that is absent in both divides by zero there, so it is not compared.
* `percentile_hausdorff_distance`: the larger of the two directions' percentiles, of surfaces by the same neighbours. A
  percentile is the distance of the next lower rank; ours is interpolated between two ranks. Ours must therefore lie
  between its distance at 95 % and that one rank above.
* No average symmetric surface distance. The modified Hausdorff distance is the larger of the two directions' means, and
  ASSD is the mean of both directions, weighted by the number of voxels in each surface: ASSD must be at most the
  modified distance, and at least the smaller surface's share of it.
* `mean_contour_distance` measures from the contour of one mask to the nearest voxel of the other, inside or on its
  contour, so it is another quantity and not used.
* The relative volume difference is absolute, ours has a sign. It is undefined for an empty reference, in both.
* Distances of an empty mask raise an IndexError there and are undefined here, so they are not compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from grand_challenge_metrics import stats
from scipy.ndimage import binary_erosion, find_objects

from ...imaging.volumes import Volume
from .scores import DISTANCES, MEASURES, Score, Unit, measure_name, surface_axes

# Largest differences, relative to values above 1. Overlaps are float32 there, distances are float32 here.
OVERLAP_TOLERANCE = 1e-5
DISTANCE_TOLERANCE = 1e-4  # in the unit of the distances
PERCENTILE = 0.95


@dataclass
class CrossCheck:
    """How far scores lie from those of the second library.

    Attributes:
        unit: of the distances.
        compared: measure to the number of pairs of a case and a class that were compared.
        largest: measure to the largest difference; of distances, how far they lie outside of their bounds.
        beyond: sentences that name the differences beyond the tolerance, each with case, class and values.
    """

    unit: Unit
    compared: dict[str, int] = field(default_factory=lambda: dict.fromkeys(MEASURES, 0))
    largest: dict[str, float] = field(default_factory=lambda: dict.fromkeys(MEASURES, 0.0))
    beyond: list[str] = field(default_factory=list)

    def add(self, scores: Iterable[Score], predicted: Volume, reference: Volume) -> None:
        """Compare the scores of one case.

        Args:
            scores: one for each class, all of one case.
            predicted: its label map.
            reference: on the same grid.
        """
        for score in scores:
            bounds = second_scores(score.label, predicted, reference, unit=self.unit)
            for measure, (low, high) in bounds.items():
                ours = abs(score.volume_error) if measure == "volume_error" else getattr(score, measure)
                difference = max(low - ours, ours - high, 0.0) if math.isfinite(ours) else math.inf
                self.compared[measure] += 1
                self.largest[measure] = max(self.largest[measure], difference)
                tolerance = DISTANCE_TOLERANCE if measure in DISTANCES else OVERLAP_TOLERANCE
                if difference > tolerance * max(1.0, high):
                    expected = f"{low:.6g}" if low == high else f"from {low:.6g} to {high:.6g}"
                    name = measure_name(measure, self.unit)
                    self.beyond.append(
                        f"{score.case}, class {score.label}: {name} is {ours:.6g}; grand_challenge_metrics gives "
                        f"{expected}"
                    )

    def summary(self) -> str:
        """What was compared and the largest differences, in one sentence."""
        parts = [
            f"{measure_name(measure, self.unit)} {self.largest[measure]:.2g}"
            for measure in MEASURES
            if self.compared[measure]
        ]
        pairs = max(self.compared.values())
        return (
            f"largest difference from grand_challenge_metrics in {pairs} pairs of case and class: "
            f"{', '.join(parts) or 'none'}; {len(self.beyond)} beyond tolerance"
        )


def second_scores(label: int, predicted: Volume, reference: Volume, *, unit: Unit) -> dict[str, tuple[float, float]]:
    """Measure to the least and the largest value that the second library allows; only those that are defined.

    Args:
        label: class.
        predicted: label map.
        reference: on the same grid.
        unit: of the distances.
    """
    ours, theirs = _around(predicted.data == label, reference.data == label)
    if not (ours.any() or theirs.any()):
        return {}
    matrix = stats.calculate_confusion_matrix(theirs, ours, [0, 1])
    with np.errstate(invalid="ignore"):  # of the background, if the mask fills the array
        dice = float(stats.dice_from_confusion_matrix(matrix)[1])
        iou = float(stats.jaccard_from_confusion_matrix(matrix)[1])
    found = {"dice": (dice, dice), "iou": (iou, iou)}
    if theirs.any():
        error = float(stats.relative_absolute_volume_difference(theirs, ours))
        found["volume_error"] = error, error
    if ours.any() and theirs.any():
        axes = surface_axes(reference.data.shape)
        sides = reference.spacing[axes].tolist() if unit == "mm" else [1.0] * len(axes)
        shape = [ours.shape[axis] for axis in axes]
        found |= _distance_bounds(ours.reshape(shape), theirs.reshape(shape), sides)
    return found


def _distance_bounds(ours: np.ndarray, theirs: np.ndarray, spacing: list[float]) -> dict[str, tuple[float, float]]:
    """Bounds of HD95 and ASSD, of masks (...) bool with voxels of `spacing`, neither of them empty."""
    voxels = [int(np.count_nonzero(mask & ~binary_erosion(mask))) for mask in (ours, theirs)]
    found = stats.hausdorff_distance_measures(theirs, ours, voxelspacing=spacing, percentile=PERCENTILE)
    one_rank_above = min(1.0, PERCENTILE + 1 / max(min(voxels) - 1, 1))
    above = stats.percentile_hausdorff_distance(theirs, ours, one_rank_above, spacing)
    mean = float(found.modified_distance)
    return {
        "hd95": (float(found.percentile_distance), float(above)),
        "assd": (mean * min(voxels) / sum(voxels), mean),
    }


def _around(ours: np.ndarray, theirs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both masks inside the smallest box around them: outside of the array counts as background, so nothing changes."""
    box = find_objects((ours | theirs).astype(np.uint8))
    return (ours[box[0]], theirs[box[0]]) if box else (ours, theirs)
