"""What a site types to prepare its data: slice store, mean embedding and gaze maps; weaker labels for studies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..adaptation.choices import REFINEMENTS, WEAK_LABEL_KINDS
from ..common.files import require_file, require_folder, require_weights
from ..errors import ConfigError
from ..node.store_index import require_store
from .options import (
    Centres,
    Device,
    DomainOfStore,
    Encoder,
    Frames,
    ImageKey,
    LabelKey,
    LabelValuesOption,
    LocaliserFile,
    MaskColours,
    MissingChannels,
    Nan,
    NewStore,
    PatientPattern,
    Seed,
    Series,
    Workers,
    ZBins,
    centre_source,
    label_values_of,
    listed,
    more_than,
    one_of,
)
from .terminal import SOME_FAILED, Commands, console, errors, fail, print_accounting, print_unused

if TYPE_CHECKING:
    from ..node.store.prepare import Preparation

commands = Commands()

NAMED = 5  # files with the same remark that are named

# The options of `prepare` that no other command has. `PrepareConfig` checks their values.
Source = Annotated[
    Path,
    typer.Argument(
        help="Folders SUBJECT/MODALITY/, an nnU-Net raw data set, NIfTI, NRRD or MetaImage files, folders of DICOM "
        "files, or pictures in images/ with masks/."
    ),
]
Size = Annotated[int, typer.Option(min=8, help="Pixels per side of the slices; the factory's image size.")]
Spacing = Annotated[
    float | None, typer.Option(help="Millimetres per pixel; default: the median of the site, or what its widest needs.")
]
FieldOfView = Annotated[
    float | None,
    typer.Option(help="Millimetres per side of the slices, instead of --spacing: cuts them around the body's centre."),
]
SliceSpacing = Annotated[float | None, typer.Option(help="Millimetres between slices; default: as acquired.")]
Like = Annotated[
    Path | None,
    typer.Option(help="Another site's format.json (or store), whose size, height bins, spacing and plane are used."),
]
Plane = Annotated[
    str, typer.Option(help="Plane of the slices: axial, coronal, sagittal, acquired (oblique stacks) or stored.")
]
Crop = Annotated[str, typer.Option(help="What is cut away before resampling: air, or none.")]
Compatibility = Annotated[str, typer.Option(help="published: prepare exactly as the published program did; or none.")]
ClassNames = Annotated[
    str | None, typer.Option(help="Names of the label values, such as 1=liver,2=spleen; shown wherever labels are.")
]
Colour = Annotated[
    str | None,
    typer.Option(help="grey or colour: what slices pictures become; default: colour if one of them is in colour."),
]
MaxPixels = Annotated[int, typer.Option(min=1, help="Pictures with more pixels are refused.")]
Patients = Annotated[
    Path | None, typer.Option(help="Table of the patient (or video) of each case: columns CASE,PATIENT or name,group.")
]
LabelKind = Annotated[
    str,
    typer.Option(
        help="Kind of the labels: dense, scribble, point, box, block, image, gaze; none does not read any labels."
    ),
]
UnlabelledValue = Annotated[
    int | None, typer.Option(min=0, help="Value of the pixels that nobody annotated, in sparse label maps.")
]
NumClasses = Annotated[int | None, typer.Option(help="Number of label values, background included; others are errors.")]
MaskKey = Annotated[
    str | None, typer.Option(help="Modality folder of a brain or body mask; slices outside the mask are left out.")
]
MaskAsClass = Annotated[
    bool, typer.Option("--mask-as-class", help="Make the mask label 1; the structures' labels begin at 2.")
]
ValidationShare = Annotated[float, typer.Option(min=0, max=0.9, help="Share of the patients held out for validation.")]
TestShare = Annotated[float, typer.Option(min=0, max=0.9, help="Share of the patients held out for testing.")]
Split = Annotated[
    str | None, typer.Option(help="Put all patients of this run into one part: train, validation or test.")
]
Exclude = Annotated[Path | None, typer.Option(help="Text file with the names of cases to leave out, one per line.")]


@commands.command()
def prepare(
    source: Source,
    out: NewStore,
    domain: DomainOfStore,
    size: Size = 256,
    z_bins: ZBins = 29,
    spacing: Spacing = None,
    field_of_view: FieldOfView = None,
    centres: Centres = None,
    localiser: LocaliserFile = None,
    slice_spacing: SliceSpacing = None,
    like: Like = None,
    plane: Plane = "axial",
    crop: Crop = "air",
    compatibility: Compatibility = "none",
    image_key: ImageKey = "image",
    missing_channels: MissingChannels = "refuse",
    series: Series = None,
    frames: Frames = None,
    nan: Nan = None,
    label_key: LabelKey = "label",
    label_kind: LabelKind = "dense",
    label_values: LabelValuesOption = None,
    unlabelled_value: UnlabelledValue = None,
    classes: NumClasses = None,
    class_names: ClassNames = None,
    mask_colours: MaskColours = None,
    colour: Colour = None,
    max_pixels: MaxPixels = 100_000_000,
    mask_key: MaskKey = None,
    mask_as_class: MaskAsClass = False,
    patient_pattern: PatientPattern = None,
    patients: Patients = None,
    validation_share: ValidationShare = 0.15,
    test_share: TestShare = 0.15,
    split: Split = None,
    exclude: Exclude = None,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """Convert a site's volumes or pictures to a slice store, which stays at the site.

    A second run adds new cases. Cases that cannot be used are listed and left out; the exit code is 3 then.
    """
    from ..common.files import read_lines
    from ..imaging.class_names import parse_names
    from ..imaging.patients import read_patient_table
    from ..imaging.pictures.colour_table import read_colour_table
    from ..node.store.prepare_config import PrepareConfig

    table = None if mask_colours is None else read_colour_table(mask_colours)
    names = {} if table is None else table.class_names
    names |= {} if class_names is None else parse_names(class_names)
    config = PrepareConfig(
        domain=domain,
        size=size,
        z_bins=z_bins,
        spacing=spacing,
        field_of_view=field_of_view,
        centres=centre_source(centres, localiser),
        slice_spacing=slice_spacing,
        plane=plane,
        crop=crop,
        compatibility=compatibility,
        image_key=image_key,
        fill_missing=missing_channels == "fill",
        series=series,
        label_key=label_key,
        mask_key=mask_key,
        mask_as_class=mask_as_class,
        label_kind=label_kind,
        label_values=label_values_of(label_values),
        frames=frames,
        nan=nan,
        unlabelled_value=unlabelled_value,
        classes=classes,
        class_names=names,
        mask_colours=None if table is None else table.classes,
        colour=colour,
        max_pixels=max_pixels,
        patients=None if patients is None else read_patient_table(patients),
        patient_pattern=patient_pattern,
        validation_share=validation_share,
        test_share=test_share,
        exclude=tuple(read_lines(exclude)) if exclude else (),
        split=split,
        seed=seed,
    )
    config = config.like(like) if like else config
    require_folder(source, "give a folder of cases")

    from ..node.store.prepare import NoUsableCase  # only now: slow to import
    from ..node.store.prepare import prepare as run

    try:
        _print_preparation(out, run(source, out, config, workers=workers or os.cpu_count() or 1))
    except NoUsableCase as error:
        print_accounting(error.accounting)
        for name, reason in list(error.failed.items())[1:]:  # the error itself tells the first
            errors.print(f"not used: {name}: {reason}", markup=False)
        raise


@commands.command("import-slices")
def import_slices(
    source: Annotated[Path, typer.Argument(help="Folder with files CASE_slice000.npy of the published program.")],
    out: NewStore,
    domain: DomainOfStore,
    z_bins: ZBins = 29,
    spacing: Annotated[
        float, typer.Option(min=0.01, help="Millimetres per pixel, which these files do not hold.")
    ] = 1.0,
    slice_spacing: Annotated[
        float, typer.Option(min=0.01, help="Millimetres between slices, which these files do not hold.")
    ] = 1.0,
    patient_pattern: PatientPattern = None,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """Convert slices of the published program to a slice store, without executing anything in the pickled files."""
    require_folder(source, "give a folder of slices of the published program")

    from ..node.store.prepare_config import PrepareConfig

    config = PrepareConfig(domain=domain, z_bins=z_bins, spacing=spacing, patient_pattern=patient_pattern, seed=seed)

    from ..node.store.original_slices import import_slices as run  # only now: slow to import

    result = run(source, out, config, slice_spacing=slice_spacing, workers=workers or os.cpu_count() or 1)
    _print_preparation(out, result)


@commands.command()
def embed(
    store: Annotated[Path, typer.Argument(help="Slice store made by `fedfactory prepare`.")],
    encoder: Encoder,
    weights: Annotated[Path, typer.Option(help="Weights of the encoder, a local file.")],
    device: Device = "cpu",
) -> None:
    """Compute a site's mean image embedding, for factories with guidance by CLIP. It stays at the site."""
    require_store(store)
    require_file(weights, "give the weights of the image encoder")

    from ..node.store.derived.embedding import embed_store

    mean = embed_store(store, encoder=encoder, weights=weights, device=device)
    console.print(f"{store}: mean embedding of {len(mean)} numbers, length {float(mean.norm()):.3f}")


