"""What a site types for its segmenter: plan, adapt, segment, evaluate."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from ..adaptation.engine.segmenter_config import SegmenterConfig
from ..common.files import (
    refuse_existing,
    require_file_or_folder,
    require_folder,
    require_weights,
    write_json,
)
from ..errors import UsageError
from ..node.store_index import require_store
from .options import (
    BatchSize,
    Centres,
    Depth,
    Device,
    Engine,
    Frames,
    ImageKey,
    LabelValuesOption,
    LearningRate,
    LocaliserFile,
    MaskColours,
    Memory,
    Minutes,
    MissingChannels,
    Nan,
    Network,
    NetworkSize,
    OneTargetSlice,
    PatientPattern,
    Precision,
    Rotation,
    Seed,
    Series,
    Updates,
    Volumes,
    Width,
    centre_source,
    label_values_of,
    radians,
)
from .terminal import SOME_FAILED, Commands, console, errors, fail, print_alarms, print_unused, require_one_of

commands = Commands()

SegmenterOut = Annotated[Path, typer.Option(help="Segmenter file to write, .safetensors.")]


@commands.command()
def plan(
    store: Annotated[Path, typer.Argument(help="The site's slice store, made by `fedfactory prepare`.")],
    factory_file: Annotated[
        Path | None,
        typer.Option("--factory", help="Labelled factory, whose first guess is trained further; for unlabelled sites."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    network: Network = "dynunet",
    network_size: NetworkSize = "standard",
    updates: Updates = None,
    minutes: Minutes = None,
    width: Width = None,
    depth: Depth = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    rotation: Rotation = None,
    memory: Memory = 8,
    precision: Precision = "auto",
    device: Device = "cpu",
) -> None:
    """Show which network would be trained on a store, on which windows, and for how long on this machine."""
    config = SegmenterConfig(
        network=network, network_size=network_size, updates=updates, minutes=minutes, width=width, depth=depth,
        learning_rate=learning_rate, batch_size=batch_size, rotation=radians(rotation), memory=memory,
        precision=precision,
    )  # fmt: skip

    require_store(store)
    require_weights(factory_file, "labelled factory")

    from ..node.segmenter_plans import plan_on_store

    made = plan_on_store(store, config, factory_file=factory_file, device=device)
    for name, value in made.rows():
        console.print(f"{name:>24}  {value}", markup=False)
    if out is not None:
        write_json(out, made.to_dict())


@commands.command()
def adapt(
    store: Annotated[Path, typer.Option(help="The site's own slice store; labels are not needed.")],
    out: SegmenterOut,
    factory_file: Annotated[
        Path | None, typer.Option("--factory", help="Labelled factory to draw from, or use --synthetic.")
    ] = None,
    synthetic: Annotated[
        Path | None, typer.Option(help="Folder written by `fedfactory generate-volumes`, in place of --factory.")
    ] = None,
    engine: Engine = "segmenter",
    network: Network = "dynunet",
    network_size: NetworkSize = "standard",
    updates: Updates = None,
    minutes: Minutes = None,
    width: Width = None,
    depth: Depth = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    rotation: Rotation = None,
    memory: Memory = 8,
    volumes: Volumes = 90,
    one_target_slice: OneTargetSlice = False,
    keep: Annotated[
        int,
        typer.Option(min=1, max=5, help="Number of best states to keep for an ensemble, chosen on synthetic slices."),
    ] = 1,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after this number of evaluations without a better state; 0: never.")
    ] = 0,
    precision: Precision = "auto",
    device: Device = "cpu",
    work: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard curves; an interrupted run continues from there.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Train the site's own segmenter (phase two)."""
    require_one_of(factory_file=factory_file, synthetic=synthetic)
    if engine == "translator" and factory_file is None:
        raise UsageError(f"engine is '{engine}'; give `factory_file`, synthetic volumes are not enough")

    config = SegmenterConfig(
        network=network, network_size=network_size, updates=updates, minutes=minutes, width=width, depth=depth,
        learning_rate=learning_rate, batch_size=batch_size, rotation=radians(rotation), memory=memory,
        precision=precision, seed=seed,
    )  # fmt: skip

    require_store(store)
    require_weights(factory_file, "labelled factory")
    require_folder(synthetic, "give a folder written by `fedfactory generate-volumes`")

    from ..adaptation.training.translator_training import TranslatorConfig
    from ..node.site_adaptation import Adaptation, adapt_site

    adaptation = Adaptation(
        engine=engine,
        segmenter=config,
        translator=TranslatorConfig(seed=seed, **({"updates": updates} if updates else {})),
        volumes=volumes,
        one_target_slice=one_target_slice,
        keep=keep,
        patience=patience,
    )
    made = adapt_site(
        store, out, factory_file=factory_file, synthetic=synthetic, adaptation=adaptation, work=work, device=device
    )
    card, facts = made.card, made.card.training
    begun = "the first guess, trained further" if facts.continued else "a new network"
    console.print(f"{out}: {card.network} for {facts.domain}, {begun}, from {facts.slices} slices ({facts.source})")
    print_alarms(card.assessment.alarms if card.assessment else [])


