"""Applying segmenters to new images: label maps on the images' own grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..common.files import atomic_folder, refuse_existing
from ..common.progress import track
from ..errors import CheckpointError, UsageError, VolumeError
from ..imaging.cases import find_cases
from ..imaging.dicom import find_series
from ..imaging.overlays import strip
from ..imaging.slice_format import mean_and_deviation
from ..imaging.slice_grid import SliceGrid
from ..imaging.volume_files import case_name, read_volume, write_volume
from ..imaging.volumes import Volume
from .evaluation.evaluate import PROBABILITIES
from .segmenter import Segmenter


@dataclass(frozen=True)
class Outputs:
    """What is written besides label maps.

    Attributes:
        probabilities: `<case>_probabilities.nii.gz`, (X, Y, Z, classes) float32, summing to one.
        pictures: `<case>.png`, slices with their labels.
        views: number of turned and mirrored views that are averaged; at most as many as the models were trained in.
    """

    probabilities: bool = False
    pictures: bool = False
    views: int = 1


def segment(
    images: Sequence[str | Path],
    models: Sequence[str | Path],
    out: str | Path,
    *,
    outputs: Outputs | None = None,
    device: str = "cpu",
) -> list[Path]:
    """Segment images.

    Args:
        images: NIfTI files, folders with one DICOM series, or whole data sets (see `find_cases`); names must differ.
        models: segmenter files; the probabilities of several are averaged.
        out: new folder for `<case>.nii.gz` label maps, with the images' affine and shape.

    Returns: the written label maps. Raises UsageError, VolumeError or CheckpointError; then nothing is written.
    """
    outputs, cases = outputs or Outputs(), [case for image in images for case in _cases(Path(image))]
    names = [name for name, _ in cases]
    if not cases or not models:
        raise UsageError(f"there are {len(cases)} images and {len(models)} models; give at least one of each")
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError(f"the name of {len(twice)} images, such as '{twice[0]}', is not unique; use different folders")
    refuse_existing(out)
    segmenters = [Segmenter.load(model).to(device) for model in models]
    if len({(segmenter.format, segmenter.classes) for segmenter in segmenters}) > 1:
        raise CheckpointError(f"the {len(segmenters)} models must share slice format and number of classes")
    for segmenter in segmenters:
        segmenter.check_views(outputs.views)
    with atomic_folder(out) as folder:
        for name, source in track(cases, "segmenting"):
            volume = read_volume(source)
            try:
                grid, found = slice_probabilities(volume, segmenters, views=outputs.views, device=device)
            except VolumeError as error:
                raise VolumeError(f"{name}: {error}") from None
            labels = Volume(segmenters[0].tidied(grid.labels_to_volume(found)), volume.affine)
            write_volume(folder / f"{name}.nii.gz", labels)
            if outputs.probabilities:
                whole = Volume(np.moveaxis(grid.probabilities_to_volume(found), 0, 3), volume.affine)
                write_volume(folder / f"{name}{PROBABILITIES}.nii.gz", whole)
            if outputs.pictures:
                _picture(folder / f"{name}.png", volume, labels, grid=grid)
    return [Path(out) / f"{name}.nii.gz" for name in names]


def slice_probabilities(
    volume: Volume, segmenters: Sequence[Segmenter], *, views: int = 1, device: str = "cpu"
) -> tuple[SliceGrid, np.ndarray]:
    """The slices' grid in the volume, and mean probabilities (slices, classes, size, size) on it."""
    fmt = segmenters[0].format
    grid = SliceGrid.of(volume, fmt)
    mean, deviation = mean_and_deviation(grid.kept(volume))
    slices = torch.from_numpy(fmt.scale((grid.image_slices(volume) - mean) / deviation))[:, None].to(device)
    found = torch.stack([segmenter.probabilities(slices, views=views) for segmenter in segmenters]).mean(0)
    return grid, found.cpu().numpy()


def _cases(path: Path) -> list[tuple[str, Path | tuple[Path, ...]]]:
    """Name and file of an image, or of all images in a folder.

    Raises: UsageError if a folder has no image, or an ambiguous one.
    """
    if not path.is_dir():
        return [(case_name(path), path)]
    series = find_series(path)
    if len(series) == 1:
        return [(path.name, next(iter(series.values())))]
    found = find_cases(path, label_key=None)
    if found.problems or not found.cases:
        said = next(iter(found.problems.values()), f"{path}: holds no image")
        raise UsageError(said)
    return [(case.name.replace("/", "_"), case.image) for case in found.cases]


def _picture(path: Path, volume: Volume, labels: Volume, *, grid: SliceGrid) -> None:
    import matplotlib.image

    image, found = (part.turned(grid.fmt.plane).data for part in (volume, labels))
    matplotlib.image.imsave(path, strip(image, found))
