"""Averaging what sites of a federated segmentation send, with the weights that its method gives them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedbiomed.researcher.aggregators import Aggregator
from torch import Tensor

from ..adaptation.methods.federated_method import FederatedMethod, SiteUpdate


class MethodAverage(Aggregator):
    """What the method makes of the sites' replies, taken in the order of the sites, one in memory at a time.

    Args:
        method: says how much a site counts.
        sites: node ids in the order of their indices.
        kinds: by node, training slices by kind of label as it announced them.
        public: digest of the slices that all have, for methods that need them.

    Attributes:
        shares: of the nodes in the last round.
    """

    def __init__(
        self,
        method: FederatedMethod,
        sites: list[str],
        kinds: Mapping[str, Mapping[str, int]],
        public: str | None = None,
    ) -> None:
        super().__init__()
        self.aggregator_name = "MethodAverage"
        self.method, self.sites, self.kinds, self.public = method, list(sites), dict(kinds), public
        self.shares: dict[str, float] = {}

    def create_aggregator_args(self, model_params: Any = None, node_ids: Any = (), **_: Any) -> dict[str, dict]:
        """What each node is told: its index among the sites, and what it announced."""
        return {
            node: {
                "aggregator_name": self.aggregator_name,
                "site": self.sites.index(node),
                "kinds": self.kinds[node],
                "public": self.public,
            }
            for node in node_ids
        }

    def receive_replies(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Nothing is remembered of a site."""

    def aggregate(
        self, model_params: Mapping[str, Any], weights: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """The global weights of the next round; those of this one if no site has trained.

        Raises: FederationError for NaN or infinite weights, TrainingError for losses that cannot weigh a site.
        """
        replies, before = kwargs["training_replies"], kwargs["global_model"]
        nodes = sorted(model_params, key=self.sites.index)
        site_updates = {self.sites.index(node): SiteUpdate.from_dict(replies[node]["optimizer_args"]) for node in nodes}
        state, shares = self.method.aggregate(site_updates, lambda site: model_params[self.sites[site]].load(), before)
        self.shares = {self.sites[site]: share for site, share in shares.items()}
        return state
