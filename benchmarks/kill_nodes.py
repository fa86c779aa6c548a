"""Kill one of three real nodes again and again, at random moments of a run; the run must finish with the others.

    uv run python benchmarks/kill_nodes.py --kills 9 --out benchmarks/results/kill_nodes.json

Every kill is SIGKILL, at a random share of a round's time, so that it falls into updates, uploads and pauses;
the node is started again before the next. Reported: rounds, events, and the seconds of rounds with and without a loss.
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
from fedfactory.researcher.run_state import RunState
from measuring import machine
from round_overhead import TAG, make_stores

NODES = ("north", "south", "west")
UPDATES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, LocalFederation(Path(name), list(NODES)) as federation:
        content = run(federation, Path(name), arguments.kills, random.Random(arguments.seed))
    content = {"machine": machine("cpu"), "seed": arguments.seed, "kills": arguments.kills, **content}
    if arguments.out:
        write_json(arguments.out, content)
    print(content)


def run(federation: LocalFederation, folder: Path, kills: int, rng: random.Random) -> dict:
    federation.begin()
    stores = make_stores(folder, list(NODES))
    # A few seconds a round: updates, upload and averaging each take a visible share of it.
    config = FactoryConfig.preset(
        "tiny", NODES, image_size=64, z_bins=4, head="image", start_size=4, channels=(128,) * 5, batch_size=1
    )
    write_json(folder / "config.json", config.to_dict())
    federation.wait_for("create")
    add = {n: federation.site_command("add", str(federation.nodes[n]), "--store", str(stores[n]), "--tag", TAG)
           for n in NODES}  # fmt: skip
    federation.run_together("add", add)
    federation.start_nodes()
    rounds = 12 * kills
    words = [
        "train", "--researcher", federation.researcher, "--out", folder / "run", "--tag", TAG, "--config",
        folder / "config.json", "--rounds", rounds, "--updates-per-round", UPDATES, "--min-nodes", 2,
        "--approval-timeout", 120, "--node-timeout", 120,
    ]  # fmt: skip
    program = [sys.executable, "-c", "from fedfactory.cli import main; main()", *map(str, words)]
    log = (folder / "run.log").open("wb")
    child = subprocess.Popen(program, stdout=log, stderr=log, env=federation._environment())
    approve = {n: federation.site_command("approve", str(federation.nodes[n]), "--yes", "--wait", "90") for n in NODES}
    federation.run_together("approve", approve)
    moments = []
    for _ in range(kills):
        state = wait_for_rounds(folder, child, 3)
        usual = sorted(state.seconds[-6:])[len(state.seconds[-6:]) // 2]
        share = rng.random()
        time.sleep(share * usual)
        victim = rng.choice(NODES)
        federation.signal(victim, signal.SIGKILL)
        federation.forget(victim)
        moments.append({"node": victim, "share_of_a_round": round(share, 2), "after_round": state.round_done})
        wait_for_rounds(folder, child, 2)
        federation.start([victim])
    ended = child.wait(1200)
    state = RunState.load(folder / "run")
    lost = {event.round for event in state.events if event.kind == "lost"}
    return {
        "exit_code": ended,
        "rounds_done": state.round_done,
        "rounds_planned": rounds,
        "moments": moments,
        "events": {kind: sum(event.kind == kind for event in state.events) for kind in ("lost", "absent", "failed")},
        "median_seconds": sorted(state.seconds)[len(state.seconds) // 2],
        "seconds_of_rounds_that_lost_a_node": [state.seconds[number - 1] for number in sorted(lost)],
    }


def wait_for_rounds(folder: Path, child: subprocess.Popen, more: int) -> RunState:
    """The run's state after that many further rounds."""
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
