"""The demonstration: both phases in a federation of local processes, and a report."""

from __future__ import annotations

import hashlib
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
from ..adaptation.choices import ROTATION
from ..adaptation.engine.segmenter_config import ContrastMix, SegmenterConfig
from ..adaptation.evaluation.evaluate import evaluate
from ..adaptation.evaluation.scores import Score
from ..adaptation.evaluation.summary import mean_dice
from ..adaptation.generate_volumes import Drawing, generate_volumes
from ..adaptation.inference import segment
from ..adaptation.segmenter import Segmenter
from ..common.files import make_folder, refuse_existing, write_json
from ..common.progress import track
from ..generative.config import FactoryConfig
from ..node.audit import audit_factory
from ..node.audit_result import AuditResult
from ..node.labelling import label_factory
from ..node.protection.site_secret import write_secret
from ..node.site_adaptation import Adaptation
from ..node.store.prepare import prepare
from ..node.store.prepare_config import PrepareConfig
from ..node.store.slice_store import SliceStore
from ..researcher.run_state import PREVIEWS
from ..researcher.training import export
from .demo_result import METHODS, DemoResult
from .local_federation import LocalFederation
from .report import write_report
from .simulated_subjects import CLASSES, CONTRASTS, simulate_site
from .workers import adapt, train, training_workers

TAG = "fedfactory-demo"
WHOLE_NAME = ".+"  # of a subject is the patient: its first digits may be those of "t1"
BATCH_SIZE = 8  # slices of 32 px; 16 take twice as long and gave no better segmenters from synthetic slices
PACKAGES = ("fedbiomed", "torch", "monai", "nibabel", "nilearn", "numpy", "scipy")


@dataclass(frozen=True, kw_only=True)
class DemoSize:
    """How much the demonstration computes; the end-to-end test uses smaller numbers.

    Attributes:
        train_subjects: subjects per site to train on.
        test_subjects: held-out subjects per site.
        rounds: rounds of phase one.
        updates_per_round: local updates between two averagings.
        segmenter_updates: updates of every segmenter that is compared.
        synthetic_volumes: synthetic volumes on which a site's segmenter is trained.
    """

    train_subjects: int = 16
    test_subjects: int = 6
    rounds: int = 60
    updates_per_round: int = 15
    segmenter_updates: int = 400
    synthetic_volumes: int = 60


@dataclass(frozen=True, kw_only=True)
class DemoSite:
    """One site of the demonstration.

    Attributes:
        name: name of the site and of its domain.
        store: slice store to train on; without labels except at the first site.
        oracle_store: slice store of the same subjects with labels, only used by the oracle.
        images: images of the held-out subjects.
        test: folder of the held-out subjects, with reference labels.
    """

    name: str
    store: Path
    oracle_store: Path
    images: list[Path]
    test: Path


@dataclass(frozen=True, kw_only=True)
class DemoRun:
    """Settings of a demonstration.

    Attributes:
        out: folder of the demonstration.
        size: how much it computes.
        config: configuration of the factory.
        seed: seed of subjects and training.
    """

    out: Path
    size: DemoSize
    config: FactoryConfig
    seed: int

    @property
    def segmenter(self) -> SegmenterConfig:
        """Settings of every segmenter; the simulated heads lie straight."""
        return SegmenterConfig(
            network_size="small", updates=self.size.segmenter_updates, batch_size=BATCH_SIZE, rotation=ROTATION,
            seed=self.seed,
        )  # fmt: skip

    @property
    def first_guess(self) -> SegmenterConfig:
        """Settings of the first guess; with as few updates as here, more of its windows have random contrast."""
        return replace(self.segmenter, contrast=ContrastMix(unchanged=0.2, curves=0.8))


