"""The settings that all sites of a federated segmentation share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ....errors import ConfigError
from ...choices import ROTATION
from ...labels.candidate_labels import check_classes
from ...networks.site_network import GROUPS, NORMS, SIDE_MULTIPLE
from .option_checks import check_at_least, check_channels, check_choice, check_positive

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
        norm: normalisation, "group", or "batch" as FedAvg, FedBN and FedICRA were published with; FedMix and gaze
            supervision always use "group".
        learning_rate: of all optimizers; None takes the method's default.
        mirror: whether the augmentation flips slices.
        rotation: largest random angle of the augmentation, radians.
        first_guess: whether slices have random contrast, so that the segmenter works at sites of other contrast too.
        seed: of the initial weights and of public slices' views; at a site, with its secret, also of what it draws.
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
    norm: str = "group"
    learning_rate: float | None = None
    mirror: bool = True
    rotation: float = ROTATION
    first_guess: bool = False
    seed: int = 0
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
        check_choice("norm", self.norm, NORMS)
        if self.width < GROUPS or self.width % GROUPS:
            raise ConfigError(f"width is {self.width}; choose a multiple of {GROUPS}")
        if self.learning_rate is not None:
            check_positive("learning_rate", self.learning_rate)

    def to_dict(self) -> dict[str, object]:
        """All settings by name, JSON-able."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> MethodConfig:
        """The configuration that `to_dict` described. Raises: ConfigError for unknown or impossible settings."""
        try:
            return cls(**values)  # type: ignore[arg-type]
        except TypeError as error:
            raise ConfigError(f"these settings of a method are not usable ({error}); see `MethodConfig`") from None
