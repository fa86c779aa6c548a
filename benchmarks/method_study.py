"""Do the methods of federated segmentation hold what they promise? Real images of several sites, paired patients.

    uv run python benchmarks/method_study.py --pictures data2d --hearts cardiac_dealt --work study --seeds 0 1 2 \\
        --device cuda --jobs 16 --out benchmarks/results/method_study.json

The federations run in a single process each, with the training rounds and the aggregation of the package. What every
row trains on is in RUNS: the task (see method_tasks.py), the method, the labels of each site, the settings that differ
from the defaults. Within a task all rows have the same number of rounds, of updates of a site in a round, and of slices
in an update; `dense, half as long` shows whether the ceiling still rises. Test patients choose nothing: settings are
the defaults of the package, or those of the row. Scores are Dice per case on the images' own grid, means over classes,
of the site's own model for methods that personalise, of the average otherwise. Differences are paired per patient;
their intervals come from a bootstrap over patients and seeds. Finished runs in --work, and in the
file of runs beside --out, are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.common.files import write_json
from fedfactory.node.store.slice_store import SliceStore
from measuring import machine
from method_summary import summary
from method_tasks import TASKS, Task, make_stores, store_path, training_slices, without_labels
from simulated_methods import SimulatedSite, run_federation

ROUNDS = {"polyp": 30, "breast": 30, "heart": 40}
UPDATES = 25  # of a site in a round
BATCH = 12
MIXED = ("scribble", "point", "box", "block", "dense")  # labels of the polyp centres
BREAST = ("dense", "box", "image", "none")
HEART = ("scribble", "point", "box")
LABELLED_PATIENTS = 3  # of each site and modality, in the study of modalities


@dataclass(frozen=True, kw_only=True)
class Run:
    """A row of the study.

    Attributes:
        question: what it belongs to.
        task: name in TASKS.
        name: of the row within its question.
        method: of the package.
        labels: kind of labels of each site; a single one for all.
        options: of the method.
        settings: of MethodConfig, where they differ from the study's.
        which: whose scores count, "own" or "average".
        sites: that take part; empty for all of the task.
        modalities: those that take part, for the study of modalities.
        cost: time of a run relative to FedAvg's, about, so that long runs begin first.
    """

    question: str
    task: str
    name: str
    method: str
    labels: tuple[str, ...] = ("dense",)
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    which: str = "average"
    sites: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    cost: float = 1.0


def _ceilings(task: str) -> list[Run]:
    half = {"rounds": ROUNDS[task] // 2}
    return [
        Run(question="dense", task=task, name="local", method="local", which="own"),
        Run(question="dense", task=task, name="fedavg", method="fedavg"),
        Run(question="dense", task=task, name="fedbn", method="fedbn", which="own"),
        Run(question="dense", task=task, name="fedavg, half as long", method="fedavg", settings=half, cost=0.5),
    ]


def _weak(task: str, labels: tuple[str, ...], cost: float) -> list[Run]:
    common = {"question": "fedicra", "task": task, "labels": labels}
    return [
        Run(**common, name="local", method="local", which="own"),
        Run(**common, name="fedavg", method="fedavg"),
        Run(**common, name="fedprox", method="fedprox"),
        Run(**common, name="fedbn", method="fedbn", which="own"),
        Run(**common, name="fedicra", method="fedicra", which="own", cost=cost),
    ]


def _parts_of_fedicra(task: str, labels: tuple[str, ...], cost: float) -> list[Run]:
    """FedICRA without one of its parts, or with the published one in place of the default."""
    parts: dict[str, dict[str, Any]] = {
        "no tree energy": {"tree_weight": 0.0},
        "published trees": {"tree_sigma": 0.02, "learnt_trees": True},
        "image's tree as published": {"tree_sigma": 0.02},
        "learnt trees": {"learnt_trees": True},
        "no CRF": {"crf_weight": 0.0},
        "no energy": {"tree_weight": 0.0, "crf_weight": 0.0},
        "no contrast": {"contrast_weight": 0.0},
        "all layers together": {"body_share": None},
        "not adaptive": {"adaptive": False},
        "together and not adaptive": {"body_share": None, "adaptive": False},
    }
    common = {"question": "fedicra", "task": task, "labels": labels, "method": "fedicra", "which": "own", "cost": cost}
    return [
        *(Run(**common, name=f"fedicra, {name}", options=options) for name, options in parts.items()),
        Run(**common, name="fedicra, rate of the others", settings={"learning_rate": 1e-3}),
        Run(**{**common, "which": "average"}, name="fedicra, its average"),
    ]


def _hssf() -> list[Run]:
    common = {
        "question": "hssf", "task": "polyp", "labels": ("none",), "which": "own", "cost": 3.0,
    }  # fmt: skip
    return [
        Run(**common, name="public slices alone", method="hssf", options={"exchange": False, "unlabelled": 0.0}),
        Run(**common, name="local", method="hssf", options={"exchange": False}),
        Run(**{**common, "which": "average"}, name="lssl", method="lssl"),
        Run(**common, name="hssf", method="hssf"),
        Run(**common, name="hssf, no self-training", method="hssf", options={"unlabelled": 0.0}),
        Run(**common, name="hssf, assessor not asked", method="hssf", options={"min_assessor_accuracy": 0.0}),
    ]


def _gaze(task: str) -> list[Run]:
    common = {"question": "gaze", "task": task, "sites": ("c1_paris", "kvasir_norway")}
    return [
        Run(**common, name="masks", method="fedavg", labels=("dense",)),
        Run(**common, name="masks, two networks", method="gaze", labels=("dense",), cost=2.5),
        Run(**common, name="fixations", method="gaze", labels=("gaze",), cost=2.5),
        Run(**common, name="fixations, one level", method="gaze", labels=("gaze",), options={"levels": 1}),
    ]


def _cmc() -> list[Run]:
    common = {"question": "cmc", "task": "heart", "which": "average"}
    both = ("bright", "inverted")
    return [
        # Two networks at 3/4 of the width have together as many weights as one of full width (9 / 16 each).
        Run(**common, name="bright alone", method="cmc", modalities=("bright",), settings={"width": 12}),
        Run(**common, name="inverted alone", method="cmc", modalities=("inverted",), settings={"width": 12}),
        Run(**common, name="cmc", method="cmc", modalities=both, cost=2.0),
        Run(**common, name="cmc, no consistency", method="cmc", modalities=both, options={"start": 1.0}),
        Run(
            **common, name="cmc, views at all sites", method="cmc", modalities=both, options={"views": "all"}, cost=3.0
        ),
        Run(**common, name="cmc, never fused", method="cmc", modalities=both, options={"unfused_share": 1.0}, cost=2.0),
        Run(
            **common, name="cmc, no channels", method="cmc", modalities=both, options={"channel_weight": 0.0}, cost=2.0
        ),
        Run(**common, name="cmc, no classes", method="cmc", modalities=both, options={"agreement": "off"}, cost=2.0),
    ]


FEDMIX = {"question": "fedmix", "task": "breast"}
RUNS = [
    *(run for task in TASKS for run in _ceilings(task)),
    *_weak("polyp", MIXED, 9.0),
    *_weak("heart", HEART, 6.0),
    *_parts_of_fedicra("heart", HEART, 6.0),
    Run(**FEDMIX, name="dense site alone", method="fedavg", labels=("dense", "none", "none", "none")),
    Run(**FEDMIX, name="fedavg of all labels", method="fedavg", labels=BREAST),
    Run(**FEDMIX, name="fedmix", method="fedmix", labels=BREAST, cost=2.5),
    Run(**FEDMIX, name="fedmix, refined", method="fedmix", labels=BREAST, options={"refine": True}, cost=2.5),
    *_hssf(),
    *_gaze("polyp"),
    *_cmc(),
]


def key_of(run: Run, seed: int) -> str:
    """Name of a run's file."""
    return f"{run.question}_{run.task}_{run.name}_{seed}".replace(" ", "-").replace(",", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path, help="folder of pictures, see method_tasks.py; not needed for stores")
    parser.add_argument("--hearts", type=Path, help="site_a, site_b, site_c with train and test")
    parser.add_argument("--work", type=Path, required=True, help="folder for stores and finished runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--only", nargs="+", default=[""], help="beginnings of the names of runs, such as fedicra_heart; in this order"
    )
    parser.add_argument("--rounds", type=int, help="instead of the study's, to try something")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no further run after this time")
    parser.add_argument("--gather", action="store_true", help="report the finished runs only, start none")
    parser.add_argument("--out", type=Path, help="JSON file; the runs are beside it, as _runs.json")
    arguments = parser.parse_args()
    if arguments.pictures and arguments.hearts:
        make_stores(arguments.pictures, arguments.hearts, arguments.work)
    runs_file = arguments.out.with_stem(f"{arguments.out.stem}_runs") if arguments.out else None
    known = json.loads(runs_file.read_text()) if runs_file and runs_file.is_file() else {}
    if not arguments.gather:
        run_all(arguments, finished=set(known))
    runs = known | read_runs(arguments.work)
    rows = list(runs.values())
    content = {"machine": machine("cpu"), **summary(rows)}
    for row in content["rows"]:
        print("{question:8s} {task:7s} {name:26s} {dice:.3f} {seeds} seeds  {by_site}".format(**row))
    for row in content["differences"]:
        print(
            "{question:8s} {task:7s} {name:26s} - {against:22s} {mean:+.3f} ({low:+.3f} to {high:+.3f})".format(**row)
        )
    if arguments.out:
        write_json(arguments.out, content)
        write_json(runs_file, runs, compact=True)


