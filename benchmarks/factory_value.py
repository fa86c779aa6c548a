"""What a factory that draws labels is worth: does it help a site more than the first guess alone, at equal updates?

    uv run python benchmarks/factory_value.py --folder ../shared/data/cardiac_dealt --work study --seeds 0 1 2 \\
        --out benchmarks/results/factory_value.json
    uv run python benchmarks/factory_value.py --folder ../shared/data/cardiac_dealt --work quick --quick
    uv run python benchmarks/factory_value.py --data brains --work study --seeds 0 1 2 \\
        --out benchmarks/results/factory_value_brains.json

Three cardiac sites, of which the first has labels; the slices show 160 mm around the middle of the scan. Or three sites
of simulated brains, which need no data: every seed has its own subjects. The federation is simulated in a single
process, with the nodes' trainer and the researcher's aggregator, and every variant makes equally many updates at every
site:

    branch        a factory of images alone; the label branch is trained afterwards at the labelled site
    pairs         labels are drawn with the image; the labelled site's discriminator sees both
    pseudo_pairs  the same, and the other sites' discriminators see the first guess's labels of their own slices
    full_pairs    the same, and these labels come from a first guess that has all its updates

Discriminators of cardiac sites see turned slices, since these scans have no common orientation. Measured of a factory:
the shared anatomy; the Dice of the drawn labels with those that an oracle of the domain gives the drawn slices; the
audit of all sites' patients together; and, for each unlabelled site, the Dice on its test patients of a segmenter that
saw nothing but synthetic slices, of a quarter as many, as many and four times as many subjects as it has patients, and
of the first guess trained further on the site's own slices with and without synthetic ones. All segmenters have the
same network and number of updates, of which a first guess that is trained further has had half. Finished parts are not
repeated. A grid of drawn slices with the contours of their labels is written for each variant.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from factory_value_summary import differences, report
from fedfactory.adaptation.adapt import SYNTHETIC_SHARE, adapt, draw_slices, pseudo_label
from fedfactory.adaptation.choices import ROTATION
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig, first_guess_config
from fedfactory.adaptation.evaluation.scores import dice as dice_of
from fedfactory.adaptation.evaluation.summary import mean_over_classes
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.label_branch_training import (
    LabelBranchConfig,
    train_label_branch,
    with_first_guess,
)
from fedfactory.adaptation.training.segmenter_training import SegmenterData
from fedfactory.common.files import write_json
from fedfactory.demo.simulated_subjects import CONTRASTS
from fedfactory.generative import Factory, FactoryConfig, FactoryTrainer, TrainedFactory, load_factory
from fedfactory.generative.metrics.shared_anatomy import shared_anatomy
from fedfactory.generative.synthesis import subject_heights
from fedfactory.generative.trainer import make_optimizers
from fedfactory.imaging.pictures.contours import slice_with_contours
from fedfactory.imaging.pictures.decoding import write_picture
from fedfactory.node.audit import audit
from fedfactory.node.audit_slices import AuditSlices, real_slices
from fedfactory.node.labelling import train_on_store
from fedfactory.node.site_data.held_out_scores import case_scores
from fedfactory.node.site_data.training_slices import known_labels
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine
from shared_anatomy import brains, cached, half_training
from simulated_federation import SimulatedFederation

CLASSES = 4
FIRST_GUESS, FIRST_GUESS_IN_FULL = "first_guess.safetensors", "full.safetensors"  # of half the updates, of FULL
FULL, FURTHER = 7000, 1700  # updates of a first guess and of an adaptation, as the package has them
SUBJECTS = 20  # simulated brains of a site to train on, and as many that are held out
AMOUNTS = {"a_quarter": 0.25, "as_many": 1.0, "four_times": 4.0}  # synthetic subjects for each real one
FIELD = 160.0  # millimetres per side, around the middle of a cardiac scan
WIDTHS = {16: (32, 16), 32: (48, 32, 16), 64: (48, 48, 32, 16)}
ROUND = 10  # updates between two averagings
AUDIT_VOLUMES = 40  # synthetic subjects of each domain
COLUMNS = 8  # of a picture


@dataclass(frozen=True)
class Task:
    """Sites of one kind.

    Attributes:
        domains: of the sites; the first has labels.
        heights: height bins of a volume.
        factory: settings of the factory beside those of all tasks.
        segmenter: settings of the segmenters.
    """

    domains: tuple[str, ...]
    heights: int
    factory: dict[str, Any]
    segmenter: dict[str, Any]


TASKS = {
    # Hearts are not symmetric, and these scans have no common orientation.
    "cardiac": Task(("a", "b", "c"), 6, {"mirror": False, "turn": 0.9}, {"rotation": math.pi, "mirror": False}),
    "brains": Task(tuple(CONTRASTS), 12, {}, {"rotation": ROTATION}),  # simulated heads lie straight
}


@dataclass(frozen=True)
class Variant:
    """A way of training the factory.

    Attributes:
        changes: settings of the factory beside those that all variants have.
        pseudo: file of the first guess whose labels unlabelled sites show their discriminators; "" for none.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    pseudo: str = ""


