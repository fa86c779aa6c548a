"""Seconds until a local federation can train, with one process that imports for all and with imports in every process.

    uv run python benchmarks/federation_start.py --out benchmarks/results/federation_start.json

Three nodes and a researcher are created, stores registered, nodes started, and a training plan sent and approved, as
in `fedfactory demo`. CPU seconds are those of all processes of the federation. The two ways take turns. No data are
needed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import psutil
from fedfactory.common.files import write_json
from fedfactory.demo import launcher
from fedfactory.demo.local_federation import LocalFederation
from fedfactory.generative import FactoryConfig
from measuring import machine
from round_overhead import TAG, make_stores

NODES = ("north", "south", "west")
STEPS = ("create", "add", "start", "approve")
WAYS = {"one process imports": True, "every process imports": False}


class Enough(Exception):
    """The plan is approved; the run itself is not measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    loads = []
    for _ in range(arguments.repeats):
        for way, forks in WAYS.items():
            loads.append(round(os.getloadavg()[0], 1))
            with tempfile.TemporaryDirectory() as name:
                runs[way].append(measure(Path(name), forks=forks))
            print(way, runs[way][-1], flush=True)
    cpu = {way: round(statistics.median(run["approve"]["cpu_seconds"] for run in runs[way]), 1) for way in WAYS}
    content = {
        "machine": machine("cpu"), "load_averages": loads, "cpu_seconds": cpu,
        "ratio": round(cpu["every process imports"] / cpu["one process imports"], 2), "seconds_until": runs,
    }  # fmt: skip
    if arguments.out:
        write_json(arguments.out, content)
    print(content)


def measure(folder: Path, *, forks: bool) -> dict[str, dict[str, float]]:
    """By step: wall seconds and CPU seconds from the beginning until it is done."""
    if not forks:
        can_fork, launcher.can_fork = launcher.can_fork, lambda: False
    stores = make_stores(folder, list(NODES), size=32)
    config = FactoryConfig.preset("tiny", NODES, z_bins=4)
    write_json(folder / "config.json", config.to_dict())
    found: dict[str, dict[str, float]] = {}
    before, begun = cpu_of_children(), time.monotonic()

    def done(step: str) -> None:
        found[step] = {
            "seconds": round(time.monotonic() - begun, 1), "cpu_seconds": round(cpu_of_children() - before, 1),
        }  # fmt: skip

    try:
        with LocalFederation(folder / "federation", list(NODES)) as federation:
            federation.begin()
            federation.wait_for("create")
            done("create")
            roots = {name: str(root) for name, root in federation.nodes.items()}
            add = {
                n: federation.site_command("add", r, "--store", str(stores[n]), "--tag", TAG) for n, r in roots.items()
            }
            federation.run_together("add", add)
            done("add")
            federation.start_nodes()
            done("start")
            words = ["train", "--researcher", federation.researcher, "--tag", TAG, "--out", folder / "run"]
            words += ["--config", folder / "config.json", "--rounds", 1, "--approval-timeout", 120]
            approve = {n: federation.site_command("approve", r, "--yes", "--wait", "120") for n, r in roots.items()}
            with federation.background("train", [str(word) for word in words], rounds=1):
                federation.run_together("approve", approve)
                done("approve")
                raise Enough
    except Enough:
        return found
    finally:
        if not forks:
            launcher.can_fork = can_fork


def cpu_of_children() -> float:
    """CPU seconds of all processes that this one has started, and that those have started."""
    own = psutil.Process()
    total = own.cpu_times().children_user + own.cpu_times().children_system
    for process in own.children(recursive=True):
        with_children = process.cpu_times()
        total += sum(with_children[:4])  # its own, and those of its children that have ended
    return total


if __name__ == "__main__":
    main()
