"""Training the label-synthesis branch at the labelled site."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from ...common.progress import track
from ...common.seeding import seeded
from ...errors import ConfigError
from ...generative.factory_file import TrainedFactory
from ...generative.metrics.alarm import MIN_SHARED_ANATOMY
from ...generative.metrics.shared_anatomy import shared_anatomy
from ...generative.networks.generator import Generator, Style, Synthesis
from ...generative.synthesis import synthesise_slices
from ..engine.training_loop import Checkpoint
from ..labelled_factory import LabelledFactory, LabelledFactoryCard, drawn_labels_card
from ..labelled_slices import LabelledSlices, foreground_dice
from ..networks.label_branch import BranchEnsemble, LabelBranch
from ..segmenter import Segmenter
from .latent_inversion import invert

LEARNING_RATE = 4e-3
EVALUATIONS = 5  # of the branch during training
VALIDATION_SLICES = 64  # of an evaluation

Batch = tuple[Synthesis, Tensor]  # synthetic slices with their feature maps, and their labels (B, S, S) integer


@dataclass(frozen=True, kw_only=True)
class LabelBranchConfig:
    """How a label branch is trained. Raises: ConfigError if a value is out of range.

    Attributes:
        updates: optimizer steps.
        batch_size: slices per update.
        keep: number of best checkpoints; the mean of their branches gives the labels.
        seed: of everything random.
    """

    updates: int = 250
    batch_size: int = 16
    keep: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("updates", "batch_size", "keep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class BinnedSlices:
    """Labelled slices with their height bins, (N,) integers."""

    slices: LabelledSlices
    z_bin: np.ndarray


def train_label_branch(
    factory: TrainedFactory,
    teacher: Segmenter,
    robust: Segmenter,
    *,
    domain: str,
    real: BinnedSlices | None = None,
    held_out: BinnedSlices | None = None,
    config: LabelBranchConfig | None = None,
) -> LabelledFactory:
    """Train the branch on labels of synthetic slices, and keep its best checkpoints.

    Without `real`, the teacher labels synthetic slices of the labelled domain, and checkpoints are evaluated on its
    labels of further synthetic slices. With `real` (published), the labelled site's own slices are inverted: the branch
    is trained on their true labels and the feature maps of the latents found, and evaluated on `held_out` slices
    inverted in the same way.

    Args:
        factory: trained generator.
        teacher: segmenter trained on the labelled site's own slices.
        robust: the same with random contrasts; kept in the labelled factory.
        domain: name of the labelled domain.
        real: labelled slices of the patients to train on.
        held_out: labelled slices of other patients.
        config: how to train; None for the defaults.

    Returns: the labelled factory. Its card has the agreement of the branches' mean with the validation labels.
    """
    config = config or LabelBranchConfig()
    generator, index = factory.generator, factory.config.domain_index(domain)
    rng = torch.Generator().manual_seed(config.seed)
    with seeded(config.seed):
        branch = LabelBranch.for_generator(generator, teacher.classes).train()
    if real is None:
        batches = _synthetic_batches(generator, teacher, index, size=config.batch_size, rng=rng)
        other_rng = torch.Generator().manual_seed(config.seed + 1)
        validation = next(_synthetic_batches(generator, teacher, index, size=VALIDATION_SLICES, rng=other_rng))
        validated_on = "fresh synthetic slices"
    else:
        batches = _inverted_batches(generator, real, index, size=config.batch_size, rng=rng)
        validation = next(_inverted_batches(generator, held_out or real, index, size=VALIDATION_SLICES, rng=rng))
        validated_on = "validation cases" if held_out else "its own training slices"
    checkpoints = _train(branch, batches, validation, updates=config.updates, classes=teacher.classes)
    if real is None or held_out is not None:
        chosen = sorted(checkpoints, key=lambda checkpoint: -np.nan_to_num(checkpoint.score))[: config.keep]
    else:  # scores on the training slices cannot choose a checkpoint
        chosen = checkpoints[-1:]
    branches = []
    for checkpoint in chosen:
        trained = copy.deepcopy(branch).eval()
        trained.load_state_dict(checkpoint.weights)
        branches.append(trained)
    predicted = BranchEnsemble(branches).labels(validation[0])
    card = LabelledFactoryCard(
        classes=teacher.classes,
        labelled_domain=domain,
        agreement=foreground_dice(predicted, validation[1], teacher.classes),
        validated_on=validated_on,
        labels_from=dict.fromkeys(factory.config.domains, "view"),
    )
    labelled = LabelledFactory(factory, branches, card, robust)
    return replace(labelled, card=replace(card, labels_from=choose_views(labelled, seed=config.seed)))


def with_first_guess(factory: TrainedFactory, robust: Segmenter, *, domain: str, seed: int = 0) -> LabelledFactory:
    """A factory that draws labels itself, with the labelled site's first guess for the other sites; nothing is trained.

    Args:
        factory: trained generator with classes.
        robust: segmenter trained with random contrasts on the labelled site's slices.
        domain: name of the labelled domain.
        seed: of the synthetic slices on which the first guess is compared with the drawn labels.
    """
    rng = torch.Generator().manual_seed(seed)
    domains = torch.full((VALIDATION_SLICES,), factory.config.domain_index(domain))
    drawn = synthesise_slices(factory.generator, domains, rng=rng)
    found = robust.probabilities(drawn.image, np.arange(len(drawn.image))).argmax(1)
    card = replace(
        drawn_labels_card(factory.config),
        labelled_domain=domain,
        validated_on="synthetic slices, against the first guess",
    )
    labelled = LabelledFactory(factory, [], card, robust)
    agreement = foreground_dice(labelled.labels(drawn), found, card.classes)
    return replace(labelled, card=replace(card, agreement=agreement))


def choose_views(labelled: LabelledFactory, *, seed: int) -> dict[str, str]:
    """Choose for every domain which feature maps give the labels of its synthetic slices.

    Where domains share no anatomy, another domain's view of a latent does not show the same structures. Otherwise the
    robust segmenter, which does not depend on the contrast, segments slices of the domain: the feature maps whose
    labels agree better with it are chosen.

    Returns: by domain, "view" for the feature maps of the same latent in the labelled domain, or "own" for those in the
        domain itself.
    """
    config, generator = labelled.factory.config, labelled.factory.generator
    labelled_domain, classes = labelled.card.labelled_domain, labelled.card.classes
    chosen = dict.fromkeys(config.domains, "view")
    if config.domain_enters == "head":  # the features are the same in all domains
        return chosen
    shared = shared_anatomy(generator)
    for domain in config.domains:
        if domain == labelled_domain:
            continue
        score = next(value for pair, value in shared.items() if set(pair) == {domain, labelled_domain})
        own, view = (
            synthesise_slices(
                generator,
                torch.full((VALIDATION_SLICES,), config.domain_index(name)),
                rng=torch.Generator().manual_seed(seed),
            )
            for name in (domain, labelled_domain)
        )
        expected = labelled.robust.probabilities(own.image, np.arange(len(own.image))).argmax(1)
        own_dice, view_dice = (foreground_dice(labelled.labels(drawn), expected, classes) for drawn in (own, view))
        if score < MIN_SHARED_ANATOMY or own_dice > view_dice:
            chosen[domain] = "own"
    return chosen


def _train(
    branch: LabelBranch, batches: Iterator[Batch], validation: Batch, *, updates: int, classes: int
) -> list[Checkpoint]:
    """Train the branch with one-cycle Adam; a checkpoint of every evaluation, in their order."""
    optimizer = torch.optim.Adam(branch.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=updates)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    checkpoints = []
    for update in track(range(1, updates + 1), "training the label branch"):
        synthesis, target = next(batches)
        loss = loss_function(branch(synthesis), target[:, None])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % max(1, updates // EVALUATIONS) == 0 or update == updates:
            score = _validation_dice(branch, validation, classes)
            weights = copy.deepcopy(branch.state_dict())
            checkpoints.append(Checkpoint(update=update, score=score, weights=weights))
    return checkpoints


@torch.no_grad()
def _validation_dice(branch: LabelBranch, validation: Batch, classes: int) -> float:
    synthesis, target = validation
    predicted = branch.eval()(synthesis).argmax(1)
    branch.train()
    return foreground_dice(predicted, target, classes)


def _synthetic_batches(
    generator: Generator, teacher: Segmenter, domain: int, *, size: int, rng: torch.Generator
) -> Iterator[Batch]:
    """New synthetic slices without end, labelled by the teacher; each is of a subject of its own."""
    while True:
        synthesis = synthesise_slices(generator, torch.full((size,), domain), rng=rng)
        yield synthesis, teacher.probabilities(synthesis.image, np.arange(size)).argmax(1)


def _inverted_batches(
    generator: Generator, real: BinnedSlices, domain: int, *, size: int, rng: torch.Generator
) -> Iterator[Batch]:
    """Real slices without end, generated again from their latents, with their true labels."""
    images = torch.from_numpy(real.slices.images.astype(np.float32))
    style = invert(generator, images, torch.from_numpy(np.asarray(real.z_bin)), domain=domain)
    labels, noise = torch.from_numpy(real.slices.labels.astype(np.int64)), generator.fixed_noise()
    while True:
        chosen = torch.randperm(len(images), generator=rng)[:size]
        chosen_style = Style(style.w[chosen], style.constant[chosen], style.domain[chosen])
        with torch.no_grad():
            synthesis = generator.synthesise(chosen_style, noise)
        yield synthesis, labels[chosen]
