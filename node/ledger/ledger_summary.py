"""What a site's ledger adds up to: by experiment, by day, and by name of what left."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .ledger_entry import Entry

LEFT = ("round", "scoring")  # events of which weights or numbers left


@dataclass
class Total:
    """Sums over some entries; `first` and `last` are days such as 2026-11-26."""

    first: str = ""
    last: str = ""
    rounds: int = 0
    scorings: int = 0
    answered: int = 0
    refused: int = 0
    bytes: int = 0
    numbers: int = 0
    plans: set[str] = field(default_factory=set)
    domains: set[str] = field(default_factory=set)

    def add(self, entry: Entry) -> None:
        """Count an entry."""
        day = entry.time[:10]
        self.first, self.last = min(self.first or day, day), max(self.last, day)
        self.rounds += entry.event == "round"
        self.scorings += entry.event == "scoring"
        self.answered += entry.event == "answered"
        self.refused += entry.event == "refused"
        self.bytes += whole(entry.facts.get("bytes"))
        self.numbers += len(table_of(entry.facts.get("numbers")))
        self.plans.update(filter(None, [text_of(entry.facts, "plan")]))
        self.domains.update(filter(None, [text_of(entry.facts, "domain")]))


@dataclass
class NumberThatLeft:
    """How often a number of one name left, and the range of its finite values; `last` is the last one, as text."""

    times: int = 0
    least: float = math.inf
    most: float = -math.inf
    last: str = ""

    def add(self, value: object) -> None:
        """Count a value."""
        self.times += 1
        self.last = f"{value:.4g}" if isinstance(value, float) else str(value)
        if isinstance(value, (int, float)) and abs(value) < math.inf:
            self.least, self.most = min(self.least, value), max(self.most, value)


@dataclass
class TensorThatLeft:
    """How often a tensor of one name, shape and type left, and its bytes in all."""

    times: int = 0
    bytes: int = 0


@dataclass
class LedgerSummary:
    """A ledger in numbers. Every table is in the order in which its rows first occurred.

    Attributes:
        total: of all entries that a researcher caused.
        experiments: by (researcher, experiment).
        days: by day.
        numbers: by name.
        tensors: by (name, shape, dtype).
        withheld: times by name.
        refusals: (times, last day) by (researcher, experiment, plan, reasons).
        approved: (day, plan, SHA-256 of it, SHA-256 of the package), one for each approval.
        policies: (day, SHA-256), one for each policy that came into force.
        epsilon: by domain, (spent, budget) as last recorded; the budget is None if there is none.
    """

    total: Total = field(default_factory=Total)
    experiments: dict[tuple[str, str], Total] = field(default_factory=dict)
    days: dict[str, Total] = field(default_factory=dict)
    numbers: dict[str, NumberThatLeft] = field(default_factory=dict)
    tensors: dict[tuple[str, str, str], TensorThatLeft] = field(default_factory=dict)
    withheld: Counter[str] = field(default_factory=Counter)
    refusals: dict[tuple[str, str, str, str], tuple[int, str]] = field(default_factory=dict)
    approved: list[tuple[str, str, str, str]] = field(default_factory=list)
    policies: list[tuple[str, str]] = field(default_factory=list)
    epsilon: dict[str, tuple[float, float | None]] = field(default_factory=dict)


def summarise(entries: Iterable[Entry]) -> LedgerSummary:
    """The summary of a ledger, which may lack any fact and have one of any type."""
    found = LedgerSummary()
    for entry in entries:
        facts, day = entry.facts, entry.time[:10]
        if entry.event in (*LEFT, "answered", "refused"):
            found.total.add(entry)
            found.days.setdefault(day, Total()).add(entry)
        if entry.event in (*LEFT, "refused"):
            who = (text_of(facts, "researcher"), text_of(facts, "experiment"))
            found.experiments.setdefault(who, Total()).add(entry)
        if entry.event in LEFT:
            _add_what_left(found, facts)
        elif entry.event == "refused":
            reasons = facts.get("reasons")
            text = "; ".join(map(str, reasons)) if isinstance(reasons, list) else str(reasons or "")
            refusal = (*who, text_of(facts, "plan"), text)
            found.refusals[refusal] = (found.refusals.get(refusal, (0, ""))[0] + 1, day)
        elif entry.event == "approved":
            digests = (text_of(facts, "plan_sha256"), text_of(facts, "package_sha256"))
            found.approved.append((day, text_of(facts, "plan"), *digests))
        elif entry.event == "policy":
            found.policies.append((day, text_of(facts, "policy_sha256")))
    return found


def _add_what_left(found: LedgerSummary, facts: Mapping[str, Any]) -> None:
    for name, value in table_of(facts.get("numbers")).items():
        found.numbers.setdefault(name, NumberThatLeft()).add(value)
    for tensor in facts.get("tensors") if isinstance(facts.get("tensors"), list) else ():
        name, shape, dtype, size = tensor if isinstance(tensor, list) and len(tensor) == 4 else (tensor, "", "", 0)
        row = found.tensors.setdefault((str(name), str(shape), str(dtype)), TensorThatLeft())
        row.times, row.bytes = row.times + 1, row.bytes + whole(size)
    withheld = facts.get("withheld")
    found.withheld.update(str(name) for name in (withheld if isinstance(withheld, list) else ()))
    spent, budget = facts.get("epsilon"), facts.get("epsilon_budget")
    if isinstance(spent, (int, float)):
        kept = float(budget) if isinstance(budget, (int, float)) else None
        found.epsilon[text_of(facts, "domain")] = (float(spent), kept)


def text_of(facts: Mapping[str, Any], name: str) -> str:
    """A fact as text; empty if it is missing."""
    value = facts.get(name)
    return "" if value is None else str(value)


def whole(value: object) -> int:
    """A number of bytes; 0 if it is none."""
    return value if isinstance(value, int) and value > 0 else 0


def table_of(value: object) -> Mapping[str, Any]:
    """A table of values by name; empty if it is none."""
    return value if isinstance(value, dict) else {}
