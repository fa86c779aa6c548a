"""What HSSF and LSSL share: a network trained on labelled public slices and on the site's own, mostly unlabelled ones
(Ma et al., IEEE TMI 2024, doi 10.1109/TMI.2023.3348982)."""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ...common.seeding import seed_of, seeded
from ...errors import NodeDataError
from ..engine.random_appearance import UNCHANGED
from ..labels.candidate_labels import SiteSlices
from ..losses.hssf_losses import (
    assessment_loss,
    assessor_accuracy,
    foreground_confidence,
    perturbation_loss,
    reliable_labels,
    segmentation_loss,
)
from ..losses.partial_losses import partial_loss
from ..network_names import parts_of_site_network
from ..networks.assessed_network import AssessedNetwork
from .interface.federated_method import FederatedMethod
from .interface.option_checks import check_at_least, check_choice, check_fraction
from .interface.site_round import MethodState, SiteRound, SiteUpdate
from .public_exchange import FUSION, GRADING_BATCH, PublicBatch, PublicSlices
from .strong_views import StrongView

ASSESSMENT_WEIGHT = 4.0
WEIGHT_DECAY = 0.02
FINAL_RATE = 0.01  # share of the learning rate in the last round
WEAK, BOTH = PSEUDO_LABELS = ("weak", "both")
NO_ASSESSOR = math.nan  # accuracy of the assessor in a round in which nothing depends on it


@dataclass(frozen=True, kw_only=True)
class PublicSliceOptions:
    """Settings that HSSF and LSSL share. Raises: ConfigError if a value is out of range.

    Attributes:
        network: of the researcher, and of sites that have not chosen any, see `SITE_NETWORKS`.
        public_slices: number of public slices; the researcher sets it.
        public_epochs: passes over the public slices in a round.
        held_out: share of the public slices that nobody is fitted to: on these the assessor is tested and, in HSSF,
            teachers are compared and distilled; 0 takes all slices for everything, as published.
        strong_share: share of the fitted public slices that are shown in a strong view, so that network and assessor
            know such views; published: 0.
        warmup: share of the rounds without distillation and without the sites' own unlabelled slices.
        min_assessor_accuracy: accuracy of the assessor on held-out public slices from which a site uses its own
            unlabelled slices in a round, see `assessor_accuracy`; 0 does not ask for any, as published.
        min_pixel_confidence: smallest confidence with which a pixel's pseudo-label is used.
        min_slice_confidence: mean confidence in the structures above which a slice is used, see
            `foreground_confidence`; 0 uses all slices in which a structure is found.
        pseudo_labels: whose prediction is a pixel's pseudo-label: "both", as published, that of the view in which the
            assessor is more confident; or "weak", that of the weak view, which has no missing square.
        unlabelled: weight of the sites' own unlabelled slices.
        perturbation: whether features with missing channels are a further view.
        operations: changes of intensity in a strong view, see `StrongView`.
        cutout: side of the largest missing square of a strong view as a share of the slice's; published: 1 / 24.
    """

    network: str = "unet"
    public_slices: int = 0
    public_epochs: int = 4
    held_out: float = 0.25
    strong_share: float = 0.5
    warmup: float = 0.1
    min_assessor_accuracy: float = 0.55
    min_pixel_confidence: float = 0.3
    min_slice_confidence: float = 0.5
    pseudo_labels: str = "weak"
    unlabelled: float = 1.0
    perturbation: bool = True
    operations: int = 2
    cutout: float = 0.5

    def __post_init__(self) -> None:
        parts_of_site_network(self.network)
        check_at_least("public_slices", self.public_slices, 0)
        check_at_least("public_epochs", self.public_epochs, 1)
        check_at_least("unlabelled", self.unlabelled, 0)
        check_choice("pseudo_labels", self.pseudo_labels, PSEUDO_LABELS)
        check_at_least("operations", self.operations, 0)
        confidences = ("min_assessor_accuracy", "min_pixel_confidence", "min_slice_confidence")
        for name in ("held_out", "strong_share", "warmup", "cutout", *confidences):
            check_fraction(name, getattr(self, name))


