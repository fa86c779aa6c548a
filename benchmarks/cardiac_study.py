"""Phase two on the cardiac sites: Dice and HD95 by structure for no adaptation, translator, segmenter and oracle.

    uv run python benchmarks/shared_anatomy.py --data cardiac --times 3 --folder cardiac --variants default \\
        --seeds 0 1 2 --work study
    uv run python benchmarks/cardiac_study.py --folder cardiac --work study --seeds 0 1 2 \\
        --out benchmarks/results/cardiac_study.json

`site_a` has labels. `site_b` (inverted contrast, bias field, noise) and `site_c` (gamma, blur, noise) have labels too,
but only the oracle uses them. The first command makes the stores and factories that the second command needs. The test
cases of the folder are segmented on their own grid and scored there. Finished sites are not repeated. For every site, a
picture of its first test case with the reference and all methods is written next to the JSON file. Each command takes
about 50 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib.image
import numpy as np
import torch
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.summary import class_means, mean_over_classes
from fedfactory.adaptation.inference import segment
from fedfactory.adaptation.networks.translator_network import EncoderConfig
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.translator_training import TranslatorConfig
from fedfactory.common.files import write_json
from fedfactory.imaging.overlays import strip
from fedfactory.imaging.volume_files import read_volume
from fedfactory.node.labelling import label_factory, train_on_store
from fedfactory.node.site_adaptation import Adaptation, adapt_site
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine
from shared_anatomy import half_training

METHODS = ("no_adaptation", "augmentation_only", "translator", "segmenter", "oracle")
STRUCTURES = {1: "right ventricle", 2: "myocardium", 3: "left ventricle"}
SETTINGS = {"rotation": math.pi, "mirror": False}  # these scans have no common orientation
SEGMENTER = SegmenterConfig(updates=800, **SETTINGS)
ENCODER_SIZE = 32  # pixels per side of the images that the translator's encoder receives


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="site_a, site_b, site_c with train and test")
    parser.add_argument("--work", type=Path, required=True, help="folder of benchmarks/shared_anatomy.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="sites side by side, one thread each")
    parser.add_argument("--out", type=Path, help="JSON file; pictures go beside it")
    arguments = parser.parse_args()
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            (seed, site): pool.submit(finished_site, arguments, seed, site)
            for seed in arguments.seeds
            for site in ("b", "c")
        }
        seeds = {seed: {site: jobs[seed, site].result() for site in ("b", "c")} for seed in arguments.seeds}
    content: dict[str, Any] = {"machine": machine("cpu"), "seeds": seeds, "mean": {}}
    for site in ("b", "c"):
        rows = {method: [scores[site][method] for scores in seeds.values()] for method in METHODS}
        content["mean"][site] = {
            method: {key: round(float(np.nanmean([row[key] for row in by_seed])), 4) for key in by_seed[0]}
            for method, by_seed in rows.items()
        }
        for method in METHODS:
            print(site, method, content["mean"][site][method])
    if arguments.out:
        write_json(arguments.out, content)
        for site in ("b", "c"):
            draw(arguments, site, arguments.out.with_name(f"{arguments.out.stem}_site_{site}.png"))


def finished_site(arguments: argparse.Namespace, seed: int, site: str) -> dict[str, Any]:
    """The scores of one site and seed: read from their file, or computed and written to it if there is none."""
    torch.set_num_threads(1)
    work = arguments.work / f"cardiac_{seed}"
    file = work / f"cardiac_study_{site}.json"
    if not file.is_file():
        write_json(file, run_site(arguments, work, site, seed=seed))
    return json.loads(file.read_text())


def run_site(arguments: argparse.Namespace, work: Path, site: str, *, seed: int) -> dict[str, dict[str, float]]:
    """By method: Dice and HD95 (mm) of each structure and their means, and the seconds of training."""
    store, home = SliceStore(work / f"{site}.store"), SliceStore(work / "a.store")
    config = replace(SEGMENTER, seed=seed)
    half = half_training(
        config
    )  # of a first guess, and of the adaptation that begins with it: equal updates in all rows
    labelled = work / f"labelled_{site}.safetensors"  # one file per site, because sites run in parallel
    if not labelled.is_file():
        label_factory(work / "default.factory.safetensors", home.path, labelled, config=half)
    encoder = EncoderConfig(width=16, blocks=(1, 2, 4, 1), shrink=max(1, store.format.size // ENCODER_SIZE))
    translator = TranslatorConfig(pretraining=200, updates=400, encoder=encoder, seed=seed, **SETTINGS)
    adaptation = {"volumes": 60, "segmenter": half, "translator": translator}
    models = {
        "no_adaptation": lambda: Segmenter.load(work / "plain.safetensors"),
        "augmentation_only": lambda: Segmenter.load(work / "robust.safetensors"),
        "oracle": lambda: train_on_store(store, config),
        **{
            engine: lambda engine=engine: adapt_site(
                store.path,
                work / f"{engine}_{site}.safetensors",
                factory_file=labelled,
                adaptation=Adaptation(engine=engine, **adaptation),
            )
            for engine in ("translator", "segmenter")
        },
    }
    tests = arguments.folder / f"site_{site}" / "test"
    rows = {}
    for method in METHODS:
        began = time.monotonic()
        model = models[method]()
        seconds = round(time.monotonic() - began)
        # The network may come from another site; images are scaled by the intensity window of the site that applies it.
        Segmenter(model.network, store.format, model.card).save(work / f"{method}_{site}.safetensors")
        out = work / f"predictions_{site}" / method
        shutil.rmtree(out, ignore_errors=True)
        segment([tests], [work / f"{method}_{site}.safetensors"], out)
        rows[method] = summary(out, tests) | {"seconds": seconds}
        print(seed, site, method, rows[method], flush=True)
    return rows


def summary(predicted: Path, tests: Path) -> dict[str, float]:
    """Mean Dice and HD95 (mm) of the predicted label maps, by structure and over structures."""
    found = evaluate(predicted, tests, patient_pattern=r"patient\d+")
    for warning in found.warnings:
        print(tests, warning, flush=True)
    row: dict[str, float] = {}
    for measure in ("dice", "hd95"):
        means = class_means(found.scores, measure)
        row |= {f"{measure} {name}": round(means.get(label, math.nan), 4) for label, name in STRUCTURES.items()}
        row[measure] = round(mean_over_classes(found.scores, measure), 4)
    return row


def draw(arguments: argparse.Namespace, site: str, path: Path) -> None:
    """Write a picture of the reference and every method on the first test case of a site, for the first seed."""
    work = arguments.work / f"cardiac_{arguments.seeds[0]}"
    case = sorted((arguments.folder / f"site_{site}" / "test").iterdir())[0]
    image, label = (next((case / kind).glob("*.nii.gz")) for kind in ("image", "label"))
    maps = [label, *(work / f"predictions_{site}" / method / f"{case.name}.nii.gz" for method in METHODS)]
    turned = [read_volume(file, integer=True).turned("axial").data for file in maps]
    matplotlib.image.imsave(path, strip(read_volume(image).turned("axial").data, *turned))


if __name__ == "__main__":
    main()
