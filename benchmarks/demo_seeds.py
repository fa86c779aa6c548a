"""The demonstration with several seeds: Dice by site and method.

    uv run python benchmarks/demo_seeds.py --work demo-seeds --seeds 0 1 2 --out benchmarks/results/demo_seeds.json

Seeds whose `results.json` exists in the work folder are not repeated. No data are needed. Three seeds take about a
quarter of an hour on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path

import numpy as np
from fedfactory.common.files import write_json
from fedfactory.demo.demo import run_demo
from fedfactory.demo.demo_result import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with one demo folder per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--busy", action="store_true", help="record that the machine did other work, so times are long")
    parser.add_argument("--out", type=Path, required=True, help="JSON file")
    arguments = parser.parse_args()
    runs = []
    for seed in arguments.seeds:
        folder = arguments.work / f"seed{seed}"
        if not (folder / "results.json").is_file():
            run_demo(folder, seed=seed)
        runs.append(json.loads((folder / "results.json").read_text(encoding="utf-8")))
    sites = list(runs[0]["dice"])
    dice = {site: {m: [run["dice"][site][m] for run in runs] for m in METHODS} for site in sites}
    summary = {site: {m: float(np.mean(values)) for m, values in rows.items()} for site, rows in dice.items()}
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "system": platform.system()}
    content = {
        "seeds": arguments.seeds,
        "dice": dice,
        "mean_dice": summary,
        "seconds": [run["seconds"] for run in runs],
        "busy": arguments.busy,
        "machine": machine,
        "versions": runs[0]["versions"],
    }
    write_json(arguments.out, content)
    for site, rows in summary.items():
        print(site, {method: round(value, 3) for method, value in rows.items()})


if __name__ == "__main__":
    main()
