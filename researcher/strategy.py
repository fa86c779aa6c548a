"""Which sites take part in a round, and which of their answers count."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
from fedbiomed.common.exceptions import FedbiomedStrategyError
from fedbiomed.researcher.strategies import Strategy

ABSURD = 10.0  # times the median length of recent changes
REMEMBERED = 50  # lengths of accepted changes
ENOUGH = 4  # lengths before one can be called absurd


class FactoryStrategy(Strategy):
    """All sites or a random subset per round; a round goes on with those that answer properly.

    A site is left out of a round's average if it is gone, late or failed, or sent NaN or infinite weights, or changed
    them more than ten times as much as is usual. It keeps the state of its last good round and is asked again.

    Args:
        nodes_per_round: how many sites a round asks, drawn at random; None asks all.
        min_nodes: answers without which a round does not count.
        weighting: "samples": sites count by their number of slices; "uniform": all alike (published).
        seed: of the draw.
        complete: every asked site must answer, or the round does not count: an encrypted sum lacks nobody.

    Attributes:
        events: one dictionary per site and round that did not count: round, node, event, reason.
        connected: says which nodes are there; None takes all for present.
    """

    def __init__(
        self,
        nodes_per_round: int | None = None,
        min_nodes: int = 1,
        weighting: str = "samples",
        seed: int = 0,
        complete: bool = False,
    ) -> None:
        super().__init__()
        self.connected: Callable[[], set[str]] | None = None
        self._parameters: dict[str, Any] = {  # what a breakpoint keeps
            "nodes_per_round": nodes_per_round,
            "min_nodes": min_nodes,
            "weighting": weighting,
            "seed": seed,
            "complete": complete,
            "norms": [],
            "events": [],
        }

    @property
    def events(self) -> list[dict[str, Any]]:
        return self._parameters["events"]

    def sample_nodes(self, from_nodes: list[str], round_i: int) -> list[str]:
        """Node ids of a round. Those that are not connected are not asked, and that is an event."""
        present = self.connected() if self.connected is not None else set(from_nodes)
        nodes = sorted(node for node in from_nodes if node in present)
        wanted = self._parameters["nodes_per_round"]
        if wanted is not None and wanted < len(nodes):
            rng = np.random.default_rng([self._parameters["seed"], round_i])
            nodes = sorted(rng.choice(nodes, wanted, replace=False).tolist())
        if wanted is None:
            for node in sorted(set(from_nodes) - present):
                self._note(round_i, node, "absent", "not connected")
        self._sampling_node_history[round_i] = list(nodes)
        self._require(len(nodes), self._parameters["min_nodes"], round_i, "are connected")
        return list(nodes)  # a copy: the job takes failed nodes out of it

    def refine(self, training_replies: dict[str, dict[str, Any]], round_i: int) -> tuple:
        """Weights by node, their shares, total of samples, encryption factors. Bad replies are removed from the dict:
        a node that did not finish a round has no state of it to go on from."""
        good, lengths = {}, []
        for node in self._sampling_node_history[round_i]:
            reply = training_replies.get(node)
            event = self._trouble(reply)
            if event is None:
                good[node] = reply
                # A site that had nothing to learn from changes nothing: no measure of what is usual.
                lengths += [norm] if (norm := getattr(reply["params"], "norm", 0.0)) else []
            else:
                self._note(round_i, node, *event)
        for node in [node for node in training_replies if node not in good]:
            del training_replies[node]
        asked = self._sampling_node_history[round_i]
        needed = len(asked) if self._parameters["complete"] else self._parameters["min_nodes"]
        self._require(len(good), needed, round_i, "answered properly")
        self._parameters["norms"] = (self._parameters["norms"] + lengths)[-REMEMBERED:]
        self._success_node_history[round_i] = list(good)
        uniform = self._parameters["weighting"] == "uniform"
        counts = {node: 1 if uniform else reply["sample_size"] for node, reply in good.items()}
        total = sum(counts.values())
        return (
            {node: reply["params"] for node, reply in good.items()},
            {node: count / total for node, count in counts.items()},
            sum(reply["sample_size"] for reply in good.values()),
            {node: reply.get("encryption_factor") for node, reply in good.items()},
        )

    def forget_lengths(self) -> None:
        """Begin anew to learn how much rounds change the weights."""
        self._parameters["norms"] = []

    def _trouble(self, reply: dict[str, Any] | None) -> tuple[str, str] | None:
        """Why a reply does not count: a word and a reason."""
        if reply is None:
            return "lost", "no reply: disconnected, too late, or failed; see the site's log"
        if not reply.get("success"):
            return "failed", " ".join(str(reply.get("msg")).split())[:300]
        if not reply.get("sample_size"):
            return "failed", "trained on no sample"
        if problem := getattr(reply["params"], "problem", None):
            return "rejected", problem
        norm = getattr(reply["params"], "norm", None)
        if norm is None:
            return None
        if not math.isfinite(norm):
            return "rejected", "sent NaN or infinite weights"
        usual = self._parameters["norms"]
        if len(usual) >= ENOUGH and norm > ABSURD * median(usual):
            return "rejected", f"changed the weights by {norm:.3g}, usual are {median(usual):.3g}"
        return None

    def _note(self, round_i: int, node: str, event: str, reason: str) -> None:
        self.events.append({"round": round_i + 1, "node": node, "event": event, "reason": reason})

    def _require(self, count: int, needed: int, round_i: int, what: str) -> None:
        if count < needed:
            reasons = [f"{e['node']} {e['event']}: {e['reason']}" for e in self.events if e["round"] == round_i + 1]
            text = f"round {round_i + 1}: {count} sites {what}, at least {needed} are needed"
            raise FedbiomedStrategyError("; ".join([text, *reasons]))
