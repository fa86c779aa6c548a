"""Parsing JSON of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes, *, unique: bool = False) -> Any:
    """The content of a JSON text.

    Args:
        text: JSON.
        unique: whether a name may stand in an object once only; otherwise the last one counts.

    Raises: ValueError for everything that is no JSON, endless nesting included, and for a repeated name.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, *, unique: bool = False) -> Any:
    """The content of a JSON file in UTF-8. Raises: OSError if it cannot be read, ValueError as `parse_json`."""
    return parse_json(path.read_text(encoding="utf-8"), unique=unique)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises: ValueError if a name is repeated."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{repeated!r} stands there twice")
    return found
