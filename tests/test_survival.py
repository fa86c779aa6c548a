"""Three real nodes and a researcher that are killed, frozen and resumed; and the bytes that a node sends."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fedfactory.common.weights_file import read_weights
from fedfactory.errors import UsageError
from fedfactory.researcher.round_records import QuorumChange
from fedfactory.researcher.run_state import RunState
from fedfactory.researcher.training import resume
from helpers import PATIENT, SITES, TAG


@pytest.fixture(scope="module")
def federation(approved):
    return approved


def start(federation, name, *extra, program=None) -> subprocess.Popen:
    """A `fedfactory train` command in the background; its experiment folder and log bear its name."""
    words = [
        "train", "--researcher", federation.researcher, "--out", federation.folder / name, "--tag", TAG,
        "--config", federation.folder / "config.json", "--updates-per-round", 3, "--node-timeout", 60, *extra,
    ]  # fmt: skip
    program = program or "from fedfactory.cli import main; main()"
    log = (federation.folder / f"{name}.log").open("ab")
    command = [sys.executable, "-c", program, *(str(word) for word in words)]
    return subprocess.Popen(command, stdout=log, stderr=log, env=federation._environment())


def log_of(federation, name) -> str:
    return (federation.folder / f"{name}.log").read_text(errors="replace")


def wait_for_round(federation, name, number, timeout=120) -> None:
    deadline = time.monotonic() + timeout
    while f"round {number} of" not in log_of(federation, name):
        assert time.monotonic() < deadline, log_of(federation, name)
        time.sleep(0.05)


def weights_of(federation, name) -> dict[str, torch.Tensor]:
    return read_weights(federation.folder / name / "checkpoint.safetensors", kind="factory")[0]


def test_a_killed_researcher_goes_on_where_it_was(federation, reference):
    """Killed early, between rounds and within a round; each time resumed by a command with `--resume`, which may
    ask for fewer answers: that changes no weights of rounds in which all sites answer."""
    fewer_from = None
    run = start(federation, "killed", "--rounds", 6, "--seed", 5)
    for after, moment in ((1, 0.0), (3, 0.4)):
        wait_for_round(federation, "killed", after)
        time.sleep(moment)
        run.kill()
        run.wait()
        done = RunState.load(federation.folder / "killed").round_done
        assert done >= after
        if done == 6:
            break
        fewer_from = fewer_from or done + 1
        run = start(federation, "killed", "--resume", "--min-nodes", 1)
    assert run.wait(200) == 0, log_of(federation, "killed")
    weights = weights_of(federation, "killed")
    undisturbed = weights_of(federation, "reference")
    assert weights.keys() == undisturbed.keys()
    assert max(float((weights[n].double() - undisturbed[n].double()).abs().max()) for n in weights) < 1e-6
    state = RunState.load(federation.folder / "killed")
    assert [row["round"] for row in state.history["bright"]] == [1, 2, 3, 4, 5, 6]
    assert (state.min_answers, state.quorum_changes) == (1, [QuorumChange(round=fewer_from, before=2)])
    assert len(list(Path(state.breakpoint).parent.glob("breakpoint_*"))) < 4  # older breakpoints are deleted


def test_a_finished_or_missing_run_is_not_resumed(federation, reference):
    with pytest.raises(UsageError, match="nothing to resume"):
        resume(federation.folder / "reference", researcher=federation.researcher)
    with pytest.raises(UsageError, match="choose a folder that a training run wrote"):
        resume(federation.folder / "nowhere", researcher=federation.researcher)


def run_with_a_killed_node(federation, name, rounds, *extra) -> RunState:
    """A run in whose third round a node is killed, and started again two rounds later; its state at the end.

    Another node is frozen while the killed one starts: on a fast machine the run would end before it is back.
    """
    run = start(federation, name, "--rounds", rounds, "--updates-per-round", 25, "--min-nodes", 2, *extra)
    wait_for_round(federation, name, 2)
    time.sleep(0.3)
    federation.signal("west", signal.SIGKILL)
    federation.forget("west")
    wait_for_round(federation, name, 4)
    federation.signal("dark", signal.SIGSTOP)
    federation.start(["west"])
    federation.signal("dark", signal.SIGCONT)
    assert run.wait(200) == 0, log_of(federation, name)
    state = RunState.load(federation.folder / name)
    assert state.round_done == rounds
    assert {event.kind for event in state.events} <= {"lost", "absent"}
    assert state.events
    return state


def test_a_run_goes_on_without_a_killed_node_which_rejoins_later(federation):
    state = run_with_a_killed_node(federation, "lost", 14)
    assert len(state.history["bright"]) == 14
    assert 14 < len(state.history["dark"]) < 28
    assert len(state.site_updates) == 3  # it is back in the last round


def test_a_frozen_node_is_left_behind_at_the_deadline_and_rejoins(federation):
    run = start(federation, "frozen", "--rounds", 6, "--updates-per-round", 10, "--min-nodes", 2, "--round-timeout", 4)
    wait_for_round(federation, "frozen", 2)
    federation.signal("west", signal.SIGSTOP)
    wait_for_round(federation, "frozen", 4, timeout=40)
    federation.signal("west", signal.SIGCONT)
    assert run.wait(200) == 0, log_of(federation, "frozen")
    state = RunState.load(federation.folder / "frozen")
    assert any(event.kind == "lost" for event in state.events)
    assert max(state.seconds) < 15  # without a deadline the framework waits two minutes


def test_a_node_that_fails_in_every_round_does_not_stop_the_others(federation, config):
    """Its slices are not numbers, so the discriminator's loss is not finite; the site's own check stops it."""
    store = federation.folder / f"{PATIENT}_west.store"
    index = json.loads((store / "store.json").read_text())
    images = store / index["arrays"]["images"]
    good = images.read_bytes()
    images.write_bytes(good[:128] + np.full((len(good) - 128) // 2, np.nan, np.float16).tobytes())
    try:
        assert start(federation, "failing", "--rounds", 2, "--min-nodes", 2).wait(200) == 0
    finally:
        images.write_bytes(good)
    state = RunState.load(federation.folder / "failing")
    assert [event.kind for event in state.events] == ["failed", "failed"]
    assert all(event.reason for event in state.events)
    assert PATIENT not in log_of(federation, "failing")


def test_half_precision_and_encrypted_sums_give_the_same_weights(federation, reference):
    """Both round a little: half precision by 2**-11 of a round's change, encryption by steps of 5e-7."""
    once = ("--rounds", 1, "--seed", 5)
    assert start(federation, "half", *once, "--transport", "float16").wait(200) == 0
    assert start(federation, "encrypted", *once, "--secagg").wait(200) == 0, log_of(federation, "encrypted")
    half, encrypted = weights_of(federation, "half"), weights_of(federation, "encrypted")
    assert 0 < max(float((encrypted[name] - half[name]).abs().max()) for name in half) < 5e-5
    sent, whole = (RunState.load(federation.folder / name).site_updates for name in ("half", "reference"))
    assert max(u.num_bytes for u in sent.values()) < 0.51 * max(u.num_bytes for u in whole.values())


