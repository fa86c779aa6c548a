"""Whether a folder is a slice store, which a command asks before it loads the libraries that read one."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError

INDEX = "store.json"


def require_store(path: str | Path | None) -> None:
    """Raises UsageError if there is no slice store at `path`. None passes: an option that was left out."""
    if path is not None and not (Path(path) / INDEX).is_file():
        raise UsageError(f"{path}: no slice store here ({INDEX} is missing); make one with `fedfactory prepare`")
