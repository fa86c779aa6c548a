"""Entries of folders, as layouts look at them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ..case_files import ARCHIVE_EXTRAS, SYSTEM_FOLDERS, Unusable, entries
from ..volume_files import is_volume

SKIPPED = (".", *ARCHIVE_EXTRAS, *SYSTEM_FOLDERS)  # beginnings of the names of folders that hold no data


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones. Raises: Unusable if it cannot be read."""
    if not os.path.isdir(folder):
        return []
    try:
        with os.scandir(folder) as scanned:  # does not ask for every file what it is
            found = [entry.name for entry in scanned if not entry.name.startswith(SKIPPED) and _is_folder(entry)]
            return sorted(folder / name for name in found)
    except OSError as error:
        raise Unusable(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder, or a link to one; not a link that leads in circles."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def volumes(folder: Path) -> list[Path]:
    """The files of a folder that are volumes by their names."""
    return [path for path in entries(folder) if is_volume(path)]


def only_volume(folder: Path) -> Path | None:
    """The volume of a folder that has one at most. Raises: Unusable if it has several."""
    found = volumes(folder)
    if len(found) > 1:
        raise Unusable(f"{folder}: holds {len(found)} volumes, expected one")
    return found[0] if found else None


def folders_below(source: Path, depth: int) -> Iterator[Path]:
    """The folder itself and the folders below it that can be read, `depth` levels deep, parents first."""
    yield source
    if depth < 1:
        return
    try:
        inner = folders(source)
    except Unusable:  # named by those who need the folder
        return
    for folder in inner:
        yield from folders_below(folder, depth - 1)


def volumes_of(folder: Path) -> list[Path]:
    """As `volumes`; nothing of a folder that cannot be read."""
    return [path for path in entries_of_any(folder) if is_volume(path)]


def entries_of_any(folder: Path) -> list[Path]:
    """As `entries`; nothing of a folder that cannot be read."""
    try:
        return entries(folder)
    except Unusable:
        return []
