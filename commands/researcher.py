"""What the study's lead types: training with the sites, looking at it, the factory as a file."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ..common.files import refuse_existing, write_json
from ..errors import UsageError
from .terminal import Seed, console, print_alarms, quiet_framework

if TYPE_CHECKING:
    from ..researcher.segmentation import SegmentationResult


commands = typer.Typer()


@commands.command()
def train(
    researcher: Annotated[Path, typer.Option(help="Folder of the Fed-BioMed researcher.")],
    out: Annotated[Path, typer.Option(help="Experiment folder; new, but for --resume.")],
    tag: Annotated[str, typer.Option(help="Tag of the sites' data.")] = "",
    domains: Annotated[str, typer.Option(help="The sites' domain names, with commas between them.")] = "",
    preset: Annotated[str, typer.Option(help="tiny, small or paper.")] = "tiny",
    config: Annotated[Path | None, typer.Option(help="JSON file with a factory configuration, instead.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often the generators are averaged.")] = 60,
    updates_per_round: Annotated[int, typer.Option(min=1, help="Local updates in between.")] = 10,
    clip_weight: Annotated[
        float | None, typer.Option(min=0, help="Weight of the guidance by image embeddings.")
    ] = None,
    refine_rounds: Annotated[int, typer.Option(min=0, help="Rounds of refinement afterwards.")] = 0,
    refine_updates: Annotated[int, typer.Option(min=1, help="Local updates in a round of refinement.")] = 200,
    refine_clip_weight: Annotated[float, typer.Option(min=0, help="Weight of the guidance then.")] = 50.0,
    nodes_per_round: Annotated[
        int | None, typer.Option(min=1, help="Nodes a round asks, drawn at random; default: all.")
    ] = None,
    min_nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Nodes to wait for, and answers a round needs; default: one per domain, 2."),
    ] = None,
    round_timeout: Annotated[
        float | None, typer.Option(min=0, help="Seconds after which a round goes on without the late.")
    ] = None,
    node_timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for nodes.")] = 60,
    approval_timeout: Annotated[float, typer.Option(min=0, help="Seconds to wait for the sites' approval.")] = 0,
    leave_out: Annotated[bool, typer.Option("--leave-out", help="Go on without sites that do not agree.")] = False,
    weighting: Annotated[str, typer.Option(help="samples, or uniform as published.")] = "samples",
    transport: Annotated[
        str, typer.Option(help="float32, or float16 for half of the traffic from the sites.")
    ] = "float32",
    secagg: Annotated[bool, typer.Option("--secagg", help="Sum the sites' weights encrypted.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out, with its settings.")] = False,
    method: Annotated[
        str | None,
        typer.Option(help="Train a segmenter instead, see `fedfactory methods`; size and classes are the sites'."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --method: slices in an update.")] = 12,
    width: Annotated[int, typer.Option(min=4, help="With --method: channels of the first level.")] = 16,
    norm: Annotated[str, typer.Option(help="With --method: group, or batch as some were published.")] = "group",
    rotation: Annotated[
        float,
        typer.Option(min=0, help="With --method: largest random angle, degrees; 180 for scans without orientation."),
    ] = 8.6,
    mirror: Annotated[bool, typer.Option(help="With --method: random flips, for symmetric organs.")] = True,
    option: Annotated[
        list[str] | None, typer.Option(help="With --method: NAME=VALUE of the method's own settings; may be repeated.")
    ] = None,
    public: Annotated[
        Path | None, typer.Option(help="With --method hssf: slice store that all sites have too.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Phase one: train the factory with the nodes. With --method: a federated segmentation."""
    if method is not None:
        from ..researcher.node_selection import NodeSelection
        from ..researcher.segmentation import train_method

        quiet_framework()
        selected = NodeSelection(
            tag=tag, min_nodes=min_nodes, node_timeout=node_timeout, approval_timeout=approval_timeout,
            round_timeout=round_timeout,
        )  # fmt: skip
        result = train_method(
            method, out, researcher=researcher, nodes=selected, rounds=rounds,
            updates=updates_per_round, batch_size=batch_size, width=width, norm=norm, mirror=mirror,
            rotation=math.radians(rotation), options=_pairs(option or []), public=public, seed=seed,
        )  # fmt: skip
        _print_scores(result)
        console.print(f"{out}: {rounds} rounds; every site keeps its segmenters beside its store")
        return
    from ..researcher.node_selection import Federation
    from ..researcher.run_state import RunState, Stage
    from ..researcher.training import factory_config
    from ..researcher.training import resume as go_on
    from ..researcher.training import train as run

    def report(state: RunState) -> None:
        if not sys.stderr.isatty():  # a log file has no bar, but lines
            left = f"{state.seconds_left() / 60:.0f} min left"
            sites, last = len(state.site_updates), state.seconds[-1]
            print(f"round {state.round_done} of {state.rounds}, {sites} sites, {last:.1f} s, {left}", flush=True)

    quiet_framework()
    if resume:
        folder = go_on(out, researcher=researcher, report_round=report)
    else:
        stages = [Stage(rounds, updates_per_round)]
        if refine_rounds:
            stages.append(Stage(refine_rounds, refine_updates, refine_clip_weight))
        federation = Federation(
            tag=tag, min_nodes=min_nodes, nodes_per_round=nodes_per_round, round_timeout=round_timeout,
            node_timeout=node_timeout, approval_timeout=approval_timeout, leave_out=leave_out, weighting=weighting,
            transport=transport, secagg=secagg,
        )  # fmt: skip
        chosen = factory_config(domains, preset, config, clip_weight=clip_weight)
        folder = run(
            chosen, out, researcher=researcher, federation=federation, stages=stages, seed=seed, report_round=report
        )
    state = RunState.load(folder)
    print_alarms(state.alarms())
    if state.events:
        console.print(f"{len(state.events)} times a site did not count in a round: fedfactory status {folder}")
    console.print(f"{folder}: {state.rounds} rounds; next: fedfactory export {folder} --out factory.safetensors")