VARIANTS = {
    "branch": Variant(),
    "pairs": Variant({"classes": CLASSES}),
    "pseudo_pairs": Variant({"classes": CLASSES}, pseudo=FIRST_GUESS),
    "full_pairs": Variant({"classes": CLASSES}, pseudo=FIRST_GUESS_IN_FULL),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(TASKS), default="cardiac")
    parser.add_argument("--folder", type=Path, help="of cardiac sites: site_a, site_b, site_c with train and test")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores, finished parts and pictures")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, choices=list(WIDTHS), default=64, help="pixels per side")
    parser.add_argument("--updates", type=int, default=1000, help="of each site's networks, a multiple of 10")
    parser.add_argument("--segmenter-updates", type=int, default=800)
    parser.add_argument("--in-full", action="store_true", help="also begin with a first guess that has all its updates")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="on which factories are trained")
    parser.add_argument("--quick", action="store_true", help="a few updates at 16 pixels: whether everything runs")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.updates, arguments.segmenter_updates = 16, ROUND, 4
        arguments.seeds = arguments.seeds[:1]
    if arguments.data == "cardiac" and arguments.folder is None:
        parser.error("cardiac sites need --folder")
    torch.set_num_threads(1)
    runs = [run_seed(arguments, seed) for seed in arguments.seeds]
    settings = {name: getattr(arguments, name) for name in ("size", "updates", "segmenter_updates", "device")}
    task = TASKS[arguments.data]
    content = {
        "machine": machine("cpu"),
        "data": arguments.data,
        **settings,
        **({"field_of_view": FIELD} if arguments.data == "cardiac" else {}),
        **task.factory,
        "step": step_times(task, arguments.size),
        "differences": differences(runs),
        "seeds": runs,
    }
    report(content)
    if arguments.out:
        write_json(arguments.out, content)


def run_seed(arguments: argparse.Namespace, seed: int) -> dict[str, Any]:
    """The scores of all baselines and variants for one seed."""
    task, work = TASKS[arguments.data], arguments.work / f"{arguments.data}_{arguments.size}_seed{seed}"
    work.mkdir(parents=True, exist_ok=True)
    if arguments.data == "brains":
        stores = brains(work, seed, arguments.size, train=SUBJECTS, test=SUBJECTS)
    else:
        stores = {domain: heart_store(arguments, domain) for domain in task.domains}
    config = SegmenterConfig(network_size="small", updates=arguments.segmenter_updates, seed=seed, **task.segmenter)
    baselines = cached(work / "baselines.json", lambda: score_baselines(work, stores, config))
    if arguments.in_full:
        full = cached(work / "in_full.json", lambda: score_first_guess_in_full(arguments, work, stores, config))
        baselines["scores_in_full"] = full["scores"]
    print(seed, "baselines", json.dumps(baselines), flush=True)
    variants = {}
    for name in arguments.variants:
        result = cached(work / f"{name}.json", lambda name=name: run(arguments, work, stores, name=name, config=config))
        variants[name] = result
        if arguments.in_full:
            full = cached(
                work / f"{name}.in_full.json", lambda name=name: run_in_full(arguments, work, stores, name, config)
            )
            result["scores_in_full"] = full["scores"]
        print(seed, name, json.dumps(result), flush=True)
    return {"seed": seed, "baselines": baselines, "variants": variants}


def heart_store(arguments: argparse.Namespace, domain: str) -> SliceStore:
    """The store of a site: its training and test cases as the data set deals them."""
    path = arguments.work / f"{domain}_{arguments.size}.store"
    if not path.is_dir():
        for split in ("train", "test"):
            config = PrepareConfig(
                domain=domain, size=arguments.size, field_of_view=FIELD, z_bins=TASKS["cardiac"].heights, split=split,
                patient_pattern=r"patient\d+",
            )  # fmt: skip
            prepare(arguments.folder / f"site_{domain}" / split, path, config)
    return SliceStore(path)


