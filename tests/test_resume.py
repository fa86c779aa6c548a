"""What a run of federated segmentation keeps to go on after an interruption, and when it is refused to."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fedfactory.adaptation.methods.registry import METHODS, make_method
from fedfactory.errors import CheckpointError, FederationError, UsageError
from fedfactory.node.site_facts import description_of
from fedfactory.researcher.round_records import QuorumChange, ReceivedUpdate
from fedfactory.researcher.segmentation import RESULTS, SegmentationResult, interrupted_run, train_method
from fedfactory.researcher.segmenting.run_progress import RunProgress, require_same_run, require_same_stores
from helpers import CONFIG, site, site_facts


def progress(**changes) -> RunProgress:
    facts = {"n1": site_facts(patients=2, class_names={"1": "disc"}), "n2": site_facts(label_kinds={"box": 3})}
    return RunProgress(
        **{"tag": "hearts", "min_nodes": 1, "facts": facts, "breakpoint": "/b/breakpoint_0000", **changes}
    )


def result(**changes) -> SegmentationResult:
    update = ReceivedUpdate(node_name="n1", domain="x", numbers={"loss": 0.5, "own_hd95": float("nan")})
    return SegmentationResult(CONFIG, {"n1": update}, [{"n1": update}], 1.5, progress(**changes))


def test_what_is_kept_of_a_run_is_read_as_it_was_written(tmp_path):
    result().save(tmp_path / "run")
    read = interrupted_run(tmp_path / "run")
    assert read.run == progress() and read.config == CONFIG and len(read.history) == 1 and read.seconds == 1.5
    assert read.history[0]["n1"].numbers["loss"] == 0.5


def test_there_must_be_a_run_that_is_not_finished(tmp_path):
    with pytest.raises(UsageError, match="no run to resume"):
        train_method("fedavg", tmp_path / "run", researcher="r", nodes=None, rounds=1, resume=True)
    result(finished=True, breakpoint=None).save(tmp_path / "run")
    with pytest.raises(UsageError, match="nothing to resume"):
        interrupted_run(tmp_path / "run")
    file = tmp_path / "run" / RESULTS
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "run": None}))  # of a version that could not resume
    with pytest.raises(UsageError, match="nothing to resume"):
        interrupted_run(tmp_path / "run")
    file.write_text(json.dumps({**content, "run": {"tag": "hearts"}}))
    with pytest.raises(CheckpointError, match="not readable"):
        interrupted_run(tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "config", "named"),
    [
        ({"tag": "lungs"}, {}, r"\(tag lungs in place of hearts\)"),
        ({"public_digest": "1" * 64}, {}, "public 1"),
        ({}, {"rounds": 9, "learning_rate": 0.5}, "rounds 9 in place of .*learning_rate 0.5 in place of None"),
        ({}, {"options": {"box_cover": 0.1}}, "box_cover 0.1 in place of None"),
    ],
)
def test_a_run_is_resumed_with_the_settings_it_began_with(tmp_path, changes, config, named):
    began = (progress(), CONFIG)
    require_same_run(tmp_path, began, (progress(breakpoint=None), replace(CONFIG)))
    with pytest.raises(UsageError, match=named) as caught:
        require_same_run(tmp_path, began, (progress(**changes), replace(CONFIG, **config)))
    assert "\n" not in str(caught.value)


def test_a_run_is_resumed_with_another_number_of_answers(tmp_path):
    began = progress(min_nodes=3)
    require_same_run(tmp_path, (began, CONFIG), (progress(min_nodes=1), CONFIG))
    began.require_answers(3, round_done=1)
    assert began == progress(min_nodes=3)
    began.require_answers(1, round_done=7)
    read = RunProgress.from_dict(json.loads(json.dumps(began.to_dict())))
    assert read == began and (read.min_nodes, read.quorum_changes) == (1, [QuorumChange(round=8, before=3)])


def test_a_run_is_resumed_with_the_stores_it_began_with_and_without_a_site_that_is_away(tmp_path):
    run = progress()
    described = {node: description_of(facts) for node, facts in run.facts.items()}
    require_same_stores(tmp_path, run, {**described, "n3": "another site"})
    require_same_stores(tmp_path, run, {"n2": described["n2"]})
    pseudo_labelled = replace(run.facts["n2"], pseudo_labels=3)  # which no federated segmentation reads
    require_same_stores(tmp_path, run, {**described, "n2": description_of(pseudo_labelled)})
    with pytest.raises(FederationError, match=r"\(n1: slices, label_kinds\)"):
        grown = description_of(replace(run.facts["n1"], slices=4, label_kinds={"dense": 4}))
        require_same_stores(tmp_path, run, {**described, "n1": grown})
    with pytest.raises(FederationError, match="none of the 2 nodes"):
        require_same_stores(tmp_path, run, {"n3": described["n1"]})


def average_of(method, **more):
    from fedfactory.researcher.method_aggregator import MethodAverage

    return MethodAverage(method, ["n1", "n2"], {"n1": {"none": 3}, "n2": {"box": 3}}, **more)


def test_what_a_breakpoint_holds_of_an_average_is_a_plain_dictionary():
    """HSSF gives a module's ordered one, which the framework cannot write."""
    from fedbiomed.common.serializer import Serializer

    given = OrderedDict(w=torch.ones(2))
    average = average_of(SimpleNamespace(aggregate=lambda *_: (given, {0: 1.0})))
    replies = {"n1": {"optimizer_args": {"samples": 3, "loss": 0.5}}}
    found = average.aggregate({"n1": None}, {}, training_replies=replies, global_model={})
    assert Serializer.loads(Serializer.dumps(found))["w"].tolist() == [1.0, 1.0]


