"""`fedfactory ...`: parses, calls, prints; no logic."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from . import __version__
from .errors import FedFactoryError, UsageError
from .files import refuse_existing, write_json

if TYPE_CHECKING:
    from .node.prepare import Preparation
    from .researcher.segmentation import SegmentationResult

app = typer.Typer(
    help="Train a data factory across hospitals, draw labelled synthetic volumes, adapt a segmenter to each site.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
site = typer.Typer(help="Register data and approve plans at a node.", no_args_is_help=True)
app.add_typer(site, name="site")
console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
SOME_FAILED = 3  # exit code

Seed = Annotated[int, typer.Option(min=0, help="Repeats a run.")]


def main(arguments: list[str] | None = None) -> None:
    """Run a command; every error the user can act on becomes one line and an exit code."""
    command = typer.main.get_command(app)
    try:
        command.main(args=arguments, prog_name="fedfactory")
    except FedFactoryError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(f"{error.filename or 'file system'}: {error.strerror or error}", 1)


def _fail(message: str, code: int) -> None:
    errors.print(f"fedfactory: {message}", markup=False)
    sys.exit(code)


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(help="New folder for everything; default: fedfactory-demo-N.")] = None,
    sites: Annotated[int, typer.Option(min=2, max=3, help="Hospitals; the first one is labelled.")] = 3,
    seed: Seed = 0,
    preset: Annotated[str, typer.Option(help="Factory size: tiny (about 5 minutes) or small.")] = "tiny",
) -> None:
    """Both phases on this machine, with a report.

    Three real Fed-BioMed nodes and a researcher as local processes, simulated subjects, Dice tables.
    """
    with console.status("loading"):
        from .researcher.demo import run_demo

    result = run_demo(out, sites=sites, seed=seed, preset=preset)
    table = Table("site", "no adaptation", "augmentation only", "adapted", "oracle", title="mean foreground Dice")
    for name, row in result.dice.items():
        table.add_row(name, *(f"{row[k]:.3f}" for k in ("no_adaptation", "augmentation_only", "adapted", "oracle")))
    console.print(table)
    for what, path in result.files.items():
        console.print(f"{what:<18} {path}")
    console.print(f"{'seconds':<18} {result.seconds:.0f}")


@app.command()
def prepare(
    source: Annotated[
        Path, typer.Argument(help="SUBJECT/MODALITY/ folders, an nnU-Net data set, NIfTI files or DICOM folders.")
    ],
    out: Annotated[Path, typer.Option(help="Slice store, new or to be extended.")],
    domain: Annotated[str, typer.Option(help="Name of the scanner, modality or organ.")],
    size: Annotated[int, typer.Option(min=8, help="Pixels per side; the factory's image size.")] = 256,
    z_bins: Annotated[int, typer.Option(min=1, help="Height bins; as the factory's.")] = 29,
    spacing: Annotated[
        float | None, typer.Option(help="Millimetres per pixel; default: the median, or what the widest needs.")
    ] = None,
    slice_spacing: Annotated[
        float | None, typer.Option(help="Millimetres from slice to slice; default: as acquired.")
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="Another site's format.json: size, bins, spacing, plane as there.")
    ] = None,
    plane: Annotated[str, typer.Option(help="axial, coronal, sagittal, acquired (oblique stacks), stored.")] = "axial",
    crop: Annotated[str, typer.Option(help="air: cut it away first; none.")] = "air",
    compatibility: Annotated[str, typer.Option(help="published: as the published program did; none.")] = "none",
    image_key: Annotated[str, typer.Option(help="Modality folder of the images, or nnU-Net channel number.")] = "image",
    label_key: Annotated[str, typer.Option(help="Modality folder of the label maps or tables.")] = "label",
    label_kind: Annotated[
        str, typer.Option(help="dense, scribble, point, box, block, image, gaze, or none to leave labels out.")
    ] = "dense",
    unlabelled_value: Annotated[
        int | None, typer.Option(min=0, help="Sparse label maps: the value where nobody annotated.")
    ] = None,
    classes: Annotated[int | None, typer.Option(help="Label values with background; others are refused.")] = None,
    mask_key: Annotated[
        str | None, typer.Option(help="Modality folder of a brain or body mask: slices outside it are left out.")
    ] = None,
    mask_as_class: Annotated[
        bool, typer.Option("--mask-as-class", help="Label 1 is the mask, structures from 2.")
    ] = False,
    patient_pattern: Annotated[
        str | None, typer.Option(help="Regular expression for the patient in a case's name.")
    ] = None,
    validation_share: Annotated[float, typer.Option(min=0, max=0.9, help="Of the patients, held out.")] = 0.15,
    test_share: Annotated[float, typer.Option(min=0, max=0.9, help="Of the patients, held out.")] = 0.15,
    split: Annotated[str | None, typer.Option(help="All patients of this run are train, validation or test.")] = None,
    exclude: Annotated[Path | None, typer.Option(help="Text file with a case name in each line to leave out.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Volumes at once; default: one per core.")] = None,
    seed: Seed = 0,
) -> None:
    """Turn a site's volumes into a slice store. The store stays at the site.

    A second run adds what is new. Unusable cases are named and left out; then the exit code is 3.
    """
    from .files import read_lines
    from .node.prepare import prepare as run
    from .node.prepare_config import PrepareConfig

    config = PrepareConfig(
        domain=domain, size=size, z_bins=z_bins, spacing=spacing, slice_spacing=slice_spacing, plane=plane, crop=crop,
        compatibility=compatibility, image_key=image_key, label_key=label_key, mask_key=mask_key,
        mask_as_class=mask_as_class, label_kind=label_kind, unlabelled_value=unlabelled_value, classes=classes,
        patient_pattern=patient_pattern, validation_share=validation_share, test_share=test_share,
        exclude=tuple(read_lines(exclude)) if exclude else (), split=split,
        seed=seed,
    )  # fmt: skip
    result = run(source, out, config.like(like) if like else config, workers=workers or os.cpu_count() or 1)
    _report_preparation(out, result)


@app.command("import-slices")
def import_slices(
    source: Annotated[Path, typer.Argument(help="Folder with CASE_slice000.npy files of the published program.")],
    out: Annotated[Path, typer.Option(help="Slice store, new or to be extended.")],
    domain: Annotated[str, typer.Option(help="Name of the scanner, modality or organ.")],
    z_bins: Annotated[int, typer.Option(min=1, help="Height bins; as the factory's.")] = 29,
    spacing: Annotated[float, typer.Option(min=0.01, help="Millimetres per pixel; not in such files.")] = 1.0,
    slice_spacing: Annotated[float, typer.Option(min=0.01, help="Millimetres from slice to slice.")] = 1.0,
    patient_pattern: Annotated[
        str | None, typer.Option(help="Regular expression for the patient in a case's name.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Cases at once; default: one per core.")] = None,
    seed: Seed = 0,
) -> None:
    """Slices prepared by the published program as a store. Nothing in the pickled files is executed."""
    from .node.original_slices import import_slices as run
    from .node.prepare_config import PrepareConfig

    config = PrepareConfig(domain=domain, z_bins=z_bins, spacing=spacing, patient_pattern=patient_pattern, seed=seed)
    result = run(source, out, config, slice_spacing=slice_spacing, workers=workers or os.cpu_count() or 1)
    _report_preparation(out, result)


@app.command()
def embed(
    store: Annotated[Path, typer.Argument(help="Slice store made by `fedfactory prepare`.")],
    encoder: Annotated[str, typer.Option(help="open_clip architecture, local-dir:FOLDER, or timm:NAME.")],
    weights: Annotated[Path, typer.Option(help="Its weights, a local file.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Mean image embedding of a site, for factories that use CLIP. It stays at the site."""
    from .node.embedding import embed_store

    mean = embed_store(store, encoder=encoder, weights=weights, device=device)
    console.print(f"{store}: mean embedding of {len(mean)} numbers, length {float(mean.norm()):.3f}")


