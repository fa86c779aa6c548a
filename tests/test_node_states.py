"""What a node keeps between rounds, with the framework's own round and state manager."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from fedfactory.cli import main
from fedfactory.errors import UsageError
from fedfactory.node.fedbiomed_hooks import PersistentOptimizerPlan
from fedfactory.node.states import state_rows as rows_of_database
from fedfactory.node.states.state_rows import TABLE, StateRow, remove_rows, state_rows
from fedfactory.node.states.states import (
    DAY,
    FOLDER_OF_EXPERIMENT,
    FOLDER_OF_NODE,
    STATE_FILE,
    StatePlace,
    after_round,
    bytes_of_states,
    check_experiment_id,
    check_state_id,
    keep_newest_states,
    remove_leftovers,
    remove_orphans,
    state_place,
    states_of,
)
from helpers import guarded

NODE_ID, EXPERIMENT, OTHER = "NODE_1", "exper_1", "exper_2"


class SmallPlan(PersistentOptimizerPlan):
    """A plan with one tensor that travels, and one that stays at the site."""

    def init_model(self, model_args):
        return torch.nn.Linear(1, 1)

    def make_optimizers(self, model):
        return {"adam": torch.optim.Adam(model.parameters())}

    def tag_parameters(self, name):
        return {"local", "persistent"} if name == "bias" else set()

    def training_data(self):
        raise NotImplementedError

    def training_step(self, data, target):
        raise NotImplementedError


@pytest.fixture(scope="module")
def plan():
    from fedbiomed.common.training_args import TrainingArgs

    mask = os.umask(0)
    plan = SmallPlan()
    arguments = {"loader_args": {"batch_size": 1}, "num_updates": 1}
    with guarded():
        plan.post_init({}, TrainingArgs(arguments, only_required=False), {}, node_id=NODE_ID)
    os.umask(mask)
    return plan


@pytest.fixture
def node(tmp_path):
    """The folder of a node that has not run yet."""
    root = tmp_path / "node"
    (root / "etc").mkdir(parents=True)
    (root / "var").mkdir()
    (root / "etc" / "config.ini").write_text(
        f"[default]\nid = {NODE_ID}\ncomponent = NODE\nname = x\ndb = ../var/db.json\n[researcher]\nip = localhost\n"
        "port = 1\n[certificate]\npublic_key = a\nprivate_key = b\n"
    )
    return root


def database_of(root: Path) -> Path:
    return root / "var" / "db.json"


def folder_of(root: Path, experiment: str = EXPERIMENT) -> Path:
    return root / "var" / f"{FOLDER_OF_NODE}{NODE_ID}" / f"{FOLDER_OF_EXPERIMENT}{experiment}"


def make_round(root: Path, plan: SmallPlan, number: int, previous: str | None, experiment: str = EXPERIMENT):
    """The framework's round as the node makes it for a request, up to where its plan was set up."""
    from fedbiomed.node.round import Round

    round_ = Round(
        root_dir=str(root), db=str(database_of(root)), node_id=NODE_ID, node_name="x", training_plan="",
        training_plan_class="SmallPlan", model_kwargs={}, training_kwargs={"num_updates": 1}, training=True,
        dataset_entry={}, params={}, experiment_id=experiment, researcher_id="r", history_monitor=None,
        aggregator_args={}, node_args={}, tp_security_manager=None, round_number=number,
    )  # fmt: skip
    assert round_.initialize_arguments(previous) is None
    round_.training_plan = plan
    return round_


def save(root: Path, plan: SmallPlan, number: int, previous: str | None, experiment: str = EXPERIMENT) -> str:
    """Begin from a state, change the model, and save; the new state's identifier. The bias is the round's number."""
    round_ = make_round(root, plan, number, previous, experiment)
    if previous is not None:
        round_._load_round_state(previous)
    plan.optimizers().extra["round"] = number
    with torch.no_grad():
        plan.model().bias.fill_(number)
    round_._save_round_state()
    return round_._node_state_manager.state_id


def load(root: Path, plan: SmallPlan, state_id: str, experiment: str = EXPERIMENT) -> int:
    """The number of the round whose state this is, as the framework loads it, from both of its files."""
    plan.optimizers().extra.clear()
    round_ = make_round(root, plan, 0, state_id, experiment)
    round_._load_round_state(state_id)
    number = plan.optimizers().extra["round"]  # the framework only logs if it cannot load this file
    assert round_._persistent_model_weights["bias"].item() == number
    return number


