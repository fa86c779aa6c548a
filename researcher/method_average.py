"""Averaging what sites of a federated segmentation send, with the weights that its method gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from fedbiomed.researcher.aggregators import Aggregator
from torch import Tensor

from ..adaptation.federated_method import FederatedMethod, Report
from ..errors import FederationError


class MethodAverage(Aggregator):
    """Weighted mean, summed in the order of the sites, one site in memory at a time.

    Args:
        method: says how much a site counts.
        sites: node ids in the order of their indices.
        kinds: by node, training slices by kind of label as it announced them.

    Attributes:
        shares: of the nodes in the last round.
    """

    def __init__(self, method: FederatedMethod, sites: list[str], kinds: Mapping[str, Mapping[str, int]]) -> None:
        super().__init__()
        self.aggregator_name = "MethodAverage"
        self.method, self.sites, self.kinds = method, list(sites), dict(kinds)
        self.shares: dict[str, float] = {}

    def create_aggregator_args(self, model_params: Any = None, node_ids: Any = (), **_: Any) -> dict[str, dict]:
        """What each node is told: its index among the sites, and what it announced."""
        return {
            node: {"aggregator_name": self.aggregator_name, "site": self.sites.index(node), "kinds": self.kinds[node]}
            for node in node_ids
        }

    def hear(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing is remembered of a site."""

    def aggregate(
        self, model_params: Mapping[str, Any], weights: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """The global weights of the next round; those of this one if no site has trained.

        Raises: FederationError for NaN or infinite weights, TrainingError for losses that cannot weigh a site.
        """
        replies, before = kwargs["training_replies"], kwargs["global_model"]
        nodes = sorted(model_params, key=self.sites.index)
        reports = [Report.from_dict(replies[node]["optimizer_args"]) for node in nodes]
        self.shares = dict(zip(nodes, self.method.shares(reports), strict=True))
        return weighted_mean(model_params, self.shares, before)


def weighted_mean(
    updates: Mapping[str, Any], shares: Mapping[str, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean of the sites' tensors; `before` where no site has a share.

    Args:
        updates: by site, name to tensor, or something with `load()` that gives it. Whole numbers, such as counters of
            batches, are rounded.
        shares: by site, adding up to one, or all 0.

    Raises: FederationError for NaN or infinite weights of a site that counts.
    """
    sums: dict[str, Tensor] = {}
    for site, share in shares.items():
        if not share:
            continue
        update = updates[site] if isinstance(updates[site], Mapping) else updates[site].load()
        for name, tensor in update.items():
            if not torch.isfinite(tensor).all():
                raise FederationError(f"site {site} sent NaN or infinite weights")
            sums[name] = sums.get(name, 0) + share * tensor.double()
    merged = {name: before[name] for name in before}
    for name, tensor in sums.items():
        kind = before[name].dtype
        merged[name] = tensor.to(kind) if kind.is_floating_point else tensor.round().to(kind)
    return merged
