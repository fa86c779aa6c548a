"""What a labelled site does alone: it trains segmenters of its own and adds the label branch to a factory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from ..adaptation.averaged_segmenter import load_segmenter
from ..adaptation.choices import LABELLINGS
from ..adaptation.engine.segmenter_config import SegmenterConfig, first_guess_config, localiser_config
from ..adaptation.labelled_factory import LabelledFactory
from ..adaptation.labelled_slices import LabelledSlices
from ..adaptation.localiser import load_localiser
from ..adaptation.segmenter import Segmenter
from ..adaptation.segmenter_card import TrainingFacts
from ..adaptation.training.distillation import DistillationConfig, distil_branches
from ..adaptation.training.label_branch_training import (
    BinnedSlices,
    LabelBranchConfig,
    train_label_branch,
    with_first_guess,
)
from ..adaptation.training.segmenter_training import train_segmenter
from ..errors import UsageError
from ..generative.factory_file import load_factory
from .store.slice_store import SliceStore


def labelled_slices(store: SliceStore) -> LabelledSlices:
    """The training slices of a store's densely labelled cases. Raises: StoreError if there are none."""
    chosen = store.labelled_slices("train")
    volume = store.volume_of_slices()[chosen]
    return LabelledSlices(store.images[chosen], store.labels[chosen], store.classes, volume)


def train_on_store(store: SliceStore, config: SegmenterConfig) -> Segmenter:
    """Train a segmenter on a site's own labelled slices, without any other site."""
    facts = TrainingFacts(domain=store.domain, slices=len(store.slices("train")), centred=store.centred)
    title = f"training on {store.domain}"
    made = train_segmenter(labelled_slices(store), store.format, config, title=title, facts=facts)
    made.card = replace(made.card, **store.card_entries)
    return made


def train_localiser(store_dir: str | Path, config: SegmenterConfig, *, out: str | Path | None = None) -> Segmenter:
    """Train a localiser: a segmenter of two classes, background and all structures together, under random contrast.

    Args:
        store_dir: slice store of whole images in coarse pixels, with dense labels.
        config: seed and number of updates; a small network is trained on whole slices.
        out: segmenter file to write; None writes nothing.

    Raises: StoreError if no training case has dense labels; UsageError if slices are cut around given places: a
        localiser must work before any place is known.
    """
    store = SliceStore(store_dir)
    if centred := [case.name for case in store.cases if case.centre is not None]:
        raise UsageError(
            f"{store.path}: the slices of {len(centred)} cases, such as {centred[0]}, are cut around given places; "
            "prepare whole images for a localiser, without centres"
        )
    data = labelled_slices(store)
    data = LabelledSlices(data.images, (data.labels > 0).astype(np.uint8), 2, data.volume)
    facts = TrainingFacts(domain=store.domain, slices=len(data.images))
    title = f"training a localiser on {store.domain}"
    settings = localiser_config(config, colour=store.format.colour)
    made = train_segmenter(data, store.format, settings, title=title, facts=facts)
    if made.card.plan.window < store.format.size:
        raise UsageError(f"memory is {config.memory:g} GiB, too little for whole slices of {store.format.size} pixels")
    cases = [case for case in store.cases if case.split == "train" and case.label_kind == "dense"]
    volumes = [sum(case.facts.label_volumes.values()) for case in cases if case.facts.label_volumes]
    if volumes:
        smallest, largest = (float(f"{value:.2g}") for value in (min(volumes), max(volumes)))
        made.card = replace(made.card, volumes=(smallest, largest))
    if out is not None:
        made.save(out)
    return made


