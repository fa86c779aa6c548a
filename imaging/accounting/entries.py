"""The entries of a folder and its subfolders, found in one walk that opens no file."""

from __future__ import annotations

import os
import stat
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from ..case_files import ARCHIVE_EXTRAS, SYSTEM_FOLDERS, link_to_nothing

STORE_FILES = {"store.json", "format.json"}  # a folder with both is a slice store
MAX_ENTRIES = 1_000_000  # somebody gave a whole disk
SPECIAL = (
    (stat.S_ISFIFO, "a pipe, no regular file"),
    (stat.S_ISSOCK, "a socket, no regular file"),
    (stat.S_ISCHR, "a device, no regular file"),
    (stat.S_ISBLK, "a device, no regular file"),
)


@dataclass(frozen=True)
class Entry:
    """A file, or a folder into which the walk did not go.

    Attributes:
        path: absolute; its links are not resolved.
        passed_over: why the entry is recognised and left alone; "" if it is not.
        unusable: why nobody could read the entry; "" for an ordinary file.
    """

    path: str
    passed_over: str = ""
    unusable: str = ""


def entries_of(folder: str, *, used: Collection[str] = (), known: Mapping[str, str] | None = None) -> list[Entry]:
    """The entries below a folder, each once, in no certain order.

    Hidden folders, links to folders, and slice stores are one entry each, unless files of cases lie in them. A folder
    that is empty, or cannot be read, is an entry too. Links never lead the walk in circles.

    Args:
        folder: absolute path.
        used: absolute paths of files of cases.
        known: absolute paths of files and folders that are recognised already, each with the reason.
    """
    needed, known = _folders_above(used), known or {}
    found: list[Entry] = []
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        if len(found) > MAX_ENTRIES and place not in needed:
            found.append(Entry(place, unusable=f"a folder that nobody looked into, after {MAX_ENTRIES} entries"))
            continue
        try:
            with os.scandir(place) as scanned:
                children = list(scanned)
        except OSError as error:
            found.append(Entry(place, unusable=f"a folder that cannot be read ({error.strerror}); check permissions"))
            continue
        inner = place != folder
        if inner and not children:
            found.append(Entry(place, unusable="an empty folder"))
        elif inner and place not in needed and {child.name for child in children} >= STORE_FILES:
            found.append(Entry(place, passed_over="a slice store"))
        else:
            for child in children:
                entry = _entry(child, needed=needed, known=known)
                if entry is None:
                    waiting.append(child.path)
                else:
                    found.append(entry)
    return found


def _entry(child: os.DirEntry[str], *, needed: Collection[str], known: Mapping[str, str]) -> Entry | None:
    """The entry of a folder's child; None for a folder whose children are entries of their own."""
    path, hidden = child.path, child.name.startswith(".")
    if (reason := known.get(path)) is not None and path not in needed:
        return Entry(path, passed_over=reason)
    try:
        if child.is_symlink():
            return _link(child, needed=needed)
        if child.is_dir(follow_symlinks=False):
            if path in needed:
                return None
            if hidden:
                return Entry(path, passed_over="hidden")
            if child.name in ARCHIVE_EXTRAS:
                return Entry(path, passed_over="what macOS adds to archives")
            if child.name in SYSTEM_FOLDERS:
                return Entry(path, passed_over="a folder of the operating system or the storage")
            return None
        if child.is_file(follow_symlinks=False):
            return Entry(path, passed_over="hidden" if hidden else "")
        mode = child.stat(follow_symlinks=False).st_mode
    except OSError as error:
        return Entry(path, unusable=f"cannot be read ({error.strerror})")
    return Entry(path, unusable=next((text for test, text in SPECIAL if test(mode)), "no regular file"))


def _link(child: os.DirEntry[str], *, needed: Collection[str]) -> Entry | None:
    path = child.path
    if (reason := link_to_nothing(path)) is not None:
        return Entry(path, unusable=reason)
    if not child.is_dir():
        if child.is_file():
            return Entry(path, passed_over="hidden" if child.name.startswith(".") else "")
        return Entry(path, unusable="a link to no regular file")
    target, own = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    if os.path.commonpath([target, own]) == target:
        return Entry(path, passed_over="a link to a folder above it")
    return None if path in needed else Entry(path, unusable="a link to a folder in which no case was found")


def _folders_above(paths: Iterable[str]) -> set[str]:
    """All folders in which these paths lie."""
    found: set[str] = set()
    for path in paths:
        above = os.path.dirname(path)
        while above not in found:
            found.add(above)
            above = os.path.dirname(above)
    return found
