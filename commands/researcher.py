"""What the study lead types for phase one: train the factory with the sites, follow the run, write it as one file."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..common.files import refuse_existing, require_file
from ..common.json_text import read_json
from ..errors import UsageError
from ..generative.config import PRESETS, FactoryConfig
from ..node.connection.component import RESEARCHER, require_component
from ..node.plans.transport import TRANSPORTS
from ..researcher.node_selection import WEIGHTINGS, Federation
from .options import (
    ApprovalTimeout,
    FactoryOut,
    MinNodes,
    NodeTimeout,
    ProbeTimeout,
    Researcher,
    Rounds,
    RoundTimeout,
    Seed,
    Tag,
    UpdatesPerRound,
    listed,
    one_of,
)
from .terminal import Commands, console, print_alarms, print_checks, quiet_framework, require_one_of
from .watching import print_report, report, status, watch

if TYPE_CHECKING:
    from ..researcher.run_state import RunState

commands = Commands()
for command in (status, watch, report):
    commands.command()(command)

Experiment = Annotated[Path, typer.Argument(help="Experiment folder that `fedfactory train` writes.")]


@commands.command()
def check(
    researcher: Annotated[Path, typer.Argument(help="Folder of the Fed-BioMed researcher component.")],
    timeout: ProbeTimeout = 3,
) -> None:
    """Look at all that a researcher needs before nodes connect: certificate, port, proxies, versions, disk, clock.

    Nothing is changed. The exit code is 1 if there is a problem. Each site runs `fedfactory site check`.
    """
    from ..researcher.connection_check import check_researcher

    print_checks(check_researcher(researcher, timeout=timeout))


@commands.command()
def train(
    researcher: Researcher,
    out: Annotated[Path, typer.Option(help="Experiment folder: a new one, or with --resume that of the run.")],
    tag: Tag = "",
    domains: Annotated[str, typer.Option(help="Names of the sites' domains, separated by commas.")] = "",
    preset: Annotated[
        str, typer.Option(callback=one_of(PRESETS), help=f"Size of the factory: {listed(PRESETS)}.")
    ] = "tiny",
    config: Annotated[
        Path | None, typer.Option(help="JSON file with a factory configuration, in place of domains and preset.")
    ] = None,
    image_channels: Annotated[
        int | None, typer.Option(min=1, max=8, help="Channels of the sites' slices: 3 for pictures in colour.")
    ] = None,
    z_bins: Annotated[
        int | None, typer.Option(min=1, help="Number of height bins of the sites' slices: 1 for pictures.")
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Number of label values, background included, that the factory draws with the image; default: images "
            "alone, whose labels `fedfactory label` adds.",
        ),
    ] = None,
    pseudo_labels: Annotated[
        bool,
        typer.Option(
            "--pseudo-labels",
            help="With --classes: sites that have run `fedfactory pseudo-label` show their discriminators its labels "
            "where nobody annotated.",
        ),
    ] = False,
    turn: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of the slices that discriminators see turned by any angle."),
    ] = None,
    rounds: Rounds = 60,
    updates_per_round: UpdatesPerRound = 10,
    clip_weight: Annotated[
        float | None, typer.Option(min=0, help="Weight of the guidance by image embeddings.")
    ] = None,
    refine_rounds: Annotated[int, typer.Option(min=0, help="Number of rounds of refinement afterwards.")] = 0,
    refine_updates: Annotated[int, typer.Option(min=1, help="Optimizer steps in each round of refinement.")] = 200,
    refine_clip_weight: Annotated[float, typer.Option(min=0, help="Weight of the guidance in the refinement.")] = 50.0,
    nodes_per_round: Annotated[
        int | None, typer.Option(min=1, help="Number of nodes that train in a round, drawn at random; default: all.")
    ] = None,
    min_nodes: MinNodes = None,
    round_timeout: RoundTimeout = None,
    node_timeout: NodeTimeout = 60,
    approval_timeout: ApprovalTimeout = 0,
    leave_out: Annotated[
        bool, typer.Option("--leave-out", help="Continue without sites whose stores differ from the others'.")
    ] = False,
    weighting: Annotated[
        str, typer.Option(callback=one_of(WEIGHTINGS), help="Weight of a site: samples, or uniform (published).")
    ] = "samples",
    transport: Annotated[
        str,
        typer.Option(
            callback=one_of(TRANSPORTS),
            help="float32; float16 or int8 for a half or a quarter of the traffic from the sites.",
        ),
    ] = "float32",
    secagg: Annotated[bool, typer.Option("--secagg", help="Sum the sites' weights under encryption.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out with its own settings, apart from --min-nodes.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Train the factory with the nodes (phase one)."""
    if not resume:
        refuse_existing(out)
        chosen = {
            "clip_weight": clip_weight, "image_channels": image_channels, "z_bins": z_bins, "classes": classes,
            "turn": turn, "pseudo_labels": pseudo_labels or None,
        }  # fmt: skip
        factory = _factory_config(domains, preset, config, chosen)
        federation = Federation(
            tag=tag, min_nodes=min_nodes, node_timeout=node_timeout, approval_timeout=approval_timeout,
            round_timeout=round_timeout, nodes_per_round=nodes_per_round, leave_out=leave_out, weighting=weighting,
            transport=transport, secagg=secagg,
        )  # fmt: skip
    require_component(researcher, RESEARCHER)

    from ..researcher import training  # only now: slow to import
    from ..researcher.run_state import Stage

    quiet_framework()
    if resume:
        folder = training.resume(out, researcher=researcher, min_nodes=min_nodes, report_round=_print_round)
    else:
        stages = [Stage(rounds, updates_per_round)]
        if refine_rounds:
            stages.append(Stage(refine_rounds, refine_updates, refine_clip_weight))
        folder = training.train(
            factory, out, researcher=researcher, federation=federation, stages=stages, seed=seed,
            report_round=_print_round,
        )  # fmt: skip
    _print_end(folder)


