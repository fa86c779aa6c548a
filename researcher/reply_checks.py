"""What a site's reply may hold: the researcher trusts no node with a share, a type or a text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as shortened
from typing import Any

from ..node.site_facts import MAX_COUNT, MAX_TEXT_LENGTH, SiteFacts

MAX_ENTRIES = 1000  # of a report; a site with 100 classes sends about 400
COUNTS = ("samples", "slices_")  # beginnings of the names of numbers that count slices


@dataclass(frozen=True)
class Announced:
    """What a site announced when the experiment began, which its replies must not contradict.

    Attributes:
        domain: of the site's images.
        slices: number of its training slices, of all its modalities.
    """

    domain: str
    slices: int

    @classmethod
    def by(cls, facts: SiteFacts) -> Announced:
        """The announcement within the facts of a registered store."""
        return cls(facts.domain, max(facts.slices, sum(part.slices for part in facts.modalities.values())))


def problem_of_reply(
    reply: Mapping[str, Any],
    announced: Announced | None = None,
    *,
    required: Sequence[str] = (),
) -> str | None:
    """Why the numbers and texts of a successful reply cannot be used; None if they can.

    Args:
        reply: from a node: `sample_size`, the number of slices, and `optimizer_args`, the report of its training plan:
            texts, and numbers, of which NaN means not measured.
        announced: by the site; None where that is not known.
        required: names of entries that the report must have.

    Returns: one line without line breaks, of bounded length.
    """
    size = reply.get("sample_size")
    if not _is_count(size) or size < 1:
        return f"claims {shortened(size)} training slices; it must be a whole number from 1"
    if announced is not None and size > announced.slices:
        return f"claims {size} training slices, and announced {announced.slices}; it must register its store again"
    report = reply.get("optimizer_args")
    if report is None:
        report = {}
    if not isinstance(report, Mapping) or len(report) > MAX_ENTRIES:
        return f"sent a report that is no table of at most {MAX_ENTRIES} entries"
    for name, value in report.items():
        if not isinstance(name, str) or len(name) > MAX_TEXT_LENGTH or not name.isprintable():
            return f"sent an entry with the name {shortened(name)}; it must be a short text"
        if problem := _problem_of_entry(name, value, announced):
            return problem
    if missing := [name for name in required if report.get(name) is None]:
        return f"sent a report without {', '.join(missing)}"
    domain = report.get("domain")
    if announced is not None and domain is not None and domain != announced.domain:
        return f"answered for domain {shortened(domain)}, and announced '{announced.domain}'"
    return None


def _problem_of_entry(name: str, value: Any, announced: Announced | None) -> str | None:
    if isinstance(value, str) and name.startswith((*COUNTS, "loss")):
        return f"sent a text as {name}; it must be a number"
    if value is None or isinstance(value, str):
        is_shown = value is None or (len(value) <= MAX_TEXT_LENGTH and value.isprintable())
        return None if is_shown else f"sent a text as {name} that cannot be shown"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"sent {name} of type {type(value).__name__}; it must be a number or a text"
    if isinstance(value, int) and abs(value) > MAX_COUNT:
        return f"sent {name} with more digits than a count has"
    if math.isinf(value):
        return f"sent {name} as infinity"
    if name.startswith(COUNTS):
        limit = MAX_COUNT if announced is None else announced.slices
        if not _is_count(value) or value > limit:
            return f"sent {name} as {shortened(value)}; it must be a whole number from 0 to {limit}"
    return None


def _is_count(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= MAX_COUNT:
        return False
    return value == int(value)
