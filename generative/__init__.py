"""The data factory: networks, losses, one training step, checkpoints and synthesis."""

from typing import TYPE_CHECKING

from ..common.lazy_imports import lazy_names

if TYPE_CHECKING:
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

# At first use: `generative.config` is also read where a command only checks what was typed, without PyTorch.
__getattr__ = lazy_names(
    __name__,
    {
        "Factory": "factory",
        "FactoryConfig": "config",
        "FactoryTrainer": "trainer",
        "Generator": "networks.generator",
        "TrainedFactory": "factory_file",
        "load_factory": "factory_file",
        "make_discriminator": "networks.build",
        "make_generator": "networks.build",
    },
)
