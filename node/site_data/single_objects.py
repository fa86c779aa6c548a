"""Which structures are one connected object in a store's labels."""

from __future__ import annotations

from ...adaptation.engine.object_rule import learn_single_objects
from ...adaptation.labelled_slices import LabelledSlices
from ..store.slice_store import SliceStore

LEAST_PATIENTS = 2  # a rule of one patient would tell of that patient


def single_objects_of(store: SliceStore) -> tuple[int, ...] | None:
    """Labels of the structures that are one connected object in the densely labelled training volumes of a store, see
    `learn_single_objects`; None where fewer than two patients have such labels, and for pictures: how many lesions the
    next picture shows is not known from those before."""
    dense = [case for case in store.cases if case.split == "train" and case.label_kind == "dense"]
    if store.format.pictures or len({case.patient for case in dense}) < LEAST_PATIENTS:
        return None
    chosen = store.labelled_slices("train")
    volume = store.volume_of_slices()[chosen]
    return learn_single_objects(LabelledSlices(store.images[chosen], store.labels[chosen], store.classes, volume))