def score_baselines(work: Path, stores: dict[str, SliceStore], config: SegmenterConfig) -> dict[str, Any]:
    """Dice of what a site can have without a factory; the oracles and the first guess of half the updates are saved."""
    first, half = next(iter(stores.values())), half_training(config)
    first_guess, further = (train_on_store(first, first_guess_config(each)) for each in (config, half))
    further.save(work / FIRST_GUESS)
    rows: dict[str, dict[str, Any]] = {}
    for domain, store in stores.items():
        oracle = train_on_store(store, config)
        oracle.save(work / f"oracle_{domain}.safetensors")
        rows[domain] = {"oracle": score(oracle, store), "first_guess": score(first_guess, store)}
        if store is not first:
            (own,) = adapt(store.format, domain, SegmenterData(labelled=own_slices(store, further), start=further),
                           config=half)  # fmt: skip
            rows[domain]["first_guess_and_own_slices"] = score(own, store)
    return {"scores": rows}


def score(segmenter: Segmenter, store: SliceStore) -> dict[str, Any]:
    """Mean Dice over held-out cases for each structure, then over structures; and its mean for every patient."""
    scores = case_scores(store, segmenter)
    patients: dict[str, list[float]] = {}
    for one in scores:
        if math.isfinite(one.dice):
            patients.setdefault(one.patient, []).append(one.dice)
    means = [round(float(np.mean(values)), 4) for _, values in sorted(patients.items())]
    return {"dice": round(mean_over_classes(scores, "dice"), 4), "patients": means}


def own_slices(store: SliceStore, first_guess: Segmenter) -> LabelledSlices:
    """The training slices of a store with the labels of the first guess, the mean of all its views."""
    chosen = store.slices("train")
    return pseudo_label(store.images[chosen].astype(np.float32), first_guess, store.volume_of_slices()[chosen])


def run(
    arguments: argparse.Namespace, work: Path, stores: dict[str, SliceStore], *, name: str, config: SegmenterConfig
) -> dict[str, Any]:
    """Train one factory and measure what it is worth."""
    began, first = time.process_time(), next(iter(stores))
    first_guess = Segmenter.load(work / FIRST_GUESS)
    oracles = {domain: Segmenter.load(work / f"oracle_{domain}.safetensors") for domain in stores}
    file = work / f"{name}.factory.safetensors"
    if not file.is_file():
        train_factory(arguments, work, stores, VARIANTS[name], config).save(file)
    seconds = {"factory": round(time.process_time() - began)}
    labelled = labelled_factory(work, name, domain=first, seed=config.seed)
    draw(labelled, work / f"{name}.png", seed=config.seed)
    shared = {f"{a}/{b}": round(score, 3) for (a, b), score in shared_anatomy(labelled.factory.generator).items()}
    drawn_dice, drawn_shares, scores = {}, {}, {}
    half = half_training(config)
    for domain, store in stores.items():
        patients = len({case.patient for case in store.cases if case.split == "train"})
        drawn = draw_slices(labelled, domain, volumes=round(AMOUNTS["four_times"] * patients), seed=config.seed)
        seen = pseudo_label(drawn.images, oracles[domain], drawn.volume)
        by_class = [dice_of(drawn.labels == value, seen.labels == value) for value in range(1, CLASSES)]
        drawn_dice[domain] = round(float(np.mean(by_class)), 3)
        shares = np.bincount(drawn.labels.ravel(), minlength=CLASSES) / drawn.labels.size
        drawn_shares[domain] = [round(float(share), 3) for share in shares]
        if domain == first:
            continue
        scores[domain] = {}
        for amount, times in AMOUNTS.items():
            kept = drawn.volume < max(1, round(times * patients))
            part = LabelledSlices(drawn.images[kept], drawn.labels[kept], drawn.classes, drawn.volume[kept])
            (alone,) = adapt(store.format, domain, SegmenterData(labelled=part), config=config)
            scores[domain][f"synthetic_alone_{amount}"] = score(alone, store)
        both = SegmenterData(
            labelled=own_slices(store, first_guess), further=((drawn, SYNTHETIC_SHARE),), start=first_guess
        )
        (mixed,) = adapt(store.format, domain, both, config=half)
        scores[domain]["first_guess_own_and_synthetic_slices"] = score(mixed, store)
    seconds["all"] = round(time.process_time() - began)
    return {
        "shared_anatomy": shared,
        "drawn_labels": drawn_dice,
        "class_shares": drawn_shares,
        "scores": scores,
        "privacy": privacy(labelled, stores, seed=config.seed),
        "cpu_seconds": seconds,
    }


