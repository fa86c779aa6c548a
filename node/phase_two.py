"""What a site does with its store besides federated training: the label branch, and its own segmenter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..adaptation.adapt import adapt, draw_slices, mix, pseudo_label, read_synthetic
from ..adaptation.branch_training import LABELLINGS, train_label_branch
from ..adaptation.label_branch import LabelledFactory
from ..adaptation.plausibility import explained_intensity
from ..adaptation.segmenter import LabelledSlices, Segmenter, SegmenterConfig, train_segmenter
from ..errors import StoreError, UsageError
from ..generative.alarm import alarms
from ..generative.factory_file import load_factory
from ..generative.quality import site_quality
from ..generative.sharing import shared_anatomy
from .store import SliceStore

EXPLAINED = 0.85  # of what the first guess explains; good runs had 1.07 and more, bad ones .65 at most


def labelled_slices(store: SliceStore) -> LabelledSlices:
    """The training slices of a store's labelled cases. Raises StoreError if it has none, or labels of another kind."""
    if store.label_kind not in ("dense", "none"):
        raise StoreError(f"{store.path}: its labels are of kind '{store.label_kind}'; this needs dense ones")
    chosen = store.labelled_slices("train")
    return LabelledSlices(store.images[chosen], store.labels[chosen], store.classes)


def train_on_store(store: SliceStore, config: SegmenterConfig) -> Segmenter:
    """A segmenter of a site's own labelled slices, with no other site's help."""
    card = {"domain": store.domain, "slices": len(store.slices("train"))}
    return train_segmenter(labelled_slices(store), store.format, config, title=f"training on {store.domain}", card=card)


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
) -> LabelledFactory:
    """Add the label branch at a labelled site.

    Args:
        factory_file: exported factory. store_dir: the site's store, with labels.
        out: labelled factory file.
        classes: number of label values including background, if it is to be checked against the store's.
        labelling: "synthesis": a segmenter of the site's own labels synthetic slices; "inversion" (published): the
            site's own slices are inverted, and the branch learns their labels.
        branch_updates, keep: training steps of the branch, and how many of its best states give the labels together.
        config: of the two segmenters that teach: one labels the factory's slices, one travels with the factory and
            gives other sites' images a first guess.

    Raises: UsageError, StoreError or CheckpointError; then nothing is written.
    """
    if labelling not in LABELLINGS:
        raise UsageError(f"labelling is one of {', '.join(LABELLINGS)}")
    factory, store = load_factory(factory_file), SliceStore(store_dir)
    factory.config.domain_index(store.domain)
    store.require(size=factory.config.image_size, z_bins=factory.config.z_bins)
    if classes is not None and classes != store.classes:
        raise UsageError(f"--classes is {classes}, but the labels of {store.path} have {store.classes} values")
    config = replace(config or SegmenterConfig(), mirror=factory.config.mirror)
    teacher = train_on_store(store, config)
    robust = train_on_store(store, replace(config, remap_contrast=1.0))
    options: dict[str, Any] = {"domain": store.domain, "updates": branch_updates, "keep": keep, "seed": config.seed}
    if labelling == "inversion":
        options |= {"real": _with_heights(store, "train"), "held_out": _with_heights(store, "validation")}
    labelled = train_label_branch(factory, teacher, robust, **options)
    labelled.save(out)
    return labelled


def _with_heights(store: SliceStore, split: str) -> tuple[LabelledSlices, np.ndarray] | None:
    """Labelled slices of a split and their height bins; None if it has none."""
    if not any(case.split == split and case.labelled for case in store.cases):
        return None
    chosen = store.labelled_slices(split)
    return LabelledSlices(store.images[chosen], store.labels[chosen], store.classes), store.z_bin[chosen]


def adapt_site(
    store_dir: str | Path,
    out: str | Path,
    *,
    factory_file: str | Path | None = None,
    synthetic: str | Path | None = None,
    volumes: int = 90,
    config: SegmenterConfig | None = None,
) -> Segmenter:
    """Phase two at a site.

    With a factory: half of the training is synthetic slices of the site's domain with the factory's labels, half the
    site's own slices with the robust segmenter's labels. The first know the tissue, the second the scanner. With
    synthetic volumes: those alone.

    Args:
        store_dir: the site's own store; its labels, if it has any, are not read.
        factory_file: labelled factory to draw from, or
        synthetic: folder written by `generate-volumes` for the site's domain. Exactly one of the two.
        volumes: synthetic subjects to draw from the factory.

    Raises: UsageError, StoreError or CheckpointError; then nothing is written.
    """
    if (factory_file is None) == (synthetic is None):
        raise UsageError("give either a labelled factory (--factory) or synthetic volumes (--synthetic)")
    store, config = SliceStore(store_dir), config or SegmenterConfig()
    if factory_file is not None:
        labelled = LabelledFactory.load(factory_file)
        labelled.factory.config.domain_index(store.domain)
        store.require(size=labelled.factory.config.image_size, z_bins=labelled.factory.config.z_bins)
        drawn = draw_slices(labelled, store.domain, volumes=volumes, seed=config.seed)
        data = mix(drawn, pseudo_label(store.images[store.slices("train")], labelled.robust))
    else:
        data = read_synthetic(synthetic, store.domain)
    source = {"source": "factory" if factory_file is not None else "synthetic volumes"}
    segmenter = adapt(store.format, store.domain, data, config, facts=source)
    if factory_file is not None:
        segmenter.card |= _doubts(store, labelled, segmenter)
    segmenter.save(out)
    return segmenter


def _doubts(store: SliceStore, labelled: LabelledFactory, segmenter: Segmenter) -> dict[str, Any]:
    """For the segmenter's card: how the factory fits the site, and why its labels may not, all without a label."""
    chosen = store.slices("train")
    images, factory = store.images[chosen].astype(np.float32), labelled.factory
    domain = factory.config.domain_index(store.domain)
    z_bin = torch.from_numpy(store.z_bin[chosen])
    quality = site_quality(factory.generator, torch.from_numpy(images)[:, None], z_bin, domain)
    home = {store.domain, labelled.card["labelled_domain"]}
    shared = next((score for pair, score in shared_anatomy(factory.generator).items() if set(pair) == home), None)
    found = alarms(store.domain, quality, shared)
    own, guess = explained_intensity(images, segmenter), explained_intensity(images, labelled.robust)
    if own < EXPLAINED * guess:
        found.append(
            f"{store.domain}: the adapted segmenter's classes explain {own:.0%} of the images' grey levels, those of "
            f"the labelled site's segmenter {guess:.0%}"
        )
    explained = {"adapted": own, "first_guess": guess}
    return {"quality": quality.to_dict(), "explained": explained, "alarms": found}