@app.command()
def gaze(
    store: Annotated[Path, typer.Argument(help="Slice store prepared with --label-kind gaze.")],
    sigma: Annotated[float, typer.Option(help="Blur of a fixation, as a share of the longer side.")] = 0.08,
    refine: Annotated[str, typer.Option(help="crf: drawn to the image's edges; none.")] = "crf",
    tight: Annotated[float, typer.Option(help="Above it, a pixel is the target.")] = 0.5,
    loose: Annotated[float, typer.Option(help="Below it, a pixel is background.")] = 0.3,
) -> None:
    """What a site's fixations say of its slices, for training with them. It stays at the site."""
    from .adaptation.gaze import GazeConfig
    from .node.gaze_maps import read_gaze

    facts = read_gaze(store, GazeConfig(sigma=sigma, refine=refine, tight=tight, loose=loose))
    if not facts["looked_at"]:
        console.print(f"{store}: none of {facts['slices']} slices was looked at long enough")
        return
    shares = f"{facts['target']:.1%} target, {facts['unsure']:.1%} may be"
    console.print(f"{store}: {facts['looked_at']} of {facts['slices']} slices were looked at; {shares}")


@app.command("weaken-labels")
def weaken_labels(
    source: Annotated[Path, typer.Argument(help="Data set with dense labels, as `prepare` reads it.")],
    out: Annotated[Path, typer.Option(help="New folder for the copy.")],
    kind: Annotated[str, typer.Option(help="point, scribble, block or box.")],
    label_key: Annotated[str, typer.Option(help="Modality folder of the label maps.")] = "label",
    seed: Seed = 0,
) -> None:
    """A copy of a data set with labels as an annotator with less time would leave them, for studies."""
    from .adaptation.weak_labels import weaken_folder

    count = weaken_folder(source, out, kind, label_key=label_key, seed=seed)
    unlabelled = "" if kind == "box" else " --unlabelled-value 255"
    console.print(f"{count} cases; next: fedfactory prepare {out} --label-kind {kind}{unlabelled} ...")


