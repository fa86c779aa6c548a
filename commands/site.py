"""What the administrator of a site's node types: `fedfactory site ...` registers data, approves plans, and checks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .. import __version__
from ..adaptation.network_names import ARCHITECTURES, NETWORK_SIZES, SITE_NETWORKS, check_modality
from ..errors import UsageError
from ..node.connection.component import NODE, require_component
from ..node.store_index import require_store
from .options import NodeFolder, ProbeTimeout, Store, Tag, listed, one_of
from .site_clean import site_clean
from .site_ledger import site_ledger
from .site_policy import site_policy
from .terminal import Commands, console, key_and_value, print_checks, quiet_framework

commands = Commands(
    help="Register data, set what may be asked for, approve training plans and check the connection at a node.",
    no_args_is_help=True,
)
commands.command("policy")(site_policy)
commands.command("ledger")(site_ledger)
commands.command("clean")(site_clean)


@commands.command("add")
def site_add(
    node_dir: NodeFolder,
    store: Store,
    tag: Tag,
    network: Annotated[
        str,
        typer.Option(
            callback=one_of(("", *SITE_NETWORKS)),
            help=f"For hssf: the site's own network, {listed(ARCHITECTURES)}, or one with a size "
            f"({listed(NETWORK_SIZES)}), as in segresnet-large; default: the researcher's.",
        ),
    ] = "",
    public: Annotated[
        Path | None, typer.Option(help="For hssf: slice store that the researcher and all sites have.")
    ] = None,
    modality: Annotated[
        str, typer.Option(help="For cmc: modality of the store, named by the same word at all sites.")
    ] = "",
    other: Annotated[
        list[str] | None, typer.Option(help="For cmc: MODALITY=STORE, a further store of this site; may be repeated.")
    ] = None,
    class_names: Annotated[
        bool, typer.Option("--class-names/--no-class-names", help="Announce the names of the store's classes.")
    ] = True,
) -> None:
    """Register a slice store with a Fed-BioMed node, which must run approved plans only.

    A node without a policy gets the default one, see `fedfactory site policy`.
    """
    others: dict[str, str] = {}
    for word in other or []:
        name, path = key_and_value("other", word, "MODALITY=STORE")
        if name in (modality, *others):
            raise UsageError(f"other is '{word}', but modality '{name}' has a store already; give each modality once")
        others[name] = str(Path(path).resolve())
    if others and not modality:
        raise UsageError(f"other is '{other[0]}'; give `modality` for the store itself too")
    for name in filter(None, (modality, *others)):
        check_modality(name)

    for path in (store, public, *others.values()):
        require_store(path)
    require_component(node_dir, NODE)

    from ..node.policy.policy import policy_file
    from ..node.site_check import proxy_in_the_way  # only now: slow to import
    from ..node.site_choices import SiteChoices
    from ..node.sites import add_store
    from ..node.store.slice_store import SliceStore

    quiet_framework()
    shared = "" if public is None else str(public.resolve())
    choices = SiteChoices(
        network=network, public=shared, modality=modality, others=others, announce_class_names=class_names
    )
    is_new = not policy_file(node_dir).exists()
    was_open = add_store(node_dir, store, tag, choices=choices)
    if was_open:
        console.print(
            f"{node_dir}: runs approved plans only from now on, by its etc/config.ini; restart it if it runs",
            markup=False,
        )
    console.print(f"{node_dir}: offers {store} under tag '{tag}'")
    if class_names and (names := SliceStore(store).class_names):
        shown = ", ".join(names.values())
        console.print(f"{node_dir}: announces the names of its classes ({shown}); --no-class-names keeps them")
    if is_new:
        console.print(f"{policy_file(node_dir)}: the default policy; read it before the node starts", markup=False)
    if proxy := proxy_in_the_way(node_dir):
        console.print(f"warning: {proxy}", markup=False)


@commands.command("approve")
def site_approve(
    node_dir: NodeFolder,
    yes: Annotated[bool, typer.Option("--yes", help="Approve without a question; the source is shown anyway.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a training plan to arrive.")] = 0,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="List the SHA-256 of every module that the plan may call.")
    ] = False,
) -> None:
    """Show the source of the training plans that wait at a node, and approve them."""
    require_component(node_dir, NODE)

    from ..node.protection.package_digest import digest_of_all, package_fingerprint
    from ..node.sites import approve_plans

    quiet_framework()
    files = package_fingerprint()

    def confirm(name: str, source: str) -> bool:
        console.rule(name)
        console.print(source, markup=False)
        console.rule("the package that the plan calls")
        summary = f"fedfactory {__version__}, {len(files)} modules, SHA-256 of all {digest_of_all(files)}"
        console.print(summary, markup=False)
        if hashes:
            for path, digest in files.items():
                console.print(f"{digest}  {path}", markup=False)
        return yes or typer.confirm("Approve this training plan?")

    approved = approve_plans(node_dir, confirm=confirm, wait=wait)
    console.print(f"{node_dir}: approved {', '.join(approved) or 'nothing; the plan remains pending'}")


@commands.command("check")
def site_check(
    node_dir: NodeFolder,
    timeout: ProbeTimeout = 3,
) -> None:
    """Look at all that a node needs: the way to the researcher, certificates, proxies, approval, policy, stores,
    disk, clock.

    Nothing is changed. The exit code is 1 if there is a problem.
    """
    require_component(node_dir, NODE)

    from ..node.site_check import check_site

    print_checks(check_site(node_dir, timeout=timeout))
