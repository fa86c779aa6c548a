"""A site labels its own slices by a segmenter, once, for a factory that draws labels and for nothing else."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..adaptation.engine.window_inference import view_agreement
from ..adaptation.labelled_slices import foreground_dice
from ..adaptation.segmenter import Segmenter
from ..common.files import sha256_of
from ..common.progress import track
from ..errors import ConfigError, UsageError
from ..imaging.slice_choices import UNLABELLED
from .labelling import given_segmenter
from .site_adaptation import DOUBTFUL_AGREEMENT
from .site_data.training_slices import left_open
from .store.derived.pseudo_labels import PseudoLabelFacts, write_pseudo_labels
from .store.quality_page import QUALITY_PAGE, write_quality_page
from .store.slice_store import Case, SliceStore

LEAST_CONFIDENCE = 0.5  # more likely than all other classes together


def make_pseudo_labels(
    store_dir: str | Path,
    segmenter_file: str | Path,
    *,
    least_confidence: float = LEAST_CONFIDENCE,
    device: str = "cpu",
) -> PseudoLabelFacts:
    """Label the training slices of a site's store where nobody has, and keep that beside the store's own labels.

    The probabilities are means over all views that the segmenter knows. A pixel has no pseudo-label where the most
    likely class is not likely enough, where the segmenter's rule of single objects removes it, and where the annotation
    gives its label or rules this one out. Cases with dense labels get none; they show how good the others are.

    Args:
        store_dir: the site's own store, with any kind of labels or none.
        segmenter_file: a segmenter, such as a first guess or the site's adapted one, or an average, see
            `load_segmenter`.
        least_confidence: probability of the most likely class, in [0, 1], below which a pixel stays without a label.
        device: PyTorch device to compute on.

    Returns: what the store now records about them; earlier pseudo-labels are replaced.
    Raises: ConfigError, UsageError, StoreError, CheckpointError or NodeDataError; then the store stays as it was.
    """
    if not 0 <= least_confidence <= 1:
        raise ConfigError(f"least_confidence is {least_confidence}; choose from 0 to 1")
    store = SliceStore(store_dir)
    teacher = given_segmenter(segmenter_file, store, classes=store.classes or None).to(device)
    for value, name in teacher.card.names.items():
        if store.class_names.get(value, name).casefold() != name.casefold():
            raise UsageError(
                f"{segmenter_file}: label {value} is '{name}', and '{store.class_names[value]}' in {store.path}; "
                "give a segmenter of the same classes"
            )
    cases = [case for case in store.cases if case.split == "train" and case.label_kind != "dense" and case.count]
    if not cases:
        raise UsageError(f"{store.path}: has no training cases without dense labels; there is nothing to label")
    labels = np.full((len(store), store.format.size, store.format.size), UNLABELLED, np.uint8)
    means, views = [], []
    for case in track(cases, f"labelling slices of {store.domain}"):
        probabilities, of_views = teacher.probabilities_and_views(_images(store, case))
        found = probabilities.argmax(1).numpy().astype(np.uint8)
        sure = (probabilities.amax(1) >= least_confidence).numpy() & (teacher.tidied(found) == found)
        labels[case.span] = np.where(sure, left_open(store, case, found, teacher.classes), UNLABELLED)
        means.append(torch.from_numpy(found))
        views.append([view.to(torch.uint8) for view in of_views])
    pixels = np.concatenate([labels[case.span] for case in cases])
    known = pixels != UNLABELLED
    if not (pixels[known] > 0).any():
        raise UsageError(
            f"{segmenter_file}: finds no structure in the slices of {store.path} with a probability of "
            f"{least_confidence:g} or more; look at its labels (`fedfactory segment`), and give another one or a lower "
            "least_confidence"
        )
    agreement = None
    if len(teacher.card.views) > 1:
        single = [torch.cat(of_cases) for of_cases in zip(*views, strict=True)]
        agreement = _number(view_agreement(single, torch.cat(means), teacher.classes))
    dice, dice_cases = _dice_with_annotations(store, teacher)
    facts = PseudoLabelFacts(
        made_by=f"fedfactory {__version__}",
        images=store.files["images"],
        segmenter=sha256_of(segmenter_file),
        segmenter_domain=teacher.card.training.domain,
        classes=teacher.classes,
        class_names=teacher.card.class_names,
        least_confidence=least_confidence,
        slices=int(known.any(axis=(1, 2)).sum()),
        known_share=float(known.mean()),
        structure_share=float((known & (pixels > 0)).mean()),
        agreement=agreement,
        dice=dice,
        dice_cases=dice_cases,
        doubts=tuple(_doubts(agreement)),
    )
    write_pseudo_labels(store, labels, facts)
    write_quality_page(store, store.path / QUALITY_PAGE)
    return facts


def _images(store: SliceStore, case: Case) -> torch.Tensor:
    """(n, C, S, S) float32, the slices of a case."""
    return torch.from_numpy(store.images[case.span].astype(np.float32))


def _dice_with_annotations(store: SliceStore, teacher: Segmenter) -> tuple[float | None, int]:
    """Mean foreground Dice of all that the segmenter finds with dense labels, and the number of cases that have them.

    Test cases are left out: they are for the segmenters that come of this.
    """
    cases = [case for case in store.cases if case.split != "test" and case.label_kind == "dense" and case.count]
    ours, theirs = [], []
    for case in cases:
        probabilities = teacher.probabilities(_images(store, case), views=len(teacher.card.views))
        found = teacher.tidied(probabilities.argmax(1).numpy().astype(np.uint8))
        annotated = np.asarray(store.labels[case.span])
        ours.append(np.where(annotated == UNLABELLED, 0, found))
        theirs.append(np.where(annotated == UNLABELLED, 0, annotated))
    if not cases:
        return None, 0
    found, annotated = (torch.from_numpy(np.concatenate(maps)) for maps in (ours, theirs))
    return _number(foreground_dice(found, annotated, teacher.classes)), len(cases)


def _doubts(agreement: float | None) -> list[str]:
    if agreement is None:
        return ["the segmenter knows one view of an image only, so that nothing shows whether it is sure of itself"]
    if agreement <= DOUBTFUL_AGREEMENT:
        return [
            f"turned, mirrored or shifted slices get other labels (Dice {agreement:.2f}; good segmenters had more than "
            f"{DOUBTFUL_AGREEMENT})"
        ]
    return []


def _number(value: float) -> float | None:
    """None for NaN, which JSON has not."""
    return None if math.isnan(value) else value
