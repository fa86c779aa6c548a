"""Time of the tree filter, the tree energy and the gated CRF, forward and backward, on a single core.

    uv run python benchmarks/tree_filter.py --out benchmarks/results/tree_filter_cpu.json

The inputs have four classes; the images are noise (which gives deep trees) and smooth images. The filter is compared
with a plain version with equal results, which computes the tree level by level in breadth-first order. No data are
needed. This takes about a minute.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from fedfactory.adaptation.losses.gated_crf import gated_crf
from fedfactory.adaptation.losses.spanning_trees import Forest, spanning_forest
from fedfactory.adaptation.losses.tree_energy import tree_energy, tree_filter
from fedfactory.common.files import write_json
from measuring import machine
from scipy.ndimage import gaussian_filter
from torch import Tensor

SIGMA = 0.02
REPEATS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for side in arguments.sides:
        for kind in ("noise", "smooth"):
            rows.append(measure(side, kind))
            print(rows[-1])
    if arguments.out:
        write_json(arguments.out, {"machine": machine("cpu"), "threads": 1, "seed": 0, "rows": rows})


def measure(side: int, kind: str) -> dict[str, float | str | int]:
    """Median seconds of each function on an image of `side` pixels per side; kind: "noise" or "smooth"."""
    rng = np.random.default_rng(0)
    image = rng.random((side, side))
    if kind == "smooth":
        image = gaussian_filter(image, 4)
        image = (image - image.min()) / (image.max() - image.min()) + rng.normal(0, 0.01, image.shape)
    guide = torch.from_numpy(image.astype(np.float32))[None, None]
    torch.manual_seed(0)
    values = torch.softmax(torch.randn(1, 4, side, side), 1)
    forest = spanning_forest(guide)
    unknown = torch.ones(1, side, side, dtype=torch.bool)
    fast, plain = tree_filter(values, guide, forest, sigma=SIGMA), by_levels(values, guide, forest)
    return {
        "side": side,
        "image": kind,
        "depth": forest.depth,
        "filter": seconds(lambda v, g: tree_filter(v, g, spanning_forest(g), sigma=SIGMA), values, guide),
        "filter_level_by_level": seconds(lambda v, g: by_levels(v, g, spanning_forest(g)), values, guide),
        "largest_difference": float((fast - plain).abs().max()),
        "energy_of_four_trees": seconds(lambda v, g: tree_energy(v, g, unknown, embeddings=[g, g, g]), values, guide),
        "gated_crf": seconds(gated_crf, values, guide),
    }


def by_levels(values: Tensor, guide: Tensor, forest: Forest) -> Tensor:
    """The tree filter of an image, computed level by level; values: (1, C, S, S), guide: (1, 1, S, S)."""
    classes, parent = values.shape[1], forest.parent
    depth, at = torch.zeros_like(parent), parent.clone()
    own = torch.arange(len(parent))
    level = (parent != own).long()
    while (level > 0).any():
        depth += level
        level, at = level * (at != parent[at]).long(), parent[at]
    order = torch.argsort(depth, stable=True)
    ends = torch.cumsum(torch.bincount(depth), 0).tolist()
    levels = [order[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    flat = guide[0, 0].flatten()
    step = torch.exp(-(flat - flat[parent]).square() / SIGMA)[:, None]
    below = torch.cat([values[0], torch.ones_like(values[0, :1])]).flatten(1).t()
    for level in reversed(levels[1:]):
        below = below.index_add(0, parent[level], step[level] * below[level])
    total = below.clone()
    for level in levels[1:]:
        update = (1 - step[level].square()) * below[level] + step[level] * total[parent[level]]
        total = total.index_copy(0, level, update)
    return (total[:, :-1] / total[:, -1:]).t().reshape(1, classes, *values.shape[2:])


def seconds(function: Callable[[Tensor, Tensor], Tensor], values: Tensor, guide: Tensor) -> float:
    """Median seconds of a forward and backward pass; values: (1, C, S, S), guide: (1, 1, S, S)."""
    times = []
    for _ in range(REPEATS):
        v, g = values.clone().requires_grad_(), guide.clone().requires_grad_()
        began = time.perf_counter()
        function(v, g).square().sum().backward()
        times.append(time.perf_counter() - began)
    return round(float(np.median(times)), 4)


if __name__ == "__main__":
    main()
