"""`fedfactory site policy`: what a node's administrator allows a researcher to ask for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..errors import UsageError
from .options import NodeFolder
from .terminal import console

if TYPE_CHECKING:
    from ..node.policy.policy import Policy


def site_policy(
    node_dir: NodeFolder,
    show: Annotated[bool, typer.Option("--show", help="Print the policy as a table; nothing is written.")] = False,
    check: Annotated[
        bool,
        typer.Option("--check", help="Say whether the file is right, and what it allows beyond the default."),
    ] = False,
) -> None:
    """Write a node's default policy if it has none, and say where it is. An existing policy is never overwritten.

    The exit code is 2 if the file is wrong.
    """
    from ..node.connection.component import NODE, read_component
    from ..node.policy.policy import EXPLANATIONS, Policy, policy_file

    if show and check:
        raise UsageError("`show` and `check` are given; give one of them")
    node, path = read_component(node_dir, NODE), policy_file(node_dir)
    if show or check:
        policy = Policy.load(node.root)
        if show:
            _print(policy)
        else:
            for sentence in policy.unusual():
                console.print(sentence, markup=False)
            console.print(f"{path}: valid, {len(policy.unusual())} unusual", markup=False)
    elif path.exists():
        Policy.load(node.root)
        console.print(f"{path}: the policy of this node; `--show` prints it", markup=False)
    else:
        Policy().save(node.root)
        console.print(f"{path}: written, {len(EXPLANATIONS)} settings with a sentence on each", markup=False)


def _print(policy: Policy) -> None:
    """Print a policy: its settings, what they mean, and the arguments that may be set."""
    from ..node.policy.arguments import described
    from ..node.policy.policy import EXPLANATIONS

    settings = asdict(policy)
    arguments = settings.pop("arguments")
    table = Table(box=None)
    for heading in ("setting", "value", "meaning"):
        table.add_column(heading, overflow="fold")
    for name, value in settings.items():
        table.add_row(name, "no limit" if value is None else json.dumps(value), EXPLANATIONS[name])
    console.print(table)
    table = Table(box=None)
    for heading in ("argument", "must be"):
        table.add_column(heading, overflow="fold")
    for name, limit in arguments.items():
        table.add_row(Text(name), Text(described(limit)))
    console.print(table)
