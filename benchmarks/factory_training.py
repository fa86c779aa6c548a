"""Training of a factory at a single site: distance to the site's held-out slices, and pictures, over time.

    uv run python benchmarks/factory_training.py --store STORE --minutes 20 --out hippocampus-run

STORE is a slice store made by `fedfactory prepare`. Every fifth case is held out. The script writes `training.json`,
`distance.png`, and at every evaluation a grid of slices of the moving-average generator. It takes --minutes minutes of
training and the time of 13 evaluations.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import numpy as np
import torch
from fedfactory.common.files import write_json
from fedfactory.generative import Factory, FactoryConfig, FactoryTrainer
from fedfactory.generative.config import PRESETS
from fedfactory.generative.metrics.quality import kernel_distance, random_features
from fedfactory.generative.networks.generator import Generator
from fedfactory.generative.trainer import make_optimizers
from fedfactory.generative.trainer_state import mean_losses
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine

EVALUATIONS = 12
SAMPLES = 500
GRID = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--head", choices=["palette", "image"], default="image")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    store = SliceStore(arguments.store)
    config = configuration(store, arguments.head)
    training, held_out = split(store)
    torch.manual_seed(arguments.seed)
    factory = Factory(config)
    rng = torch.Generator().manual_seed(arguments.seed)
    ema = copy.deepcopy(factory.generator)
    trainer = FactoryTrainer(factory, make_optimizers(factory), rng, ema=ema)
    reference = random_features(images_of(store, held_out[torch.randperm(len(held_out), generator=rng)[:SAMPLES]]))
    own = random_features(images_of(store, training[torch.randperm(len(training), generator=rng)[:SAMPLES]]))
    floor = kernel_distance(reference, own)
    rows, steps, started, evaluation_seconds = [], [], time.monotonic(), 0.0
    budget = arguments.minutes * 60
    for evaluation in range(EVALUATIONS + 1):
        while time.monotonic() - started - evaluation_seconds < budget * evaluation / EVALUATIONS:
            chosen = training[torch.randint(len(training), (config.batch_size,), generator=rng)]
            z_bin = torch.from_numpy(store.z_bin[chosen.numpy()])
            steps.append(trainer.train_step(images_of(store, chosen), z_bin, torch.zeros_like(z_bin)))
        before = time.monotonic()
        distance = kernel_distance(reference, random_features(draw(ema, store, held_out)))
        seconds = before - started - evaluation_seconds
        rows.append(
            {
                "seconds": seconds,
                "updates": trainer.state.updates_done,
                "distance": distance,
                "augment_p": trainer.state.augmentation.p,
                **mean_losses(steps),
            }
        )
        steps = []
        save_grid(ema, store, arguments.out / f"slices_{evaluation:02d}.png")
        print(f"{seconds:6.0f} s, {trainer.state.updates_done} updates, distance {distance:.3f}", flush=True)
        evaluation_seconds += time.monotonic() - before
    content = {
        "machine": machine("cpu"),
        "seed": arguments.seed,
        "config": config.to_dict(),
        "slices": {"training": len(training), "held_out": len(held_out)},
        "distance_of_real_training_slices": floor,
        "evaluations": rows,
    }
    write_json(arguments.out / "training.json", content)
    plot(rows, floor, arguments.out / "distance.png")


def configuration(store: SliceStore, head: str) -> FactoryConfig:
    """The small preset; the head "image" selects the published networks, which start at 4 x 4, and their penalties."""
    small = PRESETS["small"]
    options = {"image_size": store.format.size, "z_bins": store.format.z_bins, "mirror": False}
    if head == "image":
        options |= {"head": "image", "start_size": 4, "channels": (small["channels"][0], *small["channels"])}
        options |= {"learning_rate": 2.5e-3, "r1_gamma": 1.0, "path_weight": 2.0, "style_mixing": 0.5, "augment": True}
    return FactoryConfig.preset("small", (store.domain,), **options)


def split(store: SliceStore) -> tuple[torch.Tensor, torch.Tensor]:
    """Slice numbers of the training cases (N,) and of the held-out cases (M,)."""
    parts: tuple[list[int], list[int]] = ([], [])
    for number, case in enumerate(store.cases):
        parts[number % 5 == 0].extend(range(case.first, case.first + case.count))
    return torch.tensor(parts[0]), torch.tensor(parts[1])


def images_of(store: SliceStore, chosen: torch.Tensor) -> torch.Tensor:
    """Slices (N, 1, S, S) in [-1, 1] by their numbers (N,)."""
    return torch.from_numpy(np.asarray(store.images[chosen.numpy()], np.float32))


@torch.no_grad()
def draw(generator: Generator, store: SliceStore, held_out: torch.Tensor) -> torch.Tensor:
    """Synthetic slices (SAMPLES, 1, S, S) in [-1, 1] at the heights of real slices with the numbers `held_out` (M,)."""
    rng = torch.Generator().manual_seed(1)
    chosen = held_out[torch.randint(len(held_out), (SAMPLES,), generator=rng)]
    parts = []
    for z_bin in torch.from_numpy(store.z_bin[chosen.numpy()]).split(50):
        z = torch.randn(len(z_bin), generator.config.latent_dim, generator=rng)
        parts.append(generator(z, z_bin, torch.zeros_like(z_bin), noise=generator.draw_noise(len(z_bin), rng)))
    return torch.cat(parts).clamp(-1, 1)


@torch.no_grad()
def save_grid(generator: Generator, store: SliceStore, path: Path) -> None:
    """Write a picture: each row shows one latent at increasing heights, the last row real slices."""
    import matplotlib.image

    rng = torch.Generator().manual_seed(2)
    z_bin = torch.linspace(0, store.format.z_bins - 1, GRID).round().long()
    rows = []
    for _ in range(GRID - 1):
        z = torch.randn(1, generator.config.latent_dim, generator=rng).expand(GRID, -1)
        noise = [layer.expand(GRID, -1, -1, -1) for layer in generator.draw_noise(1, rng)]
        rows.append(generator(z, z_bin, torch.zeros_like(z_bin), noise=noise))
    case = store.cases[0]
    real = torch.linspace(case.first, case.first + case.count - 1, GRID).round().long()
    rows.append(images_of(store, real))
    picture = np.concatenate([np.concatenate([np.rot90(image[0]) for image in row.numpy()], axis=1) for row in rows])
    matplotlib.image.imsave(path, picture, cmap="gray", vmin=-1, vmax=1)


def plot(rows: list[dict], floor: float, path: Path) -> None:
    """Write the curve of the distance over time, with the distance between two groups of real slices."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.5))
    axis.plot([row["seconds"] / 60 for row in rows], [row["distance"] for row in rows], "o-", label="average generator")
    axis.axhline(max(floor, 1e-4), linestyle=":", color="black", label="real slices of other subjects")
    axis.set(xlabel="minutes", ylabel="kernel distance, random features", yscale="log")
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
