"""What anybody types to see the whole: `fedfactory demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..common.files import refuse_existing
from ..generative.config import PRESETS
from .options import Seed, one_of
from .terminal import Commands, console

commands = Commands()
COLUMNS = ("no_adaptation", "augmentation_only", "adapted", "oracle")


@commands.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="New folder for all files; default: fedfactory-demo-N.")] = None,
    sites: Annotated[int, typer.Option(min=2, max=3, help="Number of hospitals; the first has labels.")] = 3,
    seed: Seed = 0,
    preset: Annotated[
        str, typer.Option(callback=one_of(PRESETS), help="Size of the factory: tiny (8 minutes) or small.")
    ] = "tiny",
) -> None:
    """Run both phases on this machine and write a report.

    A Fed-BioMed researcher and a node per hospital run as local processes, on simulated subjects. The report compares
    the Dice scores of segmenters with and without adaptation.
    """
    if out is not None:
        refuse_existing(out)
    with console.status("loading"):
        from ..demo.demo import run_demo

    result = run_demo(out, sites=sites, seed=seed, preset=preset)
    table = Table("site", *(column.replace("_", " ") for column in COLUMNS), title="mean foreground Dice")
    for name, row in result.dice.items():
        table.add_row(name, *(f"{row[column]:.3f}" for column in COLUMNS))
    console.print(table)
    for what, path in result.files.items():
        console.print(f"{what:<18} {path}")
    console.print(f"{'seconds':<18} {result.seconds:.0f}")
