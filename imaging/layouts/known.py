"""The layouts of volumes that are known, in the order in which they are tried."""

from __future__ import annotations

from pathlib import Path

from ...errors import UsageError
from ..case_files import Found
from .bids import find_bids
from .class_files import find_class_files
from .named_files import find_named
from .wanted import Wanted

LAYOUTS = (find_bids, find_named, find_class_files)


def find_known(source: Path, wanted: Wanted, *, mask_key: str | None = None) -> Found | None:
    """The cases of a data set in a known layout; None if the folder is none.

    Args:
        source: the data set, a part of it, or one case.
        wanted: which of its files.
        mask_key: as in `find_cases`; these layouts have no such masks.

    Raises: UsageError if something must be chosen, or the chosen is not there.
    """
    for find in LAYOUTS:
        found = find(source, wanted)
        if found is not None and (found.cases or found.problems):
            if mask_key is not None:
                raise UsageError(
                    f"mask_key is '{mask_key}', but {source} is a data set without such a folder; use None"
                )
            return found
    return None
