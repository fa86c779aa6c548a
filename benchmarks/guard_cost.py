"""What policy, gate and ledger add to a round, by the framework's own round at a site.

    uv run python benchmarks/guard_cost.py --out benchmarks/results/guard_cost.json

Rounds with and without the guard's work alternate in one process, on a store of simulated subjects and with settings of
the demo's first phase; without, the same plan runs, but nothing is checked, written down or removed. No data are
needed. `tests/guarded_node.py` makes the node.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fedfactory.common.files import write_json
from fedfactory.demo.simulated_subjects import CONTRASTS, simulate_site
from fedfactory.generative import FactoryConfig
from fedfactory.node.protection.guarded_round import GuardedRound, begin
from fedfactory.node.protection.round_guard import SiteGuard
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from guarded_node import GuardedNode, factory_request
from measuring import machine


def unguarded(guard: SiteGuard, asked, train, refuse):
    """In place of `SiteGuard.run`."""
    with begin(GuardedRound(policy=guard.policy, secret=guard.secret)):
        return train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="with and without each")
    parser.add_argument("--updates", type=int, default=15, help="in a round")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"with": [], "without": []}
    guarded = SiteGuard.run
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = FactoryConfig.preset("tiny", ("t1", "t2", "pd"))
        simulate_site(folder / "subjects", CONTRASTS["t1"], 6, size=config.image_size, seed=0, prefix="s")
        settings = PrepareConfig(domain="t1", size=config.image_size, z_bins=config.z_bins)
        prepare(folder / "subjects", folder / "store", settings)
        node = GuardedNode(folder / "node", folder / "store")
        request = factory_request(config)
        request.training_args["num_updates"] = arguments.updates
        request.training_args["loader_args"] = {"batch_size": config.batch_size}
        node.approve(request.source)
        states: dict[str, str | None] = {"with": None, "without": None}
        for number in range(arguments.rounds + 1):
            for which in ("with", "without"):
                SiteGuard.run = guarded if which == "with" else unguarded
                request.experiment, request.state, request.number = f"exp_{which}", states[which], number
                started = time.perf_counter()
                reply = node.run(request)
                if not reply.success:
                    raise SystemExit(f"round {number}: {reply.msg}")
                states[which] = reply.state_id
                if number:  # the first one imports
                    seconds[which].append(time.perf_counter() - started)
    medians = {which: statistics.median(values) for which, values in seconds.items()}
    ratio = medians["with"] / medians["without"]
    print(f"with {medians['with']:.3f} s, without {medians['without']:.3f} s, ratio {ratio:.4f}")
    if arguments.out:
        write_json(arguments.out, {
            "machine": machine("cpu"), "updates": arguments.updates, "rounds": arguments.rounds, "seconds": seconds,
            "median": medians, "ratio": ratio,
        })  # fmt: skip


if __name__ == "__main__":
    main()
