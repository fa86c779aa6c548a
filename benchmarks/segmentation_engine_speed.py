"""Speed of the segmentation engine: training steps against a plain MONAI loop, and inference with and without views.

    uv run python benchmarks/segmentation_engine_speed.py --out benchmarks/results/segmentation_engine_speed.json

The plain loop has the same network, loss, optimizer, window and batch, and MONAI's dictionary transforms of the same
kinds, probabilities and ranges, one window after the other in the loader's workers or in the loop itself, whichever is
faster. Both take turns. Slices are simulated brains; what they show does not matter for the time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))

import numpy as np
import torch
from fedfactory.adaptation.engine.augmentation import Augmentation
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.engine.training_plan import DataFacts, TrainingPlan, plan_training
from fedfactory.adaptation.engine.window_inference import window_probabilities
from fedfactory.adaptation.engine.window_training import WEIGHT_DECAY, Stream, WindowTrainer
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.common.files import write_json
from measuring import machine
from monai.data import DataLoader, Dataset
from monai.losses import DiceCELoss
from monai.transforms import (
    Compose,
    NormalizeIntensityd,
    Rand2DElasticd,
    RandAdjustContrastd,
    RandFlipd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandSimulateLowResolutiond,
    RandSpatialCropd,
)
from torch import Tensor

SIZE, EXTENT, CLASSES = 144, 54, 4  # the cardiac slices of `segmentation_engine.py`
VOLUMES, SLICES = 20, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=20, help="of each way in a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    data = slices()
    config = SegmenterConfig(precision="float32")
    plan = plan_training(DataFacts(size=SIZE, extent=EXTENT, classes=CLASSES), config)
    trainer = WindowTrainer([Stream(slices=data, augmentation=Augmentation.of(config, plan))], plan)
    steps: dict[str, Callable[[int], Any]] = {"engine": trainer.update}
    steps |= {f"plain loop, {workers} workers": plain_loop(data, plan, workers=workers) for workers in (0, 1)}
    found: dict[str, list[float]] = {name: [] for name in steps}
    number = 0
    for turn in range(arguments.turns + 1):
        for name, step in steps.items():
            began = time.perf_counter()
            for _ in range(arguments.updates):
                step(number)
                number += 1
            if turn:  # the first turn warms up
                found[name].append((time.perf_counter() - began) / arguments.updates)
    seconds = {name: statistics.median(values) for name, values in found.items()}
    began = time.perf_counter()
    for extra in range(arguments.updates):
        trainer.batch(extra)
    augmenting = (time.perf_counter() - began) / arguments.updates
    plain = min(value for name, value in seconds.items() if name != "engine")
    content = {
        "machine": machine("cpu"),
        "plan": plan.to_dict(),
        "seconds_per_update": {name: round(value, 4) for name, value in seconds.items()},
        "ratio": round(plain / seconds["engine"], 2),
        "share_of_augmentation": round(augmenting / seconds["engine"], 3),
        "volumes_per_second": inference(trainer.network, plan, data),
    }
    print({name: value for name, value in content.items() if name != "machine"})
    if arguments.out:
        write_json(arguments.out, content)


def slices() -> LabelledSlices:
    """Slices with nested discs of random places, sizes and grey levels."""
    rng = np.random.default_rng(0)
    axis = np.arange(SIZE)
    images = rng.normal(-0.5, 0.1, (VOLUMES * SLICES, SIZE, SIZE)).astype(np.float32)
    labels = np.zeros(images.shape, np.uint8)
    for volume in range(VOLUMES):
        row, column = rng.uniform(55, 90, 2)
        distance = np.hypot(axis[:, None] - row, axis[None] - column)
        for index in range(volume * SLICES, (volume + 1) * SLICES):
            for label, radius in ((1, 27), (2, 18), (3, 10)):
                inside = distance < radius * rng.uniform(0.8, 1)
                labels[index][inside] = label
                images[index][inside] += rng.uniform(0.1, 0.4)
    return LabelledSlices(images.clip(-1, 1), labels, CLASSES, np.repeat(np.arange(VOLUMES), SLICES))


def plain_loop(data: LabelledSlices, plan: TrainingPlan, *, workers: int) -> Callable[[int], None]:
    """A function that makes one update as a MONAI tutorial would."""
    keys = ("image", "label")
    window = (plan.window, plan.window)
    elastic = Rand2DElasticd(
        keys, prob=1.0, spacing=(20, 20), magnitude_range=(0.6, 2.0), rotate_range=np.pi, scale_range=(-0.3, 0.4),
        mode=("bilinear", "nearest"), padding_mode="zeros",
    )  # fmt: skip
    transforms = Compose(
        [
            RandSpatialCropd(keys, (120, 120), random_size=False),
            elastic,
            RandFlipd(keys, prob=0.5, spatial_axis=0),
            RandSpatialCropd(keys, window, random_size=False),
            RandAdjustContrastd("image", prob=0.3, gamma=(0.6, 1.7)),
            RandGaussianSmoothd("image", prob=0.2, sigma_x=(0.3, 1.0), sigma_y=(0.3, 1.0)),
            RandSimulateLowResolutiond(
                "image", prob=0.2, zoom_range=(0.45, 0.9), downsample_mode="area", upsample_mode="bilinear"
            ),
            RandGaussianNoised("image", prob=0.15, std=0.08),
            NormalizeIntensityd("image"),
        ]
    )
    items = [
        {"image": image[None], "label": label[None].astype(np.float32)}
        for image, label in zip((data.images + 1) / 2, data.labels, strict=True)
    ]
    loader = DataLoader(
        Dataset(items, transforms), batch_size=plan.batch_size, shuffle=True, num_workers=workers, drop_last=True,
        persistent_workers=workers > 0,
    )  # fmt: skip
    network = PlannedNetwork(plan).train()
    optimizer = torch.optim.AdamW(network.parameters(), plan.learning_rate, weight_decay=WEIGHT_DECAY)
    loss_function = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)
    batches = endless(loader)

    def step(number: int) -> None:
        batch = next(batches)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_function(network(batch["image"].as_tensor()), batch["label"].as_tensor())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()

    return step


def endless(loader: DataLoader) -> Iterator[dict[str, Any]]:
    """The loader's batches, pass after pass."""
    while True:
        yield from loader


def inference(network: torch.nn.Module, plan: TrainingPlan, data: LabelledSlices) -> dict[str, float]:
    """Volumes per second by number of views; slices are in memory."""
    images: Tensor = torch.from_numpy((data.images + 1) / 2)
    rates = {}
    for views in (1, 8):
        began = time.perf_counter()
        for volume in range(VOLUMES):
            part = images[volume * SLICES : (volume + 1) * SLICES]
            window_probabilities(network, part, plan, views=tuple(range(views)))
        rates[f"{views} views"] = round(VOLUMES / (time.perf_counter() - began), 2)
    return rates


if __name__ == "__main__":
    main()
