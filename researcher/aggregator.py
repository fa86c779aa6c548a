"""Averaging what the sites send, and following the average over time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fedbiomed.researcher.aggregators import FedAverage
from torch import Tensor

from ..errors import FederationError
from ..generative.config import FactoryConfig

OWNED_ROWS = ("generator.head.grey", "generator.head.log_sigma")  # row d belongs to domain d


class FactoryAverage(FedAverage):
    """FedAvg of the generator, with two differences and a moving average.

    Row d of the palette is averaged over the sites of domain d alone: no other site has a gradient for it, so a
    plain mean would hold it back. Sites are summed in the order of their domains, so that a run can be repeated to
    the last bit whatever order the replies come in. The exponential moving average of the global generator is kept
    here and costs no traffic.

    Attributes:
        ema: name to tensor, the average generator after the last round; empty before the first.
        updates_per_round: local updates of one site, sets the decay of a round.
    """

    def __init__(self, config: FactoryConfig | None = None, updates_per_round: int = 1) -> None:
        super().__init__()
        self.aggregator_name = "FactoryAverage"
        self.config, self.updates_per_round = config, updates_per_round
        self.ema: dict[str, Tensor] = {}

    def aggregate(
        self, model_params: dict[str, dict[str, Tensor]], weights: dict[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """One round. Raises FederationError for a reply without its domain, or with NaN or infinite weights."""
        domains = self._domains(model_params, kwargs["training_replies"])
        nodes = sorted(model_params, key=lambda node: (domains[node], node))
        for node in nodes:
            if any(not torch.isfinite(tensor).all() for tensor in model_params[node].values()):
                raise FederationError(f"the site of domain '{domains[node]}' sent NaN or infinite weights")
        total = sum(weights[node] for node in nodes)
        merged = {}
        for name, reference in model_params[nodes[0]].items():
            mean = sum(model_params[node][name].double() * (weights[node] / total) for node in nodes)
            if name in OWNED_ROWS:
                mean = self._owned_rows(name, mean, nodes, model_params, weights, domains)
            merged[name] = mean.to(reference.dtype)
        self._follow(merged, kwargs["global_model"], sites=len(nodes))
        return merged

    def _domains(self, model_params: Mapping, replies: Mapping[str, Mapping]) -> dict[str, str]:
        domains = {}
        for node in model_params:
            domains[node] = (replies[node].get("optimizer_args") or {}).get("domain")
            if domains[node] not in self.config.domains:
                raise FederationError(f"a node answered for the unknown domain '{domains[node]}'")
        return domains

    def _owned_rows(self, name, mean, nodes, model_params, weights, domains) -> Tensor:
        rows = mean.clone()
        for index, domain in enumerate(self.config.domains):
            owners = [node for node in nodes if domains[node] == domain]
            if owners:
                share = sum(weights[node] for node in owners)
                rows[index] = sum(model_params[n][name][index].double() * (weights[n] / share) for n in owners)
        return rows

    def _follow(self, merged: dict[str, Tensor], before: Mapping[str, Tensor], *, sites: int) -> None:
        if not self.ema:
            self.ema = {name: before[name].detach().double().clone() for name in merged}
        keep = self.config.ema_decay ** (sites * self.updates_per_round)
        for name, tensor in merged.items():
            self.ema[name].mul_(keep).add_(tensor.double(), alpha=1 - keep)