def test_an_encrypted_run_repeats_a_round_that_lost_a_node(federation):
    """The sum of an incomplete round cannot be decrypted; the remaining nodes repeat the round."""
    run_with_a_killed_node(federation, "gap", 6, "--secagg")


RECORDER = """
import sys
from fedbiomed.common.serializer import Serializer
decode = Serializer.loads
def loads(data):
    with open(sys.argv[sys.argv.index("--out") + 1] + ".bytes", "ab") as file:
        file.write(data)
    return decode(data)
Serializer.loads = staticmethod(loads)
from fedfactory.cli import main
main()
"""


def test_nothing_a_node_sends_contains_an_image_a_path_or_a_name(federation, config):
    """Everything that the researcher decodes is written down, and searched for the sites' own slices and names."""
    run = start(federation, "recorded", "--rounds", 1, program=RECORDER)
    assert run.wait(200) == 0, log_of(federation, "recorded")
    sent = (federation.folder / "recorded.bytes").read_bytes()
    parameters = sum(
        tensor.numel() for name, tensor in weights_of(federation, "recorded").items() if name.startswith("g.")
    )
    assert len(sent) > 3 * 4 * parameters  # the weights of all sites are in it
    assert b"images_per_second" in sent
    for private in (PATIENT.encode(), str(federation.folder).encode(), b".store", b"case0"):
        assert private not in sent
    for name in SITES:
        store = federation.folder / f"{PATIENT}_{name}.store"
        images = np.load(store / json.loads((store / "store.json").read_text())["arrays"]["images"])
        for slice_ in images[:: len(images) // 4]:
            row = slice_[0, np.argmax(slice_[0].std(axis=1))][4:10]  # six pixels that are not padding
            for kind in (np.float16, np.float32, np.float64):
                assert row.astype(kind).tobytes() not in sent


def test_a_site_that_does_not_agree_can_be_left_out(federation, config):
    folder = federation.folder
    (folder / "config.json").write_text(json.dumps(replace(config, domains=("bright", "other")).to_dict()))
    try:
        assert start(federation, "left", "--rounds", 1, "--min-nodes", 1, "--leave-out").wait(100) == 0
        assert [update.domain for update in RunState.load(folder / "left").site_updates.values()] == ["bright"]
    finally:
        (folder / "config.json").write_text(json.dumps(config.to_dict()))


def test_status_shows_progress_and_events(federation, reference):
    command = [
        sys.executable,
        "-c",
        "from fedfactory.cli import main; main()",
        "status",
        federation.folder / "reference",
    ]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "round 6 of 6, finished" in text
    assert "round 6 of 6, finished" in (federation.folder / "reference" / "report.html").read_text()
    assert re.search(r"bright +│ +6", text)
