"""Which way of training the factory carries labels from the labelled site to the others, in every run?

    uv run python benchmarks/shared_anatomy.py --seeds 0 1 2 3 4 --work study \\
        --out benchmarks/results/shared_anatomy.json
    uv run python benchmarks/shared_anatomy.py --variants default --seeds 10 11 12 13 14 --work study --out final.json
    uv run python benchmarks/shared_anatomy.py --data cardiac --folder ../shared/data/cardiac --times 3 \\
        --seeds 0 1 2 --variants default --work study --out benchmarks/results/shared_anatomy_cardiac.json

The federation is simulated in a single process, with the nodes' trainer and the researcher's aggregator. There are
three sites, of which the first has labels; every seed has subjects of its own. All variants make equally many updates
at every site. After training, the label branch is trained at the first site. Each of the other sites then trains a
segmenter (a) on synthetic slices alone and (b) as `fedfactory adapt` does. The score is the mean foreground Dice on
held-out subjects, compared with no adaptation, random contrasts alone and the oracle. All of them have the same network
and equally many updates: those of (b) are divided between the first guess and its further training. During the training
of the factory, the measures that the alarm uses are evaluated. Finished runs in --work are not repeated. A run of the
brains takes about eight minutes on one CPU core; brains need no data.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from fedfactory.adaptation.adapt import adapt, draw_slices, training_set
from fedfactory.adaptation.choices import ROTATION
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig, first_guess_config
from fedfactory.adaptation.explained_intensity import explained_intensity
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.label_branch_training import LabelBranchConfig, train_label_branch
from fedfactory.adaptation.training.segmenter_training import SegmenterData
from fedfactory.common.files import write_json
from fedfactory.demo.simulated_subjects import CONTRASTS, simulate_site
from fedfactory.generative import FactoryConfig, TrainedFactory, load_factory
from fedfactory.generative.metrics.alarm import alarms
from fedfactory.generative.metrics.quality import site_quality
from fedfactory.generative.metrics.shared_anatomy import shared_anatomy
from fedfactory.generative.metrics.site_quality import SiteQuality
from fedfactory.node.labelling import train_on_store
from fedfactory.node.site_adaptation import MIN_EXPLAINED_RATIO
from fedfactory.node.site_data.held_out_scores import held_out_scores
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine
from simulated_federation import SimulatedFederation, slices_of

UPDATES = 500  # per site
EVALUATIONS = 5
TEST_SUBJECTS = 6
CARDIAC_SIDE = 160.0  # mm around the middle of the scan, where the heart is
SEGMENTERS = {
    "brains": SegmenterConfig(network_size="small", updates=200, rotation=ROTATION),  # simulated heads lie straight
    "cardiac": SegmenterConfig(updates=800, rotation=math.pi, mirror=False),  # these scans have no common orientation
}


@dataclass(frozen=True)
class Variant:
    """A way of training the factory.

    Attributes:
        changes: settings that differ from the preset.
        schedule: (rounds, updates per round) of each stage; UPDATES updates in total.
        palette: "" for the shipped palette, or "random" for six maps with random grey levels.
        momentum: of the server (FedAvgM, Hsu et al. 2019).
        grey_rate: learning rate of the palette's grey levels, as a multiple of that of all other parameters.
        transport: how the sites send their weights.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    schedule: tuple[tuple[int, int], ...] = ((50, 10),)
    palette: str = ""
    momentum: float = 0.0
    grey_rate: float = 1.0
    transport: str = "float32"