@site.command("add")
def site_add(
    node_dir: Annotated[Path, typer.Argument(help="Folder of the Fed-BioMed node.")],
    store: Annotated[Path, typer.Option(help="Slice store made by `fedfactory prepare`.")],
    tag: Annotated[str, typer.Option(help="Tag by which the researcher finds the data.")],
    network: Annotated[
        str, typer.Option(help="For hssf: the site's own, unet, dynunet or segresnet; default the researcher's.")
    ] = "",
    public: Annotated[
        Path | None, typer.Option(help="For hssf: slice store that researcher and all sites have.")
    ] = None,
    modality: Annotated[str, typer.Option(help="For cmc: modality of the store, the same word at all sites.")] = "",
    other: Annotated[
        list[str] | None, typer.Option(help="For cmc: MODALITY=STORE, a further store of this site.")
    ] = None,
) -> None:
    """Register a slice store with a Fed-BioMed node."""
    from .node.site_choices import SiteChoices
    from .node.sites import add_store

    _quiet_framework()
    others = {}
    for word in other or []:
        name, equals, path = word.partition("=")
        if not equals:
            raise UsageError(f"--other {word}: write MODALITY=STORE")
        others[name] = str(Path(path).resolve())
    shared = "" if public is None else str(public.resolve())
    add_store(node_dir, store, tag, SiteChoices(network=network, public=shared, modality=modality, others=others))
    console.print(f"{node_dir}: offers {store} under tag '{tag}'")


@site.command("approve")
def site_approve(
    node_dir: Annotated[Path, typer.Argument(help="Folder of the Fed-BioMed node.")],
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking; the source is still shown.")] = False,
    wait: Annotated[float, typer.Option(min=0, help="Seconds to wait for a plan to arrive.")] = 0,
    hashes: Annotated[
        bool, typer.Option("--hashes", help="List the SHA-256 of every module the plan may call.")
    ] = False,
) -> None:
    """Show the source of the training plans that wait at a node, and approve them."""
    from .node.sites import approve_plans, digest_of_all, package_fingerprint

    _quiet_framework()
    files = package_fingerprint()

    def confirm(name: str, source: str) -> bool:
        console.rule(name)
        console.print(source, markup=False)
        console.rule("the package it calls")
        summary = f"fedfactory {__version__}, {len(files)} modules, SHA-256 of all {digest_of_all(files)}"
        console.print(summary, markup=False)
        if hashes:
            for path, digest in files.items():
                console.print(f"{digest}  {path}", markup=False)
        return yes or typer.confirm("Approve this training plan?")

    approved = approve_plans(node_dir, confirm=confirm, wait=wait)
    console.print(f"{node_dir}: approved {', '.join(approved) or 'nothing; the plan goes on waiting'}")


