"""Time and memory of aggregating a round with many sites, compared with holding all replies in memory.

    uv run python benchmarks/many_sites.py --sites 4 20 100 --million 5 --out benchmarks/results/many_sites.json

The replies are random tensors in the form in which the transport delivers them. Collector, strategy and aggregator are
those of a real run. Each measurement has a process of its own. No data are needed. This takes about 2 minutes on two
CPU cores.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import torch
from fedfactory.common.files import write_json
from measuring import in_own_process, machine, peak_resident_mib

SEED = 0
DOMAINS = ("a", "b", "c")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, nargs="+", default=[4, 20, 100])
    parser.add_argument("--million", type=float, default=5, help="million parameters of the model")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows = []
    for sites in arguments.sites:
        row = {"sites": sites}
        for variant in ("in_memory", "streaming"):
            row[variant] = measure(variant, sites, int(arguments.million * 1e6))
        rows.append(row)
        print(row, flush=True)
    content = {"machine": machine("cpu"), "seed": SEED, "parameters": int(arguments.million * 1e6), "rounds": rows}
    if arguments.out:
        write_json(arguments.out, content)


def measure(variant: str, sites: int, parameters: int) -> dict:
    """`run` in a new process, with a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        return in_own_process(run, variant=variant, sites=sites, parameters=parameters, folder=folder)


def run(*, variant: str, sites: int, parameters: int, folder: str, sender: Connection) -> None:
    """Send the seconds and the additional peak memory (MiB) of one round's aggregation."""
    os.environ["FBM_RESEARCHER_COMPONENT_ROOT"] = str(Path(folder) / "researcher")
    from fedfactory.generative import FactoryConfig
    from fedfactory.researcher.aggregator import FactoryAverage
    from fedfactory.researcher.fedbiomed_hooks import RoundCollector
    from fedfactory.researcher.strategy import FactoryStrategy

    config = FactoryConfig.preset("tiny", DOMAINS)
    pieces = 20
    before = {f"w{k}": torch.zeros(parameters // pieces) for k in range(pieces)}
    strategy, average = FactoryStrategy(), FactoryAverage(config)
    nodes = [f"node{k:03d}" for k in range(sites)]
    strategy.sample_nodes(nodes, 0)
    collector = RoundCollector(None, before, Path(folder), number=0)
    start, seconds, replies = peak_resident_mib(), 0.0, {}
    for number, node in enumerate(nodes):
        rng = torch.Generator().manual_seed(SEED + number)
        params = {name: torch.randn(tensor.shape, generator=rng) for name, tensor in before.items()}
        reply = SimpleNamespace(success=True, encrypted=False, params=params)
        began = time.perf_counter()
        if variant == "streaming":
            collector.take(node, reply)
        seconds += time.perf_counter() - began
        site_fields = {"domain": DOMAINS[number % len(DOMAINS)]}
        replies[node] = {
            "success": True,
            "sample_size": 10 + number,
            "params": reply.params,
            "optimizer_args": site_fields,
        }
        del params, reply
    began = time.perf_counter()
    chosen, shares, _, _ = strategy.refine(replies, 0)
    if variant == "streaming":
        average.aggregate(chosen, shares, training_replies=replies, global_model=before)
    else:
        {name: sum(shares[n] * chosen[n][name].double() for n in chosen).float() for name in before}
    seconds += time.perf_counter() - began
    sender.send({"seconds": round(seconds, 3), "mib_above_start": round(peak_resident_mib() - start)})


if __name__ == "__main__":
    main()