@commands.command()
def segment(
    images: Annotated[
        list[Path],
        typer.Argument(help="Volumes (NIfTI, NRRD, MetaImage), pictures, folders of DICOM files, or whole data sets."),
    ],
    model: Annotated[
        list[Path], typer.Option("--model", "--ensemble", help="Segmenter file; the outputs of several are averaged.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the label maps.")],
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Write probability maps too.")] = False,
    pictures: Annotated[
        bool, typer.Option("--pictures", help="Write slices with their labels as PNG too; of pictures, their contours.")
    ] = False,
    dicom_seg: Annotated[
        bool, typer.Option("--dicom-seg", help="Write a DICOM segmentation of each DICOM series too.")
    ] = False,
    original_values: Annotated[
        bool,
        typer.Option(
            "--original-values",
            help="Write the values of the labelled site's label maps (its --label-values) in place of class numbers.",
        ),
    ] = False,
    page: Annotated[
        bool, typer.Option("--page", help="Write a page of all cases and the volume of each class, unusual ones first.")
    ] = False,
    image_key: ImageKey = "image",
    missing_channels: MissingChannels = "refuse",
    series: Series = None,
    frames: Frames = None,
    nan: Nan = None,
    views: Annotated[
        int,
        typer.Option(min=1, max=8, help="Number of turned, mirrored or shifted views of each image to average."),
    ] = 1,
    centres: Centres = None,
    localiser: LocaliserFile = None,
    device: Device = "cpu",
) -> None:
    """Write label maps of new images, on the images' own grid: NIfTI, or PNG for pictures."""
    refuse_existing(out)
    source = centre_source(centres, localiser)
    for given in model:
        require_weights(given, "segmenter")
    for path in images:
        require_file_or_folder(path, "give images, or folders with images")

    from ..adaptation.inference import Outputs
    from ..adaptation.inference import segment as run

    outputs = Outputs(
        probabilities=probabilities,
        pictures=pictures,
        dicom_seg=dicom_seg,
        views=views,
        original_values=original_values,
        page=page,
    )
    chosen = {"image_key": image_key, "fill_missing": missing_channels == "fill", "series": series}
    given = {**chosen, "frames": frames, "nan": nan, "centres": source, "device": device}
    tell = partial(print_unused, on=errors)  # standard output is the written files'
    for path in run(images, model, out, outputs=outputs, tell=tell, **given):
        console.print(str(path), markup=False)


@commands.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Label map, or folder of label maps: NIfTI files or pictures.")],
    references: Annotated[
        Path, typer.Argument(help="Label map, folder of label maps, or CASE/label/ with one label map each.")
    ],
    out: Annotated[Path, typer.Option(help="CSV file to write.")],
    patient_pattern: PatientPattern = None,
    label_values: LabelValuesOption = None,
    class_names: Annotated[
        str, typer.Option(help='Names to show in place of class numbers, such as "1=polyp,2=instrument".')
    ] = "",
    mask_colours: MaskColours = None,
    check: Annotated[
        bool, typer.Option("--check", help="Compute the scores a second time, by the package evalutils, and compare.")
    ] = False,
) -> None:
    """Score label maps against references, which must be on the images' own grids, in any axis order.

    Per case and class: Dice, IoU, 95 % Hausdorff distance, average surface distance and volume error. Distances are in
    mm, those of pictures in pixels. References may hold other values than class numbers (option label-values). A
    page beside the CSV file shows means, confidence intervals (bootstrap over patients) and the worst cases.
    References without a prediction, those that are cut by the border of the image, and cases of a size unlike the
    others, get a warning.
    """
    for given in (predictions, references):
        require_file_or_folder(given, "give label maps")

    from ..adaptation.evaluation.evaluate import evaluate as run
    from ..adaptation.evaluation.summary import class_lines, mean_dice, mean_over_classes
    from ..imaging.class_names import parse_names
    from ..imaging.pictures.colour_table import read_colour_table

    table = None if mask_colours is None else read_colour_table(mask_colours)
    names = parse_names(class_names) or ({} if table is None else table.class_names)
    values = label_values_of(label_values)
    found = run(
        predictions, references, out, patient_pattern=patient_pattern, names=names, values=values,
        colours=None if table is None else table.classes, check=check,
    )  # fmt: skip
    cases, patients = ({getattr(score, name) for score in found.scores} for name in ("case", "patient"))
    console.print(
        f"{out}: {len(cases)} cases of {len(patients)} patients, mean foreground Dice {mean_dice(found.scores):.3f}, "
        f"IoU {mean_over_classes(found.scores, 'iou'):.3f}",
        markup=False,
    )
    for text in class_lines(found.scores, names):
        console.print(text, markup=False)
    for name, accounting in found.entries.items():
        print_unused(accounting, name=f"{name}: ")
    for warning in found.warnings:
        console.print(f"warning: {warning}", markup=False)
    if found.check is not None:
        console.print(f"check: {found.check.summary()}", markup=False)
        for text in found.check.beyond:
            errors.print(f"check: {text}", markup=False)
        if found.check.beyond:
            fail(f"{len(found.check.beyond)} scores differ from those of the second library; see above", SOME_FAILED)