@commands.command()
def gaze(
    store: Annotated[Path, typer.Argument(help="Slice store, prepared with --label-kind gaze.")],
    sigma: Annotated[
        float,
        typer.Option(callback=more_than(0), help="Width of the blur of a fixation, as a share of the longer side."),
    ] = 0.08,
    target_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of a slice that the target fills, if known; the blur is chosen by it."),
    ] = None,
    refine: Annotated[
        str, typer.Option(callback=one_of(REFINEMENTS), help="crf: align the maps with the image's edges; or none.")
    ] = "crf",
    tight: Annotated[float, typer.Option(help="Pixels with a higher value are target.")] = 0.5,
    loose: Annotated[float, typer.Option(help="Pixels with a lower value are background.")] = 0.3,
) -> None:
    """Convert a site's eye fixations to candidate labels of its slices, for training. They stay at the site."""
    if not 0 < loose <= tight < 1:
        raise ConfigError(f"loose is {loose} and `tight` is {tight}; choose 0 < loose <= tight < 1")

    require_store(store)

    from ..adaptation.labels.fixations import GazeConfig
    from ..node.store.derived.gaze_maps import read_gaze

    config = GazeConfig(sigma=sigma, refine=refine, tight=tight, loose=loose)
    summary = read_gaze(store, config, target_share=target_share)
    if not summary.viewed_slices:
        console.print(f"{store}: none of {summary.slices} slices was viewed long enough")
        return
    shares = f"{summary.target_share:.1%} target, {summary.uncertain_share:.1%} uncertain (blur {summary.sigma:.3f})"
    console.print(f"{store}: {summary.viewed_slices} of {summary.slices} slices were viewed long enough; {shares}")


