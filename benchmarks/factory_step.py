"""Training speed of the published networks, compared with a textbook implementation in the same run.

    uv run python benchmarks/factory_step.py --sizes 64 --batch 4 --out benchmarks/results/factory_step_cpu.json

For every image size this measures the seconds of the discriminator loss, the generator loss, the R1 penalty, the path
length penalty and a whole training step (with the penalties at their intervals), images per second, peak memory, the
largest difference between the results of the two implementations, and the share of the measured matrix product rate
that the step reaches (roofline). No data are needed. Sizes 32 and 64 take about 20 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fedfactory.common.files import write_json
from fedfactory.generative import Factory, FactoryConfig, FactoryTrainer
from fedfactory.generative.conditions import Conditions
from fedfactory.generative.config import channel_widths
from fedfactory.generative.trainer import make_optimizers
from measuring import FlopCounter, interleaved, machine, matmul_rate, peak_resident_mib
from plain_twin import make_plain

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128, 256, 512])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--limit", type=int, default=512, help="widest layer; 512 is the published width")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--memory-of", choices=["ours", "twin"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(peak_memory(arguments, arguments.sizes[0], arguments.memory_of))
        return
    rate = matmul_rate(arguments.device)
    results = [measure(arguments, size, rate) for size in arguments.sizes]
    content = {
        "machine": machine(arguments.device),
        "seed": SEED,
        "batch": arguments.batch,
        "widest_layer": arguments.limit,
        "precision": {"ours": arguments.precision, "twin": "float32"},
        "matmul_flops_per_second": rate,
        "sizes": results,
    }
    if arguments.out:
        write_json(arguments.out, content)
    for row in results:
        print(
            f"{row['size']:4d} px: {row['images_per_second']['ours']:.2f} images/s, twin "
            f"{row['images_per_second']['twin']:.2f}, ratio {row['ratio']['step']:.2f}, "
            f"{100 * row['share_of_matmul_rate']['ours']:.0f} % of the matrix rate"
        )


def configuration(size: int, batch: int, limit: int) -> FactoryConfig:
    """The published networks for three domains, with at most `limit` channels in a layer."""
    widths = channel_widths(size, limit=limit)
    return FactoryConfig.preset(
        "paper", ("a", "b", "c"), image_size=size, channels=widths, batch_size=batch, augment=False, style_mixing=0.0
    )


def make_trainers(arguments: argparse.Namespace, size: int) -> dict[str, FactoryTrainer]:
    """A trainer of our networks and one of the textbook twin, with equal weights and equal random numbers."""
    config = configuration(size, arguments.batch, arguments.limit)
    torch.manual_seed(SEED)
    factory = Factory(config).to(arguments.device)
    twin = make_plain(factory)
    if arguments.precision != "float32":
        ours = Factory(config, precision=arguments.precision).to(arguments.device)
        ours.load_state_dict(factory.state_dict())
        factory = ours
    return {
        name: FactoryTrainer(network, make_optimizers(network), torch.Generator(arguments.device).manual_seed(SEED))
        for name, network in (("ours", factory), ("twin", twin))
    }


def batch_of(arguments: argparse.Namespace, size: int) -> tuple[torch.Tensor, Conditions]:
    """Random slices (B, 1, S, S) in [-1, 1] and their conditions."""
    rng = torch.Generator().manual_seed(SEED)
    real = torch.rand(arguments.batch, 1, size, size, generator=rng) * 2 - 1
    z_bin, domain = (torch.randint(count, (arguments.batch,), generator=rng) for count in (29, 3))
    device = arguments.device
    return real.to(device), Conditions(z_bin.to(device), domain.to(device), None)


def terms(trainer: FactoryTrainer, real: torch.Tensor, conditions: Conditions) -> dict[str, Callable[[], object]]:
    """Each term of the training step as a function to time; real is (B, 1, S, S) in [-1, 1]."""
    fake = trainer.generate(conditions).detach()

    def plain_step() -> None:
        trainer.state.updates_done = 1  # neither penalty is due
        trainer.train_step(real, conditions.z_bin, conditions.domain)

    return {
        "discriminator": lambda: trainer._backward_logistic(real, fake, conditions, share=1.0),
        "generator": lambda: trainer._backward_adversarial(trainer.generate(conditions), conditions, share=1.0),
        "r1": lambda: trainer._backward_r1(real, conditions, share=1.0),
        "path": lambda: trainer._backward_path(conditions),
        "step_without_penalties": plain_step,
    }


def measure(arguments: argparse.Namespace, size: int, rate: float) -> dict:
    """Times, operation counts, memory and differences at one image size; rate: measured operations per second."""
    difference = compare(arguments, size)
    trainers = make_trainers(arguments, size)
    real, conditions = batch_of(arguments, size)
    calls = {name: terms(trainer, real, conditions) for name, trainer in trainers.items()}
    seconds: dict[str, dict[str, float]] = {"ours": {}, "twin": {}}
    operations: dict[str, dict[str, int]] = {"ours": {}, "twin": {}}
    for term in calls["ours"]:
        for name, by_term in calls.items():
            with FlopCounter() as counter:  # also the warm-up
                by_term[term]()
            operations[name][term] = counter.total
        both = {name: by_term[term] for name, by_term in calls.items()}
        for name, value in interleaved(both, repeats=arguments.repeats, device=arguments.device).items():
            seconds[name][term] = value
    config = trainers["ours"].factory.config
    for row in (*seconds.values(), *operations.values()):
        row["step"] = row["step_without_penalties"] + row["r1"] / config.r1_every + row["path"] / config.path_every
    flops = {name: row["step"] for name, row in operations.items()}
    return {
        "size": size,
        "seconds": seconds,
        "ratio": {term: seconds["twin"][term] / seconds["ours"][term] for term in seconds["ours"]},
        "images_per_second": {name: arguments.batch / row["step"] for name, row in seconds.items()},
        "flops_per_step": flops,
        "share_of_matmul_rate": {name: flops[name] / row["step"] / rate for name, row in seconds.items()},
        "peak_memory_mib": {name: memory_in_own_process(arguments, size, name) for name in seconds},
        "largest_difference": difference,
    }


def compare(arguments: argparse.Namespace, size: int) -> dict[str, float]:
    """Largest differences between new networks with equal random numbers: slices, scores, losses of a full step."""
    trainers = make_trainers(arguments, size)
    real, conditions = batch_of(arguments, size)
    slices, scores, losses = [], [], []
    for trainer in trainers.values():
        with torch.no_grad():
            slices.append(trainer.generate(conditions))
            scores.append(trainer._score(real, conditions))
        step = trainer.train_step(real, conditions.z_bin, conditions.domain)
        losses.append(torch.tensor([step.discriminator, step.generator, step.r1, step.path]))
    return {
        "slices": (slices[0] - slices[1]).abs().max().item(),
        "scores": (scores[0] - scores[1]).abs().max().item(),
        "losses_relative": ((losses[0] - losses[1]).abs() / losses[1].abs()).max().item(),
    }


def memory_in_own_process(arguments: argparse.Namespace, size: int, name: str) -> float:
    """`peak_memory`, measured in a new process."""
    words = [sys.executable, __file__, "--sizes", size, "--batch", arguments.batch, "--limit", arguments.limit]
    words += ["--precision", arguments.precision, "--device", arguments.device, "--memory-of", name]
    return json.loads(subprocess.run([str(w) for w in words], check=True, capture_output=True, text=True).stdout)


def peak_memory(arguments: argparse.Namespace, size: int, name: str) -> float:
    """Peak memory (MiB) of two full steps with networks and optimizers: of the whole process, or of the GPU."""
    trainer = make_trainers(arguments, size)[name]
    real, conditions = batch_of(arguments, size)
    if arguments.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        trainer.state.updates_done = 0  # both penalties are due
        trainer.train_step(real, conditions.z_bin, conditions.domain)
    if arguments.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return peak_resident_mib()


if __name__ == "__main__":
    main()
