"""Methods whose sites send weights: the base of weight averaging, FedAvg, local training, FedProx and FedBN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import NodeDataError
from ..losses.partial_losses import partial_loss
from ..networks.site_network import SiteUNet
from ..privacy.private_updates import PatientSampling, patients_of, private_gradient
from .catalogue import METHOD_CATALOGUE
from .interface.aggregation import weighted_mean
from .interface.box_options import BoxOptions, box_loss
from .interface.federated_method import FederatedMethod
from .interface.option_checks import check_at_least
from .interface.site_round import SiteRound, SiteUpdate


class WeightAveragingMethod(FederatedMethod):
    """A method whose sites train the model that travels, and whose researcher averages its weights."""

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.Adam(model.parameters(), self.rate)}

    def step(self, site_round: SiteRound, loss: Tensor, names: Sequence[str] = ("all",), *, update: int) -> float:
        """One update of `loss`, a scalar, by the named optimizers; returns its value.

        Args:
            update: its number in the round, from 0, on which the learning rate depends.

        Raises: TrainingError, before any weight changes, if the loss is NaN or infinite.
        """
        self.check_loss(loss, site_round.number)
        self.set_rates(site_round, update)
        for name in names:
            site_round.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        for name in names:
            site_round.optimizers[name].step()
        return float(loss.detach())

    def set_rates(self, site_round: SiteRound, update: int) -> None:
        """Give all optimizers the learning rate of the round's update with this number, from 0."""
        for optimizer in site_round.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.rate_after(site_round.number, update)

    def shares(self, site_updates: Sequence[SiteUpdate]) -> list[float]:
        """Weights of the sites in the average, adding up to one; all 0 if no site has trained."""
        total = sum(site_update.samples for site_update in site_updates)
        return [site_update.samples / total if total else 0.0 for site_update in site_updates]

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """The weighted mean of the sites' tensors by name, with `shares`."""
        shares = dict(zip(site_updates, self.shares(list(site_updates.values())), strict=True))
        return weighted_mean(sent, shares, before), shares


class FederatedAveraging(WeightAveragingMethod):
    """FedAvg: every site trains the whole network with the labels it has; weights are averaged in proportion to the
    number of labelled slices (McMahan et al. 2017)."""

    description = METHOD_CATALOGUE["fedavg"]
    Options = BoxOptions

    def network(self) -> nn.Module:
        return SiteUNet(self.config.classes, **self.config.unet_settings)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        if self.config.private:
            return self._train_privately(site_round)
        labelled_indices = site_round.data.labelled_indices
        if not len(labelled_indices):
            return SiteUpdate(0, math.nan)
        before = {name: value.detach().clone() for name, value in site_round.model.named_parameters()}
        site_round.model.train()
        with self.seeded_round(site_round):
            losses = []
            for update, chosen in enumerate(self.draws(site_round, labelled_indices, self.config.updates)):
                images, allowed, lines = self.batch_with_lines(site_round, chosen)
                logits = site_round.model(images)
                loss = partial_loss(logits, allowed) + box_loss(logits, allowed, lines, self.options)
                loss = loss + self.proximal_term(site_round.model, before)
                losses.append(self.step(site_round, loss, update=update))
        return SiteUpdate(len(labelled_indices), float(np.mean(losses)))

    def _train_privately(self, site_round: SiteRound) -> SiteUpdate:
        """A round with differential privacy per patient; it has no loss to report."""
        config, model, private = self.config, site_round.model, site_round.private
        if private is None:
            raise NodeDataError("dp_epsilon is set, and this round has no noise; only a site can run it")
        patients = patients_of(site_round.data)
        if not patients:
            return SiteUpdate(0, math.nan)
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        trained = [value for value in model.parameters() if value.requires_grad]
        sampling = PatientSampling.of(len(patients), config.batch_size)
        model.train()
        for update in range(config.updates):
            gradients = private_gradient(
                model, patients, sampling, private, clip=config.dp_clip, batch_of=partial(self.batch, site_round)
            )
            term = self.proximal_term(model, before)
            if isinstance(term, Tensor):  # it depends on no data, so its gradient needs no noise
                pulls = torch.autograd.grad(term, trained)
                gradients = [gradient + pull for gradient, pull in zip(gradients, pulls, strict=True)]
            for value, gradient in zip(trained, gradients, strict=True):
                value.grad = gradient
            self.set_rates(site_round, update)
            site_round.optimizers["all"].step()
        return SiteUpdate(sum(map(len, patients)), math.nan)

    def proximal_term(self, model: nn.Module, before: dict[str, Tensor]) -> Tensor | float:
        """A further term of the loss, a scalar, that depends on the weights and on those `before` the round only."""
        return 0.0


class LocalTraining(FederatedAveraging):
    """Every site trains for itself: the baseline that federation must beat."""

    description = METHOD_CATALOGUE["local"]

    def local_parameters(self, model: nn.Module) -> set[str]:
        return set(model.state_dict())


@dataclass(frozen=True, kw_only=True)
class ProximalOptions(BoxOptions):
    """FedProx's setting, and those for boxes. Raises: ConfigError if it is negative.

    Attributes:
        proximal: weight mu of the proximal term mu / 2 |w - w_global|^2.
    """

    proximal: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("proximal", self.proximal, 0)


class FederatedProximal(FederatedAveraging):
    """FedProx: FedAvg with a proximal term that keeps the weights near the received ones (Li et al. 2020)."""

    description = METHOD_CATALOGUE["fedprox"]
    Options = ProximalOptions

    def proximal_term(self, model: nn.Module, before: dict[str, Tensor]) -> Tensor | float:
        """mu / 2 |w - w_global|^2, a scalar, with the received weights `before` by name."""
        distance = sum((value - before[name]).square().sum() for name, value in model.named_parameters())
        return self.options.proximal / 2 * distance


class FederatedNorms(FederatedAveraging):
    """FedBN: FedAvg whose normalisation layers stay at their site (Li et al. 2021)."""

    description = METHOD_CATALOGUE["fedbn"]

    def local_parameters(self, model: nn.Module) -> set[str]:
        return model.norm_names()
