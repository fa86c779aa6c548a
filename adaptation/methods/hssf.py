"""HSSF: sites without labels and with their own networks learn from predictions on public slices
(Ma et al., IEEE TMI 2024, doi 10.1109/TMI.2023.3348982)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ...errors import FederationError, NodeDataError
from ..losses.hssf_losses import GRADES, distillation, grades
from ..networks.assessed_network import AssessedNetwork
from .catalogue import METHOD_CATALOGUE
from .interface.method_config import MethodConfig
from .interface.option_checks import check_at_least, check_choice, check_fraction, check_positive
from .interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate
from .public_exchange import (
    CONDENSATION,
    FUSION,
    GRADING_BATCH,
    PublicBatch,
    PublicPredictions,
    PublicSlices,
    exchanged_count,
    from_margins,
    to_margins,
)
from .public_slice_method import PublicSliceMethod, PublicSliceOptions, PublicSliceState, Teacher, Trainee

STRIDES = (1, 2, 4)
CONDENSATION_STREAM = 4  # number of the researcher's own sequence of random draws


@dataclass(frozen=True, kw_only=True)
class HSSFOptions(PublicSliceOptions):
    """Settings of HSSF, beside those it shares with LSSL. Raises: ConfigError if a value is out of range.

    Attributes:
        exchange: whether predictions are exchanged; without, every site trains by itself, as a baseline.
        stride: predictions travel at 1 / stride of the slices' side.
        distillation: weight of the Kullback-Leibler divergence from the teacher.
        temperature: of the distillation.
        grade: score by which predictions are compared, "dice" or "pixel_accuracy".
        min_teacher_grade: grade above which a site's prediction is distilled into the researcher's network.
    """

    exchange: bool = True
    stride: int = 2
    distillation: float = 10.0
    temperature: float = 2.0
    grade: str = "dice"
    min_teacher_grade: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("grade", self.grade, GRADES)
        check_choice("stride", self.stride, STRIDES)
        check_fraction("min_teacher_grade", self.min_teacher_grade)
        check_at_least("distillation", self.distillation, 0)
        check_positive("temperature", self.temperature)


@dataclass(frozen=True, kw_only=True)
class BestTeachers:
    """The best site's prediction of every view of the public slices.

    Attributes:
        margins: (epochs, N, C - 1, s, s) float16 of the N slices that are exchanged, see `PublicPredictions`.
        grade: (epochs, N) float64 in [0, 1].
        site: (epochs, N) int64, index of the site.
    """

    margins: Tensor
    grade: Tensor
    site: Tensor


class HSSF(PublicSliceMethod):
    """The researcher's network learns from the best site, slice by slice (condensation). Every site learns from the
    researcher's network where that is better (fusion), and from its own slices where it is confident."""

    description = METHOD_CATALOGUE["hssf"]
    Options = HSSFOptions
    has_average = False

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        self._server: Trainee | None = None

    # The model that travels

    def network(self) -> nn.Module:
        own = self.options
        count = exchanged_count(own.public_slices, own.held_out) if own.exchange else 0
        side = self.config.size // own.stride
        return PublicPredictions(own.public_epochs, count, classes=self.config.classes, side=side)

    def local_parameters(self, model: nn.Module) -> set[str]:
        return set() if self.options.exchange else set(model.state_dict())

    def segmenter(self, model: nn.Module, context: SiteContext, state: MethodState | None = None) -> nn.Module:
        """The site's own network from its state, untrained without one; see `FederatedMethod.segmenter`."""
        network = self.fresh_network(context.network)
        if state is not None and (weights := cast(PublicSliceState, state).weights):
            network.load_state_dict(weights)
        return network

    # At a site

    def round_number(self, site_round: SiteRound) -> int:
        """The researcher's number of the round, so that both ends draw the same views."""
        return int(site_round.model.round) if self.options.exchange else site_round.number

    def trainee_at(self, site_round: SiteRound) -> Trainee:
        """The site's own network as the round before left it. Raises: NodeDataError for another architecture."""
        state, name = cast(PublicSliceState, site_round.state), site_round.network or self.options.network
        if state.network_name and state.network_name != name:
            raise NodeDataError(
                f"network is {name}; this site has trained a {state.network_name} in this experiment and must keep it"
            )
        state.network_name = name
        network = self.segmenter(site_round.model, SiteContext(site=site_round.site, network=name), state)
        return self.trainee_of(cast(AssessedNetwork, network), state.optimizer)

    def teacher_at(self, site_round: SiteRound, number: int) -> Callable[[int, PublicBatch], Teacher] | None:
        """The researcher's network, by its predictions that travelled."""
        if not self.options.exchange or self.warming_up(number):
            return None
        received = site_round.model

        def teacher(epoch: int, batch: PublicBatch) -> Teacher:
            logits = from_margins(received.margins[epoch, batch.index], self.config.size)
            return Teacher(logits, received.grades[epoch, batch.index])

        return teacher

    def finish_round(self, site_round: SiteRound, trainee: Trainee, public: PublicSlices) -> None:
        """Keep network and optimizer at the site, and predict the researcher's next views."""
        super().finish_round(site_round, trainee, public)
        state = cast(PublicSliceState, site_round.state)
        state.weights = {name: value.detach().cpu().clone() for name, value in trainee.network.state_dict().items()}
        if self.options.exchange:
            number = self.round_number(site_round)
            self._predict(trainee.network, public, into=site_round.model, number=number, phase=CONDENSATION)

    def distillation_loss(self, network: AssessedNetwork, batch: PublicBatch, teacher: Teacher) -> tuple[Tensor, float]:
        """Weighted distillation on the exchanged slices where the teacher has the better grade, a scalar; and the share
        of these slices."""
        logits = network(batch.images)
        gate = (teacher.grade.to(logits.device) > grades(logits, batch.truth, self.options.grade)).to(logits.dtype)
        temperature = self.options.temperature
        distilled = distillation(teacher.logits.to(logits.device), logits, gate, temperature=temperature)
        return self.options.distillation * distilled, float(gate.mean())

    # At the researcher

    @property
    def server(self) -> nn.Module | None:
        """The researcher's network; None before its first training."""
        return self._server.network if self._server else None

    def server_state(self) -> dict[str, Any]:
        """Weights and optimizer of the researcher's network; empty before its first training."""
        if self._server is None:
            return {}
        return {"weights": dict(self._server.network.state_dict()), "optimizer": self._server.optimizer.state_dict()}

    def load_server_state(self, state: Mapping[str, Any]) -> None:
        network = self.fresh_network(self.options.network)
        network.load_state_dict(state["weights"])
        self._server = self.trainee_of(network, state["optimizer"])

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """Condensation: the researcher's network learns from the best sites and predicts the sites' next views; the
        tensors by name are its predictions. A site's share is that of the views for which it was the best teacher.

        Raises: FederationError for predictions that are NaN or infinite.
        """
        if not self.options.exchange or not any(site_update.samples for site_update in site_updates.values()):
            return dict(before), dict.fromkeys(site_updates, 0.0)
        public = self.public_views(self.public)
        number = int(before["round"])
        best = self._best_teachers(list(site_updates), sent, public=public, number=number)
        if self._server is None:
            self._server = self.trainee_of(self.fresh_network(self.options.network))
        self.set_rate(self._server, number)
        self._server.network.train()
        teacher = None if self.warming_up(number) else self._teacher_from(best)
        with seeded(seed_of(self.config.seed, CONDENSATION_STREAM, number)):
            self.train_on_public_slices(self._server, public, number=number, phase=CONDENSATION, teacher=teacher)
        epochs, count = best.grade.shape
        side = best.margins.shape[-1]
        after = PublicPredictions(epochs, count, classes=self.config.classes, side=side)
        after.round += number
        self._predict(self._server.network, public, into=after, number=number + 1, phase=FUSION)
        shares = {site: float((best.site == site).double().mean()) for site in site_updates}
        return after.state_dict(), shares

    def _teacher_from(self, best: BestTeachers) -> Callable[[int, PublicBatch], Teacher]:
        """The best sites as the teacher of the researcher's network."""

        def teacher(epoch: int, batch: PublicBatch) -> Teacher:
            grade = best.grade[epoch, batch.index]
            grade = torch.where(grade > self.options.min_teacher_grade, grade, 0.0)
            return Teacher(from_margins(best.margins[epoch, batch.index], self.config.size), grade)

        return teacher

    def _best_teachers(
        self,
        sites: list[int],
        sent: Callable[[int], Mapping[str, Tensor]],
        *,
        public: PublicSlices,
        number: int,
    ) -> BestTeachers:
        """The site with the highest grade for every view; the first among equals. One site's predictions are in memory
        at a time; `sent` returns them by name."""
        margins = best = chosen = None
        truth = self._truth_of_views(public, number)
        for site in sites:
            predicted = sent(site)["margins"]
            if not torch.isfinite(predicted).all():
                raise FederationError(f"site {site + 1} sent NaN or infinite predictions; choose a lower learning_rate")
            grade = self._grades_of(predicted, truth)
            if best is None:
                margins, best, chosen = predicted.clone(), grade, torch.full(grade.shape, site)
                continue
            better = grade > best
            margins[better], best[better], chosen[better] = predicted[better], grade[better], site
        return BestTeachers(margins=margins, grade=best, site=chosen)

    def _truth_of_views(self, public: PublicSlices, number: int) -> Tensor:
        """(epochs, N, S, S) uint8 classes of the researcher's views of a round."""
        size = self.config.size
        truth = torch.zeros(self.options.public_epochs, len(public.exchanged), size, size, dtype=torch.uint8)
        for epoch, classes in enumerate(truth):
            for batch in self._exchanged_views(public, number, phase=CONDENSATION, epoch=epoch):
                classes[batch.index] = batch.truth.to(torch.uint8)
        return truth

    def _grades_of(self, margins: Tensor, truth: Tensor) -> Tensor:
        """(epochs, N) float64 grades of margins (epochs, N, C - 1, s, s), for classes (epochs, N, S, S)."""
        kind, size = self.options.grade, self.config.size
        pairs = zip(margins.flatten(0, 1).split(GRADING_BATCH), truth.flatten(0, 1).split(GRADING_BATCH), strict=True)
        grade = torch.cat([grades(from_margins(part, size), classes.long(), kind) for part, classes in pairs])
        return grade.double().view(margins.shape[:2])

    # At both ends

    @torch.no_grad()
    def _predict(
        self, network: AssessedNetwork, public: PublicSlices, *, into: PublicPredictions, number: int, phase: int
    ) -> None:
        """Fill `into` with the network's predictions of the views of a round and phase, and with their grades."""
        network.eval()
        device = next(network.parameters()).device
        for epoch in range(self.options.public_epochs):
            for batch in self._exchanged_views(public, number, phase=phase, epoch=epoch):
                margins = to_margins(network(batch.images.to(device)), self.options.stride)
                into.margins[epoch, batch.index] = margins.to(into.margins)
                # Graded is what is distilled: the margins that travel, not the logits they come from.
                logits, truth = from_margins(margins, self.config.size), batch.truth.to(margins.device)
                into.grades[epoch, batch.index] = grades(logits, truth, self.options.grade).to(into.grades)

    def _exchanged_views(self, public: PublicSlices, number: int, *, phase: int, epoch: int) -> Iterator[PublicBatch]:
        batches = math.ceil(len(public.exchanged) / GRADING_BATCH)
        return public.exchanged_views(number, phase=phase, epoch=epoch, batches=batches)
