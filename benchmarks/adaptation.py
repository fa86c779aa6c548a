"""Phase two in seconds: time to a validation Dice for every engine and network, and volumes a second afterwards.

    uv run python benchmarks/adaptation.py --out benchmarks/results/adaptation_cpu.json

Simulated brains: a segmenter of site t1's own labelled slices, judged on its held-out subjects after every tenth of the
training. The first look at or above --target counts. Then whole volumes are segmented from memory, by one network at a
time: interpolation to slices, the network, interpolation of probabilities back, argmax. Seconds are wall time on
--threads threads.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedfactory.adaptation.inference import slice_probabilities
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.adaptation.networks.network_names import NETWORKS
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard, TrainingFacts
from fedfactory.adaptation.training.segmenter_training import SegmenterConfig, SegmenterData, SegmenterTrainer
from fedfactory.common.files import write_json
from fedfactory.common.seeding import seed_of, seeded
from fedfactory.demo.simulated_subjects import CONTRASTS, simulate_site
from fedfactory.imaging.volume_files import read_volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine

EVALUATIONS = 10
SUBJECTS, HELD_OUT = 16, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--target", type=float, default=0.7, help="mean foreground Dice")
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        store, volumes = site(Path(folder), arguments)
        rows = {name: measure(name, store, volumes, arguments) for name in arguments.networks}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "networks")}
    if arguments.out:
        write_json(arguments.out, {"machine": machine(arguments.device), **settings, "networks": rows})


def site(folder: Path, arguments: argparse.Namespace) -> tuple[SliceStore, list]:
    """A labelled site and its volumes as files give them."""
    simulate_site(
        folder / "t1", CONTRASTS["t1"], SUBJECTS + HELD_OUT, size=arguments.size, seed=arguments.seed, prefix="s"
    )
    config = PrepareConfig(
        domain="t1", size=arguments.size, z_bins=12, validation_share=HELD_OUT / (SUBJECTS + HELD_OUT), test_share=0
    )
    store = prepare(folder / "t1", folder / "t1.store", config).store
    images = sorted((folder / "t1").glob("*/image/*.nii.gz")) or sorted((folder / "t1").rglob("*image*.nii.gz"))
    return store, [read_volume(image) for image in images]


def slices(store: SliceStore, split: str) -> LabelledSlices:
    chosen = store.labelled_slices(split)
    volume = np.concatenate([np.full(case.count, n) for n, case in enumerate(store.cases)])
    return LabelledSlices(store.images[chosen], store.labels[chosen], store.classes, volume[chosen])


def measure(name: str, store: SliceStore, volumes: list, arguments: argparse.Namespace) -> dict[str, Any]:
    config = SegmenterConfig(
        network=name, updates=arguments.updates, precision=arguments.precision, seed=arguments.seed
    )
    data = SegmenterData(labelled=slices(store, "train"), validation=slices(store, "validation"))
    trainer = SegmenterTrainer(data, config, device=arguments.device, facts=TrainingFacts())
    spent, reached, score = 0.0, None, 0.0
    for number in range(arguments.updates):
        began = time.perf_counter()
        with seeded(seed_of(arguments.seed, number)):
            trainer.update(number)
        spent += time.perf_counter() - began
        if (number + 1) % (arguments.updates // EVALUATIONS) == 0:
            score = trainer.score()
            if reached is None and score >= arguments.target:
                reached = round(spent, 1)
    card = SegmenterCard(classes=store.classes, network=name)
    model = Segmenter(trainer.network, store.format, card)

    def whole_volume(volume: Any) -> None:
        grid, found = slice_probabilities(volume, [model], device=arguments.device)
        grid.labels_to_volume(found)

    whole_volume(volumes[0])  # warm
    began = time.perf_counter()
    for volume in volumes:
        whole_volume(volume)
    row = {
        "seconds_to_target": reached,
        "seconds": round(spent, 1),
        "dice": round(score, 4),
        "volumes_per_second": round(len(volumes) / (time.perf_counter() - began), 2),
    }
    print(name, row, flush=True)
    return row


if __name__ == "__main__":
    main()
