"""A site's own segmenter from labelled synthetic slices of its domain; no other site need be online."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..common.json_text import read_json
from ..common.progress import track
from ..errors import StoreError, UsageError, VolumeError
from ..generative.synthesis import subject_heights
from ..imaging.class_names import check_names
from ..imaging.slice_choices import MAX_CHANNELS, UNLABELLED
from ..imaging.slice_format import SliceFormat
from .engine.segmenter_config import SegmenterConfig
from .engine.training_loop import LoopConfig
from .labelled_factory import DrawingFactory
from .labelled_slices import LabelledSlices, foreground_dice, parts_of, with_channels
from .segmenter import Segmenter
from .segmenter_card import TrainingFacts
from .training.segmenter_training import SegmenterData, train_segmenters
from .volume_formats import READERS

MANIFEST = "manifest.json"
# Dice of the first guess on synthetic slices: .43 and .41 where it was poor and their labels were good, at least .5
# where both were good enough to train on.
MIN_AGREEMENT = 0.5
SYNTHETIC_SHARE = 0.5  # of every batch


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
        data: slices to train on, see `training_set`, or synthetic slices alone, see `draw_slices` and
            `read_synthetic`.
        config: of the training.
        facts: where the data came from; kept in the segmenter's card.
        loop: evaluations and checkpoints; None evaluates at the end alone.
        device: to train on.

    Raises: StoreError if size of slices and format differ, UsageError if their numbers of channels do.
    """
    side, facts = data.labelled.images.shape[-1], facts or TrainingFacts()
    if side != fmt.size:
        raise StoreError(f"synthetic slices are {side} px; they must be {fmt.size} px as in the store")
    parts = (data.labelled, *(slices for slices, _ in data.further))
    count = sum(len(part.images) for part in parts) - facts.labelled_slices
    facts = replace(facts, domain=domain, slices=count)
    title = f"adapting to {domain}"
    return train_segmenters(data, fmt, config, title=title, facts=facts, loop=loop, device=device)


def training_set(
    images: np.ndarray,
    drawn: LabelledSlices,
    first_guess: Segmenter,
    *,
    volume: np.ndarray | None = None,
    labels_carry_over: bool = True,
) -> SegmenterData:
    """What a site trains on: its own slices with the first guess's labels, and half as labelled synthetic slices.

    If the first guess does not agree with the labels of the synthetic slices, one of the two is wrong. Where the
    factory's labels carry over to the domain, that is the first guess, and the synthetic slices are used alone, by a
    new network. Where they do not, the synthetic slices are left out.

    Args:
        images: (N, C, S, S), or (N, S, S) of one channel, in [-1, 1], the site's own slices.
        drawn: labelled synthetic slices of the domain.
        first_guess: the labelled site's segmenter for other contrasts; its network is trained further.
        volume: (N,) integer, the volume that a slice belongs to; None where that is not known.
        labels_carry_over: whether the factory's domain shares so much anatomy with the labelled one that labels are
            right in both, see `shared_anatomy`.

    Raises: StoreError if the slices' sides or numbers of channels differ.
    """
    images = with_channels(images)
    side, channels = images.shape[-1], images.shape[1]
    if drawn.images.shape[-1] != side:
        raise StoreError(f"synthetic slices are {drawn.images.shape[-1]} px; they must be {side} px as the site's")
    if drawn.channels != channels:
        raise StoreError(f"synthetic slices have {drawn.channels} channel(s); they must have {channels} as the site's")
    found = first_guess.probabilities(torch.from_numpy(drawn.images.astype(np.float32)), drawn.volume).argmax(1)
    agreement = foreground_dice(found, torch.from_numpy(drawn.labels.astype(np.int64)), drawn.classes)
    if not agreement >= MIN_AGREEMENT and labels_carry_over:
        return SegmenterData(labelled=drawn)
    own = pseudo_label(images, first_guess, volume)
    if agreement >= MIN_AGREEMENT:
        return SegmenterData(labelled=own, further=((drawn, SYNTHETIC_SHARE),), start=first_guess)
    return SegmenterData(labelled=own, start=first_guess)


