"""Aggregation for federated segmentation, by the rule of the method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedbiomed.common.serializer import Serializer
from fedbiomed.researcher.aggregators import Aggregator
from torch import Tensor

from ..adaptation.methods.interface.federated_method import FederatedMethod
from ..adaptation.methods.interface.method_config import MethodConfig
from ..adaptation.methods.interface.site_round import SiteUpdate
from ..adaptation.methods.registry import make_method
from ..node.plans.site_settings import SiteSettings

SERVER_STATE = "method_state.mpk"  # in the folder of a breakpoint


class MethodAverage(Aggregator):
    """Aggregate the sites' updates by the rule of a method, in the order of the sites, one site in memory at a time.

    Args:
        method: method whose `aggregate` is used; None until `load_state_breakpoint` makes it.
        sites: node ids in the order of the sites' indices.
        label_kinds: node to kind of label to number of training slices, as the node announced them.
        public_digest: SHA-256 of the public slices that all sites have, for methods that need them.

    Attributes:
        shares: node id to its share in the average of the last round.
    """

    def __init__(
        self,
        method: FederatedMethod | None = None,
        sites: Sequence[str] = (),
        label_kinds: Mapping[str, dict[str, int]] | None = None,
        *,
        public_digest: str | None = None,
    ) -> None:
        super().__init__()
        self.aggregator_name = "MethodAverage"
        self.method, self.sites = method, list(sites)
        self.label_kinds, self.public_digest = dict(label_kinds or {}), public_digest
        self.shares: dict[str, float] = {}

    def create_aggregator_args(self, model_params: Any = None, node_ids: Any = (), **_: Any) -> dict[str, dict]:
        """Settings of each node, see `SiteSettings`."""
        settings = {
            node: SiteSettings(
                site=self.sites.index(node),
                label_kinds=self.label_kinds[node],
                public_digest=self.public_digest,
            )
            for node in node_ids
        }
        return {node: {"aggregator_name": self.aggregator_name, **site.to_dict()} for node, site in settings.items()}

    def save_state_breakpoint(self, breakpoint_path: str | None = None, **_: Any) -> dict[str, Any]:
        """JSON values for the breakpoint; what the method keeps at the researcher becomes a file in its folder."""
        state, file = self.method.server_state(), None
        if breakpoint_path is not None and state:
            file = str(Path(breakpoint_path) / SERVER_STATE)
            Serializer.dump(state, file)
        return {
            "class": type(self).__name__,
            "module": self.__module__,
            "parameters": {
                "config": self.method.config.to_dict(),
                "sites": self.sites,
                "label_kinds": self.label_kinds,
                "public_digest": self.public_digest,
                "server_state": file,
            },
        }

    def load_state_breakpoint(self, state: dict[str, Any], **_: Any) -> None:
        """Restore what `save_state_breakpoint` wrote; the public slices are the caller's to give to the method."""
        saved = state["parameters"]
        self.method = make_method(MethodConfig.from_dict(saved["config"]))
        self.sites, self.label_kinds = list(saved["sites"]), dict(saved["label_kinds"])
        self.public_digest = saved["public_digest"]
        if saved["server_state"] is not None:
            self.method.load_server_state(Serializer.load(saved["server_state"]))

    def receive_replies(self, replies: Mapping[str, Mapping[str, Any]]) -> None:
        """Do nothing: no value of a reply is needed later."""

    def aggregate(
        self, model_params: Mapping[str, Any], weights: Mapping[str, float], *args: Any, **kwargs: Any
    ) -> Mapping[str, Tensor]:
        """The global weights of the next round; those of this round if no site has trained.

        Args:
            model_params: node id to an object whose `load()` returns the site's weights (name to tensor).
            weights: unused; the method weights the sites.
            args: unused.
            kwargs: `training_replies` (node id to reply) and `global_model` (name to tensor, weights before the round).

        Returns: name to tensor, of the shapes in `global_model`.
        Raises: FederationError for NaN or infinite weights, TrainingError for losses from which no share follows.
        """
        replies, before = kwargs["training_replies"], kwargs["global_model"]
        nodes = sorted(model_params, key=self.sites.index)
        site_updates = {self.sites.index(node): SiteUpdate.from_dict(replies[node]["optimizer_args"]) for node in nodes}
        state, shares = self.method.aggregate(site_updates, lambda site: model_params[self.sites[site]].load(), before)
        self.shares = {self.sites[site]: share for site, share in shares.items()}
        return dict(state)  # the framework writes plain dictionaries alone into a breakpoint
