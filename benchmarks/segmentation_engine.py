"""The segmentation engine on real MRI: oracle, first guess from the labels of one site, adaptation, and what each part
brings.

    uv run python benchmarks/segmentation_engine.py --cardiac FOLDER --hippocampus FOLDER --work study \\
        --out benchmarks/results/segmentation_engine.json

`--cardiac` is a folder with site_a, site_b (inverted contrast, bias field, noise) and site_c (gamma, blur, noise), each
with train and test cases in Fed-BioMed's layout; `--hippocampus` an nnU-Net raw data set, from which three sites are
made in the same way. Site a has labels; those of b and c are used by the oracle, and for the scores. Every run is
finished once: its row is a JSON file in the work folder, and a second call continues. `--only` takes names of runs.
`--processes` runs go on side by side, one thread each; a run of 3,500 updates takes six to nine minutes of a CPU core.

All test cases are scored on their own grid: mean over cases for each structure, then over structures. Intervals of the
ratios come from a bootstrap over patients, paired.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from fedfactory.adaptation.adapt import pseudo_label
from fedfactory.adaptation.engine.segmenter_config import ContrastMix, SegmenterConfig, first_guess_config
from fedfactory.adaptation.evaluation.scores import Score, score_case
from fedfactory.adaptation.evaluation.summary import class_means, mean_over_classes
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.segmenter_training import SegmenterData, train_segmenters
from fedfactory.common.files import write_json
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from hippocampus_sites import make_hippocampus_sites
from measuring import machine

UPDATES = 3500
FIVE_MINUTES = 4500  # updates on windows of 64 px in five minutes of two cores that do nothing else
# Shares and variation of the feasibility study: a fifth of the windows through random networks, strong appearance.
RECIPE: dict[str, Any] = {"contrast": ContrastMix(curves=0.45), "appearance": "strong"}
CARDIAC = PrepareConfig(domain="a", size=144, spacing=2.5, z_bins=6, crop="none", patient_pattern=r"patient\d+")
HIPPOCAMPUS = PrepareConfig(domain="a", size=64, spacing=1.0, z_bins=6, crop="none", plane="sagittal")
GUESSES: dict[str, dict[str, Any]] = {"first guess": {}, "recipe's first guess": RECIPE}
THREE_POINT_COPIES = 20  # of every slice, each with its own curve


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training and its scores.

    Attributes:
        name: of the method.
        task: "cardiac" or "hippocampus".
        seed: of everything random.
        train: from the stores of the sites, the segmenter to begin with and the device to the segmenter.
        sites: where it is scored.
        after: key of a run whose segmenter is trained further; None begins anew.
    """

    name: str
    task: str
    seed: int
    train: Callable[[Job, dict[str, SliceStore], Segmenter | None, str], Segmenter]
    sites: str
    after: str | None = None

    @property
    def key(self) -> str:
        """Name of the run's files."""
        return f"{self.task}_{self.name}_{self.seed}"


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Trains on a site's labels.

    Attributes:
        site: whose labels.
        changes: settings that differ from those of an oracle.
        first_guess: whether contrasts are random.
    """

    site: str
    changes: dict[str, Any]
    first_guess: bool = False

    def __call__(self, job: Job, stores: dict[str, SliceStore], before: Segmenter | None, device: str) -> Segmenter:
        config = SegmenterConfig(**{"updates": UPDATES, "seed": job.seed, "precision": "float32"})
        config = replace(first_guess_config(config) if self.first_guess else config, **self.changes)
        data = training_slices(stores[self.site])
        if job.name == "three-point curves":
            data = with_three_point_curves(data, seed=job.seed)
        given = SegmenterData(labelled=data)
        return train_segmenters(given, stores[self.site].format, config, title=job.key, device=device)[0]


@dataclass(frozen=True, kw_only=True)
class SelfTraining:
    """Trains a first guess further on a site's own slices with its own labels.

    Attributes:
        site: whose images.
        rounds: how often the labels are made anew.
        updates: of all rounds together.
    """

    site: str
    rounds: int = 1
    updates: int = UPDATES

    def __call__(self, job: Job, stores: dict[str, SliceStore], before: Segmenter | None, device: str) -> Segmenter:
        assert before is not None
        store, segmenter = stores[self.site], before
        images = training_slices(store)
        config = replace(
            SegmenterConfig.from_dict(before.card.settings), contrast=None, updates=self.updates // self.rounds
        )
        for _ in range(self.rounds):
            own = pseudo_label(images.images, segmenter.to(device), images.volume)
            data = SegmenterData(labelled=own, start=segmenter)
            (segmenter,) = train_segmenters(data, store.format, config, title=job.key, device=device)
        return segmenter


def jobs(seeds: list[int]) -> list[Job]:
    """All runs, in the order in which they are started."""
    found = []
    for task, targets in (("cardiac", "bc"), ("hippocampus", "b")):
        for seed in seeds:
            found += basic_jobs(task, targets, seed)
        for seed in seeds:
            found += longer_jobs(task, targets, seed)
    five_minutes = Supervised(site="b", changes={"updates": FIVE_MINUTES})
    for seed in seeds:
        found.append(
            Job(name="oracle b, five minutes", task="hippocampus", seed=seed, train=five_minutes, sites="b"),
        )
    return found + ablation(seeds[0])


def basic_jobs(task: str, targets: str, seed: int) -> list[Job]:
    """First guesses and oracles of equally many updates."""
    guess = Supervised(site="a", changes={}, first_guess=True)
    recipe = Supervised(site="a", changes=RECIPE, first_guess=True)
    return [
        Job(name="first guess", task=task, seed=seed, train=guess, sites="abc"),
        Job(name="recipe's first guess", task=task, seed=seed, train=recipe, sites="abc"),
        *(
            Job(name=f"oracle {site}", task=task, seed=seed, train=Supervised(site=site, changes={}), sites=site)
            for site in targets
        ),
    ]


def longer_jobs(task: str, targets: str, seed: int) -> list[Job]:
    """Twice as many updates in all: spent on the first guess, on self-training, or on the oracle."""
    twice = {"updates": 2 * UPDATES}
    found = [
        Job(
            name=f"{name}, 7000",
            task=task,
            seed=seed,
            train=Supervised(site="a", changes={**twice, **changes}, first_guess=True),
            sites="abc",
        )
        for name, changes in GUESSES.items()
    ]
    for site in targets:
        common: dict[str, Any] = {"task": task, "seed": seed, "sites": site}
        found.append(Job(name=f"oracle {site}, 7000", train=Supervised(site=site, changes=twice), **common))
        for name in GUESSES:
            common["after"] = f"{task}_{name}_{seed}"
            found += [
                Job(name=f"{name}, self-training {site}", train=SelfTraining(site=site), **common),
                Job(name=f"{name}, self-training {site}, 2 rounds", train=SelfTraining(site=site, rounds=2), **common),
            ]
    return found


def ablation(seed: int) -> list[Job]:
    """The recipe's first guess with one part of the augmentation removed or changed."""
    strong = {"appearance": "strong"}
    parts: dict[str, dict[str, Any]] = {
        "no random contrast": {"contrast": None, "appearance": "mild"},
        "no random contrast, strong appearance": {"contrast": None, **strong},
        "three-point curves": {"contrast": None, **strong},
        "random networks alone": {"contrast": ContrastMix(curves=0.0), **strong},
        "curves alone": {"contrast": ContrastMix(curves=0.65), **strong},
        "without inversion": {"contrast": ContrastMix(curves=0.45, inverted=0.0), **strong},
        "mild appearance": {**RECIPE, "appearance": "mild"},
        "without rotation and mirroring": {**RECIPE, "rotation": 0.15, "mirror": False},
    }
    return [
        Job(
            name=name,
            task="cardiac",
            seed=seed,
            train=Supervised(site="a", changes=changes, first_guess=True),
            sites="bc",
        )
        for name, changes in parts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cardiac", type=Path, required=True, help="site_a, site_b, site_c with train and test")
    parser.add_argument("--hippocampus", type=Path, required=True, help="imagesTr and labelsTr")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="runs whose names begin like this")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path, help="JSON file; what it holds of runs that are not in --work stays")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    make_stores(arguments)
    wanted = [job for job in jobs(arguments.seeds) if not arguments.only or job.key.startswith(tuple(arguments.only))]
    with ProcessPoolExecutor(arguments.processes, mp_context=get_context("spawn")) as pool:
        waiting, running = [job for job in wanted if not _row(arguments.work, job.key)], {}
        while waiting or running:
            for job in list(waiting):
                ready = job.after is None or _row(arguments.work, job.after)
                if ready and len(running) < arguments.processes:
                    running[pool.submit(run, arguments.work, job, arguments.device)] = job
                    waiting.remove(job)
            if not running:
                print("these need other runs first:", *(job.key for job in waiting), sep="\n  ")
                break
            done = next(as_completed(running))
            print(
                running.pop(done).key, {site: row["dice"] for site, row in done.result()["sites"].items()}, flush=True
            )
    if arguments.out:
        known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else None
        write_json(arguments.out, with_known(summary(arguments.work, arguments.seeds), known))


