"""The networks of a factory as one module: generator and discriminator side by side."""

from __future__ import annotations

import torch
from torch import nn

from ..common.precision import PRECISIONS
from ..errors import ConfigError
from .config import FactoryConfig
from .networks.build import make_discriminator, make_generator

GENERATOR = "generator."  # prefix of the generator's entries in the state dict of a Factory


class Factory(nn.Module):
    """Generator and discriminator side by side: what a site trains.

    Args:
        config: the factory's description.
        precision: "float32", or "bfloat16" or "float16" for the four largest sides (published networks only); weights
            stay float32.

    Raises: ConfigError if the networks do not support the precision.
    """

    def __init__(self, config: FactoryConfig, *, precision: str = "float32") -> None:
        super().__init__()
        self.config = config
        self.generator, self.discriminator = make_generator(config), make_discriminator(config)
        supported = ("float32",) if config.head == "palette" else tuple(PRECISIONS)
        if precision not in supported:
            raise ConfigError(
                f"precision is '{precision}'; for head '{config.head}' choose from {', '.join(supported)}"
            )
        self.precision = precision
        if precision != "float32":
            self.generator.low_precision = self.discriminator.low_precision = PRECISIONS[precision]
        if precision != "float32" or config.head == "palette":
            # Faster for narrow layers and in half precision; wide float32 layers would be a third slower backwards.
            self.to(memory_format=torch.channels_last)
