"""What a site types to find the places around which small organs are cut out: train-localiser, locate."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..adaptation.engine.segmenter_config import SegmenterConfig
from ..common.files import require_file_or_folder, require_weights
from ..errors import UsageError, VolumeError
from ..node.store_index import require_store
from .options import Frames, ImageKey, Memory, Minutes, Nan, Seed, Series, Updates
from .terminal import SOME_FAILED, Commands, console, errors, fail, print_unused

commands = Commands()


@commands.command("train-localiser")
def train_localiser(
    store: Annotated[Path, typer.Option(help="Coarse slice store of whole images, with dense labels.")],
    out: Annotated[Path, typer.Option(help="Localiser file to write, .safetensors.")],
    updates: Updates = None,
    minutes: Minutes = None,
    memory: Memory = 8,
    seed: Seed = 0,
) -> None:
    """Train a localiser at a site with labels: it finds where the structures are in images of any contrast."""
    config = SegmenterConfig(updates=updates, minutes=minutes, memory=memory, seed=seed)

    require_store(store)

    from ..node.labelling import train_localiser as run

    made = run(store, config, out=out)
    console.print(f"{out}: localiser of {made.card.training.domain}, from {made.card.training.slices} slices")


@commands.command()
def locate(
    images: Annotated[
        list[Path], typer.Argument(help="Volumes (NIfTI, NRRD, MetaImage), folders of DICOM files, or whole data sets.")
    ],
    localiser: Annotated[Path, typer.Option(help="Localiser, or labelled factory with one.")],
    out: Annotated[Path, typer.Option(help="Table to write, .csv, which --centres of prepare and segment reads.")],
    image_key: ImageKey = "image",
    series: Series = None,
    frames: Frames = None,
    nan: Nan = None,
) -> None:
    """Write a table of where a localiser finds the structures. Look at it and correct it before it is used.

    Images in which nothing is found are listed and left out; the exit code is 3 then.
    """
    if out.exists():
        raise UsageError(f"{out}: exists, perhaps with corrections; choose another file")

    require_weights(localiser, "labelled factory", "segmenter")
    for path in images:
        require_file_or_folder(path, "give images, or folders with images")

    from ..adaptation.localiser import load_localiser
    from ..adaptation.localiser import locate as run
    from ..imaging.accounting.account import account_for_images
    from ..imaging.cases import find_images
    from ..imaging.centre_table import write_centre_table
    from ..imaging.formats.frames import choose_reading

    finder = load_localiser(localiser)
    found = find_images(images, image_key=image_key, channels=finder.segmenter.format.channels, series=series)
    choose_reading(found, frames=frames, nan=nan or finder.segmenter.format.nan)
    places, failed = run(found.cases, finder)
    failed = {**found.problems, **failed}
    print_unused(account_for_images(images, found, image_keys=tuple(image_key.split(",")), failed=failed))
    for name, place in places.items():
        x, y, z = place.centre
        console.print(f"{name}: ({x:g}, {y:g}, {z:g}) mm, {place.millilitres:.3g} ml", markup=False)
    for name, reason in failed.items():
        errors.print(f"not located: {name}: {reason}", markup=False)
    if not places:
        raise VolumeError(f"{out}: not one of {len(failed)} images could be located; no table is written")
    write_centre_table(out, {name: place.centre for name, place in places.items()})
    console.print(f"{out}: {len(places)} images; compare their volumes, and look at the places", markup=False)
    if failed:
        fail(f"{len(failed)} images could not be located; the table holds the others", SOME_FAILED)
