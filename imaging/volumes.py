"""A 3-D image on its own grid, and reorienting it so that its slices lie in a chosen plane."""

from __future__ import annotations

from dataclasses import dataclass

import nibabel as nib
import numpy as np

from .nifti.geometry import NiftiGeometry

MAX_VOXELS = 2**30  # a header that claims more is damaged or hostile
GRID_TOLERANCE = 0.1  # of the shortest side of a voxel, between the corners of grids that count as equal


@dataclass(frozen=True)
class Volume:
    """A 3-D image on its own grid.

    Attributes:
        data: (X, Y, Z) array in stored axis order.
        affine: (4, 4), voxel index to millimetres (RAS+).
        geometry: what the header of its NIfTI file says about this grid; None for other files and turned volumes.
    """

    data: np.ndarray
    affine: np.ndarray
    geometry: NiftiGeometry | None = None

    @property
    def spacing(self) -> np.ndarray:
        """(3,) voxel size along the array axes, in millimetres."""
        return np.sqrt((self.affine[:3, :3] ** 2).sum(axis=0))

    def to_canonical(self) -> Volume:
        """The same voxels with axes flipped and permuted to the closest right-anterior-superior order."""
        return self.turned("axial")

    def turned(self, plane: str) -> Volume:
        """The same voxels with the slice axis last and every axis ascending, see `orientation`."""
        turn = orientation(self.affine, plane)
        affine = turned_affine(self.affine, self.data.shape, plane=plane)
        return Volume(nib.orientations.apply_orientation(self.data, turn), affine)

    def ordered_like(self, other: Volume) -> Volume:
        """The same voxels in the axis order of `other`, for volumes of one grid stored in different orders.

        The order follows from one grid in the other's voxels. From the axes of the body it would not always: of two
        grids tilted by 45 degrees that differ by rounding alone, each may lie nearer to another axis.
        """
        change = nib.orientations.io_orientation(np.linalg.inv(other.affine) @ self.affine)
        if np.isnan(change).any() or (change == [[0, 1], [1, 1], [2, 1]]).all():
            return self
        affine = self.affine @ nib.orientations.inv_ornt_aff(change, self.data.shape)
        return Volume(nib.orientations.apply_orientation(self.data, change), affine)


def corner_distance(one: np.ndarray, other: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance between the same corners of two grids, in millimetres.

    Args:
        one: (4, 4), voxel index to millimetres.
        other: (4, 4), of the other grid.
        shape: number of voxels along the three axes of both. Corners lie half a voxel outside of the outer voxels.
    """
    corners = np.array([[i, j, k, 1.0] for i in (0, 1) for j in (0, 1) for k in (0, 1)])
    corners[:, :3] = corners[:, :3] * shape[:3] - 0.5
    return float(np.linalg.norm(corners @ (one - other)[:3].T, axis=1).max())


def grid_tolerance(affine: np.ndarray) -> float:
    """The largest distance of corners, in millimetres, at which a grid still counts as equal to that of `affine`."""
    return GRID_TOLERANCE * float(np.linalg.norm(affine[:3, :3], axis=0).min())


def orientation(affine: np.ndarray, plane: str) -> np.ndarray:
    """Position and direction of each stored axis after reorientation.

    Args:
        affine: (4, 4), invertible.
        plane: plane of the slices. "axial": left to right along rows, back to front along columns, slices from foot to
            head, each as near as flips and permutations come. "coronal", "sagittal": slices along the body's other
            axes. "acquired": the third stored axis stays the slice axis (oblique stacks such as cardiac short-axis
            views). "stored": the stored order is kept.

    Returns: (3, 2), an orientation array as nibabel defines it.
    """
    if plane == "stored":
        return np.array([[0, 1], [1, 1], [2, 1]])
    closest = nib.orientations.io_orientation(affine)
    fixed = {"axial": 2, "coronal": 1, "sagittal": 0}
    last = int(closest[2, 0]) if plane == "acquired" else fixed[plane]
    places = {world: place for place, world in enumerate([*(w for w in range(3) if w != last), last])}
    return np.array([[places[int(world)], direction] for world, direction in closest])


def turned_affine(affine: np.ndarray, shape: tuple[int, ...], *, plane: str) -> np.ndarray:
    """(4, 4), turned voxel index to millimetres.

    Args:
        affine: (4, 4), of the stored volume.
        shape: of the stored volume.
        plane: see `orientation`.
    """
    return affine @ nib.orientations.inv_ornt_aff(orientation(affine, plane), shape)


def turned_positions(voxels: np.ndarray, shape: tuple[int, ...], *, affine: np.ndarray, plane: str) -> np.ndarray:
    """Positions in a volume after its axes are turned.

    Args:
        voxels: (n, 3) voxel indices in stored axis order, fractional; may lie outside.
        shape: of the stored volume.
        affine: (4, 4), of the stored volume.
        plane: see `orientation`.

    Returns: (n, 3) float64 voxel indices along the turned axes.
    """
    turned = np.empty_like(voxels, dtype=np.float64)
    for stored, (place, direction) in enumerate(orientation(affine, plane).astype(int)):
        values = voxels[:, stored]
        turned[:, place] = values if direction > 0 else shape[stored] - 1 - values
    return turned


def in_plane(voxel: np.ndarray, shape: tuple[int, ...], *, affine: np.ndarray, plane: str) -> tuple[float, float]:
    """Row and column of a (3,) voxel of the stored volume after its axes are turned, see `turned_positions`."""
    row, column, _ = turned_positions(voxel[None], shape, affine=affine, plane=plane)[0].tolist()
    return row, column


def turned_back(array: np.ndarray, affine: np.ndarray, plane: str) -> np.ndarray:
    """Bring an array back to the stored axis order of its volume.

    Args:
        array: (X, Y, Z) on the grid that `orientation(affine, plane)` gives.
        affine: (4, 4), of the stored volume.
        plane: see `orientation`.

    Returns: the array with its axes in stored order.
    """
    identity = orientation(affine, "stored")
    back = nib.orientations.ornt_transform(identity, orientation(affine, plane))
    return nib.orientations.apply_orientation(array, back)
