"""Which sites take part in a round, and which of their updates count."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
from fedbiomed.common.exceptions import FedbiomedStrategyError
from fedbiomed.researcher.strategies import Strategy

from .reply_checks import Announced, problem_of_reply
from .round_records import RoundEvent

MAX_CHANGE_RATIO = 10.0  # change of the weights over the median of recent changes, above which an update is rejected
CHANGE_WINDOW = 50  # recent changes that are remembered
MIN_CHANGES = 4  # remembered changes from which on updates are compared with their median


class FactoryStrategy(Strategy):
    """All sites or a random subset train in a round; the round goes on with the valid answers.

    A site is left out of a round's average if it is disconnected, late or failed, if it sent NaN or infinite weights,
    if it changed the weights more than ten times as much as the median of recent updates, or if its report cannot be
    true (see `problem_of_reply`). It continues from the state of its last valid round and takes part again in the next.

    Args:
        nodes_per_round: number of sites that train in a round, drawn at random; None: all.
        min_nodes: answers without which a round does not count; at least 2 with `complete`, see `require_answers`.
        weighting: "samples": sites count by their number of slices; "uniform": all alike (published).
        seed: seed of the draw.
        required: entries that the report of a site must have.
        complete: whether every site of the round must answer for the round to count, as an encrypted sum needs it.

    Attributes:
        events: one per site and round that did not count.
        connected: returns the ids of the connected nodes; None takes all nodes for connected.
        announced: node id to what the site announced, which its replies must not contradict.
    """

    def __init__(
        self,
        nodes_per_round: int | None = None,
        min_nodes: int = 1,
        *,
        weighting: str = "samples",
        seed: int = 0,
        required: Sequence[str] = (),
        complete: bool = False,
    ) -> None:
        super().__init__()
        self.connected: Callable[[], set[str]] | None = None
        self.announced: Mapping[str, Announced] = {}
        self._parameters: dict[str, Any] = {  # the framework writes them to a breakpoint, as JSON
            "nodes_per_round": nodes_per_round,
            "min_nodes": min_nodes,
            "weighting": weighting,
            "seed": seed,
            "required": list(required),
            "complete": complete,
            "norms": [],
            "events": [],
        }
        self.require_answers(min_nodes)

    @property
    def events(self) -> list[RoundEvent]:
        return [RoundEvent(**event) for event in self._parameters["events"]]

    def sample_nodes(self, from_nodes: list[str], round_i: int) -> list[str]:
        """Ids of the nodes that train in a round. A node that is not connected is left out, which is an event.

        Args:
            from_nodes: ids of all nodes of the experiment.
            round_i: number of the round, counted from 0.

        Raises: FedbiomedStrategyError if too few nodes are connected.
        """
        present = self.connected() if self.connected is not None else set(from_nodes)
        nodes = sorted(node for node in from_nodes if node in present)
        wanted = self._parameters["nodes_per_round"]
        if wanted is not None and wanted < len(nodes):
            rng = np.random.default_rng([self._parameters["seed"], round_i])
            nodes = sorted(rng.choice(nodes, wanted, replace=False).tolist())
        if wanted is None:
            for node in sorted(set(from_nodes) - present):
                self._add_event(round_i, node, kind="absent", reason="not connected")
        self._sampling_node_history[round_i] = list(nodes)
        self._require_sites(round_i, len(nodes), needed=self._parameters["min_nodes"], what="are connected")
        return list(nodes)  # a copy: the framework removes failed nodes from it

    def refine(self, training_replies: dict[str, dict[str, Any]], round_i: int) -> tuple:
        """Check the replies of a round.

        Args:
            training_replies: node id to reply. Replies that do not count are removed from it: such a node has no state
                of this round to continue from.
            round_i: number of the round, counted from 0.

        Returns: node id to weights, node id to share (adding up to 1), total number of samples, node id to encryption
            factor.
        Raises: FedbiomedStrategyError if too few replies count.
        """
        sampled = self._sampling_node_history[round_i]
        valid, changes = {}, []
        for node in sampled:
            reply = training_replies.get(node)
            problem = self._problem(reply, self.announced.get(node))
            if problem is None:
                valid[node] = reply
                # A site without anything to train on changes nothing: this is not compared with others.
                changes += [change] if (change := getattr(reply["params"], "norm", 0.0)) else []
            else:
                kind, reason = problem
                self._add_event(round_i, node, kind=kind, reason=reason)
        for node in [node for node in training_replies if node not in valid]:
            del training_replies[node]
        needed = len(sampled) if self._parameters["complete"] else self._parameters["min_nodes"]
        self._require_sites(round_i, len(valid), needed=needed, what="answered properly")
        self._parameters["norms"] = (self._parameters["norms"] + changes)[-CHANGE_WINDOW:]
        self._success_node_history[round_i] = list(valid)
        uniform = self._parameters["weighting"] == "uniform"
        counts = {node: 1 if uniform else reply["sample_size"] for node, reply in valid.items()}
        total = sum(counts.values())
        return (
            {node: reply["params"] for node, reply in valid.items()},
            {node: count / total for node, count in counts.items()},
            sum(reply["sample_size"] for reply in valid.values()),
            {node: reply.get("encryption_factor") for node, reply in valid.items()},
        )

    def require_answers(self, count: int) -> None:
        """Let rounds from now on count with `count` answers, or two if the sites' weights are summed under encryption:
        a sum over one site is that site's weights."""
        self._parameters["min_nodes"] = max(count, 2) if self._parameters["complete"] else count

    def forget_changes(self) -> None:
        """Forget how much recent updates changed the weights: rounds of another length change them by other amounts."""
        self._parameters["norms"] = []

    def _problem(self, reply: Mapping[str, Any] | None, announced: Announced | None) -> tuple[str, str] | None:
        """Why a reply does not count, as kind and reason of a `RoundEvent`; None for a valid reply."""
        if reply is None:
            return "lost", "no reply: disconnected, too late, or failed; see the site's log"
        if not reply.get("success"):
            return "failed", " ".join(str(reply.get("msg")).split())[:300]
        if not reply.get("sample_size"):
            return "failed", "trained on no sample"
        if problem := problem_of_reply(reply, announced, required=self._parameters["required"]):
            return "rejected", problem
        if problem := getattr(reply["params"], "problem", None):
            return "rejected", problem
        change = getattr(reply["params"], "norm", None)
        if change is None:
            return None
        if not math.isfinite(change):
            return "rejected", "sent NaN or infinite weights"
        recent = self._parameters["norms"]
        if len(recent) >= MIN_CHANGES and change > MAX_CHANGE_RATIO * median(recent):
            return "rejected", f"changed the weights by {change:.3g}; the median of updates is {median(recent):.3g}"
        return None

    def _add_event(self, round_i: int, node: str, *, kind: str, reason: str) -> None:
        event = RoundEvent(round=round_i + 1, node=node, kind=kind, reason=reason)
        self._parameters["events"].append(event.to_dict())

    def _require_sites(self, round_i: int, count: int, *, needed: int, what: str) -> None:
        if count < needed:
            events = [event for event in self.events if event.round == round_i + 1]
            text = f"round {round_i + 1}: {count} sites {what}, at least {needed} are needed"
            raise FedbiomedStrategyError("; ".join([text, *(f"{e.node} {e.kind}: {e.reason}" for e in events)]))
