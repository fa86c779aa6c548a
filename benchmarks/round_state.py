"""Seconds that a node spends on a line of its log in every round: the state of the optimizers, formatted as text.

    uv run python benchmarks/round_state.py --out benchmarks/results/round_state.json

Fed-BioMed 6.4.1 writes `f"Optimizer loaded state {state}"` at the level DEBUG after it has loaded a state, and formats
it whether or not anything is logged. Compared are loading the state as it was and as it is now, when the plan empties
it, each followed by the framework's line.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import torch
from fedbiomed.common.models import TorchModel
from fedfactory.common.files import write_json
from fedfactory.generative import FactoryConfig
from fedfactory.generative.factory import Factory
from fedfactory.generative.trainer import make_optimizers
from fedfactory.node.fedbiomed_hooks import NamedOptimizers
from measuring import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    factory = Factory(FactoryConfig.preset(arguments.preset, ("a", "b", "c")))
    optimizers = NamedOptimizers(TorchModel(factory), make_optimizers(factory))
    for parameter in factory.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizers.step()
    state = optimizers.save_state()
    seconds: dict[str, list[float]] = {"whole": [], "emptied": []}
    for _ in range(arguments.repeats):
        for name, times in seconds.items():
            loaded = copy.deepcopy(state)
            begun = time.process_time()  # the processor's: other work on the machine does not count
            optimizers.load_state(loaded, load_from_state=name == "emptied")
            line = f"Optimizer loaded state {loaded}"
            times.append(time.process_time() - begun)
            print(f"{name}: {times[-1]:.4f} s, a line of {len(line)} characters")
    content = {
        "machine": machine("cpu"),
        "preset": arguments.preset,
        "parameters": sum(parameter.numel() for parameter in factory.parameters()),
        "processor_seconds": {name: sorted(times)[len(times) // 2] for name, times in seconds.items()},
    }
    if arguments.out:
        write_json(arguments.out, content)


if __name__ == "__main__":
    main()
