"""HSSF: sites with networks of their own and no labels, who learn from predictions on public slices
(Ma et al., IEEE TMI 2024, doi 10.1109/TMI.2023.3348982)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ...errors import ConfigError, FederationError, NodeDataError
from ..losses.hssf_losses import (
    GRADES,
    assessment_loss,
    distillation,
    grades,
    perturbation_loss,
    reliable_labels,
    segmentation_loss,
)
from ..losses.partial_losses import partial_loss
from ..networks.assessed_network import AssessedNetwork
from ..networks.network_names import check_architecture
from .catalogue import METHOD_CATALOGUE
from .federated_method import FederatedMethod, MethodConfig, SiteContext, SiteRound, SiteUpdate, weighted_mean
from .public_exchange import CONDENSATION, FUSION, Exchange, PublicBatch, PublicSlices, from_margins, to_margins

ASSESSMENT_WEIGHT = 4.0
DECAY = 0.02
GRADED_AT_ONCE = 64  # slices
LAST_RATE = 0.01  # share of the learning rate at the end
CUT = 1 / 24  # of the side: the square that a strong view lacks
NETWORK, OPTIMIZER, NAME = "network", "optimizer", "name"  # in what a site keeps


@dataclass(frozen=True, kw_only=True)
class HSSFOptions:
    """Raises: ConfigError if a value is out of range.

    Attributes:
        alone: whether nothing is exchanged, to compare with.
        network: of the researcher, and of sites that have not chosen any.
        public_slices: how many there are; the researcher sets it.
        public_epochs: passes over them in a round, at each end.
        stride: predictions travel at the S-th part of the slices' side.
        warmup: share of the rounds without distillation and without the sites' own slices.
        distillation, temperature: weight of the teacher's KL, and its temperature.
        grade: how predictions are compared; least_grade: of a teacher.
        doubt: confidence below which a pixel's pseudo label is not believed.
        least_confidence: mean over a slice, for it to teach; 0 asks for none.
        unlabelled: weight of the sites' own slices.
        perturbation: whether missing features are a view.
    """

    alone: bool = False
    network: str = "unet"
    public_slices: int = 0
    public_epochs: int = 4
    stride: int = 2
    warmup: float = 0.1
    distillation: float = 10.0
    temperature: float = 2.0
    grade: str = "dice"
    least_grade: float = 0.5
    doubt: float = 0.3
    least_confidence: float = 0.75
    unlabelled: float = 1.0
    perturbation: bool = True

    def __post_init__(self) -> None:
        if self.grade not in GRADES:
            raise ConfigError(f"grade is one of {', '.join(GRADES)}")
        check_architecture(self.network)
        if self.public_slices < 0 or self.public_epochs < 1 or self.stride not in (1, 2, 4):
            raise ConfigError("public_slices must not be negative, public_epochs at least 1, stride 1, 2 or 4")
        shares = (self.warmup, self.least_grade, self.doubt, self.least_confidence)
        if not all(0 <= share <= 1 for share in shares):
            raise ConfigError("warmup, least_grade, doubt and least_confidence are from 0 to 1")
        if self.distillation < 0 or self.unlabelled < 0 or self.temperature <= 0:
            raise ConfigError("distillation and unlabelled must not be negative, temperature must be positive")


class HSSF(FederatedMethod):
    """The researcher's network takes from the best site, slice by slice (condensation); each site takes from the
    researcher's where that is better (fusion), then teaches itself on its own slices where it trusts itself."""

    description = METHOD_CATALOGUE["hssf"]
    Options = HSSFOptions
    default_rate = 1e-3

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._server: tuple[AssessedNetwork, torch.optim.Optimizer] | None = None

    # What travels

    def network(self) -> nn.Module:
        own = self.options
        side = self.config.size // own.stride
        count = 0 if own.alone else own.public_slices
        return Exchange(own.public_epochs, count, self.config.classes, side)

    def local_parameters(self, model: nn.Module) -> set[str]:
        return set(model.state_dict()) if self.options.alone else set()

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """None: the site's network is not the model that travels, and keeps its optimizer with it."""
        return {}

    @property
    def has_average(self) -> bool:
        return False

    def segmenter(self, model: nn.Module, context: SiteContext, kept: Mapping[str, Any] | None = None) -> nn.Module:
        network = self._fresh(context.network)
        if kept and NETWORK in kept:
            network.load_state_dict(kept[NETWORK])
        return network

    # At a site

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        """Fusion over the public slices, then the site's own slices, then predictions for the researcher.

        Raises: NodeDataError if the public slices are missing or not those of the others.
        """
        public = self._public(site_round.public)
        number = int(site_round.model.round) if self.predicts else site_round.number
        network, optimizer = self._own(site_round)
        self._set_rate(optimizer, number)
        network.to(site_round.device).train()
        with self.seeded_round(site_round):
            losses, taught = self._fuse(site_round, network, optimizer, public, number)
            own, accepted = self._teach_itself(site_round, network, optimizer, number)
        site_round.kept |= {
            NETWORK: {name: value.detach().cpu().clone() for name, value in network.state_dict().items()},
            OPTIMIZER: copy.deepcopy(optimizer.state_dict()),
        }
        if self.predicts:
            self._predict(network, public, site_round.model, number, CONDENSATION)
        numbers = {"taught": taught, "accepted": accepted}
        return SiteUpdate(len(site_round.data), float(np.mean(losses + own)), numbers)

    def _fuse(
        self,
        site_round: SiteRound,
        network: AssessedNetwork,
        optimizer: torch.optim.Optimizer,
        public: PublicSlices,
        number: int,
    ) -> tuple[list[float], float]:
        losses, taught = [], []
        for epoch in range(self.options.public_epochs):
            for batch in public.views(number, FUSION, epoch, self.config.batch_size):
                teacher = gate = None
                if self.predicts and not self.warming_up(number):
                    teacher = from_margins(site_round.model.margins[epoch, batch.index], self.config.size)
                    gate = site_round.model.grades[epoch, batch.index]
                loss, used = self._public_loss(network, _to(batch, site_round.device), teacher, gate)
                losses.append(self._update(network, optimizer, loss, number))
                taught.append(used)
        return losses, float(np.mean(taught))

    def _public_loss(
        self, network: AssessedNetwork, batch: PublicBatch, teacher: Tensor | None, teacher_grade: Tensor | None
    ) -> tuple[Tensor, float]:
        """Loss of labelled slices, and which share of them a teacher with a better grade has taught."""
        logits, right, _ = network.assess(batch.images)
        loss = segmentation_loss(logits, batch.truth)
        loss = loss + ASSESSMENT_WEIGHT * assessment_loss(right, logits.argmax(1) == batch.truth)
        if teacher is None:
            return loss, 0.0
        gate = (teacher_grade.to(logits.device) > grades(logits, batch.truth, self.options.grade)).to(logits.dtype)
        distilled = distillation(teacher.to(logits.device), logits, gate, self.options.temperature)
        return loss + self.options.distillation * distilled, float(gate.mean())

    def _teach_itself(
        self, site_round: SiteRound, network: AssessedNetwork, optimizer: torch.optim.Optimizer, number: int
    ) -> tuple[list[float], float]:
        """Updates on the site's own slices: with whatever labels it has, and with its own pseudo labels."""
        labelled_indices = site_round.data.labelled_indices
        unlabelled_indices = np.setdiff1d(np.arange(len(site_round.data)), labelled_indices)
        if self.warming_up(number) or not self.options.unlabelled:
            unlabelled_indices = unlabelled_indices[:0]
        updates = self.config.updates
        labelled = self.draws(site_round, labelled_indices, updates) if len(labelled_indices) else [None] * updates
        unlabelled = (
            self.draws(site_round, unlabelled_indices, updates) if len(unlabelled_indices) else [None] * updates
        )
        losses, accepted = [], []
        for with_labels, without in zip(labelled, unlabelled, strict=True):
            loss = torch.zeros((), device=site_round.device)
            if with_labels is not None:
                images, allowed = self.batch(site_round, with_labels)
                logits, right, _ = network.assess(images)
                sure = allowed.sum(1) == 1
                correct = allowed.gather(1, logits.argmax(1, keepdim=True))[:, 0]
                loss = loss + partial_loss(logits, allowed)
                if sure.any():
                    loss = loss + ASSESSMENT_WEIGHT * assessment_loss(right[sure], correct[sure])
            if without is not None:
                weak, strong = self._two_views(site_round, without)
                one, share = self.pseudo_loss(network, weak, strong)
                loss = loss + self.options.unlabelled * one
                accepted.append(share)
            if loss.requires_grad:
                losses.append(self._update(network, optimizer, loss, number))
        return losses, float(np.mean(accepted)) if accepted else 0.0

    def pseudo_loss(self, network: AssessedNetwork, weak: Tensor, strong: Tensor) -> tuple[Tensor, float]:
        """Loss of two views (B, 1, S, S) of the same unlabelled slices, and the share of slices that taught."""
        own = self.options
        z_strong, strong_right, _ = network.assess(strong)
        z_weak, weak_right, features = network.assess(weak)
        labels, confidence = reliable_labels(
            z_strong, torch.sigmoid(strong_right.detach()), z_weak, torch.sigmoid(weak_right.detach()), own.doubt
        )
        gate = (confidence.mean((1, 2)) > own.least_confidence).to(weak.dtype)
        loss = segmentation_loss(z_weak, labels, gate) + segmentation_loss(z_strong, labels, gate)
        if own.perturbation:
            loss = loss + perturbation_loss(z_weak, network.perturbed(features))
        return loss, float(gate.mean())

    def _two_views(self, site_round: SiteRound, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """The same geometry twice; the strong view also has another appearance, noise, and a square missing."""
        one = self.geometry(data=site_round.data.images[chosen][:, None].astype(np.float32), seg=None)
        weak = one["data"].astype(np.float32)
        strong = self.appearance(data=weak.copy())["data"]
        side = max(1, round(weak.shape[-1] * CUT))
        for image in strong[:, 0]:
            row, column = np.random.randint(0, weak.shape[-1] - side + 1, 2)
            image[row : row + side, column : column + side] = 0.0
        return tuple(torch.from_numpy(view).float().to(site_round.device) for view in (weak, strong))

    def _own(self, site_round: SiteRound) -> tuple[AssessedNetwork, torch.optim.Optimizer]:
        """The site's network and optimizer, as it left them."""
        name = site_round.network or self.options.network
        if site_round.kept.setdefault(NAME, name) != name:
            raise NodeDataError(f"this site has trained a {site_round.kept[NAME]} and now offers a {name}")
        network = self.segmenter(site_round.model, SiteContext(site=site_round.site, network=name), site_round.kept)
        optimizer = self._optimizer(network)
        if OPTIMIZER in site_round.kept:
            optimizer.load_state_dict(copy.deepcopy(site_round.kept[OPTIMIZER]))
        return network, optimizer

    # At the researcher

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """Condensation. A site's share is that of the views which it was the best teacher of.

        Raises: FederationError for predictions that are no finite numbers.
        """
        if self.options.alone or not any(site_update.samples for site_update in site_updates.values()):
            return dict(before), dict.fromkeys(site_updates, 0.0)
        public = self._public(self.public)
        number = int(before["round"])
        teachers, best, chosen = self._best_teachers(site_updates, sent, public, number)
        network, optimizer = self._server_network()
        self._set_rate(optimizer, number)
        network.train()
        with seeded(seed_of(self.config.seed, len(self.description.name), number)):
            for epoch in range(self.options.public_epochs):
                for batch in public.views(number, CONDENSATION, epoch, self.config.batch_size):
                    teacher = grade = None
                    if not self.warming_up(number):
                        teacher = from_margins(teachers[epoch, batch.index], self.config.size)
                        grade = best[epoch, batch.index]
                        grade = torch.where(grade > self.options.least_grade, grade, 0.0)
                    loss, _ = self._public_loss(network, batch, teacher, grade)
                    self._update(network, optimizer, loss, number)
        epochs, count = teachers.shape[:2]
        after = Exchange(epochs, count, self.config.classes, teachers.shape[-1])
        after.round += number
        self._predict(network, public, after, number + 1, FUSION)
        shares = {site: float((chosen == site).double().mean()) for site in site_updates}
        return after.state_dict(), shares

    @property
    def server(self) -> nn.Module | None:
        """The researcher's network, once it is trained."""
        return self._server[0] if self._server else None

    def _best_teachers(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        public: PublicSlices,
        number: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of every view, the margins of the site with the highest grade, that grade, and which site it is; ties go to
        the first. One site's predictions are in memory at a time."""
        teachers = best = chosen = None
        size = self.config.size
        truth = torch.zeros(self.options.public_epochs, len(public), size, size, dtype=torch.uint8)
        for epoch, one in enumerate(truth):  # drawn once for all sites
            for batch in public.views(number, CONDENSATION, epoch, self.config.batch_size):
                one[batch.index] = batch.truth.to(torch.uint8)
        for site in site_updates:
            margins = sent(site)["margins"]
            if not torch.isfinite(margins).all():
                raise FederationError(f"site {site + 1} sent NaN or infinite predictions")
            pairs = zip(
                margins.flatten(0, 1).split(GRADED_AT_ONCE), truth.flatten(0, 1).split(GRADED_AT_ONCE), strict=True
            )
            kind = self.options.grade
            grade = torch.cat([grades(from_margins(part, size), right.long(), kind) for part, right in pairs]).double()
            grade = grade.view(margins.shape[:2])
            if best is None:
                teachers, best, chosen = margins.clone(), grade, torch.full(grade.shape, site)
                continue
            better = grade > best
            teachers[better], best[better], chosen[better] = margins[better], grade[better], site
        return teachers, best, chosen

    def _server_network(self) -> tuple[AssessedNetwork, torch.optim.Optimizer]:
        if self._server is None:
            network = self._fresh(self.options.network)
            self._server = network, self._optimizer(network)
        return self._server

    # At both ends

    @property
    def predicts(self) -> bool:
        """Whether predictions travel."""
        return not self.options.alone

    def warming_up(self, number: int) -> bool:
        return number <= self.options.warmup * self.config.rounds

    @torch.no_grad()
    def _predict(self, network: AssessedNetwork, public: PublicSlices, into: Exchange, number: int, phase: int) -> None:
        network.eval()
        for epoch in range(self.options.public_epochs):
            for batch in public.views(number, phase, epoch, self.config.batch_size):
                margins = to_margins(network(batch.images.to(into.margins.device)), self.options.stride)
                into.margins[epoch, batch.index] = margins
                # Graded is what is distilled: the margins that travel, not the logits they come from.
                logits, truth = from_margins(margins, self.config.size), batch.truth.to(margins.device)
                into.grades[epoch, batch.index] = grades(logits, truth, self.options.grade).float()

    def _public(self, data: Any) -> PublicSlices:
        if data is None:
            raise NodeDataError(
                "this site has no public slices; register its store again with `fedfactory site add ... --public STORE`"
            )
        if self.predicts and len(data) != self.options.public_slices:
            raise NodeDataError(f"{len(data)} public slices here, {self.options.public_slices} elsewhere")
        return PublicSlices(data, self.geometry, self.appearance, self.config.seed)

    def _fresh(self, architecture: str) -> AssessedNetwork:
        with seeded(seed_of(self.config.seed)):
            return AssessedNetwork(architecture or self.options.network, self.config.classes)

    def _optimizer(self, network: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(network.parameters(), self.rate, weight_decay=DECAY)

    def _set_rate(self, optimizer: torch.optim.Optimizer, number: int) -> None:
        """Half a cosine over the rounds; published is one over four times as many, which hardly falls."""
        falling = (1 + math.cos(math.pi * (number - 1) / self.config.rounds)) / 2
        for group in optimizer.param_groups:
            group["lr"] = self.rate * (LAST_RATE + (1 - LAST_RATE) * falling)

    def _update(self, network: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, number: int) -> float:
        self.check(loss, number)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return float(loss.detach())


class LSSL(HSSF):
    """The same training of equal networks whose weights are averaged: the published variant for sites that can agree.

    A method of its own, not an option: a site that approved the sending of predictions must not send weights.
    """

    description = METHOD_CATALOGUE["lssl"]

    @property
    def predicts(self) -> bool:
        return False

    @property
    def has_average(self) -> bool:
        return True

    def network(self) -> nn.Module:
        return AssessedNetwork(self.options.network, self.config.classes)

    def segmenter(self, model: nn.Module, context: SiteContext, kept: Mapping[str, Any] | None = None) -> nn.Module:
        return model

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """Sites count alike."""
        active = [site for site, site_update in site_updates.items() if site_update.samples]
        shares = {site: 1 / len(active) if site in active else 0.0 for site in site_updates}
        return weighted_mean(sent, shares, before), shares

    def _own(self, site_round: SiteRound) -> tuple[AssessedNetwork, torch.optim.Optimizer]:
        optimizer = self._optimizer(site_round.model)
        if OPTIMIZER in site_round.kept:
            optimizer.load_state_dict(copy.deepcopy(site_round.kept[OPTIMIZER]))
        return site_round.model, optimizer


def _to(batch: PublicBatch, device: torch.device) -> PublicBatch:
    return PublicBatch(batch.images.to(device), batch.truth.to(device), batch.index)
