"""Phase two at sites to which the researcher has no other access than Fed-BioMed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adaptation.labelled_factory import LabelledFactory
from ..errors import FederationError, UsageError
from ..node.site_adaptation import Adaptation
from .experiment import attach, descriptions_of, request_approval, run_round, use_researcher, wait_for_nodes
from .node_selection import NodeSelection

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment


def adapt_remotely(
    factory_file: str | Path,
    *,
    researcher: str | Path,
    nodes: NodeSelection,
    domains: list[str] | None = None,
    adaptation: Adaptation | None = None,
) -> dict[str, dict[str, Any]]:
    """Let sites train their own segmenters, which stay at the sites.

    Sites adapt independently of each other: call it again for sites that join later.

    Args:
        factory_file: labelled factory; its weights travel to the sites.
        researcher: folder of the Fed-BioMed researcher component.
        nodes: which nodes take part; `min_nodes` is one per name in `domains` by default, or 1.
        domains: only nodes with data of these domains; None: all connected nodes with the tag.
        adaptation: how the sites adapt; None: the defaults of `Adaptation`.

    Returns: by the node's name what the site reported: domain, counts, seconds, measures.
    Raises: UsageError, CheckpointError, FederationError.
    """
    labelled, adaptation = LabelledFactory.load(factory_file), adaptation or Adaptation()
    for domain in domains or ():
        labelled.factory.config.domain_index(domain)
    use_researcher(researcher)
    wait_for_nodes(nodes.min_nodes or len(domains or ["all"]), nodes.node_timeout, nodes.tag)
    chosen = _nodes_of(nodes.tag, domains)
    experiment = adaptation_experiment(labelled, adaptation, tag=nodes.tag, nodes=chosen)
    request_approval(experiment, nodes.approval_timeout)
    reports = run_round(experiment, nodes.round_timeout)
    missing = sorted(set(chosen) - set(reports))
    if missing:
        said = "; ".join(f"{event['node']}: {event['reason']}" for event in experiment.strategy().events)
        raise FederationError(f"{len(missing)} of {len(chosen)} sites did not adapt: {said}")
    hidden = ("bytes", "node_name")  # these are the framework's
    return {row["node_name"]: {k: v for k, v in row.items() if k not in hidden} for row in reports.values()}


def adaptation_experiment(
    labelled: LabelledFactory, adaptation: Adaptation, *, tag: str, nodes: list[str]
) -> Experiment:
    """A Fed-BioMed `Experiment` of one round in which every node trains its own segmenter.

    Raises: FederationError if no node offers data with `tag`.
    """
    from fedbiomed.researcher.federated_workflows import Experiment

    from ..node.plans.adaptation_plan import LabelledFactoryNetworks
    from .aggregator import NoAverage
    from .experiment import guarded
    from .plans.factory_plans import AdaptationPlan
    from .strategy import FactoryStrategy

    options = {
        "tags": [tag],
        "nodes": nodes,
        "training_plan_class": AdaptationPlan,
        "node_selection_strategy": FactoryStrategy(),
        "model_args": {"card": labelled.full_card(), "adaptation": adaptation.to_dict()},
        "training_args": {"loader_args": {"batch_size": 1}, "num_updates": 1, "share_persistent_buffers": True},
        "aggregator": NoAverage(),
        "round_limit": 1,
    }
    experiment = guarded(lambda: Experiment(**options), "the experiment could not be set up")
    if not experiment.filtered_federation_nodes():
        raise FederationError(f"no connected node offers data with tag '{tag}'")
    experiment.training_plan().model().load_state_dict(LabelledFactoryNetworks(labelled).state_dict())
    attach(experiment)
    return experiment


def _nodes_of(tag: str, domains: list[str] | None) -> list[str]:
    """Ids of the connected nodes of these domains. Raises: UsageError for a domain that no node has."""
    from ..node.site_facts import read_facts

    found: dict[str, list[str]] = {}
    for node, text in descriptions_of(tag).items():
        if facts := read_facts(text):
            found.setdefault(facts.domain, []).append(node)
    for domain in domains or ():
        if domain not in found:
            raise UsageError(f"no connected node has data of domain '{domain}' with tag '{tag}'")
    return sorted(node for domain in (domains or found) for node in found[domain])