@commands.command()
def methods() -> None:
    """The methods of federated segmentation, and what leaves a site with each."""
    from ..adaptation.methods.catalogue import METHOD_CATALOGUE

    table = Table("method", "", "")
    for name, description in METHOD_CATALOGUE.items():
        table.add_row(f"[bold]{name}[/bold]", "for", description.summary)
        table.add_row("", "leaves", description.leaves)
        table.add_row("", "stays", description.stays)
        table.add_row("", "needs", description.needs)
        table.add_row("", "choose", f"when {description.choose}", end_section=True)
    console.print(table)


def _pairs(words: list[str]) -> dict[str, object]:
    """NAME=VALUE as JSON values where they are such, as text otherwise."""
    found: dict[str, object] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"--option {word}: write NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _print_scores(result: SegmentationResult) -> None:
    from ..researcher.segmentation import score_table

    table = Table("site", "labels", "own Dice", "own HD95 (mm)", "average Dice", "average HD95 (mm)")
    for row in score_table(result):
        table.add_row(*row)
    console.print(table)


@commands.command()
def status(
    experiment: Annotated[Path, typer.Argument(help="Folder that `fedfactory train` writes.")],
) -> None:
    """How far a run is, what its sites report, and which rounds went on without whom."""
    from ..researcher.run_state import RunState

    state = RunState.load(experiment)
    left = f"about {state.seconds_left() / 60:.0f} min left" if state.round_done < state.rounds else "finished"
    console.print(f"{experiment}: round {state.round_done} of {state.rounds}, {left}", markup=False)
    terms = sorted({term for rows in state.history.values() for row in rows[-1:] for term in row if term != "round"})
    table = Table("domain", "rounds", *(term.removeprefix("loss_").replace("_", " ") for term in terms))
    for domain, rows in state.history.items():
        last = rows[-1] if rows else {}
        table.add_row(domain, str(len(rows)), *(f"{last[t]:.3g}" if t in last else "" for t in terms))
    console.print(table)
    for pair, score in (state.shared_anatomy[-1].pairs if state.shared_anatomy else {}).items():
        console.print(f"anatomy shared by {pair}: {score:.2f} (0 is chance, 1 is all)", markup=False)
    print_alarms(state.alarms())
    for event in state.events:
        console.print(f"round {event.round}: {event.node} {event.kind}: {event.reason}", markup=False)


@commands.command()
def export(
    experiment: Annotated[Path, typer.Argument(help="Folder that `fedfactory train` wrote.")],
    out: Annotated[Path, typer.Option(help="Factory file, .safetensors.")],
) -> None:
    """The trained factory as one file, with a JSON card."""
    from ..researcher.training import export as run

    factory = run(experiment, out)
    console.print(f"{out}: domains {', '.join(factory.config.domains)}, {factory.facts.rounds} rounds")


