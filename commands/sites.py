"""`fedfactory sites`: what the connected sites announce, whether they agree, and which methods fit them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..node.connection.component import RESEARCHER, require_component
from .options import NodeTimeout, Researcher, Tag
from .terminal import console, quiet_framework

if TYPE_CHECKING:
    from ..node.site_facts import SiteFacts
    from ..researcher.segmenting.survey import Survey

DIGITS = 8  # of the SHA-256 of public slices


def sites(
    researcher: Researcher,
    tag: Tag,
    min_nodes: Annotated[int | None, typer.Option(min=1, help="Number of nodes to wait for; default: one.")] = None,
    node_timeout: NodeTimeout = 60,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for other tools.")] = False,
) -> None:
    """Show what connected sites announce, whether they agree, and which methods of `train-segmenter` fit them.

    Nothing is trained and nothing is asked but the descriptions under which the sites registered their stores.
    The exit code is 1 if the sites do not agree.
    """
    require_component(researcher, RESEARCHER)

    from ..researcher.node_selection import NodeSelection  # only now: slow to import
    from ..researcher.segmenting.survey import ask_sites

    quiet_framework()
    survey = ask_sites(researcher, NodeSelection(tag=tag, min_nodes=min_nodes, node_timeout=node_timeout))
    if as_json:
        print(json.dumps(survey.to_dict(), indent=2))
    else:
        _print_survey(survey)
    if not survey.agree:
        raise typer.Exit(1)


def _print_survey(survey: Survey) -> None:
    from ..adaptation.methods.recommendation import SITUATIONS

    table = Table("site", "", "")
    for node, facts in survey.sites.items():
        rows = described(facts)
        for number, (name, value) in enumerate(rows.items(), start=1):
            shown = Text(node, style="bold") if number == 1 else ""
            table.add_row(shown, name, value, end_section=number == len(rows))
    for node in survey.unreadable:
        table.add_row(Text(node, style="bold"), "", "its data were not registered by this version", end_section=True)
    console.print(table)
    for node in survey.unreadable:
        console.print(f"problem: {node} must run `fedfactory site add` again", style="bold red")
    for found in survey.disagreements:
        console.print(f"problem: {found.text}", style="bold red")
    for remark in survey.remarks:
        console.print(f"remark: {remark}", style="yellow")
    if not survey.sites:
        return
    console.print("The sites agree." if survey.agree else "The sites do not agree: nothing can be trained as they are.")
    console.print(SITUATIONS[survey.situation].says)
    methods = Table("method", "fits", "")
    for method in survey.methods:
        methods.add_row(Text(method.name, style="bold"), "yes" if method.fits else "no", method.reason)
    console.print(methods)


def described(facts: SiteFacts) -> dict[str, str]:
    """The rows that are shown of a site: name to text."""
    channels = "colour" if facts.colour else f"{facts.channels} channel{'s' if facts.channels > 1 else ''}"
    size = [f"{facts.size} px", *([f"{facts.spacing:.3g} mm per pixel"] if facts.spacing is not None else []), channels]
    patients = "" if facts.patients is None else f" of {facts.patients} patients"
    rows = {
        "domain": facts.domain,
        "slices": f"{facts.slices}{patients}: {', '.join(size)}",
        "labels": _counted(facts.label_kinds),
        "pseudo-labels": f"{facts.pseudo_labels} slices, by a segmenter: no annotations" if facts.pseudo_labels else "",
        "classes": _classes(facts),
        "network": facts.network or "",
        "modalities": "; ".join(f"{name}: {_counted(part.label_kinds)}" for name, part in facts.modalities.items()),
        "public slices": f"SHA-256 {facts.public_digest[:DIGITS]}..." if facts.public_digest else "",
        "version": facts.version,
    }
    return {name: value for name, value in rows.items() if value}


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"


def _classes(facts: SiteFacts) -> str:
    if facts.classes < 2:
        return ""
    names = ", ".join(f"{label} {name}" for label, name in facts.class_names.items())
    return f"{facts.classes}, background included{f' ({names})' if names else ''}"
