"""Label maps in files, as NIfTI volumes or as pictures, which `evaluate` handles alike: a picture has one slice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...common.fault_log import faults_named
from ...common.files import require_file_or_folder
from ...errors import UsageError
from ...imaging.case_files import LabelFile, Unusable, entries
from ...imaging.formats.label_values import LabelValues
from ...imaging.layouts.folders import folders, only_volume, volumes
from ...imaging.pictures.colour_table import Colour
from ...imaging.pictures.decoding import is_mask
from ...imaging.pictures.layout_names import OTHER_SUFFIX, without_mask_suffix
from ...imaging.pictures.masks import read_mask
from ...imaging.volume_files import case_name, read_volume
from ...imaging.volumes import Volume

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")  # pictures that do not keep label values as they are


def read_labels(
    path: Path, *, values: LabelValues | None = None, colours: Mapping[Colour, int] | None = None
) -> Volume:
    """A label map as a volume of uint16; a picture is (rows, columns, 1) with voxels of 1, which stands for a pixel.

    Args:
        path: of a volume or a picture.
        values: class of each value in a volume; None takes the values for class numbers.
        colours: class of each colour or grey value of pictures, see `read_mask`.

    Raises: UsageError if there is no such file, VolumeError if it holds no label map.
    """
    with faults_named(path):
        if is_label_picture(path):
            return Volume(read_label_picture(path, colours)[..., None], np.eye(4))
        return read_volume(path, integer=True, values=values)


def read_label_picture(path: Path, colours: Mapping[Colour, int] | None = None) -> np.ndarray:
    """The label map in a picture, (rows, columns) uint16.

    Args:
        path: of the file.
        colours: see `read_labels`; None for class numbers, or black and white, see `read_mask`.

    Raises: UsageError if there is no such file, VolumeError if it holds no label map.
    """
    return read_mask((LabelFile(path),), colours=colours)[0]


def is_label_picture(path: Path) -> bool:
    """Whether a path has the name of a picture that can be a label map, and is no folder."""
    return is_mask(path)


def find_labels(source: Path, label_key: str = "label") -> dict[str, Path]:
    """Label maps by case name: files of volumes and pictures.

    The case of a label picture is its name without an ending that tells a mask, such as `_segmentation`. Such a picture
    is the label map of its case when another one has the plain name: that is the picture itself. A picture beside a
    NIfTI file of the same case shows that file (`segment --pictures`), and is no label map. JPEG files are label maps
    only in a folder without other pictures; beside them they are what was photographed. A second observer's masks are
    passed over.

    Args:
        source: a file, a folder of files, or a folder of cases with one file each in `label_key`.
        label_key: name of the folder with a case's label map.

    Raises: UsageError if there is no label map, or a case has several.
    """
    source = Path(source)
    if source.is_file():
        return {_labelled_case(source)[0]: source}
    require_file_or_folder(source, "give label maps")
    try:
        found = _label_pictures(source) | _label_volumes(source)
        for subject in folders(source):
            label = only_volume(subject / label_key) or _only_label_picture(subject / label_key)
            if label is not None and (other := found.setdefault(subject.name, label)) != label:
                raise Unusable(f"{other} and {label}: are label maps of one case; keep one of them")
    except Unusable as error:
        raise UsageError(str(error)) from None
    if not found:
        raise UsageError(
            f"{source}: no label map found; expected NIfTI, NRRD or MetaImage files, PNG, TIFF, BMP, GIF or JPEG "
            f"pictures, or CASE/{label_key}/ with one such file each"
        )
    return found


def _label_volumes(folder: Path) -> dict[str, Path]:
    """Case name to the NIfTI file of that case in a folder."""
    found: dict[str, Path] = {}
    for path in volumes(folder):
        if (other := found.setdefault(case_name(path), path)) != path:
            raise Unusable(f"{other} and {path}: are label maps of one case; keep one of them")
    return found


def _label_pictures(folder: Path) -> dict[str, Path]:
    """Case name to the label picture of that case in a folder."""
    found: dict[str, Path] = {}
    marked: dict[str, bool] = {}
    for path in _masks_among(entries(folder)):
        case, has_ending = _labelled_case(path)
        if case in found and marked[case] == has_ending:
            raise Unusable(f"{folder}: {found[case].name} and {path.name} are label maps of one case; keep one")
        if has_ending or case not in found:
            found[case], marked[case] = path, has_ending
    return found


def _masks_among(paths: Sequence[Path]) -> list[Path]:
    """The pictures of a folder that can be label maps."""
    pictures = [path for path in paths if is_label_picture(path) and not OTHER_SUFFIX.search(path.stem)]
    exact = [path for path in pictures if path.suffix.lower() not in LOSSY]
    return exact or pictures


def _only_label_picture(folder: Path) -> Path | None:
    pictures = _masks_among(entries(folder))
    if len(pictures) > 1:
        raise Unusable(f"{folder}: holds {len(pictures)} label pictures, expected one")
    return pictures[0] if pictures else None


def _labelled_case(path: Path) -> tuple[str, bool]:
    """The case of a label map, and whether the name of a picture tells that it is a mask."""
    name = case_name(path)
    case = without_mask_suffix(name) if is_label_picture(path) else name
    return case, case != name
