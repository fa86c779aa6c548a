"""Does it pay that sites keep moments of Adam and strength of augmentation between rounds? At equal updates.

    uv run python benchmarks/persistence.py --out benchmarks/results/persistence.json

Two simulated sites (MNI152, two contrasts), the demo's factory with adaptive augmentation, federated averaging in one
process with the trainer of the real nodes. "forgetful" makes optimizers and counters anew in every round, as the
published program does; discriminators stay in both. Reported: kernel distance of the average generator's slices to
held-out real ones, per domain and seed; smaller is better.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from fedfactory.files import write_json
from fedfactory.generative import Factory, FactoryConfig, FactoryTrainer
from fedfactory.generative.quality import kernel_distance, random_features
from fedfactory.generative.trainer import TrainerState, make_optimizers
from fedfactory.node.prepare import prepare
from fedfactory.node.prepare_config import PrepareConfig
from fedfactory.node.store import SliceStore
from fedfactory.researcher.simulate import CONTRASTS, simulate_site
from measuring import machine

DOMAINS = ("t1", "t2")
SAMPLES = 400
DECAY = 0.98  # of the average generator, per round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--updates", type=int, default=10, help="per round and site")
    parser.add_argument("--subjects", type=int, default=20, help="per site, half of them held out")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    config = FactoryConfig.preset("tiny", DOMAINS, augment=True, augment_length=2000)
    with tempfile.TemporaryDirectory() as name:
        stores = [site(Path(name), domain, config, arguments.subjects) for domain in DOMAINS]
        rows = []
        for seed in arguments.seeds:
            for variant in ("persistent", "forgetful"):
                distance = train(config, stores, variant, seed, arguments.rounds, arguments.updates)
                rows.append({"seed": seed, "variant": variant, "distance": dict(zip(DOMAINS, distance, strict=True))})
                print(rows[-1], flush=True)
    content = {"machine": machine("cpu"), "rounds": arguments.rounds, "updates_per_round": arguments.updates}
    content |= {"config": config.to_dict(), "runs": rows}
    if arguments.out:
        write_json(arguments.out, content)
    mean = {v: np.mean([list(r["distance"].values()) for r in rows if r["variant"] == v]) for v in
            ("persistent", "forgetful")}  # fmt: skip
    print(json.dumps({name: float(value) for name, value in mean.items()}))


def site(folder: Path, domain: str, config: FactoryConfig, subjects: int) -> SliceStore:
    simulate_site(
        folder / domain, CONTRASTS[domain], subjects, config.image_size, 100 * DOMAINS.index(domain), prefix="s"
    )
    settings = PrepareConfig(
        domain=domain,
        size=config.image_size,
        z_bins=config.z_bins,
        validation_share=0,
        test_share=0.5,
        label_kind="none",
    )
    return prepare(folder / domain, folder / f"{domain}.store", settings).store


def train(
    config: FactoryConfig, stores: list[SliceStore], variant: str, seed: int, rounds: int, updates: int
) -> list[float]:
    torch.manual_seed(seed)
    start = Factory(config)
    factories = [copy.deepcopy(start) for _ in stores]
    rngs = [torch.Generator().manual_seed(1000 * seed + n) for n in range(len(stores))]
    optimizers = [make_optimizers(factory) for factory in factories]
    states = [TrainerState() for _ in stores]
    average = copy.deepcopy(start.generator)
    for _ in range(rounds):
        for n, store in enumerate(stores):
            if variant == "forgetful":
                optimizers[n], states[n] = make_optimizers(factories[n]), TrainerState()
            trainer = FactoryTrainer(factories[n], optimizers[n], rngs[n], state=states[n])
            chosen = store.slices("train")
            for _ in range(updates):
                batch = chosen[torch.randint(len(chosen), (config.batch_size,), generator=rngs[n]).numpy()]
                z_bin = torch.from_numpy(store.z_bin[batch])
                trainer.train_step(images(store, batch), z_bin, torch.full_like(z_bin, n))
            states[n] = trainer.state
        weights = [factory.generator.state_dict() for factory in factories]
        mean = {name: torch.stack([one[name] for one in weights]).mean(0) for name in weights[0]}
        for factory in factories:
            for name in ("head.grey", "head.log_sigma"):  # rows of the palette belong to their domains
                for row in range(len(DOMAINS)):
                    mean[name][row] = weights[row][name][row]
            factory.generator.load_state_dict(mean)
        with torch.no_grad():
            for name, tensor in average.state_dict().items():
                tensor.lerp_(mean[name], 1 - DECAY)
    return [distance(average, store, n) for n, store in enumerate(stores)]


def images(store: SliceStore, chosen: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(store.images[chosen].astype(np.float32))[:, None]


@torch.no_grad()
def distance(generator, store: SliceStore, domain: int) -> float:
    rng = torch.Generator().manual_seed(7)
    held_out = store.slices("test")
    chosen = held_out[torch.randint(len(held_out), (SAMPLES,), generator=rng).numpy()]
    z_bin = torch.from_numpy(store.z_bin[chosen])
    z = torch.randn(SAMPLES, generator.config.latent_dim, generator=rng)
    drawn = generator(z, z_bin, torch.full_like(z_bin, domain), generator.draw_noise(SAMPLES, rng)).clamp(-1, 1)
    return float(kernel_distance(random_features(images(store, chosen)), random_features(drawn)))


if __name__ == "__main__":
    main()
