"""Entries of folders, as layouts look at them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..case_files import Unusable
from ..volume_files import is_volume

NO_DATA = ("__macosx",)  # what programs leave behind


def entries(folder: Path) -> list[Path]:
    """Entries of a folder, sorted; nothing if there is no such folder. Raises: Unusable if it cannot be read."""
    try:
        return sorted(folder.iterdir()) if os.path.isdir(folder) else []
    except OSError as error:
        raise Unusable(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones. Raises: Unusable if it cannot be read."""
    if not os.path.isdir(folder):
        return []
    try:
        with os.scandir(folder) as scanned:  # does not ask for every file what it is
            return sorted(folder / entry.name for entry in scanned if not entry.name.startswith(".") and entry.is_dir())
    except OSError as error:
        raise Unusable(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None


def volumes(folder: Path) -> list[Path]:
    """The files of a folder that are volumes by their names."""
    return [path for path in entries(folder) if is_volume(path)]


def folders_below(source: Path, depth: int) -> Iterator[Path]:
    """The folder itself and the folders below it that can be read, `depth` levels deep, parents first."""
    yield source
    if depth < 1:
        return
    try:
        inner = [path for path in folders(source) if path.name.lower() not in NO_DATA]
    except Unusable:  # named by those who need the folder
        return
    for folder in inner:
        yield from folders_below(folder, depth - 1)


def volumes_of(folder: Path) -> list[Path]:
    """As `volumes`; nothing of a folder that cannot be read."""
    try:
        return volumes(folder)
    except Unusable:
        return []
