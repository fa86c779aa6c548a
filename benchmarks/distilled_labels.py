"""How far the labels of a distilled branch, and of bfloat16, agree with those of all branches in float32.

    uv run python benchmarks/distilled_labels.py --work demo-seeds --out benchmarks/results/distilled_labels.json

It needs the demos that `benchmarks/demo_seeds.py` left in --work. For every seed, the label branches are trained again
with the settings of `fedfactory label`; the best three, its default, and all five are distilled. The labelled site's
oracle labels the slices. All ways label the same 256 slices of further latents. Their Dice with the oracle shows what a
difference between them is worth. Three seeds take about 10 minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.labelled_slices import foreground_dice, label_agreement
from fedfactory.adaptation.networks.label_branch import BranchEnsemble
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.distillation import COMPARED_SLICES, DistillationConfig, distil_branches
from fedfactory.adaptation.training.label_branch_training import LabelBranchConfig, train_label_branch
from fedfactory.common.files import write_json
from fedfactory.common.records import write_record
from fedfactory.generative.synthesis import synthesise_slices
from measuring import machine

TEST_SEED = 99  # of slices that no training and no comparison of it has seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with one demo folder per seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--keep", type=int, nargs="+", default=[3, 5], help="numbers of branches")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--factories", type=Path, help="folder for the labelled factories")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        most, oracle = branched_factory(arguments.work / f"seed{seed}", seed=seed, keep=max(arguments.keep))
        for keep in arguments.keep:
            labelled = distil_branches(replace(most, branches=most.branches[:keep]), DistillationConfig(seed=seed))
            row = {"seed": seed, "branches": len(labelled.branches), **compare(labelled, oracle)}
            print(row, flush=True)
            rows.append(row)
            if arguments.factories:
                labelled.save(arguments.factories / f"seed{seed}_{keep}.safetensors")
    if arguments.out:
        write_json(arguments.out, {"machine": machine("cpu"), "slices": COMPARED_SLICES, "rows": rows})


def branched_factory(demo: Path, *, seed: int, keep: int) -> tuple[LabelledFactory, Segmenter]:
    """The demo's factory with `keep` label branches, the best first, and the labelled site's oracle."""
    given = LabelledFactory.load(demo / "labelled_factory.safetensors")
    domain = given.card.labelled_domain
    oracle = Segmenter.load(demo / "models" / domain / "oracle.safetensors")
    config = LabelBranchConfig(keep=keep, seed=seed)
    return train_label_branch(given.factory, oracle, given.robust, domain=domain, config=config), oracle


def compare(labelled: LabelledFactory, oracle: Segmenter) -> dict[str, Any]:
    """The agreements of one factory."""
    config, classes = labelled.factory.config, labelled.card.classes
    domains = torch.full((COMPARED_SLICES,), config.domain_index(labelled.card.labelled_domain))
    made = synthesise_slices(labelled.factory.generator, domains, rng=torch.Generator().manual_seed(TEST_SEED))
    truth = oracle.probabilities(made.image, np.arange(COMPARED_SLICES)).argmax(1)
    plain = BranchEnsemble(labelled.branches).labels(made)
    distilled = BranchEnsemble([labelled.distilled]).labels(made)

    def equal(branches: list, labels: torch.Tensor, precision: str = "float32") -> float:
        return label_agreement(BranchEnsemble(branches, precision=precision).labels(made), labels, classes).equal_pixels

    return {
        "in_card": write_record(labelled.card.distilled),
        "distilled": write_record(label_agreement(distilled, plain, classes)),
        "equal_pixels_of_each_branch": [equal([branch], plain) for branch in labelled.branches],
        "equal_pixels_of_bfloat16": {
            "ensemble": equal(labelled.branches, plain, "bfloat16"),
            "distilled": equal([labelled.distilled], distilled, "bfloat16"),
        },
        "dice_with_oracle": {
            "ensemble": foreground_dice(plain, truth, classes),
            "distilled": foreground_dice(distilled, truth, classes),
        },
    }


if __name__ == "__main__":
    main()
