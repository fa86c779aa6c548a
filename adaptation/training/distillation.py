"""One label branch that gives the labels of several: training it, and measuring how far it agrees with them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.progress import track
from ...errors import ConfigError, UsageError
from ...generative.networks.generator import Synthesis
from ...generative.synthesis import synthesise_slices
from ..labelled_factory import LabelledFactory
from ..labelled_slices import LabelAgreement, label_agreement
from ..networks.label_branch import BranchEnsemble, LabelBranch

LEARNING_RATE = 1e-3  # a quarter of that of the branches: it starts from a trained one
COMPARED_SLICES = 256  # on which the agreement is measured
TRAINING, COMPARISON = 2, 3  # streams of the seed; the branches' own training has 0 and 1


@dataclass(frozen=True, kw_only=True)
class DistillationConfig:
    """How the distilled branch is trained. Raises: ConfigError if a value is out of range.

    Attributes:
        updates: optimizer steps.
        batch_size: slices per update.
        seed: of everything random.
    """

    updates: int = 250
    batch_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


def distil_branches(labelled: LabelledFactory, config: DistillationConfig | None = None) -> LabelledFactory:
    """Train one branch on the mean probabilities of all branches (Hinton et al. 2015), at no temperature.

    It starts from the best branch. Slices are drawn from new latents for every update, in those domains whose feature
    maps give labels; the ensemble says what they show, so that no patient's image is needed.

    Returns: the factory with the branch; its card has the agreement with the ensemble on slices of further latents.
    Raises: UsageError if the factory has fewer than two branches.
    """
    config = config or DistillationConfig()
    if len(labelled.branches) < 2:
        raise UsageError(f"the factory has {len(labelled.branches)} label branch(es); distilling needs at least two")
    ensemble, branch = BranchEnsemble(labelled.branches), copy.deepcopy(labelled.branches[0]).train()
    drawn = _drawn(labelled, config.batch_size, seed=4 * config.seed + TRAINING)
    optimizer = torch.optim.Adam(branch.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=config.updates)
    for _ in track(range(config.updates), "distilling the label branches"):
        synthesis = next(drawn)
        loss = F.cross_entropy(branch(synthesis), ensemble.probabilities(synthesis))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    branch.eval()
    card = replace(labelled.card, distilled=_agreement(labelled, branch, seed=4 * config.seed + COMPARISON))
    return replace(labelled, distilled=branch, card=card)


def _agreement(labelled: LabelledFactory, branch: LabelBranch, *, seed: int) -> LabelAgreement:
    """Of the branch with the ensemble, on `COMPARED_SLICES` slices."""
    size = 16
    drawn = _drawn(labelled, size, seed=seed)
    ours, theirs = BranchEnsemble([branch]), BranchEnsemble(labelled.branches)
    pairs: list[tuple[Tensor, Tensor]] = []
    for _ in range(COMPARED_SLICES // size):
        synthesis = next(drawn)
        pairs.append((ours.labels(synthesis), theirs.labels(synthesis)))
    found, wanted = (torch.cat(labels) for labels in zip(*pairs, strict=True))
    return label_agreement(found, wanted, labelled.card.classes)


def _drawn(labelled: LabelledFactory, size: int, *, seed: int) -> Iterator[Synthesis]:
    """New synthetic slices without end, of the domains whose feature maps give labels, equally often."""
    config, rng = labelled.factory.config, torch.Generator().manual_seed(seed)
    shown = sorted({config.domain_index(labelled.shown_for_labels(domain)) for domain in config.domains})
    while True:
        domain = torch.tensor(shown)[torch.randint(len(shown), (size,), generator=rng)]
        yield synthesise_slices(labelled.factory.generator, domain, rng=rng)
