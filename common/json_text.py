"""Parsing JSON of unknown origin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text. Raises: ValueError for everything that is none, endless nesting included."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path) -> Any:
    """The content of a JSON file in UTF-8. Raises: OSError if it cannot be read, ValueError if it is no JSON."""
    return parse_json(path.read_text(encoding="utf-8"))
