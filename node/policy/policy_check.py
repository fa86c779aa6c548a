"""A node's policy as a line of `fedfactory site check`."""

from __future__ import annotations

from pathlib import Path

from ...errors import UsageError
from ..connection.check import PROBLEM, WARNING, Check
from .policy import Policy, policy_file


def check_policy(root: str | Path) -> Check:
    """Whether the policy of the node at `root` is there and can be read, and what it allows beyond the default."""
    try:
        policy = Policy.load(root)
    except UsageError as error:
        remedy = f"`fedfactory site policy {root}` writes one if there is none; `--check` says whether it is right"
        return Check(name="policy", state=PROBLEM, found=str(error), remedy=remedy)
    if unusual := policy.unusual():
        more = f"; and {len(unusual) - 3} more" if len(unusual) > 3 else ""
        remedy = f"make sure that this is wanted; the file is {policy_file(root)}"
        return Check(name="policy", state=WARNING, found="; ".join(unusual[:3]) + more, remedy=remedy)
    return Check(name="policy", found="nothing beyond the default is allowed")
