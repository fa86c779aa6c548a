"""Whether the sites agree on what a slice is: checked before the first round, from what each site announces."""

from __future__ import annotations

from collections.abc import Mapping

from .. import __version__
from ..errors import FederationError
from ..generative.config import FactoryConfig
from ..node.site_facts import CONVENTIONS, SiteFacts, read_facts


def disagreements(descriptions: Mapping[str, str], config: FactoryConfig) -> dict[str, str]:
    """Node to what is wrong with its store for this factory; nodes that fit are left out.

    Args:
        descriptions: node to the text under which its data are registered (`fedfactory site add`).
        config: of the factory that is to be trained.
    """
    facts = {node: read_facts(text) for node, text in descriptions.items()}
    unusual = unusual_conventions({node: site for node, site in facts.items() if site})
    found = {node: _misfit(site, config) or unusual.get(node) for node, site in facts.items()}
    return {node: text for node, text in found.items() if text}


def agreeing_nodes(descriptions: Mapping[str, str], config: FactoryConfig, *, leave_out: bool) -> list[str]:
    """Nodes whose stores fit.

    Args:
        descriptions: node to the text under which its data are registered.
        config: of the factory that is to be trained.
        leave_out: whether to go on without the nodes that do not fit; if not, any such node ends the run.

    Raises: FederationError that names each node that does not fit and what to do, or says that pseudo-labels are asked
        for and no site that fits has any.
    """
    found = disagreements(descriptions, config)
    fitting = [node for node in descriptions if node not in found]
    if found and (not leave_out or not fitting):
        lines = "; ".join(f"{node}: {text}" for node, text in sorted(found.items()))
        raise FederationError(f"{len(found)} of {len(descriptions)} sites do not agree with the others: {lines}")
    if config.pseudo_labels and not any(
        site.pseudo_labels for node in fitting if (site := read_facts(descriptions[node]))
    ):
        raise FederationError(
            f"0 of {len(fitting)} sites have announced pseudo-labels; run `fedfactory pseudo-label` there and register "
            "their stores again, or leave out pseudo_labels"
        )
    return fitting


def unusual_conventions(facts: Mapping[str, SiteFacts]) -> dict[str, str]:
    """Node to the conventions of slices in which its store differs from most; nodes that agree are left out."""
    usual = _usual_conventions(list(facts.values()))
    found = {}
    for node, site in facts.items():
        unusual = [name for name in CONVENTIONS if getattr(site, name) != usual[name]]
        if unusual:
            found[node] = "; ".join(f"{name} is {getattr(site, name)}, elsewhere {usual[name]}" for name in unusual)
    return found


def _usual_conventions(facts: list[SiteFacts]) -> dict[str, str | None]:
    """What most stores announce for each convention; of equally frequent values, the first in alphabetical order."""
    usual = {}
    for name in CONVENTIONS:
        values = [getattr(site, name) for site in facts]
        usual[name] = max(sorted(set(values)), key=values.count) if values else None
    return usual


def _misfit(site: SiteFacts | None, config: FactoryConfig) -> str | None:
    """Why a site cannot take part in the training of this factory; None if it can."""
    if site is None:
        return "its data were not registered by this version; run `fedfactory site add` there again"
    if site.version != __version__:
        return f"runs fedfactory {site.version}, the researcher {__version__}"
    if site.domain not in config.domains:
        return f"has domain '{site.domain}', the experiment {', '.join(config.domains)}"
    if (site.size, site.z_bins) != (config.image_size, config.z_bins):
        return (
            f"has {site.size} px in {site.z_bins} bins, the factory {config.image_size} px in {config.z_bins}; "
            f"run `fedfactory prepare --size {config.image_size} --z-bins {config.z_bins}` there, or for pictures "
            "`fedfactory train --z-bins 1`"
        )
    if site.channels != config.image_channels:
        return (
            f"has slices of {site.channels} channels, the factory of {config.image_channels}; run `fedfactory train "
            f"--image-channels {site.channels}` if all sites have them"
        )
    labelled = any(count for kind, count in site.label_kinds.items() if kind != "none")
    if config.classes and labelled and site.classes != config.classes:
        return (
            f"has labels of {site.classes} classes, background included, the factory draws {config.classes}; run "
            f"`fedfactory train --classes {site.classes}` if all labelled sites have them"
        )
    return None
