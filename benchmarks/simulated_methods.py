"""Federated segmentation in a single process, with the training rounds and the aggregation of the package."""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from fedfactory.adaptation.labels.candidate_labels import SiteSlices
from fedfactory.adaptation.methods.interface.federated_method import FederatedMethod
from fedfactory.adaptation.methods.interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import FEDERATED, SegmenterCard
from fedfactory.common.files import write_json
from fedfactory.imaging.cases import CaseFiles, find_cases
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.site_data.held_out_scores import held_out_scores
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore

SITES = ("a", "b", "c")
SIZE, SIDE = 32, 160.0  # pixels, and mm around the middle of the scan, where the heart is


@dataclass
class SimulatedSite:
    """A site of a simulated federation.

    Attributes:
        data: its training slices.
        tests: stores with its test cases, by modality; "" for methods without modalities.
        network: name of the architecture that it has chosen; "" if it has not chosen any.
        public: the public slices, for methods that need them.
        modalities: its training slices by modality, for methods that need modalities.
    """

    data: SiteSlices
    tests: dict[str, SliceStore]
    network: str = ""
    public: SiteSlices | None = None
    modalities: dict[str, SiteSlices] = field(default_factory=dict)


def run_federation(method: FederatedMethod, sites: list[SimulatedSite]) -> dict[str, Any]:
    """Run all rounds; returns the scores of every site's own model and, if the method has one, of the last average."""
    torch.set_num_threads(1)
    began = time.monotonic()
    models = [method.build() for _ in sites]
    optimizers = [method.optimizers(model) for model in models]
    states = [method.new_state() for _ in sites]
    local_names = method.local_parameters(models[0])
    shared = {name: value.clone() for name, value in models[0].state_dict().items() if name not in local_names}
    num_bytes = sum(value.nbytes for value in shared.values())
    history = []
    for number in range(1, method.config.rounds + 1):
        site_updates: dict[int, SiteUpdate] = {}
        sent = {}
        for index, (site, model) in enumerate(zip(sites, models, strict=True)):
            model.load_state_dict(shared, strict=False)
            site_round = SiteRound(
                model=model,
                optimizers=optimizers[index],
                data=site.data,
                site=index,
                number=number,
                state=states[index],
                network=site.network,
                public=site.public,
                modalities=site.modalities,
            )
            site_updates[index] = method.train_round(site_round)
            sent[index] = {k: value.detach().clone() for k, value in model.state_dict().items() if k not in local_names}
        shared, shares = method.aggregate(site_updates, sent.__getitem__, shared)
        history.append(
            [{**_dictionary(site_update), "share": shares[index]} for index, site_update in site_updates.items()]
        )
    scores = {"own": _scores(method, sites, models, states=states)}
    if method.has_average:
        for model in models:
            model.load_state_dict(shared, strict=False)
        scores["average"] = _scores(method, sites, models, states=None)
    mean = {which: round(float(np.mean([row["dice"] for row in rows])), 4) for which, rows in scores.items()}
    seconds = round(time.monotonic() - began)
    return {"mean": mean, "scores": scores, "history": history, "seconds": seconds, "bytes_per_round": num_bytes}


def make_cardiac_stores(folder: Path, work: Path) -> None:
    """Make stores of every site with dense labels and with the whole heart, and of site a with the experts' scribbles.

    The test patients are those of the folder.
    """
    for site in SITES:
        if not (work / f"{site}_heart.store").is_dir():
            for case, part in _cases(folder, site):
                label = read_volume(case.labels[0].path, integer=True)
                out = work / f"{site}_heart" / part / case.name
                write_volume(out / "image" / "image.nii.gz", read_volume(case.channels[0]))
                write_volume(out / "label" / "heart.nii.gz", Volume((label.data > 0).astype(np.uint8), label.affine))
            make_store(work / f"{site}_heart", work / f"{site}_heart.store", site)
        make_store(folder / f"site_{site}", work / f"{site}_dense.store", site, label_key="label", label_kind="dense")
    make_store(folder / "site_a", work / "a_scribble.store", "a", label_key="scribble", label_kind="scribble")


