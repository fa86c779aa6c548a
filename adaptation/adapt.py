"""A site's own segmenter from labelled synthetic slices of its domain; no other site need be online."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..common.progress import track
from ..errors import StoreError, UsageError, VolumeError
from ..generative.synthesis import slice_heights
from ..imaging.slice_format import SliceFormat
from ..imaging.volume_files import read_volume
from .explained_intensity import explained_intensity
from .labelled_factory import LabelledFactory
from .labelled_slices import LabelledSlices, foreground_dice
from .segmenter import Segmenter
from .segmenter_card import TrainingFacts
from .training.segmenter_training import SegmenterConfig, SegmenterData, train_segmenters
from .training.training_loop import LoopConfig

MANIFEST = "manifest.json"
# Dice on synthetic slices: 0.09 and 0.20 where another site's segmenter failed, at least 0.5 elsewhere.
MIN_AGREEMENT = 0.25


def adapt(
    fmt: SliceFormat,
    domain: str,
    data: SegmenterData,
    *,
    config: SegmenterConfig,
    facts: TrainingFacts | None = None,
    loop: LoopConfig | None = None,
    device: str = "cpu",
) -> list[Segmenter]:
    """Train segmenters for images of `domain` that are brought into `fmt`, the best first.

    Args:
        fmt: the site's own slice format: its intensity window maps its images to the scale of the synthetic ones.
        domain: the site's domain.
        data: slices to train on; the labelled ones are usually synthetic slices of the site's domain, see
            `draw_slices` and `read_synthetic`.
        config: of the training.
        facts: where the data came from; kept in the segmenter's card.
        loop: evaluations and checkpoints; None evaluates at the end alone.
        device: to train on.

    Raises: StoreError if size of slices and format differ.
    """
    images = data.labelled.images
    if images.shape[1] != fmt.size:
        raise StoreError(f"synthetic slices are {images.shape[1]} px; they must be {fmt.size} px as in the store")
    facts = replace(facts or TrainingFacts(), domain=domain, slices=len(images))
    title = f"adapting to {domain}"
    return train_segmenters(data, fmt, config, title=title, facts=facts, loop=loop, device=device)


def training_set(
    images: np.ndarray,
    drawn: LabelledSlices,
    robust: Segmenter,
    *,
    fmt: SliceFormat,
    domain: str,
    config: SegmenterConfig,
    volume: np.ndarray | None = None,
) -> LabelledSlices:
    """The training set of a site: usually half labelled synthetic slices of its domain, and half the site's own slices
    with the labels of the labelled site's robust segmenter.

    If that segmenter does not agree with the labels of the synthetic slices, one of the two is wrong. Then a segmenter
    is trained on the synthetic slices alone. If its classes explain more of the grey levels of the site's images, it
    labels the site's own slices; if not, the synthetic slices are left out.

    Args:
        images: (N, S, S) in [-1, 1], the site's own slices.
        drawn: labelled synthetic slices of the domain.
        robust: the labelled site's segmenter.
        fmt: the site's slice format.
        domain: the site's domain.
        config: of the segmenter that may be trained.
        volume: (N,) integer, the volume that a slice belongs to; None where that is not known.
    """
    images, shown = images.astype(np.float32), torch.from_numpy(drawn.images.astype(np.float32))[:, None]
    found = robust.probabilities(shown, drawn.volume).argmax(1)
    if foreground_dice(found, torch.from_numpy(drawn.labels.astype(np.int64)), drawn.classes) >= MIN_AGREEMENT:
        return mix(drawn, pseudo_label(images, robust, volume))
    (alone,) = adapt(fmt, domain, SegmenterData(labelled=drawn), config=config)
    by_robust, by_alone = (explained_intensity(images, segmenter, volume) for segmenter in (robust, alone))
    if by_alone > by_robust:
        return mix(drawn, pseudo_label(images, alone, volume))
    return pseudo_label(images, robust, volume)


def pseudo_label(images: np.ndarray, teacher: Segmenter, volume: np.ndarray | None = None) -> LabelledSlices:
    """A site's own slices with the labels that a segmenter gives them.

    Args:
        images: (N, S, S) in [-1, 1].
        teacher: gives the labels.
        volume: (N,) integer, the volume that a slice belongs to; None where that is not known.
    """
    images = images.astype(np.float32)
    labels = teacher.probabilities(torch.from_numpy(images)[:, None], volume).argmax(1).to(torch.uint8).numpy()
    return LabelledSlices(images, labels, teacher.classes, volume)


def mix(synthetic: LabelledSlices, own: LabelledSlices) -> LabelledSlices:
    """Both together, the smaller set repeated so that each makes about half of the training.

    Raises: StoreError if the slices' sides differ.
    """
    if synthetic.images.shape[1] != own.images.shape[1]:
        raise StoreError(
            f"synthetic slices are {synthetic.images.shape[1]} px; they must be {own.images.shape[1]} px as the site's"
        )
    longer = max(len(synthetic.images), len(own.images))
    parts = [part for given in (synthetic, own) for part in [given] * max(1, round(longer / len(given.images)))]
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    volume = None
    if all(part.volume is not None for part in parts):  # a repeated volume counts as a further volume
        volume = np.concatenate([part.volume - part.volume[0] + 1_000_000 * n for n, part in enumerate(parts)])
    return LabelledSlices(images, labels, synthetic.classes, volume)


def draw_slices(
    factory: LabelledFactory, domain: str, *, volumes: int, seed: int, slices: int | None = None
) -> LabelledSlices:
    """Labelled slices of `volumes` synthetic subjects: `slices` of each, or two per height bin."""
    bins = factory.factory.config.z_bins
    heights = slice_heights(bins, 2) if slices is None else torch.linspace(0, bins - 1, slices)
    drawn = [
        factory.draw_volume(domain, heights, seed=seed + number)
        for number in track(range(volumes), f"drawing volumes of {domain}")
    ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    return LabelledSlices(images, labels, factory.card.classes, np.repeat(np.arange(volumes), len(heights)))


def read_synthetic(folder: str | Path, domain: str) -> LabelledSlices:
    """Slices of volumes written by `generate-volumes`.

    Raises: UsageError if the folder is none of those or shows another domain, VolumeError if a volume is damaged.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        cases, classes, shown = manifest["volumes"], int(manifest["classes"]), manifest["domain"]
        names = [str(case["name"]) for case in cases]
        layout = manifest["layout"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UsageError(
            f"{folder}: no synthetic volumes here ({MANIFEST} is missing or damaged); give a folder written by "
            "`fedfactory generate-volumes`"
        ) from None
    if layout != "nifti":
        raise UsageError(f"{folder}: its layout is '{layout}'; write it with `generate-volumes ... --layout nifti`")
    if shown != domain:
        raise UsageError(f"{folder}: shows domain '{shown}'; it must be the store's domain, '{domain}'")
    images, labels = [], []
    for name in track(names, "reading synthetic volumes"):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UsageError(f"{folder / MANIFEST}: '{name}' is no plain name")
        image = read_volume(folder / name / "image" / f"{name}.nii.gz")
        label = read_volume(folder / name / "label" / f"{name}.nii.gz", integer=True)
        if label.data.shape != image.data.shape or label.data.max() >= classes:
            raise VolumeError(f"{folder / name}: image and label do not fit together")
        images.append(np.moveaxis(image.data, 2, 0))
        labels.append(np.moveaxis(label.data, 2, 0))
    volume = np.repeat(np.arange(len(images)), [len(image) for image in images])
    return LabelledSlices(np.concatenate(images), np.concatenate(labels).astype(np.uint8), classes, volume)
