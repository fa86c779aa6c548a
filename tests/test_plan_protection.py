"""What a site's training plan refuses of a researcher, by the framework's own steps of a round."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.errors import NodeDataError
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.guarded_round import GuardedRound, begin
from helpers import SITE_SECRET, guarded
from simulated_node import node_round


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    mask = os.umask(0)
    os.umask(mask)
    yield
    os.umask(mask)


@pytest.fixture(autouse=True)
def guard():
    with guarded() as running:
        yield running


@pytest.fixture
def store(copied_store):
    return copied_store


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


def test_a_state_is_emptied_once_it_is_loaded_since_the_framework_formats_what_is_left(make_plan):
    from fedbiomed.node.round import Round

    plan, later = make_plan("factory"), make_plan("factory")
    plan.optimizers().extra = {"rounds": 3}
    state = plan.optimizers().save_state()
    later.optimizers().load_state(state, load_from_state=True)
    assert later.optimizers().extra == {"rounds": 3}
    assert f"{state}" == "{}"
    source = inspect.getsource(Round._load_round_state)
    first = source.index("load_state(optim_state, load_from_state=True)")
    assert source.index("Optimizer loaded state {optim_state}") > first  # otherwise there is nothing to empty it for


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


def segmentation(**changes):
    """The plan of a method, and its model_args."""
    from fedfactory.researcher.plans.segmentation_plans import PLANS

    values = {"method": "fedavg", "size": 32, "classes": 3, "sites": 2, "rounds": 2, "updates": 2, "batch_size": 2}
    method = MethodConfig(**{**values, "width": 4, **changes})
    return PLANS[method.method], {"config": method.to_dict()}


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_no_plan_runs_at_a_node_that_does_not_guard_its_rounds(make_plan):
    from fedfactory.node.protection import guarded_round

    with begin(None):
        with pytest.raises(NodeDataError, match="not guarded"):
            make_plan()
        with pytest.raises(NodeDataError, match="not guarded"):  # before anything that is sent is looked at
            make_plan("fedbn", dp_args={"type": "local", "sigma": 0.1, "clip": 1.0})
        make_plan(node=None)
    guarded_round.current()


@pytest.mark.parametrize("method", ["fedavg", "fedbn", "local", "fedmix", "gaze"])
def test_a_segmentation_declares_what_it_sends(patients, guard, method):
    plan, arguments = segmentation(method=method)
    reply = node_round(plan, arguments, patients, share_persistent_buffers=True)
    assert guard.tensors == {name: tuple(tensor.shape) for name, tensor in reply.params.items()}
    assert not set(guard.tensors) & set(reply.local)
    assert bool(guard.tensors) == (method != "local")
    assert bool(reply.local) == (method in ("fedbn", "local"))


@pytest.mark.parametrize("kind", ["local", "shared"])
@pytest.mark.parametrize("transport", ["float32", "float16", "int8", "encrypted"])
def test_a_factory_declares_what_it_sends(store, config, guard, kind, transport):
    from fedfactory.researcher.plans.factory_plans import FactoryPlan, SharedDiscriminatorPlan

    flatten = transport == "encrypted"
    arguments = {"factory": replace(config, discriminator=kind).to_dict(), "seed": 0}
    arguments["transport"] = "float16" if flatten else transport
    plan = {"local": FactoryPlan, "shared": SharedDiscriminatorPlan}[kind]
    reply = node_round(plan, arguments, store.path, flatten=flatten, share_persistent_buffers=False)
    if flatten:
        assert len(reply.params) == sum(torch.Size(shape).numel() for shape in guard.tensors.values())
    else:
        assert guard.tensors == {name: tuple(tensor.shape) for name, tensor in reply.params.items()}
    assert any("discriminator." in name for name in guard.tensors) == (kind == "shared")
    assert all(name.startswith("change.") == (transport == "float16") for name in guard.tensors)
    assert all(name.startswith(("levels.", "scale.")) == (transport == "int8") for name in guard.tensors)


def test_what_eight_bits_leave_over_stays_at_the_site_and_is_sent_in_the_next_round(store, config, guard):
    from fedfactory.node.plans.transport import restore
    from fedfactory.researcher.plans.factory_plans import FactoryPlan

    def run(transport: str, before=None):
        arguments = {"factory": config.to_dict(), "seed": 0, "transport": transport}
        before = copy.deepcopy(before)  # optimizers change the tensors of a state that they have loaded
        return node_round(FactoryPlan, arguments, store.path, start, before=before, share_persistent_buffers=False)

    start = initial_generator(config)
    first = run("int8")
    second = run("int8", before=first)
    assert "residual" not in run("float16", before=second).state["extra"]
    for reply in (first, second):
        left = reply.state["extra"]["residual"]
        assert left.keys() == start.keys() and any(tensor.any() for tensor in left.values())
        assert not any("residual" in name for name in reply.params)
    # The same round from the same state without the residual sends something else: the difference is the residual.
    extra = {name: value for name, value in first.state["extra"].items() if name != "residual"}
    state = {**first.state, "extra": extra}
    forgetful = run("int8", before=replace(first, state=state))
    total = {}
    for name, reply in (("kept", second), ("lost", forgetful)):
        sent, left = restore(reply.params, start), reply.state["extra"]["residual"]
        total[name] = {key: sent[key].double() + left[key].double() for key in sent}
    for key, left in first.state["extra"]["residual"].items():
        assert torch.allclose(total["kept"][key] - total["lost"][key], left.double(), atol=1e-5)


def initial_generator(config) -> dict[str, torch.Tensor]:
    """The weights from which every run of this seed begins, without those that stay at the sites."""
    from fedfactory.researcher.plans.factory_plans import FactoryPlan

    plan = FactoryPlan()
    factory = plan.init_model({"factory": config.to_dict(), "seed": 0})
    return {name: p.detach().clone() for name, p in factory.named_parameters() if not plan.tag_parameters(name)}


@pytest.mark.parametrize("kind", ["segmentation", "factory"])
def test_what_a_site_draws_follows_from_its_secret_the_seed_and_what_came(patients, store, config, kind):
    from fedfactory.researcher.plans.factory_plans import FactoryPlan

    def weights(secret: bytes, *, seed: int = 0, bias: float = 0.0, random_seed: int = 0) -> dict:
        if kind == "factory":
            plan, arguments, folder = FactoryPlan, {"factory": config.to_dict(), "seed": 0}, store.path
        else:
            (plan, arguments), folder = segmentation(seed=0), patients
        start = plan()
        from fedbiomed.common.training_args import TrainingArgs

        start.post_init(arguments, TrainingArgs({"loader_args": {"batch_size": 4}}, only_required=False), {})
        received = {n: v + bias for n, v in start.get_model_params().items() if not start.tag_parameters(n)}
        arguments = {**arguments, "seed": seed} if kind == "factory" else segmentation(seed=seed)[1]
        with begin(GuardedRound(policy=Policy(), secret=secret)):
            reply = node_round(plan, arguments, folder, received, random_seed=random_seed)
        return {name: tensor - received[name] for name, tensor in reply.params.items() if name in received}

    first = weights(SITE_SECRET)
    assert same(first, weights(SITE_SECRET))
    assert same(first, weights(SITE_SECRET, random_seed=7))  # the framework's seed decides nothing
    assert not same(first, weights(bytes(32)))
    assert not same(first, weights(SITE_SECRET, seed=1))


def test_other_weights_draw_other_slices(patients):
    """A question that differs a little is not answered about the same slices again."""
    from fedfactory.adaptation.methods.federated_averaging import FederatedAveraging

    seen = []
    draws = FederatedAveraging.draws
    plan, arguments = segmentation()

    class Watched(plan):
        def init_model(self, model_args):
            model = super().init_model(model_args)
            self.method.draws = lambda *a, **k: seen.append(draws(self.method, *a, **k)) or seen[-1]
            return model

    node_round(Watched, arguments, patients)
    start = node_round(Watched, arguments, patients).params
    assert [list(part) for part in seen[0]] == [list(part) for part in seen[1]]
    node_round(Watched, arguments, patients, start)
    assert [list(part) for part in seen[0]] != [list(part) for part in seen[2]]


def test_scores_leave_rounded_and_of_enough_patients_only(patients):
    plan, arguments = segmentation(updates=20, batch_size=4, learning_rate=0.01)
    with guarded(least_patients_scored=1):
        report = node_round(plan, arguments, patients).report
    assert {"own_dice_1", "own_dice_2", "global_dice"} <= set(report)
    assert report["own_test_cases"] == 2
    assert report["own_dice_1"] == round(report["own_dice_1"], 3)
    assert report["loss"] == float(f"{report['loss']:.2e}")
    with guarded(least_patients_scored=2):  # one test patient has the second class
        report = node_round(plan, arguments, patients).report
    assert "own_dice_2" not in report
    assert report["own_dice"] == report["own_dice_1"]  # nothing follows about the class that is left out
    plan, arguments = segmentation(updates=2, batch_size=4)
    with guarded(least_patients_scored=3):
        report = node_round(plan, arguments, patients).report
    assert not [name for name in report if "dice" in name or "hd95" in name]
    assert report["own_test_cases"] == 2
    for closed in (guarded(least_patients_scored=1, scores_leave=False), begin(without_scores())):
        with closed:
            report = node_round(plan, arguments, patients).report
        assert not [name for name in report if name.startswith(("own_", "global_"))]
    assert list(patients.with_name("patients.store.segmenters").glob("*own*"))


def without_scores() -> GuardedRound:
    return GuardedRound(policy=Policy(least_patients_scored=1), secret=SITE_SECRET, scores_left=False)


def test_scalars_that_are_shown_leave_as_the_report_does(patients):
    shown = []

    class Monitor:
        def add_scalar(self, metric, **_):
            shown.append(metric)

    plan, arguments = segmentation()
    with guarded(least_patients_scored=1):
        report = node_round(plan, arguments, patients, monitor=Monitor()).report
    (metric,) = shown
    assert metric.items() <= report.items()


def test_the_frameworks_own_scoring_is_refused(make_plan):
    with pytest.raises(NodeDataError, match="test_ratio"):
        make_plan().testing_routine(None, {}, None, before_train=True)