def clean(root: Path, state_id: str | None, previous: str | None, experiment: str = EXPERIMENT):
    return after_round(root, NODE_ID, database_of(root), experiment, state_id, previous_state_id=previous)


def kept(root: Path, experiment: str = EXPERIMENT) -> list[str]:
    return [row.state_id for row in state_rows(database_of(root)) if row.experiment_id == experiment]


def states_on_disk(root: Path, experiment: str = EXPERIMENT) -> set[str]:
    return {STATE_FILE.fullmatch(path.name)[1] for path in folder_of(root, experiment).iterdir()}


def test_names_are_those_of_the_framework(node, plan):
    from fedbiomed.node.node_state_manager import NODE_STATE_TABLE_NAME, NodeStateFileName

    assert TABLE == NODE_STATE_TABLE_NAME
    state = save(node, plan, 1, None)
    assert kept(node) == [state]
    for element in NodeStateFileName:
        assert STATE_FILE.fullmatch(element.value % (1, state))[1] == state
    assert check_state_id(state) == state
    assert state_place(node) == StatePlace(folder=folder_of(node).parent, database=database_of(node).resolve())


def test_many_rounds_leave_two_states_and_touch_nothing_else(node, plan):
    other = save(node, plan, 7, None, OTHER)
    content = json.loads(database_of(node).read_text())
    content["Datasets"] = {"1": {"path": "store-ä"}}
    database_of(node).write_text(json.dumps(content))
    states = [None]
    for number in range(1, 351):
        states.append(save(node, plan, number, states[-1]))
        clean(node, states[-1], states[-2])
        assert kept(node) == [state for state in states[-2:] if state]
    assert states_on_disk(node) == set(states[-2:])
    assert len(list(folder_of(node).iterdir())) == 4
    assert (load(node, plan, states[-1]), load(node, plan, states[-2])) == (350, 349)
    assert load(node, plan, other, OTHER) == 7
    assert json.loads(database_of(node).read_text())["Datasets"] == {"1": {"path": "store-ä"}}


def test_the_state_that_repeated_rounds_began_from_stays(node, plan):
    """The researcher asks for it again and again; the two newest states alone would not contain it."""
    begun_from = save(node, plan, 1, None)
    clean(node, begun_from, None)
    for _ in range(4):
        repeated = save(node, plan, 2, begun_from)
        clean(node, repeated, begun_from)
        assert kept(node) == [begun_from, repeated]
    assert load(node, plan, begun_from) == 1
    following = save(node, plan, 3, repeated)
    clean(node, following, repeated)
    assert kept(node) == [repeated, following]


def test_a_round_that_saved_nothing_removes_nothing(node, plan):
    first = save(node, plan, 1, None)
    second = save(node, plan, 2, first)
    third = save(node, plan, 3, second)
    failed = make_round(node, plan, 4, first)._node_state_manager.state_id
    for state in (failed, None, second):
        assert clean(node, state, first).rows == 0
    assert kept(node) == [first, second, third]
    assert len(list(folder_of(node).iterdir())) == 6


def test_what_a_killed_round_left_is_removed_with_the_next_states(node, plan):
    first = save(node, plan, 1, None)
    half = folder_of(node) / "optim_state_2_node_state_0a1b"
    half.write_bytes(b"half")
    foreign = folder_of(node) / "notes.txt"
    foreign.write_text("by a person")
    assert clean(node, first, None).bytes == 4
    assert not half.exists()
    assert foreign.exists()


def test_keeping_more_states_or_needed_ones(node, plan):
    states = [save(node, plan, number, None) for number in range(5)]
    place = state_place(node)
    keep_newest_states(place, EXPERIMENT, keep=3, needed=[states[0]])
    assert kept(node) == [states[0], states[3], states[4]]
    keep_newest_states(place, EXPERIMENT, keep=1, needed=[states[0]])
    assert kept(node) == [states[4]]


