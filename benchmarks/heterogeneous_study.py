"""HSSF and CMC on the cardiac sites: do sites with different networks, or modalities, gain by training together?

    uv run python benchmarks/heterogeneous_study.py --folder cardiac --work study --seeds 0 1 2 \\
        --out benchmarks/results/heterogeneous_study.json

The federations are simulated in a single process, with the training rounds and the aggregation of the package.

*hssf*: no site has labels. Half of the training patients of `site_a` are the public slices. Sites a (the other half), b
and c train a UNet, a DynUNet and a SegResNet. It is compared with training on the public slices and the site's own
slices without exchange (*local*), with training on the public slices alone, and with equal networks whose weights are
averaged (LSSL).

*cmc*: there are two modalities, the contrast of `site_a` and its inversion (inside the body, gamma 0.7, as `site_b` was
made). Site 1 has both modalities of the patients of a; the second is rotated by 20 degrees and shifted by 15 mm, so
that the pairs are misaligned. Site 2 has the inverted scans of b, site 3 the scans of c. Three of ten patients per site
have labels. It is compared with semi-supervised training of each modality by itself, in two networks that together are
as large, with CMC without the consistency
of labels, and with CMC without each of its terms.

Scores are Dice on the test patients of the folder, with intervals over seeds and sites. Finished runs in --work are not
repeated. Three seeds take about 130 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from fedfactory.adaptation.labels.candidate_labels import UNKNOWN, SiteSlices
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.network_names import ARCHITECTURES
from fedfactory.common.files import write_json
from fedfactory.imaging.cases import find_cases
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.site_data.training_slices import site_slices
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine
from scipy import ndimage
from simulated_methods import (
    SITES,
    SIZE,
    SimulatedSite,
    cached_result,
    make_cardiac_stores,
    make_store,
    result_file,
    run_federation,
    study_parser,
    table,
)

ROTATION, SHIFT = 20.0, 10.0  # degrees, pixels of 1.5 mm
# Of the first level. A network for both modalities at the third width has 1.05 million weights, and two networks at the
# second 1.18 million together, so that what two modalities gain is not a larger network.
WIDTHS = {"hssf": 8, "cmc alone": 12, "cmc": 16}
LABELLED_PATIENTS = 3  # of each site, in the study of modalities
HSSF = {"public_epochs": 3}
# name: options of the method, names of the modalities that take part
RUNS: dict[str, dict[str, tuple[dict[str, Any], tuple[str, ...]]]] = {
    "hssf": {
        "public slices alone": ({**HSSF, "exchange": False, "unlabelled": 0.0}, ()),
        "local": ({**HSSF, "exchange": False}, ()),
        "averaged weights": (HSSF, ()),
        "hssf": (HSSF, ()),
        "hssf, pixel accuracy": ({**HSSF, "grade": "pixel_accuracy", "min_teacher_grade": 0.75}, ()),
        "hssf, no self-training": ({**HSSF, "unlabelled": 0.0}, ()),
    },
    "cmc": {
        "cine alone": ({}, ("cine",)),
        "inverted alone": ({}, ("inverted",)),
        "no consistency": ({"start": 1.0}, ("cine", "inverted")),
        "cmc": ({}, ("cine", "inverted")),
        "cmc, no channels": ({"channel_weight": 0.0}, ("cine", "inverted")),
        "cmc, no classes": ({"agreement": "off"}, ("cine", "inverted")),
    },
}


def main() -> None:
    parser = study_parser(__doc__)
    parser.add_argument("--studies", nargs="+", default=list(RUNS), choices=list(RUNS))
    arguments = parser.parse_args()
    make_cardiac_stores(arguments.folder, arguments.work)
    make_inverted_store(arguments.folder, arguments.work)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            (study, name, seed): pool.submit(finished_run, arguments, study, name, seed=seed)
            for seed in arguments.seeds
            for study in arguments.studies
            for name in RUNS[study]
        }
        results = {key: job.result() for key, job in jobs.items()}
    results = {key: value for key, value in results.items() if value is not None}
    content = {
        "machine": machine("cpu"),
        "size": SIZE,
        "rounds": arguments.rounds,
        "updates": arguments.updates,
        "runs": [
            {"study": s, "name": n, "seed": seed, **{key: value[key] for key in ("mean", "scores", "seconds")}}
            for (s, n, seed), value in results.items()
        ],
        "table": [row for study in RUNS for row in rows_of(study, results)],
    }
    for row in content["table"]:
        print("{study:5s} {name:24s} {which:7s} {dice:.3f} ({low:.3f} to {high:.3f}) {by_site}".format(**row))
    if arguments.out:
        write_json(arguments.out, content)


def rows_of(study: str, results: dict[tuple[str, str, int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `table`; the runs with a single modality each are merged into one row of their own."""
    own = {key: value for key, value in results.items() if key[0] == study}
    alone = [name for name in RUNS[study] if name.endswith(" alone") and study == "cmc"]
    rows = table({key: value for key, value in own.items() if key[1] not in alone}, len(SITES))
    for seed in sorted({seed for _, name, seed in own if name in alone}):
        if all((study, name, seed) in own for name in alone):
            own[study, "each modality alone", seed] = merged([own[study, name, seed] for name in alone])
    return table({k: v for k, v in own.items() if k[1] == "each modality alone"}, len(SITES)) + rows if own else []


