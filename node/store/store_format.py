"""The slice format that suits the cases of a new store."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...errors import StoreError, UsageError
from ...imaging.case_files import NAN
from ...imaging.slice_format import PICTURE_SIDE, SliceFormat
from .case_slices import Survey
from .prepare_config import PrepareConfig
from .store_writer import CutFacts


def fitting_format(seen: Sequence[Survey], config: PrepareConfig) -> SliceFormat:
    """A slice format in which every case fits, without its intensity window unless that is known beforehand.

    Args:
        seen: the cases that are not for tests, at least one.
        config: what was asked for.

    Raises: UsageError for an intensity window of colours.
    """
    channels = seen[0].channels
    if config.content == "pictures":
        colour = config.colour == "colour" or (config.colour is None and any(s.channels == 3 for s in seen))
        if colour and config.window:
            raise UsageError(f"window is {config.window}, but colours have none to choose; leave it out")
        return picture_format(config.size, colour=colour, window=config.windows(1))
    middle = np.median([s.spacing for s in seen], axis=0)
    fits = np.max([s.extent for s in seen], axis=0) / config.size
    between = config.slice_spacing
    if config.compatibility == "published":  # extents in whole voxels of the median size
        fits = middle * np.max([np.round(s.extent / middle) for s in seen], axis=0) / config.size
        between = between or float(max(middle[2], fits[2]))
    return SliceFormat(
        size=config.size,
        spacing=config.pixel or float(max(*middle[:2], *fits[:2])),
        slice_spacing=between,
        window=config.windows(channels) or ((-1.0, 1.0),) * channels,
        z_bins=config.z_bins,
        plane=config.plane,
        crop=config.crop,
        compatibility=config.compatibility,
        nan=config.nan or NAN[0],
    )


def picture_format(size: int, *, colour: bool, window: tuple[tuple[float, float], ...] | None = None) -> SliceFormat:
    """The format of pictures of `size` pixels per side; grey ones still lack their intensity window if it is None."""
    return SliceFormat(
        size=size,
        spacing=PICTURE_SIDE / size,
        window=((0.0, 1.0),) * 3 if colour else window or ((-1.0, 1.0),),
        z_bins=1,
        plane="stored",
        crop="none",
        content="pictures",
        colour=colour,
    )


def channel_range(channel: int, fmt: SliceFormat, facts: Sequence[CutFacts]) -> tuple[float, float]:
    """Lowest and highest standardised intensity of a channel in all cases.

    Args:
        channel: its number.
        fmt: of the slices, for messages.
        facts: of the cases.

    Raises: StoreError if the channel is missing or without contrast in all of them.
    """
    low, high = min(fact.low[channel] for fact in facts), max(fact.high[channel] for fact in facts)
    if not high > low and not any(any(fact.image.intensities[channel].counts) for fact in facts):
        raise StoreError(f"channel {channel} is missing in every training case; leave it out of image_key")
    if not high > low:
        raise StoreError(
            f"the slices hold no contrast after resampling; check spacing ({fmt.spacing:g}) and size ({fmt.size})"
        )
    return low, high
