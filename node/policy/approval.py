"""Whether a node runs nothing but what its administrator has approved, and how to make it so."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from ...common.files import atomic_file
from ...errors import UsageError
from ..connection.component import APPROVAL, DEFAULT_PLANS, NODE, Component, read_component

SECTION = "security"
WANTED = {"training_plan_approval": "True", "allow_default_training_plans": "False"}  # as lines of config.ini


def approval_problem(node: Component) -> str:
    """What is wrong with a node's approval of training plans, without a full stop; empty if it is as it must be.

    Environment variables that override the node's file count, as they do for Fed-BioMed, see `read_component`.
    """
    if not node.is_on(APPROVAL):
        return "off: this node runs what a researcher sends, unread"
    if node.is_on(DEFAULT_PLANS):
        return "on, but Fed-BioMed's example plans count as approved"
    return ""


def refuse_without_approval(root: str | Path, environment: Mapping[str, str] | None = None) -> None:
    """Make sure that a node runs nothing but what its administrator has approved.

    Args:
        root: folder of the node.
        environment: of the process that runs the node; None: of this process.

    Raises: UsageError with the lines to set, and the variables to take away; also if there is no node.
    """
    node = read_component(root, NODE, environment)
    if not (problem := approval_problem(node)):
        return
    variables = [
        name for name in map(_variable, WANTED) if name in (os.environ if environment is None else environment)
    ]
    overriding = f"; unset {' and '.join(variables)}, which override the file" if variables else ""
    lines = " and ".join(f"`{name} = {value}`" for name, value in WANTED.items())
    raise UsageError(
        f"{node.root}: approval of training plans is {problem}; set {lines} below [{SECTION}] in {node.config}"
        f"{overriding}; restart the node afterwards"
    )


def turn_approval_on(root: str | Path) -> None:
    """Write both settings into a node's configuration; all other lines stay as they are.

    Raises: UsageError if there is no node, or if its configuration cannot be used.
    """
    config = read_component(root, NODE).config
    kept, section, place = [], "", None
    for line in config.read_text(encoding="utf-8").splitlines():
        if found := re.match(r"\[([^\]]+)\]", line):
            section = found[1]
        key = re.split(r"[=:]", line, maxsplit=1)[0].strip().lower()
        if section == SECTION and key in WANTED:
            continue
        kept.append(line)
        if found and section == SECTION:
            place = len(kept)
    if place is None:
        kept.append(f"[{SECTION}]")
        place = len(kept)
    kept[place:place] = [f"{name} = {value}" for name, value in WANTED.items()]
    with atomic_file(config) as temporary:
        temporary.write_text("\n".join(kept) + "\n", encoding="utf-8")


def _variable(name: str) -> str:
    """The environment variable that overrides a setting of the section."""
    return f"FBM_{SECTION}_{name}".upper()
