"""One frozen description of a data factory: its networks, its domains and how it is trained."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import ConfigError

SMALLEST_MAP = 4  # side of the discriminator's last feature map

PRESETS: dict[str, dict[str, Any]] = {
    # The two-core setting of the demo: a 32-pixel generator that trains in minutes.
    "tiny": {"image_size": 32, "z_bins": 12},
    # Twice the side and width; an evening on a workstation.
    "small": {"image_size": 64, "z_bins": 16, "channels": (96, 96, 64, 32), "latent_dim": 128},
}


@dataclass(frozen=True, kw_only=True)
class FactoryConfig:
    """What every site and the researcher must agree on. Values are checked here and nowhere else.

    Raises: ConfigError if a value is out of range, with the range in the message.
    """

    domains: tuple[str, ...]  # names of the sites' scanners, modalities or organs; position = domain index
    image_size: int = 32  # pixels per side, a power of two times start_size
    z_bins: int = 12  # number of slice heights a volume is divided into
    start_size: int = 8  # side of the learnt constant the generator starts from
    channels: tuple[int, ...] = (48, 32, 16)  # generator widths, from start_size up to image_size
    latent_dim: int = 64  # numbers in z and in w
    mapping_layers: int = 2
    mapping_lr_multiplier: float = 0.1
    batch_size: int = 16
    learning_rate: float = 4e-3  # Adam, both networks
    r1_gamma: float = 0.5  # weight of the gradient penalty on real slices
    r1_every: int = 16  # updates from one penalty to the next
    ema_decay: float = 0.995  # per update of one site
    mirror: bool = True  # left-right flips of real slices (off for organs that are not symmetric)

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(self.domains))
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise ConfigError(f"domains are {list(self.domains)}; give at least one name, each once")
        if any(not isinstance(name, str) or not name.strip() for name in self.domains):
            raise ConfigError("a domain name is empty")
        if self.start_size < SMALLEST_MAP or self.start_size & (self.start_size - 1):
            raise ConfigError(f"start_size is {self.start_size}; choose a power of two from {SMALLEST_MAP} up")
        if self.image_size < self.start_size or self.image_size & (self.image_size - 1):
            raise ConfigError(
                f"image_size is {self.image_size}; choose a power of two from {self.start_size} up, such as 32"
            )
        if len(self.channels) != len(self.resolutions):
            raise ConfigError(f"channels has {len(self.channels)} widths; sizes {list(self.resolutions)} need one each")
        for name in ("z_bins", "latent_dim", "mapping_layers", "batch_size", "r1_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if min(self.channels) < 1:
            raise ConfigError(f"channels are {list(self.channels)}; each must be at least 1")
        if self.learning_rate <= 0 or self.mapping_lr_multiplier <= 0 or self.r1_gamma < 0:
            raise ConfigError("learning_rate and mapping_lr_multiplier must be positive, r1_gamma not negative")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; choose from 0 to below 1")

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the generator's feature maps: start_size, twice that, ..., image_size."""
        sides = [self.start_size]
        while sides[-1] < self.image_size:
            sides.append(sides[-1] * 2)
        return tuple(sides)

    def domain_index(self, name: str) -> int:
        """Position of a domain. Raises ConfigError that lists the known names."""
        if name not in self.domains:
            raise ConfigError(f"unknown domain '{name}': this factory knows {', '.join(self.domains)}")
        return self.domains.index(name)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able copy, the inverse of `from_dict`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FactoryConfig:
        """Raises: ConfigError for unknown, missing or wrongly typed entries."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)} in the factory configuration")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"factory configuration: {error}") from None

    @classmethod
    def preset(cls, name: str, domains: tuple[str, ...], **changes: Any) -> FactoryConfig:
        """A named setting, with `changes` laid over it. Raises ConfigError for an unknown name."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset '{name}': choose from {', '.join(PRESETS)}")
        return cls.from_dict({"domains": tuple(domains), **PRESETS[name], **changes})
