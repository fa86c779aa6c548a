"""Label maps in files, as NIfTI volumes or as pictures, which `evaluate` handles alike: a picture has one slice."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np

from ...errors import UsageError, VolumeError
from ...imaging.cases import is_label_picture
from ...imaging.volume_files import read_volume
from ...imaging.volumes import Volume

MARKED = 255  # the value of the only class in masks that show it in white


def read_labels(path: Path) -> Volume:
    """A label map as a volume of uint16; a picture is (rows, columns, 1) with voxels of 1, which stands for a pixel.

    Raises: UsageError if there is no such file, VolumeError if it holds no label map.
    """
    if is_label_picture(path):
        return Volume(read_label_picture(path)[..., None], np.eye(4))
    return read_volume(path, integer=True)


def read_label_picture(path: Path) -> np.ndarray:
    """The label map in a picture.

    Args:
        path: PNG, TIFF, BMP or GIF of class numbers from 0 to 65535, or of 0 and 255, which then means class 1. Three
            equal channels are read as one.

    Returns: (rows, columns) uint16.
    Raises: UsageError if there is no such file, VolumeError if it cannot be read or is in colour.
    """
    if not os.path.isfile(path):
        raise UsageError(f"{path}: no such file, or no regular file; give a label map")
    try:
        data = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # more pixels than OpenCV reads, or a damaged file
        data = None
    if data is None:
        raise VolumeError(f"{path}: cannot be read as a picture; copy it again")
    if data.ndim == 3:
        if data.shape[2] == 4 and (data[..., 3] == data[0, 0, 3]).all():  # the same transparency everywhere
            data = data[..., :3]
        if (data != data[..., :1]).any():
            raise VolumeError(f"{path}: is in colour; a label map must have one channel of class numbers")
        data = data[..., 0]
    if data.dtype not in (np.uint8, np.uint16):
        raise VolumeError(f"{path}: pixels are {data.dtype}; labels must be whole numbers from 0 to 65535")
    if not np.isin(np.unique(data), (0, MARKED)).all():
        return data.astype(np.uint16)
    return (data == MARKED).astype(np.uint16)
