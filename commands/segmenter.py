"""Phase two, and what anybody does with a factory: labels, volumes, audit, segmenters, label maps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .terminal import Seed, console, print_alarms

commands = typer.Typer()


@commands.command()
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
    from ..adaptation.training.segmenter_training import SegmenterConfig
    from ..node.labelling import label_factory

    config = SegmenterConfig(seed=seed)
    made = label_factory(factory, store, out, classes=classes, labelling=labelling, config=config)
    card = made.card
    console.print(f"{out}: {card.classes} classes, Dice {card.agreement:.3f} on {card.validated_on}")


@commands.command("generate-volumes")
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
    from ..adaptation.adapt import MANIFEST
    from ..adaptation.generate_volumes import Drawing, choose_factory
    from ..adaptation.generate_volumes import generate_volumes as run

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
    print_alarms(json.loads((out_dir / MANIFEST).read_text(encoding="utf-8"))["alarms"])


@commands.command()
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
    from ..generative.image_encoder import load_image_encoder
    from ..generative.metrics.quality import random_features
    from ..node.audit import audit_factory

    if bool(encoder) != (weights is not None):
        raise UsageError("--encoder and --weights go together")
    features = load_image_encoder(encoder, weights) if encoder else random_features
    made = audit_factory(factory, store, out, held_out_dir=held_out, volumes=volumes, features=features, seed=seed)
    for text in made.findings:
        console.print(f"finding: {text}", style="bold red", markup=False)
    console.print(f"{out}: {len(made.findings)} findings; look at audit.html with your own eyes")


@commands.command()
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
    from ..adaptation.training.segmenter_training import SegmenterConfig
    from ..adaptation.training.translator_training import TranslatorConfig
    from ..node.site_adaptation import Adaptation, adapt_site

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
    console.print(f"{out}: {card.network} for {card.training.domain}, from {card.training.slices} slices")
    print_alarms(card.assessment.alarms if card.assessment else [])


@commands.command()
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
    from ..adaptation.inference import Outputs
    from ..adaptation.inference import segment as run

    for path in run(images, model, out, outputs=Outputs(probabilities, pictures, flips), device=device):
        console.print(str(path), markup=False)


@commands.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Label map, or folder of label maps.")],
    references: Annotated[Path, typer.Argument(help="The same, or CASE/label/*.nii.gz.")],
    out: Annotated[Path, typer.Option(help="CSV file.")],
) -> None:
    """Score label maps against references.

    Dice, 95 % Hausdorff distance, mean surface distance and volume error, per case and class; a page beside the CSV
    file has means, intervals and the worst cases.
    """
    from ..adaptation.evaluation import evaluate as run
    from ..adaptation.evaluation import mean_dice

    scores = run(predictions, references, out)
    console.print(f"{out}: {len({s.case for s in scores})} cases, mean foreground Dice {mean_dice(scores):.3f}")
