"""Comparison of methods for training segmenters when the sites have labels of different kinds, on the cardiac sites.

    uv run python benchmarks/segmentation_study.py --folder cardiac --work study --seeds 0 1 2 \\
        --out benchmarks/results/segmentation_study.json

Three federations of `site_a`, `site_b` and `site_c` are simulated in a single process, with the training rounds and the
aggregation of the package. *weak*: the experts' scribbles at a, points at b, boxes at c. *mixed*: dense labels at a,
boxes at b, image labels at c. *gaze*: simulated fixations on the whole heart at all sites. Points, boxes, image labels
and fixations are made from the dense labels. All methods make equally many updates at every site. Scores are Dice and
HD95 on the test patients of the folder, of each site's own model and of the average, with intervals over seeds and
sites. Finished runs in --work are not repeated. Three seeds take about 130 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from fedfactory.adaptation.labels.candidate_labels import (
    SiteSlices,
    candidates_from_boxes,
    candidates_from_labels,
    candidates_from_presence,
)
from fedfactory.adaptation.labels.fixations import GazeConfig, candidates_from_fixations, simulate_fixations
from fedfactory.adaptation.labels.weak_labels import CONVERTERS
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.common.files import write_json
from fedfactory.node.site_data.training_slices import site_slices
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine
from simulated_methods import (
    SITES,
    SIZE,
    SimulatedSite,
    cached_result,
    make_cardiac_stores,
    result_file,
    run_federation,
    study_parser,
    table,
)

WEAK, MIXED = ("scribble", "point", "box"), ("dense", "box", "image")
DENSE, FIRST_SITE, GAZE, WIDE_GAZE = ("dense",) * 3, ("dense", "none", "none"), ("gaze",) * 3, ("wide gaze",) * 3
# Blur of the fixations: as published, or such that the share of target pixels is that of the hearts (19 %).
GAZE_CONFIGS = {"gaze": GazeConfig(stride=2), "wide gaze": GazeConfig(sigma=0.16, stride=2)}
FEDICRA = {"embedding": 32, "dice_weight": 1.0, "adaptive_from": 4}
FEDMIX = {"agreement": 0.8}
RATES = {"fedicra": 3e-3}  # of 1e-3, 3e-3 and the published 1e-2, which is meant for a hundred times as many updates
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
        "fedavg, dense site alone": ("fedavg", {}, FIRST_SITE),
        "fedavg, all labels": ("fedavg", {}, MIXED),
        "fedmix": ("fedmix", FEDMIX, MIXED),
        "fedmix, counts alone": ("fedmix", {**FEDMIX, "loss_weight": 0.0}, MIXED),
        "fedmix, no selection": ("fedmix", {**FEDMIX, "agreement": 0.0}, MIXED),
        "fedmix, no refinement": ("fedmix", {**FEDMIX, "refine": False}, MIXED),
    },
    "gaze": {
        "gaze": ("gaze", {}, GAZE),
        "gaze, blur by known size": ("gaze", {}, WIDE_GAZE),
        "gaze, no consistency": ("gaze", {"consistency": 0.0}, GAZE),
        "fedavg of gaze": ("fedavg", {}, GAZE),
        "dense masks": ("gaze", {}, DENSE),
    },
}


def main() -> None:
    parser = study_parser(__doc__)
    arguments = parser.parse_args()
    make_cardiac_stores(arguments.folder, arguments.work)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            (study, name, seed): pool.submit(finished_run, arguments, study, name, seed=seed)
            for ablation in (False, True)  # methods of all seeds first
            for seed in arguments.seeds
            for study, runs in RUNS.items()
            for name in runs
            if (", no" in name or "counts" in name) == ablation
        }
        results = {key: job.result() for key, job in jobs.items()}
    results = {key: value for key, value in results.items() if value is not None}
    order = [(study, name) for study, runs in RUNS.items() for name in runs]
    results = dict(sorted(results.items(), key=lambda item: (order.index(item[0][:2]), item[0][2])))
    content: dict[str, Any] = {
        "machine": machine("cpu"),
        "size": SIZE,
        "rounds": arguments.rounds,
        "updates": arguments.updates,
        "runs": [
            {"study": s, "name": n, "seed": seed, **{key: value[key] for key in ("mean", "scores", "seconds")}}
            for (s, n, seed), value in results.items()
        ],
        "table": table(results, len(SITES)),
    }
    for row in content["table"]:
        print("{study:6s} {name:34s} {which:7s} {dice:.3f} ({low:.3f} to {high:.3f}) {by_site}".format(**row))
    if arguments.out:
        write_json(arguments.out, content)


def finished_run(arguments: argparse.Namespace, study: str, name: str, *, seed: int) -> dict[str, Any] | None:
    """The result of a run, from its file if it is finished; None if it is not and `--gather` is given."""
    method, options, kinds = RUNS[study][name]
    config = MethodConfig(
        method=method, classes=2 if study == "gaze" else 4, size=SIZE, sites=len(SITES), rounds=arguments.rounds,
        updates=arguments.updates, batch_size=12, width=8, mirror=False, rotation=math.pi, seed=seed,
        options=dict(options), learning_rate=RATES.get(method),
    )  # fmt: skip
    return cached_result(
        result_file(arguments, study, name, seed=seed), partial(run, config, arguments.work, kinds), arguments.gather
    )


def run(config: MethodConfig, work: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """One federation; kinds: kind of labels of each site."""
    kind = "dense" if config.classes > 2 else "heart"
    stores = [SliceStore(work / f"{site}_{kind}.store") for site in SITES]
    sites = [
        SimulatedSite(slices_of(work, store, kind, seed=config.seed), {"": store})
        for store, kind in zip(stores, kinds, strict=True)
    ]
    return run_federation(make_method(config), sites)


def slices_of(work: Path, store: SliceStore, kind: str, *, seed: int) -> SiteSlices:
    """A site's training slices with labels of one kind: experts' scribbles, or labels made from the dense labels."""
    if kind == "scribble":
        return site_slices(SliceStore(work / f"{store.domain}_scribble.store"), 4)
    dense = site_slices(store, store.classes)
    if kind == "dense":
        return dense
    labels = np.concatenate([store.labels[case.span] for case in store.cases if case.split == "train"])
    if kind == "image":
        presence = np.stack([(labels == value).any(axis=(1, 2)) for value in range(4)], axis=1)
        candidates = candidates_from_presence(presence, SIZE, 4)
    elif kind == "none":
        candidates = np.zeros_like(dense.candidates)
    elif kind in GAZE_CONFIGS:
        rng, config = np.random.default_rng(seed), GAZE_CONFIGS[kind]
        pairs = zip(labels, dense.images, strict=True)
        candidates = np.stack(
            [candidates_from_fixations(simulate_fixations(label > 0, rng), image, config) for label, image in pairs]
        )
        kind = "gaze"
    else:
        rng = np.random.default_rng(seed)
        weak = np.stack([CONVERTERS[kind](label, rng) for label in labels])
        candidates = (
            np.stack([candidates_from_boxes(boxes, 4) for boxes in weak])
            if kind == "box"
            else candidates_from_labels(weak, 4)
        )
    return SiteSlices(dense.images, candidates, np.repeat(kind, len(labels)), store.classes)


if __name__ == "__main__":
    main()