def merged(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Merge runs with a single modality each: a site's score is the mean over the runs in which it takes part."""
    scores: dict[str, list[dict[str, Any]]] = {}
    for which in runs[0]["scores"]:
        scores[which] = []
        for index in range(len(SITES)):
            cells = [run["scores"][which][run["sites"].index(index)] for run in runs if index in run["sites"]]
            values = {key: [cell[key] for cell in cells if cell[key] is not None] for key in ("dice", "hd95")}
            scores[which].append({key: float(np.mean(value)) if value else None for key, value in values.items()})
    return {"scores": scores, "bytes_per_round": sum(run["bytes_per_round"] for run in runs)}


def finished_run(arguments: argparse.Namespace, study: str, name: str, *, seed: int) -> dict[str, Any] | None:
    """The result of a run, from its file if it is finished; None if it is not and `--gather` is given."""
    options, modalities = RUNS[study][name]
    config = MethodConfig(
        method="lssl" if name == "averaged weights" else study, classes=4, size=SIZE, sites=len(SITES),
        rounds=arguments.rounds, updates=arguments.updates, batch_size=12,
        width=WIDTHS["cmc alone" if len(modalities) == 1 else study], mirror=False, rotation=math.pi, seed=seed,
        options=dict(options),
    )  # fmt: skip
    run = partial(run_hssf, config, arguments.work) if study == "hssf" else partial(
        run_cmc, config, arguments.work, modalities
    )  # fmt: skip
    return cached_result(result_file(arguments, study, name, seed=seed), run, arguments.gather)


def run_hssf(config: MethodConfig, work: Path) -> dict[str, Any]:
    """One federation of sites with different networks and a shared set of public slices."""
    stores = [SliceStore(work / f"{site}_dense.store") for site in SITES]
    full = [site_slices(store, 4) for store in stores]
    patients = patient_of(stores[0])
    half = np.isin(patients, np.unique(patients)[::2])
    public = part(full[0], half)
    own = [part(full[0], ~half), *full[1:]]
    method = make_method(replace(config, options={**config.options, "public_slices": len(public)}))
    method.public = public
    return run_federation(
        method,
        [
            SimulatedSite(without_labels(data, np.zeros(len(data), bool)), {"": store}, network, public)
            for data, store, network in zip(own, stores, ARCHITECTURES, strict=True)
        ],
    )


def run_cmc(config: MethodConfig, work: Path, names: tuple[str, ...]) -> dict[str, Any]:
    """One federation of sites with different modalities, of which those in `names` take part."""
    a, b, c = (SliceStore(work / f"{site}_dense.store") for site in SITES)
    inverted = SliceStore(work / "a_inverted.store")
    holdings = [{"cine": a, "inverted": inverted}, {"inverted": b}, {"cine": c}]
    config = replace(config, options={**config.options, "modalities": names})
    sites, indices = [], []
    for index, holding in enumerate(holdings):
        stores = {name: store for name, store in holding.items() if name in names}
        if not stores:
            continue
        modalities = {}
        for name, store in stores.items():
            patients = patient_of(store)
            rng = np.random.default_rng((config.seed, index))
            chosen = rng.choice(np.unique(patients), LABELLED_PATIENTS, replace=False)
            modalities[name] = without_labels(site_slices(store, 4), np.isin(patients, chosen))
        first = next(iter(modalities.values()))
        sites.append(SimulatedSite(first, stores, modalities=modalities))
        indices.append(index)
    return {**run_federation(make_method(config), sites), "sites": indices}


def patient_of(store: SliceStore) -> np.ndarray:
    """Patient of every training slice, (N,)."""
    return np.concatenate([np.repeat(case.patient, case.count) for case in store.cases if case.split == "train"])


def part(data: SiteSlices, chosen: np.ndarray) -> SiteSlices:
    """The slices for which `chosen` (N,) is true."""
    return SiteSlices(data.images[chosen], data.candidates[chosen], data.kinds[chosen], data.classes)


def without_labels(data: SiteSlices, labelled: np.ndarray) -> SiteSlices:
    """The same slices; only those for which `labelled` (N,) is true keep their labels."""
    candidates = np.where(labelled[:, None, None], data.candidates, np.array(UNKNOWN, data.candidates.dtype))
    return SiteSlices(data.images, candidates, np.where(labelled, data.kinds, "none"), data.classes)


def make_inverted_store(folder: Path, work: Path) -> None:
    """Make a store of the patients of site a with inverted contrast, rotated and shifted."""
    source = work / "a_inverted"
    if not (work / "a_inverted.store" / "store.json").is_file():
        for name in ("train", "test"):
            for case in find_cases(folder / "site_a" / name).cases:
                image = read_volume(case.channels[0])
                label = read_volume(case.labels[0].path, integer=True)
                grey = image.data / max(float(image.data.max()), 1e-6)
                body = grey > 0.05
                out = np.where(body, (1 - grey).clip(0) ** 0.7, grey).astype(np.float32) * 1000
                write_volume(source / name / case.name / "image" / "image.nii.gz", moved(out, image, order=1))
                write_volume(source / name / case.name / "label" / "label.nii.gz", moved(label.data, label, order=0))
    make_store(source, work / "a_inverted.store", "a")


def moved(data: np.ndarray, like: Volume, *, order: int) -> Volume:
    """Rotate and shift a volume (X, Y, Z) in its plane; `like` gives the affine, `order` the order of the spline."""
    turned = ndimage.rotate(data, ROTATION, axes=(0, 1), reshape=False, order=order, mode="constant")
    return Volume(ndimage.shift(turned, (SHIFT, 0, 0), order=order).astype(data.dtype), like.affine)


if __name__ == "__main__":
    main()
