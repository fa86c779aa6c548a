"""Plans network and training of a segmenter from the data, as nnU-Net does (Isensee et al. 2021); needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...errors import ConfigError

MARGIN = 1.5  # sides of the structures' bounding box that a window has
SMALLEST_MAP = 4  # pixels per side of the deepest level
MIN_LEVELS, MAX_LEVELS = 3, 6  # MONAI's dynamic U-Net has at least three
FOLDED_FROM = 64  # pixels per side from which two by two pixels are folded into channels: a quarter of the time
BATCH_PIXELS = 12 * 80 * 80  # of all windows in an update
MAX_BATCH = 32
MAX_WIDTH = 320  # channels, as nnU-Net's
FIRST_WIDTH = {"small": 16, "standard": 24, "large": 32}  # channels of the first level, by size of the network


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a plan follows from.

    Attributes:
        size: pixels per side of the slices.
        extent: largest side of the labelled structures' bounding boxes, pixels: that of nearly all volumes. None where
            no label tells it: then windows are whole slices.
        classes: number of label values, background included.
    """

    size: int
    extent: int | None
    classes: int


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a segmenter is built and trained.

    Raises: ConfigError if a value is out of range.

    Attributes:
        window: pixels per side of the windows that the network sees; a multiple of `side_multiple`.
        widths: channels of each resolution level, the finest first; at least three levels.
        fold: 2 if two by two pixels are folded into channels before the first level, 1 if not.
        classes: number of label values, background included.
        batch_size: windows per update.
        updates: optimizer steps.
        learning_rate: largest of AdamW's one-cycle schedule.
        precision: "bfloat16" computes the network in half precision, "float32" does not.
    """

    window: int
    widths: tuple[int, ...]
    fold: int
    classes: int
    batch_size: int
    updates: int = 2000
    learning_rate: float = 3e-3
    precision: str = "bfloat16"

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        if len(self.widths) < MIN_LEVELS:
            raise ConfigError(f"widths has {len(self.widths)} levels; it must have at least {MIN_LEVELS}")
        if min(self.widths) < 1:
            raise ConfigError(f"widths is {self.widths}; every level needs at least 1 channel")
        if self.fold not in (1, 2):
            raise ConfigError(f"fold is {self.fold}; choose 1 or 2")
        if self.window < self.side_multiple or self.window % self.side_multiple:
            raise ConfigError(f"window is {self.window}; it must be a multiple of {self.side_multiple}")
        if self.classes < 2:
            raise ConfigError(f"classes is {self.classes}; it must be at least 2, background included")
        for name in ("batch_size", "updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be positive")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision is '{self.precision}'; choose float32 or bfloat16")

    @property
    def side_multiple(self) -> int:
        """What a window's side must be a multiple of, in pixels."""
        return self.fold * 2 ** (len(self.widths) - 1)


def plan_training(
    facts: DataFacts,
    *,
    network_size: str = "standard",
    updates: int = 2000,
    width: int | None = None,
    depth: int | None = None,
) -> TrainingPlan:
    """The plan for these data.

    The window holds the structures with a margin. The network has as many levels as its window can be halved, the
    first of `width` channels, each further one twice as many up to four times the first for four levels, as in the
    recipe that was measured, and up to MAX_WIDTH in deeper networks. The batch has a fixed number of pixels.

    Args:
        facts: of the data.
        network_size: "small", "standard" or "large".
        updates: optimizer steps.
        width: channels of the first level; None takes that of `network_size`.
        depth: number of levels; None follows from the window.

    Raises: ConfigError for an unknown size or impossible facts.
    """
    if network_size not in FIRST_WIDTH:
        raise ConfigError(f"network_size is '{network_size}'; choose one of {', '.join(FIRST_WIDTH)}")
    if facts.size < 2 * SMALLEST_MAP:
        raise ConfigError(f"size is {facts.size}; slices must have at least {2 * SMALLEST_MAP} pixels per side")
    wanted = facts.size if facts.extent is None else min(facts.size, math.ceil(MARGIN * facts.extent))
    fold = 2 if wanted >= FOLDED_FROM else 1
    levels = depth or min(MAX_LEVELS, max(MIN_LEVELS, int(math.log2(wanted / fold / SMALLEST_MAP)) + 1))
    first = width or FIRST_WIDTH[network_size]
    largest = min(MAX_WIDTH, first * 2 ** max(1, levels - 2))
    widths = tuple(min(largest, first * 2**level) for level in range(levels))
    multiple = fold * 2 ** (levels - 1)
    window = multiple * max(2, min(math.ceil(wanted / multiple), math.ceil(facts.size / multiple)))
    batch = max(2, min(MAX_BATCH, round(BATCH_PIXELS / window**2)))
    return TrainingPlan(
        window=window, widths=widths, fold=fold, classes=facts.classes, batch_size=batch, updates=updates
    )