PUBLISHED = {"head": "image", "start_size": 4, "channels": (48, 48, 32, 16)}
VARIANTS = {
    "default": Variant(),
    "shared_discriminator": Variant({"discriminator": "shared"}),
    "published_conditioning": Variant(PUBLISHED),
    "palette_and_mapping": Variant({"conditioning": "mapping"}),
    "random_palette": Variant(palette="random"),
    "long_rounds": Variant(schedule=((10, 50),)),
    "short_then_long": Variant(schedule=((25, 10), (5, 50))),
    "texture": Variant({"texture": 0.1}),
    "fast_palette": Variant(grey_rate=4.0),
    "server_momentum": Variant(momentum=0.5),
    "eight_bits": Variant(transport="int8"),
    "twice_as_long": Variant(schedule=((100, 10),)),  # more updates than the others: the effect of longer training
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("brains", "cardiac"), default="brains")
    parser.add_argument(
        "--folder", type=Path, help="folder of the cardiac sites: site_a, site_b, site_c with train and test"
    )
    parser.add_argument("--size", type=int, default=32, help="pixels per side")
    parser.add_argument("--times", type=int, default=1, help="factor for the number of rounds of every variant")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds side by side, one thread each")
    parser.add_argument("--work", type=Path, required=True, help="folder for data and finished runs")
    parser.add_argument("--gather", action="store_true", help="report the finished runs only, start none")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(run_seed, arguments, seed) for seed in arguments.seeds]
        seeds = [job.result() for job in jobs]
    content = {
        "machine": machine("cpu"),
        "data": arguments.data,
        "size": arguments.size,
        "updates_per_site": UPDATES * arguments.times,
        "variants": {name: asdict(VARIANTS[name]) for name in arguments.variants},
        "seeds": seeds,
    }
    report(content)
    if arguments.out:
        write_json(arguments.out, content)
        draw(content, arguments.out.with_suffix(".png"))


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Scores of the baselines and all variants for one seed."""
    torch.set_num_threads(1)
    work = arguments.work / f"{arguments.data}_{seed}"
    size = arguments.size
    stores = brains(work, seed, size) if arguments.data == "brains" else cardiac(work, arguments.folder, size)
    config = replace(SEGMENTERS[arguments.data], seed=seed)
    baselines = cached(work / "baselines.json", lambda: score_baselines(work, stores, config))
    runs = {}
    for name in arguments.variants:
        if arguments.gather and not (work / f"{name}.json").is_file():
            continue
        runs[name] = cached(work / f"{name}.json", lambda name=name: run(stores, name, config, times=arguments.times))
        print(arguments.data, seed, name, runs[name]["dice"], flush=True)
    return {"seed": seed, "baselines": baselines, "runs": runs}


def cached(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The content of a JSON file, which `make` computes if it does not exist."""
    if not path.is_file():
        write_json(path, make())
    return json.loads(path.read_text())


def brains(work: Path, seed: int, size: int, *, train: int = 16, test: int = TEST_SUBJECTS) -> dict[str, SliceStore]:
    """Stores of the simulated brain sites, by domain, with so many subjects to train on and held out."""
    stores, subjects = {}, train + test
    for number, (domain, contrast) in enumerate(CONTRASTS.items()):
        if not (work / f"{domain}.store").is_dir():
            simulate_site(work / domain, contrast, subjects, size=size, seed=10_000 * seed + 1_000 * number, prefix="s")
            config = PrepareConfig(
                domain=domain, size=size, z_bins=12, validation_share=0, test_share=test / subjects, seed=seed
            )
            prepare(work / domain, work / f"{domain}.store", config)
        stores[domain] = SliceStore(work / f"{domain}.store")
    return stores


def cardiac(work: Path, folder: Path, size: int) -> dict[str, SliceStore]:
    """Stores of the sites' training cases, split again by patient. The test cases of the folder are not used."""
    stores = {}
    for domain in ("a", "b", "c"):
        if not (work / f"{domain}.store").is_dir():
            config = PrepareConfig(
                domain=domain, size=size, spacing=CARDIAC_SIDE / size, z_bins=6, validation_share=0, test_share=0.3,
                patient_pattern=r"patient\d+",
            )  # fmt: skip
            prepare(folder / f"site_{domain}" / "train", work / f"{domain}.store", config)
        stores[domain] = SliceStore(work / f"{domain}.store")
    return stores


def score_baselines(work: Path, stores: dict[str, SliceStore], config: SegmenterConfig) -> dict[str, Any]:
    """Scores of the methods without a factory; the labelled site's segmenters are saved for the variants."""
    first = next(iter(stores.values()))
    plain, robust = train_on_store(first, config), train_on_store(first, first_guess_config(config))
    first_guess = train_on_store(first, first_guess_config(half_training(config)))
    for name, segmenter in (("plain", plain), ("robust", robust), ("first_guess", first_guess)):
        segmenter.save(work / f"{name}.safetensors")
    rows: dict[str, Any] = {"dice": {}, "explained": {}}
    for domain, store in stores.items():
        oracle = plain if store is first else train_on_store(store, config)
        rows["dice"][domain] = {
            "no_adaptation": dice(plain, store), "augmentation_only": dice(robust, store), "oracle": dice(oracle, store)
        }  # fmt: skip
        rows["explained"][domain] = explained(first_guess, store)
    return rows


