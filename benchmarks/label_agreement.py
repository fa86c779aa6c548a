"""Agreement between the labels of a factory and those of an oracle on the same synthetic slices.

    uv run python benchmarks/label_agreement.py --work study --seeds 0 1 2 --out benchmarks/results/label_agreement.json

It needs the sites and factories that `benchmarks/shared_anatomy.py` left in --work. For every domain a segmenter is
trained on the site's own labels. This is the oracle: in a federation with a single labelled site it does not exist. The
oracle segments 40 synthetic subjects, and its labels are compared with the factory's (Dice by class). Its Dice on real
held-out subjects is reported as well: agreement with the factory's labels can hardly be higher than agreement with the
reference. Three seeds take about 15 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from fedfactory.adaptation.adapt import draw_slices, pseudo_label
from fedfactory.adaptation.choices import ROTATION
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.evaluation.scores import dice
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.label_branch_training import LabelBranchConfig, train_label_branch
from fedfactory.common.files import write_json
from fedfactory.generative import load_factory
from fedfactory.node.labelling import train_on_store
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine

VOLUMES = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks/shared_anatomy.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=400, help="updates of the oracle's training")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    seeds = {seed: agreement(arguments, seed) for seed in arguments.seeds}
    content: dict[str, Any] = {"machine": machine("cpu"), "volumes": VOLUMES, "seeds": seeds, "mean": {}}
    for domain in next(iter(seeds.values())):
        rows = [by_domain[domain] for by_domain in seeds.values()]
        mean = {key: np.mean([row[key] for row in rows], axis=0).round(4).tolist() for key in rows[0]}
        content["mean"][domain] = mean
        print(domain, mean)
    if arguments.out:
        write_json(arguments.out, content)


def agreement(arguments: argparse.Namespace, seed: int) -> dict[str, dict[str, Any]]:
    """By domain: Dice of each class between the oracle's labels and the factory's, and the oracle's and real labels."""
    work = arguments.work / f"brains_{seed}"
    factory = load_factory(work / "default.factory.safetensors")
    teacher, first_guess = (Segmenter.load(work / f"{name}.safetensors") for name in ("plain", "first_guess"))
    labelled = train_label_branch(
        factory, teacher, first_guess, domain=factory.config.domains[0], config=LabelBranchConfig(seed=seed)
    )
    rows = {}
    for domain in factory.config.domains:
        store = SliceStore(work / f"{domain}.store")
        oracle = train_on_store(
            store, SegmenterConfig(network_size="small", updates=arguments.updates, rotation=ROTATION, seed=seed)
        )
        drawn = draw_slices(labelled, domain, volumes=VOLUMES, seed=seed + 1000)
        predicted = pseudo_label(drawn.images, oracle, drawn.volume)
        chosen = store.slices("test")
        real = pseudo_label(store.images[chosen], oracle, store.volume_of_slices()[chosen])
        rows[domain] = {
            "factory": by_class(drawn.labels, predicted.labels, store.classes),
            "real": by_class(store.labels[chosen], real.labels, store.classes),
        }
        rows[domain] |= {f"{name} mean": float(np.mean(values)) for name, values in list(rows[domain].items())}
        print(seed, domain, rows[domain], flush=True)
    return rows


def by_class(first: np.ndarray, second: np.ndarray, classes: int) -> list[float]:
    """Dice of every foreground class over all slices together; both label maps are (N, S, S)."""
    return [dice(first == value, second == value) for value in range(1, classes)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
