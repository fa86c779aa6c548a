"""Do the sites agree on what a slice is? Asked before the first round, from what each node tells about its store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import __version__
from ..errors import FederationError
from ..generative.config import FactoryConfig
from ..node.sites import CONVENTIONS, read_facts


def disagreements(descriptions: Mapping[str, str], config: FactoryConfig) -> dict[str, str]:
    """By node, what is wrong with its store for this factory; nothing for a node that fits.

    Args:
        descriptions: by node, the text under which its data are registered (`fedfactory site add`).
    """
    facts = {node: read_facts(text) for node, text in descriptions.items()}
    other = other_conventions({node: known for node, known in facts.items() if known})
    found = {node: _trouble(known, config) or other.get(node) for node, known in facts.items()}
    return {node: text for node, text in found.items() if text}


def agreeing_nodes(descriptions: Mapping[str, str], config: FactoryConfig, *, leave_out: bool) -> list[str]:
    """Nodes whose stores fit.

    Args:
        leave_out: go on without the others; otherwise any of them ends the run.

    Raises: FederationError that names each node and what to do.
    """
    found = disagreements(descriptions, config)
    fitting = [node for node in descriptions if node not in found]
    if found and (not leave_out or not fitting):
        lines = "; ".join(f"{node}: {text}" for node, text in sorted(found.items()))
        raise FederationError(f"sites do not agree: {lines}")
    return fitting


def other_conventions(facts: Mapping[str, dict[str, Any]]) -> dict[str, str]:
    """By node, in which conventions of slices its store differs from most; nothing for a node that agrees."""
    usual = _usual(list(facts.values()))
    found = {}
    for node, known in facts.items():
        other = [name for name in CONVENTIONS if str(known.get(name)) != usual[name]]
        if other:
            found[node] = "; ".join(f"{name} is {known.get(name)}, elsewhere {usual[name]}" for name in other)
    return found


def _usual(facts: list[dict[str, Any]]) -> dict[str, Any]:
    """What most stores say; of equals, what comes first by name."""
    result = {}
    for name in CONVENTIONS:
        values = [str(known.get(name)) for known in facts]
        result[name] = max(sorted(set(values)), key=values.count) if values else None
    return result


def _trouble(known: dict[str, Any] | None, config: FactoryConfig) -> str | None:
    if known is None:
        return "its data were not registered with `fedfactory site add` of this version"
    if known["version"] != __version__:
        return f"runs fedfactory {known['version']}, the researcher {__version__}"
    if known["domain"] not in config.domains:
        return f"has domain '{known['domain']}', the experiment {', '.join(config.domains)}"
    if (known["size"], known["z_bins"]) != (config.image_size, config.z_bins):
        return (
            f"has {known['size']} px in {known['z_bins']} bins, the factory {config.image_size} px in {config.z_bins}; "
            f"run `fedfactory prepare --size {config.image_size} --z-bins {config.z_bins}` there"
        )
    return None
