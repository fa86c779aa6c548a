"""Which method trains the best segmenters when sites have labels of different kinds? On the cardiac sites.

    uv run python benchmarks/segmentation_study.py --folder cardiac --work study --seeds 0 1 2 \\
        --out benchmarks/results/segmentation_study.json

Three federations of `site_a`, `site_b` and `site_c`, simulated in one process with the rounds and weights that real
nodes and the researcher run. *weak*: the experts' scribbles at a, points at b, boxes at c. *mixed*: dense labels at a,
boxes at b, image labels at c. *gaze*: simulated fixations on the whole heart at all sites. Points, boxes, image labels
and fixations are made from the dense labels. Every method makes as many updates at every site; Dice and HD95 on the
folders' test patients, of each site's own model and of the average. Intervals are over seeds and sites. Finished runs
in --work are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from fedfactory.adaptation.federated_method import FederatedMethod, MethodConfig, Report, Visit
from fedfactory.adaptation.gaze import GazeConfig, sets_of_gaze, simulate_fixations
from fedfactory.adaptation.label_sets import SiteSlices, sets_of_boxes, sets_of_labels, sets_of_presence
from fedfactory.adaptation.methods import make_method
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.weak_labels import CONVERTERS
from fedfactory.files import write_json
from fedfactory.node.prepare import prepare
from fedfactory.node.prepare_config import PrepareConfig
from fedfactory.node.site_slices import held_out_scores, site_slices
from fedfactory.node.store import SliceStore
from fedfactory.sources import find_cases
from fedfactory.volumes import Volume, read_volume, write_volume
from measuring import machine

SITES = ("a", "b", "c")
SIZE, SIDE = 32, 160.0  # pixels, and mm around the middle of the scan, where the heart is
WEAK, MIXED = ("scribble", "point", "box"), ("dense", "box", "image")
DENSE, FIRST, GAZE = ("dense",) * 3, ("dense", "none", "none"), ("gaze",) * 3
FEDICRA = {"embedding": 32, "body_updates": 12, "dice_weight": 1.0, "adaptive_from": 4}
FEDMIX = {"agreement": 0.8}
# name: method, options, kinds of labels at the three sites
RUNS: dict[str, dict[str, tuple[str, dict[str, Any], tuple[str, ...]]]] = {
    "weak": {
        "local": ("local", {}, WEAK),
        "fedavg": ("fedavg", {}, WEAK),
        "fedprox": ("fedprox", {}, WEAK),
        "fedbn": ("fedbn", {}, WEAK),
        "fedicra": ("fedicra", FEDICRA, WEAK),
        "fedicra, no energies": ("fedicra", {**FEDICRA, "tree_weight": 0.0, "crf_weight": 0.0}, WEAK),
        "fedicra, no selection": ("fedicra", {**FEDICRA, "selections": 0, "contrast_weight": 0.0}, WEAK),
        "fedicra, no adaptive aggregation": ("fedicra", {**FEDICRA, "adaptive": False}, WEAK),
        "dense labels everywhere": ("fedavg", {}, DENSE),
    },
    "mixed": {
        "fedavg, dense site alone": ("fedavg", {}, FIRST),
        "fedavg, all labels": ("fedavg", {}, MIXED),
        "fedmix": ("fedmix", FEDMIX, MIXED),
        "fedmix, counts alone": ("fedmix", {**FEDMIX, "loss_weight": 0.0}, MIXED),
        "fedmix, no selection": ("fedmix", {**FEDMIX, "agreement": 0.0}, MIXED),
        "fedmix, no refinement": ("fedmix", {**FEDMIX, "refine": False}, MIXED),
    },
    "gaze": {
        "gaze": ("gaze", {}, GAZE),
        "gaze, no consistency": ("gaze", {"consistency": 0.0}, GAZE),
        "fedavg of gaze": ("fedavg", {}, GAZE),
        "dense masks": ("gaze", {}, DENSE),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="site_a, site_b, site_c with train and test")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--updates", type=int, default=15, help="of a site in a round")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--gather", action="store_true", help="run nothing more: report what is finished")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    make_stores(arguments.folder, arguments.work)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            (study, name, seed): pool.submit(kept, arguments, study, name, seed)
            for ablation in (False, True)  # methods of all seeds first
            for seed in arguments.seeds
            for study, runs in RUNS.items()
            for name in runs
            if (", no" in name or "counts" in name) == ablation
        }
        found = {key: job.result() for key, job in jobs.items()}
    found = {key: value for key, value in found.items() if value is not None}
    content: dict[str, Any] = {
        "machine": machine("cpu"),
        "size": SIZE,
        "rounds": arguments.rounds,
        "updates": arguments.updates,
        "runs": [{"study": s, "name": n, "seed": seed, **value} for (s, n, seed), value in found.items()],
        "table": table(found),
    }
    for row in content["table"]:
        print("{study:6s} {name:34s} {which:7s} {dice:.3f} ({low:.3f} to {high:.3f}) {hd95:5.1f} mm".format(**row))
    if arguments.out:
        write_json(arguments.out, content)


def make_stores(folder: Path, work: Path) -> None:
    """By site: dense labels, the whole heart, and at a the experts' scribbles; test patients are the folder's own."""
    for site in SITES:
        if not (work / f"{site}_heart").is_dir():
            for part in ("train", "test"):
                for case in find_cases(folder / f"site_{site}" / part).cases:
                    label = read_volume(case.label, integer=True)
                    out = work / f"{site}_heart" / part / case.name
                    write_volume(out / "image" / "image.nii.gz", read_volume(case.image))
                    write_volume(
                        out / "label" / "heart.nii.gz", Volume((label.data > 0).astype(np.uint8), label.affine)
                    )
            make_store(work / f"{site}_heart", work / f"{site}_heart.store", site)
        for key, kind in (("label", "dense"), ("scribble", "scribble")):
            store = work / f"{site}_{kind}.store"
            if (store / "store.json").is_file() or (kind == "scribble" and site != "a"):
                continue
            make_store(folder / f"site_{site}", store, site, label_key=key, label_kind=kind)


def make_store(folder: Path, store: Path, site: str, **labels: str) -> None:
    common = PrepareConfig(domain=site, size=SIZE, spacing=SIDE / SIZE, z_bins=6, patient_pattern=r"patient\d+")
    unlabelled = 4 if labels.get("label_kind") == "scribble" else None
    prepare(folder / "train", store, replace(common, unlabelled_value=unlabelled, split="train", **labels))
    prepare(folder / "test", store, replace(common, split="test"))


def kept(arguments: argparse.Namespace, study: str, name: str, seed: int) -> dict[str, Any] | None:
    torch.set_num_threads(1)
    words = [study, name, str(seed), str(arguments.rounds), str(arguments.updates)]
    file = arguments.work / ("_".join(words).replace(" ", "-").replace(",", "") + ".json")
    if not file.is_file():
        if arguments.gather:
            return None
        method, options, kinds = RUNS[study][name]
        config = MethodConfig(
            method=method, classes=2 if study == "gaze" else 4, size=SIZE, sites=len(SITES), rounds=arguments.rounds,
            updates=arguments.updates, batch_size=12, width=8, mirror=False, rotation=math.pi, seed=seed,
            options=options,
        )  # fmt: skip
        write_json(file, federation(make_method(config), arguments.work, kinds))
        print(words, json.loads(file.read_text())["mean"], flush=True)
    return json.loads(file.read_text())


def federation(method: FederatedMethod, work: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """All rounds of three sites; scores of every site's own model and of the last average."""
    from fedfactory.researcher.method_average import weighted_mean

    began, seed = time.monotonic(), method.config.seed
    kind = "dense" if method.config.classes > 2 else "heart"
    stores = [SliceStore(work / f"{site}_{kind}.store") for site in SITES]
    data = [slices_of(work, store, kind, seed) for store, kind in zip(stores, kinds, strict=True)]
    models = [method.build() for _ in SITES]
    optimizers = [method.optimizers(model) for model in models]
    states: list[dict[str, Any]] = [{} for _ in SITES]
    stays = method.keeps(models[0])
    shared = {name: value for name, value in models[0].state_dict().items() if name not in stays}
    history = []
    for number in range(1, method.config.rounds + 1):
        reports = []
        for site, model in enumerate(models):
            model.load_state_dict(shared, strict=False)
            visit = Visit(model, optimizers[site], data[site], site, number, states[site])
            reports.append(method.train_round(visit))
        weights = dict(enumerate(method.shares(reports)))
        sent = {
            site: {name: value.detach().clone() for name, value in model.state_dict().items() if name not in stays}
            for site, model in enumerate(models)
        }
        shared = weighted_mean(sent, weights, shared)
        history.append([{**dictionary(report), "share": weights[n]} for n, report in enumerate(reports)])
    scores = {"own": [], "average": []}
    for site, model in enumerate(models):
        for which in scores:
            if which == "average":
                model.load_state_dict(shared, strict=False)
            network = method.segmenter(copy.deepcopy(model), site)
            segmenter = Segmenter(
                network, stores[site].format, {"classes": method.config.classes, "config": {"network": "federated"}}
            )
            scores[which].append(held_out_scores(stores[site], segmenter))
    mean = {which: round(float(np.mean([row["dice"] for row in rows])), 4) for which, rows in scores.items()}
    return {"mean": mean, "scores": scores, "history": history, "seconds": round(time.monotonic() - began)}


