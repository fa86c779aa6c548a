"""Phase one from start to factory file: rounds, previews, checkpoints."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..errors import CheckpointError, UsageError
from ..files import atomic_file, refuse_existing, write_json
from ..generative.config import FactoryConfig
from ..generative.factory_file import TrainedFactory, load_factory
from ..generative.generator import Generator
from ..generative.networks import make_generator
from ..progress import track
from .experiment import change_stage, factory_experiment, request_approval, run_round, use_researcher, wait_for_nodes

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

CHECKPOINT, SUMMARY = "checkpoint.safetensors", "experiment.json"
PREVIEWS = "previews"
PREVIEW_COLUMNS = 8
SHARED_PREFIX = "generator."


@dataclass(frozen=True)
class Refinement:
    """A second stage of the same experiment: stronger guidance, other rounds (published: 35 of 200 updates, 50)."""

    rounds: int
    updates_per_round: int
    clip_weight: float


def train(
    config: FactoryConfig,
    out: str | Path,
    *,
    researcher: str | Path,
    tag: str,
    rounds: int,
    updates_per_round: int = 10,
    min_nodes: int | None = None,
    node_timeout: float = 60,
    approval_timeout: float = 0,
    seed: int = 0,
    refinement: Refinement | None = None,
    save_every: int = 10,
    report_round: Callable[[int], None] | None = None,
) -> Path:
    """Run phase one and leave an experiment folder: newest checkpoint, previews, summary.

    Args:
        out: new experiment folder.
        researcher: Fed-BioMed researcher component.
        min_nodes: nodes to wait for; default: one per domain.
        node_timeout: seconds to wait for them.
        approval_timeout: seconds to wait for the sites' approval of the training plan.
        refinement: a second stage after `rounds`; sites keep their discriminators, moments and strengths.
        save_every: rounds from one checkpoint and preview to the next.
        report_round: called with the number of every finished round.

    Returns: the experiment folder.
    Raises: UsageError, FederationError, see `wait_for_nodes`, `request_approval` and `run_round`.
    """
    out = Path(out)
    refuse_existing(out)
    total = rounds + (refinement.rounds if refinement else 0)
    use_researcher(researcher)
    wait_for_nodes(min_nodes or len(config.domains), node_timeout, tag)
    experiment = factory_experiment(
        config, tag=tag, rounds=total, updates_per_round=updates_per_round, seed=seed, tensorboard=True
    )
    request_approval(experiment, approval_timeout)
    out.mkdir(parents=True, exist_ok=True)
    history: dict[str, list[dict[str, float]]] = {domain: [] for domain in config.domains}
    facts = {"tag": tag, "seed": seed, "updates_per_round": updates_per_round, "rounds_planned": total}
    for number in track(range(1, total + 1), "training the factory"):
        if refinement and number == rounds + 1:
            config = replace(config, clip_weight=refinement.clip_weight)
            change_stage(experiment, config, refinement.updates_per_round, seed)
            facts["refinement"] = asdict(refinement)
        reports = run_round(experiment)
        if report_round is not None:
            report_round(number)
        for domain, report in reports.items():
            history[domain].append({"round": number, **_losses(report)})
        if number % save_every == 0 or number == total:
            factory = _trained(experiment, config, reports, history, {**facts, "rounds": number})
            factory.save(out / CHECKPOINT)
            write_json(out / SUMMARY, {"checkpoint": CHECKPOINT, **factory.facts})
            save_preview(factory.generator, out / PREVIEWS / f"round_{number:04d}.png", seed)
    return out


def factory_config(
    domains: str, preset: str, config: Path | None, *, clip_weight: float | None = None
) -> FactoryConfig:
    """From domain names with commas between them and a preset, or from a JSON file.

    Raises: UsageError if neither or both are given, or the file is not readable.
    """
    if (config is None) == (not domains):
        raise UsageError("give either --domains A,B,... (with --preset) or --config FILE")
    changes = {} if clip_weight is None else {"clip_weight": clip_weight}
    if config is None:
        return FactoryConfig.preset(preset, tuple(name.strip() for name in domains.split(",")), **changes)
    try:
        return FactoryConfig.from_dict({**json.loads(config.read_text(encoding="utf-8")), **changes})
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{config}: not readable as a JSON configuration ({error})") from None


def export(experiment: str | Path, out: str | Path) -> TrainedFactory:
    """The newest checkpoint of an experiment folder as a factory file.

    Raises: UsageError if the folder is none, CheckpointError if its checkpoint is missing or damaged.
    """
    folder = Path(experiment)
    if not (folder / SUMMARY).is_file():
        raise UsageError(f"{folder}: no experiment here ({SUMMARY} is missing); `fedfactory train --out` makes one")
    try:
        checkpoint = folder / json.loads((folder / SUMMARY).read_text(encoding="utf-8"))["checkpoint"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / SUMMARY}: not readable ({error})") from None
    factory = load_factory(checkpoint)
    factory.save(out)
    return factory


@torch.no_grad()
def save_preview(generator: Generator, path: Path, seed: int) -> None:
    """A picture with one row per domain and one column per latent, columns at rising heights.

    Latents come from a private generator: previews of all rounds show the same subjects, and training does not
    notice that they were drawn.
    """
    import matplotlib.image  # slow to import

    config = generator.config
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(PREVIEW_COLUMNS, config.latent_dim, generator=rng)
    height = torch.linspace(0, config.z_bins - 1, PREVIEW_COLUMNS)
    noise = generator.draw_noise(PREVIEW_COLUMNS, rng)
    rows = []
    for domain in range(len(config.domains)):
        style = generator.style_at(z, height, torch.full((PREVIEW_COLUMNS,), domain))
        image = generator.synthesise(style, noise).image
        rows.append(np.concatenate([np.rot90(one[0].numpy()) for one in image], axis=1))
    with atomic_file(path) as temporary:
        matplotlib.image.imsave(temporary, np.concatenate(rows), cmap="gray", vmin=-1, vmax=1)


def _losses(report: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in report.items() if key.startswith("loss_")}


def _trained(
    experiment: Experiment, config: FactoryConfig, reports: dict, history: dict, facts: dict
) -> TrainedFactory:
    average = experiment.aggregator().ema
    generator = make_generator(config)
    generator.load_state_dict({k.removeprefix(SHARED_PREFIX): v.float() for k, v in average.items()})
    latest = {k: v.detach().clone() for k, v in experiment.training_plan().model().generator.state_dict().items()}
    # Sites agree on size and bins by construction; spacing and height are the middle of what they report.
    spacing = float(np.median([report["spacing"] for report in reports.values()]))
    height = float(np.median([report["height"] for report in reports.values()]))
    return TrainedFactory(generator.eval(), latest, spacing, height, history, facts)
