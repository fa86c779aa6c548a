"""What connected sites announced about their labels: whether they agree, and which methods of segmentation fit them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from ... import __version__
from ...adaptation.methods.catalogue import METHOD_CATALOGUE
from ...adaptation.methods.recommendation import SITUATIONS, in_order, situation_of
from ...node.site_facts import SiteFacts, read_facts
from ..experiment import descriptions_of, use_researcher, wait_for_nodes
from ..node_selection import NodeSelection
from .site_agreement import Disagreement, disagreements_of, misfit_of
from .site_labels import held_labels

SPACING_RATIO = 1.5  # of millimetres per pixel, from which structures look smaller or larger at another site


@dataclass(frozen=True)
class MethodFit:
    """Whether a method can train with the sites, and why.

    Attributes:
        name: of the method.
        fits: whether `train-segmenter` would accept it.
        reason: when to choose it, or what is missing.
    """

    name: str
    fits: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class Survey:
    """The connected sites and what can be trained with them.

    Attributes:
        sites: node id to the site's facts, of the sites whose announcement can be read.
        unreadable: ids of the other nodes; these must register their data again.
        disagreements: settings in which stores differ; with any, nothing can be trained.
        remarks: what differs without preventing the training, one sentence each.
        situation: key in `recommendation.SITUATIONS`; "" without any readable site.
        methods: all methods, those that fit first, in the order in which they are recommended.
    """

    sites: dict[str, SiteFacts]
    unreadable: list[str]
    disagreements: list[Disagreement]
    remarks: list[str]
    situation: str
    methods: list[MethodFit]

    @property
    def agree(self) -> bool:
        """Whether anything can be trained with these sites together."""
        return bool(self.sites) and not self.unreadable and not self.disagreements

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        values = asdict(self)
        says = SITUATIONS[self.situation].says if self.situation else ""
        return {"made_by": f"fedfactory {__version__}", "agree": self.agree, **values, "says": says}


def ask_sites(researcher: str | Path, nodes: NodeSelection) -> Survey:
    """Ask the connected nodes for what they announce, and compare.

    Args:
        researcher: folder of the Fed-BioMed researcher component.
        nodes: which nodes are asked; `min_nodes` is 1 by default.

    Raises: UsageError, FederationError, see `use_researcher` and `wait_for_nodes`.
    """
    use_researcher(researcher)
    wait_for_nodes(nodes.min_nodes or 1, nodes.node_timeout, nodes.tag)
    return survey_of(descriptions_of(nodes.tag))


def survey_of(descriptions: Mapping[str, str]) -> Survey:
    """What follows from the sites' announcements.

    Args:
        descriptions: node id to the text under which its data are registered (`fedfactory site add`).
    """
    read = {node: read_facts(text) for node, text in sorted(descriptions.items())}
    facts = {node: site for node, site in read.items() if site is not None}
    return Survey(
        sites=facts,
        unreadable=[node for node, site in read.items() if site is None],
        disagreements=disagreements_of(facts),
        remarks=remarks_on(facts),
        situation=_situation(facts) if facts else "",
        methods=fits_of(facts) if facts else [],
    )


def fits_of(facts: Mapping[str, SiteFacts]) -> list[MethodFit]:
    """All methods: those that fit the labels and modalities of the sites, in the order of recommendation, then others.

    Args:
        facts: node id to the site's facts.
    """
    misfits = {name: misfit_of(method, facts) for name, method in METHOD_CATALOGUE.items()}
    fitting = in_order(_situation(facts), [name for name, reason in misfits.items() if reason is None])
    return [
        *(MethodFit(name, True, f"when {METHOD_CATALOGUE[name].choose}") for name in fitting),
        *(MethodFit(name, False, reason) for name, reason in misfits.items() if reason is not None),
    ]


def remarks_on(facts: Mapping[str, SiteFacts]) -> list[str]:
    """What differs between sites, or is missing at one, without preventing a training; one sentence each.

    Args:
        facts: node id to the site's facts.
    """
    remarks = []
    spacings = {node: site.spacing for node, site in facts.items() if site.spacing is not None}
    if spacings and max(spacings.values()) > SPACING_RATIO * min(spacings.values()):
        listed = ", ".join(f"{node}: {value:.3g}" for node, value in spacings.items())
        remarks.append(f"millimetres per pixel differ ({listed}); structures have other sizes in pixels there")
    for label, names in sorted(_names(facts).items(), key=lambda item: int(item[0])):
        if len(set(names.values())) > 1:
            listed = ", ".join(f"{node}: {name}" for node, name in names.items())
            remarks.append(f"label {label} has several names ({listed}); it must be the same structure everywhere")
    held = {node: held_labels({node: site}) for node, site in facts.items()}
    if len(without := [node for node, kinds in held.items() if kinds <= {"none"}]) < len(facts):
        remarks += [f"{node} has no labels; it trains nothing with methods that need labels" for node in without]
    remarks += [f"{node} has no training slices" for node, site in facts.items() if not site.slices]
    return remarks


def _names(facts: Mapping[str, SiteFacts]) -> dict[str, dict[str, str]]:
    """Label value to the name that each node has for it."""
    names: dict[str, dict[str, str]] = {}
    for node, site in facts.items():
        for label, name in site.class_names.items():
            names.setdefault(label, {})[node] = name
    return names


def _situation(facts: Mapping[str, SiteFacts]) -> str:
    modalities = {name for site in facts.values() for name in site.modalities}
    return situation_of([held_labels({node: site}) for node, site in facts.items()], modalities)
