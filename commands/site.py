"""`fedfactory site ...`: what the administrator of a node offers and approves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..errors import UsageError
from .terminal import console, quiet_framework

commands = typer.Typer(help="Register data and approve plans at a node.", no_args_is_help=True)


@commands.command("add")
def site_add(
    node_dir: Annotated[Path, typer.Argument(help="Folder of the Fed-BioMed node.")],
    store: Annotated[Path, typer.Option(help="Slice store made by `fedfactory prepare`.")],
    tag: Annotated[str, typer.Option(help="Tag by which the researcher finds the data.")],
    network: Annotated[
        str, typer.Option(help="For hssf: the site's own, unet, dynunet or segresnet; default the researcher's.")
    ] = "",
    public: Annotated[
        Path | None, typer.Option(help="For hssf: slice store that researcher and all sites have.")
    ] = None,
    modality: Annotated[str, typer.Option(help="For cmc: modality of the store, the same word at all sites.")] = "",
    other: Annotated[
        list[str] | None, typer.Option(help="For cmc: MODALITY=STORE, a further store of this site.")
    ] = None,
) -> None:
    """Register a slice store with a Fed-BioMed node."""
    from ..node.site_choices import SiteChoices
    from ..node.sites import add_store

    quiet_framework()
    others = {}
    for word in other or []:
        name, equals, path = word.partition("=")
        if not equals:
            raise UsageError(f"--other {word}: write MODALITY=STORE")
        others[name] = str(Path(path).resolve())
    shared = "" if public is None else str(public.resolve())
    choices = SiteChoices(network=network, public=shared, modality=modality, others=others)
    add_store(node_dir, store, tag, choices=choices)
    console.print(f"{node_dir}: offers {store} under tag '{tag}'")


@commands.command("approve")
def site_approve(
    node_dir: Annotated[Path, typer.Argument(help="Folder of the Fed-BioMed node.")],
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking; the source is still shown.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a plan to arrive.")] = 0,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="List the SHA-256 of every module the plan may call.")
    ] = False,
) -> None:
    """Show the source of the training plans that wait at a node, and approve them."""
    from ..node.sites import approve_plans, digest_of_all, package_fingerprint

    quiet_framework()
    files = package_fingerprint()

    def confirm(name: str, source: str) -> bool:
        console.rule(name)
        console.print(source, markup=False)
        console.rule("the package it calls")
        summary = f"fedfactory {__version__}, {len(files)} modules, SHA-256 of all {digest_of_all(files)}"
        console.print(summary, markup=False)
        if hashes:
            for path, digest in files.items():
                console.print(f"{digest}  {path}", markup=False)
        return yes or typer.confirm("Approve this training plan?")

    approved = approve_plans(node_dir, confirm=confirm, wait=wait)
    console.print(f"{node_dir}: approved {', '.join(approved) or 'nothing; the plan goes on waiting'}")
