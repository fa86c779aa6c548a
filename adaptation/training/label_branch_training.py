"""Training the label-synthesis branch at the labelled site."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor

from ...common.progress import track
from ...common.seeding import seeded
from ...generative.factory_file import TrainedFactory
from ...generative.metrics.alarm import MIN_SHARED_ANATOMY
from ...generative.metrics.shared_anatomy import shared_anatomy
from ...generative.networks.generator import Generator, Style, Synthesis
from ..labelled_factory import LabelledFactory, LabelledFactoryCard
from ..labelled_slices import LabelledSlices, foreground_dice
from ..networks.label_branch import BranchEnsemble, LabelBranch
from ..segmenter import Segmenter
from .latent_inversion import invert

RATE = 4e-3
EVALUATIONS = 5  # at the branch while it is trained; the best of them are kept
VALIDATION_SAMPLES = 64  # slices of a look
LABELLINGS = ("synthesis", "inversion")

Example = tuple[Synthesis, Tensor]  # slices and their labels (B, S, S)


def train_label_branch(
    factory: TrainedFactory,
    teacher: Segmenter,
    robust: Segmenter,
    *,
    domain: str,
    real: tuple[LabelledSlices, np.ndarray] | None = None,
    held_out: tuple[LabelledSlices, np.ndarray] | None = None,
    updates: int = 250,
    batch_size: int = 16,
    keep: int = 3,
    seed: int = 0,
) -> LabelledFactory:
    """Teach the branch the labels of synthetic slices, and keep the best states of it.

    Without `real` a segmenter labels synthetic slices of the labelled domain, and states are judged by its labels of
    slices that were never trained on. With `real` (published) the labelled site's own slices are inverted: the branch
    learns their true labels from the features of the latents found, and is judged by `held_out` slices inverted alike.

    Args:
        teacher: trained on the labelled site's own slices.
        robust: the same with random contrasts; kept in the labelled factory.
        domain: the labelled domain.
        real, held_out: slices of patients that train and of others, each with their height bins (N,).
        keep: states of the branch whose mean gives the labels.

    Returns: the labelled factory. Its card has the agreement of the kept branches' mean with the validation labels.
    """
    generator, index = factory.generator, factory.config.domain_index(domain)
    rng = torch.Generator().manual_seed(seed)
    with seeded(seed):
        branch = LabelBranch.for_generator(generator, teacher.classes).train()
    if real is None:
        examples = _taught(generator, teacher, index, batch_size, rng)
        validation = next(
            _taught(generator, teacher, index, VALIDATION_SAMPLES, torch.Generator().manual_seed(seed + 1))
        )
        validated_on = "fresh synthetic slices"
    else:
        examples = _inverted(generator, real, index, batch_size, rng)
        validation = next(_inverted(generator, held_out or real, index, VALIDATION_SAMPLES, rng))
        validated_on = "validation cases" if held_out else "its own training slices"
    states = _train(branch, examples, validation, updates, teacher.classes)
    # What was judged by what it was trained on cannot be chosen by that: then the last state is taken.
    states = sorted(states, key=lambda one: -np.nan_to_num(one[0]))[:keep] if not real or held_out else states[-1:]
    branches = []
    for _, state in states:
        one = copy.deepcopy(branch).eval()
        one.load_state_dict(state)
        branches.append(one)
    found = BranchEnsemble(branches).labels(validation[0])
    card = LabelledFactoryCard(
        classes=teacher.classes,
        labelled_domain=domain,
        agreement=foreground_dice(found, validation[1], teacher.classes),
        validated_on=validated_on,
        labels_from=dict.fromkeys(factory.config.domains, "view"),
    )
    labelled = LabelledFactory(factory, branches, robust, card)
    return replace(labelled, card=replace(card, labels_from=choose_views(labelled, seed=seed)))


def choose_views(labelled: LabelledFactory, *, seed: int) -> dict[str, str]:
    """By domain, whose features give the labels: those of the labelled domain's "view" of the same latent, or the
    domain's "own".

    Where domains share no anatomy, another view says nothing. Else the robust segmenter, which knows no contrast,
    looks at slices of the domain: the labels that agree more with it are taken.
    """
    config, generator, home = labelled.factory.config, labelled.factory.generator, labelled.card.labelled_domain
    chosen = dict.fromkeys(config.domains, "view")
    if config.domain_enters == "head":  # the features are the same
        return chosen
    shared = shared_anatomy(generator)
    for domain in config.domains:
        if domain == home:
            continue
        score = next(value for pair, value in shared.items() if set(pair) == {domain, home})
        shown, viewed = (
            _draw(generator, config.domain_index(name), VALIDATION_SAMPLES, torch.Generator().manual_seed(seed))
            for name in (domain, home)
        )
        guess = labelled.robust.probabilities(shown.image).argmax(1)
        own, view = (foreground_dice(labelled.labels(one), guess, labelled.card.classes) for one in (shown, viewed))
        if score < MIN_SHARED_ANATOMY or own > view:
            chosen[domain] = "own"
    return chosen


def _train(
    branch: LabelBranch, examples: Iterator[Example], validation: Example, updates: int, classes: int
) -> list[tuple[float, dict[str, Tensor]]]:
    """Score and state of the branch at every look."""
    optimizer = torch.optim.Adam(branch.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=updates)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
    states = []
    for update in track(range(1, updates + 1), "training the label branch"):
        synthesis, target = next(examples)
        loss = loss_function(branch(synthesis), target[:, None])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if update % max(1, updates // EVALUATIONS) == 0 or update == updates:
            states.append((_validation_dice(branch, validation, classes), copy.deepcopy(branch.state_dict())))
    return states


@torch.no_grad()
def _validation_dice(branch: LabelBranch, validation: Example, classes: int) -> float:
    found = branch.eval()(validation[0]).argmax(1)
    branch.train()
    return foreground_dice(found, validation[1], classes)


def _taught(
    generator: Generator, teacher: Segmenter, domain: int, batch: int, rng: torch.Generator
) -> Iterator[Example]:
    """Fresh synthetic slices, labelled by the teacher."""
    while True:
        synthesis = _draw(generator, domain, batch, rng)
        yield synthesis, teacher.probabilities(synthesis.image).argmax(1)


def _inverted(
    generator: Generator,
    real: tuple[LabelledSlices, np.ndarray],
    domain: int,
    batch: int,
    rng: torch.Generator,
) -> Iterator[Example]:
    """Real slices by their latents, with their true labels."""
    data, z_bin = real
    images = torch.from_numpy(data.images.astype(np.float32))[:, None]
    style = invert(generator, images, torch.from_numpy(np.asarray(z_bin)), domain)
    labels, noise = torch.from_numpy(data.labels.astype(np.int64)), generator.fixed_noise()
    while True:
        chosen = torch.randperm(len(images), generator=rng)[:batch]
        one = Style(style.w[chosen], style.constant[chosen], style.domain[chosen])
        with torch.no_grad():
            made = generator.synthesise(one, noise)
        yield made, labels[chosen]


@torch.no_grad()
def _draw(generator: Generator, domain: int, batch: int, rng: torch.Generator) -> Synthesis:
    config = generator.config
    z = torch.randn(batch, config.latent_dim, generator=rng)
    height = torch.rand(batch, generator=rng) * (config.z_bins - 1)
    noise = generator.draw_noise(batch, rng)
    return generator.synthesise(generator.style_at(z, height, torch.full((batch,), domain)), noise)