def pseudo_label(images: np.ndarray, teacher: Segmenter, volume: np.ndarray | None = None) -> LabelledSlices:
    """A site's own slices with the labels that a segmenter gives them, averaged over all views that it knows.

    Args:
        images: (N, C, S, S), or (N, S, S) of one channel, in [-1, 1].
        teacher: gives the labels.
        volume: (N,) integer, the volume that a slice belongs to; None where that is not known.
    """
    images = with_channels(images).astype(np.float32)
    shown = torch.from_numpy(images)
    labels = teacher.probabilities(shown, volume, views=len(teacher.card.views)).argmax(1).to(torch.uint8).numpy()
    for part in parts_of(len(labels), volume) if volume is not None else []:
        labels[part] = teacher.tidied(labels[part])
    return LabelledSlices(images, labels, teacher.classes, volume)


def draw_slices(
    factory: DrawingFactory, domain: str, *, volumes: int, seed: int, slices: int | None = None
) -> LabelledSlices:
    """Labelled slices of `volumes` synthetic subjects: `slices` of each, or two per height bin; of pictures, one."""
    config = factory.factory.config
    alone = slices is None or config.pictures
    heights = subject_heights(config, 2) if alone else torch.linspace(0, config.z_bins - 1, slices)
    drawn = [
        factory.draw_volume(domain, heights, seed=seed + number)
        for number in track(range(volumes), f"drawing volumes of {domain}")
    ]
    images, labels = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    return LabelledSlices(images, labels, factory.card.classes, np.repeat(np.arange(volumes), len(heights)))


def read_synthetic(folder: str | Path, domain: str) -> LabelledSlices:
    """Slices of volumes or pictures written by `generate-volumes`.

    Raises: UsageError if the folder is none of those or shows another domain, VolumeError if a volume is damaged.
    """
    folder, manifest = Path(folder), _manifest(folder)
    try:
        cases, classes, shown = manifest["volumes"], int(manifest["classes"]), manifest["domain"]
        names = [str(case["name"]) for case in cases]
        layout, channels = manifest["layout"], int(manifest.get("channels", 1))
    except (ValueError, KeyError, TypeError):
        raise _damaged(folder) from None
    if layout not in READERS:
        raise UsageError(
            f"{folder}: its layout is '{layout}'; write it with `generate-volumes ... --layout nifti`, or images"
        )
    if not 1 <= channels <= MAX_CHANNELS:
        raise UsageError(f"{folder / MANIFEST}: channels is {channels}; it must be from 1 to {MAX_CHANNELS}")
    if not 2 <= classes <= UNLABELLED:
        raise UsageError(f"{folder / MANIFEST}: classes is {classes}; it must be from 2 to {UNLABELLED}")
    if shown != domain:
        raise UsageError(f"{folder}: shows domain '{shown}'; it must be the store's domain, '{domain}'")
    images, labels = [], []
    for name in track(names, "reading synthetic volumes"):
        if Path(name).name != name or name in ("", ".", ".."):
            raise UsageError(f"{folder / MANIFEST}: '{name}' is no plain name")
        image, label = READERS[layout](folder, name, channels)
        if label.max() >= classes:
            raise VolumeError(f"{folder / name}: image and label do not fit together")
        images.append(image)
        labels.append(label)
    volume = np.repeat(np.arange(len(images)), [len(image) for image in images])
    return LabelledSlices(np.concatenate(images), np.concatenate(labels).astype(np.uint8), classes, volume)


def synthetic_labels(folder: str | Path) -> dict[str, dict]:
    """What `generate-volumes` wrote of the classes: `class_names` and `original_values`, as in `SegmenterCard`.

    Raises: UsageError if the folder is none of those, or they cannot be used.
    """
    manifest = _manifest(folder)
    names, originals = manifest.get("class_names", {}), manifest.get("original_values", {})
    try:
        names = check_names({int(k): str(v) for k, v in names.items()})
        return {
            "class_names": {str(value): name for value, name in names.items()},
            "original_values": {str(int(label)): int(value) for label, value in originals.items()},
        }
    except (UsageError, ValueError, TypeError, AttributeError):
        raise _damaged(folder) from None


def _manifest(folder: str | Path) -> dict[str, Any]:
    try:
        found = read_json(Path(folder) / MANIFEST)
    except (OSError, ValueError):
        raise _damaged(folder) from None
    if not isinstance(found, dict):
        raise _damaged(folder)
    return found


def _damaged(folder: str | Path) -> UsageError:
    return UsageError(
        f"{folder}: no synthetic volumes here ({MANIFEST} is missing or damaged); give a folder written by "
        "`fedfactory generate-volumes`"
    )
