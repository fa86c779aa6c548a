"""All uses of non-public parts of Fed-BioMed 6.4 on a node, in one place."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedbiomed.common.constants import SAParameters, TrainingPlanApprovalStatus
from fedbiomed.common.logger import logger
from fedbiomed.common.models import TorchModel
from fedbiomed.common.optimizers.generic_optimizers import BaseOptimizer
from fedbiomed.common.training_plans import TorchTrainingPlan
from fedbiomed.node.config import NodeConfig
from fedbiomed.node.node import Node

from ..common.files import restrict_access
from ..errors import NodeDataError, UsageError
from .connection.component import NODE, require_component
from .protection import guarded_round
from .protection.numbers import leaving_numbers
from .protection.site_secret import mixed_seed

LOCAL_DIGEST = "local_digest"  # of the tensors that stay at the site, in the state that it keeps between rounds
SECAGG_RANGE = 1024  # largest absolute value to encrypt; published mapping weights reach several hundred
SECAGG_LEVELS = 2**32  # the framework's 2**13 would round weights to multiples of 1/8 in this range


def use_fine_quantisation() -> None:
    """Make secure aggregation exact to 5e-7. Researcher and nodes must both call this before a round.

    The levels, 2**17 for sample sizes and the number of sites share 64 bits.
    """
    SAParameters.TARGET_RANGE = SECAGG_LEVELS


class NamedOptimizers(BaseOptimizer):
    """Several PyTorch optimizers in one wrapper, whose state the framework stores at the node between rounds.

    Attributes:
        optimizer: name to PyTorch optimizer.
        extra: further JSON-able or tensor state that is stored with them.
    """

    _model_cls = TorchModel

    def __init__(self, model: TorchModel, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        super().__init__(model, optimizers)
        self.extra: dict[str, object] = {}

    def step(self) -> None:
        for optimizer in self.optimizer.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizer.values():
            optimizer.zero_grad()

    def save_state(self) -> dict[str, object]:
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizer.items()}
        return {"optimizers": states, "extra": self.extra}

    def load_state(self, optim_state: dict[str, Any], load_from_state: bool = False) -> NamedOptimizers:
        """Take over a state from `save_state`. The framework (`load_from_state`) gives it away: it is emptied."""
        for name, optimizer in self.optimizer.items():
            optimizer.load_state_dict(optim_state["optimizers"][name])
        self.extra = optim_state["extra"]
        if load_from_state:
            # The framework formats all its numbers for a line of its log that hardly any node shows: docs/upstream.
            optim_state.clear()
        return self


class PersistentOptimizerPlan(TorchTrainingPlan):
    """A training plan with several named optimizers, whose state is stored between rounds.

    The framework supports one PyTorch optimizer per plan and does not store its state; its private set-up method is
    the only place where another wrapper can be used.

    At a node it runs within a guarded round only: it declares the tensors that leave, sends numbers by the closed list
    of `leaving_numbers`, and draws nothing from a seed that the researcher knows.
    """

    def post_init(self, model_args: dict, training_args: dict, aggregator_args: dict | None = None, **kw: Any) -> None:
        """Set the plan up, see the framework.

        Raises: NodeDataError at a node that does not guard its rounds, and for arguments without effect.
        """
        if kw.get("node_id") is not None:
            guarded_round.current()
        if (
            training_args["dp_args"] is not None
        ):  # the framework accepts them, and plans with their own rounds ignore them
            raise NodeDataError("dp_args has no effect on this plan; leave it out")
        if kw.get("node_id") is not None:
            restrict_access()  # holds for what the framework writes in this node from now on, too
        super().post_init(model_args, training_args, aggregator_args, **kw)
        if kw.get("node_id") is not None:
            self._seed_globals()  # the framework has just seeded them with the researcher's number

    def site_seed(self, *parts: object) -> int:
        """A seed in [0, 2**31) of what this site draws, which nobody can compute without the site's secret.

        It follows from the parts and from the tensors that came from the researcher: a repeated run draws the same
        again, while another question draws other slices and other augmentations.
        """
        return mixed_seed(guarded_round.current().secret, getattr(self, "_received", ""), *parts)

    def _seed_globals(self) -> None:
        """Seed the process's generators, from which loaders and dropout draw."""
        seed = self.site_seed("global", self._training_args.get("random_seed"))
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)

    def make_optimizers(self, model: torch.nn.Module) -> dict[str, torch.optim.Optimizer]:
        """Name to optimizer of the model's parameters; subclasses implement it."""
        raise NotImplementedError

    def _configure_model_and_optimizer(self, initialize_optimizer: bool = True) -> None:
        # The framework's own optimizer is not needed, and it cannot be made for a model without parameters.
        super()._configure_model_and_optimizer(initialize_optimizer=False)
        if initialize_optimizer:
            self._optimizer = NamedOptimizers(self._model, self.make_optimizers(self.model()))

    def optimizers(self) -> NamedOptimizers:
        return self._optimizer

    def set_model_params(self, params: dict[str, Any], local_params: list[str] | None = None) -> None:
        """Load the weights that the framework merged from the researcher's and those that stayed at the site.

        Raises: NodeDataError if the researcher sent tensors that stay at the site: the framework would take them.
        """
        if self.node_id() is not None:
            held = self._optimizer.extra.get(LOCAL_DIGEST) or self._local_digest(self.model().state_dict())
            if self._local_digest(params) != held:
                reason = "the researcher sent tensors that only this site may change"
                guarded_round.current().private["reason"] = reason  # the framework drops it
                raise NodeDataError(reason)
            self._received = _digest_of({n: t for n, t in params.items() if not self.tag_parameters(n)})
        super().set_model_params(params, local_params)

    def _local_digest(self, tensors: Mapping[str, torch.Tensor]) -> str:
        """SHA-256 over names and values of the tensors that stay at the site."""
        return _digest_of({name: tensor for name, tensor in tensors.items() if self.tag_parameters(name)})

    def after_training_params(self, flatten: bool = False) -> dict[str, torch.Tensor] | list[float]:
        """Weights of the model that do not stay at the site: tensors of the parameters' own shapes or, with `flatten`,
        a list of numbers to be encrypted. At a node, they are declared first."""
        if self.node_id() is not None:
            guarded_round.current().declare(self.leaving_tensors(flatten=flatten))
        return super().after_training_params(flatten)

    def leaving_tensors(self, *, flatten: bool = False) -> dict[str, tuple[int, ...]]:
        """Name to shape of the tensors that may leave after training: all that are not tagged local.

        Args:
            flatten: whether they leave as one list of numbers to be encrypted, in the order of their names here.
        """
        model = self.model()
        # Buffers do not travel with `share_persistent_buffers: False`.
        tensors = model.state_dict() if self._share_persistent_buffers else dict(model.named_parameters())
        return {name: tuple(tensor.shape) for name, tensor in tensors.items() if not self.tag_parameters(name)}

    def leaving_numbers(self, values: Mapping[str, object]) -> dict[str, str | float | int]:
        """What of a report (name to number or text) may leave, see `protection.numbers`; the site's ledger learns of
        the rest."""
        guard = guarded_round.current()
        kept, withheld = leaving_numbers(values, guard.policy)
        if withheld:
            guard.private["withheld"] = {**guard.private.get("withheld", {}), **withheld}
        return kept

    def testing_routine(self, *args: Any, **kwargs: Any) -> None:
        """Refuse the framework's scoring, whose numbers would leave without a rule.

        Raises: NodeDataError always.
        """
        raise NodeDataError("test_ratio has no effect on this plan, which scores by itself; leave it out")

    def enter_training(self, node_args: dict | None) -> str:
        """Move the model, and the optimizer state that was loaded on the CPU, to the node's device; return its name."""
        self._seed_globals()
        self._set_device(self._use_gpu, dict(node_args or {}))
        self._model.send_to_device(self._device)
        for optimizer in self._optimizer.optimizer.values():
            for state in optimizer.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and name != "step":
                        state[name] = value.to(self._device)
        self.model().train()
        return self._device

    def leave_training(self) -> None:
        """Move the model back to the CPU, where the framework reads the parameters, and note which of them stay."""
        self._model.send_to_device("cpu")
        self._optimizer.extra[LOCAL_DIGEST] = self._local_digest(self.model().state_dict())


