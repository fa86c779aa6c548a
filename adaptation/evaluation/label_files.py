"""Label maps in files, as NIfTI volumes or as pictures, which `evaluate` handles alike: a picture has one slice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...common.fault_log import faults_named
from ...imaging.case_files import LabelFile
from ...imaging.cases import is_label_picture
from ...imaging.formats.label_values import LabelValues
from ...imaging.pictures.colour_table import Colour
from ...imaging.pictures.masks import read_mask
from ...imaging.volume_files import read_volume
from ...imaging.volumes import Volume


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
