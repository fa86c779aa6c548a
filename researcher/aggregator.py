"""Aggregation of the sites' generators by federated averaging, with a moving average over the rounds."""

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
    """Federated averaging (McMahan et al. 2017) of the generator, with two differences and a moving average.

    Parameters that belong to domain d (its row of the palette, see `owned_parameters`) are averaged over the sites of
    that domain only: no other site has a gradient for them, so a mean over all sites would slow them down. Sites are
    summed in the order of their domains, so that a run is repeatable to the last bit in whatever order the replies
    arrive. They are read from disk one at a time, so memory holds one site's weights and the sum. The exponential
    moving average of the global generator is computed here and needs no traffic.

    Args:
        config: networks and domains; None until `load_state_breakpoint` sets it.
        updates_per_round: local updates of one site in a round; sets the decay of a round.

    Attributes:
        ema: name to float64 tensor, the moving average of the generator after the last round; empty before the first.
        sizes: node id to domain and number of training slices, from the node's last reply.
    """

    def __init__(self, config: FactoryConfig | None = None, updates_per_round: int = 1) -> None:
        super().__init__()
        self.aggregator_name = "FactoryAverage"
        self.config, self.updates_per_round = config, updates_per_round
        self.ema: dict[str, Tensor] = {}
        self.sizes: dict[str, tuple[str, int]] = {}

    def create_aggregator_args(self, model_params: Any = None, node_ids: Any = (), **_: Any) -> dict[str, dict]:
        """Node id to the factor by which an encrypted sum over all nodes will shrink the change of its domain's row."""
        if not all(node in self.sizes for node in node_ids):
            return {}
        total = sum(self.sizes[node][1] for node in node_ids)
        factors = {}
        for node in node_ids:
            own = sum(self.sizes[n][1] for n in node_ids if self.sizes[n][0] == self.sizes[node][0])
            factors[node] = {"aggregator_name": self.aggregator_name, "row_factor": total / own}
        return factors

    def receive_replies(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Remember domain and number of slices of the sites that answered: node id to reply."""
        for node, reply in replies.items():
            self.sizes[node] = (reply["optimizer_args"]["domain"], reply["sample_size"])

    def aggregate(
        self, model_params: Mapping[str, Any], weights: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """Average the updates of one round.

        Args:
            model_params: node id to weights (name to tensor), or to an object whose `load()` returns them.
            weights: node id to the node's share, adding up to 1.
            args: unused.
            kwargs: `training_replies` (node id to reply) and `global_model` (name to tensor, weights before the round).

        Returns: name to tensor, the new global weights, of the shapes in `global_model`.
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
                raise FederationError(f"the site of domain '{domains[node]}' must send the same tensors as the others")
            index = self.config.domain_index(domains[node])
            for name, tensor in update.items():
                if not torch.isfinite(tensor).all():
                    raise FederationError(
                        f"the site of domain '{domains[node]}' sent NaN or infinite weights; use a lower learning rate"
                    )
                if name in sums:
                    sums[name].add_(tensor.double(), alpha=weights[node] / total)
                else:
                    sums[name] = tensor.double() * (weights[node] / total)
                if name in owned:
                    own, share = owned[name].select(axes[name], index), weights[node] / present[domains[node]]
                    if node == first[domains[node]]:
                        own.zero_()
                    own.add_(tensor.select(axes[name], index).double(), alpha=share)
        for name, axis in axes.items():  # rows of no domain, such as those of height bins, are averaged over all
            count = len(self.config.domains)
            sums[name].narrow(axis, 0, count).copy_(owned[name].narrow(axis, 0, count))
        merged = {name: tensor.to(before[name].dtype) for name, tensor in sums.items()}
        self.follow(merged, before, sites=len(nodes))
        return merged

    def follow(self, merged: Mapping[str, Tensor], before: Mapping[str, Tensor], *, sites: int) -> None:
        """Move the average towards the global generator by the decay of one round.

        Args:
            merged: name to tensor, global weights after the round.
            before: name to tensor, global weights before the round, of the same shapes.
            sites: number of sites that took part; the decay is that of all their updates.
        """
        # Shared discriminators have no moving average.
        merged = {name: tensor for name, tensor in merged.items() if name.startswith(GENERATOR)}
        if not self.ema:
            self.ema = {name: before[name].detach().double().clone() for name in merged}
        decay = self.config.ema_decay ** (sites * self.updates_per_round)
        for name, tensor in merged.items():
            self.ema[name].mul_(decay).add_(tensor.double(), alpha=1 - decay)

    def save_state_breakpoint(self, breakpoint_path: str | None = None, **_: Any) -> dict[str, Any]:
        """JSON values for the breakpoint; the moving average becomes a safetensors file in its folder."""
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
        """Restore what `save_state_breakpoint` wrote.

        Raises: CheckpointError if the file of the moving average is missing or damaged.
        """
        saved = state["parameters"]
        self.config = FactoryConfig.from_dict(saved["config"])
        self.updates_per_round = saved["updates_per_round"]
        self.sizes = {node: (domain, count) for node, (domain, count) in saved["sizes"].items()}
        if saved["average"]:
            self.ema = read_weights(saved["average"], kind=AVERAGE_KIND)[0]

    def _domains(self, model_params: Mapping, replies: Mapping[str, Mapping]) -> dict[str, str]:
        """Node id to domain."""
        domains = {}
        for node in model_params:
            domains[node] = (replies[node].get("optimizer_args") or {}).get("domain")
            if domains[node] not in self.config.domains:
                known = ", ".join(self.config.domains)
                raise FederationError(f"a node answered for domain '{domains[node]}'; it must be one of {known}")
        return domains


class NoAverage(Aggregator):
    """No aggregation, for plans whose trained weights stay at the sites: the global weights do not change."""

    def __init__(self) -> None:
        super().__init__()
        self.aggregator_name = "NoAverage"

    def aggregate(
        self, model_params: Mapping[str, Any], weights: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """The global weights as they were: name to tensor, of any shape."""
        return kwargs["global_model"]

    def receive_replies(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Do nothing: no value of a reply is needed later."""