def _factory_config(domains: str, preset: str, file: Path | None, chosen: Mapping[str, object]) -> FactoryConfig:
    """A configuration from domain names separated by commas and a preset, or from a JSON file, with what was chosen.

    Raises: UsageError if neither or both are given or the file cannot be read; ConfigError, see `FactoryConfig`.
    """
    require_one_of(domains=domains, config=file)
    changes = {name: value for name, value in chosen.items() if value is not None}
    if file is None:
        return FactoryConfig.preset(preset, tuple(name.strip() for name in domains.split(",")), **changes)
    try:
        return FactoryConfig.from_dict({**read_json(file), **changes})
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"{file}: not readable ({error}); choose a JSON file with a configuration") from None


def _print_round(state: RunState) -> None:
    """A line per round where the progress bar cannot be shown: in a log file."""
    if not sys.stderr.isatty():
        left = f"{state.seconds_left() / 60:.0f} min left"
        sites, last = len(state.site_updates), state.seconds[-1]
        print(f"round {state.round_done} of {state.rounds}, {sites} sites, {last:.1f} s, {left}", flush=True)


def _print_end(folder: Path) -> None:
    from ..researcher.run_state import RunState

    state = RunState.load(folder)
    print_alarms(state.alarms())
    if state.events:
        console.print(f"{len(state.events)} times a site did not count in a round: fedfactory status {folder}")
    print_report(folder)
    console.print(f"{folder}: {state.rounds} rounds; next: fedfactory export {folder} --out factory.safetensors")


@commands.command()
def export(experiment: Experiment, out: FactoryOut) -> None:
    """Write the trained factory as one file, with a JSON card."""
    from ..researcher.run_state import require_run

    require_run(experiment)

    from ..researcher.training import export as run  # only now: slow to import

    factory = run(experiment, out)
    console.print(f"{out}: domains {', '.join(factory.config.domains)}, {factory.facts.rounds} rounds")


@commands.command("import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="Weights of RobustMedSeg, such as final_global_model.pt.")],
    out: FactoryOut,
    domains: Annotated[
        str, typer.Option(help="Names of the domains by index, separated by commas; default: domain0,domain1,...")
    ] = "",
    z_bins: Annotated[int, typer.Option(min=1, help="Number of height bins of the training.")] = 29,
    spacing: Annotated[
        float, typer.Option(min=0.01, help="Millimetres per pixel, which such a file does not hold.")
    ] = 1.0,
    height: Annotated[float, typer.Option(min=0.01, help="Millimetres from the lowest to the highest bin.")] = 145.0,
) -> None:
    """Convert original RobustMedSeg weights to a factory file, without executing anything in the file."""
    names = tuple(name.strip() for name in domains.split(",")) if domains else ()
    if names:
        FactoryConfig(domains=names)  # refuses names that are empty or double before PyTorch is loaded

    require_file(checkpoint, "give a checkpoint of the published program")

    from ..generative.original_checkpoint import import_checkpoint as run  # only now: slow to import

    factory = run(checkpoint, domains=names, z_bins=z_bins, spacing=spacing, height=height)
    factory.save(out)
    config = factory.config
    scores = "with" if factory.discriminator else "without"
    console.print(
        f"{out}: {factory.facts.imported}, {config.image_size} px, domains {', '.join(config.domains)}, "
        f"{config.z_bins} height bins, {scores} discriminator"
    )