@pytest.mark.parametrize("text", ["", "..", "a/b", "a\\b", "a" * 81, "a\n", "a b", "é", "\u202e", "a.b", 7, None, b"a"])
def test_an_identifier_that_could_be_a_path_is_refused(node, text):
    with pytest.raises(UsageError, match=r"experiment_id is .*; it must be"):
        check_experiment_id(text)
    with pytest.raises(UsageError, match="experiment_id"):
        clean(node, "node_state_1", None, text)
    if text is not None:
        with pytest.raises(UsageError, match=r"state_id is .*; it must be"):
            check_state_id(text)


def test_identifiers_of_the_framework_are_accepted():
    from fedbiomed.common.constants import EXPERIMENT_PREFIX

    for text in (f"{EXPERIMENT_PREFIX}5f5a6f4e-3b5e-4a75-a1ab-4a1d3a2d0c11", "a", "a" * 80):
        assert check_experiment_id(text) == text
    assert check_state_id(None) is None


def test_a_kill_between_write_and_cut_leaves_a_readable_database(node, plan, monkeypatch):
    states = [save(node, plan, number, None) for number in range(6)]
    size = database_of(node).stat().st_size
    monkeypatch.setattr(os, "ftruncate", None)  # nothing may be cut off
    keep_newest_states(state_place(node), EXPERIMENT)
    assert database_of(node).stat().st_size == size
    assert kept(node) == states[-2:]
    state = save(node, plan, 7, states[-1])  # the framework reads it, and writes it with another length
    assert kept(node) == [*states[-2:], state]


def test_a_row_that_another_thread_adds_meanwhile_is_not_lost(node, plan):
    first, second = save(node, plan, 1, None), save(node, plan, 2, None)
    added = []

    def doomed(rows: list[StateRow]) -> list[StateRow]:
        if not added:
            added.append(save(node, plan, 3, None))
        return [row for row in rows if row.state_id == first]

    remove_rows(database_of(node), doomed)
    assert kept(node) == [second, *added]


def test_a_damaged_database_is_named_and_left_alone(node):
    for text in ("{", "[1]", '{"Node_states": [1]}', "[" * 100_000):
        database_of(node).write_text(text)
        with pytest.raises(UsageError, match=r"db\.json: the node's database is damaged"):
            keep_newest_states(state_place(node), EXPERIMENT)
        assert database_of(node).read_text() == text
    database_of(node).unlink()
    assert keep_newest_states(state_place(node), EXPERIMENT).rows == 0
    assert not database_of(node).exists()


def test_files_are_found_by_name_and_never_by_what_a_row_says(node, plan, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("not the node's")
    states = [save(node, plan, number, None) for number in range(3)]
    content = json.loads(database_of(node).read_text())
    content[TABLE]["1"]["optimizer_state"]["state_path"] = str(precious)
    database_of(node).write_text(json.dumps(content))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / f"optim_state_1_{states[0]}").write_text("not the node's")
    folder_of(node, OTHER).symlink_to(outside)
    keep_newest_states(state_place(node), EXPERIMENT)
    keep_newest_states(state_place(node), OTHER)
    remove_orphans(node, now=time.time() + 7 * DAY)
    assert kept(node) == states[-2:]
    assert precious.exists()
    assert len(list(outside.iterdir())) == 1


def save_until_killed(root: Path, plan: SmallPlan, first_done: int) -> None:
    """What a node does between its start and the kill: rounds, one after the other. Writes a byte after the first."""
    previous = kept(root)[-1]
    while True:
        state = save(root, plan, 1, previous)
        clean(root, state, previous)
        previous = state
        os.write(first_done, b".")


