"""Seconds of ten rounds of the demo's phase one with real nodes, and where they go; beside an earlier version if asked.

    uv run python benchmarks/ten_rounds.py --out benchmarks/results/ten_rounds.json
    git worktree add /tmp/before 5a65fba
    uv run python benchmarks/ten_rounds.py --before /tmp/before --out benchmarks/results/ten_rounds.json

Three nodes with simulated subjects train as in `fedfactory demo`, 15 updates a round. The versions take turns, each in
processes and with a federation of its own. The seconds of a round begin when the researcher draws its sites and end
when the run's state is written. Of them `training` is the longest training of a site, as the framework measures it,
`at the node` what the same site needs beside it (loading the state and the plan, its checks, saving), and `between` the
rest: transport, the average, breakpoints and records. The first round is left out, because nodes import their packages
in it. With three nodes on fewer cores a site's training also waits for the other two.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROUNDS = 10
TIMEOUT = 300  # seconds for nodes to begin and to approve
TAG = "ten"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the earlier version")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--of", choices=("federation", "researcher"), help=argparse.SUPPRESS)  # a process of its own
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        run = run_federation if arguments.of == "federation" else run_researcher
        run(arguments.folder)
        return
    from measuring import machine

    versions = {"before": arguments.before, "now": HERE.parents[1]}
    versions = {name: path.resolve() for name, path in versions.items() if path}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for repeat in range(arguments.repeats):
        for name, checkout in versions.items():
            found = measure(checkout)
            runs[name].append(found)
            print(repeat, name, found, flush=True)
    content = {
        "machine": machine("cpu"),
        "load_average": os.getloadavg()[0],
        "rounds": ROUNDS,
        "repeats": arguments.repeats,
        "commits": {name: commit(checkout) for name, checkout in versions.items()},
        "versions": {
            name: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for name, found in runs.items()
        },
        "all": runs,
    }
    if "before" in runs:
        pairs = zip(runs["before"], runs["now"], strict=True)
        content["ratio"] = statistics.median(before["ten rounds"] / now["ten rounds"] for before, now in pairs)
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=2))


def measure(checkout: Path) -> dict[str, float]:
    """Ten rounds of a version: the median of each part of a round in seconds, and the seconds of ten such rounds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        packages = folder / "packages"
        packages.mkdir()
        (packages / "fedfactory").symlink_to(checkout)
        # The version's own benchmarks are not on the path: both run this script.
        search = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, str(HERE), "--of", "federation", "--folder", str(folder)]
        subprocess.run(command, env={**os.environ, "PYTHONPATH": search}, check=True, stdout=subprocess.DEVNULL)
        rounds = json.loads((folder / "rounds.json").read_text())[1:]
    parts = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    return {**parts, "ten rounds": ROUNDS * statistics.mean(one["round"] for one in rounds)}


def run_federation(folder: Path) -> None:
    """The nodes with their data, as the demo makes them, and a researcher's process beside them."""
    from fedfactory.demo.demo import DemoRun, DemoSize, _make_site
    from fedfactory.demo.local_federation import LocalFederation
    from fedfactory.demo.simulated_subjects import CONTRASTS
    from fedfactory.generative import FactoryConfig

    names = list(CONTRASTS)
    config = FactoryConfig.preset("tiny", tuple(names))
    (folder / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    run = DemoRun(out=folder, size=DemoSize(rounds=ROUNDS), config=config, seed=0)
    with LocalFederation(folder / "federation", names) as federation:
        federation.begin()
        sites = [_make_site(run, name, number) for number, name in enumerate(names)]
        federation.wait_for("create")
        nodes = {name: str(path) for name, path in federation.nodes.items()}
        add = {
            site.name: federation.site_command("add", nodes[site.name], "--store", str(site.store), "--tag", TAG)
            for site in sites
        }
        federation.run_together("add", add)
        federation.start_nodes()
        (folder / "researcher").symlink_to(federation.researcher)
        command = [sys.executable, str(HERE), "--of", "researcher", "--folder", str(folder)]
        child = subprocess.Popen(command, env=federation._environment(), stdout=subprocess.DEVNULL)
        approve = {
            name: federation.site_command("approve", path, "--yes", "--wait", str(TIMEOUT))
            for name, path in nodes.items()
        }
        federation.run_together("approve", approve)
        if child.wait():
            raise SystemExit("the researcher's process failed")


def run_researcher(folder: Path) -> None:
    """Train, and write the seconds of every round's parts to `rounds.json`."""
    from fedfactory.generative import FactoryConfig
    from fedfactory.researcher import training
    from fedfactory.researcher.node_selection import Federation
    from fedfactory.researcher.run_state import Stage

    config = FactoryConfig.from_dict(json.loads((folder / "config.json").read_text()))
    rounds: list[dict[str, float]] = []
    run_round, mark = training.run_round, {"begun": 0.0}

    def timed(experiment: Any, *arguments: Any) -> Any:
        mark["begun"] = time.monotonic()
        number = experiment.round_current()
        made = run_round(experiment, *arguments)
        timings = [reply["timing"] for reply in experiment.training_replies()[number].values()]
        slowest = max(timings, key=lambda timing: timing["rtime_total"])
        rounds.append({"training": slowest["rtime_training"], "site": slowest["rtime_total"]})
        return made

    def finish(_: Any) -> None:
        row = rounds[-1]
        seconds, training_, site = time.monotonic() - mark["begun"], row["training"], row.pop("site")
        row |= {"at the node": site - training_, "between": seconds - site, "round": seconds}

    training.run_round = timed
    training.train(
        config,
        folder / "experiment",
        researcher=folder / "researcher",
        federation=Federation(tag=TAG, node_timeout=TIMEOUT, approval_timeout=TIMEOUT),
        stages=[Stage(ROUNDS, 15)],
        report_round=finish,
    )
    (folder / "rounds.json").write_text(json.dumps(rounds), encoding="utf-8")


def commit(checkout: Path) -> str:
    """The commit of a checkout."""
    return subprocess.check_output(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], text=True).strip()


if __name__ == "__main__":
    main()