def labelled_factory(work: Path, name: str, *, domain: str, seed: int) -> LabelledFactory:
    """The factory with its own labels, or with a label branch that is trained for it; made once."""
    file = work / f"{name}.labelled.safetensors"
    if not file.is_file():
        factory = load_factory(work / f"{name}.factory.safetensors")
        first_guess = Segmenter.load(work / FIRST_GUESS)
        if factory.config.classes:
            with_first_guess(factory, first_guess, domain=domain, seed=seed).save(file)
        else:
            teacher, branch = Segmenter.load(work / f"oracle_{domain}.safetensors"), LabelBranchConfig(seed=seed)
            train_label_branch(factory, teacher, first_guess, domain=domain, config=branch).save(file)
    return LabelledFactory.load(file)


def first_guess_in_full(
    arguments: argparse.Namespace, work: Path, store: SliceStore, config: SegmenterConfig
) -> Segmenter:
    """The first guess of FULL updates at the labelled site; trained once."""
    file = work / FIRST_GUESS_IN_FULL
    if not file.is_file():
        updates = arguments.segmenter_updates if arguments.quick else FULL
        train_on_store(store, first_guess_config(replace(config, updates=updates))).save(file)
    return Segmenter.load(file)


def score_first_guess_in_full(
    arguments: argparse.Namespace, work: Path, stores: dict[str, SliceStore], config: SegmenterConfig
) -> dict[str, Any]:
    """Scores of a first guess of FULL updates, and of what FURTHER updates on a site's own slices make of it."""
    first_guess = first_guess_in_full(arguments, work, next(iter(stores.values())), config)
    further = arguments.segmenter_updates if arguments.quick else FURTHER
    rows = {domain: {"first_guess": score(first_guess, store)} for domain, store in stores.items()}
    for domain, store in list(stores.items())[1:]:
        data = SegmenterData(labelled=own_slices(store, first_guess), start=first_guess)
        (own,) = adapt(store.format, domain, data, config=replace(config, updates=further))
        rows[domain]["first_guess_and_own_slices"] = score(own, store)
    return {"scores": rows}


def run_in_full(
    arguments: argparse.Namespace, work: Path, stores: dict[str, SliceStore], name: str, config: SegmenterConfig
) -> dict[str, Any]:
    """Scores of FURTHER updates, from the first guess of FULL updates, with synthetic slices and with both kinds."""
    first_guess = Segmenter.load(work / FIRST_GUESS_IN_FULL)
    config = replace(config, updates=arguments.segmenter_updates if arguments.quick else FURTHER)
    labelled = labelled_factory(work, name, domain=next(iter(stores)), seed=config.seed)
    rows: dict[str, dict[str, Any]] = {}
    for domain, store in list(stores.items())[1:]:
        patients = len({case.patient for case in store.cases if case.split == "train"})
        drawn = draw_slices(labelled, domain, volumes=round(AMOUNTS["four_times"] * patients), seed=config.seed)
        own, rows[domain] = own_slices(store, first_guess), {}
        for row, data in {
            "first_guess_and_synthetic_slices": SegmenterData(labelled=drawn, start=first_guess),
            "first_guess_own_and_synthetic_slices": SegmenterData(
                labelled=own, further=((drawn, SYNTHETIC_SHARE),), start=first_guess
            ),
        }.items():
            (found,) = adapt(store.format, domain, data, config=config)
            rows[domain][row] = score(found, store)
    return {"scores": rows}


def privacy(labelled: LabelledFactory, stores: dict[str, SliceStore], *, seed: int) -> dict[str, Any]:
    """What an attacker learns of who was trained on, over the patients of all sites together; see `node.audit`."""
    sides: dict[str, list[AuditSlices]] = {"synthetic": [], "trained": [], "held_out": []}
    heights = subject_heights(labelled.factory.config, 2)
    for number, (domain, store) in enumerate(stores.items()):
        drawn = draw_slices(labelled, domain, volumes=AUDIT_VOLUMES, seed=seed)
        found = {
            "synthetic": AuditSlices(
                torch.from_numpy(drawn.images), heights.round().long().repeat(AUDIT_VOLUMES),
                torch.from_numpy(drawn.volume),
            ),
            "trained": real_slices(store, ("train",)),
            "held_out": real_slices(store, ("test",)),
        }  # fmt: skip
        for side, slices in found.items():
            sides[side].append(AuditSlices(slices.images, slices.z_bin, slices.group + 1000 * number))
    pooled = (
        AuditSlices(*(torch.cat([getattr(one, key) for one in sides[side]]) for key in ("images", "z_bin", "group")))
        for side in ("synthetic", "trained", "held_out")
    )
    result = audit(*pooled, seed=seed)
    return {"patients": result.patients, "findings": result.findings,
            **{space: {"attack_area": asdict(one.attack_auc), "copying_ratio": asdict(one.copying_ratio)}
               for space, one in result.privacy.items()}}  # fmt: skip


