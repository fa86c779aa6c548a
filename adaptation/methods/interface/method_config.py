"""The settings that all sites of a federated segmentation share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ....errors import ConfigError
from ...choices import ROTATION
from ...engine.training_plan import FOLDED_FROM, MIN_LEVELS, halvable_levels
from ...labels.candidate_labels import check_classes
from ...networks.site_network import GROUPS, NORMS, SIDE_MULTIPLE
from .option_checks import check_at_least, check_channels, check_choice, check_number, check_positive

PRIVATE_METHODS = ("fedavg", "fedprox", "fedbn")  # which train with differential privacy
COLOURS = 3  # channels of a colour picture


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """A federated segmentation. Raises: ConfigError if a value is out of range.

    Attributes:
        method: name of the method, see `fedfactory.adaptation.methods.catalogue`.
        classes: number of label values, background included.
        size: pixels per side of the slices.
        channels: of a slice, 1 to 8. Modalities of different numbers are told to CMC, see its options.
        colour: whether slices of three channels are red, green and blue, which the augmentation varies as one picture.
        sites: number of sites.
        rounds: number of rounds.
        updates: optimizer steps of a site in a round.
        batch_size: slices in an update.
        width: channels of the network's first level.
        depth: number of the network's resolution levels; None has as many as the slices' size asks for.
        fold: side of the squares of pixels that become channels first, see `SiteUNet`; None takes 2 for slices from 64
            px. The networks of HSSF and LSSL have their own.
        norm: normalisation, "instance", "group", or "batch" as FedAvg, FedBN and FedICRA were published with. CMC and
            the networks of HSSF and LSSL have their own.
        learning_rate: of all optimizers in the first update, from where it falls to 0 over all rounds; None takes the
            method's default.
        mirror: whether the augmentation flips slices.
        rotation: largest random angle of the augmentation, radians.
        first_guess: whether slices have random contrast, so that the segmenter works at sites of other contrast too.
        single_objects: labels of the structures of which segmenters keep the largest connected object only; 0 stands
            for all structures together. The researcher sets them from what sites with dense labels announce.
        seed: of the initial weights and of public slices' views; at a site, with its secret, also of what it draws.
        dp_epsilon: differential privacy per training patient that all rounds together may cost at a site; None trains
            without. See `fedfactory.adaptation.privacy.private_updates`.
        dp_delta: of differential privacy; None takes the largest that each site accepts, see `largest_delta`.
        dp_clip: largest norm of a patient's gradient in an update with differential privacy.
        options: the method's own settings, read-only; see the `Options` record of the method.
    """

    method: str
    classes: int
    size: int
    sites: int
    rounds: int
    channels: int = 1
    colour: bool = False
    updates: int = 20
    batch_size: int = 12
    width: int = 16
    depth: int | None = None
    fold: int | None = None
    norm: str = "instance"
    learning_rate: float | None = None
    mirror: bool = True
    rotation: float = ROTATION
    first_guess: bool = False
    single_objects: tuple[int, ...] = ()
    seed: int = 0
    dp_epsilon: float | None = None
    dp_delta: float | None = None
    dp_clip: float = 1.0
    options: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_classes(self.classes)
        check_channels("channels", self.channels)
        if self.colour and self.channels != COLOURS:
            raise ConfigError(f"channels is {self.channels}; it must be {COLOURS}, red, green and blue, with colour")
        for name in ("sites", "rounds", "updates", "batch_size"):
            check_at_least(name, getattr(self, name), 1)
        if self.size < 2 * SIDE_MULTIPLE or self.size % SIDE_MULTIPLE:
            raise ConfigError(f"size is {self.size}; choose a multiple of {SIDE_MULTIPLE} from {2 * SIDE_MULTIPLE}")
        if self.fold is not None:
            check_at_least("fold", self.fold, 1)
        if self.size % self.pixel_fold:
            raise ConfigError(f"fold is {self.fold}; choose a divisor of {self.size}, the pixels per side")
        if self.depth is not None:
            check_at_least("depth", self.depth, MIN_LEVELS)
            side = self.size // self.pixel_fold
            if side % 2 ** (self.depth - 1) or side < 2**self.depth:  # an instance norm needs more than one pixel
                folded = f" as squares of {self.pixel_fold} px" if self.pixel_fold > 1 else ""
                raise ConfigError(f"depth is {self.depth}; slices of {self.size} px{folded} cannot be halved so often")
        object.__setattr__(self, "single_objects", tuple(self.single_objects))  # JSON has lists, no tuples
        if not set(self.single_objects) <= set(range(self.classes)):
            raise ConfigError(f"single_objects is {self.single_objects}; choose labels below classes, {self.classes}")
        check_choice("norm", self.norm, NORMS)
        if self.width < GROUPS or self.width % GROUPS:
            raise ConfigError(f"width is {self.width}; choose a multiple of {GROUPS}")
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)
        if self.private:
            self._check_privacy()
        elif self.dp_delta is not None:
            raise ConfigError(f"dp_delta is {self.dp_delta}; it must be left out without dp_epsilon")

    @property
    def levels(self) -> int:
        """Number of the network's resolution levels."""
        return self.depth or halvable_levels(self.size // self.pixel_fold)

    @property
    def unet_settings(self) -> dict[str, Any]:
        """Settings by name of the U-Nets of all methods that train them, see `SiteUNet`."""
        return {
            "channels": self.channels, "width": self.width, "depth": self.levels, "fold": self.pixel_fold,
            "norm": self.norm,
        }  # fmt: skip

    @property
    def pixel_fold(self) -> int:
        """Side of the squares of pixels that become channels first."""
        return self.fold or (2 if self.size >= FOLDED_FROM else 1)

    @property
    def private(self) -> bool:
        """Whether sites train with differential privacy."""
        return self.dp_epsilon is not None

    def _check_privacy(self) -> None:
        for name in ("dp_epsilon", "dp_clip", *(["dp_delta"] if self.dp_delta is not None else [])):
            check_number(name, getattr(self, name))
            check_positive(name, getattr(self, name))
        if self.dp_delta is not None and self.dp_delta >= 1:
            raise ConfigError(f"dp_delta is {self.dp_delta}; it must be far below 1 / patients of a site")
        if self.method not in PRIVATE_METHODS:
            raise ConfigError(
                f"method is '{self.method}'; differential privacy needs one of {', '.join(PRIVATE_METHODS)}: "
                "other losses let patients of a batch, or public slices, depend on each other"
            )
        if self.norm == "batch":
            raise ConfigError(
                "norm is batch, which mixes the patients of a batch; differential privacy needs instance or group"
            )

    def to_dict(self) -> dict[str, object]:
        """All settings by name, JSON-able, with the fold that is used."""
        return {**asdict(self), "fold": self.pixel_fold}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> MethodConfig:
        """The configuration that `to_dict` described. Raises: ConfigError for unknown or impossible settings."""
        try:
            # Files from before there was a fold describe networks without one.
            config = cls(**{"fold": 1, **values})  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"these settings of a method are not usable ({error}); see `MethodConfig`") from None
        usual = replace(config, fold=None)
        return usual if usual.pixel_fold == config.pixel_fold else config