@dataclass(kw_only=True)
class PublicSliceState(MethodState):
    """What a site keeps of its training.

    Attributes:
        network_name: name of the site's own network; "" before the first round and where weights travel.
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
            assessor = NO_ASSESSOR
            if self.options.unlabelled and not self.warming_up(number):
                assessor = self.assessor_accuracy(trainee.network, public, number)
            ready = assessor >= self.options.min_assessor_accuracy
            own_losses, accepted = self._train_on_own_slices(site_round, trainee, number, unlabelled=ready)
        self.finish_round(site_round, trainee, public)
        numbers = {"distilled": distilled, "accepted": accepted}
        if not math.isnan(assessor):
            numbers["assessor"] = assessor
        return SiteUpdate(len(site_round.data), float(np.mean(losses + own_losses)), numbers)

    @abstractmethod
    def trainee_at(self, site_round: SiteRound) -> Trainee:
        """The network that the site trains, with its optimizer as the round before left it."""

    def round_number(self, site_round: SiteRound) -> int:
        """Number of the round that views, learning rate and warm-up depend on."""
        return site_round.number

    def teacher_at(self, site_round: SiteRound, number: int) -> Callable[[int, PublicBatch], Teacher] | None:
        """The teacher for a batch of an epoch over the exchanged slices at a site; None without distillation."""
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
            phase: FUSION or CONDENSATION, see `PublicSlices.fitted_views`.
            teacher: of epoch and batch of exchanged slices; None for training on the labels only.

        Returns: the updates' losses, and the mean share of the exchanged slices that were distilled.
        """
        device = next(trainee.network.parameters()).device
        losses, distilled, batches = [], [], public.batches(self.config.batch_size)
        for epoch in range(self.options.public_epochs):
            exchanged: Iterable[PublicBatch | None] = [None] * batches
            if teacher is not None:
                exchanged = public.exchanged_views(number, phase=phase, epoch=epoch, batches=batches)
            fitted = public.fitted_views(number, phase=phase, epoch=epoch, batches=batches)
            for batch, other in zip(fitted, exchanged, strict=True):
                loss = self.supervised_loss(trainee.network, batch.to(device))
                if teacher is not None and other is not None and len(other.index):
                    term, share = self.distillation_loss(trainee.network, other.to(device), teacher(epoch, other))
                    loss = loss + term
                    distilled.append(share)
                losses.append(self.update(trainee, loss, number))
        return losses, float(np.mean(distilled)) if distilled else 0.0

    def distillation_loss(self, network: AssessedNetwork, batch: PublicBatch, teacher: Teacher) -> tuple[Tensor, float]:
        """The weighted loss of a batch of exchanged slices, a scalar, and the share on which the teacher was better."""
        raise NotImplementedError(f"{self.description.name} has no teachers")

    def supervised_loss(self, network: AssessedNetwork, batch: PublicBatch) -> Tensor:
        """Segmentation loss + weighted assessment loss of labelled slices, a scalar."""
        logits, right, _ = network.assess(batch.images)
        loss = segmentation_loss(logits, batch.truth)
        return loss + ASSESSMENT_WEIGHT * assessment_loss(right, logits.argmax(1) == batch.truth)

    @torch.no_grad()
    def assessor_accuracy(self, network: AssessedNetwork, public: PublicSlices, number: int) -> float:
        """How well the network assesses itself on strong views of held-out public slices in round `number`, see
        `hssf_losses.assessor_accuracy`; strong views stand for the images of sites whose appearance differs."""
        training, device = network.training, next(network.parameters()).device
        network.eval()
        found = []
        for batch in public.exchanged_views(number, phase=FUSION, epoch=0, batches=public.batches(GRADING_BATCH)):
            if len(batch.index):
                logits, right, _ = network.assess(batch.images.to(device))
                found.append((right.cpu(), logits.argmax(1).cpu(), batch.truth))
        network.train(training)
        return assessor_accuracy(*(torch.cat(parts) for parts in zip(*found, strict=True)))

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
        strongly, weakly = (
            (z_strong, torch.sigmoid(strong_right.detach())),
            (z_weak, torch.sigmoid(weak_right.detach())),
        )
        first = strongly if own.pseudo_labels == BOTH else weakly
        labels, confidence = reliable_labels(first, weakly, own.min_pixel_confidence)
        trust = foreground_confidence((z_strong, z_weak), confidence)
        gate = (trust > own.min_slice_confidence).to(weak.dtype)
        loss = segmentation_loss(z_weak, labels, gate) + segmentation_loss(z_strong, labels, gate)
        if own.perturbation:
            loss = loss + perturbation_loss(z_weak, network.perturbed(features), gate)
        return loss, float(gate.mean())

    def warming_up(self, number: int) -> bool:
        """Whether round `number` has neither distillation nor self-training."""
        return number <= self.options.warmup * self.config.rounds

    def public_views(self, data: SiteSlices | None) -> PublicSlices:
        """The public slices with their views.

        Raises: NodeDataError if there are none, if they are not as many as the researcher said, for which a site's
            policy has estimated the memory, if their labels are not dense or for another number of channels.
        """
        if data is None:
            raise NodeDataError(
                f"{self.description.name} needs public slices and this site has none; "
                "register its store again, with the public one"
            )
        data.require_channels(self.config.channels)
        own = self.options
        if len(data) != own.public_slices:
            raise NodeDataError(
                f"this site has {len(data)} public slices; it must have the researcher's {own.public_slices}"
            )
        return PublicSlices(
            data,
            augmentation=self.augmentation,
            strong=self.strong,
            strong_share=own.strong_share,
            seed=self.config.seed,
            held_out=own.held_out,
        )

    @property
    def strong(self) -> StrongView:
        """What is changed in strong views."""
        own = self.options
        return StrongView(operations=own.operations, cutout=own.cutout, colour=self.config.colour)

    def fresh_network(self, network: str) -> AssessedNetwork:
        """An untrained network; "" takes the researcher's."""
        with seeded(seed_of(self.config.seed)):
            return self.untrained(network or self.options.network)

    def untrained(self, network: str) -> AssessedNetwork:
        """A network with weights from PyTorch's global generator."""
        config = self.config
        return AssessedNetwork(
            network,
            config.classes,
            size=config.size,
            width=config.width,
            depth=config.depth,
            channels=config.channels,
            colour=config.colour,
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

    def _train_on_own_slices(
        self, site_round: SiteRound, trainee: Trainee, number: int, *, unlabelled: bool
    ) -> tuple[list[float], float]:
        """Updates on the site's own slices, with the labels it has and, if `unlabelled`, with pseudo-labels; the
        updates' losses, and the mean share of unlabelled slices that were confident enough."""
        labelled_indices = site_round.data.labelled_indices
        unlabelled_indices = np.setdiff1d(np.arange(len(site_round.data)), labelled_indices)
        if not unlabelled:
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
                if share:  # a loss without a gradient would still move the weights, by the optimizer's moments
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
        geometry; for the strong one see `StrongView`."""
        site_round.data.require_channels(self.config.channels)
        images = torch.from_numpy(site_round.data.images[chosen].astype(np.float32))
        placed = replace(self.augmentation, appearance=UNCHANGED)
        weak, _ = self.varied(images, torch.zeros_like(images[:, :1]), placed, device=site_round.device)
        return weak, self.strong.of(weak, rng=torch.default_generator)