def half_training(config: SegmenterConfig) -> SegmenterConfig:
    """The same training with half of the updates: of a first guess, and of the adaptation that begins with it."""
    return replace(config, updates=max(1, config.wanted_updates // 2))


def run(stores: dict[str, SliceStore], name: str, segmenters: SegmenterConfig, *, times: int) -> dict[str, Any]:
    """Train one factory and, with it, the segmenters of the other sites; returns their scores and the measures."""
    seed = segmenters.seed
    work, first = next(iter(stores.values())).path.parent, next(iter(stores))
    result = cached(work / f"{name}.training.json", lambda: train_factory(stores, name, seed=seed, times=times))
    began = time.monotonic()
    teacher, first_guess = (Segmenter.load(work / f"{name}.safetensors") for name in ("plain", "first_guess"))
    with palette(VARIANTS[name].palette, seed):
        factory = load_factory(work / f"{name}.factory.safetensors")
    labelled = train_label_branch(factory, teacher, first_guess, domain=first, config=LabelBranchConfig(seed=seed))
    scores: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    for domain in list(stores)[1:]:
        store = stores[domain]
        drawn = draw_slices(labelled, domain, volumes=60, seed=seed)
        chosen = store.slices("train")
        (alone,) = adapt(store.format, domain, SegmenterData(labelled=drawn), config=segmenters)
        combined = training_set(store.images[chosen], drawn, first_guess, volume=store.volume_of_slices()[chosen])
        (both,) = adapt(store.format, domain, combined, config=half_training(segmenters))
        scores[domain] = {"synthetic_only": dice(alone, store), "adapted": dice(both, store)}
        shares[domain] = {"synthetic_only": explained(alone, store), "adapted": explained(both, store)}
    result |= {"agreement": labelled.card.agreement, "labels_from": labelled.card.labels_from}
    result |= {"phase_two_seconds": round(time.monotonic() - began)}
    return {"dice": scores, "explained": shares, **result}


def train_factory(stores: dict[str, SliceStore], name: str, *, seed: int, times: int) -> dict[str, Any]:
    """Phase one: train a factory and write it into the folder of the stores; returns the evaluations."""
    variant, work, fmt = VARIANTS[name], next(iter(stores.values())).path.parent, next(iter(stores.values())).format
    widths = variant.changes.get("channels", (48, 32, 16))
    while variant.changes.get("start_size", 8) * 2 ** (len(widths) - 1) < fmt.size:
        widths = (widths[0], *widths)
    changes = {**variant.changes, "channels": widths, "image_size": fmt.size, "z_bins": fmt.z_bins}
    if "a" in stores:  # the heart is not symmetric
        changes["mirror"] = False
    config = FactoryConfig.preset("tiny", tuple(stores), **changes)
    began = time.monotonic()
    with palette(variant.palette, seed):
        federation = SimulatedFederation(
            config, stores, seed, momentum=variant.momentum, grey_rate=variant.grey_rate, transport=variant.transport
        )
    schedule = [(count * times, updates) for count, updates in variant.schedule]
    evaluations, rounds, number = [], sum(count for count, _ in schedule), 0
    for count, updates in schedule:
        for _ in range(count):
            federation.run_round(updates)
            number += 1
            if number % max(1, rounds // EVALUATIONS) == 0:
                evaluations.append({"round": number, **evaluate(federation)})
    generator = federation.generator
    TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0).save(
        work / f"{name}.factory.safetensors"
    )
    return {"evaluations": evaluations, "phase_one_seconds": round(time.monotonic() - began)}


def evaluate(federation: SimulatedFederation) -> dict[str, Any]:
    """Measures of the average generator that the alarm uses: at the researcher, and at every site."""
    quality = {}
    for index, (domain, store) in enumerate(federation.stores.items()):
        chosen = store.slices("train")
        z_bin = torch.from_numpy(store.z_bin[chosen])
        measures = site_quality(federation.generator, slices_of(store, chosen), z_bin, domain=index)
        quality[domain] = {key: round(value, 4) for key, value in measures.to_dict().items()}
    shared = shared_anatomy(federation.generator)
    return {"quality": quality, "shared": {f"{a}/{b}": round(value, 4) for (a, b), value in shared.items()}}


def dice(segmenter: Segmenter, store: SliceStore) -> float:
    """Mean Dice over held-out cases for each foreground class, then over classes, on the volumes' own grids."""
    return round(held_out_scores(store, segmenter)["dice"], 4)


def explained(segmenter: Segmenter, store: SliceStore) -> float:
    """Share of the variance of the training images that the segmenter's classes explain, in [0, 1]."""
    chosen = store.slices("train")
    return round(explained_intensity(store.images[chosen], segmenter, store.volume_of_slices()[chosen]), 4)


def draw(content: dict[str, Any], path: Path) -> None:
    """Write a figure: Dice of every variant and seed at the unlabelled sites, with the means of the baselines."""
    import matplotlib.pyplot as plt

    names = [name for name in content["variants"] if any(name in row["runs"] for row in content["seeds"])]
    domains = list(content["seeds"][0]["baselines"]["dice"])[1:]
    size = (5 * len(domains), 1.4 + 0.35 * len(names))
    figure, axes = plt.subplots(1, len(domains), figsize=size, sharey=True, layout="constrained")
    for axis, domain in zip(axes, domains, strict=True):
        for baseline, style in (("no_adaptation", ":"), ("augmentation_only", "--"), ("oracle", "-")):
            values = [row["baselines"]["dice"][domain][baseline] for row in content["seeds"]]
            axis.axvline(np.mean(values), color="grey", linestyle=style, label=baseline.replace("_", " "))
        for height, name in enumerate(names):
            values = [row["runs"][name]["dice"][domain]["adapted"] for row in content["seeds"] if name in row["runs"]]
            axis.plot(values, [height] * len(values), "o", alpha=0.6)
        axis.set(title=f"site {domain}", xlabel="mean foreground Dice", yticks=range(len(names)))
        axis.set_yticklabels([name.replace("_", " ") for name in names])
    axes[-1].legend(fontsize="small")
    figure.savefig(path, dpi=100)
    plt.close(figure)


class palette:
    """Context in which new generators start with another palette.

    Args:
        kind: "" for the shipped palette, "random" for random grey levels.
        seed: of the random grey levels.
    """

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.seed = kind, seed

    def __enter__(self) -> None:
        from fedfactory.generative.networks import palette as module

        self.table = module.palette_table
        if self.kind == "random":
            module.palette_table = self.random_table

    def __exit__(self, *_: object) -> None:
        from fedfactory.generative.networks import palette as module

        module.palette_table = self.table

    def random_table(self, num_domains: int, generator: torch.Generator, *, channels: int = 1) -> torch.Tensor:
        """Grey levels (num_domains * channels, 6): -1 for the first map, normal random numbers for the others."""
        rng, rows = torch.Generator().manual_seed(self.seed), num_domains * channels
        return torch.cat([torch.full((rows, 1), -1.0), torch.randn(rows, 5, generator=rng)], dim=1)


def report(content: dict[str, Any]) -> None:
    """Print a line per variant, and count correct and wrong alarms.

    A site has failed if its adapted segmenter does not exceed random contrasts, or if synthetic slices alone give less
    than half of what random contrasts add to no adaptation: then labels do not carry over between domains, and any gain
    comes from the site's own slices.
    """
    confusion = {"failed, alarm": 0, "failed, silent": 0, "good, alarm": 0, "good, silent": 0}
    for name in content["variants"]:
        above, shares, seeds = 0, [], [row for row in content["seeds"] if name in row["runs"]]
        if not seeds:
            continue
        for row in seeds:
            dice, base = row["runs"][name]["dice"], row["baselines"]["dice"]
            gained = {d: dice[d]["adapted"] > base[d]["augmentation_only"] for d in dice}
            carried = {d: dice[d]["synthetic_only"] > halfway(base[d]) for d in dice}
            good = {d: gained[d] and carried[d] for d in dice}
            above += all(gained.values())
            shares += [dice[d]["adapted"] / base[d]["oracle"] for d in dice]
            for domain, is_good in good.items():
                raised = alarms_of(row, name, domain)
                confusion[f"{'good' if is_good else 'failed'}, {'alarm' if raised else 'silent'}"] += 1
        print(f"{name:24s} above in {above} of {len(seeds)} seeds, {np.mean(shares):.0%} of the oracle")
    content["alarm"] = confusion
    print(confusion)


def halfway(base: dict[str, float]) -> float:
    """The mean of the Dice without adaptation and the Dice with random contrasts."""
    return (base["no_adaptation"] + base["augmentation_only"]) / 2


def alarms_of(row: dict[str, Any], name: str, domain: str) -> list[str]:
    """The alarms that `fedfactory adapt` raises at a site with the measures of a run."""
    result, labelled_domain = row["runs"][name], next(iter(row["baselines"]["dice"]))
    last = result["evaluations"][-1]
    shared = next(score for pair, score in last["shared"].items() if set(pair.split("/")) == {labelled_domain, domain})
    if result["labels_from"][domain] == "own":
        shared = None
    raised = alarms(domain, SiteQuality(**last["quality"][domain]), shared)
    if result["explained"][domain]["adapted"] < MIN_EXPLAINED_RATIO * row["baselines"]["explained"][domain]:
        raised.append("explains less")
    return raised


if __name__ == "__main__":
    main()
