"""Building the networks that a configuration describes."""

from __future__ import annotations

from ..config import FactoryConfig
from .discriminator import Discriminator, ProjectionDiscriminator
from .generator import Generator
from .palette import PaletteGenerator
from .style_discriminator import StyleDiscriminator
from .style_generator import StyleGenerator


def make_generator(config: FactoryConfig) -> Generator:
    """The generator of a configuration, in training mode, initialised from PyTorch's global random state."""
    return PaletteGenerator(config) if config.head == "palette" else StyleGenerator(config)


def make_discriminator(config: FactoryConfig) -> Discriminator:
    """The discriminator that fits the configuration's generator, in training mode, initialised alike."""
    return ProjectionDiscriminator(config) if config.head == "palette" else StyleDiscriminator(config)
