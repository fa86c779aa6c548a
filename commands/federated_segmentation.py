"""What the study lead types for segmenters that sites train: federated methods, and adaptation at distant sites."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from ..adaptation.engine.segmenter_config import SegmenterConfig
from ..adaptation.methods.catalogue import METHOD_CATALOGUE, describe
from ..common.files import refuse_existing, require_weights, write_json
from ..errors import UsageError
from ..node.connection.component import RESEARCHER, require_component
from ..node.store_index import require_store
from ..researcher.node_selection import NodeSelection
from .options import (
    ApprovalTimeout,
    Depth,
    Engine,
    LabelledFactoryFile,
    LearningRate,
    MinNodes,
    Network,
    NetworkSize,
    NodeTimeout,
    OneTargetSlice,
    Researcher,
    Rotation,
    Rounds,
    RoundTimeout,
    Seed,
    Tag,
    Updates,
    UpdatesPerRound,
    Volumes,
    more_than,
    radians,
)
from .sites import sites
from .terminal import Commands, console, key_and_value, quiet_framework
from .watching import print_report

if TYPE_CHECKING:
    from ..researcher.segmentation import SegmentationResult

AUTO = "auto"
commands = Commands()
commands.command("sites")(sites)


@commands.command()
def methods() -> None:
    """List the methods of federated segmentation, and what leaves a site with each."""
    table = Table("method", "", "")
    for name, description in METHOD_CATALOGUE.items():
        table.add_row(Text(name, style="bold"), "for", description.summary)
        table.add_row("", "leaves", description.leaves)
        table.add_row("", "stays", description.stays)
        table.add_row("", "needs", description.needs)
        table.add_row("", "choose", f"when {description.choose}", end_section=True)
    console.print(table)


@commands.command("train-segmenter")
def train_segmenter(
    method: Annotated[str, typer.Option(help="Name of the method, see `fedfactory methods`.")],
    researcher: Researcher,
    tag: Tag,
    out: Annotated[
        Path,
        typer.Option(help="New folder for scores, history and averaged weights, or with --resume that of the run."),
    ],
    rounds: Rounds = 60,
    updates_per_round: UpdatesPerRound = 10,
    min_nodes: MinNodes = None,
    round_timeout: RoundTimeout = None,
    node_timeout: NodeTimeout = 60,
    approval_timeout: ApprovalTimeout = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Number of slices in an optimizer step.")] = 12,
    width: Annotated[int, typer.Option(min=4, help="Channels of the network's first level, a multiple of 4.")] = 16,
    depth: Depth = None,
    learning_rate: LearningRate = None,
    norm: Annotated[
        str, typer.Option(help="Normalisation layers: instance, group, or batch as in some of the publications.")
    ] = "instance",
    rotation: Annotated[
        float,
        typer.Option(min=0, help="Largest random rotation in degrees; 180 for scans without a common orientation."),
    ] = 8.6,
    mirror: Annotated[
        bool, typer.Option(help="Random left-right flips; not for organs with a left and a right.")
    ] = True,
    first_guess: Annotated[
        bool,
        typer.Option(
            "--first-guess",
            help="Random contrast, for a segmenter that works at sites of other contrast: see `label --first-guess`.",
        ),
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a setting of the method itself; may be repeated.")
    ] = None,
    dp_epsilon: Annotated[
        float | None,
        typer.Option(help="Differential privacy per training patient; no losses and scores leave the sites then."),
    ] = None,
    dp_delta: Annotated[
        str, typer.Option(help="Delta of differential privacy; auto: 1 / (10 x training patients) of each site.")
    ] = AUTO,
    dp_clip: Annotated[
        float | None,
        typer.Option(callback=more_than(0), help="Largest norm of a patient's gradient, with --dp-epsilon; default 1."),
    ] = None,
    public: Annotated[Path | None, typer.Option(help="For hssf and lssl: slice store that all sites have too.")] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=2, help="Number of label values, background included; only if some sites lack the last structures."
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the interrupted run in --out; all but --min-nodes must be as it began."
        ),
    ] = False,
    seed: Seed = 0,
) -> None:
    """Train segmenters at the sites by a federated method; `fedfactory sites` shows which methods fit.

    Size of the slices and number of classes are those of the sites' stores.
    """
    description = describe(method)
    if public is not None and not description.needs_public:
        raise UsageError(f"public is '{public}', but {method} uses no public slices; it must be left out")
    if public is None and description.needs_public:
        raise UsageError(f"public is missing; {method} needs a slice store that all sites have, too")
    options = _options(option or [])
    privacy = _privacy(method, norm, epsilon=dp_epsilon, delta=dp_delta, clip=dp_clip)
    nodes = NodeSelection(
        tag=tag, min_nodes=min_nodes, node_timeout=node_timeout, approval_timeout=approval_timeout,
        round_timeout=round_timeout,
    )  # fmt: skip
    if not resume:
        refuse_existing(out)

    require_component(researcher, RESEARCHER)
    require_store(public)

    from ..researcher.segmentation import train_method  # only now: slow to import

    quiet_framework()
    number = {} if classes is None else {"classes": classes}
    result = train_method(
        method, out, researcher=researcher, nodes=nodes, rounds=rounds, updates=updates_per_round,
        batch_size=batch_size, width=width, depth=depth, learning_rate=learning_rate, norm=norm, mirror=mirror,
        rotation=math.radians(rotation), first_guess=first_guess, options=options, public=public, seed=seed,
        resume=resume, **number, **privacy,
    )  # fmt: skip
    print_scores(result)
    print_report(out)
    console.print(f"{out}: {rounds} rounds; the segmenters of every site are beside its store")


@commands.command("adapt-remote")
def adapt_remote(
    factory_file: LabelledFactoryFile,
    researcher: Researcher,
    tag: Tag,
    out: Annotated[Path, typer.Option(help="JSON file for the sites' reports.")],
    domains: Annotated[
        list[str] | None,
        typer.Option("--domain", help="Domain of a site that adapts; may be repeated; default: all connected sites."),
    ] = None,
    engine: Engine = "segmenter",
    network: Network = "dynunet",
    network_size: NetworkSize = "standard",
    updates: Updates = None,
    rotation: Rotation = None,
    volumes: Volumes = 90,
    one_target_slice: OneTargetSlice = False,
    node_timeout: NodeTimeout = 60,
    approval_timeout: ApprovalTimeout = 0,
    round_timeout: RoundTimeout = None,
    seed: Seed = 0,
) -> None:
    """Let sites adapt that only Fed-BioMed reaches (phase two); each site's segmenter stays there."""
    nodes = NodeSelection(
        tag=tag, node_timeout=node_timeout, approval_timeout=approval_timeout, round_timeout=round_timeout
    )
    refuse_existing(out)
    config = SegmenterConfig(
        network=network, network_size=network_size, updates=updates, rotation=radians(rotation), seed=seed
    )

    require_weights(factory_file, "labelled factory")
    require_component(researcher, RESEARCHER)

    from ..adaptation.training.translator_training import TranslatorConfig  # only now: slow to import
    from ..node.site_adaptation import Adaptation
    from ..researcher.remote_adaptation import adapt_remotely

    quiet_framework()
    translator = TranslatorConfig(seed=seed, **({"updates": updates} if updates else {}))
    adaptation = Adaptation(
        engine=engine, segmenter=config, translator=translator, volumes=volumes, one_target_slice=one_target_slice
    )
    site_updates = adapt_remotely(
        factory_file, researcher=researcher, nodes=nodes, domains=domains, adaptation=adaptation
    )
    write_json(out, {name: {"domain": update.domain, **update.numbers} for name, update in site_updates.items()})
    for name, update in site_updates.items():
        alarms, slices = update.numbers["alarms"], update.numbers["slices"]
        alarmed = f", {alarms} alarms" if alarms else ""
        console.print(f"{name}: a segmenter from {slices} own slices{alarmed}; it stays there")


