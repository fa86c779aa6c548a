"""Applying segmenters to new images: label maps on the images' own grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .. import __version__
from ..common.files import atomic_folder, refuse_existing
from ..common.progress import track
from ..errors import CheckpointError, UsageError, VolumeError
from ..imaging.accounting.account import Accounting, account_for_images
from ..imaging.archive.segmentation_writer import write_segmentation
from ..imaging.case_files import CaseFiles, Found, file_name
from ..imaging.cases import find_images
from ..imaging.centre_table import CentreSource
from ..imaging.formats.frames import choose_reading
from ..imaging.formats.label_values import original_values
from ..imaging.image_reader import read_image
from ..imaging.images import Image
from ..imaging.overlays import strip
from ..imaging.pictures.contours import thumbnail, volume_thumbnails, with_contours
from ..imaging.pictures.decoding import write_picture
from ..imaging.slice_format import SliceFormat
from ..imaging.slice_grid import SliceGrid
from ..imaging.volume_files import write_volume
from ..imaging.volumes import Volume
from .contact_sheet import SHEET, SIDE, SheetCase, write_sheet
from .evaluation.evaluate import PROBABILITIES
from .segmenter import Segmenter

CONTOURS = "contours"  # folder of pictures with contours, which are no label maps


@dataclass(frozen=True)
class Outputs:
    """What is written besides label maps.

    Attributes:
        probabilities: `<case>_probabilities.nii.gz`, (X, Y, Z, classes) float32, summing to one; not of pictures.
        pictures: `<case>.png`, slices with their labels; of a picture `contours/<case>.png`, itself with their
            contours.
        dicom_seg: `<case>.dcm`, a DICOM segmentation that refers to the series; of DICOM series only.
        views: number of turned, mirrored or shifted views that are averaged; at most as many as the models have.
        original_values: whether label maps have the values of the labelled site's files in place of class numbers;
            probabilities, pictures and DICOM segmentations keep class numbers.
        page: `cases.html`, all cases with the volume of each class, the unusual ones first, see `write_sheet`.
    """

    probabilities: bool = False
    pictures: bool = False
    dicom_seg: bool = False
    views: int = 1
    original_values: bool = False
    page: bool = False


def segment(
    images: Sequence[str | Path],
    models: Sequence[str | Path],
    out: str | Path,
    *,
    outputs: Outputs | None = None,
    image_key: str = "image",
    fill_missing: bool = False,
    series: str | None = None,
    frames: str | None = None,
    nan: str | None = None,
    centres: CentreSource | None = None,
    device: str = "cpu",
    tell: Callable[[Accounting], None] | None = None,
) -> list[Path]:
    """Segment images.

    Args:
        images: files of volumes, pictures, folders with one DICOM series, or whole data sets (see `find_images`); names
            must differ.
        models: segmenter files; the probabilities of several are averaged.
        out: new folder for `<case>.nii.gz` label maps, which lie in every program where the images lie, whatever format
            the images have; `<case>.png` of pictures.
        outputs: what is written besides; None: nothing.
        image_key: modality folders of the images in a data set, see `find_cases`.
        fill_missing: whether a channel that an image lacks is background; otherwise it is refused.
        series: of several DICOM series in a folder, the one to use, see `find_cases`.
        frames: "each", "first" or a number, of files that hold several volumes, see `choose_reading`.
        nan: what becomes of NaN and infinite voxels, see `Reading`; None: as in the models' slice format.
        centres: gives the place of each image around which its slices are cut; all are looked up before the first image
            is segmented. None cuts around the middle of the body.
        device: of the models.
        tell: is told what became of every entry of the folders before the first image is segmented.

    Returns: the written label maps. Raises UsageError, VolumeError or CheckpointError; then nothing is written.
    """
    if not images or not models:
        raise UsageError(f"there are {len(images)} images and {len(models)} models; give at least one of each")
    outputs = outputs or Outputs()
    segmenters = [Segmenter.load(model).to(device) for model in models]
    fmt = segmenters[0].format
    if len({(segmenter.format, segmenter.classes) for segmenter in segmenters}) > 1:
        raise CheckpointError(f"the {len(segmenters)} models must share slice format and number of classes")
    for model, segmenter in zip(models, segmenters, strict=True):
        segmenter.check_views(outputs.views)
        if centres is None and segmenter.card.training.centred:
            raise UsageError(
                f"{model}: was trained on slices around given places; give a `localiser` or a table of `centres`"
            )
        if outputs.original_values and not segmenter.card.original_values:
            raise UsageError(f"{model}: the labels that it learnt from are class numbers; leave original_values out")
    channels = 1 if fmt.pictures else fmt.channels
    found = find_images(images, image_key=image_key, channels=channels, fill_missing=fill_missing, series=series)
    choose_reading(found, frames=frames, nan=nan or fmt.nan)
    _refuse_unusable(found, fmt, outputs)
    cases = found.cases
    if tell is not None:
        tell(account_for_images(images, found, image_keys=tuple(image_key.split(","))))
    refuse_existing(out)
    places = _places(cases, centres, fmt) if centres is not None else {}
    sheet: list[SheetCase] = []
    with atomic_folder(out) as folder:
        for case in track(cases, "segmenting"):
            image = read_image(case.channels, fmt=fmt, reading=case.reading)
            try:
                grid, values = slice_probabilities(
                    image, segmenters, centre=places.get(case.name), views=outputs.views, device=device
                )
            except VolumeError as error:
                raise VolumeError(f"{case.name}: {error}") from None
            labels = image.volume(segmenters[0].tidied(grid.labels_to_volume(values)))
            _write(folder, case, labels, image=image, segmenter=segmenters[0], outputs=outputs)
            if outputs.page:
                sheet.append(_sheet_case(case, labels, image=image, segmenter=segmenters[0]))
            if outputs.probabilities:
                whole = image.volume(np.moveaxis(grid.probabilities_to_volume(values), 0, 3))
                write_volume(folder / f"{file_name(case.name)}{PROBABILITIES}.nii.gz", whole)
        if outputs.page:
            write_sheet(folder / SHEET, sheet, segmenters[0].card.names, unit="px" if fmt.pictures else "mL")
    ending = "png" if fmt.pictures else "nii.gz"
    return [Path(out) / f"{file_name(case.name)}.{ending}" for case in cases]


def _refuse_unusable(found: Found, fmt: SliceFormat, outputs: Outputs) -> None:
    """Raises: UsageError if one cannot be used, or cannot be written as is asked for."""
    for problem in found.problems.values():
        raise UsageError(problem)
    if fmt.pictures and (outputs.probabilities or outputs.dicom_seg):
        asked = "probabilities" if outputs.probabilities else "dicom_seg"
        raise UsageError(f"{asked} is True, but the model is for pictures; leave it out")
    others = [case.name for case in found.cases if not isinstance(case.channels[0], tuple)]
    if outputs.dicom_seg and others:
        raise UsageError(f"dicom_seg is True, but {len(others)} images, such as {others[0]}, are no DICOM series")


def _write(
    folder: Path, case: CaseFiles, labels: Volume, *, image: Image, segmenter: Segmenter, outputs: Outputs
) -> None:
    """The label map of a case, and what else is asked for."""
    name, fmt = file_name(case.name), segmenter.format
    if fmt.pictures:
        flat = labels.data[..., 0]
        write_picture(folder / f"{name}.png", flat)
        if outputs.pictures:
            shown = (read_image(case.channels).shown() * 255).round().astype(np.uint8)  # with all its pixels
            (folder / CONTOURS).mkdir(exist_ok=True)
            write_picture(folder / CONTOURS / f"{name}.png", with_contours(shown, flat))
        return
    written = labels
    if outputs.original_values:
        written = replace(labels, data=original_values(labels.data, segmenter.card.originals))
    write_volume(folder / f"{name}.nii.gz", written)
    if outputs.pictures:
        _strip(folder / f"{name}.png", Volume(image.shown(), image.affine), labels, plane=fmt.plane)
    if outputs.dicom_seg:
        write_segmentation(
            folder / f"{name}.dcm",
            labels,
            case.channels[0],
            names=segmenter.card.names,
            algorithm=f"fedfactory {__version__}",
        )


def _sheet_case(case: CaseFiles, labels: Volume, *, image: Image, segmenter: Segmenter) -> SheetCase:
    """The case on the contact sheet."""
    counts = np.bincount(labels.data.ravel().astype(np.int64), minlength=segmenter.classes)
    if segmenter.format.pictures:
        picture, unit = thumbnail(image.shown(), labels.data[..., 0], side=SIDE, width=2), 1.0
    else:
        shown = Volume(image.shown(), image.affine)
        (picture,) = volume_thumbnails(shown, labels, plane=segmenter.format.plane, side=SIDE, width=2)
        unit = float(np.prod(labels.spacing)) / 1000  # millilitres in a voxel
    return SheetCase(case.name, picture, {k: float(counts[k] * unit) for k in range(1, segmenter.classes)})


def slice_probabilities(
    image: Image,
    segmenters: Sequence[Segmenter],
    *,
    centre: np.ndarray | None = None,
    views: int = 1,
    device: str = "cpu",
) -> tuple[SliceGrid, np.ndarray]:
    """The slices' grid in the image, and mean probabilities (slices, classes, size, size) on it.

    Args:
        image: of the segmenters' channels.
        segmenters: of one slice format; their probabilities are averaged.
        centre: (3,) voxel in the middle of the slices, see `Image.grid`.
        views: see `Segmenter.probabilities`.
        device: where the segmenters are.

    Raises: VolumeError for an image without contrast, or a centre in the air around the body.
    """
    fmt = segmenters[0].format
    if image.channels != fmt.channels:
        raise VolumeError(f"{image.path}: has {image.channels} channels; it must have {fmt.channels}, as the model's")
    grid = image.grid(fmt, centre=centre)
    intensities = image.facts(plane=fmt.plane, box=grid.box).intensities
    slices = torch.from_numpy(image.scaled(grid, intensities)).to(device)
    found = torch.stack([segmenter.probabilities(slices, views=views) for segmenter in segmenters]).mean(0)
    return grid, found.cpu().numpy()


def _places(cases: Sequence[CaseFiles], centres: CentreSource, fmt: SliceFormat) -> dict[str, np.ndarray]:
    """The (3,) voxel around which each image is cut, by name. Raises: VolumeError that names all images without one."""
    places, reasons = {}, {}
    for case in track(cases, "locating"):
        try:
            places[case.name] = centres.voxel_in(case.name, read_image(case.channels, fmt=fmt, reading=case.reading))
        except VolumeError as error:
            reasons[case.name] = str(error)
    if reasons:
        first = next(iter(reasons.values()))
        raise VolumeError(f"{len(reasons)} of {len(cases)} images have no centre: {', '.join(reasons)}; {first}")
    return places


def _strip(path: Path, image: Volume, labels: Volume, *, plane: str) -> None:
    shown, found = (part.turned(plane).data for part in (image, labels))
    write_picture(path, strip(shown, found))
