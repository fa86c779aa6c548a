"""A store's training slices as candidate labels, and the scores of a segmenter on its test cases."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import torch
from fedbiomed.common.logger import logger

from ...adaptation.evaluation.scores import Score, score_case
from ...adaptation.evaluation.summary import class_means, mean_over_classes
from ...adaptation.labels.candidate_labels import (
    MAX_CERTAINTY,
    UNKNOWN,
    SiteSlices,
    candidates_from_boxes,
    candidates_from_labels,
    candidates_from_presence,
    candidates_of_all_structures,
)
from ...adaptation.segmenter import Segmenter
from ...errors import NodeDataError, StoreError
from ...imaging.slice_format import UNLABELLED
from ...imaging.volumes import Volume
from ..store.gaze_maps import gaze_candidates
from ..store.slice_store import Case, SliceStore


def site_slices(store: SliceStore, classes: int) -> SiteSlices:
    """The training slices with their candidate labels.

    Raises: NodeDataError for labels that are not below `classes`, and for a store without training slices.
    """
    parts = [(case, *_candidates_of(store, case, classes)) for case in store.cases if case.split == "train"]
    graded = any(certainty is not None for *_, certainty in parts)
    if not any(case.count for case, *_ in parts):
        raise NodeDataError("this site has no training slices; it needs at least 1")
    numbers = {name: number for number, name in enumerate(sorted({case.patient for case, *_ in parts}))}
    return SiteSlices(
        images=np.concatenate([store.images[case.span] for case, *_ in parts]).astype(np.float32),
        candidates=np.concatenate([candidates for _, candidates, *_ in parts]),
        kinds=np.concatenate([np.repeat(kind, case.count) for case, _, kind, _ in parts]),
        classes=classes,
        patients=np.concatenate([np.repeat(numbers[case.patient], case.count) for case, *_ in parts]),
        certainty=np.concatenate([_certainty_of(found, own) for _, found, _, own in parts]) if graded else None,
    )


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
    scores = [score for case in cases for score in _case_scores(store, case, segmenter)]
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


def _case_scores(store: SliceStore, case: Case, segmenter: Segmenter) -> list[Score]:
    """Scores of all classes of the store for a densely labelled test case."""
    reference = store.reference(case)
    images = torch.from_numpy(store.images[case.span].astype(np.float32))
    found = segmenter.tidied(store.grid(case).labels_to_volume(segmenter.probabilities(images).cpu().numpy()))
    unknown = reference.data == UNLABELLED
    ours, theirs = (Volume(np.where(unknown, 0, data), reference.affine) for data in (found, reference.data))
    unit = "px" if store.format.pictures else "mm"
    return score_case(case.name, ours, theirs, patient=case.patient, classes=range(1, store.classes), unit=unit)


def _certainty_of(candidates: np.ndarray, certainty: np.ndarray | None) -> np.ndarray:
    """(N, S, S) uint8; halfway where the labels of a case have no grades, beside cases that have them."""
    return np.full(candidates.shape, MAX_CERTAINTY // 2, np.uint8) if certainty is None else certainty


def _candidates_of(store: SliceStore, case: Case, classes: int) -> tuple[np.ndarray, str, np.ndarray | None]:
    """Candidate labels (N, S, S) of a case's slices, unsigned integers, the kind of its labels, and the certainty
    (N, S, S) of those that have grades."""
    size, kind = store.format.size, case.label_kind
    if kind == "gaze":
        try:
            found, certainty = (array[case.span] for array in gaze_candidates(store))
        except StoreError as error:
            logger.error(f"fedfactory: {error}")
            raise NodeDataError(
                "this site has gaze labels without gaze maps; run `fedfactory gaze STORE` there"
            ) from None
        return candidates_of_all_structures(found, classes), kind, certainty
    if kind == "none":
        dtype = candidates_from_labels(np.zeros(1, np.uint8), classes).dtype
        return np.full((case.count, size, size), UNKNOWN, dtype), kind, None
    if kind == "image":
        return candidates_from_presence(store.presence[case.span], size, classes), kind, None
    labels = np.asarray(store.labels[case.span])
    if kind == "box":
        return np.stack([candidates_from_boxes(label, classes) for label in labels]), kind, None
    return candidates_from_labels(labels, classes), kind, None
