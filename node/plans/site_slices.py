"""A store's training slices as candidate labels, and the scores of a segmenter on its test cases."""

from __future__ import annotations

import numpy as np
import torch
from fedbiomed.common.logger import logger

from ...adaptation.evaluation import score_case
from ...adaptation.labels.candidate_labels import (
    UNKNOWN,
    SiteSlices,
    candidates_from_boxes,
    candidates_from_labels,
    candidates_from_presence,
    candidates_of_all_structures,
)
from ...adaptation.segmenter import Segmenter
from ...errors import NodeDataError, StoreError
from ...imaging.volumes import Volume
from ..store.gaze_maps import gaze_candidates
from ..store.slice_store import Case, SliceStore


def site_slices(store: SliceStore, classes: int) -> SiteSlices:
    """The training slices with their candidate labels.

    Raises: NodeDataError for labels that are not below `classes`, and for a store without training slices.
    """
    parts = [(case, *_candidates_of(store, case, classes)) for case in store.cases if case.split == "train"]
    if not any(case.count for case, *_ in parts):
        raise NodeDataError("this site has no training slices; it needs at least 1")
    return SiteSlices(
        images=np.concatenate([store.images[case.span] for case, *_ in parts]).astype(np.float32),
        candidates=np.concatenate([candidates for _, candidates, _ in parts]),
        kinds=np.concatenate([np.repeat(kind, case.count) for case, _, kind in parts]),
        classes=classes,
    )


def held_out_scores(store: SliceStore, segmenter: Segmenter) -> dict[str, float]:
    """Mean Dice and HD95 (mm) over the densely labelled test cases, for each class and over all classes.

    A case counts for a class that occurs in one of the two label maps, and for its distance if it occurs in both.

    Returns: "test_cases", "dice", "hd95", and "dice_LABEL", "hd95_LABEL" for each label; empty without test cases.
    """
    scores, cases = [], [case for case in store.cases if case.split == "test" and case.label_kind == "dense"]
    for case in cases:
        images = torch.from_numpy(store.images[case.span].astype(np.float32))[:, None]
        found = segmenter.probabilities(images).argmax(1).numpy().astype(np.uint8)
        between = store.format.slice_spacing or case.facts.spacing[2]
        affine = np.diag([store.format.spacing, store.format.spacing, between, 1.0])
        pair = (Volume(np.moveaxis(labels, 0, -1), affine) for labels in (found, store.labels[case.span]))
        scores += score_case(case.name, *pair)
    if not scores:
        return {}
    row: dict[str, float] = {"test_cases": len(cases)}
    for measure in ("dice", "hd95"):
        by_class = {}
        for label in sorted({score.label for score in scores}):
            values = [getattr(score, measure) for score in scores if score.label == label]
            values = [value for value in values if np.isfinite(value)]
            by_class[label] = float(np.mean(values)) if values else float("nan")
        row |= {f"{measure}_{label}": value for label, value in by_class.items()}
        known = [value for value in by_class.values() if np.isfinite(value)]
        row[measure] = float(np.mean(known)) if known else float("nan")
    return row


def _candidates_of(store: SliceStore, case: Case, classes: int) -> tuple[np.ndarray, str]:
    """Candidate labels (N, S, S) of a case's slices, unsigned integers, and the kind of its labels."""
    size, kind = store.format.size, case.label_kind
    if kind == "gaze":
        try:
            found = gaze_candidates(store)[case.span]
        except StoreError as error:
            logger.error(f"fedfactory: {error}")
            raise NodeDataError(
                "this site has gaze labels without gaze maps; run `fedfactory gaze STORE` there"
            ) from None
        return candidates_of_all_structures(found, classes), kind
    if kind == "none":
        dtype = candidates_from_labels(np.zeros(1, np.uint8), classes).dtype
        return np.full((case.count, size, size), UNKNOWN, dtype), kind
    if kind == "image":
        return candidates_from_presence(store.presence[case.span], size, classes), kind
    labels = np.asarray(store.labels[case.span])
    if kind == "box":
        return np.stack([candidates_from_boxes(label, classes) for label in labels]), kind
    return candidates_from_labels(labels, classes), kind
