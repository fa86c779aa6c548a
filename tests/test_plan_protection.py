"""What a site's training plan refuses of a researcher, by the framework's own steps of a round."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.errors import NodeDataError


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    mask = os.umask(0)
    os.umask(mask)
    yield
    os.umask(mask)


@pytest.fixture
def make_plan(config):
    """A plan as a node sets it up at the beginning of a round."""
    from fedbiomed.common.training_args import TrainingArgs
    from fedfactory.researcher.plans.factory_plans import FactoryPlan
    from fedfactory.researcher.plans.segmentation_plans import PLANS

    method = MethodConfig(method="fedbn", size=32, classes=2, sites=2, rounds=1, updates=1, batch_size=2)
    plans = {
        "factory": (FactoryPlan, {"factory": config.to_dict(), "seed": 0, "transport": "float32"}),
        "fedbn": (PLANS["fedbn"], {"config": method.to_dict()}),
    }

    def make(kind: str = "factory", node: str | None = "node", **training_args):
        training = {"loader_args": {"batch_size": 2}, "num_updates": 1, "random_seed": 0, **training_args}
        plan_class, model_args = plans[kind]
        plan = plan_class()
        plan.post_init(model_args, TrainingArgs(training, only_required=False), {}, node_id=node)
        return plan

    return make


def begin_round(plan, received: dict, kept: dict | None = None) -> None:
    """The framework's merge: what is new, below what stayed, below what the researcher sent."""
    initial = plan.get_model_params(only_trainable=False, exclude_buffers=False, local_params=None)
    plan.set_model_params({**initial, **(kept or {}), **received}, local_params=None)


@pytest.mark.parametrize("kind", ["factory", "fedbn"])
def test_tensors_that_stay_at_the_site_cannot_be_set_from_outside(make_plan, kind):
    plan = make_plan(kind)
    sent = {n: t.clone() for n, t in plan.model().state_dict().items() if not plan.tag_parameters(n)}
    own = {n: t.clone() for n, t in plan.model().state_dict().items() if plan.tag_parameters(n)}
    assert sent
    assert own
    name = sorted(name for name, tensor in own.items() if tensor.is_floating_point())[0]
    begin_round(plan, {name_: tensor * 2 for name_, tensor in sent.items()})
    with pytest.raises(NodeDataError, match="only this site"):
        begin_round(plan, {**sent, name: own[name] + 1})

    with torch.no_grad():  # the site trains: its own tensors change
        plan.model().state_dict()[name].add_(0.5)
    plan.leave_training()
    kept = {n: t.clone() for n, t in plan.model().state_dict().items() if plan.tag_parameters(n)}
    state = plan.optimizers().save_state()

    later = make_plan(kind)
    later.optimizers().load_state(state)
    begin_round(later, sent, kept)
    assert torch.equal(later.model().state_dict()[name], kept[name])
    for foreign in ({name: own[name]}, {name: torch.zeros_like(own[name])}):
        again = make_plan(kind)
        again.optimizers().load_state(state)
        with pytest.raises(NodeDataError, match="only this site"):
            begin_round(again, {**sent, **foreign}, kept)


def test_arguments_of_privacy_without_effect_are_refused(make_plan):
    privacy = {"type": "local", "sigma": 0.1, "clip": 1.0}
    with pytest.raises(NodeDataError, match="dp_args has no effect"):
        make_plan(dp_args=privacy)


def test_a_node_writes_for_its_owner_alone_once_a_plan_has_come(make_plan, tmp_path):
    os.umask(0o022)
    make_plan(node=None)  # at the researcher, whose settings stay as they are
    assert os.umask(0o022) == 0o022
    make_plan()
    assert os.umask(0o022) == 0o077
