"""Records of a round: what each site sent besides weights, and which sites did not count."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace


@dataclass(frozen=True, kw_only=True)
class ReceivedUpdate:
    """A site's update of a round as the researcher received it, without the weights.

    Attributes:
        node_name: name that the site's administrator gave to the node.
        domain: domain of the site's images; empty if unknown.
        num_bytes: size of the weights that travelled; None if there were none or if they were encrypted.
        numbers: name to number, all that the training plan reports: losses, counts, seconds, scores. NaN: not measured.
    """

    node_name: str
    domain: str = ""
    num_bytes: int | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)

    def selected(self, *prefixes: str) -> dict[str, float]:
        """The measured (finite) numbers whose names begin with one of the prefixes; without prefixes, all of them."""
        return {
            name: value
            for name, value in self.numbers.items()
            if math.isfinite(value) and (not prefixes or name.startswith(prefixes))
        }

    def with_numbers(self, numbers: Mapping[str, float]) -> ReceivedUpdate:
        """A copy with further numbers, which replace those of the same names."""
        return replace(self, numbers={**self.numbers, **numbers})

    def to_dict(self) -> dict[str, str | float | None]:
        """One flat table for a JSON file, in which numbers that are not finite are None."""
        numbers = {name: value if math.isfinite(value) else None for name, value in self.numbers.items()}
        return {"node_name": self.node_name, "domain": self.domain, "num_bytes": self.num_bytes, **numbers}

    @classmethod
    def from_dict(cls, values: Mapping[str, str | float | None]) -> ReceivedUpdate:
        """Read what `to_dict` gave, or a training plan's summary. Entries that are no numbers are left out.

        Args:
            values: parsed JSON or, from the network, `optimizer_args` of a reply with `node_name` and `num_bytes`.
        """
        own = ("node_name", "domain", "num_bytes")
        numbers = {
            name: math.nan if value is None else value
            for name, value in values.items()
            if name not in own and (value is None or isinstance(value, (int, float)))
        }
        size = values.get("num_bytes")
        return cls(
            node_name=str(values["node_name"]),
            domain=str(values.get("domain") or ""),
            num_bytes=size if isinstance(size, int) else None,
            numbers=numbers,
        )


@dataclass(frozen=True, kw_only=True)
class RoundEvent:
    """A site that took no part in a round, or whose update did not count.

    Attributes:
        round: number of the round, counted from 1.
        node: id of the node.
        kind: "absent": not connected when the round began; "lost": no reply in time; "failed": an error at the site;
            "rejected": weights that cannot be used.
        reason: one line of text.
    """

    round: int
    node: str
    kind: str
    reason: str

    def to_dict(self) -> dict[str, int | str]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class QuorumChange:
    """Another number of answers that a round needs, from where a run was resumed with it.

    Attributes:
        round: the first round with it, counted from 1.
        before: answers that earlier rounds needed.
    """

    round: int
    before: int


def answers_needed(now: int, changes: Sequence[QuorumChange]) -> str:
    """The answers that a round needs, and those that earlier ones needed, as text: "2 (3 before round 12)"."""
    earlier = ", ".join(f"{change.before} before round {change.round}" for change in changes)
    return f"{now} ({earlier})" if earlier else str(now)


@dataclass(frozen=True, kw_only=True)
class SiteAnswers:
    """The rounds in which a node's update counted.

    Attributes:
        node_name: name that the site's administrator gave to the node.
        domain: domain of the site's images; empty if unknown.
        rounds: their numbers, counted from 1, in rising order.
        num_bytes: size of all weights that travelled from the node; None if none were seen, as with encrypted sums.
    """

    node_name: str
    domain: str = ""
    rounds: tuple[int, ...] = ()
    num_bytes: int | None = None


def add_answers(answers: dict[str, SiteAnswers], number: int, site_updates: Mapping[str, ReceivedUpdate]) -> None:
    """Add a round to what is known of each node.

    Args:
        answers: node id to the node's answers, which are changed.
        number: number of the round, counted from 1.
        site_updates: node id to the site's update of that round.
    """
    for node, update in site_updates.items():
        known = answers.get(node, SiteAnswers(node_name=update.node_name))
        sizes = [size for size in (known.num_bytes, update.num_bytes) if size is not None]
        answers[node] = SiteAnswers(
            node_name=update.node_name,
            domain=update.domain,
            rounds=(*known.rounds, number),
            num_bytes=sum(sizes) if sizes else None,
        )
