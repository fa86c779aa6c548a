"""Label maps in files, as NIfTI volumes or as pictures, which `evaluate` handles alike: a picture has one slice."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...common.fault_log import faults_named
from ...imaging.case_files import LabelFile
from ...imaging.cases import is_label_picture
from ...imaging.pictures.masks import read_mask
from ...imaging.volume_files import read_volume
from ...imaging.volumes import Volume


def read_labels(path: Path) -> Volume:
    """A label map as a volume of uint16; a picture is (rows, columns, 1) with voxels of 1, which stands for a pixel.

    Raises: UsageError if there is no such file, VolumeError if it holds no label map.
    """
    with faults_named(path):
        if is_label_picture(path):
            return Volume(read_label_picture(path)[..., None], np.eye(4))
        return read_volume(path, integer=True)


def read_label_picture(path: Path) -> np.ndarray:
    """The label map in a picture, (rows, columns) uint16, of class numbers or of black and white, see `read_mask`.

    Raises: UsageError if there is no such file, VolumeError if it holds no label map.
    """
    return read_mask((LabelFile(path),))[0]
