"""Applying segmenters to new images: label maps on the images' own grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import CheckpointError, UsageError, VolumeError
from ..files import atomic_folder, refuse_existing
from ..progress import track
from ..slice_grid import SliceGrid
from ..slicing import mean_and_deviation
from ..volumes import Volume, case_name, read_volume, write_volume
from .segmenter import Segmenter


def segment(images: Sequence[str | Path], models: Sequence[str | Path], out: str | Path) -> list[Path]:
    """Segment NIfTI images.

    Args:
        images: files; their names must differ.
        models: segmenter files; the probabilities of several are averaged.
        out: new folder for `<case>.nii.gz` label maps, with the images' affine and shape.

    Returns: the written files. Raises UsageError, VolumeError or CheckpointError; then nothing is written.
    """
    paths = [Path(image) for image in images]
    names = [case_name(path) for path in paths]
    if not paths or not models:
        raise UsageError("give at least one image and one model")
    if len(set(names)) != len(names):
        raise UsageError("two images have the same file name; segment them into different folders")
    refuse_existing(out)
    segmenters = [Segmenter.load(model) for model in models]
    if len({(one.format, one.classes) for one in segmenters}) > 1:
        raise CheckpointError("the models of an ensemble must share slice format and classes")
    with atomic_folder(out) as folder:
        for path, name in track(list(zip(paths, names, strict=True)), "segmenting"):
            volume = read_volume(path)
            try:
                labels = segment_volume(volume, segmenters)
            except VolumeError as error:
                raise VolumeError(f"{path}: {error}") from None
            write_volume(folder / f"{name}.nii.gz", Volume(labels, volume.affine))
    return [Path(out) / f"{name}.nii.gz" for name in names]


def segment_volume(volume: Volume, segmenters: Sequence[Segmenter], batch_size: int = 32) -> np.ndarray:
    """uint8 label map of the volume's shape. Raises VolumeError if the image is constant."""
    fmt = segmenters[0].format
    grid = SliceGrid.of(volume, fmt)
    mean, deviation = mean_and_deviation(grid.kept(volume))
    slices = torch.from_numpy(fmt.scale((grid.image_slices(volume) - mean) / deviation))[:, None]
    parts = [torch.stack([one.probabilities(part) for one in segmenters]).mean(0) for part in slices.split(batch_size)]
    return grid.labels_to_volume(torch.cat(parts).numpy())
