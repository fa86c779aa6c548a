"""What a user chooses about the training of a segmenter; the plan of the engine follows from it; needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from ...common.records import read_record, record_to_dict
from ...errors import ConfigError
from ..choices import APPEARANCES, NETWORK_SIZES, PRECISIONS
from ..network_names import dimensions

UPDATES = 1700  # of a segmenter for its own contrast
FIRST_GUESS_UPDATES = 7000  # random contrasts take longer to learn


@dataclass(frozen=True, kw_only=True)
class ContrastMix:
    """Shares of windows by what happens to their contrast; the rest goes through a random network.

    Raises: ConfigError if a share is out of range.

    Attributes:
        unchanged: share of windows with their own contrast, 0 to 1.
        curves: share of windows with a random intensity curve, 0 to 1 - `unchanged`.
        inverted: share of all windows in which dark and bright are exchanged afterwards; air stays dark, and colours
            keep their hues.
    """

    unchanged: float = 0.35
    curves: float = 0.65
    inverted: float = 0.25

    def __post_init__(self) -> None:
        for name in ("unchanged", "curves", "inverted"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; choose a share from 0 to 1")
        if self.unchanged + self.curves > 1:
            raise ConfigError(
                f"unchanged and curves are {self.unchanged} and {self.curves}; their sum must be at most 1"
            )


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """How a segmenter is trained. Raises: ConfigError if a value is out of range, UsageError for an unknown network.

    Attributes:
        network: one of `fedfactory.adaptation.network_names.NETWORKS`.
        network_size: "small", "standard" or "large": 16, 24 or 32 channels in the first level.
        updates: optimizer steps; None takes UPDATES, or with random contrast FIRST_GUESS_UPDATES.
        minutes: time for the training, in place of `updates`: their number follows from timed updates.
        width: channels of the first level; None takes that of `network_size`.
        depth: number of resolution levels; None follows from the data.
        batch_size: windows per update; None follows from their size.
        learning_rate: of AdamW, the peak of a one-cycle schedule; None takes the plan's.
        whole_slices: whether windows are whole slices, for structures that may be anywhere in them; otherwise windows
            hold the structures with a margin.
        memory: GiB that the training may take; batch and window become smaller to fit.
        appearance: "mild" or "strong" variation of gamma, bias field, blur, resolution and noise.
        contrast: random contrast of the windows, with which a segmenter works at sites of other contrast; None leaves
            the contrast as it is.
        mirror: whether windows are flipped at random; None follows from how alike the labelled structures lie.
        rotation: largest random angle in the plane of the slice, radians; None follows likewise, and is pi where scans
            have no common orientation.
        precision: "float32", "bfloat16" to compute the network in half precision, or "auto" for bfloat16 where the
            device is faster with it; losses stay in float32.
        seed: of everything random.
    """

    network: str = "dynunet"
    network_size: str = "standard"
    updates: int | None = None
    minutes: float | None = None
    width: int | None = None
    depth: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    whole_slices: bool = False
    memory: float = 8.0
    appearance: str = "mild"
    contrast: ContrastMix | None = None
    mirror: bool | None = None
    rotation: float | None = None
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        dimensions(self.network)
        for name, choices in (
            ("network_size", NETWORK_SIZES),
            ("appearance", APPEARANCES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(choices)}")
        for name, least in (("updates", 1), ("width", 4), ("depth", 3), ("batch_size", 1)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("minutes", "learning_rate", "memory"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a positive number")
        if self.updates is not None and self.minutes is not None:
            raise ConfigError(f"updates is {self.updates} and `minutes` is {self.minutes}; give one of them")
        if self.rotation is not None and not 0 <= self.rotation < math.inf:
            raise ConfigError(f"rotation is {self.rotation}; it must be at least 0")

    @property
    def wanted_updates(self) -> int:
        """The number of updates, where no time is given."""
        return self.updates or (UPDATES if self.contrast is None else FIRST_GUESS_UPDATES)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the inverse of `from_dict`."""
        return record_to_dict(self)

    @classmethod
    def from_dict(cls, values: object) -> SegmenterConfig:
        """Raises: ConfigError for unknown or impossible entries."""
        return read_record(cls, values)


# Sequences of MRI differ in what is dark and what is bright, cameras do not.
COLOUR_CONTRAST = ContrastMix(inverted=0.0)


def first_guess_contrast(*, colour: bool) -> ContrastMix:
    """The random contrast of a first guess, on slices in colour or not."""
    return COLOUR_CONTRAST if colour else ContrastMix()


def first_guess_config(config: SegmenterConfig, *, colour: bool = False) -> SegmenterConfig:
    """The same training for a segmenter that works at other sites: under random contrast.

    A configuration that already has random contrast stays as it is.

    Args:
        config: of a training at the site alone.
        colour: whether slices are pictures in colour, whose dark and bright are not exchanged.
    """
    if config.contrast is not None:
        return config
    return replace(config, contrast=first_guess_contrast(colour=colour))


def localiser_config(config: SegmenterConfig, *, colour: bool = False) -> SegmenterConfig:
    """The training of a localiser, for which a small network will do: under random contrast, on whole slices."""
    return replace(first_guess_config(config, colour=colour), network_size="small", whole_slices=True)