def _privacy(method: str, norm: str, *, epsilon: float | None, delta: str, clip: float | None) -> dict[str, float]:
    """Settings of differential privacy for `MethodConfig`, which is asked at once whether it takes them; none without.

    Raises: ConfigError if it does not, UsageError for a delta that is no number and for settings without epsilon.
    """
    try:
        settings = {"dp_epsilon": epsilon, "dp_delta": None if delta == AUTO else float(delta), "dp_clip": clip}
    except ValueError:
        raise UsageError(f"dp_delta is '{delta}'; it must be a number, or {AUTO}") from None
    given = {name: value for name, value in settings.items() if value is not None}
    if given and epsilon is None:
        raise UsageError(f"{', '.join(given)} without dp_epsilon has no effect; it must be left out")
    if given:
        from ..adaptation.methods.interface.method_config import MethodConfig  # only now: slow to import

        MethodConfig(method=method, norm=norm, classes=2, size=32, sites=1, rounds=1, **given)
    return given


def _options(words: list[str]) -> dict[str, object]:
    """Settings typed as NAME=VALUE: the value of JSON where it is valid JSON, text otherwise."""
    found: dict[str, object] = {}
    for word in words:
        name, value = key_and_value("option", word, "NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def print_scores(result: SegmentationResult) -> None:
    """Show the table of a run: scores, or privacy spent."""
    from ..researcher.segmentation import score_headings, score_table

    caption = "epsilon is per training patient" if result.config.private else "HD95 is in mm, of pictures in pixels"
    table = Table(*score_headings(result), caption=caption)
    for row in score_table(result):
        table.add_row(*row)
    console.print(table)
