"""The configuration of a data factory: its networks, its domains and how it is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

from ..common.names import check_name
from ..errors import ConfigError
from ..imaging.slice_choices import COMPATIBILITY, MAX_CHANNELS, UNLABELLED

SMALLEST_MAP = 4  # side of the discriminator's last feature map
LARGEST_IMAGE = 1024
MOST_CLASSES = UNLABELLED  # labels are stored in one byte, and 255 means that nobody annotated
HEADS = ("palette", "image")
CONDITIONINGS = ("auto", "head", "mapping")
DISCRIMINATORS = ("local", "shared")
POSITIVE_INTEGERS = (
    "image_channels", "z_bins", "latent_dim", "mapping_layers", "batch_size", "r1_every", "path_every",
    "path_batch_shrink", "augment_length",
)  # fmt: skip


def channel_widths(image_size: int, *, multiplier: float = 2, limit: int = 512, start_size: int = 4) -> tuple[int, ...]:
    """Generator widths by the published rule: 512 up to side 32, then 16384 * multiplier / side.

    Args:
        image_size: pixels per side of the slices.
        multiplier: factor of the widths above side 32.
        limit: largest width, for smaller machines.
        start_size: side of the first feature map.

    Returns: channels of the maps with sides start_size, 2 start_size, ..., image_size.
    """
    widths, side = [], start_size
    while side <= image_size:
        widths.append(min(limit, 512 if side <= 32 else max(1, int(16384 * multiplier) // side)))
        side *= 2
    return tuple(widths)


PRESETS: dict[str, dict[str, object]] = {
    # The two-core setting of the demo: a 32-pixel generator that trains in minutes.
    "tiny": {"image_size": 32, "z_bins": 12},
    # Twice the side and width; an evening on a workstation.
    "small": {"image_size": 64, "z_bins": 16, "channels": (96, 96, 64, 32), "latent_dim": 128},
    # The published setting of RobustMedSeg: 512 pixels on a large GPU.
    "paper": {
        "head": "image",
        "image_size": 512,
        "z_bins": 29,
        "start_size": 4,
        "channels": channel_widths(512),
        "latent_dim": 512,
        "encoding_dim": 768,
        "mapping_layers": 8,
        "mapping_lr_multiplier": 0.01,
        "learning_rate": 2e-3,
        "r1_gamma": 10.0,
        "path_weight": 2.0,
        "style_mixing": 0.9,
        "augment": True,
        "ema_decay": 0.5 ** (32 / 10_000),
        "mirror": False,
        "shift": 0,
    },
}


@dataclass(frozen=True, kw_only=True)
class FactoryConfig:
    """The settings that all sites and the researcher must share. Values are checked here and nowhere else.

    Raises: ConfigError if a value is out of range, with the range in the message.
    """

    domains: tuple[str, ...]  # names of the sites' scanners, modalities or organs; position = domain index
    head: str = "palette"  # "palette": shared anatomy, a palette per domain; "image": the published networks
    # Where the domain enters. "head": the palette alone, so that a latent has the same anatomy in all domains;
    # "mapping": the mapping network (published; for domains without common anatomy); "auto": "head" if possible
    conditioning: str = "auto"
    discriminator: str = "local"  # "local": every site has its own; "shared": averaged like the generator (published)
    image_size: int = 32  # pixels per side, a power of two times start_size
    image_channels: int = 1  # channels of an image: 3 for colour pictures, or one for each of several MRI sequences
    # Palette head: label values, background included, that are drawn with the image; 0 draws images alone. The tissue
    # maps are grouped by class, and each site's own discriminator sees images with their labels where these are known
    classes: int = 0
    pseudo_labels: bool = False  # with classes: sites show pseudo-labels, if they have any, where nobody annotated
    z_bins: int = 12  # number of slice heights a volume is divided into; 1 for pictures, which have no height
    start_size: int = 8  # side of the learned constant that the generator starts from
    channels: tuple[int, ...] = (48, 32, 16)  # generator widths, from start_size up to image_size
    latent_dim: int = 64  # length of z and of w
    encoding_dim: int = 0  # length of the sites' mean image embedding (768 for CLIP ViT-L/14); 0: no embedding
    mapping_layers: int = 2
    mapping_lr_multiplier: float = 0.1
    batch_size: int = 16
    learning_rate: float = 4e-3  # Adam, both networks
    texture: float = 0.0  # palette head: largest deviation of a pixel from the grey level of its tissue
    r1_gamma: float = 0.5  # weight of the gradient penalty on real slices
    r1_every: int = 16  # updates from one penalty to the next
    path_weight: float = 0.0  # weight of path length regularisation
    path_every: int = 4  # updates from one path length step to the next
    path_batch_shrink: int = 2  # the path length step uses batch_size divided by this
    style_mixing: float = 0.0  # probability that a batch is generated from two latents
    turn: float = 0.0  # share of the slices, real and drawn, that the discriminator sees turned by any angle
    augment: bool = False  # adaptive augmentation of all slices that the discriminator is given
    augment_p: float = 0.0  # its fixed strength in [0, 1]; 0 adapts the strength
    augment_target: float = 0.6  # adaptive: target of the mean sign of the scores of real slices
    augment_length: int = 500_000  # adaptive: number of slices in which the strength may go from 0 to 1
    clip_weight: float = 0.0  # weight of the guidance by CLIP image embeddings; 0 is off
    ema_decay: float = 0.995  # decay of the generator's moving average, per update of a site
    mirror: bool = True  # left-right flips of real slices (off for organs that are not symmetric)
    shift: int = 1  # largest shift of real slices, pixels
    compatibility: str = "none"  # "published": train as the published program did, with its errors

    def __post_init__(self) -> None:
        object.__setattr__(self, "domains", tuple(self.domains))
        object.__setattr__(self, "channels", tuple(self.channels))
        if not self.domains or len(set(self.domains)) != len(self.domains):
            raise ConfigError(f"domains are {list(self.domains)}; give at least one name, each once")
        for name in self.domains:
            if isinstance(name, str) and not name.strip():
                raise ConfigError(f"domains are {list(self.domains)}; a name is empty, give every domain a name")
            check_name("a domain", name)
        self._check_choice("head", HEADS)
        self._check_choice("conditioning", CONDITIONINGS)
        if self.conditioning == "head" and self.head != "palette":
            raise ConfigError(
                f"conditioning is 'head' and head is '{self.head}'; only the palette takes the domain, choose 'mapping'"
            )
        self._check_choice("discriminator", DISCRIMINATORS)
        self._check_choice("compatibility", COMPATIBILITY)
        if self.start_size < SMALLEST_MAP or self.start_size & (self.start_size - 1):
            raise ConfigError(f"start_size is {self.start_size}; choose a power of two from {SMALLEST_MAP} up")
        smallest = max(self.start_size, 2 * SMALLEST_MAP)
        if not smallest <= self.image_size <= LARGEST_IMAGE or self.image_size & (self.image_size - 1):
            raise ConfigError(
                f"image_size is {self.image_size}; choose a power of two from {smallest} to {LARGEST_IMAGE}"
            )
        if self.head == "image" and self.start_size != SMALLEST_MAP:
            raise ConfigError(f"start_size is {self.start_size}; the published networks start at {SMALLEST_MAP}")
        if len(self.channels) != len(self.resolutions):
            raise ConfigError(f"channels has {len(self.channels)} widths; sizes {list(self.resolutions)} need one each")
        for name in (*POSITIVE_INTEGERS, "shift", "encoding_dim"):
            lowest = int(name in POSITIVE_INTEGERS)
            if not isinstance(getattr(self, name), int) or getattr(self, name) < lowest:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be a whole number from {lowest} up")
        if self.image_channels > MAX_CHANNELS:
            raise ConfigError(f"image_channels is {self.image_channels}; choose from 1 to {MAX_CHANNELS}")
        if self.compatibility == "published" and self.image_channels != 1:
            raise ConfigError(
                f"image_channels is {self.image_channels} and compatibility 'published'; the published program knows "
                "one channel, choose compatibility 'none'"
            )
        self._check_classes()
        if min(self.channels) < 1:
            raise ConfigError(f"channels are {list(self.channels)}; each must be at least 1")
        for name in ("learning_rate", "mapping_lr_multiplier"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("r1_gamma", "path_weight", "clip_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("style_mixing", "augment_p", "augment_target", "texture", "turn"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; choose from 0 to 1")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay is {self.ema_decay}; choose from 0 to below 1")

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        if getattr(self, name) not in choices:
            raise ConfigError(f"{name} is '{getattr(self, name)}'; choose from {', '.join(choices)}")

    def _check_classes(self) -> None:
        if not isinstance(self.classes, int) or self.classes == 1 or not 0 <= self.classes <= MOST_CLASSES:
            raise ConfigError(
                f"classes is {self.classes}; it must be 0, for images without labels, or from 2 to {MOST_CLASSES}, "
                "background included"
            )
        if not self.classes:
            if self.pseudo_labels:
                raise ConfigError("pseudo_labels is True and classes is 0; give the number of classes to draw")
            return
        for name, needed, reason in (
            ("head", "palette", "a label is a group of the palette's tissue maps"),
            ("discriminator", "local", "one that sees a site's labels must stay at the site"),
            ("compatibility", "none", "the published program knows no such labels"),
        ):
            if getattr(self, name) != needed:
                raise ConfigError(
                    f"classes is {self.classes} and {name} is '{getattr(self, name)}'; {reason}: choose '{needed}', or "
                    "classes 0 and `fedfactory label` afterwards"
                )

    @property
    def label_channels(self) -> int:
        """Channels of the labels that the discriminator sees beside the image: one for each class but background."""
        return max(0, self.classes - 1)

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Sides of the generator's feature maps: start_size, twice that, ..., image_size."""
        sides = [self.start_size]
        while sides[-1] < self.image_size:
            sides.append(sides[-1] * 2)
        return tuple(sides)

    @property
    def pictures(self) -> bool:
        """Whether the images are single pictures, without a height, instead of the slices of volumes."""
        return self.z_bins == 1

    @property
    def domain_enters(self) -> str:
        """ "head" or "mapping", see `conditioning`."""
        if self.conditioning == "auto":
            return "head" if self.head == "palette" else "mapping"
        return self.conditioning

    def domain_index(self, name: str) -> int:
        """Index of a domain. Raises ConfigError that lists the known names."""
        if name not in self.domains:
            raise ConfigError(f"unknown domain '{name}'; choose from {', '.join(self.domains)}")
        return self.domains.index(name)

    def to_dict(self) -> dict[str, object]:
        """JSON-able copy, the inverse of `from_dict`."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> FactoryConfig:
        """The configuration that `to_dict` wrote.

        Raises: ConfigError for unknown, missing or wrongly typed entries.
        """
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError(f"unknown settings {sorted(unknown)} in the factory configuration; remove them")
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"factory configuration: {error}; see FactoryConfig for names and types") from None

    @classmethod
    def preset(cls, name: str, domains: tuple[str, ...], **changes: object) -> FactoryConfig:
        """A preset with some settings replaced by `changes`. Raises ConfigError for an unknown name."""
        if name not in PRESETS:
            raise ConfigError(f"unknown preset '{name}'; choose from {', '.join(PRESETS)}")
        return cls.from_dict({"domains": tuple(domains), **PRESETS[name], **changes})
