"""`fedfactory site clean NODE`: shows what a node keeps of experiments, and removes what is over."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError, one_line
from ..node.connection.running_nodes import running_nodes
from ..node.states.states import (
    DAY,
    ExperimentStates,
    Removed,
    leftovers_of_killed_nodes,
    remove_experiment,
    remove_leftovers,
    remove_orphans,
    states_of,
)
from .options import NodeFolder
from .terminal import console

MIB = 2**20


def site_clean(
    node_dir: NodeFolder,
    older_than: Annotated[
        int, typer.Option("--older-than", min=1, help="Days since an experiment's last round, from which it is over.")
    ] = 30,
    everything: Annotated[
        bool, typer.Option("--all", help="Remove the states of all experiments; the node must not run.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Remove without a question.")] = False,
) -> None:
    """Show what a node keeps between rounds, and remove the states of experiments that are over.

    A run whose states are removed cannot be resumed with this site. Registered stores and approvals stay.
    """
    runs = any(node.root == Path(node_dir).resolve() for node in running_nodes())
    if everything and runs:
        raise UsageError(f"{node_dir}: the node runs; stop it before all states are removed")

    def is_over(one: ExperimentStates) -> bool:
        return everything or (one.age is not None and one.age >= older_than * DAY)

    kept = states_of(node_dir)
    over = [one for one in kept if is_over(one)]
    leftovers = [] if runs else leftovers_of_killed_nodes(node_dir)
    orphans = sum(one.orphans for one in kept if one not in over)
    _print_table(kept, over)
    if leftovers:
        console.print(f"left by killed processes: {len(leftovers)} temporary files or folders", markup=False)
    if not over and not leftovers and not orphans:
        console.print(f"{node_dir}: nothing to remove", markup=False)
        return
    question = f"Remove {len(over)} experiments, {orphans} unused files and {len(leftovers)} temporary ones?"
    if not yes and not typer.confirm(question):
        return
    chosen = {one.experiment_id for one in over}
    # Listed again: while a person read the question, an old run may have been resumed.
    still_over = [one for one in states_of(node_dir) if one.experiment_id in chosen and is_over(one)]
    removed = sum((remove_experiment(node_dir, one.experiment_id) for one in still_over), Removed())
    removed += remove_orphans(node_dir)
    number = remove_leftovers(node_dir) if leftovers else 0
    console.print(
        f"{node_dir}: removed {removed.rows} states, {removed.files} files ({removed.bytes / MIB:.1f} MiB) and "
        f"{number} temporary files",
        markup=False,
    )


def _print_table(kept: list[ExperimentStates], over: list[ExperimentStates]) -> None:
    names = {one.experiment_id: one_line(one.experiment_id)[:80] for one in kept}
    width = max([len("experiment"), *map(len, names.values())])
    console.print(f"{'experiment':<{width}}  states      MiB  unused files  days ago", markup=False)
    for one in kept:
        age = "unknown" if one.age is None else f"{one.age / DAY:.1f}"
        numbers = f"{one.states:>6}  {one.bytes / MIB:>7.1f}  {one.orphans:>12}  {age:>8}"
        mark = "  over" if one in over else ""
        console.print(f"{names[one.experiment_id]:<{width}}  {numbers}{mark}", markup=False)
    total = sum(one.bytes for one in kept) / MIB
    console.print(f"experiments: {len(kept)}, kept between rounds: {total:.1f} MiB", markup=False)
