"""The planes of an image series: which image lies where, and where a point of the patient falls on its grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import VolumeError
from .optional_packages import damage_reported, pydicom_package
from .series import LPS_TO_RAS, read_grid
from .series_checks import MAX_UNEVENNESS

PLANE_TAGS = ["SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "ImagePositionPatient", "NumberOfFrames"]


@dataclass(frozen=True)
class SeriesPlanes:
    """The grid of an image series, and what labels may refer to it by.

    Attributes:
        shape: (columns, rows, slices), the shape of `series.read_series`.
        affine: (4, 4), voxel index to millimetres (RAS+), that of `series.read_series`.
        first_voxels: (slices, 3), voxel index of each image's own position; (0, 0, k) where slices lie evenly.
        series: the identifier of the series (UID).
        frame_of_reference: the identifier of its coordinate system; empty if the images name none.
        images: identifiers of the images (SOP Instance UID), in slice order.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    first_voxels: np.ndarray
    series: str
    frame_of_reference: str
    images: tuple[str, ...]

    def voxels(self, points: np.ndarray) -> np.ndarray:
        """Voxel indices, fractional, of (n, 3) points in millimetres (LPS+, as DICOM gives them)."""
        return voxel_indices(points, self.affine)

    def nearest_slice(self, points: np.ndarray) -> tuple[int, np.ndarray]:
        """The slice that is nearest to the first of some points, and where they lie from its first voxel.

        Args:
            points: (n, 3), in millimetres (LPS+).

        Returns: the slice, and (n, 3) columns, rows, and distances from its plane in parts of the slice spacing.
        """
        voxels = self.voxels(points)
        near = int(np.argmin(abs(self.first_voxels[:, 2] - voxels[0, 2])))
        return near, voxels - self.first_voxels[near]


def read_planes(files: Sequence[Path]) -> SeriesPlanes:
    """Read the planes of a series from its headers.

    Args:
        files: one image each, in slice order, see `series.find_series`.

    Raises:
        UsageError: pydicom is not installed.
        VolumeError: the files cannot be read, are of several series or of several frames each, or an image does not lie
            where `series.read_series` has its slice.
    """
    where = Path(files[0]).parent
    shape, affine = read_grid(files)  # first, for it refuses headers that unpack without an end
    headers = read_headers(files, only=PLANE_TAGS)
    if shape[2] != len(files) or any(int(header.get("NumberOfFrames") or 1) > 1 for header in headers):
        raise VolumeError(f"{where}: an image of several frames; labels are read for series of one file per slice")
    with damage_reported(f"{where}: the headers of the images lack what labels refer to ({{kind}}); export them again"):
        positions = np.array([[float(x) for x in header.ImagePositionPatient] for header in headers])
        series = {str(header.SeriesInstanceUID) for header in headers}
        frames = {str(header.get("FrameOfReferenceUID") or "") for header in headers}
        images = tuple(str(header.SOPInstanceUID) for header in headers)
    if len(series) > 1 or len(frames) > 1 or len(set(images)) < len(images):
        raise VolumeError(f"{where}: the images are of several series, or one is there twice; give those of one series")
    first_voxels = voxel_indices(positions, affine)
    expected = np.arange(shape[2])[:, None] * [0, 0, 1]
    if not (abs(first_voxels - expected) <= MAX_UNEVENNESS).all():
        raise VolumeError(
            f"{where}: the images do not lie evenly in slice order; give all files of one series in order"
        )
    return SeriesPlanes(shape, affine, first_voxels, series.pop(), frames.pop(), images)


def read_headers(files: Sequence[Path], only: list[str] | None = None) -> list[Any]:
    """Headers of images without their pixels, as `pydicom` data sets.

    Args:
        files: of the images.
        only: keywords of the elements to read (default: all).

    Raises: UsageError if pydicom is not installed; VolumeError if a file cannot be read.
    """
    pydicom = pydicom_package()
    headers = []
    for file in files:
        with damage_reported(f"{file}: cannot be read as a DICOM image ({{kind}}); copy it again"):
            headers.append(pydicom.dcmread(file, stop_before_pixels=True, specific_tags=only))
    return headers


def voxel_indices(points: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Voxel indices, fractional, of points of the patient.

    Args:
        points: (n, 3), in millimetres (LPS+, as DICOM gives them).
        affine: (4, 4), voxel index to millimetres (RAS+).

    Returns: (n, 3).
    """
    to_voxels = np.linalg.inv(affine) @ LPS_TO_RAS
    return points @ to_voxels[:3, :3].T + to_voxels[:3, 3]