def resumed(average, folder):
    """As the framework makes an aggregator from a breakpoint, whose entry went through a JSON file."""
    from fedfactory.researcher.method_aggregator import MethodAverage

    folder.mkdir()
    state = json.loads(json.dumps(average.save_state_breakpoint(str(folder), global_model={})))
    assert state["class"] == "MethodAverage" and state["module"] == MethodAverage.__module__
    made = MethodAverage()
    made.load_state_breakpoint(state, training_plan=None)
    return made


def test_the_researchers_network_and_its_optimizer_survive(tmp_path):
    """The next update after a resumption equals that of an undisturbed run; without the optimizer's moments, or from
    new weights, it differs."""
    config = replace(CONFIG, method="hssf", options={"public_slices": 12, "public_epochs": 1})
    method = make_method(config)
    method.public = site()
    method._server = method.trainee_of(method.fresh_network("unet"))

    def train(trained, number):
        trained.train_on_public_slices(
            trained._server, trained.public_views(trained.public), number=number, phase=1, teacher=None
        )
        return {name: value.clone() for name, value in trained.server.state_dict().items()}

    torch.manual_seed(0)
    before = train(method, 1)
    read = resumed(average_of(method, public_digest="1" * 64), tmp_path / "breakpoint")
    assert (read.sites, read.public_digest, read.method.config) == (["n1", "n2"], "1" * 64, config)
    assert read.create_aggregator_args({}, ["n2"])["n2"]["label_kinds"] == {"box": 3}
    assert all(torch.equal(value, before[name]) for name, value in read.method.server.state_dict().items())
    read.method.public = site()
    torch.manual_seed(1)
    undisturbed = train(method, 2)
    torch.manual_seed(1)
    found = train(read.method, 2)
    assert all(torch.equal(found[name], undisturbed[name]) for name in found)
    assert any(not torch.equal(found[name], before[name]) for name in found)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("hssf", "lssl", "cmc")])
def test_other_methods_keep_nothing_at_the_researcher(name, tmp_path):
    method = make_method(replace(CONFIG, method=name, options={}))
    read = resumed(average_of(method), tmp_path / "breakpoint")
    assert type(read.method) is type(method) and read.method.server_state() == {}
    assert not list((tmp_path / "breakpoint").iterdir())