@app.command()
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
        from .researcher.segmentation import train_method

        _quiet_framework()
        result = train_method(
            method, out, researcher=researcher, tag=tag, rounds=rounds, updates=updates_per_round,
            min_nodes=min_nodes or 1, node_timeout=node_timeout, approval_timeout=approval_timeout,
            round_timeout=round_timeout, batch_size=batch_size, width=width, norm=norm, mirror=mirror,
            rotation=math.radians(rotation), options=_pairs(option or []), public=public, seed=seed,
        )  # fmt: skip
        _print_scores(result)
        console.print(f"{out}: {rounds} rounds; every site keeps its segmenters beside its store")
        return
    from .researcher.training import Federation, RunState, Stage, factory_config
    from .researcher.training import resume as go_on
    from .researcher.training import train as run

    def report(state: RunState) -> None:
        if not sys.stderr.isatty():  # a log file has no bar, but lines
            left = f"{state.seconds_left() / 60:.0f} min left"
            sites, last = len(state.reports), state.seconds[-1]
            print(f"round {state.round_done} of {state.rounds}, {sites} sites, {last:.1f} s, {left}", flush=True)

    _quiet_framework()
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
    _print_alarms(state.alarms())
    if state.events:
        console.print(f"{len(state.events)} times a site did not count in a round: fedfactory status {folder}")
    console.print(f"{folder}: {state.rounds} rounds; next: fedfactory export {folder} --out factory.safetensors")


@app.command()
def methods() -> None:
    """The methods of federated segmentation, and what leaves a site with each."""
    from .adaptation.methods import METHODS

    table = Table("method", "", "")
    for name, kind in METHODS.items():
        table.add_row(f"[bold]{name}[/bold]", "for", kind.summary)
        table.add_row("", "leaves", kind.leaves)
        table.add_row("", "stays", kind.stays)
        table.add_row("", "needs", kind.needs)
        table.add_row("", "choose", f"when {kind.choose}", end_section=True)
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
    from .researcher.segmentation import score_table

    table = Table("site", "labels", "own Dice", "own HD95 (mm)", "average Dice", "average HD95 (mm)")
    for row in score_table(result):
        table.add_row(*row)
    console.print(table)


@app.command()
def status(
    experiment: Annotated[Path, typer.Argument(help="Folder that `fedfactory train` writes.")],
) -> None:
    """How far a run is, what its sites report, and which rounds went on without whom."""
    from .researcher.run_state import RunState

    state = RunState.load(experiment)
    left = f"about {state.seconds_left() / 60:.0f} min left" if state.round_done < state.rounds else "finished"
    console.print(f"{experiment}: round {state.round_done} of {state.rounds}, {left}", markup=False)
    terms = sorted({term for rows in state.history.values() for row in rows[-1:] for term in row if term != "round"})
    table = Table("domain", "rounds", *(term.removeprefix("loss_").replace("_", " ") for term in terms))
    for domain, rows in state.history.items():
        last = rows[-1] if rows else {}
        table.add_row(domain, str(len(rows)), *(f"{last[t]:.3g}" if t in last else "" for t in terms))
    console.print(table)
    for pair, score in (state.sharing[-1]["pairs"] if state.sharing else {}).items():
        console.print(f"anatomy shared by {pair}: {score:.2f} (0 is chance, 1 is all)", markup=False)
    _print_alarms(state.alarms())
    for event in state.events:
        console.print(f"round {event['round']}: {event['node']} {event['event']}: {event['reason']}", markup=False)


def _print_alarms(texts: list[str]) -> None:
    for text in texts:
        console.print(f"alarm: {text}; labels may not carry over there", style="bold red", markup=False)


@app.command()
def export(
    experiment: Annotated[Path, typer.Argument(help="Folder that `fedfactory train` wrote.")],
    out: Annotated[Path, typer.Option(help="Factory file, .safetensors.")],
) -> None:
    """The trained factory as one file, with a JSON card."""
    from .researcher.training import export as run

    factory = run(experiment, out)
    console.print(f"{out}: domains {', '.join(factory.config.domains)}, {factory.facts['rounds']} rounds")


