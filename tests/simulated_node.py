"""A round at a node by the framework's own steps, in this process and without sockets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch


@dataclass(kw_only=True)
class NodeReply:
    """What a plan gives the framework after a round, and what stays.

    Attributes:
        params: name to tensor, or a list of numbers.
        report: number or text by name.
        local: name to tensor of what stays at the site.
        state: of the optimizers.
    """

    params: Any
    report: dict[str, Any]
    local: dict[str, torch.Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


def node_round(
    plan_class: type,
    model_args: dict,
    store: Path,
    received: Mapping[str, torch.Tensor] | None = None,
    *,
    before: NodeReply | None = None,
    flatten: bool = False,
    aggregator_args: dict | None = None,
    monitor: Any = None,
    **training: Any,
) -> NodeReply:
    """One round of a plan at a node, as `fedbiomed.node.round.Round` runs it; the caller has begun a guarded round.

    Args:
        plan_class: of the plan.
        model_args: from the researcher.
        store: of the site.
        received: name to tensor from the researcher; default: what the plan itself starts with.
        before: of the round before.
        flatten: whether the weights are to be encrypted.
        aggregator_args: from the researcher.
        monitor: for scalars.
        training: further training_args.
    """
    from fedbiomed.common.training_args import TrainingArgs

    arguments = {"loader_args": {"batch_size": 4}, "num_updates": 2, "random_seed": 0, **training}
    plan = plan_class()
    plan.post_init(model_args, TrainingArgs(arguments, only_required=False), aggregator_args or {}, node_id="node")
    initial = plan.get_model_params(only_trainable=False, exclude_buffers=False, local_params=None)
    if before is not None:
        plan.optimizers().load_state(before.state)
    plan.set_model_params({**initial, **(before.local if before else {}), **(received or {})}, local_params=None)
    manager = plan.training_data()
    manager.extend_loader_args(arguments["loader_args"])
    manager.load(tp_type=plan.type())
    manager.load_dataset(root=str(store))
    loader, _ = manager.split(test_ratio=0.0, test_batch_size=0, is_shuffled_testing_dataset=False)
    plan.set_data_loaders(train_data_loader=loader, test_data_loader=None)
    plan.training_routine(history_monitor=monitor, node_args={})
    params = plan.after_training_params(flatten=flatten)
    weights = plan.get_model_params(only_trainable=False, exclude_buffers=False, local_params=None)
    local = {name: value for name, value in weights.items() if plan.tag_parameters(name)}
    return NodeReply(params=params, report=plan.optimizer_args(), local=local, state=plan.optimizers().save_state())
