"""What HSSF and LSSL share: a network trained on labelled public slices and on the site's own, mostly unlabelled ones
(Ma et al., IEEE TMI 2024, doi 10.1109/TMI.2023.3348982)."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...common.seeding import seed_of, seeded
from ...errors import NodeDataError
from ..engine.augmentation import augmented_slices
from ..engine.random_appearance import UNCHANGED
from ..labels.candidate_labels import SiteSlices
from ..losses.hssf_losses import assessment_loss, perturbation_loss, reliable_labels, segmentation_loss
from ..losses.partial_losses import partial_loss
from ..network_names import check_architecture
from ..networks.assessed_network import AssessedNetwork
from .interface.federated_method import FederatedMethod
from .interface.option_checks import check_at_least, check_fraction
from .interface.site_round import MethodState, SiteRound, SiteUpdate
from .public_exchange import FUSION, PublicBatch, PublicSlices

ASSESSMENT_WEIGHT = 4.0
WEIGHT_DECAY = 0.02
FINAL_RATE = 0.01  # share of the learning rate in the last round
CUTOUT_SIDE = 1 / 24  # share of the slice's side: the square that is missing in a strong view


@dataclass(frozen=True, kw_only=True)
class PublicSliceOptions:
    """Settings that HSSF and LSSL share. Raises: ConfigError if a value is out of range.

    Attributes:
        network: architecture of the researcher, and of sites that have not chosen any.
        public_slices: number of public slices; the researcher sets it.
        public_epochs: passes over the public slices in a round.
        warmup: share of the rounds without distillation and without the sites' own unlabelled slices.
        min_pixel_confidence: smallest confidence with which a pixel's pseudo-label is used.
        min_slice_confidence: mean confidence above which a slice is used; 0 uses all slices.
        unlabelled: weight of the sites' own unlabelled slices.
        perturbation: whether features with missing channels are a further view.
    """

    network: str = "unet"
    public_slices: int = 0
    public_epochs: int = 4
    warmup: float = 0.1
    min_pixel_confidence: float = 0.3
    min_slice_confidence: float = 0.75
    unlabelled: float = 1.0
    perturbation: bool = True

    def __post_init__(self) -> None:
        check_architecture(self.network)
        check_at_least("public_slices", self.public_slices, 0)
        check_at_least("public_epochs", self.public_epochs, 1)
        check_at_least("unlabelled", self.unlabelled, 0)
        for name in ("warmup", "min_pixel_confidence", "min_slice_confidence"):
            check_fraction(name, getattr(self, name))


@dataclass(kw_only=True)
class PublicSliceState(MethodState):
    """What a site keeps of its training.

    Attributes:
        network_name: architecture of the site's own network; "" before the first round and where weights travel.
        weights: of the site's own network by name, on the CPU; empty before the first round and where weights travel.
        optimizer: state dict of its optimizer; empty before the first round.
    """

    network_name: str = ""
    weights: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Trainee:
    """A network in training.

    Attributes:
        network: segments, and assesses its own segmentation.
        optimizer: of all its parameters.
    """

    network: AssessedNetwork
    optimizer: torch.optim.Optimizer


@dataclass(frozen=True)
class Teacher:
    """Predictions to distil for a batch of public slices.

    Attributes:
        logits: (B, C, S, S).
        grade: (B,) in [0, 1], how good each slice's prediction is; 0 for a prediction that is not to be used.
    """

    logits: Tensor
    grade: Tensor


class PublicSliceMethod(FederatedMethod):
    """A method whose sites train on public slices with labels, and on their own slices with pseudo-labels where the
    network's assessment of itself is confident."""

    Options = PublicSliceOptions
    State = PublicSliceState
    default_rate = 1e-3

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        """Train on the public slices, then on the site's own.

        Raises: NodeDataError if the public slices are missing or differ from those of the other sites.
        """
        public = self.public_views(site_round.public)
        number, trainee = self.round_number(site_round), self.trainee_at(site_round)
        self.set_rate(trainee, number)
        trainee.network.to(site_round.device).train()
        with self.seeded_round(site_round):
            losses, distilled = self.train_on_public_slices(
                trainee, public, number=number, phase=FUSION, teacher=self.teacher_at(site_round, number)
            )
            own_losses, accepted = self._train_on_own_slices(site_round, trainee, number)
        self.finish_round(site_round, trainee, public)
        numbers = {"distilled": distilled, "accepted": accepted}
        return SiteUpdate(len(site_round.data), float(np.mean(losses + own_losses)), numbers)

    @abstractmethod
    def trainee_at(self, site_round: SiteRound) -> Trainee:
        """The network that the site trains, with its optimizer as the round before left it."""

    def round_number(self, site_round: SiteRound) -> int:
        """Number of the round that views, learning rate and warm-up depend on."""
        return site_round.number

    def teacher_at(self, site_round: SiteRound, number: int) -> Callable[[int, PublicBatch], Teacher] | None:
        """The teacher for a batch of an epoch over the public slices at a site; None without distillation."""
        return None

    def finish_round(self, site_round: SiteRound, trainee: Trainee, public: PublicSlices) -> None:
        """Keep the optimizer's state at the site."""
        state = cast(PublicSliceState, site_round.state)
        state.optimizer = copy.deepcopy(trainee.optimizer.state_dict())

    def train_on_public_slices(
        self,
        trainee: Trainee,
        public: PublicSlices,
        *,
        number: int,
        phase: int,
        teacher: Callable[[int, PublicBatch], Teacher] | None,
    ) -> tuple[list[float], float]:
        """Passes over the public slices.

        Args:
            number: of the round.
            phase: FUSION or CONDENSATION, see `PublicSlices.views`.
            teacher: of epoch and batch; None for training on the labels only.

        Returns: the updates' losses, and the mean share of slices that were distilled.
        """
        device = next(trainee.network.parameters()).device
        losses, distilled = [], []
        for epoch in range(self.options.public_epochs):
            for batch in public.views(number, phase=phase, epoch=epoch, batch_size=self.config.batch_size):
                known = teacher(epoch, batch) if teacher is not None else None
                loss, share = self.public_loss(trainee.network, batch.to(device), known)
                losses.append(self.update(trainee, loss, number))
                distilled.append(share)
        return losses, float(np.mean(distilled))

    def public_loss(
        self, network: AssessedNetwork, batch: PublicBatch, teacher: Teacher | None
    ) -> tuple[Tensor, float]:
        """The loss of a batch, a scalar, and the share of slices on which the teacher was distilled."""
        return self.supervised_loss(network, batch)[0], 0.0

    def supervised_loss(self, network: AssessedNetwork, batch: PublicBatch) -> tuple[Tensor, Tensor]:
        """Segmentation loss + weighted assessment loss of labelled slices, a scalar; and the logits (B, C, S, S)."""
        logits, right, _ = network.assess(batch.images)
        loss = segmentation_loss(logits, batch.truth)
        return loss + ASSESSMENT_WEIGHT * assessment_loss(right, logits.argmax(1) == batch.truth), logits

    def pseudo_loss(self, network: AssessedNetwork, weak: Tensor, strong: Tensor) -> tuple[Tensor, float]:
        """Self-training on unlabelled slices.

        Args:
            weak: (B, channels, S, S) in [-1, 1], the weakly augmented view.
            strong: (B, channels, S, S), the strongly augmented view of the same place.

        Returns: the loss, a scalar, and the share of slices that were confident enough.
        """
        own = self.options
        z_strong, strong_right, _ = network.assess(strong)
        z_weak, weak_right, features = network.assess(weak)
        labels, confidence = reliable_labels(
            (z_strong, torch.sigmoid(strong_right.detach())),
            (z_weak, torch.sigmoid(weak_right.detach())),
            own.min_pixel_confidence,
        )
        gate = (confidence.mean((1, 2)) > own.min_slice_confidence).to(weak.dtype)
        loss = segmentation_loss(z_weak, labels, gate) + segmentation_loss(z_strong, labels, gate)
        if own.perturbation:
            loss = loss + perturbation_loss(z_weak, network.perturbed(features))
        return loss, float(gate.mean())

    def warming_up(self, number: int) -> bool:
        """Whether round `number` has neither distillation nor self-training."""
        return number <= self.options.warmup * self.config.rounds

    def public_views(self, data: SiteSlices | None) -> PublicSlices:
        """The public slices with their views.

        Raises: NodeDataError if there are none, if their labels are not dense or for another number of channels.
        """
        if data is None:
            raise NodeDataError(
                f"{self.description.name} needs public slices and this site has none; "
                "register its store again, with the public one"
            )
        data.require_channels(self.config.channels)
        return PublicSlices(data, augmentation=self.augmentation, seed=self.config.seed)

    def fresh_network(self, architecture: str) -> AssessedNetwork:
        """An untrained network; "" takes the researcher's architecture."""
        with seeded(seed_of(self.config.seed)):
            return self.untrained(architecture or self.options.network)

    def untrained(self, architecture: str) -> AssessedNetwork:
        """A network with weights from PyTorch's global generator."""
        config = self.config
        return AssessedNetwork(
            architecture, config.classes, size=config.size, channels=config.channels, colour=config.colour
        )

    def trainee_of(self, network: AssessedNetwork, optimizer_state: dict[str, Any] | None = None) -> Trainee:
        """The network with its optimizer, in the given state if there is one."""
        optimizer = torch.optim.AdamW(network.parameters(), self.rate, weight_decay=WEIGHT_DECAY)
        if optimizer_state:
            optimizer.load_state_dict(copy.deepcopy(optimizer_state))
        return Trainee(network, optimizer)

    def set_rate(self, trainee: Trainee, number: int) -> None:
        """Half a cosine over the rounds; the published one spans four times as many, over which it hardly falls."""
        falling = (1 + math.cos(math.pi * (number - 1) / self.config.rounds)) / 2
        for group in trainee.optimizer.param_groups:
            group["lr"] = self.rate * (FINAL_RATE + (1 - FINAL_RATE) * falling)

    def update(self, trainee: Trainee, loss: Tensor, number: int) -> float:
        """One update of `loss`, a scalar, in round `number`; returns its value.

        Raises: TrainingError, before any weight changes, if the loss is NaN or infinite.
        """
        self.check_loss(loss, number)
        trainee.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        trainee.optimizer.step()
        return float(loss.detach())

    def _train_on_own_slices(self, site_round: SiteRound, trainee: Trainee, number: int) -> tuple[list[float], float]:
        """Updates on the site's own slices, with the labels it has and with pseudo-labels; the updates' losses, and
        the mean share of unlabelled slices that were confident enough."""
        labelled_indices = site_round.data.labelled_indices
        unlabelled_indices = np.setdiff1d(np.arange(len(site_round.data)), labelled_indices)
        if self.warming_up(number) or not self.options.unlabelled:
            unlabelled_indices = unlabelled_indices[:0]
        losses, accepted = [], []
        for with_labels, without in zip(
            self._draws_or_none(site_round, labelled_indices),
            self._draws_or_none(site_round, unlabelled_indices),
            strict=True,
        ):
            loss = torch.zeros((), device=site_round.device)
            if with_labels is not None:
                loss = loss + self._own_labels_loss(trainee.network, *self.batch(site_round, with_labels))
            if without is not None:
                weak, strong = self._two_views(site_round, without)
                self_training, share = self.pseudo_loss(trainee.network, weak, strong)
                loss = loss + self.options.unlabelled * self_training
                accepted.append(share)
            if loss.requires_grad:
                losses.append(self.update(trainee, loss, number))
        return losses, float(np.mean(accepted)) if accepted else 0.0

    def _draws_or_none(self, site_round: SiteRound, among: np.ndarray) -> list[np.ndarray] | list[None]:
        """Indices (B,) for every update of the round, None where there is nothing to draw from (N,)."""
        updates = self.config.updates
        return self.draws(site_round, among, updates) if len(among) else [None] * updates

    def _own_labels_loss(self, network: AssessedNetwork, images: Tensor, allowed: Tensor) -> Tensor:
        """Partial loss + weighted assessment loss, a scalar, of images (B, channels, S, S) with candidates
        (B, C, S, S)."""
        logits, right, _ = network.assess(images)
        single = allowed.sum(1) == 1
        correct = allowed.gather(1, logits.argmax(1, keepdim=True))[:, 0]
        loss = partial_loss(logits, allowed)
        if single.any():
            loss = loss + ASSESSMENT_WEIGHT * assessment_loss(right[single], correct[single])
        return loss

    def _two_views(self, site_round: SiteRound, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """Weak and strong view (B, channels, S, S) of the slices with the indices `chosen` (B,), with the same
        geometry; the strong view also has another appearance, noise and a missing square."""
        site_round.data.require_channels(self.config.channels)
        images = torch.from_numpy(site_round.data.images[chosen].astype(np.float32))
        placed = replace(self.augmentation, appearance=UNCHANGED)
        weak, _ = augmented_slices(images, torch.zeros_like(images[:, :1]), placed, rng=torch.default_generator)
        strong = self.restyled(weak)
        side = max(1, round(weak.shape[-1] * CUTOUT_SIDE))
        for image in strong:
            row, column = torch.randint(0, weak.shape[-1] - side + 1, (2,)).tolist()
            image[:, row : row + side, column : column + side] = 0.0
        return weak.to(site_round.device), strong.to(site_round.device)
