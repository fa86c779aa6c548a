"""`fedfactory site clean NODE`: shows what a node keeps of experiments, and removes what is over."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError, one_line
from .options import NodeFolder
from .terminal import console

if TYPE_CHECKING:
    from ..node.states.states import ExperimentStates

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
    from ..node.connection.running_nodes import running_nodes
    from ..node.states.states import DAY, leftovers_of_killed_nodes, states_of

    runs = any(node.root == Path(node_dir).resolve() for node in running_nodes())
    if everything and runs:
        raise UsageError(f"{node_dir}: the node runs; stop it before all states are removed")
    kept = states_of(node_dir)
    over = [one for one in kept if everything or (one.age is not None and one.age >= older_than * DAY)]
    leftovers = [] if runs else leftovers_of_killed_nodes(node_dir)
    _print_table(kept, over, DAY)
    if leftovers:
        console.print(f"left by killed processes: {len(leftovers)} temporary files or folders", markup=False)
    orphans = sum(one.orphans for one in kept if one not in over)
    if not over and not leftovers and not orphans:
        console.print(f"{node_dir}: nothing to remove", markup=False)
        return
    if not yes and not typer.confirm(
        f"Remove {len(over)} experiments, {orphans} unused and {len(leftovers)} temporary files?"
    ):
        return
    _remove(node_dir, over, leftovers=bool(leftovers))


def _remove(node_dir: Path, over: list[ExperimentStates], *, leftovers: bool) -> None:
    from ..node.states.states import Removed, remove_experiment, remove_leftovers, remove_orphans

    removed = sum((remove_experiment(node_dir, one.experiment_id) for one in over), Removed())
    removed += remove_orphans(node_dir)
    number = remove_leftovers(node_dir) if leftovers else 0
    console.print(
        f"{node_dir}: removed {removed.rows} states, {removed.files} files ({removed.bytes / MIB:.1f} MiB) and "
        f"{number} temporary files",
        markup=False,
    )


def _print_table(kept: list[ExperimentStates], over: list[ExperimentStates], day: float) -> None:
    names = {one.experiment_id: one_line(one.experiment_id)[:80] for one in kept}
    width = max([len("experiment"), *map(len, names.values())])
    console.print(f"{'experiment':<{width}}  states      MiB  unused files  days ago", markup=False)
    for one in kept:
        age = "unknown" if one.age is None else f"{one.age / day:.1f}"
        size = f"{one.bytes / MIB:>7.1f}"
        line = f"{names[one.experiment_id]:<{width}}  {one.states:>6}  {size}  {one.orphans:>12}  {age:>8}"
        console.print(line + ("  over" if one in over else ""), markup=False)
    total = sum(one.bytes for one in kept) / MIB
    console.print(f"experiments: {len(kept)}, kept between rounds: {total:.1f} MiB", markup=False)
