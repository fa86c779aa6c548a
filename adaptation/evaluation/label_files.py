"""Label maps in files, as NIfTI volumes or as pictures, which `evaluate` handles alike: a picture has one slice."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ...imaging.case_files import LabelFile
from ...imaging.cases import is_label_picture
from ...imaging.pictures.decoding import picture_size
from ...imaging.pictures.masks import read_mask
from ...imaging.volume_files import read_volume
from ...imaging.volumes import Volume


def read_labels(path: Path) -> Volume:
    """A label map as a volume of uint16; a picture is (rows, columns, 1) with voxels of 1, which stands for a pixel.

    Raises: UsageError if there is no such file, VolumeError if it holds no label map.
    """
    if not is_label_picture(path):
        return read_volume(path, integer=True)
    labels, _ = read_mask((LabelFile(path),), picture_size(path))
    return Volume(labels[..., None], np.eye(4))
