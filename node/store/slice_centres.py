"""Where the table of a site puts the middle of each case's slices."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ...errors import VolumeError
from ...imaging.volumes import turned_positions
from .prepare_config import PrepareConfig


def centre_of(
    case: str, shape: tuple[int, ...], affine: np.ndarray, *, config: PrepareConfig
) -> tuple[float, float] | None:
    """Position of a case's centre along rows and columns, in voxels of the turned axes; None without a table.

    Args:
        case: name of the case.
        shape: of the stored volume.
        affine: (4, 4), of the stored volume.
        config: has the table and the plane of the slices.

    Raises: VolumeError if the table has no row for the case, or its place is outside of the volume.
    """
    if config.centres is None:
        return None
    voxel = config.centres.voxel(case, shape, affine)
    row, column, _ = turned_positions(voxel[None], shape, affine=affine, plane=config.plane)[0].tolist()
    return row, column


def refuse_centre_in_air(
    case: str, centre: tuple[float, float] | None, *, box: tuple[tuple[int, int], ...], config: PrepareConfig
) -> None:
    """Raises: VolumeError if the centre of a case is beside the kept part of its volume.

    Args:
        case: name of the case.
        centre: see `centre_of`.
        box: first and last + 1 index of the kept part, along the turned axes.
        config: has the table.
    """
    if config.centres is None or centre is None:
        return
    for value, (start, stop), axis in zip(centre, box, ("rows", "columns"), strict=False):
        if not start - 0.5 <= value <= stop - 0.5:
            raise VolumeError(
                f"{config.centres.path}: the centre of {case} is voxel {value:.6g} along the slices' {axis}, in the "
                f"air that is cropped away; choose one from {start} to {stop - 1}, or keep the air (crop 'none')"
            )


def is_centred(
    case: str,
    centre: tuple[float, float] | None,
    *,
    shape: tuple[int, ...],
    affine: np.ndarray,
    config: PrepareConfig,
) -> bool:
    """Whether the slices that a store holds of a case have the centre that the table gives.

    Args:
        case: name of the case.
        centre: of the slices in the store, see `centre_of`.
        shape: of the stored volume.
        affine: (4, 4), of the stored volume.
        config: has the table and the plane of the slices.
    """
    try:
        return centre_of(case, shape, affine, config=config) == centre
    except VolumeError:  # the case is surveyed again, which names the reason
        return False


def rows_without_case(config: PrepareConfig, known: Collection[str]) -> dict[str, str]:
    """The reason, in one sentence, for each row of the table that belongs to no case.

    Args:
        config: has the table.
        known: names of all cases of the site, used or not.
    """
    if config.centres is None:
        return {}
    reason = f"{config.centres.path}: has a row for this name, but there is no such case; correct or remove the row"
    return {name: reason for name in config.centres.places if name not in known}
