"""Cases that stand in each other's way: two of one name, one under two names, and links that lead nowhere."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

from ..case_files import CaseFiles, Found, link_to_nothing, printable
from .recognised import passed_over


def set_apart(source: Path, found: Found) -> None:
    """Leave out cases whose names are not unique, use a case once that is there under several names, and name links.

    Changes `found`: a case of which there are two becomes a problem, for which of them is meant nobody can know. A case
    that a link shows a second time is passed over. A link to nothing in the place of a case is a problem.

    Args:
        source: the folder that was searched.
        found: in it.
    """
    by_name: dict[str, list[CaseFiles]] = defaultdict(list)
    for case in _without_links(found):
        by_name[case.name].append(case)
    found.cases = [cases[0] for cases in by_name.values() if len(cases) == 1]
    for name, cases in by_name.items():
        if len(cases) > 1:
            places = [str(case.files[0]) for case in cases]
            found.problems[name] = f"{' and '.join(places)}: have the same name; keep one of them, or rename one"
    used = {str(path) for case in found.cases for path in case.files}
    with os.scandir(source) as children:
        for child in children:
            name = printable(child.name)
            if child.name.startswith(".") or not child.is_symlink() or child.path in used or name in found.problems:
                continue
            reason = link_to_nothing(child.path)
            if reason is not None and passed_over(child.name) is None:
                found.problems[name] = f"{child.path}: is {reason}; connect the share or repair the link"


def _without_links(found: Found) -> list[CaseFiles]:
    """The cases without those whose image is that of another case, which a link shows a second time."""
    by_file: dict[str, list[CaseFiles]] = defaultdict(list)
    for case in found.cases:
        path = case.files[0]
        # Several links to the same nothing are as many cases that cannot be read.
        by_file[os.path.realpath(path) if os.path.exists(path) else os.path.abspath(path)].append(case)
    kept = []
    for real, cases in by_file.items():
        first = min(cases, key=lambda case: (os.path.abspath(case.files[0]) != real, case.name))
        for case in cases:
            if case.files[0] == first.files[0]:  # several cases may be cut from one file
                kept.append(case)
            else:
                reason = f"a link to what is used as {first.name}"
                found.passed_over |= dict.fromkeys(set(case.files) - set(first.files), reason)
    return kept
