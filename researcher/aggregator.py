"""Averaging what the sites send, and following the average over time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fedbiomed.researcher.aggregators import Aggregator, FedAverage
from torch import Tensor

from ..common.weights_file import read_weights, write_weights
from ..errors import FederationError
from ..generative.config import FactoryConfig
from ..generative.factory import GENERATOR
from ..node.plans.factory_plan import owned_parameters
from ..node.plans.transport import restore

AVERAGE_FILE, AVERAGE_KIND = "average.safetensors", "moving average"


class FactoryAverage(FedAverage):
    """FedAvg of the generator, with two differences and a moving average.

    What belongs to domain d (its row of the palette, see `owned_parameters`) is averaged over the sites of that domain
    alone: no other site has a gradient for it, so a plain mean would hold it back. Sites are summed in the order of
    their domains, so that a run can be repeated to the last bit whatever order the replies come in, and one at a time:
    their weights are read from disk, so memory is that of one site and the sum. The exponential moving average of the
    global generator is kept here and costs no traffic.

    Attributes:
        ema: name to tensor, the average generator after the last round; empty before the first.
        updates_per_round: local updates of one site, sets the decay of a round.
    """

    def __init__(self, config: FactoryConfig | None = None, updates_per_round: int = 1) -> None:
        super().__init__()
        self.aggregator_name = "FactoryAverage"
        self.config, self.updates_per_round = config, updates_per_round
        self.ema: dict[str, Tensor] = {}
        self.sizes: dict[str, tuple[str, int]] = {}  # by node: domain and number of slices, as last heard

    def create_aggregator_args(self, model_params: Any = None, node_ids: Any = (), **_: Any) -> dict[str, dict]:
        """What each node is told: how much its domain's row will be diluted where only a sum of all is seen."""
        if not all(node in self.sizes for node in node_ids):
            return {}
        total = sum(self.sizes[node][1] for node in node_ids)
        factors = {}
        for node in node_ids:
            own = sum(self.sizes[n][1] for n in node_ids if self.sizes[n][0] == self.sizes[node][0])
            factors[node] = {"aggregator_name": self.aggregator_name, "row_factor": total / own}
        return factors

    def receive_replies(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember domain and number of slices of the sites that answered."""
        for node, reply in replies.items():
            self.sizes[node] = (reply["optimizer_args"]["domain"], reply["sample_size"])

    def aggregate(
        self, model_params: Mapping[str, Any], weights: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """One round.

        Args:
            model_params: by node, name to tensor, or something with `load()` that gives it.
            weights: shares of the nodes, adding up to one.

        Raises: FederationError for a reply without a known domain, of other tensors, or with NaN or infinite weights.
        """
        domains = self._domains(model_params, kwargs["training_replies"])
        nodes = sorted(model_params, key=lambda node: (domains[node], node))
        present = {domain: sum(weights[n] for n in nodes if domains[n] == domain) for domain in domains.values()}
        total = sum(weights[node] for node in nodes)
        before: Mapping[str, Tensor] = kwargs["global_model"]
        sums: dict[str, Tensor] = {}
        axes = {name: axis for name, axis in owned_parameters(self.config).items() if name in before}
        owned = {name: before[name].double().clone() for name in axes}
        first = {domains[node]: node for node in reversed(nodes)}
        for node in nodes:
            update = model_params[node]
            update = restore(update if isinstance(update, Mapping) else update.load(), before)
            if sums and update.keys() != sums.keys():
                raise FederationError(f"the site of domain '{domains[node]}' sent other tensors than the others")
            index = self.config.domain_index(domains[node])
            for name, tensor in update.items():
                if not torch.isfinite(tensor).all():
                    raise FederationError(f"the site of domain '{domains[node]}' sent NaN or infinite weights")
                if name in sums:
                    sums[name].add_(tensor.double(), alpha=weights[node] / total)
                else:
                    sums[name] = tensor.double() * (weights[node] / total)
                if name in owned:
                    own, share = owned[name].select(axes[name], index), weights[node] / present[domains[node]]
                    if node == first[domains[node]]:
                        own.zero_()
                    own.add_(tensor.select(axes[name], index).double(), alpha=share)
        for name, axis in axes.items():  # what belongs to no domain, such as embeddings of heights, is everyone's
            count = len(self.config.domains)
            sums[name].narrow(axis, 0, count).copy_(owned[name].narrow(axis, 0, count))
        merged = {name: tensor.to(before[name].dtype) for name, tensor in sums.items()}
        self.follow(merged, before, sites=len(nodes))
        return merged

    def follow(self, merged: Mapping[str, Tensor], before: Mapping[str, Tensor], *, sites: int) -> None:
        """Move the average towards the global generator after a round, as far as that many sites' updates do."""
        # Shared discriminators have no moving average.
        merged = {name: tensor for name, tensor in merged.items() if name.startswith(GENERATOR)}
        if not self.ema:
            self.ema = {name: before[name].detach().double().clone() for name in merged}
        keep = self.config.ema_decay ** (sites * self.updates_per_round)
        for name, tensor in merged.items():
            self.ema[name].mul_(keep).add_(tensor.double(), alpha=1 - keep)

    def save_state_breakpoint(self, breakpoint_path: str | None = None, **_: Any) -> dict[str, Any]:
        """Configuration as JSON, the average as a safetensors file in the breakpoint's folder."""
        if breakpoint_path is not None and self.ema:
            write_weights(Path(breakpoint_path) / AVERAGE_FILE, self.ema, {"kind": AVERAGE_KIND})
        return {
            "class": type(self).__name__,
            "module": self.__module__,
            "parameters": {
                "config": self.config.to_dict(),
                "updates_per_round": self.updates_per_round,
                "sizes": {node: list(size) for node, size in self.sizes.items()},
                "average": str(Path(breakpoint_path) / AVERAGE_FILE) if breakpoint_path and self.ema else None,
            },
        }

    def load_state_breakpoint(self, state: dict[str, Any], **_: Any) -> None:
        """Raises: CheckpointError if the average's file is missing or damaged."""
        kept = state["parameters"]
        self.config = FactoryConfig.from_dict(kept["config"])
        self.updates_per_round = kept["updates_per_round"]
        self.sizes = {node: (domain, count) for node, (domain, count) in kept["sizes"].items()}
        if kept["average"]:
            self.ema = read_weights(kept["average"], kind=AVERAGE_KIND)[0]

    def _domains(self, model_params: Mapping, replies: Mapping[str, Mapping]) -> dict[str, str]:
        domains = {}
        for node in model_params:
            domains[node] = (replies[node].get("optimizer_args") or {}).get("domain")
            if domains[node] not in self.config.domains:
                raise FederationError(f"a node answered for the unknown domain '{domains[node]}'")
        return domains


class NoAverage(Aggregator):
    """Of sites that keep what they train: what was sent to them stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.aggregator_name = "NoAverage"

    def aggregate(
        self, model_params: Mapping[str, Any], weights: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        return kwargs["global_model"]

    def receive_replies(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing is remembered of a site."""