@commands.command("pseudo-label")
def pseudo_label(
    store: Annotated[Path, typer.Argument(help="Slice store made by `fedfactory prepare`.")],
    segmenter: Annotated[
        Path,
        typer.Option(
            help="Segmenter file: a first guess or the site's adapted one; or the average.safetensors that "
            "`train-segmenter` wrote."
        ),
    ],
    least_confidence: Annotated[
        float, typer.Option(min=0, max=1, help="Least probability of a pixel's class; other pixels get no label.")
    ] = 0.5,
    device: Device = "cpu",
) -> None:
    """Label a site's training slices by a segmenter, for `train --classes N --pseudo-labels`. They stay at the site.

    They are kept beside the annotations, never among them: no other training and no score uses them. A second run, such
    as with a better segmenter, replaces them.
    """
    require_store(store)
    require_weights(segmenter, "segmenter", "federated segmenter")

    from ..node.pseudo_labelling import make_pseudo_labels
    from ..node.store.quality_page import QUALITY_PAGE

    facts = make_pseudo_labels(store, segmenter, least_confidence=least_confidence, device=device)
    console.print(f"{store}: pseudo-labels, no annotations", markup=False)
    for name, value in facts.rows().items():
        console.print(f"{name:>24}  {value}", markup=False)
    for doubt in facts.doubts:
        console.print(f"warning: {doubt}", markup=False)
    console.print(
        f"look at {store / QUALITY_PAGE}; a store that is registered must be registered again: fedfactory site add",
        markup=False,
    )


@commands.command("weaken-labels")
def weaken_labels(
    source: Annotated[Path, typer.Argument(help="Data set with dense labels, as `fedfactory prepare` reads it.")],
    out: Annotated[Path, typer.Option(help="New folder for the copy.")],
    kind: Annotated[
        str,
        typer.Option(callback=one_of(WEAK_LABEL_KINDS), help=f"Kind of the new labels: {listed(WEAK_LABEL_KINDS)}."),
    ],
    image_key: ImageKey = "image",
    label_key: LabelKey = "label",
    label_values: LabelValuesOption = None,
    mask_colours: MaskColours = None,
    seed: Seed = 0,
) -> None:
    """Copy a data set and replace its dense labels by weaker ones, for studies."""
    require_folder(source, "give a folder of cases")

    from ..adaptation.labels.weak_labels import weaken_folder
    from ..imaging.pictures.colour_table import read_colour_table

    colours = None if mask_colours is None else read_colour_table(mask_colours).classes
    values = label_values_of(label_values)
    count = weaken_folder(
        source, out, kind, image_key=image_key, label_key=label_key, values=values, colours=colours, seed=seed,
        tell=print_unused,
    )  # fmt: skip
    unlabelled = "" if kind == "box" else " --unlabelled-value 255"
    console.print(f"{count} cases; next: fedfactory prepare {out} --label-kind {kind}{unlabelled} ...")


def _print_preparation(out: Path, result: Preparation) -> None:
    """Print what became of the cases; exits with 3 if some could not be used."""
    from ..node.store.store_warnings import patients_line

    store = result.store
    labelled = sum(case.labelled for case in store.cases)
    text = f"{out}: {len(store.cases)} cases, {labelled} labelled, {len(store)} slices of {store.format.size} px"
    console.print(text, markup=False)
    console.print(patients_line(store.cases), markup=False)
    console.print(
        f"{result.added} added, {result.replaced} replaced, {result.unchanged} unchanged, {result.kept} kept; "
        f"see {out / 'quality.html'}",
        markup=False,
    )
    print_accounting(result.accounting, apart_from=result.remarks.values())
    for command in result.outdated:
        console.print(f"removed: what `fedfactory {command}` made of the slices before; run it again", markup=False)
    for warning in store.warnings:
        console.print(f"warning: {warning}", markup=False)
    for remark in dict.fromkeys(result.remarks.values()):
        names = [name for name, text in result.remarks.items() if text == remark]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        console.print(f"remark: {', '.join(names[:NAMED])}{more}: {remark}", markup=False)
    if result.failed:
        for name, reason in result.failed.items():
            errors.print(f"not used: {name}: {reason}", markup=False)
        fail(f"{len(result.failed)} cases could not be used; the store holds the others", SOME_FAILED)
