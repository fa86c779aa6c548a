"""The round that a guarded node runs at the moment: what its plan may do, and what it declares to send."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ...errors import NodeDataError
from ..policy.policy import Policy


@dataclass(kw_only=True)
class GuardedRound:
    """One request for training or scoring, while it runs.

    Attributes:
        policy: of the node.
        secret: of the site, mixed into every seed, see `site_secret`.
        scores_left: whether the node's quota allows scores on test cases in this round, of training or of scoring.
        qualities_left: whether the node's quota allows numbers about synthetic slices in this round.
        tensors: name to shape of the tensors that the plan declared to send.
        private: facts of the plan for the site's ledger that do not leave the site, such as the epsilon spent.
        held_back: what the plan left out of its report, with the reason, for the site's ledger.
    """

    policy: Policy
    secret: bytes
    scores_left: bool = True
    qualities_left: bool = True
    tensors: dict[str, tuple[int, ...]] = field(default_factory=dict)
    private: dict[str, object] = field(default_factory=dict)
    held_back: list[str] = field(default_factory=list)

    def declare(self, tensors: Mapping[str, tuple[int, ...]]) -> None:
        """Say which tensors may leave; the gate holds the reply against it."""
        self.tensors = dict(tensors)


_current: GuardedRound | None = None


@contextmanager
def begin(round_: GuardedRound) -> Iterator[GuardedRound]:
    """Make `round_` the one that runs, until the end of the context. A node runs one round at a time."""
    global _current  # noqa: PLW0603
    before, _current = _current, round_
    try:
        yield round_
    finally:
        _current = before


def current() -> GuardedRound:
    """The round that runs. Raises: NodeDataError if none does: then nothing has checked what a researcher asks for."""
    if _current is None:
        raise NodeDataError(
            "this node is not guarded by fedfactory; its administrator finds the reason by `site check`"
        )
    return _current
