"""Reading the labels of a case: label maps, masks of pictures, and labels in DICOM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..common.fault_log import faults_named
from ..errors import UsageError, VolumeError
from .archive.object_kinds import kind_of_object
from .archive.segmentation_object import read_segmentation
from .archive.structure_set import read_structure_set
from .case_files import CaseFiles, ImageFile, Reading
from .class_names import numbers_of
from .formats.kinds import frames_of
from .formats.label_values import LabelValues
from .images import Image, on_grid_of
from .pictures.decoding import is_mask
from .pictures.masks import read_mask
from .volume_files import AS_STORED, read_volume
from .volumes import Volume


@dataclass(frozen=True, kw_only=True)
class LabelMap:
    """Labels on the grid of their image.

    Attributes:
        volume: uint16 label values, of the image's shape and affine.
        names: of the classes, as far as the file tells them.
        remarks: what is unusual about the files, one sentence each.
    """

    volume: Volume
    names: dict[int, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    def with_class_names(self, wanted: Mapping[int, str], path: Path) -> LabelMap:
        """The labels under the numbers that the site gives to these names; as they are if either has no names.

        Args:
            wanted: name of each label value at this site.
            path: of the labels, for messages.

        Raises: VolumeError for a class of the file that has no number at the site.
        """
        if not wanted or not self.names:
            return self
        try:
            numbers = numbers_of(self.names, wanted)
        except UsageError as error:
            raise VolumeError(f"{path}: {error}") from None
        table = np.zeros(int(max(self.volume.data.max(), *numbers)) + 1, np.uint16)
        table[list(numbers)] = list(numbers.values())
        return replace(self, volume=Volume(table[self.volume.data], self.volume.affine), names=dict(wanted))


def read_label_map(
    case: CaseFiles,
    image: Image,
    *,
    colours: Mapping[int | tuple[int, int, int], int] | None = None,
    class_numbers: bool = False,
    values: LabelValues | None = None,
) -> LabelMap:
    """The labels of a case.

    Args:
        case: has at least one file of labels, and no table.
        image: of the case, for its grid.
        colours: label of each colour or grey level of a picture's masks, see `read_mask`.
        class_numbers: whether the masks of pictures hold class numbers even where they look like yes and no.
        values: class of each value in label maps of volumes; DICOM objects tell their classes themselves. None takes
            the values for class numbers.

    Raises: VolumeError or UsageError naming a file that cannot be used, or does not lie on the image.
    """
    with faults_named(case.labels[0].path):
        return _read_label_map(case, image, colours=colours, class_numbers=class_numbers, values=values)


def _read_label_map(
    case: CaseFiles,
    image: Image,
    *,
    colours: Mapping[int | tuple[int, int, int], int] | None,
    class_numbers: bool,
    values: LabelValues | None,
) -> LabelMap:
    """`read_label_map`, which names the file in every error."""
    path = case.labels[0].path
    if is_mask(path):
        rows, columns, _ = image.shape
        labels, remarks = read_mask(case.labels, (rows, columns), colours=colours, class_numbers=class_numbers)
        # Remarks of many pictures are counted together, so they do without the names of files.
        texts = [text for text in remarks for label in case.labels if text.startswith(f"{label.path}: ")]
        kinds = dict.fromkeys(text.split(": ", 1)[1] for text in texts)
        return LabelMap(volume=Volume(labels[..., None], image.affine), remarks=tuple(kinds))
    kind = kind_of_object(path)
    if kind is None and any(file.value is not None for file in case.labels):
        return _united(case, image)
    if kind is None:
        return LabelMap(volume=read_mask_volume(path, image, reading=case.reading, values=values))
    read = read_segmentation if kind == "seg" else read_structure_set
    volume, names = read(path, _series_of(case, path))
    return LabelMap(volume=volume, names=names)


def _united(case: CaseFiles, image: Image) -> LabelMap:
    """Masks of one class each as a label map, as `read_mask` unites those of pictures: everything but 0 is marked.

    Where masks overlap, the later one counts, but one that lies wholly inside another keeps its place.
    """
    labels = np.zeros(image.shape, np.uint16)
    sizes: dict[int, int] = {}
    overlaps = 0
    for file in case.labels:
        area = read_mask_volume(file.path, image, reading=case.reading).data > 0
        before = np.bincount(labels[area], minlength=1)
        kept = [value for value, size in sizes.items() if value < len(before) and 0 < size == before[value]]
        kept = (
            kept if int(before.sum()) > sum(int(before[value]) for value in kept) else []
        )  # equal masks: the later one
        overlaps += int(before[1:].sum()) - sum(int(before[value]) for value in kept)
        if kept:
            area &= ~np.isin(labels, kept)
        value = int(file.value or 0)
        for other in sizes:
            sizes[other] -= int(before[other]) if other < len(before) and other not in kept else 0
        labels[area] = value
        sizes[value] = sizes.get(value, 0) + int(area.sum())
    remarks = ("masks of several classes overlap; where they do, the last one by name counts",) if overlaps else ()
    return LabelMap(volume=Volume(labels, image.affine), remarks=remarks)


def read_mask_volume(
    path: Path, image: Image, *, reading: Reading = AS_STORED, values: LabelValues | None = None
) -> Volume:
    """A label map on the grid of its image, uint16, see `read_volume`. Raises: VolumeError if it is of another grid."""
    with faults_named(path):
        grid = image.volume(np.broadcast_to(np.uint8(0), image.shape))
        if reading.frame is None and (count := frames_of(path)) > 1:
            raise VolumeError(f"{path}: holds {count} volumes, its image one; give a label map of one volume")
        return on_grid_of(grid, read_volume(path, integer=True, reading=reading, values=values), path)


def _series_of(case: CaseFiles, path: Path) -> tuple[Path, ...]:
    """The DICOM files of a case's first channel. Raises: VolumeError if its image is no DICOM series."""
    first: ImageFile | None = next((files for files in case.channels if files is not None), None)
    if not isinstance(first, tuple):
        raise VolumeError(f"{path}: is a DICOM object, but the image is none; give the series that it was drawn on")
    return first
