"""Which nodes take part in an experiment, and how long the researcher waits for them."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.names import check_label
from ..errors import UsageError
from ..node.plans.transport import TRANSPORTS

WEIGHTINGS = ("samples", "uniform")


@dataclass(frozen=True, kw_only=True)
class NodeSelection:
    """The nodes of an experiment, for all kinds of training.

    Attributes:
        tag: tag under which the sites registered their data.
        min_nodes: nodes to wait for at the beginning, and answers without which a round does not count; at least 1.
            None leaves it to the training function, which documents its default.
        node_timeout: seconds to wait for nodes to connect.
        approval_timeout: seconds to wait until the sites' administrators have approved the training plan.
        round_timeout: seconds after which a round ends without the sites that have not answered; None waits for all
            that are connected.

    Raises: UsageError for values that make no sense.
    """

    tag: str
    min_nodes: int | None = None
    node_timeout: float = 60
    approval_timeout: float = 0
    round_timeout: float | None = None

    def __post_init__(self) -> None:
        if not self.tag:
            raise UsageError("tag is ''; choose the tag under which the sites registered their data")
        check_label("tag", self.tag)
        _require_at_least(1, min_nodes=self.min_nodes)
        _require_at_least(
            0,
            node_timeout=self.node_timeout,
            approval_timeout=self.approval_timeout,
            round_timeout=self.round_timeout,
        )


@dataclass(frozen=True, kw_only=True)
class Federation(NodeSelection):
    """The nodes of phase one, and how their updates are exchanged and averaged.

    By default a run waits for one node per domain, and a round needs two answers (see `RunState.min_answers`). When
    too few sites answer in a round, it is repeated for up to `node_timeout` seconds.

    Attributes:
        nodes_per_round: nodes that train in a round, drawn at random; None: all.
        leave_out: whether to go on without sites whose stores differ from the others', instead of stopping.
        weighting: "samples": sites count by their number of slices; "uniform": all alike (published).
        transport: "float32", or "float16" or "int8": sites send the change of their weights in half precision or eight
            bits, see `node.plans.transport`.
        secagg: whether the sites' weights are summed under encryption, so that the researcher never sees the weights
            of a single site. Such sums need float32 and are weighted by samples.

    Raises: UsageError for values that make no sense or exclude each other.
    """

    nodes_per_round: int | None = None
    leave_out: bool = False
    weighting: str = "samples"
    transport: str = "float32"
    secagg: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_at_least(1, nodes_per_round=self.nodes_per_round)
        if self.weighting not in WEIGHTINGS:
            raise UsageError(f"weighting is '{self.weighting}'; choose one of {', '.join(WEIGHTINGS)}")
        if self.transport not in TRANSPORTS:
            raise UsageError(f"transport is '{self.transport}'; choose one of {', '.join(TRANSPORTS)}")
        if self.secagg and self.transport != "float32":
            raise UsageError(f"transport is '{self.transport}'; with secagg it must be 'float32'")
        if self.secagg and self.weighting != "samples":
            raise UsageError(f"weighting is '{self.weighting}'; with secagg it must be 'samples'")


def _require_at_least(minimum: int, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and value < minimum:
            raise UsageError(f"{name} is {value}; choose {minimum} or more")