def _digest_of(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def open_node(root: str | Path) -> Node:
    """The node component at `root`, for registering data and approving plans; only one node per process.

    The framework's database connector is a process-wide singleton: the data of a second node would be written to the
    database of the first.

    Raises: UsageError if there is no node component, or if the process has opened another one.
    """
    root = require_component(root, NODE)
    global _opened  # noqa: PLW0603
    if _opened not in (None, root):
        raise UsageError(f"this process already works on node {_opened}; use one process per node")
    _opened = root
    config = NodeConfig(root=str(root))
    logger.setLevel("ERROR", "CONSOLE")  # opening a component sets it to INFO; the log files stay complete
    return Node(config)


_opened: Path | None = None


def register_dataset(node: Node, *, name: str, tag: str, description: str, path: str) -> None:
    """Register a folder under a tag; if that was done before, its name and description are replaced and its id stays.

    Raises: whatever the framework raises, of many kinds, where other data have the tag.
    """
    table = node.dataset_manager.dataset_table
    for entry in table.search_by_tags([tag]):
        if (entry["path"], entry["tags"]) == (path, [tag]):
            # Both are None for data of this kind, which the database leaves out and the update must have.
            unknown = {"shape": None, "dtypes": None}
            table.update_by_id(entry["dataset_id"], {"name": name, "description": description, **unknown})
            return
    node.dataset_manager.add_database(name=name, data_type="custom", tags=[tag], description=description, path=path)


@dataclass(frozen=True, kw_only=True)
class PendingPlan:
    """A training plan that waits for approval.

    Attributes:
        plan_id: by which the node knows it.
        name: for the administrator.
        source: its source text.
    """

    plan_id: str
    name: str
    source: str


def pending_plans(node: Node) -> list[PendingPlan]:
    """Training plans that wait for approval at a node."""
    manager = node.tp_security_manager
    listed = manager.list_training_plans(select_status=TrainingPlanApprovalStatus.PENDING, verbose=False)
    plans = [manager.get_training_plan_by_id(plan["training_plan_id"], secure=False) for plan in listed]
    return [
        PendingPlan(plan_id=plan["training_plan_id"], name=plan["name"], source=plan["training_plan"]) for plan in plans
    ]
