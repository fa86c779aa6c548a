"""Reading and writing medical volumes (NIfTI), and moving between a volume's own grid and the canonical one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from .errors import UsageError, VolumeError
from .files import atomic_file

SUFFIXES = (".nii", ".nii.gz")


@dataclass(frozen=True)
class Volume:
    """A 3-D image on its own grid.

    Attributes:
        data: (X, Y, Z) array in stored axis order.
        affine: (4, 4), voxel index to millimetres (RAS+).
    """

    data: np.ndarray
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """(3,) voxel size along the array axes, in millimetres."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    def to_canonical(self) -> Volume:
        """The same voxels with axes flipped and permuted to the closest right-anterior-superior order."""
        transform = nib.orientations.io_orientation(self.affine)
        affine = self.affine @ nib.orientations.inv_ornt_aff(transform, self.data.shape)
        return Volume(nib.orientations.apply_orientation(self.data, transform), affine)

    def from_canonical(self, array: np.ndarray) -> np.ndarray:
        """Bring an array on the grid of `self.to_canonical()` back to this volume's stored axis order."""
        own = nib.orientations.io_orientation(self.affine)
        canonical = nib.orientations.axcodes2ornt("RAS")
        return nib.orientations.apply_orientation(array, nib.orientations.ornt_transform(canonical, own))


def is_volume(path: Path) -> bool:
    """True for a visible file that is named like a NIfTI volume."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".") and path.is_file()


def case_name(path: Path) -> str:
    """File name without `.nii` or `.nii.gz`."""
    return path.name[: -len(".nii.gz")] if path.name.lower().endswith(".nii.gz") else path.stem


def read_volume(path: str | os.PathLike, *, integer: bool = False) -> Volume:
    """Read a 3-D NIfTI volume.

    Args:
        path: `.nii` or `.nii.gz` file. A trailing fourth axis of length 1 is dropped.
        integer: read a label map: values must be whole numbers from 0 to 65535; data is uint16. Otherwise float32.

    Raises:
        UsageError: there is no such file.
        VolumeError: not NIfTI, not 3-D, empty, complex or RGB, NaN or infinite voxels, or an unusable affine.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        image = nib.load(path)
        shape, affine = tuple(image.shape), np.asarray(image.affine, dtype=np.float64)
        if len(shape) == 4 and shape[3] == 1:
            shape = shape[:3]
        if len(shape) != 3:
            raise VolumeError(f"{path}: is {len(shape)}-D {image.shape}, expected a 3-D volume")
        if min(shape) < 1:
            raise VolumeError(f"{path}: is empty, shape {shape}")
        if image.get_data_dtype().names or image.get_data_dtype().kind == "c":
            raise VolumeError(f"{path}: voxels are {image.get_data_dtype()}, expected one real number each")
        data = np.asarray(image.dataobj, dtype=np.float64 if integer else np.float32).reshape(shape)
    except VolumeError:
        raise
    except Exception as error:  # nibabel raises many kinds for a damaged file; each is the same fact for the user
        raise VolumeError(f"{path}: cannot be read as NIfTI ({_first_line(error)})") from None
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise VolumeError(f"{path}: its affine cannot be inverted; repair the header")
    bad = int(np.size(data) - np.isfinite(data).sum())
    if bad:
        raise VolumeError(f"{path}: {bad} voxels are NaN or infinite; replace them before using the volume")
    if integer:
        if (data != np.round(data)).any() or data.min() < 0 or data.max() > np.iinfo(np.uint16).max:
            raise VolumeError(f"{path}: a label map must hold whole numbers from 0 to 65535")
        data = data.astype(np.uint16)
    return Volume(data, affine)


def write_volume(path: str | os.PathLike, volume: Volume) -> None:
    """Write a volume as NIfTI (gzip if the name ends in `.gz`), atomically; integer data stays integer."""
    data = volume.data.astype(np.uint8) if volume.data.dtype == bool else volume.data
    image = nib.Nifti1Image(data, volume.affine)
    image.header.set_xyzt_units("mm")
    with atomic_file(path) as temporary:
        nib.save(image, temporary)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
