"""Effect of keeping optimizer moments and augmentation strength at the sites between rounds, at equal updates.

    uv run python benchmarks/persistence.py --out benchmarks/results/persistence.json

Two simulated sites with few subjects (MNI152, two contrasts) train the demo's factory with adaptive augmentation. The
variant "forgetful" makes new optimizers and counters in every round, as the published program does; both variants keep
the discriminators. The measure is the kernel distance between slices of the moving-average generator and held-out
subjects, by domain and seed; smaller is better. No data are needed.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from fedfactory.common.files import write_json
from fedfactory.demo.simulated_subjects import CONTRASTS, simulate_site
from fedfactory.generative import FactoryConfig
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine
from simulated_federation import SimulatedFederation, distance_to_real

DOMAINS = ("t1", "t2")
VARIANTS = {"persistent": True, "forgetful": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    # Equal to the interval between two R1 penalties: a variant that restarts its counter does not have more of them.
    parser.add_argument("--updates", type=int, default=16, help="per round and site")
    parser.add_argument(
        "--evaluations", type=int, default=3, help="number of times that the distance is measured, evenly spaced"
    )
    parser.add_argument("--subjects", type=int, default=12, help="per site, half of them held out")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    config = FactoryConfig.preset("tiny", DOMAINS, augment=True, augment_length=2000)
    runs = []
    with tempfile.TemporaryDirectory() as name:
        stores = {domain: site(Path(name), domain, config, subjects=arguments.subjects) for domain in DOMAINS}
        for seed in arguments.seeds:
            for variant, persistent in VARIANTS.items():
                federation = SimulatedFederation(config, stores, seed, persistent=persistent)
                runs.append({"seed": seed, "variant": variant, "evaluations": train(federation, arguments)})
                print(runs[-1], flush=True)
    last = {v: [list(r["evaluations"][-1]["distance"].values()) for r in runs if r["variant"] == v] for v in VARIANTS}
    content = {
        "machine": machine("cpu"),
        "config": config.to_dict(),
        "updates_per_round": arguments.updates,
        "runs": runs,
        "mean_last_distance": {variant: round(float(np.mean(values)), 3) for variant, values in last.items()},
    }
    if arguments.out:
        write_json(arguments.out, content)
    print(json.dumps(content["mean_last_distance"]))


def site(folder: Path, domain: str, config: FactoryConfig, *, subjects: int) -> SliceStore:
    """The slice store of a simulated site, half of whose subjects are held out."""
    seed = 100 * DOMAINS.index(domain)
    simulate_site(folder / domain, CONTRASTS[domain], subjects, size=config.image_size, seed=seed, prefix="s")
    settings = PrepareConfig(
        domain=domain, size=config.image_size, z_bins=config.z_bins, validation_share=0, test_share=0.5,
        label_kind="none",
    )  # fmt: skip
    return prepare(folder / domain, folder / f"{domain}.store", settings).store


def train(federation: SimulatedFederation, arguments: argparse.Namespace) -> list[dict]:
    """Run all rounds; distance and strength of augmentation by domain at every evaluation."""
    evaluations = []
    for number in range(1, arguments.rounds + 1):
        federation.run_round(arguments.updates)
        if number % max(1, arguments.rounds // arguments.evaluations) == 0:
            distance = {
                d: round(distance_to_real(federation.generator, store, domain=n, split="test"), 3)
                for n, (d, store) in enumerate(federation.stores.items())
            }
            strength = {d: round(float(state.augmentation.p), 3) for d, state in federation.states.items()}
            evaluations.append({"round": number, "distance": distance, "augmentation": strength})
    return evaluations


if __name__ == "__main__":
    main()
