"""Dice against epsilon: FedAvg with differential privacy per patient, and without.

    uv run python benchmarks/private_segmentation.py --out benchmarks/results/private_segmentation.json

The training patients of a store are dealt to the sites, which train in one process by the rounds and the aggregation of
the package; all runs make equally many updates of equally many slices. Scores are those of the average on the store's
test patients, which a site would not send. Without --store, subjects are simulated from the template of the demo.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import opacus
import torch
from fedfactory.adaptation.labels.candidate_labels import SiteSlices
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteContext, SiteRound
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.privacy.accounting import epsilon_spent, largest_delta, noise_multiplier
from fedfactory.adaptation.privacy.private_updates import PatientSampling, PrivateUpdates, patients_of
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import FEDERATED, SegmenterCard
from fedfactory.common.files import write_json
from fedfactory.demo.simulated_subjects import CONTRASTS, simulate_site
from fedfactory.node.plans.private_round import secret_generator
from fedfactory.node.site_data.held_out_scores import held_out_scores
from fedfactory.node.site_data.training_slices import site_slices
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine

SIZE, SUBJECTS, TEST_SHARE = 32, 160, 0.125  # of the simulated store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, help="slice store with densely labelled training and test cases")
    parser.add_argument("--title", default="simulated T1 subjects")
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 3.0, 0.1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--sites", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--updates", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = SliceStore(arguments.store) if arguments.store else simulated_store(Path(folder))
        rows = [
            run(store, arguments, epsilon, seed) for epsilon in (None, *arguments.epsilons) for seed in arguments.seeds
        ]
        patients = {split: len({c.patient for c in store.cases if c.split == split}) for split in ("train", "test")}
    targets = dict.fromkeys(row["target"] for row in rows)
    scores = {target: [row["dice"] for row in rows if row["target"] == target] for target in targets}
    means = [
        {"target": target, "seeds": len(dice), "dice": round(float(np.mean(dice)), 4), "lowest": min(dice),
         "highest": max(dice)}
        for target, dice in scores.items()
    ]  # fmt: skip
    settings = {key: value for key, value in vars(arguments).items() if key not in ("store", "out", "title")}
    content = {
        "machine": machine("cpu") | {"opacus": opacus.__version__}, "data": arguments.title, "size": store.format.size,
        "patients": patients, **settings, "runs": rows, "table": means,
    }  # fmt: skip
    for row in means:
        print(row)
    if arguments.out:
        write_json(arguments.out, content)


def run(store: SliceStore, arguments: argparse.Namespace, epsilon: float | None, seed: int) -> dict[str, Any]:
    """Train once; Dice of the average and what each site spent."""
    began = time.monotonic()
    config = MethodConfig(
        method="fedavg", classes=max(2, store.classes), size=store.format.size, sites=arguments.sites,
        rounds=arguments.rounds, updates=arguments.updates, batch_size=arguments.batch_size, width=4,
        learning_rate=arguments.learning_rate, seed=seed, dp_epsilon=epsilon,
    )  # fmt: skip
    method = make_method(config)
    data = dealt(site_slices(store, config.classes), arguments.sites, seed)
    models = [method.build() for _ in data]
    optimizers = [method.optimizers(model) for model in models]
    designs = [PatientSampling.of(len(patients_of(part)), config.batch_size) for part in data]
    deltas = [largest_delta(design.patients) for design in designs]
    steps = config.rounds * config.updates
    noises = [
        noise_multiplier(epsilon, delta, rate=design.rate, updates=steps) if epsilon else 0.0
        for design, delta in zip(designs, deltas, strict=True)
    ]
    shared = models[0].state_dict()
    for number in range(1, config.rounds + 1):
        sent, reports = {}, {}
        for site, (part, model) in enumerate(zip(data, models, strict=True)):
            model.load_state_dict(shared)
            private = PrivateUpdates(noise=noises[site], rng=secret_generator(b"benchmark")) if epsilon else None
            round_ = SiteRound(
                model=model, optimizers=optimizers[site], data=part, site=site, number=number,
                state=method.new_state(), private=private,
            )  # fmt: skip
            reports[site] = method.train_round(round_)
            sent[site] = {name: value.detach().clone() for name, value in model.state_dict().items()}
        shared, _ = method.aggregate(reports, sent.__getitem__, shared)
    models[0].load_state_dict(shared)
    card = SegmenterCard(classes=config.classes, network=FEDERATED)
    segmenter = Segmenter(method.segmenter(models[0], SiteContext()).eval(), store.format, card)
    spent = [
        epsilon_spent([(noise, design.rate, steps)], delta)
        for noise, design, delta in zip(noises, designs, deltas, strict=True)
    ]
    row = {
        "target": epsilon, "seed": seed, "dice": round(held_out_scores(store, segmenter)["dice"], 4),
        "epsilon": [round(value, 3) for value in spent] if epsilon else None, "deltas": deltas, "noise": noises,
        "patients": [design.patients for design in designs], "rates": [design.rate for design in designs],
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    print(row, flush=True)
    return row


def dealt(data: SiteSlices, sites: int, seed: int) -> list[SiteSlices]:
    """The slices of each site, whose patients are drawn at random."""
    order = np.random.default_rng(seed).permutation(np.unique(data.patients))
    parts = [np.isin(data.patients, order[site::sites]) for site in range(sites)]
    return [
        replace(data, images=data.images[part], candidates=data.candidates[part], kinds=data.kinds[part],
                patients=data.patients[part])
        for part in parts
    ]  # fmt: skip


def simulated_store(folder: Path) -> SliceStore:
    """A store of subjects that are deformed copies of the template."""
    simulate_site(folder / "subjects", CONTRASTS["t1"], SUBJECTS, size=SIZE, seed=0, prefix="s")
    config = PrepareConfig(domain="t1", size=SIZE, z_bins=6, validation_share=0, test_share=TEST_SHARE)
    return prepare(folder / "subjects", folder / "store", config).store


if __name__ == "__main__":
    main()