@commands.command("import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="RobustMedSeg weights, such as final_global_model.pt.")],
    out: Annotated[Path, typer.Option(help="Factory file, .safetensors.")],
    domains: Annotated[str, typer.Option(help="Names by index, with commas; default domain0,domain1,...")] = "",
    z_bins: Annotated[int, typer.Option(min=1, help="Height bins it was trained with.")] = 29,
    spacing: Annotated[float, typer.Option(min=0.01, help="Millimetres per pixel; not in such files.")] = 1.0,
    height: Annotated[float, typer.Option(min=0.01, help="Millimetres from lowest to highest bin.")] = 145.0,
) -> None:
    """Original RobustMedSeg weights as a factory file. Nothing in the file is executed."""
    from ..generative.original_checkpoint import import_checkpoint as run

    names = tuple(name.strip() for name in domains.split(",")) if domains else ()
    factory = run(checkpoint, domains=names, z_bins=z_bins, spacing=spacing, height=height)
    factory.save(out)
    config = factory.config
    scores = "with" if factory.discriminator else "without"
    console.print(
        f"{out}: {factory.facts.imported}, {config.image_size} px, domains {', '.join(config.domains)}, "
        f"{config.z_bins} height bins, {scores} discriminator"
    )


@commands.command("adapt-remote")
def adapt_remote(
    factory: Annotated[Path, typer.Option(help="Labelled factory; its weights travel to the sites.")],
    researcher: Annotated[Path, typer.Option(help="Fed-BioMed researcher component.")],
    tag: Annotated[str, typer.Option(help="Tag of the sites' data.")],
    out: Annotated[Path, typer.Option(help="JSON file for what the sites report.")],
    domain: Annotated[
        list[str] | None, typer.Option(help="Whose site adapts; repeatable; default: all that are connected.")
    ] = None,
    engine: Annotated[str, typer.Option(help="segmenter or translator.")] = "segmenter",
    network: Annotated[str, typer.Option(help="Of the segmenter, as for `adapt`.")] = "unet",
    updates: Annotated[int | None, typer.Option(min=1, help="Training steps; default: as the engine needs.")] = None,
    volumes: Annotated[int, typer.Option(min=1, help="Synthetic subjects that a site draws.")] = 90,
    one_target_slice: Annotated[
        bool, typer.Option("--one-target-slice", help="Learn also from one labelled slice of each labelled case.")
    ] = False,
    node_timeout: Annotated[float, typer.Option(help="Seconds to wait for the sites' nodes.")] = 60,
    approval_timeout: Annotated[float, typer.Option(help="Seconds to wait for the sites' approval.")] = 0,
    round_timeout: Annotated[float | None, typer.Option(help="Seconds to wait for the sites' reports.")] = None,
    seed: Seed = 0,
) -> None:
    """Phase two at sites that a researcher reaches by Fed-BioMed alone; each keeps its segmenter."""
    from ..adaptation.training.segmenter_training import SegmenterConfig
    from ..adaptation.training.translator_training import TranslatorConfig
    from ..node.site_adaptation import Adaptation
    from ..researcher.node_selection import NodeSelection
    from ..researcher.remote_adaptation import adapt_remotely

    refuse_existing(out)
    quiet_framework()
    given = {"seed": seed, **({"updates": updates} if updates else {})}
    adaptation = Adaptation(
        engine=engine, segmenter=SegmenterConfig(network=network, **given), translator=TranslatorConfig(**given),
        volumes=volumes, one_target_slice=one_target_slice,
    )  # fmt: skip
    nodes = NodeSelection(
        tag=tag, node_timeout=node_timeout, approval_timeout=approval_timeout, round_timeout=round_timeout
    )
    site_updates = adapt_remotely(factory, researcher=researcher, nodes=nodes, domains=domain, adaptation=adaptation)
    write_json(out, {name: {"domain": update.domain, **update.numbers} for name, update in site_updates.items()})
    for name, update in site_updates.items():
        alarms, slices = update.numbers["alarms"], update.numbers["slices"]
        alarmed = f", {alarms} alarms" if alarms else ""
        console.print(f"{name}: a segmenter from {slices} own slices{alarmed}; it is kept there")
