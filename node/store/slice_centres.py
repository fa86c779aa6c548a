"""Where the middle of each case's slices is, if the site gives a table or has a localiser."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ...errors import VolumeError
from ...imaging.centre_table import CentreTable
from ...imaging.cropping import refuse_centre_in_air
from ...imaging.images import Image
from ...imaging.volumes import in_plane
from .prepare_config import PrepareConfig
from .slice_store import Case


def centre_of(case: str, image: Image, *, config: PrepareConfig) -> tuple[float, float] | None:
    """Position of a case's centre along rows and columns, in voxels of the turned axes; None for the body's middle.

    Args:
        case: name of the case.
        image: of the case.
        config: has the table or the localiser, and the plane of the slices.

    Raises: VolumeError if there is no place for the case, or it is outside of the volume.
    """
    if config.centres is None:
        return None
    voxel = config.centres.voxel_in(case, image)
    return in_plane(voxel, image.shape, affine=image.affine, plane=config.plane)


def refuse_beside(
    case: str, centre: tuple[float, float] | None, *, box: tuple[tuple[int, int], ...], config: PrepareConfig
) -> None:
    """Raises: VolumeError if the centre of a case is beside the kept part of its volume.

    Args:
        case: name of the case.
        centre: see `centre_of`.
        box: first and last + 1 index of the kept part, along the turned axes.
        config: has the table or the localiser.
    """
    if config.centres is not None and centre is not None:
        refuse_centre_in_air(f"{config.centres.path}: the centre of {case}", centre, box)


def is_centred(case: Case, config: PrepareConfig) -> bool:
    """Whether the slices that a store holds of a case have the centre that these settings give it.

    Of a localiser only the digest is compared: the files of the case have not changed, so it would find the same place.

    Args:
        case: of the store; its files have not changed.
        config: has the table or the localiser, and the plane of the slices.
    """
    if not isinstance(config.centres, CentreTable):
        wanted = None if config.centres is None else config.centres.digest
        return case.localiser == wanted and (wanted is not None or case.centre is None)
    affine = np.array(case.affine)
    try:
        voxel = config.centres.voxel(case.name, case.shape, affine)
    except VolumeError:  # the case is surveyed again, which names the reason
        return False
    return in_plane(voxel, case.shape, affine=affine, plane=config.plane) == case.centre


def rows_without_case(config: PrepareConfig, known: Collection[str]) -> dict[str, str]:
    """The reason, in one sentence, for each row of the table that belongs to no case.

    Args:
        config: has the table.
        known: names of all cases of the site, used or not.
    """
    if not isinstance(config.centres, CentreTable):
        return {}
    reason = f"{config.centres.path}: has a row for this name, but there is no such case; correct or remove the row"
    return {name: reason for name in config.centres.places if name not in known}
