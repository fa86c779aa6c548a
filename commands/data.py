"""A site's slice store: made, extended, read for guidance and gaze; weaker labels for studies."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .terminal import SOME_FAILED, Seed, console, errors, fail

if TYPE_CHECKING:
    from ..node.store.prepare import Preparation


commands = typer.Typer()


@commands.command()
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
    from ..common.files import read_lines
    from ..node.store.prepare import prepare as run
    from ..node.store.prepare_config import PrepareConfig

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


@commands.command("import-slices")
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
    from ..node.store.original_slices import import_slices as run
    from ..node.store.prepare_config import PrepareConfig

    config = PrepareConfig(domain=domain, z_bins=z_bins, spacing=spacing, patient_pattern=patient_pattern, seed=seed)
    result = run(source, out, config, slice_spacing=slice_spacing, workers=workers or os.cpu_count() or 1)
    _report_preparation(out, result)


@commands.command()
def embed(
    store: Annotated[Path, typer.Argument(help="Slice store made by `fedfactory prepare`.")],
    encoder: Annotated[str, typer.Option(help="open_clip architecture, local-dir:FOLDER, or timm:NAME.")],
    weights: Annotated[Path, typer.Option(help="Its weights, a local file.")],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Mean image embedding of a site, for factories that use CLIP. It stays at the site."""
    from ..node.store.embedding import embed_store

    mean = embed_store(store, encoder=encoder, weights=weights, device=device)
    console.print(f"{store}: mean embedding of {len(mean)} numbers, length {float(mean.norm()):.3f}")


@commands.command()
def gaze(
    store: Annotated[Path, typer.Argument(help="Slice store prepared with --label-kind gaze.")],
    sigma: Annotated[float, typer.Option(help="Blur of a fixation, as a share of the longer side.")] = 0.08,
    target_share: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of a slice that the target fills, if known; chooses the blur instead."),
    ] = None,
    refine: Annotated[str, typer.Option(help="crf: drawn to the image's edges; none.")] = "crf",
    tight: Annotated[float, typer.Option(help="Above it, a pixel is the target.")] = 0.5,
    loose: Annotated[float, typer.Option(help="Below it, a pixel is background.")] = 0.3,
) -> None:
    """What a site's fixations say of its slices, for training with them. It stays at the site."""
    from ..adaptation.labels.fixations import GazeConfig
    from ..node.store.gaze_maps import read_gaze

    config = GazeConfig(sigma=sigma, refine=refine, tight=tight, loose=loose)
    summary = read_gaze(store, config, target_share=target_share)
    if not summary.viewed_slices:
        console.print(f"{store}: none of {summary.slices} slices was viewed long enough")
        return
    shares = f"{summary.target_share:.1%} target, {summary.uncertain_share:.1%} uncertain (blur {summary.sigma:.3f})"
    console.print(f"{store}: {summary.viewed_slices} of {summary.slices} slices were viewed long enough; {shares}")


@commands.command("weaken-labels")
def weaken_labels(
    source: Annotated[Path, typer.Argument(help="Data set with dense labels, as `prepare` reads it.")],
    out: Annotated[Path, typer.Option(help="New folder for the copy.")],
    kind: Annotated[str, typer.Option(help="point, scribble, block or box.")],
    label_key: Annotated[str, typer.Option(help="Modality folder of the label maps.")] = "label",
    seed: Seed = 0,
) -> None:
    """A copy of a data set with labels as an annotator with less time would leave them, for studies."""
    from ..adaptation.labels.weak_labels import weaken_folder

    count = weaken_folder(source, out, kind, label_key=label_key, seed=seed)
    unlabelled = "" if kind == "box" else " --unlabelled-value 255"
    console.print(f"{count} cases; next: fedfactory prepare {out} --label-kind {kind}{unlabelled} ...")


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
        fail(f"{len(result.failed)} cases could not be used; the store holds the others", SOME_FAILED)
