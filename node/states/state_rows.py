"""The rows of a node's database that describe its states between rounds, read and removed while the node runs.

Fed-BioMed keeps its tables in one JSON file (TinyDB), which each of its parts holds open and writes as a whole, in
place. So the file cannot be replaced by another one. TinyDB writes a shorter text and cuts the rest off afterwards: a
process that is killed in between leaves a file that is no JSON. Here the shorter text is filled up with spaces instead,
which JSON allows behind its end, so that there is nothing to cut off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UsageError

TABLE = "Node_states"
ATTEMPTS = 20  # to write, when another thread or process writes at the same time


@dataclass(frozen=True, kw_only=True)
class StateRow:
    """A row of the table.

    Attributes:
        number: of the row; a later row has a larger one.
        experiment_id: as the researcher gave it; not checked.
        state_id: as the node made it.
    """

    number: int
    experiment_id: str
    state_id: str


def state_rows(database: Path) -> list[StateRow]:
    """All rows, oldest first; none if there is no database yet. Raises: UsageError if it is damaged."""
    try:
        return _rows(_parsed(database.read_bytes(), database))
    except FileNotFoundError:
        return []


def remove_rows(database: Path, doomed: Callable[[list[StateRow]], Collection[StateRow]]) -> list[StateRow]:
    """Remove rows, and nothing else, in one write.

    Args:
        database: JSON file of the node.
        doomed: given all rows, oldest first, returns those to remove. It is called again if the file has changed
            meanwhile.

    Returns: the removed rows.
    Raises: UsageError if the database is damaged, or if others write it without a pause.
    """
    if not database.is_file():
        return []
    with database.open("r+b", buffering=0) as file:
        for _ in range(ATTEMPTS):
            before = _whole(file.fileno())
            content = _parsed(before, database)
            removed = list(doomed(_rows(content)))
            if not removed:
                return []
            for row in removed:
                del content[TABLE][str(row.number)]
            after = json.dumps(content).encode().ljust(len(before))
            if _whole(file.fileno()) == before:  # a row that another thread added meanwhile must not be lost
                _overwrite(file.fileno(), after)
                return removed
    raise UsageError(f"{database}: it is written without a pause; stop the node and try again")


def _whole(handle: int) -> bytes:
    return os.pread(handle, os.fstat(handle).st_size, 0)


def _overwrite(handle: int, content: bytes) -> None:
    """Without a wait for the disk: after a power cut, old rows without files are removed with the next ones."""
    done = 0
    while done < len(content):
        done += os.pwrite(handle, content[done:], done)


def _parsed(text: bytes, database: Path) -> dict[str, Any]:
    try:
        content = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        content = None
    table = content.get(TABLE, {}) if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(table, dict):
        raise UsageError(f"{database}: the node's database is damaged; put it back from a backup")
    return content


def _rows(content: dict[str, Any]) -> list[StateRow]:
    """Rows in their order. What is not a row as the framework writes it is left out, and so never removed."""
    rows = []
    for number, row in content.get(TABLE, {}).items():
        if number.isdecimal() and isinstance(row, dict):
            experiment_id, state_id = row.get("experiment_id"), row.get("state_id")
            if isinstance(experiment_id, str) and isinstance(state_id, str):
                rows.append(StateRow(number=int(number), experiment_id=experiment_id, state_id=state_id))
    return sorted(rows, key=lambda row: row.number)
