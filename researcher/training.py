"""Phase one from start to factory file: rounds, previews, checkpoints."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..common.files import atomic_file, refuse_existing
from ..common.progress import track
from ..errors import QuorumError, UsageError
from ..generative.config import FactoryConfig
from ..generative.factory import GENERATOR
from ..generative.factory_facts import FactoryFacts
from ..generative.factory_file import TrainedFactory, load_factory
from ..generative.metrics.shared_anatomy import shared_anatomy
from ..generative.networks.build import make_generator
from ..generative.networks.generator import Generator
from .agreement import agreeing_nodes
from .experiment import (
    change_stage,
    descriptions_of,
    factory_experiment,
    load_experiment,
    prune,
    request_approval,
    run_round,
    show_preview,
    use_researcher,
    wait_for_nodes,
)
from .node_selection import Federation
from .run_state import CHECKPOINT, PAIR, RunState, Stage

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

PREVIEWS = "previews"
PREVIEW_COLUMNS = 8


def train(
    config: FactoryConfig,
    out: str | Path,
    *,
    researcher: str | Path,
    federation: Federation,
    stages: Sequence[Stage],
    seed: int = 0,
    save_every: int = 10,
    report_round: Callable[[RunState], None] | None = None,
) -> Path:
    """Run phase one and leave an experiment folder: newest checkpoint, previews, state.

    Args:
        out: new experiment folder.
        researcher: Fed-BioMed researcher component.
        stages: one after the other; sites keep their discriminators, moments and strengths.
        save_every: rounds from one checkpoint and preview to the next.
        report_round: called after every round.

    Returns: the experiment folder.
    Raises: UsageError, FederationError, see `wait_for_nodes`, `agreeing_nodes`, `request_approval` and `run_round`.
    """
    out = Path(out)
    refuse_existing(out)
    if not stages:
        raise UsageError("a run needs at least one stage")
    state = RunState(config, federation, tuple(stages), seed, save_every)
    _run(state, out, researcher, report_round)
    return out


def resume(out: str | Path, *, researcher: str | Path, report_round: Callable[[RunState], None] | None = None) -> Path:
    """Go on with a run that was interrupted, from its last finished round, with the settings it began with.

    Args:
        out: experiment folder. researcher: the component it ran on.

    Raises: UsageError if there is no run or it is finished; as `train` otherwise.
    """
    out = Path(out)
    state = RunState.load(out)
    if state.round_done >= state.rounds:
        raise UsageError(f"{out}: all {state.rounds} rounds are done; nothing to resume")
    _run(state, out, researcher, report_round)
    return out


def _run(state: RunState, out: Path, researcher: str | Path, report_round: Callable[[RunState], None] | None) -> None:
    federation = state.federation
    use_researcher(researcher)
    wait_for_nodes(federation.min_nodes or len(state.config.domains), federation.node_timeout, federation.tag)
    experiment = _begin(state) if state.round_done == 0 else load_experiment(state.breakpoint, state.rounds)
    request_approval(experiment, federation.approval_timeout)
    state.save(out)
    numbers = range(state.round_done + 1, state.rounds + 1)
    for number in track(numbers, "training the factory"):
        started = time.monotonic()
        if state.stage_begins(number) and number > 1:
            change_stage(experiment, state.config_at(number), state.stage_at(number).updates_per_round, state.seed)
        reports = _patient_round(experiment, federation)
        state.note(number, reports, experiment, time.monotonic() - started)
        if number % state.save_every == 0 or number == state.rounds:
            generator, latest = _generators(experiment)
            pairs = {PAIR.join(pair): score for pair, score in shared_anatomy(generator).items()}
            state.sharing.append({"round": number, "pairs": pairs})
            _trained(experiment, state, generator, latest).save(out / CHECKPOINT)
            picture = save_preview(generator, out / PREVIEWS / f"round_{number:04d}.png", state.seed)
            show_preview(experiment, picture, pairs, number)
        state.save(out)
        prune(experiment, keep=state.breakpoint)
        if report_round is not None:
            report_round(state)


def _begin(state: RunState) -> Experiment:
    federation, first = state.federation, state.stages[0]
    nodes = agreeing_nodes(descriptions_of(federation.tag), state.config, leave_out=federation.leave_out)
    return factory_experiment(
        state.config_at(1),
        tag=federation.tag,
        rounds=state.rounds,
        updates_per_round=first.updates_per_round,
        nodes=nodes,
        nodes_per_round=federation.nodes_per_round,
        min_nodes=state.min_answers,
        weighting=federation.weighting,
        transport=federation.transport,
        secagg=federation.secagg,
        seed=state.seed,
        tensorboard=True,
        save_breakpoints=True,
    )


def _patient_round(experiment: Experiment, federation: Federation) -> dict[str, dict[str, Any]]:
    """A round; if too few sites answer, wait for them to come back and try it again. They still have the state of the
    round before."""
    deadline = None
    while True:
        try:
            return run_round(experiment, federation.round_timeout)
        except QuorumError:
            deadline = deadline or time.monotonic() + federation.node_timeout
            if time.monotonic() >= deadline:
                raise
            time.sleep(min(2.0, federation.node_timeout / 5))


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

    Raises: UsageError if the folder is none, or no checkpoint is there yet; CheckpointError if it is damaged.
    """
    folder = Path(experiment)
    RunState.load(folder)
    if not (folder / CHECKPOINT).is_file():
        raise UsageError(f"{folder}: no checkpoint yet; go on with `fedfactory train --resume`")
    factory = load_factory(folder / CHECKPOINT)
    factory.save(out)
    return factory