def run_all(arguments: argparse.Namespace, finished: set[str]) -> None:
    """Run what is not `finished`, by key, and has no file, the longest first; each writes its own file."""
    began = time.monotonic()
    wanted = [
        (run, seed)
        for beginning in arguments.only
        for run in sorted(RUNS, key=lambda run: -run.cost)
        for seed in arguments.seeds
        if key_of(run, seed).startswith(beginning)
        and key_of(run, seed) not in finished
        and not (arguments.work / f"{key_of(run, seed)}.json").is_file()
    ]
    waiting = iter(wanted)
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {}

        def begin_next() -> None:
            in_time = time.monotonic() - began < 60 * arguments.minutes
            if in_time and (following := next(waiting, None)) is not None:
                future = pool.submit(run_one, arguments.work, *following, arguments.device, arguments.rounds)
                jobs[future] = key_of(*following)

        for _ in range(arguments.jobs):
            begin_next()
        while jobs:
            done = next(as_completed(jobs))
            name = jobs.pop(done)
            try:
                print(f"{time.monotonic() - began:6.0f} s  {name}: {done.result()}", flush=True)
            except Exception as error:  # one failed run must not take the others with it
                print(f"{time.monotonic() - began:6.0f} s  {name} FAILED: {error!r}", flush=True)
            begin_next()