def run(work: Path, job: Job, device: str) -> dict[str, Any]:
    """Train, score, and write the row of a run. The segmenter's file is written first: later runs begin with it."""
    torch.set_num_threads(1)
    stores = {site: SliceStore(work / f"{job.task}_{site}.store") for site in "abc"}
    before = Segmenter.load(work / f"{job.after}.safetensors").to(device) if job.after else None
    began, cpu = time.monotonic(), time.process_time()
    segmenter = job.train(job, stores, before, device)
    row: dict[str, Any] = {
        "key": job.key,
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "device": machine(device)["device"],
        "plan": segmenter.card.plan.to_dict() if segmenter.card.plan else None,
        "parameters": sum(values.numel() for values in segmenter.network.parameters()),
        "sites": {},
    }
    segmenter.save(work / f"{job.key}.safetensors")
    segmenter.to(device)
    for site in job.sites:
        store = stores[site]
        scores = {views: case_scores(store, segmenter, views=views) for views in (1, len(segmenter.card.views))}
        best = scores[len(segmenter.card.views)]
        images = training_slices(store)
        row["sites"][site] = {
            "dice": round(mean_over_classes(best, "dice"), 4),
            "dice_one_view": round(mean_over_classes(scores[1], "dice"), 4),
            "hd95": round(mean_over_classes(best, "hd95"), 2),
            "by_class": {label: round(value, 4) for label, value in class_means(best, "dice").items()},
            "agreement": round(
                segmenter.agreement(torch.from_numpy(images.images.astype(np.float32)), images.volume), 4
            ),
            "scores": [asdict(score) for score in best],
        }
    write_json(work / f"{job.key}.row.json", row)  # the segmenter's card has the name without row
    return row


