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
    """One site's weights of a round, on disk, so that the researcher's memory does not grow with the number of sites.

    Attributes:
        path: file of the framework with name to tensor.
        norm: Euclidean norm of the change that the site made; NaN or infinite if a weight is.
        num_bytes: size of the tensors that the site sent.
    """

    def __init__(self, path: Path, norm: float, num_bytes: int) -> None:
        self.path, self.norm, self.num_bytes = path, norm, num_bytes

    def load(self) -> dict[str, Tensor]:
        """Name to tensor, of the shapes of the model."""
        return Serializer.load(str(self.path))


class UnusableUpdate:
    """What a site sent instead of valid weights.

    Attributes:
        problem: why it cannot be used, one line of text.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem


class RoundCollector(RequestPolicy):
    """Writes replies to disk as they arrive, and ends the round at a deadline.

    Args:
        seconds: seconds to wait for replies; None waits until every site has answered or has disconnected.
        before: name to tensor, global weights before the round, of the shapes of the model.
        folder: folder for the sites' weights.
        number: number of the round, counted from 0.
        expected: whether the training plan sends weights; if not, weights that arrive are refused.
    """

    def __init__(
        self,
        seconds: float | None,
        before: dict[str, Tensor],
        folder: Path,
        *,
        number: int,
        expected: bool = True,
    ) -> None:
        super().__init__()
        self.expected = expected
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.before, self.folder, self.number = before, folder, number

    def continue_(self, requests: list) -> Any:
        """Whether the framework is to wait on; it calls this repeatedly during a round."""
        for request in requests:
            if isinstance(request.reply, TrainReply):
                self.take(request.node.id, request.reply)
        late = self.deadline is not None and time.monotonic() > self.deadline
        return self.completed() if late else self.keep()

    def take(self, node: str, reply: TrainReply) -> None:
        """Replace the weights in a reply by a `StoredUpdate`, or by an `UnusableUpdate` if they are invalid."""
        if not reply.success or reply.encrypted or not isinstance(reply.params, dict):
            return
        if not self.expected:
            if reply.params:
                reply.params = UnusableUpdate("sent weights, although with this plan they stay at the site")
            return
        try:
            reply.params = self._stored(node, reply.params)
        except OSError:
            raise
        except Exception as error:  # data from a site are not trusted; they must not end the run of the other sites
            reply.params = UnusableUpdate(f"sent no valid weights of this model ({type(error).__name__}: {error})")

    def _stored(self, node: str, sent: dict[str, Tensor]) -> StoredUpdate:
        """Check the tensors that a node sent, of the shapes in `before`, and write them to disk."""
        num_bytes = sum(tensor.nbytes for tensor in sent.values())
        weights = restore(sent, self.before)
        if weights.keys() != self.before.keys():
            other = sorted(weights.keys() ^ self.before.keys())
            raise ValueError(f"{len(other)} tensors are missing or unknown, such as {other[0]}; expected none")
        squares = sum(float((weights[k].double() - self.before[k].double()).square().sum()) for k in weights)
        path = self.folder / UPDATE_FILE.format(round=self.number, node=node)
        Serializer.dump(weights, str(path))
        return StoredUpdate(path, squares**0.5, num_bytes)


class SurvivingTrainingJob(TrainingJob):
    """The framework's job that runs a round, with a deadline and without the weights of all sites in memory at once."""

    round_timeout: float | None = None

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        before = self._training_plan.get_model_params(
            exclude_buffers=not self._training_args.dict()["share_persistent_buffers"],
            local_params=self._training_plan.local_params,
        )
        folder = Path(self._keep_files_dir)
        expected = getattr(self._training_plan, "sends_weights", True)
        self.collector = RoundCollector(self.round_timeout, before, folder, number=self._round_, expected=expected)
        self._policies = [self.collector]

    def _get_training_results(self, replies: dict[str, TrainReply]) -> dict[str, dict[str, Any]]:
        results = {}
        for node, reply in replies.items():
            self.collector.take(node, reply)  # a reply may have arrived after the last call of `continue_`
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
    """Within the block, rounds run as `SurvivingTrainingJob`, so that they survive sites that fail.

    Args:
        timeout: seconds after which a round ends; None waits for all connected sites.
    """
    original = experiment_module.TrainingJob
    job = type("SurvivingTrainingJob", (SurvivingTrainingJob,), {"round_timeout": timeout})
    experiment_module.TrainingJob = job
    try:
        yield
    finally:
        experiment_module.TrainingJob = original


def connected_nodes() -> set[str]:
    """Ids of the nodes that poll this researcher at the moment."""
    agents = Requests(config)._grpc_server.get_all_nodes()
    return {agent.id for agent in agents if agent.status != NodeActiveStatus.DISCONNECTED}
