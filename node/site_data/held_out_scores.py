"""Scores of a segmenter on the test cases of a store."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch

from ...adaptation.evaluation.scores import Score, score_case
from ...adaptation.evaluation.summary import class_means, mean_over_classes
from ...adaptation.segmenter import Segmenter
from ...imaging.slice_choices import UNLABELLED
from ...imaging.volumes import Volume
from ..store.slice_store import Case, SliceStore


def held_out_scores(store: SliceStore, segmenter: Segmenter, *, least_patients: int = 0) -> dict[str, float]:
    """Dice and HD95 (mm; pixels of pictures) over the densely labelled test cases, on the images' own grids.

    Means are over cases for each class, then over classes; `adaptation.evaluation.scores` has the rule for absent
    classes. Voxels that nobody annotated do not count.

    Args:
        store: with the test cases.
        segmenter: to score.
        least_patients: classes that fewer test patients have in their labels are left out, of the means too.

    Returns: "test_cases", "dice", "hd95", "dice_LABEL" and "hd95_LABEL" for each label, and "dice_undefined" and
        "hd95_undefined", numbers of pairs of a case and a class. Empty without test cases, "test_cases" alone if no
        class is left.
    """
    cases = [case for case in store.cases if case.has_reference]
    if not cases:
        return {}
    row: dict[str, float] = {"test_cases": len(cases)}
    if len({case.patient for case in cases}) < least_patients:
        return row
    scores = case_scores(store, segmenter)
    patients = defaultdict[int, set[str]](set)
    for score in scores:
        patients[score.label] |= set() if score.absent_in in ("reference", "both") else {score.patient}
    scores = [score for score in scores if len(patients[score.label]) >= least_patients]
    if not scores:
        return row
    for measure in ("dice", "hd95"):
        row[measure] = mean_over_classes(scores, measure)
        row |= {f"{measure}_{label}": value for label, value in class_means(scores, measure).items()}
        row[f"{measure}_undefined"] = sum(not math.isfinite(getattr(score, measure)) for score in scores)
    return row


def case_scores(store: SliceStore, segmenter: Segmenter) -> list[Score]:
    """Scores of all classes of the store for each densely labelled test case, on the images' own grids."""
    return [score for case in store.cases if case.has_reference for score in _scores_of(store, case, segmenter)]


def _scores_of(store: SliceStore, case: Case, segmenter: Segmenter) -> list[Score]:
    reference = store.reference(case)
    images = torch.from_numpy(store.images[case.span].astype(np.float32))
    found = segmenter.tidied(store.grid(case).labels_to_volume(segmenter.probabilities(images).cpu().numpy()))
    unknown = reference.data == UNLABELLED
    ours, theirs = (Volume(np.where(unknown, 0, data), reference.affine) for data in (found, reference.data))
    unit = "px" if store.format.pictures else "mm"
    return score_case(case.name, ours, theirs, patient=case.patient, classes=range(1, store.classes), unit=unit)
