"""Which labels sites hold, as they announce them."""

from __future__ import annotations

from collections.abc import Mapping

from ...adaptation.methods.recommendation import SUPERVISING
from ...node.site_facts import ModalityFacts, SiteFacts

ONE_STRUCTURE = "gaze"  # a kind of label that says nothing about the number of structures


def held_labels(facts: Mapping[str, SiteFacts]) -> set[str]:
    """Kinds of labels of the training slices of all sites and modalities; "none" for slices without labels."""
    parts = [part for site in facts.values() for part in (site, *site.modalities.values())]
    return {kind for part in parts for kind in part.label_kinds}


def label_numbers(parts: Mapping[str, SiteFacts | ModalityFacts]) -> dict[str, int]:
    """Name to number of label values, background included, of those parts whose labels tell structures apart."""
    telling = SUPERVISING - {ONE_STRUCTURE}
    return {name: part.classes for name, part in parts.items() if telling & set(part.label_kinds) and part.classes > 1}