def test_kills_at_random_moments_leave_a_state_to_begin_from(node, plan):
    state = save(node, plan, 1, None)
    # Before the states, as in every node, which has data before it trains: the framework writes the file in place, and
    # a kill between two pages of the file can leave old text behind new text of another length.
    datasets = {str(number): {"path": "x" * 200} for number in range(50)}
    database_of(node).write_text(json.dumps({"Datasets": datasets, **json.loads(database_of(node).read_text())}))
    rng = random.Random(0)
    for _ in range(20):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_until_killed(node, plan, writer)
            finally:
                os._exit(1)
        assert os.read(reader, 1)
        time.sleep(rng.uniform(0, 0.04))
        os.kill(child, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        os.close(reader)
        os.close(writer)
        left = kept(node)
        assert 1 <= len(left) <= 3  # two, and the one that was just saved
        assert load(node, plan, left[-1]) == 1
        assert len(states_on_disk(node)) <= 3
    state = save(node, plan, 2, left[-1])
    clean(node, state, left[-1])
    assert kept(node) == [left[-1], state]
    assert states_on_disk(node) == {left[-1], state}
    assert len(json.loads(database_of(node).read_text())["Datasets"]) == 50


def make_old(root: Path, experiment: str, days: float) -> None:
    moment = time.time() - days * DAY
    for path in folder_of(root, experiment).iterdir():
        os.utime(path, (moment, moment))


def run(*words: object) -> int | None:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code


def test_site_clean_removes_what_is_over_and_leftovers_of_kills(node, plan, capsys):
    state = save(node, plan, 1, None)
    for number in range(3):
        save(node, plan, number, None, OTHER)
    make_old(node, OTHER, 31)
    orphan = folder_of(node) / "optim_state_2_node_state_0a1b"
    orphan.write_bytes(b"half")
    os.utime(orphan, (1, 1))
    young = folder_of(node) / "optim_state_2_node_state_0c"
    young.write_bytes(b"half")
    (node / "var" / "tmp" / "tmpabc").mkdir(parents=True)
    (node / "var" / "tmp" / "tmpabc" / "model_1.py").write_text("")
    assert [(one.experiment_id, one.states, one.orphans) for one in states_of(node)] == [
        (EXPERIMENT, 1, 1),
        (OTHER, 3, 0),
    ]
    size = bytes_of_states(node)
    assert run("site", "clean", node, "--older-than", 32, "--yes") in (0, None)
    assert kept(node, OTHER)
    assert not orphan.exists()
    assert young.exists()
    assert remove_leftovers(node) == 0
    assert run("site", "clean", node, "--yes") in (0, None)
    assert not folder_of(node, OTHER).exists()
    assert not kept(node, OTHER)
    assert load(node, plan, state) == 1
    assert bytes_of_states(node) < size
    shown = capsys.readouterr().out
    assert re.search(rf"{OTHER} +3 +0\.0 +0 +31\.0  over", shown)
    assert "removed 3 states, 6 files" in shown
    assert run("site", "clean", node, "--yes") in (0, None)
    assert "nothing to remove" in capsys.readouterr().out
    assert run("site", "clean", node, "--all", "--yes") in (0, None)
    assert states_of(node) == []


def test_site_clean_asks_and_leaves_all_to_a_no(node, plan, monkeypatch):
    save(node, plan, 1, None)
    make_old(node, EXPERIMENT, 31)
    monkeypatch.setattr("typer.confirm", lambda question: False)
    assert run("site", "clean", node) in (0, None)
    assert len(kept(node)) == 1


def test_site_clean_removes_nothing_in_use_while_the_node_runs(node, plan, monkeypatch, capsys):
    from fedfactory.node.connection.running_nodes import RunningNode

    running = [RunningNode(pid=1, root=node.resolve(), started=0, environment={})]
    monkeypatch.setattr("fedfactory.commands.site_clean.running_nodes", lambda: running)
    states = [save(node, plan, number, None) for number in range(3)]
    in_use = node / "var" / "tmp" / "tmpabc"
    in_use.mkdir(parents=True)
    assert run("site", "clean", node, "--older-than", 1, "--yes") in (0, None)
    assert run("site", "clean", node, "--all", "--yes") == 2
    assert "the node runs; stop it" in capsys.readouterr().err
    assert kept(node) == states
    assert in_use.exists()


def test_site_clean_shows_and_removes_what_a_hostile_identifier_left(node, plan, capsys):
    save(node, plan, 1, None)
    content = json.loads(database_of(node).read_text())
    content[TABLE]["1"]["experiment_id"] = "../\x1b[2J[red]" + "x" * 200
    database_of(node).write_text(json.dumps(content))
    assert run("site", "clean", node, "--all", "--yes") in (0, None)
    shown = capsys.readouterr().out
    assert "\x1b[2J" not in shown
    assert r"../\x1b[2J[red]xxx" in shown
    assert states_of(node) == []
    assert rows_of_database.state_rows(database_of(node)) == []
