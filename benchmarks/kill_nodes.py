"""Robustness of a run: nodes or the researcher are killed at random moments, and the run must finish.

    uv run python benchmarks/kill_nodes.py --kills 20 --out benchmarks/results/kill_nodes.json

Every kill is a SIGKILL of one of three real nodes or of the researcher, after a random share of the time of a round,
so that it occurs during updates, uploads and pauses. A node is started again before the next kill, the researcher's run
is resumed. After each kill of a node its ledger is verified as it stands, and at the end all ledgers; no node may keep
more than two states. The JSON file has the rounds, the events, and the seconds of rounds with and without a lost node.
There are 6 rounds per kill, of about 6 seconds each on two CPU cores. No data are needed. It exits with 1 if the run
did not finish or a ledger is not whole.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedfactory.common.files import write_json
from fedfactory.demo.local_federation import LocalFederation
from fedfactory.generative import FactoryConfig
from fedfactory.node.ledger.ledger import Ledger
from fedfactory.node.states.states import states_of
from fedfactory.researcher.run_state import RunState
from measuring import machine
from round_overhead import TAG, make_stores

NODES = ("north", "south", "west")
RESEARCHER = "researcher"
UPDATES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, LocalFederation(Path(name), list(NODES)) as federation:
        content = run(federation, Path(name), kills=arguments.kills, rng=random.Random(arguments.seed))
    content = {"machine": machine("cpu"), "seed": arguments.seed, "kills": arguments.kills, **content}
    if arguments.out:
        write_json(arguments.out, content)
    print(content)
    whole = all(ledger["problem"] is None for ledger in content["ledgers"].values())
    whole &= all(moment.get("problem") is None for moment in content["moments"])
    whole &= max(content["states_of_an_experiment"].values()) <= 2
    if content["exit_code"] or content["rounds_done"] != content["rounds_planned"] or not whole:
        raise SystemExit(1)


def run(federation: LocalFederation, folder: Path, *, kills: int, rng: random.Random) -> dict:
    """Train while nodes are killed and started again; what happened in the run, by name."""
    federation.begin()
    stores = make_stores(folder, list(NODES))
    # With these sizes a round takes a few seconds, of which updates, upload and averaging each take a fair share.
    config = FactoryConfig.preset(
        "tiny", NODES, image_size=64, z_bins=4, head="image", start_size=4, channels=(128,) * 5, batch_size=2
    )
    write_json(folder / "config.json", config.to_dict())
    federation.wait_for("create")
    add = {n: federation.site_command("add", str(federation.nodes[n]), "--store", str(stores[n]), "--tag", TAG)
           for n in NODES}  # fmt: skip
    federation.run_together("add", add)
    federation.start_nodes()
    rounds = 6 * kills + 6
    words = [
        "train", "--researcher", federation.researcher, "--out", folder / "run", "--tag", TAG, "--config",
        folder / "config.json", "--rounds", rounds, "--updates-per-round", UPDATES, "--min-nodes", 2,
        "--approval-timeout", 120, "--node-timeout", 120,
    ]  # fmt: skip
    child = start_researcher(federation, folder, words)
    approve = {n: federation.site_command("approve", str(federation.nodes[n]), "--yes", "--wait", "90") for n in NODES}
    federation.run_together("approve", approve)
    moments = []
    for _ in range(kills):
        state = wait_for_rounds(folder, child, 3)
        median = sorted(state.seconds[-6:])[len(state.seconds[-6:]) // 2]
        share = rng.random()
        time.sleep(share * median)
        victim = rng.choice((*NODES, RESEARCHER))
        moment = {"killed": victim, "share_of_a_round": round(share, 2), "after_round": state.round_done}
        if victim == RESEARCHER:
            child.kill()
            child.wait()
            resume = ["train", "--researcher", federation.researcher, "--out", folder / "run", "--resume"]
            child = start_researcher(federation, folder, resume)
        else:
            federation.signal(victim, signal.SIGKILL)
            federation.forget(victim)
            moment |= ledger_of(federation.nodes[victim])
            wait_for_rounds(folder, child, 2)
            federation.start([victim])
        moments.append(moment)
    exit_code = child.wait(1200)
    state = RunState.load(folder / "run")
    lost = {event.round for event in state.events if event.kind == "lost"}
    return {
        "exit_code": exit_code,
        "rounds_done": state.round_done,
        "rounds_planned": rounds,
        "moments": moments,
        "ledgers": {name: ledger_of(root) for name, root in federation.nodes.items()},
        "states_of_an_experiment": {
            name: max((one.states for one in states_of(root)), default=0) for name, root in federation.nodes.items()
        },
        "events": {kind: sum(event.kind == kind for event in state.events) for kind in ("lost", "absent", "failed")},
        "median_seconds": sorted(state.seconds)[len(state.seconds) // 2],
        "seconds_of_rounds_that_lost_a_node": [state.seconds[number - 1] for number in sorted(lost)],
    }


def start_researcher(federation: LocalFederation, folder: Path, words: list) -> subprocess.Popen:
    """A `fedfactory` command in the background; its log is run.log."""
    program = [sys.executable, "-c", "from fedfactory.cli import main; main()", *map(str, words)]
    with (folder / "run.log").open("ab") as log:
        return subprocess.Popen(program, stdout=log, stderr=log, env=federation._environment())


def ledger_of(root: Path) -> dict:
    """What the ledger of a node says about itself."""
    check = Ledger(root).verify()
    return {"entries": check.entries, "problem": check.problem, "interrupted_writes": len(check.notes)}


def wait_for_rounds(folder: Path, child: subprocess.Popen, more: int) -> RunState:
    """Wait until `more` further rounds are done, and return the state of the run."""
    first = None
    while True:
        if child.poll() is not None:
            raise SystemExit((folder / "run.log").read_text(errors="replace")[-2000:])
        if (folder / "run" / "experiment.json").is_file():
            state = RunState.load(folder / "run")
            first = state.round_done if first is None else first
            if state.round_done >= max(first + more, 3):
                return state
        time.sleep(0.05)


if __name__ == "__main__":
    main()