@app.command("import-checkpoint")
def import_checkpoint(
    checkpoint: Annotated[Path, typer.Argument(help="RobustMedSeg weights, such as final_global_model.pt.")],
    out: Annotated[Path, typer.Option(help="Factory file, .safetensors.")],
    domains: Annotated[str, typer.Option(help="Names by index, with commas; default domain0,domain1,...")] = "",
    z_bins: Annotated[int, typer.Option(min=1, help="Height bins it was trained with.")] = 29,
    spacing: Annotated[float, typer.Option(min=0.01, help="Millimetres per pixel; not in such files.")] = 1.0,
    height: Annotated[float, typer.Option(min=0.01, help="Millimetres from lowest to highest bin.")] = 145.0,
) -> None:
    """Original RobustMedSeg weights as a factory file. Nothing in the file is executed."""
    from .generative.original_checkpoint import import_checkpoint as run

    names = tuple(name.strip() for name in domains.split(",")) if domains else ()
    factory = run(checkpoint, domains=names, z_bins=z_bins, spacing=spacing, height=height)
    factory.save(out)
    config = factory.config
    scores = "with" if factory.discriminator else "without"
    console.print(
        f"{out}: {factory.facts['imported']}, {config.image_size} px, domains {', '.join(config.domains)}, "
        f"{config.z_bins} height bins, {scores} discriminator"
    )


@app.command()
def label(
    factory: Annotated[Path, typer.Option(help="Exported factory.")],
    store: Annotated[Path, typer.Option(help="The site's slice store, with labels.")],
    out: Annotated[Path, typer.Option(help="Labelled factory file, .safetensors.")],
    classes: Annotated[int | None, typer.Option(help="Label values including background, to be checked.")] = None,
    labelling: Annotated[
        str, typer.Option(help="synthesis: a segmenter labels synthetic slices; inversion: own slices are inverted.")
    ] = "synthesis",
    seed: Seed = 0,
) -> None:
    """Labelled site: teach the factory to draw labels."""
    from .adaptation.segmenter_training import SegmenterConfig
    from .node.phase_two import label_factory

    config = SegmenterConfig(seed=seed)
    made = label_factory(factory, store, out, classes=classes, labelling=labelling, config=config)
    card = made.card
    console.print(f"{out}: {card['classes']} classes, Dice {card['agreement']:.3f} on {card['judged_on']}")