def factory_of(experiment: Experiment) -> TrainedFactory:
    """The factory of an experiment that was run by hand, as in a notebook, with the moving average's weights.

    Raises: UsageError if no round has been run yet.
    """
    if not experiment.aggregator().ema:
        raise UsageError("no round has been run yet: there is no factory")
    generator, latest = _generators(experiment)
    replies = experiment.training_replies()
    reports = [reply["optimizer_args"] for reply in replies[max(replies)].values()]
    return _assembled(experiment, reports, generator, latest, {}, {"rounds": experiment.round_current()})


@torch.no_grad()
def save_preview(generator: Generator, path: Path, seed: int) -> np.ndarray:
    """Write a picture with one row per domain and one column per latent, columns at rising heights.

    Latents come from a private generator: previews of all rounds show the same subjects, and training does not
    notice that they were drawn.

    Returns: the picture, (H, W) in [-1, 1].
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
    picture = np.concatenate(rows)
    with atomic_file(path) as temporary:
        matplotlib.image.imsave(temporary, picture, cmap="gray", vmin=-1, vmax=1)
    return picture


def _generators(experiment: Experiment) -> tuple[Generator, dict[str, torch.Tensor]]:
    """The average generator in evaluation mode, and the newest weights."""
    generator = make_generator(experiment.aggregator().config)
    average = {k.removeprefix(GENERATOR): v.float() for k, v in experiment.aggregator().ema.items()}
    latest = {k: v.detach().clone() for k, v in experiment.training_plan().model().generator.state_dict().items()}
    generator.load_state_dict({**latest, **average})  # the fixed noise does not travel and has no average
    return generator.eval(), latest


def _trained(
    experiment: Experiment, state: RunState, generator: Generator, latest: dict[str, torch.Tensor]
) -> TrainedFactory:
    return _assembled(experiment, list(state.reports.values()), generator, latest, state.history, state.facts())


def _assembled(
    experiment: Experiment,
    reports: list[dict[str, Any]],
    generator: Generator,
    latest: dict[str, torch.Tensor],
    history: dict[str, Any],
    facts: FactoryFacts,
) -> TrainedFactory:
    # Sites agree on size and bins; spacing and height are the middle of what they report.
    spacing = float(np.median([report["spacing"] for report in reports]))
    height = float(np.median([report["height"] for report in reports]))
    discriminator = None
    if generator.config.discriminator == "shared":
        discriminator = copy.deepcopy(experiment.training_plan().model().discriminator).eval()
    return TrainedFactory(
        generator=generator,
        latest=latest,
        spacing=spacing,
        height=height,
        history=history,
        facts=facts,
        discriminator=discriminator,
    )
