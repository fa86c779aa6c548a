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
from ..imaging.cases import CaseFiles, file_name, find_images
from ..imaging.centre_table import CentreSource
from ..imaging.overlays import strip
from ..imaging.slice_format import SliceFormat, mean_and_deviation
from ..imaging.slice_grid import SliceGrid
from ..imaging.volume_files import read_volume, write_volume
from ..imaging.volumes import Image, Volume, first_channel
from .evaluation.evaluate import PROBABILITIES
from .segmenter import Segmenter


@dataclass(frozen=True)
class Outputs:
    """What is written besides label maps.

    Attributes:
        probabilities: `<case>_probabilities.nii.gz`, (X, Y, Z, classes) float32, summing to one.
        pictures: `<case>.png`, slices with their labels.
        views: number of turned, mirrored or shifted views that are averaged; at most as many as the models have.
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
    centres: CentreSource | None = None,
    device: str = "cpu",
) -> list[Path]:
    """Segment images.

    Args:
        images: NIfTI files, folders with one DICOM series, or whole data sets (see `find_images`); names must differ.
        models: segmenter files; the probabilities of several are averaged.
        out: new folder for `<case>.nii.gz` label maps, with the images' affine and shape.
        outputs: what is written besides; None: nothing.
        centres: gives the place of each image around which its slices are cut; all are looked up before the first image
            is segmented. None cuts around the middle of the body.
        device: of the models.

    Returns: the written label maps. Raises UsageError, VolumeError or CheckpointError; then nothing is written.
    """
    if not images or not models:
        raise UsageError(f"there are {len(images)} images and {len(models)} models; give at least one of each")
    outputs, found_images = outputs or Outputs(), find_images(images)
    for problem in found_images.problems.values():
        raise UsageError(problem)
    cases = found_images.cases
    refuse_existing(out)
    segmenters = [Segmenter.load(model).to(device) for model in models]
    if len({(segmenter.format, segmenter.classes) for segmenter in segmenters}) > 1:
        raise CheckpointError(f"the {len(segmenters)} models must share slice format and number of classes")
    for model, segmenter in zip(models, segmenters, strict=True):
        segmenter.check_views(outputs.views)
        if centres is None and segmenter.card.training.centred:
            raise UsageError(
                f"{model}: was trained on slices around given places; give a `localiser` or a table of `centres`"
            )
    places = _places(cases, centres) if centres is not None else {}
    with atomic_folder(out) as folder:
        for case in track(cases, "segmenting"):
            image, name = read_channels(case), file_name(case.name)
            volume = first_channel(image)
            try:
                grid, found = slice_probabilities(
                    image, segmenters, centre=places.get(case.name), views=outputs.views, device=device
                )
            except VolumeError as error:
                raise VolumeError(f"{case.name}: {error}") from None
            labels = Volume(segmenters[0].tidied(grid.labels_to_volume(found)), volume.affine)
            write_volume(folder / f"{name}.nii.gz", labels)
            if outputs.probabilities:
                whole = Volume(np.moveaxis(grid.probabilities_to_volume(found), 0, 3), volume.affine)
                write_volume(folder / f"{name}{PROBABILITIES}.nii.gz", whole)
            if outputs.pictures:
                _picture(folder / f"{name}.png", volume, labels, grid=grid)
    return [Path(out) / f"{file_name(case.name)}.nii.gz" for case in cases]


def read_channels(case: CaseFiles) -> list[Volume | None]:
    """The volumes of a case's channels, None for one that it lacks."""
    return [None if files is None else read_volume(files) for files in case.channels]


def channel_slices(image: Image, fmt: SliceFormat, grid: SliceGrid) -> np.ndarray:
    """Slices (n, C, S, S) float32 in [-1, 1] of an image given as in `slice_probabilities`.

    Every channel is standardised by itself, the channels of a colour picture together; a channel that is missing is
    background.

    Raises: VolumeError for a channel without contrast, or channels that do not fit together or to the format.
    """
    channels = [image] if isinstance(image, Volume) else list(image)
    if len(channels) != fmt.channels:
        raise VolumeError(
            f"the image has {len(channels)} channel(s); it must have {fmt.channels}, as the model's images"
        )
    first = first_channel(channels)
    for number, volume in enumerate(channels):
        if volume is not None and not (
            volume.data.shape == first.data.shape and np.allclose(volume.affine, first.affine, atol=1e-3)
        ):
            raise VolumeError(f"channel {number} has other voxels than the first; resample it to the first one's grid")
    kept = [None if volume is None else grid.kept(volume) for volume in channels]
    if fmt.colour:
        rules = [mean_and_deviation(np.stack([part for part in kept if part is not None]))] * fmt.channels
    else:
        rules = [(0.0, 1.0) if part is None else mean_and_deviation(part) for part in kept]
    missing = np.full_like(grid.image_slices(first), np.nan) if any(part is None for part in kept) else None
    slices = [
        missing if volume is None else (grid.image_slices(volume) - mean) / deviation
        for volume, (mean, deviation) in zip(channels, rules, strict=True)
    ]
    return fmt.scale(np.stack(slices, 1))


def slice_probabilities(
    image: Image,
    segmenters: Sequence[Segmenter],
    *,
    centre: np.ndarray | None = None,
    views: int = 1,
    device: str = "cpu",
) -> tuple[SliceGrid, np.ndarray]:
    """The slices' grid in the volume, and mean probabilities (slices, classes, size, size) on it.

    Args:
        image: one volume, or one for each channel of the segmenters, None for one that the case lacks.
        segmenters: of one slice format; their probabilities are averaged.
        centre: (3,) voxel in the middle of the slices, see `SliceGrid.of`.
        views: see `Segmenter.probabilities`.
        device: where the segmenters are.

    Raises: VolumeError for an image without contrast, or whose channels do not fit together or to the segmenters, or
        for a centre in the air around the body.
    """
    fmt = segmenters[0].format
    grid = SliceGrid.of(first_channel(image), fmt, centre=centre)
    slices = torch.from_numpy(channel_slices(image, fmt, grid)).to(device)
    found = torch.stack([segmenter.probabilities(slices, views=views) for segmenter in segmenters]).mean(0)
    return grid, found.cpu().numpy()


def _places(cases: Sequence[CaseFiles], centres: CentreSource) -> dict[str, np.ndarray]:
    """The (3,) voxel around which each image is cut, by name. Raises: VolumeError that names all images without one."""
    places, reasons = {}, {}
    for case in track(cases, "locating"):
        try:
            places[case.name] = centres.voxel_in(case.name, read_channels(case))
        except VolumeError as error:
            reasons[case.name] = str(error)
    if reasons:
        first = next(iter(reasons.values()))
        raise VolumeError(f"{len(reasons)} of {len(cases)} images have no centre: {', '.join(reasons)}; {first}")
    return places


def _picture(path: Path, volume: Volume, labels: Volume, *, grid: SliceGrid) -> None:
    import matplotlib.image

    image, found = (part.turned(grid.fmt.plane).data for part in (volume, labels))
    matplotlib.image.imsave(path, strip(image, found))