def case_scores(store: SliceStore, segmenter: Segmenter, *, views: int) -> list[Score]:
    """Scores of all structures of the store's test cases, on the images' own grid."""
    found = []
    for case in store.cases:
        if not case.has_reference:
            continue
        images = torch.from_numpy(store.images[case.span].astype(np.float32))
        reference = store.reference(case)
        labels = store.grid(case).labels_to_volume(segmenter.probabilities(images, views=views).numpy())
        ours = Volume(segmenter.tidied(labels), reference.affine)
        found += score_case(case.name, ours, reference, patient=case.patient, classes=range(1, store.classes))
    return found


def training_slices(store: SliceStore) -> LabelledSlices:
    """The labelled training slices of a store."""
    chosen = store.labelled_slices("train")
    return LabelledSlices(store.images[chosen], store.labels[chosen], store.classes, store.volume_of_slices()[chosen])


def with_three_point_curves(data: LabelledSlices, *, seed: int) -> LabelledSlices:
    """Copies of all slices whose grey levels go through random curves of three points, the darkest of which stays.

    This was the whole augmentation of contrast before the engine.
    """
    rng, images = np.random.default_rng(seed), []
    for _ in range(THREE_POINT_COPIES):
        for image in data.images:
            values = np.array([-1.0, *rng.uniform(-0.7, 1, 2)])
            images.append(np.interp(image, [-1.0, 0.0, 1.0], values).astype(np.float16))
    volumes = data.volume.max() + 1
    volume = np.concatenate([data.volume + copy * volumes for copy in range(THREE_POINT_COPIES)])
    return LabelledSlices(np.stack(images), np.tile(data.labels, (THREE_POINT_COPIES, 1, 1)), data.classes, volume)


