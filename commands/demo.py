"""`fedfactory demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .terminal import Seed, console

commands = typer.Typer()


@commands.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="New folder for everything; default: fedfactory-demo-N.")] = None,
    sites: Annotated[int, typer.Option(min=2, max=3, help="Hospitals; the first one is labelled.")] = 3,
    seed: Seed = 0,
    preset: Annotated[str, typer.Option(help="Factory size: tiny (about 5 minutes) or small.")] = "tiny",
) -> None:
    """Both phases on this machine, with a report.

    Three real Fed-BioMed nodes and a researcher as local processes, simulated subjects, Dice tables.
    """
    with console.status("loading"):
        from ..demo.demo import run_demo

    result = run_demo(out, sites=sites, seed=seed, preset=preset)
    table = Table("site", "no adaptation", "augmentation only", "adapted", "oracle", title="mean foreground Dice")
    for name, row in result.dice.items():
        table.add_row(name, *(f"{row[k]:.3f}" for k in ("no_adaptation", "augmentation_only", "adapted", "oracle")))
    console.print(table)
    for what, path in result.files.items():
        console.print(f"{what:<18} {path}")
    console.print(f"{'seconds':<18} {result.seconds:.0f}")
