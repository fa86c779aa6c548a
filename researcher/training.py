"""Phase one from the first round to the factory file: rounds, previews, checkpoints."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..common.files import refuse_existing
from ..common.progress import track
from ..errors import QuorumError, UsageError
from ..generative.config import FactoryConfig
from ..generative.factory import GENERATOR
from ..generative.factory_facts import FactoryFacts, SharedAnatomy
from ..generative.factory_file import TrainedFactory, load_factory
from ..generative.metrics.shared_anatomy import shared_anatomy
from ..generative.networks.build import make_generator
from ..generative.networks.generator import Generator
from ..imaging.overlays import shown_slice
from ..imaging.pictures.contours import slice_with_contours
from ..imaging.pictures.decoding import write_picture
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
from .round_records import ReceivedUpdate
from .run_state import CHECKPOINT, PAIR, PREVIEWS, RunState, Stage

if TYPE_CHECKING:
    from fedbiomed.researcher.federated_workflows import Experiment

PREVIEW_COLUMNS = 8
RETRY_SECONDS = 2.0  # before a round with too few answers is repeated


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
    """Run phase one and write an experiment folder with the newest checkpoint, previews and the state of the run.

    Args:
        config: networks and domains.
        out: new experiment folder.
        researcher: folder of the Fed-BioMed researcher component.
        federation: which nodes take part, and how their updates are averaged.
        stages: stages that follow one another; discriminators, optimizer moments and augmentation strengths persist at
            the sites from one stage to the next.
        seed: seed of initial weights and of all draws.
        save_every: rounds from one checkpoint and preview to the next.
        report_round: called after every round.

    Returns: the experiment folder.
    Raises: UsageError, FederationError, see `wait_for_nodes`, `agreeing_nodes`, `request_approval` and `run_round`.
    """
    out = Path(out)
    refuse_existing(out)
    if not stages:
        raise UsageError(f"stages is {stages!r}; give at least one stage")
    state = RunState(config=config, federation=federation, stages=tuple(stages), seed=seed, save_every=save_every)
    _run(state, out, researcher=researcher, report_round=report_round)
    return out


def resume(
    out: str | Path,
    *,
    researcher: str | Path,
    min_nodes: int | None = None,
    report_round: Callable[[RunState], None] | None = None,
) -> Path:
    """Continue an interrupted run after its last finished round, with the settings it began with.

    Args:
        out: experiment folder.
        researcher: folder of the researcher component it ran on.
        min_nodes: nodes to wait for, and answers that each round that is left needs, for instance because a node left
            for good; None: as the run began.
        report_round: called after every round.

    Returns: the experiment folder.
    Raises: UsageError if there is no run or if it is finished, and as `RunState.require_answers` and `train`.
    """
    out = Path(out)
    state = RunState.load(out)
    if state.round_done >= state.rounds:
        raise UsageError(f"{out}: all {state.rounds} rounds are done, nothing to resume; choose an unfinished run")
    if min_nodes is not None:
        state.require_answers(min_nodes)
    _run(state, out, researcher=researcher, report_round=report_round)
    return out


def _run(
    state: RunState, out: Path, *, researcher: str | Path, report_round: Callable[[RunState], None] | None
) -> None:
    federation = state.federation
    use_researcher(researcher)
    wait_for_nodes(federation.min_nodes or len(state.config.domains), federation.node_timeout, federation.tag)
    experiment = _begin(state) if state.round_done == 0 else load_experiment(state.breakpoint, state.rounds)
    experiment.strategy().require_answers(state.min_answers)
    request_approval(experiment, federation.approval_timeout)
    state.save(out)
    numbers = range(state.round_done + 1, state.rounds + 1)
    for number in track(numbers, "training the factory"):
        started = time.monotonic()
        if state.stage_begins(number) and number > 1:
            updates_per_round = state.stage_at(number).updates_per_round
            change_stage(experiment, state.config_at(number), updates_per_round, seed=state.seed)
        site_updates = _run_round_with_retries(experiment, federation)
        state.record_round(number, site_updates, experiment, seconds=time.monotonic() - started)
        if number % state.save_every == 0 or number == state.rounds:
            _save_checkpoint(experiment, state, out)
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


def _save_checkpoint(experiment: Experiment, state: RunState, out: Path) -> None:
    """Measure the shared anatomy; write a checkpoint and a preview of the round that was just finished."""
    number = state.round_done
    generator, latest = _generators(experiment)
    pairs = {PAIR.join(pair): score for pair, score in shared_anatomy(generator).items()}
    state.shared_anatomy.append(SharedAnatomy(round=number, pairs=pairs))
    site_updates = list(state.site_updates.values())
    factory = _assemble(experiment, site_updates, generator, latest=latest, history=state.history, facts=state.facts())
    factory.save(out / CHECKPOINT)
    picture = save_preview(generator, out / PREVIEWS / f"round_{number:04d}.png", state.seed)
    show_preview(experiment, picture, pairs, number=number)


def _run_round_with_retries(experiment: Experiment, federation: Federation) -> dict[str, ReceivedUpdate]:
    """Run a round; as long as too few sites answer, wait for them to return and repeat it. They still have the state
    of the round before."""
    deadline = None
    while True:
        try:
            return run_round(experiment, federation.round_timeout)
        except QuorumError:
            deadline = deadline or time.monotonic() + federation.node_timeout
            if time.monotonic() >= deadline:
                raise
            time.sleep(min(RETRY_SECONDS, federation.node_timeout / 5))


def export(experiment: str | Path, out: str | Path) -> TrainedFactory:
    """Write the newest checkpoint of a run as a factory file.

    Args:
        experiment: experiment folder.
        out: factory file to write.

    Returns: the factory.
    Raises: UsageError if there is no experiment or no checkpoint yet; CheckpointError if the checkpoint is damaged.
    """
    folder = Path(experiment)
    RunState.load(folder)
    if not (folder / CHECKPOINT).is_file():
        raise UsageError(f"{folder}: no checkpoint yet; resume the run and choose this folder again afterwards")
    factory = load_factory(folder / CHECKPOINT)
    factory.save(out)
    return factory


def factory_of(experiment: Experiment) -> TrainedFactory:
    """The factory of an experiment that was run step by step, as in a notebook, with the moving average's weights.

    Args:
        experiment: an experiment of `factory_experiment` after at least one round.

    Raises: UsageError if no round has been run yet.
    """
    rounds = experiment.round_current()
    if not experiment.aggregator().ema:
        raise UsageError(f"the experiment has run {rounds} rounds and has no factory; run at least one round")
    generator, latest = _generators(experiment)
    replies = experiment.training_replies()
    site_updates = [
        ReceivedUpdate.from_dict({**reply["optimizer_args"], "node_name": node})
        for node, reply in replies[max(replies)].items()
    ]
    facts = FactoryFacts(rounds=rounds)
    return _assemble(experiment, site_updates, generator, latest=latest, history={}, facts=facts)


@torch.no_grad()
def save_preview(generator: Generator, path: Path, seed: int) -> np.ndarray:
    """Write a picture with one row per domain and one column per latent, columns at rising heights; if labels are
    drawn, each domain has a second row with their contours.

    Latents come from a random generator of their own: the previews of all rounds show the same latents, and the draws
    of the training do not change.

    Args:
        generator: generator in evaluation mode.
        path: PNG file to write.
        seed: seed of the latents.

    Returns: the picture, (rows * S, columns * S, 3) in [0, 1], see `shown_slice`; with labels S is larger, see
        `slice_with_contours`.
    """
    config = generator.config
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(PREVIEW_COLUMNS, config.latent_dim, generator=rng)
    height = torch.linspace(0, config.z_bins - 1, PREVIEW_COLUMNS)
    noise = generator.draw_noise(PREVIEW_COLUMNS, rng)
    rows = []
    for domain in range(len(config.domains)):
        style = generator.style_at(z, height, torch.full((PREVIEW_COLUMNS,), domain))
        made = generator.synthesise(style, noise)
        image = made.image.numpy()
        if made.labels is None:
            rows.append(np.concatenate([shown_slice(slice_, picture=config.pictures) for slice_ in image], axis=1))
            continue
        views = [
            slice_with_contours(slice_, label, picture=config.pictures)
            for slice_, label in zip(image, made.labels.argmax(dim=1).numpy(), strict=True)
        ]
        rows += [np.concatenate(row, axis=1) / 255 for row in zip(*views, strict=True)]
    picture = np.concatenate(rows)
    write_picture(path, (picture * 255).round().astype(np.uint8))
    return picture


def _generators(experiment: Experiment) -> tuple[Generator, dict[str, torch.Tensor]]:
    """The moving average of the generator in evaluation mode, and the newest weights by name."""
    generator = make_generator(experiment.aggregator().config)
    average = {k.removeprefix(GENERATOR): v.float() for k, v in experiment.aggregator().ema.items()}
    latest = {k: v.detach().clone() for k, v in experiment.training_plan().model().generator.state_dict().items()}
    generator.load_state_dict({**latest, **average})  # the fixed noise is not sent and has no average
    return generator.eval(), latest


def _assemble(
    experiment: Experiment,
    site_updates: Sequence[ReceivedUpdate],
    generator: Generator,
    *,
    latest: dict[str, torch.Tensor],
    history: dict[str, list[dict[str, float]]],
    facts: FactoryFacts,
) -> TrainedFactory:
    """A factory.

    Args:
        experiment: the experiment after its last round.
        site_updates: site updates of the last round.
        generator: moving average of the generator.
        latest: name to tensor, the newest weights of the generator, of the network's own shapes.
        history: domain to one row per site update.
        facts: record of the run for the factory's file.
    """
    # Sites agree on image size and height bins; spacing and height are medians over the sites.
    spacing = float(np.median([update.numbers["spacing"] for update in site_updates]))
    height = float(np.median([update.numbers["height"] for update in site_updates]))
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
