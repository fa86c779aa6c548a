"""`fedfactory site ledger`: what left a site, as a table, as a page, or as JSON, after the whole record was checked."""

from __future__ import annotations

from collections import deque
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import StoreError, UsageError
from ..node.connection.component import NODE, read_component
from .options import NodeFolder
from .terminal import console, errors

if TYPE_CHECKING:
    from ..node.ledger.ledger import Ledger
    from ..node.ledger.ledger_entry import Entry

SHOWN = 20  # entries of the table, unless another number is asked for
WIDTH = 40  # characters of a cell


def site_ledger(
    node_dir: NodeFolder,
    last: Annotated[
        int | None,
        typer.Option(min=0, help="Show this many of the newest entries, 0 for all. Default: 20; all as JSON."),
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--html", help="Write a page for the data protection officer to this file.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the entries as lines of JSON, for other tools.")
    ] = False,
) -> None:
    """Show what was asked of a site, what left it and what was refused, and check that the record is whole.

    The exit code is 1 if anything in the record was changed, removed or added.
    """
    from ..node.ledger.ledger import Ledger

    ledger = Ledger(node_dir)
    if not ledger.exists():
        read_component(node_dir, NODE)  # refuses a folder that is no node
        errors.print(f"{node_dir}: no ledger yet; nothing was asked of this node and nothing left it", markup=False)
    check = ledger.verify()
    if as_json:
        _print_json(ledger, last or 0)
    elif ledger.exists():
        _print_table(ledger, SHOWN if last is None else last)
    if page is not None:
        _write_page(ledger, page, _name(node_dir))
    if check.problem is not None:
        raise StoreError(f"{ledger.path}: line {check.line}: the ledger is not whole: {check.problem}")
    if not as_json and ledger.exists():
        for note in check.notes:
            console.print(f"note: {note}", markup=False)
        console.print(f"whole: {check.entries} entries, the last has the SHA-256 {check.last}", markup=False)


def _name(node_dir: Path) -> str:
    """What a node is called; the name of its folder if only the ledger was kept."""
    try:
        return read_component(node_dir, NODE).name or node_dir.resolve().name
    except UsageError:
        return node_dir.resolve().name


def _newest(ledger: Ledger, number: int) -> deque[Entry]:
    """The newest entries, all for 0."""
    return deque(ledger.entries(), maxlen=number or None)


def _print_json(ledger: Ledger, number: int) -> None:
    import json
    from dataclasses import asdict

    for entry in _newest(ledger, number) if number else ledger.entries():
        typer.echo(json.dumps(asdict(entry), sort_keys=True))  # ASCII: no sign of a researcher reaches a terminal


def _print_table(ledger: Ledger, number: int) -> None:
    rows = [("number", "time (UTC)", "event", "researcher", "experiment", "plan", "what")]
    rows += [_row(entry) for entry in _newest(ledger, number)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # lines are not broken, so that other tools find an entry on one
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        console.print("  ".join(cells).rstrip(), markup=False)


def _row(entry: Entry) -> tuple[str, ...]:
    """The cells of an entry, harmless to a terminal."""
    from ..node.ledger.ledger_page import shortened
    from ..node.ledger.ledger_summary import text_of

    who = (text_of(entry.facts, name) for name in ("researcher", "experiment", "plan"))
    cells = (entry.time[:19].replace("T", " "), entry.event, *who)
    return str(entry.number), *(shortened(cell, WIDTH) for cell in cells), shortened(_what(entry), 3 * WIDTH)


def _what(entry: Entry) -> str:
    """What an entry says beside who and when."""
    from ..node.ledger.ledger_page import counted, size_of
    from ..node.ledger.ledger_summary import LEFT, table_of, text_of, whole

    facts = entry.facts
    if entry.event in LEFT:
        numbers, withheld = table_of(facts.get("numbers")), facts.get("withheld")
        parts = [f"{size_of(whole(facts.get('bytes')))} of weights, {counted(len(numbers), 'number')}"]
        parts += [f"withheld: {', '.join(map(str, withheld))}"] if isinstance(withheld, list) and withheld else []
        parts += [f"epsilon spent: {facts['epsilon']:.3g}"] if isinstance(facts.get("epsilon"), (int, float)) else []
        return "; ".join(parts)
    if entry.event == "refused":
        reasons = facts.get("reasons")
        return "; ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons or "")
    if entry.event == "answered":
        return f"{text_of(facts, 'request')}: {facts.get('descriptions', '')}"
    return ", ".join(
        f"{name} {value}" for name, value in facts.items() if name not in ("researcher", "experiment", "plan")
    )


def _write_page(ledger: Ledger, path: Path, site: str) -> None:
    from ..common.html_pages import write_page
    from ..node.ledger.ledger_page import ledger_page

    parts = ledger_page(ledger.entries(), ledger.verify(), site=site, made=datetime.now(timezone.utc))
    write_page(path, f"What left {site}", parts)
    errors.print(f"{path}: written", markup=False)
