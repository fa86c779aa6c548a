"""The data factory: networks, losses, one training step, checkpoints and synthesis."""

from .config import FactoryConfig
from .factory_file import TrainedFactory, load_factory
from .generator import Generator
from .trainer import Factory, FactoryTrainer

__all__ = ["Factory", "FactoryConfig", "FactoryTrainer", "Generator", "TrainedFactory", "load_factory"]
