"""What the study lead types to follow a run: its state on the terminal, as a page, as a file."""

from __future__ import annotations

import os
import sys
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ..common.files import refuse_existing
from .terminal import console, print_alarms

Run = Annotated[
    Path, typer.Argument(metavar="EXPERIMENT", help="Folder that `fedfactory train` or `train-segmenter` writes.")
]


def status(experiment: Run) -> None:
    """Show a run's progress, the newest numbers of domains or sites, and the rounds without a site."""
    from ..researcher.watching.run_facts import gather

    facts = gather(experiment)
    console.print(f"{experiment}: {facts.progress}", markup=False)
    for content, caption in ((facts.sites, None), (facts.numbers, facts.note or None)):
        table = Table(*content.head, caption=caption)
        for row in content.rows:
            table.add_row(*row)
        console.print(table)
    for pair, score in facts.shared_anatomy.items():
        console.print(f"anatomy shared by {pair}: {score:.2f} (0 is chance, 1 is all)", markup=False)
    print_alarms(facts.alarms)
    for entry in facts.missed:
        console.print(f"{entry.rounds}: {entry.site} {entry.kind}: {entry.reason}", markup=False)


def watch(
    experiment: Run,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of this machine to serve on; 0: a free one.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
) -> None:
    """Serve a page that shows a run while it goes on, to browsers of this machine alone; Ctrl-C ends it."""
    from ..researcher.watching.run_server import RunServer

    with RunServer(experiment, port) as server:
        console.print(f"{server.address}  (Ctrl-C ends)", markup=False)
        # Without a screen, Python would open a text browser in this terminal.
        if browser and (sys.platform in ("darwin", "win32") or {"DISPLAY", "WAYLAND_DISPLAY"} & os.environ.keys()):
            webbrowser.open(server.address)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


def report(
    experiment: Run,
    out: Annotated[Path | None, typer.Option(help="HTML file to write; default: report.html in the folder.")] = None,
) -> None:
    """Write the page of a run as one file, for the record; `train` and `train-segmenter` do so at their end."""
    if out is not None:
        refuse_existing(out)
    print_report(experiment, out)


def print_report(experiment: Path, out: Path | None = None) -> None:
    """Write the page of a run and print where it is."""
    from ..researcher.watching.run_page import write_report

    console.print(f"report: {write_report(experiment, out)}", markup=False)