def train_factory(
    arguments: argparse.Namespace,
    work: Path,
    stores: dict[str, SliceStore],
    variant: Variant,
    config: SegmenterConfig,
) -> TrainedFactory:
    """Phase one."""
    (domain, first), labels = next(iter(stores.items())), {}
    if variant.changes.get("classes"):
        labels[domain] = known_labels(first, CLASSES)
    if variant.pseudo:
        in_full = variant.pseudo == FIRST_GUESS_IN_FULL
        guess = first_guess_in_full(arguments, work, first, config) if in_full else Segmenter.load(work / FIRST_GUESS)
        labels |= {d: own_slices(store, guess).labels for d, store in stores.items() if store is not first}
    settings = factory_config(TASKS[arguments.data], arguments.size, **variant.changes)
    federation = SimulatedFederation(settings, stores, config.seed, labels=labels, device=arguments.device)
    for _ in range(arguments.updates // ROUND):
        federation.run_round(ROUND)
    generator = federation.generator
    height = float(np.median([store.height for store in stores.values()]))
    return TrainedFactory(
        generator=generator, latest=generator.state_dict(), spacing=first.format.spacing, height=height
    )


def factory_config(task: Task, size: int, **changes: Any) -> FactoryConfig:
    """The small palette factory for these sites."""
    shown = {"image_size": size, "channels": WIDTHS[size], "z_bins": task.heights, **task.factory}
    return FactoryConfig.preset("tiny", task.domains, **{**shown, **changes})


def draw(labelled: LabelledFactory, path: Path, *, seed: int) -> None:
    """Write drawn slices: a row for each domain, a column for each latent, with the contours of their labels."""
    generator, rng = labelled.factory.generator, torch.Generator().manual_seed(seed)
    z = torch.randn(COLUMNS, generator.config.latent_dim, generator=rng)
    height = torch.linspace(0, generator.config.z_bins - 1, COLUMNS)
    noise, rows = generator.draw_noise(COLUMNS, rng), []
    with torch.no_grad():
        for domain in range(len(generator.config.domains)):
            made = generator.synthesise(generator.style_at(z, height, torch.full((COLUMNS,), domain)), noise)
            pairs = zip(made.image.numpy(), labelled.labels(made).numpy(), strict=True)
            rows += [
                np.concatenate(row, axis=1)
                for row in zip(*(slice_with_contours(*pair, picture=False) for pair in pairs), strict=True)
            ]
    write_picture(path, np.concatenate(rows))


def step_times(task: Task, size: int, repeats: int = 7) -> dict[str, float]:
    """CPU seconds of one update, of images alone and with labels, interleaved; and their ratio."""
    rng = torch.Generator().manual_seed(0)
    real = torch.rand(16, 1, size, size, generator=rng) * 2 - 1
    labels = torch.randint(CLASSES, (16, size, size), generator=rng)
    z_bin, domain = torch.arange(16) % task.heights, torch.zeros(16, dtype=torch.long)
    trainers, seconds = {}, {"images": [], "labels": []}
    for name, classes in (("images", 0), ("labels", CLASSES)):
        torch.manual_seed(0)
        turn = task.factory.get("turn", 0.0) if classes else 0.0
        factory = Factory(factory_config(task, size, classes=classes, turn=turn))
        trainers[name] = FactoryTrainer(factory, make_optimizers(factory), torch.Generator().manual_seed(0))
        trainers[name].state.updates_done = 1  # without R1, which comes once in sixteen updates
    for _ in range(repeats + 1):
        for name, trainer in trainers.items():
            trainer.state.updates_done = 1
            began = time.process_time()
            trainer.train_step(real, z_bin, domain, labels if name == "labels" else None)
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {**medians, "ratio": round(medians["labels"] / medians["images"], 3)}


if __name__ == "__main__":
    main()
