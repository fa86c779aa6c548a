"""The demonstration: a whole federation on this machine, both phases, and a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console

from .. import __version__
from ..adaptation.evaluation import Score, evaluate, mean_dice
from ..adaptation.generate_volumes import Drawing, generate_volumes
from ..adaptation.inference import segment
from ..adaptation.labelled_factory import LabelledFactory
from ..adaptation.segmenter import Segmenter
from ..adaptation.training.segmenter_training import SegmenterConfig
from ..common.files import refuse_existing, write_json
from ..common.progress import track
from ..generative.config import FactoryConfig
from ..node.audit import audit_factory
from ..node.audit_result import AuditResult
from ..node.labelling import label_factory, train_on_store
from ..node.site_adaptation import Adaptation, adapt_site
from ..node.store.prepare import prepare
from ..node.store.prepare_config import PrepareConfig
from ..node.store.slice_store import SliceStore
from ..researcher.training import export
from .demo_result import METHODS, DemoResult
from .local_federation import LocalFederation
from .report import write_report
from .simulated_subjects import CONTRASTS, simulate_site

TAG = "fedfactory-demo"
PACKAGES = ("fedbiomed", "torch", "monai", "batchgenerators", "nibabel", "nilearn", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demonstration does; the end-to-end test does less of everything."""

    train_subjects: int = 16  # per site
    test_subjects: int = 6  # per site, held out
    rounds: int = 50
    updates_per_round: int = 10
    segmenter_updates: int = 200
    branch_updates: int = 250
    synthetic_volumes: int = 60


@dataclass(frozen=True)
class DemoSite:
    """One hospital of the demonstration."""

    name: str
    store: Path  # for training; without labels except at the first site
    oracle_store: Path  # the same subjects with labels, for the oracle alone
    images: list[Path]  # held-out subjects
    test: Path  # their folder, with reference labels


def run_demo(
    out: Path | None, *, sites: int = 3, seed: int = 0, preset: str = "tiny", size: DemoSize | None = None
) -> DemoResult:
    """Run everything below `out` and write `report.html` and `results.json` there.

    Args:
        out: new folder; default: the first free `fedfactory-demo-N` here.
        sites: 2 or 3; the first one is labelled.
        preset: of the factory.
        size: how many subjects, rounds and updates.

    Raises: UsageError for a used folder; FederationError if a process of the federation fails. All processes are
        ended in any case.
    """
    start, size, out = time.monotonic(), size or DemoSize(), out or _free_folder()
    refuse_existing(out)
    out = out.resolve()
    names = list(CONTRASTS)[:sites]
    config = FactoryConfig.preset(preset, tuple(names))
    out.mkdir(parents=True, exist_ok=True)
    with _terminate_as_interrupt(), _half_the_cores():
        with LocalFederation(out / "federation", names) as federation:
            federation.begin()
            _say("1/4 simulated subjects from the MNI152 template")
            hospitals = [
                _make_site(out / "sites" / name, name, number, size, config, seed) for number, name in enumerate(names)
            ]
            _say("2/4 phase one: federated training of the factory")
            experiment = _phase_one(out, federation, hospitals, config, size, seed)
        shutil.rmtree(out / "federation" / "tmp", ignore_errors=True)
        _say("3/4 phase two: labels, synthetic volumes, each site's segmenter")
        factory_file, labelled_file = out / "factory.safetensors", out / "labelled_factory.safetensors"
        factory = export(experiment, factory_file)
        segmenter = SegmenterConfig(updates=size.segmenter_updates, seed=seed)
        options = {"branch_updates": size.branch_updates, "keep": 1, "config": segmenter}  # three take a minute more
        label_factory(factory_file, hospitals[0].store, labelled_file, **options)
        for hospital in hospitals:
            drawing = Drawing(domain=hospital.name, volumes=4, seed=seed)
            generate_volumes(labelled_file, out / "synthetic" / hospital.name, drawing)
        audited = _audit(out, hospitals[-1], labelled_file, config, size, seed)
        models = _train_segmenters(out / "models", hospitals, labelled_file, size, segmenter)
        _say("4/4 held-out subjects: label maps, scores, report")
        scores = {site.name: _score_site(out, site, models[site.name]) for site in hospitals}
    dice = {name: {method: mean_dice(rows[method]) for method in METHODS} for name, rows in scores.items()}
    seconds = time.monotonic() - start
    result = DemoResult(dice, scores, seconds, seed, versions())
    result.files = {"report": out / "report.html", "results": out / "results.json", "labelled factory": labelled_file}
    result.files |= {f"segmenter {name}": paths["adapted"] for name, paths in models.items()}
    result.files["audit"] = out / "audit" / "audit.html"
    tests = {site.name: site.test for site in hospitals}
    write_report(result, factory, labelled_file, tests, out / "synthetic", audited)
    facts = {"dice": dice, "seconds": round(seconds, 1), "seed": seed, "versions": result.versions}
    write_json(result.files["results"], facts)
    return result


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it computes with."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"fedfactory": __version__, "python": platform.python_version(), **found}


