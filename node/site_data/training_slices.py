"""A store's training slices as candidate labels."""

from __future__ import annotations

import numpy as np

from ...adaptation.labels.candidate_labels import (
    MAX_CERTAINTY,
    UNKNOWN,
    SiteSlices,
    candidates_from_boxes,
    candidates_from_labels,
    candidates_from_presence,
    candidates_of_all_structures,
    only_candidate,
    refuse_other_labels,
)
from ...errors import NodeDataError, StoreError
from ...imaging.slice_choices import UNLABELLED
from ..store.derived.gaze_maps import gaze_candidates
from ..store.derived.pseudo_labels import pseudo_labels
from ..store.slice_store import Case, SliceStore

LABEL_MAPS = ("dense", "scribble", "point", "block")  # kinds whose maps hold the class of every annotated pixel


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


def known_labels(store: SliceStore, classes: int, *, with_pseudo_labels: bool = False) -> np.ndarray:
    """The labels of the training slices where the annotation leaves no choice, in the order of `store.slices("train")`.

    Of boxes that is the background outside and the core inside, of image-level labels a slice without any structure, of
    fixations what surely is background or, with two classes, the structure.

    Args:
        store: of any kind of labels, or none.
        classes: number of label values, background included.
        with_pseudo_labels: whether pixels that the annotation leaves open have the site's pseudo-labels, if it has any.

    Returns: (N, S, S) uint8, 255 where the label is not known.
    Raises: NodeDataError for labels that are not below `classes`, and as `site_slices`; StoreError for pseudo-labels
        that cannot be used.
    """
    size = store.format.size
    known = [np.empty((0, size, size), np.uint8)]
    for case in store.cases:
        if case.split != "train":
            continue
        if case.label_kind in LABEL_MAPS:
            labels = np.asarray(store.labels[case.span])
            refuse_other_labels(labels, classes)
        elif case.label_kind == "none":
            labels = np.full((case.count, size, size), UNLABELLED, np.uint8)
        else:
            labels = only_candidate(_candidates_of(store, case, classes)[0], classes)
        known.append(labels)
    found = np.concatenate(known)
    pseudo = pseudo_labels(store) if with_pseudo_labels else None
    if pseudo is None:
        return found
    chosen = pseudo[store.slices("train")]
    refuse_other_labels(chosen, classes)
    return np.where(found == UNLABELLED, chosen, found)


def left_open(store: SliceStore, case: Case, labels: np.ndarray, classes: int) -> np.ndarray:
    """Labels of a case's slices where its annotation leaves a choice and does not rule them out.

    Args:
        store: of the case.
        case: with any kind of labels, or none; dense labels leave nothing open.
        labels: (N, S, S) uint8 below `classes`, of all its slices.
        classes: number of label values, background included.

    Returns: (N, S, S) uint8, 255 where the annotation gives the label or excludes this one.
    Raises: NodeDataError as `known_labels`.
    """
    if case.label_kind == "none":
        return labels
    if case.label_kind == "dense":
        return np.full_like(labels, UNLABELLED)
    if case.label_kind in LABEL_MAPS:
        return np.where(np.asarray(store.labels[case.span]) == UNLABELLED, labels, UNLABELLED).astype(np.uint8)
    candidates = _candidates_of(store, case, classes)[0]
    is_open = only_candidate(candidates, classes) == UNLABELLED
    possible = (candidates == UNKNOWN) | (np.right_shift(candidates, labels.astype(candidates.dtype)) % 2 == 1)
    return np.where(is_open & possible, labels, UNLABELLED).astype(np.uint8)


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
            raise NodeDataError(
                "this site has gaze labels without gaze maps; run `fedfactory gaze STORE` there"
            ) from error
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
