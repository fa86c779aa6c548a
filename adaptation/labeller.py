"""Who labels drawn slices: all label branches of a factory or its distilled one, and in which precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..common.records import write_record
from ..errors import UsageError
from ..generative.synthesis import group_size, synthesise_volume
from .engine.planned_network import fast_bfloat16
from .labelled_factory import DrawingFactory, Labeller
from .labelled_slices import LabelAgreement, label_agreement
from .networks.label_branch import BranchEnsemble, LabelBranch

LEAST_DICE = 0.95  # of every class with the ensemble's labels, for the distilled branch to replace it unasked
LEAST_EQUAL_PIXELS = 0.999  # with the labels of float32, for bfloat16 to replace it unasked
LEAST_WIDTH = 32  # of the maps at full resolution; in narrower ones, bfloat16 was as slow as float32 or slower
SUBJECTS, SEED = 4, 20_261_127  # on which bfloat16 is compared with float32: one group of slices of each


@dataclass(frozen=True)
class ChosenLabeller:
    """What labels drawn slices, and why.

    Attributes:
        labels_of: from slices (B, C, S, S) to labels (B, S, S) uint8.
        label_with: "ensemble" or "distilled"; "generator" if it draws labels with its images.
        precision: "float32" or "bfloat16".
        equal_pixels: share of pixels that have the same label in both precisions, on fresh slices; None where only
            float32 came into question.
        agreement: of the distilled branch with the ensemble, as the factory's card has it; None of another labeller.
    """

    labels_of: Labeller
    label_with: str
    precision: str
    equal_pixels: float | None = None
    agreement: LabelAgreement | None = None

    def facts(self) -> dict[str, Any]:
        """For the manifest of drawn volumes, JSON-able."""
        return {
            "label_with": self.label_with,
            "precision": self.precision,
            "equal_pixels": self.equal_pixels,
            "distilled_agreement": write_record(self.agreement),
        }


def choose_labeller(
    labelled: DrawingFactory, domain: str, *, label_with: str = "auto", precision: str = "auto"
) -> ChosenLabeller:
    """What labels the slices of a domain, on the factory's device.

    Args:
        labelled: the factory.
        domain: of the slices.
        label_with: "ensemble", "distilled", or "auto" for the distilled branch where there is one whose labels agree
            with the ensemble's to a Dice of `LEAST_DICE` in every class.
        precision: "float32", "bfloat16", or "auto" for bfloat16 where the device is faster with it and at least
            `LEAST_EQUAL_PIXELS` of the labels of this factory's slices stay as they are.

    Raises: UsageError for a distilled branch that is not there, or for choices of a factory that draws labels itself.
    """
    if not labelled.branches:
        if label_with != "auto" or precision == "bfloat16":
            raise UsageError(
                f"label_with is '{label_with}' and precision '{precision}', but this factory draws labels with its "
                "images, without label branches; leave both out"
            )
        return ChosenLabeller(labelled.labels, "generator", "float32")
    branches = _chosen_branches(labelled, label_with)
    used, agreement = "ensemble", None
    if branches == [labelled.distilled]:
        used, agreement = "distilled", labelled.card.distilled
    plain = BranchEnsemble(branches)
    device = next(labelled.factory.generator.parameters()).device
    fast = fast_bfloat16(device) and labelled.factory.config.channels[-1] >= LEAST_WIDTH
    if precision == "float32" or (precision == "auto" and not fast):
        return ChosenLabeller(plain.labels, used, "float32", agreement=agreement)
    low = BranchEnsemble(branches, precision="bfloat16")
    equal = _equal_pixels(labelled, domain, plain, low)
    if precision == "auto" and equal < LEAST_EQUAL_PIXELS:
        return ChosenLabeller(plain.labels, used, "float32", equal, agreement)
    return ChosenLabeller(low.labels, used, "bfloat16", equal, agreement)


def _chosen_branches(labelled: DrawingFactory, label_with: str) -> list[LabelBranch]:
    """All branches, or the distilled one alone, see `choose_labeller`."""
    distilled, agreement = labelled.distilled, labelled.card.distilled
    if label_with == "distilled" and distilled is None:
        raise UsageError(
            "label_with is 'distilled', but this factory has no distilled branch; run `fedfactory label --distil`, or "
            "choose ensemble"
        )
    near = agreement is not None and all(score >= LEAST_DICE for score in agreement.dice)  # NaN is not
    if distilled is not None and (label_with == "distilled" or (label_with == "auto" and near)):
        return [distilled]
    return labelled.branches


def _equal_pixels(labelled: DrawingFactory, domain: str, ours: BranchEnsemble, theirs: BranchEnsemble) -> float:
    """Share of the pixels of fresh slices to which both give the same label; always of the same slices."""
    factory, shown = labelled.factory, labelled.shown_for_labels(domain)
    rng = torch.Generator().manual_seed(SEED)
    device = next(factory.generator.parameters()).device
    shares = []
    for _ in range(SUBJECTS):
        heights = torch.rand(group_size(factory.config, device), generator=rng) * (factory.config.z_bins - 1)
        index = factory.config.domain_index(shown)
        for part in synthesise_volume(factory.generator, heights, domain=index, rng=rng):
            both = label_agreement(ours.labels(part), theirs.labels(part), labelled.card.classes)
            shares.append(both.equal_pixels)
    return sum(shares) / len(shares)