def dictionary(report: Report) -> dict[str, float | None]:
    return {key: value if math.isfinite(value) else None for key, value in report.to_dict().items()}


def slices_of(work: Path, store: SliceStore, kind: str, seed: int) -> SiteSlices:
    """A site's training slices with labels of a kind, made from the dense ones where nobody drew them."""
    if kind == "scribble":
        return site_slices(SliceStore(work / f"{store.domain}_scribble.store"), 4)
    dense = site_slices(store, store.classes)
    if kind == "dense":
        return dense
    labels = np.concatenate([store.labels[case.span] for case in store.cases if case.split == "train"])
    if kind == "image":
        presence = np.stack([(labels == value).any(axis=(1, 2)) for value in range(4)], axis=1)
        sets = sets_of_presence(presence, SIZE, 4)
    elif kind == "none":
        sets = np.zeros_like(dense.sets)
    elif kind == "gaze":
        rng, config = np.random.default_rng(seed), GazeConfig(stride=2)
        pairs = zip(labels, dense.images, strict=True)
        sets = np.stack([sets_of_gaze(simulate_fixations(one > 0, rng), image, config) for one, image in pairs])
    else:
        rng = np.random.default_rng(seed)
        weak = np.stack([CONVERTERS[kind](one, rng) for one in labels])
        sets = np.stack([sets_of_boxes(one, 4) for one in weak]) if kind == "box" else sets_of_labels(weak, 4)
    return SiteSlices(dense.images, sets, np.repeat(kind, len(labels)), store.classes)


def table(found: dict[tuple[str, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Per run, of the site's own models and of the average: mean Dice with its 95 % interval over seeds and sites."""
    rows = []
    for study, runs in RUNS.items():
        for name in runs:
            values = [value for (s, n, _), value in found.items() if (s, n) == (study, name)]
            for which in ("own", "average"):
                cells = [row for value in values for row in value["scores"][which]]
                if not cells:
                    continue
                dice = np.array([row["dice"] for row in cells])
                draws = np.random.default_rng(0).choice(dice, (2000, len(dice))).mean(axis=1)
                low, high = np.percentile(draws, (2.5, 97.5))
                numbers = {
                    "dice": dice.mean(),
                    "low": low,
                    "high": high,
                    "hd95": np.nanmean([c["hd95"] for c in cells]),
                }
                by_site = [float(np.mean(dice[number :: len(SITES)])) for number in range(len(SITES))]
                rows.append(
                    {"study": study, "name": name, "which": which, "seeds": len(values)}
                    | {key: round(float(value), 4) for key, value in numbers.items()}
                    | {"by_site": [round(value, 4) for value in by_site]}
                )
    return rows


if __name__ == "__main__":
    main()
