"""The networks that a configuration describes."""

from __future__ import annotations

from ..config import FactoryConfig
from .discriminator import Discriminator, ProjectionDiscriminator
from .generator import Generator
from .palette import PaletteGenerator
from .style_discriminator import StyleDiscriminator
from .style_generator import StyleGenerator


def make_generator(config: FactoryConfig) -> Generator:
    """With fresh weights from PyTorch's global random state, in training mode."""
    return PaletteGenerator(config) if config.head == "palette" else StyleGenerator(config)


def make_discriminator(config: FactoryConfig) -> Discriminator:
    """The one that fits the configuration's generator, with fresh weights, in training mode."""
    return ProjectionDiscriminator(config) if config.head == "palette" else StyleDiscriminator(config)
