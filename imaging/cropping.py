"""Finding the box of a volume that holds the patient, without the surrounding air."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError, VolumeError
from .slice_choices import CROPS

AIR_SHARE = 0.1  # a plane is air if no voxel in it reaches this share of the volume's bright end
BRIGHT_SHARE = 0.99  # of the planes' maxima: one bright artefact must not set the scale
PUBLISHED_BINS = 255


def crop_box(data: np.ndarray, crop: str, *, published: bool = False) -> tuple[tuple[int, int], ...]:
    """The box of a volume that is kept.

    Args:
        data: (X, Y, Z), any intensities.
        crop: "air" removes outer planes that hold air only, "none" removes nothing.
        published: find air by the published program's histogram rule instead, with its error.

    Returns: (start, stop) along each axis.
    Raises: ConfigError for an unknown rule.
    """
    if crop not in CROPS:
        raise ConfigError(f"crop is '{crop}'; choose one of {', '.join(CROPS)}")
    if crop == "none":
        return tuple((0, n) for n in data.shape)
    profiles = [profile.astype(np.float64) for profile in _plane_maxima(data)]
    if published:
        return tuple(_published_ends(profile) for profile in profiles)
    darkest = float(data.min())
    return tuple(_ends(profile - darkest) for profile in profiles)


def refuse_centre_in_air(what: str, centre: tuple[float, float], box: tuple[tuple[int, int], ...]) -> None:
    """Raises: VolumeError if the centre of a case's slices is beside the kept part of its volume.

    Args:
        what: the centre's name in the message, such as "the centre of case 1".
        centre: voxel along the slices' rows and columns, fractional.
        box: first and last + 1 index of the kept part, along the turned axes.
    """
    for value, (start, stop), axis in zip(centre, box, ("rows", "columns"), strict=False):
        if not start - 0.5 <= value <= stop - 0.5:
            raise VolumeError(
                f"{what} is voxel {value:.6g} along the slices' {axis}, in the air that is cropped away; choose one "
                f"from {start} to {stop - 1}, or keep the air (crop 'none')"
            )


def _plane_maxima(data: np.ndarray) -> list[np.ndarray]:
    """The highest voxel of every plane of (X, Y, Z) along each of the three axes."""
    apart = int(np.argmax(np.abs(data.strides)))  # planes along it lie together in memory: compared, not searched
    others = [axis for axis in range(3) if axis != apart]
    flat = data.max(axis=apart)
    maxima = {apart: data.max(axis=tuple(others)), others[0]: flat.max(axis=1), others[1]: flat.max(axis=0)}
    return [maxima[axis] for axis in range(3)]


def _ends(profile: np.ndarray) -> tuple[int, int]:
    """Start and stop of the planes that are not air, from plane maxima (N,). Dark planes in between are kept."""
    bright = np.flatnonzero(profile > AIR_SHARE * np.quantile(profile, BRIGHT_SHARE))
    return (int(bright[0]), int(bright[-1]) + 1) if len(bright) else (0, len(profile))


def _published_ends(profile: np.ndarray) -> tuple[int, int]:
    """Start and stop by the histogram of the running sum of plane maxima (N,), as published.

    Where the sum rises slowly, many planes share a bin. Leading bins with more planes than the valley between the two
    modes are air. The end is trimmed by the number of leading bins: the error of the published program.
    """
    from skimage.filters import threshold_minimum  # only this rule needs it

    running = np.cumsum(profile)
    counts, edges = np.histogram(running, PUBLISHED_BINS)
    try:
        valley = threshold_minimum(counts)
    except RuntimeError:  # no two kinds of bins: there is no air
        return 0, len(profile)
    leading = int(np.argmin(counts > valley)) if not (counts > valley).all() else 0
    if leading == 0:
        return 0, len(profile)
    start, stop = (int(np.argmax(running >= edge)) for edge in (edges[leading], edges[-leading]))
    return (start, stop) if stop > start else (0, len(profile))