def make_stores(arguments: argparse.Namespace) -> None:
    """Prepare the sites of both tasks: training cases first, then the test cases."""
    folders = {"cardiac": (arguments.cardiac, CARDIAC)}
    if arguments.hippocampus:
        sites = arguments.work / "hippocampus"
        if not sites.exists():
            make_hippocampus_sites(arguments.hippocampus, sites)
        folders["hippocampus"] = (sites, HIPPOCAMPUS)
    for task, (folder, config) in folders.items():
        for site in "abc":
            out = arguments.work / f"{task}_{site}.store"
            if not out.exists():
                for split in ("train", "test"):
                    prepare(folder / f"site_{site}" / split, out, replace(config, domain=site, split=split))


def summary(work: Path, seeds: list[int]) -> dict[str, Any]:
    """All finished runs, and the shares of the oracle with their intervals."""
    wanted = jobs(seeds)
    rows = {job.key: row for job in wanted if (row := _row(work, job.key))}
    methods: dict[str, dict[str, Any]] = {}
    for job in wanted:
        for site, scores in rows.get(job.key, {"sites": {}})["sites"].items():
            entry = methods.setdefault(f"{job.task} {site}", {}).setdefault(job.name, {"dice": {}})
            entry["dice"][job.seed] = scores["dice"]
    for place, entries in methods.items():
        task, site = place.split()
        for name, entry in entries.items():
            entry["mean"] = round(float(np.mean(list(entry["dice"].values()))), 4)
            pairs = [
                (rows[f"{task}_{name}_{seed}"]["sites"][site]["scores"], oracle["sites"][site]["scores"])
                for seed in entry["dice"]
                if (oracle := rows.get(f"{task}_oracle {site}_{seed}"))
            ]
            if pairs:
                entry["share_of_oracle"], entry["interval"] = ratio(pairs)
    slim = {
        key: {
            **row,
            "sites": {
                site: {k: v for k, v in scores.items() if k != "scores"} for site, scores in row["sites"].items()
            },
        }
        for key, row in rows.items()
    }
    return {"machine": machine("cpu"), "seeds": seeds, "methods": methods, "runs": slim}


def with_known(content: dict[str, Any], known: dict[str, Any] | None) -> dict[str, Any]:
    """A summary and, of runs that it does not have, what an earlier one holds."""
    if known is None:
        return content
    places = [*known["methods"], *(place for place in content["methods"] if place not in known["methods"])]
    methods = {place: known["methods"].get(place, {}) | content["methods"].get(place, {}) for place in places}
    return {**content, "methods": methods, "runs": known["runs"] | content["runs"]}


def ratio(pairs: list[tuple[list[dict], list[dict]]]) -> tuple[float, tuple[float, float]]:
    """Mean Dice over that of the oracle, of all seeds, with the 95 % interval of a bootstrap over patients."""
    patients = sorted({score["patient"] for ours, _ in pairs for score in ours})

    def table(scores: list[dict]) -> np.ndarray:
        """(patients,) mean Dice."""
        return np.array([np.nanmean([s["dice"] for s in scores if s["patient"] == patient]) for patient in patients])

    ours, oracle = (np.mean([table(pair[side]) for pair in pairs], axis=0) for side in (0, 1))
    drawn = np.random.default_rng(0).integers(len(patients), size=(2000, len(patients)))
    values = ours[drawn].mean(1) / oracle[drawn].mean(1)
    low, high = np.quantile(values, [0.025, 0.975])
    return round(float(ours.mean() / oracle.mean()), 4), (round(float(low), 4), round(float(high), 4))


def _row(work: Path, key: str) -> dict[str, Any] | None:
    path = work / f"{key}.row.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


if __name__ == "__main__":
    main()
