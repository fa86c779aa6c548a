"""Phase two, started by the researcher, at sites that can only be reached through Fed-BioMed."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..adaptation.labelled_factory import LabelledFactory
from ..errors import FederationError, UsageError
from ..node.site_adaptation import Adaptation
from .experiment import (
    POLL_SECONDS,
    descriptions_of,
    make_experiment,
    request_approval,
    run_round,
    use_researcher,
    wait_for_nodes,
)
from .node_selection import NodeSelection
from .round_records import ReceivedUpdate

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment


def adapt_remotely(
    factory_file: str | Path,
    *,
    researcher: str | Path,
    nodes: NodeSelection,
    domains: list[str] | None = None,
    adaptation: Adaptation | None = None,
) -> dict[str, ReceivedUpdate]:
    """Let sites train their own segmenters, which stay at the sites.

    Sites adapt independently of each other: call it again for sites that join later.

    Args:
        factory_file: labelled factory; its weights travel to the sites.
        researcher: folder of the Fed-BioMed researcher component.
        nodes: which nodes take part; `min_nodes` is one per name in `domains` by default, or 1.
        domains: only nodes with data of these domains, which are waited for; None: all connected nodes with the tag.
        adaptation: how the sites adapt; None: the defaults of `Adaptation`.

    Returns: name of the node to the site's update: domain, counts, seconds, measures.
    Raises: UsageError for a domain that no node has, CheckpointError for a damaged factory, FederationError if a site
        does not adapt.
    """
    labelled, adaptation = LabelledFactory.load(factory_file), adaptation or Adaptation()
    for domain in domains or ():
        labelled.factory.config.domain_index(domain)
    use_researcher(researcher)
    deadline = time.monotonic() + nodes.node_timeout
    wait_for_nodes(nodes.min_nodes or len(domains or ["all"]), nodes.node_timeout, nodes.tag)
    chosen = _nodes_of(nodes.tag, domains, deadline)
    experiment = adaptation_experiment(labelled, adaptation, tag=nodes.tag, nodes=chosen)
    request_approval(experiment, nodes.approval_timeout)
    site_updates = run_round(experiment, nodes.round_timeout)
    if missing := set(chosen) - set(site_updates):
        reasons = "; ".join(f"{event.node}: {event.reason}" for event in experiment.strategy().events)
        raise FederationError(f"{len(missing)} of {len(chosen)} sites did not adapt; see their logs ({reasons})")
    return {update.node_name: update for update in site_updates.values()}


def adaptation_experiment(
    labelled: LabelledFactory, adaptation: Adaptation, *, tag: str, nodes: list[str]
) -> Experiment:
    """A Fed-BioMed `Experiment` of one round in which every node trains its own segmenter.

    Args:
        labelled: labelled factory that is sent to the nodes, without its localiser, because their stores are
            prepared already, and without its distilled branch.
        adaptation: how the sites adapt.
        tag: tag under which the sites registered their data.
        nodes: ids of the nodes that take part.

    Raises: FederationError if no node offers data with `tag`.
    """
    from ..node.plans.adaptation_plan import LabelledFactoryNetworks
    from .aggregator import NoAverage
    from .plans.factory_plans import AdaptationPlan
    from .strategy import FactoryStrategy

    labelled = replace(labelled, localiser=None, distilled=None, card=replace(labelled.card, distilled=None))
    experiment = make_experiment(
        tag,
        nodes=nodes,
        training_plan_class=AdaptationPlan,
        node_selection_strategy=FactoryStrategy(),
        model_args={"card": labelled.to_dict(), "adaptation": adaptation.to_dict()},
        training_args={"loader_args": {"batch_size": 1}, "num_updates": 1, "share_persistent_buffers": True},
        aggregator=NoAverage(),
        round_limit=1,
    )
    experiment.training_plan().model().load_state_dict(LabelledFactoryNetworks(labelled).state_dict())
    return experiment


def _nodes_of(tag: str, domains: list[str] | None, deadline: float) -> list[str]:
    """Ids of the connected nodes with data of the domains; None: of any domain.

    Args:
        deadline: until when nodes of every domain are waited for, by `time.monotonic`: those that connected first may
            be of others.

    Raises: UsageError for a domain that no node has by then.
    """
    while True:
        found = _nodes_by_domain(tag)
        missing = [domain for domain in domains or () if domain not in found]
        if not missing:
            return sorted(node for domain in (domains or found) for node in found[domain])
        if time.monotonic() > deadline:
            known = ", ".join(sorted(found))
            raise UsageError(
                f"no connected node has data of domain '{missing[0]}' with tag '{tag}'; choose from {known}"
            )
        time.sleep(POLL_SECONDS)


def _nodes_by_domain(tag: str) -> dict[str, list[str]]:
    """Domain to the ids of the connected nodes that announce data of it."""
    from ..node.site_facts import read_facts

    found: dict[str, list[str]] = {}
    for node, text in descriptions_of(tag).items():
        if facts := read_facts(text):
            found.setdefault(facts.domain, []).append(node)
    return found
