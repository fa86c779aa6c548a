"""Plans network and training of a segmenter from the data, as nnU-Net does (Isensee et al. 2021); needs no PyTorch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from ...common.records import read_record, record_to_dict
from ...errors import ConfigError
from ...imaging.slice_choices import MAX_CHANNELS
from ..network_names import check_architecture, dimensions
from .segmenter_config import SegmenterConfig

MARGIN = 1.5  # sides of the structures' bounding box that a window has
SMALLEST_MAP = 4  # pixels per side of the deepest level
MIN_LEVELS, MAX_LEVELS = 3, 6  # MONAI's dynamic U-Net has at least three
FOLDED_FROM = 64  # pixels per side from which two by two pixels are folded into channels: a quarter of the time
BATCH_PIXELS = 6 * 80 * 80  # of all windows in an update
MAX_BATCH = 16
MAX_WIDTH = 320  # channels, as nnU-Net's
FIRST_WIDTH = {"small": 16, "standard": 24, "large": 32}  # channels of the first level, by size of the network
COMMON_ORIENTATION = math.radians(15)  # deviation of the structures' orientation below which all patients lie alike
LEAST_ROTATION = math.radians(15)  # largest random angle, where all patients lie alike
ROTATED_DEVIATIONS = 3.0  # or this many deviations, if that is more
STACK = 8  # slices in a window of a 3-D network
HALVINGS = int(math.log2(STACK))  # until one slice is left
MAX_HALVINGS = 2  # of the slices, where the network leaves the choice
NORM_GROUPS = 8  # of SegResNet's group norm: its channels are a multiple
MAPS_IN_MEMORY = 14  # feature maps of a level that training stores, in units of the level's width
COLOURS = 3  # channels of a colour picture
BYTES_PER_WEIGHT = 20  # float32: weight, moving average, gradient, two moments


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """What a plan follows from.

    Attributes:
        size: pixels per side of the slices.
        extent: largest side of the labelled structures' bounding boxes, pixels: that of nearly all volumes. None where
            no label tells it: then windows are whole slices.
        classes: number of label values, background included.
        anisotropy: distance of neighbouring slices in pixels; 3-D networks halve the number of slices only once pixels
            have become as large.
        orientation_spread: deviation of the structures' orientation over the volumes, radians, and that over the
            volumes and their mirror images, see `fedfactory.adaptation.engine.orientation`; None where it is unknown.
        channels: of the slices.
        colour: whether these are red, green and blue.
    """

    size: int
    extent: int | None
    classes: int
    anisotropy: float = 1.0
    orientation_spread: tuple[float, float] | None = None
    channels: int = 1
    colour: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How a segmenter is built and trained.

    Raises: ConfigError if a value is out of range.

    Attributes:
        network: a name of `fedfactory.adaptation.network_names.NETWORKS`.
        window: pixels per side of the windows that the network sees; a multiple of `side_multiple`.
        slices: slices in a window: 1 for a 2-D network.
        widths: channels of each resolution level, the finest first; at least three levels.
        slice_strides: 2 for each level at whose beginning the number of slices is halved, 1 elsewhere.
        fold: 2 if two by two pixels are folded into channels before the first level, 1 if not.
        classes: number of label values, background included.
        batch_size: windows per update.
        updates: optimizer steps.
        learning_rate: largest of AdamW's one-cycle schedule.
        precision: "bfloat16" computes the network in half precision, "float32" does not.
        rotation: largest random angle of the windows, radians.
        mirror: whether windows are mirrored at random.
        channels: of the windows, 1 to 8.
        colour: whether these are red, green and blue: then they are standardised, and vary, together.
    """

    network: str = "dynunet"
    window: int
    slices: int = 1
    widths: tuple[int, ...]
    slice_strides: tuple[int, ...] = ()
    fold: int
    classes: int
    batch_size: int
    updates: int
    learning_rate: float = 3e-3
    precision: str = "float32"
    rotation: float = math.pi
    mirror: bool = True
    channels: int = 1
    colour: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))
        object.__setattr__(self, "slice_strides", tuple(self.slice_strides) or (1,) * len(self.widths))
        check_architecture(self.network.removesuffix("3d"))
        if len(self.widths) < MIN_LEVELS:
            raise ConfigError(f"widths has {len(self.widths)} levels; it must have at least {MIN_LEVELS}")
        if min(self.widths) < 1:
            raise ConfigError(f"widths is {self.widths}; every level needs at least 1 channel")
        if len(self.slice_strides) != len(self.widths) or not {1, 2} >= {*self.slice_strides}:
            raise ConfigError(f"slice_strides is {self.slice_strides}; it must have a 1 or 2 for each level")
        if self.fold not in (1, 2):
            raise ConfigError(f"fold is {self.fold}; choose 1 or 2")
        if self.window < self.side_multiple or self.window % self.side_multiple:
            raise ConfigError(f"window is {self.window}; it must be a multiple of {self.side_multiple}")
        if self.slices < 1 or self.slices % math.prod(self.slice_strides):
            raise ConfigError(f"slices is {self.slices}; it must be a multiple of {math.prod(self.slice_strides)}")
        if self.dimensions == 2 and self.slices > 1:
            raise ConfigError(f"slices is {self.slices}; it must be 1 for {self.network}, which sees single slices")
        if self.network.startswith("segresnet") and self.widths[0] % NORM_GROUPS:
            raise ConfigError(f"widths begins with {self.widths[0]}; {self.network} needs a multiple of {NORM_GROUPS}")
        if self.classes < 2:
            raise ConfigError(f"classes is {self.classes}; it must be at least 2, background included")
        for name in ("batch_size", "updates"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if not self.learning_rate > 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be positive")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError(f"precision is '{self.precision}'; choose float32 or bfloat16")
        if not 0 <= self.rotation < math.inf:
            raise ConfigError(f"rotation is {self.rotation}; it must be at least 0")
        if not 1 <= self.channels <= MAX_CHANNELS:
            raise ConfigError(f"channels is {self.channels}; it must be from 1 to {MAX_CHANNELS}")
        if self.colour and self.channels != COLOURS:
            raise ConfigError(f"colour is True and channels is {self.channels}; red, green and blue are {COLOURS}")

    @property
    def side_multiple(self) -> int:
        """What a window's side must be a multiple of, in pixels."""
        return self.fold * 2 ** (len(self.widths) - 1)

    @property
    def dimensions(self) -> int:
        """2 if every slice is segmented by itself, 3 if the network sees neighbouring slices too."""
        return dimensions(self.network)

    @property
    def memory(self) -> float:
        """Estimated memory of the training, bytes: feature maps that wait for the gradient, weights and optimizer.

        Windows are not counted: even of eight channels they take about a tenth as much as feature maps.
        """
        sites = [(self.window // self.fold // 2**level) ** 2 * self.slices for level in range(len(self.widths))]
        maps = sum(MAPS_IN_MEMORY * width * count for width, count in zip(self.widths, sites, strict=True))
        kernel = 9 if self.dimensions == 2 else 27
        weights = sum(kernel * (2 * a * b + 2 * b * b + 2 * a * a) for a, b in pairwise(self.widths))
        return 4.0 * self.batch_size * maps + BYTES_PER_WEIGHT * weights

    def to_dict(self) -> dict[str, Any]:
        """JSON-able, the inverse of `from_dict`."""
        return record_to_dict(self)

    @classmethod
    def from_dict(cls, values: object) -> TrainingPlan:
        """Raises: ConfigError for missing, unknown or impossible entries."""
        return read_record(cls, values)


def levels_for(side: float) -> int:
    """Number of resolution levels for maps of `side` pixels: as many as leave SMALLEST_MAP, within the limits."""
    return min(MAX_LEVELS, max(MIN_LEVELS, int(math.log2(side / SMALLEST_MAP)) + 1))


def halvable_levels(side: int) -> int:
    """`levels_for` a network that sees whole slices, whose side must be halved without a remainder."""
    levels = levels_for(side)
    while levels > MIN_LEVELS and side % 2 ** (levels - 1):
        levels -= 1
    return levels


def plan_training(facts: DataFacts, config: SegmenterConfig, *, fast_bfloat16: bool = False) -> TrainingPlan:
    """The plan for these data.

    The window holds the structures with a margin, or the whole slice if that is chosen. The network has as many levels
    as its window can be halved, the first of `config.width` channels, each further one twice as many up to four times
    the first for four levels, as in the recipe that was measured, and up to MAX_WIDTH in deeper networks; SegResNet's
    channels have no upper limit. Windows are turned by any angle and mirrored, unless the labels show that all patients
    lie alike: then by as much as their orientation varies, and mirrored only if the mirror image lies alike too. The
    batch has a fixed number of pixels, or fewer if the memory is small; if it is
    smaller still, so is the window.

    Args:
        facts: of the data.
        config: what the user has chosen.
        fast_bfloat16: whether this device computes faster in half precision; used for the precision "auto".

    Raises: ConfigError for impossible facts.
    """
    if facts.size < 2 * SMALLEST_MAP:
        raise ConfigError(f"size is {facts.size}; slices must have at least {2 * SMALLEST_MAP} pixels per side")
    if config.whole_slices:
        facts = replace(facts, extent=facts.size)
    wanted = facts.size if facts.extent is None else min(facts.size, math.ceil(MARGIN * facts.extent))
    fold = 2 if wanted >= FOLDED_FROM else 1
    halves_slices = config.network == "segresnet3d"  # at every level
    deepest = HALVINGS + 1 if halves_slices else MAX_LEVELS
    levels = min(config.depth or levels_for(wanted / fold), deepest)
    first = config.width or FIRST_WIDTH[config.network_size]
    largest = min(MAX_WIDTH, first * 2 ** max(1, levels - 2))
    if config.network.startswith("segresnet"):  # doubles its channels at every level
        largest = first * 2 ** (levels - 1)
    multiple = fold * 2 ** (levels - 1)
    slices = STACK if dimensions(config.network) == 3 else 1
    window = multiple * max(2, round(wanted / multiple), math.ceil(min(facts.extent or 0, facts.size) / multiple))
    strides: tuple[int, ...] = ()
    if slices > 1:
        strides = (1, *[2] * (levels - 1)) if halves_slices else _slice_strides(levels, facts.anisotropy, fold)
    rotation, mirror = _turning(facts, config)
    precision = config.precision
    if precision == "auto":
        # SegResNet's group norm is slow in half precision: 319 against 201 ms an update.
        precision = "bfloat16" if fast_bfloat16 and not config.network.startswith("segresnet") else "float32"
    plan = TrainingPlan(
        network=config.network,
        window=window,
        slices=slices,
        widths=tuple(min(largest, first * 2**level) for level in range(levels)),
        slice_strides=strides,
        fold=fold,
        classes=facts.classes,
        batch_size=config.batch_size or max(2, min(MAX_BATCH, round(BATCH_PIXELS / (window**2 * slices)))),
        updates=config.wanted_updates,
        learning_rate=config.learning_rate or TrainingPlan.learning_rate,
        precision=precision,
        rotation=rotation,
        mirror=mirror,
        channels=facts.channels,
        colour=facts.colour,
    )
    plan = with_batch_in_memory(plan, config.memory)
    while plan.memory > config.memory * 2**30 and plan.window > 2 * multiple:
        plan = replace(plan, window=plan.window - multiple)
    return plan


def with_batch_in_memory(plan: TrainingPlan, memory: float) -> TrainingPlan:
    """The plan with its batch halved until the training takes at most `memory` GiB, or one window is left."""
    while plan.memory > memory * 2**30 and plan.batch_size > 1:
        plan = replace(plan, batch_size=plan.batch_size // 2)
    return plan


def _turning(facts: DataFacts, config: SegmenterConfig) -> tuple[float, bool]:
    """Largest random angle of the windows, radians, and whether they are mirrored."""
    spread, mirrored_spread = facts.orientation_spread or (math.inf, math.inf)
    alike = spread < COMMON_ORIENTATION
    rotation, mirror = config.rotation, config.mirror
    if rotation is None:
        rotation = max(LEAST_ROTATION, ROTATED_DEVIATIONS * spread) if alike else math.pi
    if mirror is None:
        mirror = not alike or rotation >= math.pi or mirrored_spread < COMMON_ORIENTATION
    return rotation, mirror


def _slice_strides(levels: int, anisotropy: float, fold: int) -> tuple[int, ...]:
    """1 or 2 for each level: the number of slices is halved once pixels are about as large as slices are apart."""
    strides, pixel = [1], float(fold)
    for _ in range(levels - 1):
        strides.append(2 if pixel >= anisotropy / 2 and strides.count(2) < MAX_HALVINGS else 1)
        pixel *= 2
    return tuple(strides)
