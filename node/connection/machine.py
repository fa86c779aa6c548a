"""What a component needs of its machine: versions, disk space, a clock that can be right."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path

from ... import __version__
from .check import PROBLEM, WARNING, Check

PACKAGES = ("fedbiomed", "torch")
GIB = 2**30
LOW_DISK, SHORT_DISK = GIB, 5 * GIB  # bytes; states of a node and checkpoints of a researcher take hundreds of MiB
PLAUSIBLE_SINCE = 1_704_067_200  # 2024-01-01, before Fed-BioMed 6 was written
CLOCK_TOLERANCE = 300  # seconds that a file may be newer than the clock; some file servers have clocks of their own


def check_versions(elsewhere: Iterable[tuple[str, str]] = ()) -> Check:
    """Versions of this package and of what it runs on.

    Args:
        elsewhere: where another version of fedfactory is known from, such as "the store with tag 'brains' was
            registered by", and that version.
    """
    found, missing = [f"fedfactory {__version__}"], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    text = ", ".join([*found, f"Python {platform.python_version()}"])
    if missing:
        return Check(
            name="versions",
            state=PROBLEM,
            found=f"{text}; {', '.join(missing)} is not installed",
            remedy="install fedfactory again in this environment",
        )
    wanted, present = _required("fedbiomed"), importlib.metadata.version("fedbiomed")
    if wanted and present != wanted:
        remedy = f"pip install fedbiomed=={wanted}, at all sites"
        return Check(
            name="versions", state=PROBLEM, found=f"{text}; this package needs fedbiomed {wanted}", remedy=remedy
        )
    others = [f"{where} fedfactory {version}" for where, version in elsewhere if version != __version__]
    if others:
        return Check(
            name="versions",
            state=WARNING,
            found=f"{text}; {'; '.join(others)}",
            remedy="all machines need the same version; after an update, start the node again and register its stores",
        )
    return Check(name="versions", found=text)


def check_disk(folders: Iterable[Path]) -> Check:
    """Free space where a component writes: the fullest of the folders' file systems counts."""
    space = {folder: shutil.disk_usage(folder) for folder in folders if folder.is_dir()}
    folder = min(space, key=lambda path: space[path].free)
    free, total = space[folder].free, space[folder].total
    found = f"{free / GIB:.1f} of {total / GIB:.0f} GiB free for {folder}"
    remedy = "delete what is not needed; a round that cannot write its state fails"
    if free < SHORT_DISK:
        return Check(name="disk", state=PROBLEM if free < LOW_DISK else WARNING, found=found, remedy=remedy)
    return Check(name="disk", found=found)


def check_clock(files: Iterable[Path], now: float | None = None) -> Check:
    """Whether the clock can be right: not before this version was written, and not before the component's own files.

    No other clock is asked. That of the researcher shows only if its certificate is not valid yet.

    Args:
        files: files that this machine wrote earlier; those that are missing do not count.
        now: seconds since 1970; default: the clock.
    """
    now = time.time() if now is None else now
    text, remedy = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now)), "set the clock; certificates depend on it"
    if now < PLAUSIBLE_SINCE:
        return Check(name="clock", state=PROBLEM, found=f"{text} is in the past", remedy=remedy)
    newest = max(((path.stat().st_mtime, path) for path in files if path.is_file()), default=(0.0, Path()))
    if newest[0] > now + CLOCK_TOLERANCE:
        found = f"{text} is {(newest[0] - now) / 3600:.1f} h before {newest[1]} was written"
        return Check(name="clock", state=WARNING, found=found, remedy=remedy)
    return Check(name="clock", found=f"{text}, plausible (no other clock is asked)")


def _required(package: str) -> str:
    """The one version of a package that this package's metadata ask for; empty without any."""
    try:
        lines = importlib.metadata.requires("fedfactory") or []
    except importlib.metadata.PackageNotFoundError:  # runs from a source tree
        return ""
    found = [re.fullmatch(rf"{package}(?:\[[^]]*\])?\s*==\s*([\w.]+)", line.split(";")[0].strip()) for line in lines]
    return next((match[1] for match in found if match), "")
