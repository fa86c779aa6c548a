"""What a site types for a factory with labels: label, generate-volumes, audit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

import typer

from ..adaptation.choices import LABEL_WITH, LABELLINGS, LAYOUTS, PRECISIONS
from ..adaptation.engine.segmenter_config import SegmenterConfig
from ..common.files import refuse_existing, require_file, require_folder, require_weights
from ..errors import UsageError
from ..node.store_index import require_store
from .options import (
    Classes,
    Device,
    Encoder,
    LabelledFactoryFile,
    Memory,
    Minutes,
    NetworkSize,
    Rotation,
    Seed,
    Store,
    Updates,
    Workers,
    listed,
    one_of,
    radians,
)
from .terminal import Commands, console, print_alarms, require_one_of

commands = Commands()


@commands.command()
def label(
    factory: Annotated[Path, typer.Option(help="Factory file, made by `fedfactory export`.")],
    store: Store,
    out: Annotated[Path, typer.Option(help="Labelled factory file to write, .safetensors.")],
    classes: Classes = None,
    labelling: Annotated[
        str,
        typer.Option(
            callback=one_of(LABELLINGS),
            help="synthesis: a segmenter labels synthetic slices; inversion: own slices are inverted to latents.",
        ),
    ] = "synthesis",
    first_guess: Annotated[
        Path | None,
        typer.Option(
            help="Segmenter of several labelled sites, made by `train-segmenter --first-guess`; default: trained here."
        ),
    ] = None,
    segmenter: Annotated[
        Path | None,
        typer.Option(help="Segmenter for the store's own images, which labels the slices; default: trained here."),
    ] = None,
    localiser: Annotated[
        Path | None,
        typer.Option(help="Coarse store of whole images, to train a localiser on, or a localiser: it goes along."),
    ] = None,
    distil: Annotated[
        bool, typer.Option("--distil", help="Train one more branch that gives the labels of all: faster drawing.")
    ] = False,
    network_size: NetworkSize = "standard",
    updates: Updates = None,
    minutes: Minutes = None,
    rotation: Rotation = None,
    memory: Memory = 8,
    seed: Seed = 0,
) -> None:
    """Train the label branch of a factory at a site with labels, and the first guess: a segmenter for other contrasts.

    Two segmenters, and a localiser if asked for, are trained before the branch; updates or minutes are given for each.
    """
    config = SegmenterConfig(
        network_size=network_size, updates=updates, minutes=minutes, rotation=radians(rotation), memory=memory,
        seed=seed,
    )  # fmt: skip

    require_weights(factory, "factory")
    require_store(store)
    for given in (first_guess, segmenter):
        require_weights(given, "segmenter")

    from ..node.labelling import label_factory

    made = label_factory(
        factory, store, out, classes=classes, labelling=labelling, config=config, first_guess_file=first_guess,
        segmenter_file=segmenter, localiser=localiser, distil=distil,
    )  # fmt: skip
    card = made.card
    console.print(f"{out}: {card.classes} classes, Dice {card.agreement:.3f} on {card.validated_on}")
    if card.distilled is not None:
        scores = ", ".join(f"{score:.3f}" for score in card.distilled.dice)
        console.print(
            f"distilled branch: {card.distilled.equal_pixels:.2%} of pixels labelled as by all branches, Dice {scores}"
        )


@commands.command("generate-volumes")
def generate_volumes(
    factory: Annotated[Path | None, typer.Option(help="Labelled factory file.")] = None,
    ckpt_dir: Annotated[
        Path | None, typer.Option("--ckpt_dir", help="Folder that holds the labelled factory, in place of --factory.")
    ] = None,
    domain: Annotated[str | None, typer.Option(help="Domain of the volumes.")] = None,
    label: Annotated[
        int | None, typer.Option("--label", min=0, help="Number of the domain, in place of --domain.")
    ] = None,
    volumes: Annotated[int, typer.Option("--n_volumes", "--n-volumes", min=1, help="Number of subjects.")] = 1,
    slices_per_bin: Annotated[
        int, typer.Option("--slices_in_one_z", "--slices-in-one-z", min=1, help="Number of slices per height bin.")
    ] = 2,
    classes: Annotated[
        int | None, typer.Option("--n_segmentation_labels", help="Number of label values; only checked.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out_dir", "--out", help="New folder for the volumes.")] = None,
    clip_mean: Annotated[
        Path | None, typer.Option("--clip_mean", help="Array file with the domain's mean image embedding.")
    ] = None,
    z_depth: Annotated[
        int | None, typer.Option("--z_depth", help="Number of height bins from the lowest up; default: all.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch_size", min=1, help="Without effect: the factory decides on the batches.")
    ] = None,
    device: Device = "cpu",
    domains: Annotated[int | None, typer.Option("--n_domains", help="Number of domains; only checked.")] = None,
    largest_component: Annotated[
        bool, typer.Option("--remove_largest_components", help="Keep only the largest component of each class.")
    ] = False,
    layout: Annotated[
        str, typer.Option(callback=one_of(LAYOUTS), help=f"Files of the volumes: {listed(LAYOUTS)} (pickled).")
    ] = "nifti",
    truncation: Annotated[float, typer.Option(min=0, max=1, help="Below 1: fewer unusual subjects.")] = 1.0,
    least_share: Annotated[
        float, typer.Option(min=0, help="Least share of each class in a volume; volumes with less are drawn again.")
    ] = 0.0,
    between: Annotated[int, typer.Option(min=0, help="Number of interpolated volumes between every two subjects.")] = 0,
    label_with: Annotated[
        str,
        typer.Option(
            callback=one_of(LABEL_WITH),
            help="Label branches: ensemble, distilled (of `label --distil`), or auto: distilled where it agrees well.",
        ),
    ] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            callback=one_of(PRECISIONS),
            help="Precision of the labels' computation; auto: bfloat16 where that is faster and changes few labels.",
        ),
    ] = "auto",
    only: Annotated[
        list[int] | None, typer.Option(min=0, help="Number of a volume to write; may be repeated; default: all.")
    ] = None,
    workers: Workers = None,
    seed: Seed = 0,
) -> None:
    """Draw labelled synthetic volumes from a labelled factory.

    Writes volumes, their latents and a manifest. Options with underscores are those of the original program.
    """
    require_one_of(factory=factory, ckpt_dir=ckpt_dir)
    require_one_of(domain=domain, label=label)
    if out is None:
        raise UsageError(f"out is {out}; give a new folder")
    refuse_existing(out)

    require_weights(factory, "labelled factory")
    require_folder(ckpt_dir, "give the folder of a labelled factory")

    from ..adaptation.adapt import MANIFEST
    from ..adaptation.generate_volumes import Drawing, choose_factory
    from ..adaptation.generate_volumes import generate_volumes as run

    file, name = choose_factory(
        factory=factory, ckpt_dir=ckpt_dir, domain=domain, label=label, classes=classes, domains=domains,
        clip_mean=clip_mean,
    )  # fmt: skip
    drawing = Drawing(
        domain=name, volumes=volumes, slices_per_bin=slices_per_bin, z_depth=z_depth,
        largest_component=largest_component, truncation=truncation, least_share=least_share, between=between,
        label_with=label_with, precision=precision, seed=seed,
    )  # fmt: skip
    workers = workers or (os.cpu_count() or 1 if device == "cpu" else 1)
    names = run(
        file, out, drawing, layout=layout, only=only or None, workers=workers, device=device, clip_mean=clip_mean
    )
    console.print(f"{out}: {len(names)} labelled volumes of domain {name}")
    print_alarms(json.loads((out / MANIFEST).read_text(encoding="utf-8"))["alarms"])


@commands.command()
def audit(
    factory: LabelledFactoryFile,
    store: Store,
    out: Annotated[
        Path, typer.Option(help="New folder for audit.html, which stays at the site, and audit.json with numbers.")
    ],
    held_out: Annotated[
        Path | None, typer.Option(help="Slice store of further patients of the site, never used for training.")
    ] = None,
    volumes: Annotated[int, typer.Option(min=2, help="Number of synthetic subjects that are drawn.")] = 40,
    encoder: Encoder = "",
    weights: Annotated[
        Path | None, typer.Option(help="Weights of the encoder, a local file; default: random filters.")
    ] = None,
    seed: Seed = 0,
) -> None:
    """Measure how good synthetic slices are and whether they reveal patients. Run it where the real images are."""
    if encoder and weights is None:
        raise UsageError(f"encoder is '{encoder}'; give its `weights` too")
    if weights is not None and not encoder:
        raise UsageError(f"weights is '{weights}'; give their `encoder` too")
    refuse_existing(out)
    require_weights(factory, "labelled factory")
    require_store(store)
    require_store(held_out)
    require_file(weights, "give the weights of the image encoder")

    from ..generative.image_encoder import load_image_encoder
    from ..generative.metrics.quality import random_features
    from ..node.audit import audit_factory

    features = load_image_encoder(encoder, weights) if encoder else random_features
    made = audit_factory(factory, store, out, held_out_dir=held_out, volumes=volumes, features=features, seed=seed)
    for text in made.findings:
        console.print(f"finding: {text}", style="bold red", markup=False)
    console.print(f"{out}: {len(made.findings)} findings; inspect audit.html yourself")