def label_factory(
    factory_file: str | Path,
    store_dir: str | Path,
    out: str | Path,
    *,
    classes: int | None = None,
    labelling: str = "synthesis",
    branch_updates: int = 250,
    keep: int = 3,
    config: SegmenterConfig | None = None,
    first_guess_file: str | Path | None = None,
    segmenter_file: str | Path | None = None,
    localiser: str | Path | None = None,
    distil: bool = False,
) -> LabelledFactory:
    """Add the label branch and the first guess at a labelled site; to a factory that draws labels, the guess alone.

    Args:
        factory_file: exported factory.
        store_dir: the site's store, with labels.
        out: labelled factory file to write.
        classes: expected number of label values including background; None does not check it.
        labelling: "synthesis" labels synthetic slices by a segmenter that was trained on the site's own; "inversion"
            (published) inverts the site's own slices and trains the branch on their labels.
        branch_updates: number of updates of the branch.
        keep: number of the branch's best states, whose mean gives the labels.
        config: of the two segmenters that are trained: one labels the factory's slices; the other, under random
            contrast, travels with the factory and gives the images of other sites their first labels.
        first_guess_file: segmenter that travels in place of one that is trained here, such as one that several labelled
            sites have trained together under random contrast, or their average, see `load_segmenter`.
        segmenter_file: segmenter for the store's own images that labels the factory's slices, in place of one that is
            trained here.
        localiser: slice store of the site's whole images in coarse pixels, on which a localiser is trained that travels
            with the factory; or the file of a localiser, which travels as it is. None: the factory has none.
        distil: train one more branch that gives the labels of all, see `distil_branches`.

    Raises: UsageError, StoreError or CheckpointError; then nothing is written.
    """
    if labelling not in LABELLINGS:
        raise UsageError(f"labelling is '{labelling}'; choose one of {', '.join(LABELLINGS)}")
    factory, store = load_factory(factory_file), SliceStore(store_dir)
    factory.config.domain_index(store.domain)
    store.require_factory(factory.config)
    if classes is not None and classes != store.classes:
        raise UsageError(
            f"classes is {classes}, but the labels of {store.path} have {store.classes} values; give that number"
        )
    guess, teacher = (
        None if file is None else given_segmenter(file, store, classes=store.classes)
        for file in (first_guess_file, segmenter_file)
    )
    if factory.config.classes not in (0, store.classes):
        raise UsageError(
            f"{factory_file}: draws labels of {factory.config.classes} classes; the store {store.path} has labels of "
            f"{store.classes}, give the store of a site that was trained on"
        )
    if factory.config.classes and (segmenter_file is not None or labelling != "synthesis"):
        raise UsageError(
            f"{factory_file}: draws labels with its images, no label branch is trained; leave out "
            "segmenter_file and labelling"
        )
    inverted = labelling == "inversion"
    held_out = _binned_slices(store, "validation") if inverted else None
    if distil and factory.config.classes:
        raise UsageError(f"{factory_file}: draws labels with its images, without label branches; leave out distil")
    if distil and (keep < 2 or (inverted and held_out is None)):
        reason = f"keep is {keep}" if keep < 2 else f"{store.path} has no validation case to choose branches by"
        raise UsageError(f"distil needs several label branches, but {reason}; leave it out")
    config = config or SegmenterConfig()
    if not factory.config.mirror:  # a factory of organs with a left and a right
        config = replace(config, mirror=False)
    finder = None if localiser is None else _localiser(Path(localiser), store, config)
    robust = guess or train_on_store(store, first_guess_config(config, colour=store.format.colour))
    if factory.config.classes:
        labelled = with_first_guess(factory, robust, domain=store.domain, seed=config.seed)
    else:
        teacher = teacher or train_on_store(store, replace(config, contrast=None))
        labelled = train_label_branch(
            factory,
            teacher,
            robust,
            domain=store.domain,
            real=_binned_slices(store, "train") if inverted else None,
            held_out=held_out,
            config=LabelBranchConfig(updates=branch_updates, keep=keep, seed=config.seed),
        )
        if distil:
            labelled = distil_branches(labelled, DistillationConfig(seed=config.seed))
    labelled.localiser = finder
    labelled.save(out)
    return labelled


def given_segmenter(file: str | Path, store: SliceStore, *, classes: int | None) -> Segmenter:
    """The segmenter in a file, see `load_segmenter`, if it fits the slices of a store.

    Args:
        file: a segmenter, or the average of several sites.
        store: whose slices it is to segment.
        classes: number of label values that it must have, background included; None takes any.

    Raises: UsageError if it is for other slices or labels; as `load_segmenter`.
    """
    found = load_segmenter(file, store.format)
    for name, value, wanted in (
        ("size", found.format.size, store.format.size),
        ("channels", found.format.channels, store.format.channels),
        ("classes", found.classes, classes),
    ):
        if wanted is not None and value != wanted:
            raise UsageError(f"{file}: {name} is {value}; it must be {wanted} as in {store.path}")
    return found


def _localiser(path: Path, store: SliceStore, config: SegmenterConfig) -> Segmenter:
    """The localiser in a file, or one that is trained on a coarse store of the store's domain.

    Raises: UsageError or StoreError if the coarse store does not fit; CheckpointError for a damaged file.
    """
    if path.is_file():
        return load_localiser(path).segmenter
    coarse = SliceStore(path)
    if coarse.domain != store.domain:
        raise UsageError(f"{path}: domain is '{coarse.domain}'; it must be '{store.domain}', as in {store.path}")
    return train_localiser(path, config)


def _binned_slices(store: SliceStore, split: str) -> BinnedSlices | None:
    """Labelled slices of a split and their height bins; None if the split has none."""
    if not any(case.split == split and case.label_kind == "dense" for case in store.cases):
        return None
    chosen = store.labelled_slices(split)
    slices = LabelledSlices(store.images[chosen], store.labels[chosen], store.classes)
    return BinnedSlices(slices=slices, z_bin=store.z_bin[chosen])
