"""A guarded node, by the framework's own round: what it runs and refuses, what leaves it, what it writes down."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from fedfactory.errors import NodeDataError
from fedfactory.node.ledger.ledger import Ledger
from fedfactory.node.policy.policy import POLICY_FILE, Policy
from fedfactory.node.protection import guarded_round
from guarded_node import GuardedNode, factory_request

PRIVACY = {"type": "local", "sigma": 1.0, "clip": 1.0}  # as the framework takes it
REFUSED = "this site's policy refuses the request"


@pytest.fixture
def store(copied_store):
    return copied_store


@pytest.fixture
def node(tmp_path, store) -> GuardedNode:
    return GuardedNode(tmp_path / "node", store.path)


@pytest.fixture
def request_(node, config):
    """An honest request, whose plan is approved."""
    made = factory_request(config)
    assert node.approve(made.source)
    return made


def test_an_honest_round_sends_what_its_plan_declares_and_the_ledger_lists_it(node, request_):
    reply = node.run(request_)
    assert reply.success, reply.msg
    assert set(reply.params) == set(request_.params)
    entry = node.ledger[-1]
    assert (entry.event, entry.plan, entry.experiment) == ("round", "FactoryPlan", request_.experiment)
    assert {name for name, *_ in entry.tensors} == set(reply.params)
    assert entry.bytes == sum(tensor.numel() * tensor.element_size() for tensor in reply.params.values())
    assert entry.numbers == reply.optimizer_args
    assert entry.numbers["domain"] == "bright"
    assert Ledger(node.root).verify().problem is None
    assert not any("/" in str(value) for value in entry.numbers.values())


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("one slice", lambda r: r.training_args.update(loader_args={"batch_size": 1})),
        ("one update", lambda r: r.training_args.update(num_updates=1)),
        ("validation by the framework", lambda r: r.training_args.update(test_ratio=0.5, test_on_global_updates=True)),
        (
            "privacy without effect",
            lambda r: r.training_args.update(dp_args={"type": "local", "sigma": 1.0, "clip": 1.0}),
        ),
        ("an unknown argument", lambda r: r.model_args.update(path="/etc/passwd")),
        ("a way out of the node's folder", lambda r: setattr(r, "experiment", "../../elsewhere")),
        ("a foreign state", lambda r: setattr(r, "state", "../state")),
    ],
)
def test_a_request_that_the_policy_forbids_is_refused_without_details_and_written_down(node, request_, what, change):
    change(request_)
    reply = node.run(request_)
    assert (reply.success, reply.msg, reply.params) == (False, REFUSED, None)
    refusals = [entry for entry in node.ledger if entry.event == "refused"]
    assert len(refusals) == 1, what
    assert refusals[0].reasons


def test_the_quota_counts_all_experiments_and_survives_a_restart(tmp_path, store, config):
    node = GuardedNode(tmp_path / "node", store.path, replace(Policy(), rounds_a_day=2))
    first = factory_request(config)
    node.approve(first.source)
    assert all(node.run(factory_request(config)).success for _ in range(2))
    from fedfactory.node.protection import guard

    guard._guards.clear()  # as when the node starts anew
    assert node.run(factory_request(config)).msg == REFUSED


def test_a_broken_policy_refuses_everything(node, request_):
    (node.root / POLICY_FILE).write_text('{"least_batch": "many"}')
    assert node.run(request_).msg == REFUSED
    assert "least_batch" in node.ledger[-1].reasons[0]


def test_a_plan_with_other_comments_is_another_plan(node, request_):
    changed = request_.source + "\n# a comment that the framework's hash does not see\n"
    reply = node.run(replace(request_, source=changed))
    assert not reply.success
    assert "not registered" in reply.msg


@pytest.mark.parametrize(
    "head", ["# -*- coding: utf-7 -*-\n", "# vim: set fileencoding=utf_7 :\n", "\u202e", "\x1b[2J"]
)
def test_a_disguised_plan_is_neither_run_nor_taken_in_for_approval(node, request_, head):
    disguised = head + request_.source
    assert not node.approve(disguised)
    reply = node.run(replace(request_, source=disguised))
    assert not reply.success
    assert any(entry.event == "refused" for entry in node.ledger)


def test_an_approval_is_void_with_another_package(node, request_):
    from fedfactory.node.protection import guard

    guard.guard_of(node.root).package = "0" * 64
    assert "not registered" in node.run(request_).msg


def test_a_node_without_the_guard_runs_nothing_that_was_approved(node, request_):
    """Another process, in which PyTorch is told not to call what would guard it."""
    (node.root / "plan.txt").write_text(request_.source)
    look = textwrap.dedent(f"""
        from pathlib import Path
        from fedbiomed.common.constants import TrainingPlanApprovalStatus
        from fedbiomed.node.training_plan_security_manager import TrainingPlanSecurityManager
        manager = TrainingPlanSecurityManager(
            db={node.database!r}, node_id="n", node_name="n", hashing="SHA256", tp_approval=True)
        source = Path({str(node.root / "plan.txt")!r}).read_text()
        print(manager.check_training_plan_status(source, TrainingPlanApprovalStatus.APPROVED)[0])
    """)
    found = {}
    for switch in ("0", "1"):
        environment = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": switch}
        load = "import torch, fedbiomed.node.node\n" + look
        done = subprocess.run([sys.executable, "-c", load], env=environment, capture_output=True, text=True, check=True)
        found[switch] = done.stdout.strip().splitlines()[-1]
    assert found == {"0": "False", "1": "True"}


def test_a_plan_refuses_to_run_where_nothing_checks_the_request(request_):
    plan = request_.plan_class()
    from fedbiomed.common.training_args import TrainingArgs

    with pytest.raises(NodeDataError, match="not guarded"):
        plan.post_init(
            request_.model_args, TrainingArgs(request_.training_args, only_required=False), {}, node_id="node"
        )


def test_the_gate_lets_no_tensor_out_that_the_plan_did_not_declare(node, request_):
    """An approved plan, by the mistake of an administrator, that adds the site's images to what it sends."""
    source = request_.source + textwrap.dedent("""
        class Greedy(FactoryPlan):
            def after_training_params(self, flatten=False):
                return {**super().after_training_params(flatten), "images": torch.zeros(1, 16, 16)}
    """)
    source = "import torch\n" + source
    assert node.approve(source)
    greedy = replace(request_, source=source, plan_class=type("Greedy", (), {}))
    reply = node.run(greedy)
    assert (reply.success, reply.msg, reply.params) == (False, REFUSED, None)
    assert "did not declare" in node.ledger[-1].failed


def test_tensors_that_stay_cannot_be_set_and_the_refusal_is_written_down(node, request_):
    foreign = {**request_.params, "discriminator.domain_embedding": torch.zeros(1)}
    reply = node.run(replace(request_, params=foreign))
    assert not reply.success
    assert node.ledger[-1].failed


def test_scalars_of_the_live_view_are_those_that_may_leave(node, request_):
    node.run(request_)
    names = {name for message in node.scalars for name in message.scalar.metric}
    assert names
    assert names <= set(node.ledger[-1].numbers)


def test_a_round_of_an_unguarded_process_has_no_current_round():
    with pytest.raises(NodeDataError):
        guarded_round.current()
