"""LSSL: HSSF's training of equal networks whose weights are averaged (Ma et al., IEEE TMI 2024)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn

from ..networks.assessed_network import AssessedNetwork
from .catalogue import METHOD_CATALOGUE
from .interface.aggregation import weighted_mean
from .interface.site_round import SiteRound, SiteUpdate
from .public_slice_method import PublicSliceMethod, PublicSliceState, Trainee


class LSSL(PublicSliceMethod):
    """Sites train equal networks on public and own slices; the weights are averaged, each site counting alike.

    It is a method, and not an option of HSSF, because a site that approved the sending of predictions must not send
    weights.
    """

    description = METHOD_CATALOGUE["lssl"]

    def network(self) -> nn.Module:
        return self.untrained(self.options.network)

    def trainee_at(self, site_round: SiteRound) -> Trainee:
        state = cast(PublicSliceState, site_round.state)
        return self.trainee_of(cast(AssessedNetwork, site_round.model), state.optimizer)

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """The plain mean of the tensors by name over the sites that have trained."""
        active = [site for site, site_update in site_updates.items() if site_update.samples]
        shares = {site: 1 / len(active) if site in active else 0.0 for site in site_updates}
        return weighted_mean(sent, shares, before), shares
