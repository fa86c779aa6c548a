"""A site's own segmenter from labelled synthetic slices of its domain; no other site need be online."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import StoreError, UsageError, VolumeError
from ..generative.synthesis import slice_heights
from ..progress import track
from ..slicing import SliceFormat
from ..volumes import read_volume
from .label_branch import LabelledFactory
from .segmenter import LabelledSlices, Segmenter, SegmenterConfig, train_segmenter

MANIFEST = "manifest.json"


def adapt(
    fmt: SliceFormat,
    domain: str,
    data: LabelledSlices,
    config: SegmenterConfig,
    *,
    facts: dict[str, Any],
) -> Segmenter:
    """Train a segmenter for images of `domain` that are brought into `fmt`.

    Args:
        fmt: the site's own slice format: its intensity window maps its images to the scale of the synthetic ones.
        data: labelled synthetic slices of the site's domain, see `draw_slices` and `read_synthetic`.
        facts: where the data came from; kept in the segmenter's card.

    Raises: StoreError if size of slices and format differ.
    """
    if data.images.shape[1] != fmt.size:
        raise StoreError(f"synthetic slices are {data.images.shape[1]} px, the site's store has {fmt.size} px")
    card = {"domain": domain, "slices": len(data.images), **facts}
    return train_segmenter(data, fmt, config, title=f"adapting to {domain}", card=card)


def pseudo_label(images: np.ndarray, robust: Segmenter, batch_size: int = 64) -> LabelledSlices:
    """A site's own slices (N, S, S) with the labels that another site's robust segmenter gives them."""
    images = images.astype(np.float32)
    parts = torch.from_numpy(images)[:, None].split(batch_size)
    labels = [robust.probabilities(part).argmax(1).to(torch.uint8).numpy() for part in parts]
    return LabelledSlices(images, np.concatenate(labels), robust.classes)


def mix(synthetic: LabelledSlices, own: LabelledSlices) -> LabelledSlices:
    """Both together, the smaller set repeated so that each makes about half of the training.

    Raises: StoreError if the slices' sides differ.
    """
    if synthetic.images.shape[1] != own.images.shape[1]:
        raise StoreError(
            f"synthetic slices are {synthetic.images.shape[1]} px, the site's are {own.images.shape[1]} px"
        )
    longer = max(len(synthetic.images), len(own.images))
    parts = [part for one in (synthetic, own) for part in [one] * max(1, round(longer / len(one.images)))]
    images, labels = (np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "labels"))
    return LabelledSlices(images, labels, synthetic.classes)


def draw_slices(factory: LabelledFactory, domain: str, *, volumes: int, seed: int) -> LabelledSlices:
    """Labelled slices of `volumes` synthetic subjects, two per height bin."""
    heights = slice_heights(factory.factory.config.z_bins, 2)
    drawn = [
        factory.draw_volume(domain, heights, seed=seed + number)
        for number in track(range(volumes), f"drawing volumes of {domain}")
    ]
    return LabelledSlices(
        np.concatenate([one[0] for one in drawn]), np.concatenate([one[1] for one in drawn]), factory.card["classes"]
    )


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
        raise UsageError(f"{folder}: no synthetic volumes here ({MANIFEST} is missing or damaged)") from None
    if layout != "nifti":
        raise UsageError(f"{folder}: its layout is '{layout}'; generate volumes with --layout nifti to adapt to them")
    if shown != domain:
        raise UsageError(f"{folder}: shows domain '{shown}', the store is of '{domain}'")
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
    return LabelledSlices(np.concatenate(images), np.concatenate(labels).astype(np.uint8), classes)
