"""Everything that touches a non-public part of Fed-BioMed 6.4, in one place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fedbiomed.common.constants import SAParameters, TrainingPlanApprovalStatus
from fedbiomed.common.logger import logger
from fedbiomed.common.models import TorchModel
from fedbiomed.common.optimizers.generic_optimizers import BaseOptimizer
from fedbiomed.common.training_plans import TorchTrainingPlan
from fedbiomed.node.config import NodeConfig
from fedbiomed.node.node import Node

from ..errors import UsageError

SECAGG_RANGE = 1024  # of the values that are encrypted; published mapping weights reach several hundred
SECAGG_LEVELS = 2**32  # the framework's 2**13 would round weights to steps of 1/8 in this range


def use_fine_quantisation() -> None:
    """Let secure aggregation keep weights to 5e-7. Both ends must do so before a round.

    Levels, 2**17 for sample sizes and the number of sites share 64 bits.
    """
    SAParameters.TARGET_RANGE = SECAGG_LEVELS


class NamedOptimizers(BaseOptimizer):
    """Several PyTorch optimizers under one wrapper, whose state the framework keeps at the node between rounds.

    Attributes:
        optimizer: name to PyTorch optimizer.
        extra: further JSON-able or tensor state that is saved and restored with them.
    """

    _model_cls = TorchModel

    def __init__(self, model: TorchModel, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        super().__init__(model, optimizers)
        self.extra: dict[str, Any] = {}

    def step(self) -> None:
        for optimizer in self.optimizer.values():
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizer.values():
            optimizer.zero_grad()

    def save_state(self) -> dict[str, Any]:
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizer.items()}
        return {"optimizers": states, "extra": self.extra}

    def load_state(self, optim_state: dict[str, Any], load_from_state: bool = False) -> NamedOptimizers:
        for name, optimizer in self.optimizer.items():
            optimizer.load_state_dict(optim_state["optimizers"][name])
        self.extra = optim_state["extra"]
        return self


class PersistentOptimizerPlan(TorchTrainingPlan):
    """A training plan whose optimizers, by name, live on between rounds. Subclasses make them.

    The framework knows one native optimizer per plan and forgets its state; its private set-up hook is the only
    place where another wrapper can be put in.
    """

    def make_optimizers(self, model: torch.nn.Module) -> dict[str, torch.optim.Optimizer]:
        raise NotImplementedError

    def _configure_model_and_optimizer(self, initialize_optimizer: bool = True) -> None:
        # The framework's own optimizer is not wanted, and cannot be made of a model without parameters.
        super()._configure_model_and_optimizer(initialize_optimizer=False)
        if initialize_optimizer:
            self._optimizer = NamedOptimizers(self._model, self.make_optimizers(self.model()))

    def optimizers(self) -> NamedOptimizers:
        return self._optimizer

    def enter_training(self, node_args: dict | None) -> str:
        """Move the model, and optimizer state that was loaded on the CPU, to the node's device; return its name."""
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
        """Back to the CPU, where the framework reads the parameters."""
        self._model.send_to_device("cpu")


def open_node(root: str | Path) -> Node:
    """The node component at `root`, for registering data and approving plans. One node per process.

    The framework's database connector is a process-wide singleton: a second node's data would be written to the
    first node's database.

    Raises: UsageError if there is no node component.
    """
    root = Path(root).resolve()
    if not (root / "etc" / "config.ini").is_file():
        raise UsageError(
            f"{root}: no Fed-BioMed node here; make one with `fedbiomed component create -c node -p {root}`"
        )
    global _opened  # noqa: PLW0603
    if _opened not in (None, root):
        raise UsageError(f"this process already works on node {_opened}; use one process per node")
    _opened = root
    config = NodeConfig(root=str(root))
    logger.setLevel("ERROR", "CONSOLE")  # opening a component sets it to INFO; its files still say everything
    return Node(config)


_opened: Path | None = None


def pending_plans(node: Node) -> list[dict[str, Any]]:
    """Training plans that wait for a decision: "training_plan_id", "name", "description", source in "training_plan"."""
    manager = node.tp_security_manager
    listed = manager.list_training_plans(select_status=TrainingPlanApprovalStatus.PENDING, verbose=False)
    return [manager.get_training_plan_by_id(plan["training_plan_id"], secure=False) for plan in listed]