@app.command("generate-volumes")
def generate_volumes(
    factory: Annotated[Path | None, typer.Option(help="Labelled factory file.")] = None,
    ckpt_dir: Annotated[Path | None, typer.Option("--ckpt_dir", help="Folder that holds it, instead.")] = None,
    domain: Annotated[str | None, typer.Option(help="Domain to show.")] = None,
    label: Annotated[int | None, typer.Option("--label", min=0, help="Number of the domain, instead.")] = None,
    n_volumes: Annotated[int, typer.Option("--n_volumes", "--n-volumes", min=1, help="How many subjects.")] = 1,
    slices_in_one_z: Annotated[
        int, typer.Option("--slices_in_one_z", "--slices-in-one-z", min=1, help="Slices per height bin.")
    ] = 2,
    n_segmentation_labels: Annotated[
        int | None, typer.Option("--n_segmentation_labels", help="Classes, to be checked.")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out_dir", "--out", help="New folder.")] = None,
    clip_mean: Annotated[
        Path | None, typer.Option("--clip_mean", help="Mean embedding of the domain, an array file.")
    ] = None,
    z_depth: Annotated[int | None, typer.Option("--z_depth", help="Height bins to walk; default: all.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch_size", min=1, help="Not needed: groups of slices follow from the factory.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    n_domains: Annotated[int | None, typer.Option("--n_domains", help="Domains, to be checked.")] = None,
    remove_largest_components: Annotated[
        bool, typer.Option("--remove_largest_components", help="Keep only each class's largest part.")
    ] = False,
    layout: Annotated[
        str, typer.Option(help="nifti, nnunet (raw data set), slices, or legacy-slices (pickled).")
    ] = "nifti",
    truncation: Annotated[float, typer.Option(min=0, max=1, help="Below 1: fewer unusual subjects.")] = 1.0,
    least_share: Annotated[
        float, typer.Option(min=0, help="Of a volume's voxels that every class must have; others are drawn again.")
    ] = 0.0,
    between: Annotated[
        int, typer.Option(min=0, help="Volumes between every two subjects, on the way from one to the other.")
    ] = 0,
    only: Annotated[
        list[int] | None, typer.Option(min=0, help="Number of a volume to write; repeatable; default: all.")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Volumes at once; default: one per core.")] = None,
    seed: Seed = 0,
) -> None:
    """Draw labelled synthetic volumes.

    Writes volumes, their latents and a manifest. Underscored options are the original program's.
    """
    from .generate_volumes import Drawing, choose_factory
    from .generate_volumes import generate_volumes as run

    file, name = choose_factory(
        factory=factory, ckpt_dir=ckpt_dir, domain=domain, label=label, classes=n_segmentation_labels,
        domains=n_domains, clip_mean=clip_mean,
    )  # fmt: skip
    if out_dir is None:
        raise UsageError("give the new folder with --out_dir")
    drawing = Drawing(
        domain=name, volumes=n_volumes, slices_per_bin=slices_in_one_z, z_depth=z_depth,
        largest_component=remove_largest_components, truncation=truncation, least_share=least_share, between=between,
        seed=seed,
    )  # fmt: skip
    workers = workers or (os.cpu_count() or 1 if device == "cpu" else 1)
    names = run(
        file, out_dir, drawing, layout=layout, only=only or None, workers=workers, device=device, clip_mean=clip_mean
    )
    console.print(f"{out_dir}: {len(names)} labelled volumes of domain {name}")


@app.command()
def audit(
    factory: Annotated[Path, typer.Option(help="Labelled factory file.")],
    store: Annotated[Path, typer.Option(help="The site's slice store, with patients held out.")],
    out: Annotated[Path, typer.Option(help="New folder: audit.html stays at the site, audit.json holds numbers.")],
    held_out: Annotated[
        Path | None, typer.Option(help="Another store: patients of the site that never trained.")
    ] = None,
    volumes: Annotated[int, typer.Option(min=2, help="Synthetic subjects to draw.")] = 40,
    encoder: Annotated[str, typer.Option(help="Feature extractor: open_clip name, local-dir:FOLDER, timm:NAME.")] = "",
    weights: Annotated[Path | None, typer.Option(help="Its weights, a local file; default: random filters.")] = None,
    seed: Seed = 0,
) -> None:
    """How good synthetic slices are, and whether they give patients away. Run where the real images are."""
    from .generative.image_encoder import load_image_encoder
    from .generative.quality import random_features
    from .node.audit import audit_factory

    if bool(encoder) != (weights is not None):
        raise UsageError("--encoder and --weights go together")
    features = load_image_encoder(encoder, weights) if encoder else random_features
    made = audit_factory(factory, store, out, held_out_dir=held_out, volumes=volumes, features=features, seed=seed)
    for text in made.findings:
        console.print(f"finding: {text}", style="bold red", markup=False)
    console.print(f"{out}: {len(made.findings)} findings; look at audit.html with your own eyes")


@app.command()
def adapt(
    store: Annotated[Path, typer.Option(help="The site's own slice store; labels are not needed.")],
    out: Annotated[Path, typer.Option(help="Segmenter file, .safetensors.")],
    factory: Annotated[Path | None, typer.Option(help="Labelled factory to draw from, or ...")] = None,
    synthetic: Annotated[Path | None, typer.Option(help="... volumes made by generate-volumes.")] = None,
    engine: Annotated[str, typer.Option(help="segmenter, or translator (published; needs the factory).")] = "segmenter",
    network: Annotated[
        str, typer.Option(help="Of the segmenter: unet, dynunet, segresnet, or one of these with 3d behind it.")
    ] = "unet",
    updates: Annotated[int | None, typer.Option(min=1, help="Training steps; default: as the engine needs.")] = None,
    volumes: Annotated[int, typer.Option(min=1, help="Synthetic subjects to draw from the factory.")] = 90,
    one_target_slice: Annotated[
        bool, typer.Option("--one-target-slice", help="Learn also from one labelled slice of each labelled case.")
    ] = False,
    self_training: Annotated[
        float, typer.Option(min=0, help="Weight of a mean teacher's labels of the site's own slices.")
    ] = 0.0,
    keep: Annotated[
        int, typer.Option(min=1, help="Best states to keep, for an ensemble; judged by synthetic slices.")
    ] = 1,
    patience: Annotated[int, typer.Option(min=0, help="Stop after so many looks without a better state.")] = 0,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    work: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard curves; an interrupted run goes on from there.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Phase two: train the site's own segmenter."""
    from .adaptation.segmenter_training import SegmenterConfig
    from .adaptation.translator import TranslatorConfig
    from .node.site_adaptation import Adaptation, adapt_site

    given = {"seed": seed, **({"updates": updates} if updates else {})}
    adaptation = Adaptation(
        engine=engine,
        segmenter=SegmenterConfig(network=network, self_training=self_training, precision=precision, **given),
        translator=TranslatorConfig(**given),
        volumes=volumes,
        one_target_slice=one_target_slice,
        keep=keep,
        patience=patience,
    )
    made = adapt_site(
        store, out, factory_file=factory, synthetic=synthetic, adaptation=adaptation, work=work, device=device
    )
    card = made.card
    console.print(f"{out}: {card['config']['network']} for {card['domain']}, from {card['slices']} slices")
    _print_alarms(card.get("alarms", []))


@app.command("adapt-remote")
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
    from .adaptation.segmenter_training import SegmenterConfig
    from .adaptation.translator import TranslatorConfig
    from .node.site_adaptation import Adaptation
    from .researcher.remote_adaptation import adapt_remotely

    refuse_existing(out)
    _quiet_framework()
    given = {"seed": seed, **({"updates": updates} if updates else {})}
    adaptation = Adaptation(
        engine=engine, segmenter=SegmenterConfig(network=network, **given), translator=TranslatorConfig(**given),
        volumes=volumes, one_target_slice=one_target_slice,
    )  # fmt: skip
    reports = adapt_remotely(
        factory, researcher=researcher, tag=tag, domains=domain, adaptation=adaptation, node_timeout=node_timeout,
        approval_timeout=approval_timeout, round_timeout=round_timeout,
    )  # fmt: skip
    write_json(out, reports)
    for name, report in reports.items():
        alarmed = f", {report['alarms']} alarms" if report["alarms"] else ""
        console.print(f"{name}: a segmenter from {report['slices']} own slices{alarmed}; it is kept there")


@app.command()
def segment(
    images: Annotated[list[Path], typer.Argument(help="NIfTI images, DICOM folders, or whole data sets.")],
    model: Annotated[list[Path], typer.Option("--model", "--ensemble", help="Segmenter file; several are averaged.")],
    out: Annotated[Path, typer.Option(help="New folder for the label maps.")],
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write those too.")] = False,
    pictures: Annotated[bool, typer.Option("--pictures", help="Write slices with labels as PNG.")] = False,
    flips: Annotated[bool, typer.Option("--flips", help="Average with the mirrored image.")] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Label maps of new images, on their own grid."""
    from .adaptation.inference import Outputs
    from .adaptation.inference import segment as run

    for path in run(images, model, out, outputs=Outputs(probabilities, pictures, flips), device=device):
        console.print(str(path), markup=False)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Label map, or folder of label maps.")],
    references: Annotated[Path, typer.Argument(help="The same, or CASE/label/*.nii.gz.")],
    out: Annotated[Path, typer.Option(help="CSV file.")],
) -> None:
    """Score label maps against references.

    Dice, 95 % Hausdorff distance, mean surface distance and volume error, per case and class; a page beside the CSV
    file has means, intervals and the worst cases.
    """
    from .adaptation.evaluation import evaluate as run
    from .adaptation.evaluation import mean_dice

    scores = run(predictions, references, out)
    console.print(f"{out}: {len({s.case for s in scores})} cases, mean foreground Dice {mean_dice(scores):.3f}")


def _quiet_framework() -> None:
    """Fed-BioMed's log stays in its own files; on the terminal only errors."""
    from fedbiomed.common.logger import logger

    logger.setLevel("ERROR")


def _report_preparation(out: Path, result: Preparation) -> None:
    """What became of the cases; exits with 3 if some could not be used."""
    store = result.store
    labelled = sum(case.labelled for case in store.cases)
    text = f"{out}: {len(store.cases)} cases, {labelled} labelled, {len(store)} slices of {store.format.size} px"
    console.print(text, markup=False)
    console.print(
        f"{result.added} added, {result.replaced} replaced, {result.unchanged} unchanged, {result.kept} kept; "
        f"look at {out / 'quality.html'}", markup=False,
    )  # fmt: skip
    for warning in store.warnings:
        console.print(f"warning: {warning}", markup=False)
    if result.failed:
        for name, reason in result.failed.items():
            errors.print(f"not used: {name}: {reason}", markup=False)
        _fail(f"{len(result.failed)} cases could not be used; the store holds the others", SOME_FAILED)