def make_store(folder: Path, store: Path, site: str, **labels: str) -> None:
    """Prepare a store if it does not exist; labels: settings of the training labels."""
    if (store / "store.json").is_file():
        return
    common = PrepareConfig(domain=site, size=SIZE, spacing=SIDE / SIZE, z_bins=6, patient_pattern=r"patient\d+")
    settings = {**vars(common), **labels}
    weak = {"unlabelled_value": 4} if labels.get("label_kind") == "scribble" else {}
    prepare(folder / "train", store, PrepareConfig(**{**settings, **weak, "split": "train"}))
    prepare(folder / "test", store, PrepareConfig(**{**vars(common), "split": "test"}))


def interval(values: list[float]) -> dict[str, float]:
    """The mean Dice and its 95 % interval by bootstrap (2000 draws)."""
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(axis=1)
    low, high = np.percentile(draws, (2.5, 97.5))
    return {"dice": round(float(np.mean(values)), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def table(results: dict[tuple[str, str, int], dict[str, Any]], sites: int) -> list[dict[str, Any]]:
    """For each run: mean Dice of the sites' own models and of the average, with 95 % intervals over seeds and sites."""
    rows = []
    for study, name in dict.fromkeys((study, name) for study, name, _ in results):
        values = [value for (s, n, _), value in results.items() if (s, n) == (study, name)]
        for which in values[0]["scores"]:
            cells = [row for value in values for row in value["scores"][which]]
            dice = [row["dice"] for row in cells]
            distances = [row["hd95"] for row in cells if row["hd95"] is not None and math.isfinite(row["hd95"])]
            rows.append(
                {"study": study, "name": name, "which": which, "seeds": len(values), **interval(dice)}
                | {"hd95": round(float(np.mean(distances)), 2) if distances else None}
                | {"by_site": [round(float(np.mean(dice[n::sites])), 4) for n in range(sites)]}
                | {"bytes_per_round": values[0]["bytes_per_round"]}
            )
    return rows


def study_parser(text: str) -> argparse.ArgumentParser:
    """The command line that all studies of methods share."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="site_a, site_b, site_c with train and test")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--updates", type=int, default=15, help="updates of a site in a round, in addition to those on public slices"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--gather", action="store_true", help="report the finished runs only, start none")
    parser.add_argument("--out", type=Path, help="JSON file")
    return parser


def result_file(arguments: argparse.Namespace, study: str, name: str, *, seed: int) -> Path:
    """Path of the JSON file with the result of a run."""
    words = [study, name, str(seed), str(arguments.rounds), str(arguments.updates)]
    return arguments.work / ("_".join(words).replace(" ", "-").replace(",", "") + ".json")


def cached_result(file: Path, run: Callable[[], dict[str, Any]], gather: bool) -> dict[str, Any] | None:
    """The result in `file`. If it does not exist, `run()` computes it; with `gather` None is returned instead."""
    if not file.is_file():
        if gather:
            return None
        write_json(file, run())
        print(file.stem, json.loads(file.read_text())["mean"], flush=True)
    return json.loads(file.read_text())


def _scores(
    method: FederatedMethod, sites: list[SimulatedSite], models: list, *, states: list[MethodState] | None
) -> list[dict]:
    """Scores at every site: of its own model if `states` are given, of the average otherwise."""
    rows = []
    for index, (site, model) in enumerate(zip(sites, models, strict=True)):
        by_modality = []
        for modality, store in site.tests.items():
            context = SiteContext(site=index, network=site.network, modality=modality)
            network = method.segmenter(copy.deepcopy(model), context, states[index] if states else None)
            card = SegmenterCard(classes=method.config.classes, network=FEDERATED)
            by_modality.append(held_out_scores(store, Segmenter(network, store.format, card)))
        row = {key: float(np.mean([scores[key] for scores in by_modality])) for key in ("dice", "hd95")}
        named = zip(site.tests, by_modality, strict=True)
        rows.append(row | {f"{name}_dice": scores["dice"] for name, scores in named if name})
    return [{key: value if math.isfinite(value) else None for key, value in row.items()} for row in rows]


def _dictionary(site_update: SiteUpdate) -> dict[str, float | None]:
    """The fields of a site update; None for values that are not finite, which JSON does not have."""
    return {key: value if math.isfinite(value) else None for key, value in site_update.to_dict().items()}


def _cases(folder: Path, site: str) -> list[tuple[CaseFiles, str]]:
    """All cases of a site, each with the name of its split."""
    return [(case, part) for part in ("train", "test") for case in find_cases(folder / f"site_{site}" / part).cases]
