"""Phase two in seconds: training time until a validation Dice, and segmentation speed, for every network.

    uv run python benchmarks/adaptation.py --updates 200 --out benchmarks/results/adaptation_cpu.json

A segmenter is trained on the labelled slices of a simulated site (t1 brains). The Dice on held-out subjects is
evaluated ten times during training; the time until the first evaluation at or above --target is reported. Then whole
volumes are segmented from memory: resampling to slices, the network, resampling of the probabilities back to the
volume, and the maximum over classes. Times are wall time with --threads threads. No data are needed. With 200 updates
this takes about 5 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from fedfactory.adaptation.choices import ROTATION
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.engine.window_training import WindowTrainer
from fedfactory.adaptation.inference import slice_probabilities
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.adaptation.network_names import NETWORKS
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.adaptation.training.segmenter_training import SegmenterData, plan_segmenter
from fedfactory.common.files import write_json
from fedfactory.demo.simulated_subjects import CONTRASTS, simulate_site
from fedfactory.imaging.image_reader import read_image
from fedfactory.imaging.volumes import Volume
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
        rows = {name: measure(name, store, volumes, arguments=arguments) for name in arguments.networks}
    settings = {key: value for key, value in vars(arguments).items() if key not in ("out", "networks")}
    if arguments.out:
        write_json(arguments.out, {"machine": machine(arguments.device), **settings, "networks": rows})


def site(folder: Path, arguments: argparse.Namespace) -> tuple[SliceStore, list[Volume]]:
    """The slice store of a simulated labelled site, and the site's volumes as they are read from their files."""
    simulate_site(
        folder / "t1", CONTRASTS["t1"], SUBJECTS + HELD_OUT, size=arguments.size, seed=arguments.seed, prefix="s"
    )
    config = PrepareConfig(
        domain="t1", size=arguments.size, z_bins=12, validation_share=HELD_OUT / (SUBJECTS + HELD_OUT), test_share=0
    )
    store = prepare(folder / "t1", folder / "t1.store", config).store
    images = sorted((folder / "t1").glob("*/image/*.nii.gz")) or sorted((folder / "t1").rglob("*image*.nii.gz"))
    return store, [read_image((image,)) for image in images]


def slices(store: SliceStore, split: str) -> LabelledSlices:
    """The labelled slices of one split; each slice carries the number of its volume."""
    chosen = store.labelled_slices(split)
    return LabelledSlices(store.images[chosen], store.labels[chosen], store.classes, store.volume_of_slices()[chosen])


def measure(
    name: str, store: SliceStore, volumes: list[Volume], *, arguments: argparse.Namespace
) -> dict[str, float | None]:
    """Train one network and time it.

    Returns: seconds until the target Dice (None if it is not reached), seconds of all updates, the last validation
        Dice, and segmented volumes per second.
    """
    config = SegmenterConfig(
        network=name,
        network_size="small",
        updates=arguments.updates,
        rotation=ROTATION,  # the simulated heads lie straight
        precision=arguments.precision,
        seed=arguments.seed,
    )
    data = SegmenterData(labelled=slices(store, "train"), validation=slices(store, "validation"))
    plan = plan_segmenter(data, store.format, config, device=arguments.device)
    trainer = WindowTrainer(
        data.streams(config, plan), plan, validation=data.validation, seed=config.seed, device=arguments.device
    )
    training_seconds, seconds_to_target, score = 0.0, None, 0.0
    for number in range(arguments.updates):
        began = time.perf_counter()
        trainer.update(number)
        training_seconds += time.perf_counter() - began
        if (number + 1) % max(1, arguments.updates // EVALUATIONS) == 0:
            score = trainer.score()
            if seconds_to_target is None and score >= arguments.target:
                seconds_to_target = round(training_seconds, 1)
    card = SegmenterCard(classes=store.classes, network=name, plan=plan, settings=config.to_dict())
    model = Segmenter(trainer.network, store.format, card)

    def whole_volume(volume: Volume) -> None:
        grid, probabilities = slice_probabilities(volume, [model], device=arguments.device)
        grid.labels_to_volume(probabilities)

    whole_volume(volumes[0])  # warm-up, not timed
    began = time.perf_counter()
    for volume in volumes:
        whole_volume(volume)
    row = {
        "seconds_to_target": seconds_to_target,
        "seconds": round(training_seconds, 1),
        "dice": round(score, 4),
        "volumes_per_second": round(len(volumes) / (time.perf_counter() - began), 2),
    }
    print(name, row, flush=True)
    return row


if __name__ == "__main__":
    main()
