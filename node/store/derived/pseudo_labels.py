"""Pseudo-labels: what a segmenter says of a site's own slices, kept beside the annotations and never among them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ....common.files import atomic_file, write_json
from ....common.json_text import read_json
from ....common.records import read_record, write_record
from ....errors import StoreError, UsageError
from ..slice_store import SliceStore

ARRAY, CARD = "pseudo_labels.npy", "pseudo_labels.json"


@dataclass(frozen=True, kw_only=True)
class PseudoLabelFacts:
    """Where the pseudo-labels of a store come from, and what is known of their quality.

    Attributes:
        made_by: program and version.
        images: name of the file with the slices that were labelled; it follows from their content.
        segmenter: SHA-256 of the segmenter's file.
        segmenter_domain: domain that it was trained for; "" where its file does not say.
        classes: number of label values, background included.
        class_names: name by label value, of the classes that have one in the segmenter's file.
        least_confidence: probability of the most likely class, in [0, 1], below which a pixel has no pseudo-label.
        slices: number of training slices with pseudo-labels.
        known_share: of the pixels of training cases without dense labels, the share that has a pseudo-label.
        structure_share: of the same pixels, the share whose pseudo-label is a structure.
        agreement: of the views of a slice, in [0, 1], see `view_agreement`; None where the segmenter knows one view.
        dice: mean foreground Dice, in [0, 1], of all that the segmenter finds with the site's dense labels of training
            and validation cases; None where there are none, or neither shows a structure.
        dice_cases: number of those cases.
        doubts: reasons not to trust them, one sentence each.
    """

    made_by: str
    images: str
    segmenter: str
    segmenter_domain: str
    classes: int
    class_names: dict[str, str] = field(default_factory=dict)
    least_confidence: float
    slices: int
    known_share: float
    structure_share: float
    agreement: float | None
    dice: float | None
    dice_cases: int
    doubts: tuple[str, ...] = ()

    def rows(self) -> dict[str, str]:
        """What a person is shown: name to text."""
        agreement, dice = ("" if value is None else f"{value:.3f}" for value in (self.agreement, self.dice))
        values = {
            "made by": self.made_by,
            "domain of the segmenter": self.segmenter_domain,
            "SHA-256 of the segmenter": self.segmenter,
            "label values": f"{self.classes}, background included",
            "training slices": str(self.slices),
            "pixels with one": f"{self.known_share:.1%}, structures {self.structure_share:.1%}",
            "least confidence": f"{self.least_confidence:g}",
            "agreement of views": agreement,
            "Dice with annotations": f"{dice} in {self.dice_cases} cases" if dice else "",
        }
        return {name: value for name, value in values.items() if value}


def write_pseudo_labels(store: SliceStore, labels: np.ndarray, facts: PseudoLabelFacts) -> None:
    """Keep pseudo-labels in the folder of a store, in place of earlier ones; the store itself stays as it is.

    Args:
        store: whose slices were labelled.
        labels: (N, S, S) uint8, of all slices of the store, 255 where there is no pseudo-label.
        facts: about them.
    """
    (store.path / CARD).unlink(missing_ok=True)  # it must not describe the new labels
    with atomic_file(store.path / ARRAY) as temporary, temporary.open("wb") as file:
        np.save(file, labels, allow_pickle=False)
    write_json(store.path / CARD, write_record(facts))


def pseudo_label_facts(store: SliceStore) -> PseudoLabelFacts | None:
    """What is known of a store's pseudo-labels; None if it has none.

    Raises: StoreError if they are damaged, or of other slices than the store's.
    """
    if not (store.path / CARD).exists():
        return None
    try:
        facts = read_record(PseudoLabelFacts, read_json(store.path / CARD))
    except (OSError, ValueError, UsageError) as error:
        raise _unusable(store, f"{CARD} cannot be read: {error}") from None
    if facts.images != store.files["images"]:
        raise _unusable(store, "the slices have changed since they were made")
    return facts


def pseudo_labels(store: SliceStore) -> np.ndarray | None:
    """The pseudo-labels of all slices of a store, (N, S, S) uint8, 255 where there are none; None if it has none.

    Raises: StoreError as `pseudo_label_facts`.
    """
    facts = pseudo_label_facts(store)
    if facts is None:
        return None
    try:
        found = np.load(store.path / ARRAY, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header with Python's own parser, which raises many types
        raise _unusable(store, f"{ARRAY} cannot be read: {error}") from None
    shape = (len(store), store.format.size, store.format.size)
    if (found.shape, found.dtype) != (shape, np.uint8):
        raise _unusable(store, f"{ARRAY} has {found.dtype} of shape {found.shape}; it must be uint8 of shape {shape}")
    return found


def _unusable(store: SliceStore, reason: str) -> StoreError:
    return StoreError(
        f"{store.path}: its pseudo-labels cannot be used ({reason}); run `fedfactory pseudo-label` again, or remove "
        f"{CARD}"
    )
