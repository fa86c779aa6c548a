"""Everything at the researcher that touches a non-public part of Fed-BioMed 6.4, in one place."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fedbiomed.researcher.federated_workflows._experiment as experiment_module
from fedbiomed.common.message import TrainReply
from fedbiomed.common.serializer import Serializer
from fedbiomed.researcher.config import config
from fedbiomed.researcher.federated_workflows.jobs import TrainingJob
from fedbiomed.researcher.requests import RequestPolicy, Requests
from fedbiomed.transport.node_agent import NodeActiveStatus
from torch import Tensor

from ..node.plans.transport import restore

UPDATE_FILE = "params_round{round}_{node}.mpk"


class StoredUpdate:
    """One site's weights of a round, on disk: memory at the researcher does not grow with the number of sites.

    Attributes:
        path: framework file with name -> tensor.
        norm: Euclidean length of the change the site made; NaN or infinite if a value is.
        num_bytes: that travelled.
    """

    def __init__(self, path: Path, norm: float, num_bytes: int) -> None:
        self.path, self.norm, self.num_bytes = path, norm, num_bytes

    def load(self) -> dict[str, Tensor]:
        return Serializer.load(str(self.path))


class UnusableUpdate:
    """What a site sent instead of weights. `problem` says why it cannot be used."""

    def __init__(self, problem: str) -> None:
        self.problem = problem


class RoundCollector(RequestPolicy):
    """Takes replies to disk as they come, and ends the wait at a deadline.

    Args:
        seconds: to wait for a round's replies; None waits until every site has answered or is gone.
        before: global weights of the round. folder: where updates go. number: of the round.
        expected: whether sites send weights at all; of a plan that keeps them, any that come are refused.
    """

    def __init__(
        self, seconds: float | None, before: dict[str, Tensor], folder: Path, number: int, expected: bool = True
    ) -> None:
        super().__init__()
        self.expected = expected
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.before, self.folder, self.number = before, folder, number

    def continue_(self, requests: list) -> Any:
        for request in requests:
            if isinstance(request.reply, TrainReply):
                self.take(request.node.id, request.reply)
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self.completed() if late else self.keep()

    def take(self, node: str, reply: TrainReply) -> None:
        """Replace the reply's weights by a `StoredUpdate`, or by an `UnusableUpdate` if they are none."""
        if not reply.success or reply.encrypted or not isinstance(reply.params, dict):
            return
        if not self.expected:
            if reply.params:
                reply.params = UnusableUpdate("sent weights, though its plan keeps them")
            return
        try:
            reply.params = self._stored(node, reply.params)
        except OSError:
            raise
        except Exception as error:  # what a site sends is not to be trusted; it must not end the run of the others
            reply.params = UnusableUpdate(f"sent what are no weights of this model ({type(error).__name__}: {error})")

    def _stored(self, node: str, sent: dict[str, Tensor]) -> StoredUpdate:
        num_bytes = sum(tensor.nbytes for tensor in sent.values())
        weights = restore(sent, self.before)
        if weights.keys() != self.before.keys():
            other = sorted(weights.keys() ^ self.before.keys())
            raise ValueError(f"{len(other)} tensors are missing or unknown, such as {other[0]}")
        squares = sum(float((weights[k].double() - self.before[k].double()).square().sum()) for k in weights)
        path = self.folder / UPDATE_FILE.format(round=self.number, node=node)
        Serializer.dump(weights, str(path))
        return StoredUpdate(path, squares**0.5, num_bytes)


class SurvivingTrainingJob(TrainingJob):
    """The framework's job of a round, with a deadline and without all sites' weights in memory at once."""

    round_timeout: float | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        before = self._training_plan.get_model_params(
            exclude_buffers=not self._training_args.dict()["share_persistent_buffers"],
            local_params=self._training_plan.local_params,
        )
        folder = Path(self._keep_files_dir)
        expected = getattr(self._training_plan, "sends_weights", True)
        self.collector = RoundCollector(self.round_timeout, before, folder, self._round_, expected)
        self._policies = [self.collector]

    def _get_training_results(self, replies: dict[str, TrainReply]) -> dict[str, dict[str, Any]]:
        results = {}
        for node, reply in replies.items():
            self.collector.take(node, reply)  # one may have come after the last look
            results[node] = reply.get_dict()
            if isinstance(reply.params, StoredUpdate):
                results[node]["params_path"] = str(reply.params.path)
            elif reply.success and not isinstance(reply.params, UnusableUpdate):
                path = Path(self._keep_files_dir) / UPDATE_FILE.format(round=self._round_, node=node)
                Serializer.dump(reply.params, str(path))
                results[node]["params_path"] = str(path)
        return results


@contextmanager
def surviving_rounds(timeout: float | None) -> Iterator[None]:
    """Rounds inside are collected by `SurvivingTrainingJob`; `timeout` in seconds, None waits without end."""
    kept = experiment_module.TrainingJob
    job = type("SurvivingTrainingJob", (SurvivingTrainingJob,), {"round_timeout": timeout})
    experiment_module.TrainingJob = job
    try:
        yield
    finally:
        experiment_module.TrainingJob = kept


def connected_nodes() -> set[str]:
    """Ids of the nodes that poll this researcher at the moment."""
    agents = Requests(config)._grpc_server.get_all_nodes()
    return {agent.id for agent in agents if agent.status != NodeActiveStatus.DISCONNECTED}