def run_one(work: Path, run: Run, seed: int, device: str, rounds: int | None) -> float:
    """Run a row with a seed and write its file; returns its mean Dice."""
    task = TASKS[run.task]
    config_values: dict[str, Any] = {
        "method": run.method, "classes": task.classes, "size": 64 if run.task == "heart" else 96,
        "channels": 3 if task.colour else 1, "colour": task.colour, "rounds": ROUNDS[run.task],
        "updates": UPDATES, "batch_size": BATCH, "mirror": task.mirror, "rotation": task.rotation,
        "seed": seed, "options": dict(run.options),
    }  # fmt: skip
    config_values |= run.settings
    if rounds is not None:
        config_values["rounds"] = rounds
    make = {"hssf": hssf_sites, "cmc": cmc_sites}.get(run.question, plain_sites)
    sites, names, public = make(work, run, task, seed, config_values)
    method = make_method(MethodConfig(sites=len(sites), **config_values))
    method.public = public
    result = run_federation(method, sites, device=device, which=run.which)
    patients = patient_scores([{**score, "site": names[score["site"]]} for score in result["scores"]])
    row = {
        "question": run.question, "task": run.task, "name": run.name, "seed": seed, "which": run.which,
        "method": run.method, "labels": list(run.labels), "config": method.config.to_dict(), "sites": names,
        "scores": [[*patient, round(dice, 4)] for patient, dice in patients.items()], "seconds": result["seconds"],
        "bytes_per_round": result["bytes_per_round"], "last": result["history"][-1], "machine": machine(device),
    }  # fmt: skip
    write_json(work / f"{key_of(run, seed)}.json", row)
    return round(float(np.mean(list(patients.values()))), 4)