def _make_site(folder: Path, name: str, number: int, size: DemoSize, config: FactoryConfig, seed: int) -> DemoSite:
    base = 10_000 * seed + 1_000 * number
    side = config.image_size
    parts = (("train", size.train_subjects, base), ("test", size.test_subjects, base + 500))
    for part, subjects, part_seed in track(parts, f"simulating {name}"):
        simulate_site(folder / part, CONTRASTS[name], subjects, side, part_seed, prefix=f"{name}_{part}")
    labelled = number == 0
    store, oracle_store = folder / "store", folder / ("store" if labelled else "oracle_store")
    # The subjects held out are simulated separately, so all of these may train.
    dense = PrepareConfig(domain=name, size=side, z_bins=config.z_bins, validation_share=0, test_share=0)
    prepare(folder / "train", store, dense if labelled else replace(dense, label_kind="none"))
    if not labelled:
        prepare(folder / "train", oracle_store, dense)
    images = sorted((folder / "test").glob("*/image/*.nii.gz"))
    return DemoSite(name, store, oracle_store, images, folder / "test")


def _phase_one(
    out: Path, federation: LocalFederation, hospitals: list[DemoSite], config: FactoryConfig, size: DemoSize, seed: int
) -> Path:
    """Register the stores, start the nodes, approve the plan, train. Returns the experiment folder."""
    experiment, configuration = out / "experiment", out / "factory_config.json"
    write_json(configuration, config.to_dict())
    federation.wait_for("create")
    add = {
        site.name: federation.site_command(
            "add", str(federation.nodes[site.name]), "--store", str(site.store), "--tag", TAG
        )
        for site in hospitals
    }
    federation.run_together("register data", add)
    federation.start_nodes()
    train = ["train", "--researcher", federation.researcher, "--tag", TAG, "--out", experiment]
    train += ["--config", configuration, "--rounds", size.rounds, "--updates-per-round", size.updates_per_round]
    train += ["--seed", seed, "--node-timeout", 120, "--approval-timeout", 180]
    approve = {
        name: federation.site_command("approve", str(path), "--yes", "--wait", "180")
        for name, path in federation.nodes.items()
    }
    with federation.background("train", [str(word) for word in train], rounds=size.rounds):
        federation.run_together("approve plan", approve)
    return experiment


def _audit(
    out: Path, site: DemoSite, labelled_file: Path, config: FactoryConfig, size: DemoSize, seed: int
) -> AuditResult:
    """Synthetic slices of the last site against its own subjects, and against those held out."""
    settings = PrepareConfig(
        domain=site.name, size=config.image_size, z_bins=config.z_bins, validation_share=0, test_share=0,
        label_kind="none",
    )  # fmt: skip
    held_out = prepare(site.test, site.test.parent / "held_out_store", settings.like(site.store)).store
    options = {"held_out_dir": held_out.path, "volumes": max(2, size.synthetic_volumes // 3), "seed": seed}
    return audit_factory(labelled_file, site.store, out / "audit", **options)


def _train_segmenters(
    folder: Path, hospitals: list[DemoSite], labelled_file: Path, size: DemoSize, config: SegmenterConfig
) -> dict[str, dict[str, Path]]:
    """Segmenter file of every method at every site; all have the same network and number of updates."""
    shared = {
        "no_adaptation": train_on_store(SliceStore(hospitals[0].store), config),
        "augmentation_only": LabelledFactory.load(labelled_file).robust,
    }
    models: dict[str, dict[str, Path]] = {}
    for site in hospitals:
        paths = {method: folder / site.name / f"{method}.safetensors" for method in METHODS}
        for method, model in shared.items():
            # The network is the labelled site's; the window that scales images is the applying site's own.
            Segmenter(model.network, SliceStore(site.store).format, model.card).save(paths[method])
        adaptation = Adaptation(segmenter=config, volumes=size.synthetic_volumes)
        adapt_site(site.store, paths["adapted"], factory_file=labelled_file, adaptation=adaptation)
        labelled = site is hospitals[0]
        oracle = shared["no_adaptation"] if labelled else train_on_store(SliceStore(site.oracle_store), config)
        oracle.save(paths["oracle"])
        models[site.name] = paths
    return models


def _score_site(out: Path, site: DemoSite, models: dict[str, Path]) -> dict[str, list[Score]]:
    scores = {}
    for method in METHODS:
        folder = out / "predictions" / site.name / method
        segment(site.images, [models[method]], folder)
        scores[method] = evaluate(folder, site.test, folder.parent / f"{method}.csv")
    return scores


def _free_folder() -> Path:
    number = 1
    while (folder := Path(f"fedfactory-demo-{number}")).exists():
        number += 1
    return folder


def _say(text: str) -> None:
    Console(stderr=True, highlight=False).print(text)


@contextmanager
def _half_the_cores() -> Iterator[None]:
    """PyTorch on half the cores: its threads wait in loops, and beside another program all become many times slower.

    For slices of 32 px a second thread gains 15 % on a quiet machine of two cores.
    """
    kept = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(kept)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """SIGTERM and a closed terminal end the run as Ctrl-C does, so that every process is stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    kept = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)
