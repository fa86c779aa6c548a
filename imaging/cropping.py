"""Finding the box of a volume that holds the patient, without the air around."""

from __future__ import annotations

import numpy as np

from ..errors import ConfigError

CROPS = ("air", "none")
AIR = 0.1  # a plane is air if nothing in it reaches this share of the volume's bright end
BRIGHT_SHARE = 0.99  # of the planes' maxima: one bright artefact must not set the scale
PUBLISHED_BINS = 255


def crop_box(data: np.ndarray, crop: str, *, published: bool = False) -> tuple[tuple[int, int], ...]:
    """(start, stop) along each axis of what is kept.

    Args:
        data: (X, Y, Z), any intensities.
        crop: "air" trims outer planes that hold air only, "none" keeps everything.
        published: find air by the published program's histogram rule instead, its slip included.

    Raises: ConfigError for an unknown rule.
    """
    if crop not in CROPS:
        raise ConfigError(f"crop is '{crop}'; choose one of {', '.join(CROPS)}")
    if crop == "none":
        return tuple((0, n) for n in data.shape)
    profiles = [data.max(axis=tuple(a for a in range(3) if a != axis)).astype(np.float64) for axis in range(3)]
    if published:
        return tuple(_published_ends(profile) for profile in profiles)
    darkest = float(data.min())
    return tuple(_ends(profile - darkest) for profile in profiles)


def _ends(profile: np.ndarray) -> tuple[int, int]:
    """First and last plane above air. Only outer planes go; dark ones in between stay."""
    bright = np.flatnonzero(profile > AIR * np.quantile(profile, BRIGHT_SHARE))
    return (int(bright[0]), int(bright[-1]) + 1) if len(bright) else (0, len(profile))


def _published_ends(profile: np.ndarray) -> tuple[int, int]:
    """Ends by the histogram of the running sum of plane maxima (spec 2.1 D).

    Where the sum rises slowly many planes share a bin; bins at the head with more planes than the valley between the
    two kinds of bins are air. The tail is trimmed by the head's number of bins, as published.
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
