"""The data factory: networks, losses, one training step, checkpoints and synthesis."""

from .config import FactoryConfig
from .factory import Factory
from .factory_file import TrainedFactory, load_factory
from .networks.build import make_discriminator, make_generator
from .networks.generator import Generator
from .trainer import FactoryTrainer

__all__ = [
    "Factory",
    "FactoryConfig",
    "FactoryTrainer",
    "Generator",
    "TrainedFactory",
    "load_factory",
    "make_discriminator",
    "make_generator",
]