def plain_sites(
    work: Path, run: Run, task: Task, seed: int, values: dict[str, Any]
) -> tuple[list[SimulatedSite], list[str], None]:
    """All sites of the task, with the labels of the row."""
    names = run.sites or task.sites
    labels = run.labels * len(names) if len(run.labels) == 1 else run.labels
    sites = []
    for index, (name, kind) in enumerate(zip(names, labels, strict=True)):
        store = SliceStore(store_path(work, run.task, name))
        data = training_slices(store, kind, task.classes, seed=1000 * seed + index)
        sites.append(SimulatedSite(data, {"": store}))
    return sites, list(names), None


def hssf_sites(
    work: Path, run: Run, task: Task, seed: int, values: dict[str, Any]
) -> tuple[list[SimulatedSite], list[str], Any]:
    """The first centre's slices are public; three others have no labels and a network of their own each."""
    public = training_slices(SliceStore(store_path(work, run.task, task.sites[0])), "dense", task.classes, seed=seed)
    values["options"] |= {"public_slices": len(public)}
    names = list(task.sites[1:4])
    networks = ("",) * 3 if run.method == "lssl" else ("unet-small", "dynunet-standard", "segresnet-large")
    sites = []
    for name, network in zip(names, networks, strict=True):
        store = SliceStore(store_path(work, run.task, name))
        data = training_slices(store, "none", task.classes, seed=seed)
        sites.append(SimulatedSite(data, {"": store}, network, public))
    return sites, names, public


def cmc_sites(
    work: Path, run: Run, task: Task, seed: int, values: dict[str, Any]
) -> tuple[list[SimulatedSite], list[str], None]:
    """Site a has both contrasts of its patients, misaligned; b the inverted one, c the bright one. Few have labels."""
    stores = {name: SliceStore(store_path(work, run.task, name)) for name in (*task.sites, "a_inverted")}
    holdings = {
        "a": {"bright": stores["a"], "inverted": stores["a_inverted"]},
        "b": {"inverted": stores["b"]},
        "c": {"bright": stores["c"]},
    }
    values["options"] |= {"modalities": run.modalities}
    sites, names = [], []
    for index, (site, holding) in enumerate(holdings.items()):
        held = {name: store for name, store in holding.items() if name in run.modalities}
        if not held:
            continue
        modalities = {}
        for name, store in held.items():
            data = training_slices(store, "dense", task.classes, seed=seed)
            rng = np.random.default_rng((seed, index))
            chosen = rng.choice(np.unique(data.patients), LABELLED_PATIENTS, replace=False)
            modalities[name] = without_labels(data, np.isin(data.patients, chosen))
        sites.append(SimulatedSite(next(iter(modalities.values())), held, modalities=modalities))
        names.append(site)
    return sites, names, None


def read_runs(work: Path) -> dict[str, dict[str, Any]]:
    """The finished runs by key."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(work.glob("*.json"))}


def patient_scores(scores: list[dict[str, Any]]) -> dict[tuple[str, str, str], float]:
    """Mean Dice by site, modality and patient, of cases in which it is defined."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for score in scores:
        if score["dice"] is not None:
            found.setdefault((score["site"], score["modality"], score["patient"]), []).append(score["dice"])
    return {patient: float(np.mean(values)) for patient, values in found.items()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
