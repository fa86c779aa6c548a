"""Speed of drawing whole volumes with the published generator, compared with a textbook implementation in the same run.

    uv run python benchmarks/generator_speed.py --sizes 64 128 --out benchmarks/results/generator_speed_cpu.json

Both implementations draw the same heights with the same latent, and their slices are compared. No data are needed. This
takes about 3 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from factory_step import configuration
from fedfactory.common.files import write_json
from fedfactory.generative import Factory
from fedfactory.generative.synthesis import slice_heights, synthesise_volume
from measuring import interleaved, machine
from plain_twin import make_plain

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--limit", type=int, default=64, help="widest layer; 512 is the published width")
    parser.add_argument("--z-depth", type=int, default=29)
    parser.add_argument("--slices-per-bin", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    heights = slice_heights(arguments.z_depth, arguments.slices_per_bin)
    rows = [measure(arguments, size, heights) for size in arguments.sizes]
    content = {"machine": machine(arguments.device), "seed": SEED, "widest_layer": arguments.limit}
    content |= {"slices_per_volume": len(heights), "batch": arguments.batch, "sizes": rows}
    if arguments.out:
        write_json(arguments.out, content)
    for row in rows:
        print(f"{row['size']} px: {row['slices_per_second']} slices/s, ratio {row['ratio']:.2f}")


def measure(arguments: argparse.Namespace, size: int, heights: torch.Tensor) -> dict:
    """Seconds per volume of both generators at one image size; heights: (N,), one per slice, in height bins."""
    torch.manual_seed(SEED)
    factory = Factory(configuration(size, arguments.batch, arguments.limit)).to(arguments.device).eval()
    generators = {"ours": factory.generator, "twin": make_plain(factory).generator.eval()}

    def volume(name: str) -> torch.Tensor:
        """All slices of a volume, (N, 1, S, S)."""
        rng = torch.Generator().manual_seed(SEED)
        parts = synthesise_volume(generators[name], heights, domain=0, rng=rng)
        return torch.cat([part.image for part in parts])

    difference = (volume("ours") - volume("twin")).abs().max().item()
    calls = {name: lambda name=name: volume(name) for name in generators}
    seconds = interleaved(calls, repeats=arguments.repeats, device=arguments.device)
    return {
        "size": size,
        "seconds_per_volume": seconds,
        "slices_per_second": {name: round(len(heights) / value, 2) for name, value in seconds.items()},
        "ratio": seconds["twin"] / seconds["ours"],
        "largest_difference": difference,
    }


if __name__ == "__main__":
    main()