def run_demo(
    out: Path | None, *, sites: int = 3, seed: int = 0, preset: str = "tiny", size: DemoSize | None = None
) -> DemoResult:
    """Run the demonstration and write `report.html`, `results.json` and all other files.

    Args:
        out: new folder; None: the first free `fedfactory-demo-N` in the current folder.
        sites: number of sites, 2 or 3; the first site is labelled.
        seed: seed of subjects and training.
        preset: name of a preset of the factory, see `FactoryConfig.preset`.
        size: how much to compute; None: the defaults of `DemoSize`.

    Returns: the measurements.
    Raises: UsageError for a folder that is in use; FederationError if a process of the federation fails. All processes
        are ended in any case.
    """
    start, size, out = time.monotonic(), size or DemoSize(), out or _free_folder()
    refuse_existing(out)
    out = out.resolve()
    names = list(CONTRASTS)[:sites]
    config = FactoryConfig.preset(preset, tuple(names), classes=len(CLASSES) + 1)
    run = DemoRun(out=out, size=size, config=config, seed=seed)
    make_folder(out)
    with _terminate_as_interrupt(), _half_the_cores():
        with LocalFederation(out / "federation", names) as federation:
            federation.begin()
            _say("1/4 simulated subjects from the MNI152 template")
            demo_sites = [_make_site(run, name, number) for number, name in enumerate(names)]
            _say("2/4 phase one: federated training of the factory")
            experiment = _train_factory(run, federation, demo_sites)
        shutil.rmtree(out / "federation" / "tmp", ignore_errors=True)
        _say("3/4 phase two: first guess, synthetic volumes, each site's segmenter")
        factory_file, labelled_file = out / "factory.safetensors", out / "labelled_factory.safetensors"
        factory = export(experiment, factory_file)
        models, audited = _phase_two(run, demo_sites, factory_file, labelled_file)
        _say("4/4 held-out subjects: label maps, scores, report")
        scores = {site.name: _score_site(out, site, models[site.name]) for site in demo_sites}
    dice = {name: {method: mean_dice(rows[method]) for method in METHODS} for name, rows in scores.items()}
    seconds = time.monotonic() - start
    result = DemoResult(dice=dice, scores=scores, seconds=seconds, seed=seed, versions=versions())
    result.files = {"report": out / "report.html", "results": out / "results.json", "labelled factory": labelled_file}
    result.files |= {f"segmenter {name}": paths["adapted"] for name, paths in models.items()}
    result.files["audit"] = out / "audit" / "audit.html"
    tests = {site.name: site.test for site in demo_sites}
    write_report(
        result, factory, audited, labelled_file=labelled_file, tests=tests, predictions=out / "predictions",
        synthetic=out / "synthetic", pairs=sorted((experiment / PREVIEWS).glob("*.png"))[-1],
    )  # fmt: skip
    facts = {"dice": dice, "seconds": round(seconds, 1), "seed": seed, "versions": result.versions}
    write_json(result.files["results"], facts)
    return result


