"""One line of what `fedfactory check` and `fedfactory site check` found."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

OK, WARNING, PROBLEM = "ok", "warning", "problem"


@dataclass(frozen=True, kw_only=True)
class Check:
    """What was looked at, and what was found.

    Attributes:
        name: of what was looked at, such as "certificate".
        state: OK, WARNING (it may work) or PROBLEM (it does not work, or it is not safe).
        found: one sentence without a full stop.
        remedy: what to do, one sentence without a full stop; empty if there is nothing to do.
    """

    name: str
    state: str = OK
    found: str
    remedy: str = ""

    @property
    def line(self) -> str:
        """Both sentences, for a message of one line."""
        return f"{self.found} ({self.remedy})" if self.remedy else self.found


def unhealthy(checks: Iterable[Check]) -> list[Check]:
    """The checks that found something, problems before warnings."""
    return sorted((check for check in checks if check.state != OK), key=lambda check: check.state != PROBLEM)
