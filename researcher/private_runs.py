"""What the researcher asks and learns of sites that train segmenters with differential privacy."""

from __future__ import annotations

from collections.abc import Mapping

from ..adaptation.methods.interface.method_config import MethodConfig
from ..errors import UsageError
from ..node.site_facts import SiteFacts
from .round_records import ReceivedUpdate

# Entries of a site's report: privacy spent in this experiment and on the store by all experiments, for which delta and
# how many training patients.
PRIVACY = ("epsilon", "epsilon_store", "delta", "patients")


def required_entries(config: MethodConfig) -> tuple[str, ...]:
    """Entries that a site's report must have: a loss, or with differential privacy what the round cost."""
    return ("domain", "samples", *(PRIVACY if config.private else ("loss",)))


def require_dense_labels(facts: dict[str, SiteFacts]) -> None:
    """Raises: UsageError if a site has labels with which it cannot train with differential privacy."""
    kinds = {node: set(site.label_kinds) for node, site in facts.items()}
    unfit = {node: held for node, held in kinds.items() if "dense" not in held or held - {"dense", "none"}}
    if listed := "; ".join(f"{node}: {', '.join(sorted(held)) or 'none'}" for node, held in unfit.items()):
        raise UsageError(f"differential privacy needs dense labels at all sites ({listed}); leave out dp_epsilon")


def privacy_of(sites: Mapping[str, ReceivedUpdate]) -> dict[str, dict[str, float]]:
    """Node id to epsilon, delta and number of training patients as the site last reported them."""
    return {
        node: {name: value for name in PRIVACY if (value := site.selected().get(name)) is not None}
        for node, site in sites.items()
    }