def versions() -> dict[str, str]:
    """Package to version: this package, Python, and the packages that it computes with."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"fedfactory": __version__, "python": platform.python_version(), **found}


def _make_site(run: DemoRun, name: str, number: int) -> DemoSite:
    """Simulate the subjects of a site and prepare its slice stores."""
    folder, size, config = run.out / "sites" / name, run.size, run.config
    base = 10_000 * run.seed + 1_000 * number
    side = config.image_size
    parts = (("train", size.train_subjects, base), ("test", size.test_subjects, base + 500))
    for part, subjects, part_seed in track(parts, f"simulating {name}"):
        options = {"size": side, "seed": part_seed, "prefix": f"{name}_{part}"}
        simulate_site(folder / part, CONTRASTS[name], subjects, **options)
    labelled = number == 0
    store, oracle_store = folder / "store", folder / ("store" if labelled else "oracle_store")
    # Held-out subjects are simulated separately, so all subjects of the store may be trained on.
    dense = PrepareConfig(
        domain=name, size=side, z_bins=config.z_bins, validation_share=0, test_share=0, patient_pattern=WHOLE_NAME,
    )  # fmt: skip
    prepare(folder / "train", store, dense if labelled else replace(dense, label_kind="none"))
    if not labelled:
        prepare(folder / "train", oracle_store, dense)
    images = sorted((folder / "test").glob("*/image/*.nii.gz"))
    return DemoSite(name=name, store=store, oracle_store=oracle_store, images=images, test=folder / "test")


def _train_factory(run: DemoRun, federation: LocalFederation, sites: list[DemoSite]) -> Path:
    """Register the stores, start the nodes, approve the training plan, train. Returns the experiment folder."""
    size = run.size
    experiment, configuration = run.out / "experiment", run.out / "factory_config.json"
    write_json(configuration, run.config.to_dict())
    federation.wait_for("create")
    for name, node in federation.nodes.items():  # the subjects are simulated, and a seed is to give the same run again
        write_secret(node, hashlib.sha256(f"{name}/{run.seed}".encode()).digest())
    add = {
        site.name: federation.site_command(
            "add", str(federation.nodes[site.name]), "--store", str(site.store), "--tag", TAG
        )
        for site in sites
    }
    federation.run_together("register data", add)
    federation.start_nodes()
    train = ["train", "--researcher", federation.researcher, "--tag", TAG, "--out", experiment]
    train += ["--config", configuration, "--rounds", size.rounds, "--updates-per-round", size.updates_per_round]
    train += ["--seed", run.seed, "--node-timeout", 120, "--approval-timeout", 180]
    approve = {
        name: federation.site_command("approve", str(path), "--yes", "--wait", "180")
        for name, path in federation.nodes.items()
    }
    with federation.background("train", [str(word) for word in train], rounds=size.rounds):
        federation.run_together("approve plan", approve)
    return experiment


def _audit(run: DemoRun, site: DemoSite, labelled_file: Path) -> AuditResult:
    """Compare synthetic slices of a site's domain with its training subjects and with its held-out subjects."""
    config = run.config
    settings = PrepareConfig(
        domain=site.name, size=config.image_size, z_bins=config.z_bins, validation_share=0, test_share=0,
        label_kind="none", patient_pattern=WHOLE_NAME,
    )  # fmt: skip
    held_out = prepare(site.test, site.test.parent / "held_out_store", settings.like(site.store)).store
    options = {"held_out_dir": held_out.path, "volumes": max(2, run.size.synthetic_volumes // 3), "seed": run.seed}
    return audit_factory(labelled_file, site.store, run.out / "audit", **options)


def _phase_two(
    run: DemoRun, sites: list[DemoSite], factory_file: Path, labelled_file: Path
) -> tuple[dict[str, dict[str, Path]], AuditResult]:
    """Add the first guess to the factory, draw synthetic volumes, compare them with real ones, and train every site's
    segmenters.

    All segmenters have the same network and number of updates.

    Args:
        run: the demonstration.
        sites: the labelled one first.
        factory_file: the exported factory.
        labelled_file: labelled factory to write.

    Returns: site to method to segmenter file, and the audit of the last site's domain.
    """
    first, others, at_labelled_site = sites[0], sites[1:], run.out / "labelled_site"
    models = {
        site.name: {method: run.out / "models" / site.name / f"{method}.safetensors" for method in METHODS}
        for site in sites
    }
    with training_workers() as pool:
        shared = {
            method: (at_labelled_site / f"{method}.safetensors", config)
            for method, config in (("no_adaptation", run.segmenter), ("augmentation_only", run.first_guess))
        }
        of_labelled_site = [pool.submit(train, first.store, config, file) for file, config in shared.values()]
        oracles = [pool.submit(train, site.oracle_store, run.segmenter, models[site.name]["oracle"]) for site in others]
        for training in of_labelled_site:
            training.result()
        label_factory(factory_file, first.store, labelled_file, first_guess_file=shared["augmentation_only"][0])
        adaptation = Adaptation(segmenter=run.segmenter, volumes=run.size.synthetic_volumes)
        adapted = [
            pool.submit(adapt, site.store, labelled_file, adaptation, models[site.name]["adapted"]) for site in sites
        ]
        for site in sites:
            drawing = Drawing(domain=site.name, volumes=4, seed=run.seed)
            generate_volumes(labelled_file, run.out / "synthetic" / site.name, drawing)
            for method, (file, _) in shared.items():
                # The network comes from the labelled site; intensities are scaled by the site that applies it.
                made = Segmenter.load(file)
                Segmenter(made.network, SliceStore(site.store).format, made.card).save(models[site.name][method])
        Segmenter.load(shared["no_adaptation"][0]).save(models[first.name]["oracle"])
        audited = _audit(run, sites[-1], labelled_file)
        for training in track([*oracles, *adapted], "training segmenters"):
            training.result()
    return models, audited


def _score_site(out: Path, site: DemoSite, models: dict[str, Path]) -> dict[str, list[Score]]:
    """Method to one score per held-out subject and class."""
    scores = {}
    for method in METHODS:
        folder = out / "predictions" / site.name / method
        segment(site.images, [models[method]], folder)
        scores[method] = evaluate(folder, site.test, folder.parent / f"{method}.csv").scores
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
    """Run PyTorch on half the cores: its threads wait in loops, so beside another program all become much slower.

    With slices of 32 px a second thread is only 15 % faster on an otherwise idle machine with two cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _terminate_as_interrupt() -> Iterator[None]:
    """Let SIGTERM and a closed terminal end the run as Ctrl-C does, so that every process is stopped."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
