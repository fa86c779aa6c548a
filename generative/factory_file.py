"""The factory as users hold it: an average generator with its configuration and history, saved and loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from .checkpoint import load_strictly, read_weights, write_weights
from .config import FactoryConfig
from .generator import Generator

KIND = "factory"


@dataclass
class TrainedFactory:
    """What phase one gives to every site.

    Attributes:
        generator: the moving average of the global generator, in evaluation mode.
        latest: state dict of the global generator after the last round, to continue training from.
        spacing: millimetres per pixel of the slices.
        height: millimetres from the lowest to the highest bin.
        history: per domain, a list with one dict of mean losses per round.
        facts: rounds, seed, versions, ...; JSON-able.
    """

    generator: Generator
    latest: dict[str, Tensor]
    spacing: float
    height: float
    history: dict[str, list[dict[str, float]]]
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> FactoryConfig:
        return self.generator.config

    def save(self, path: str | Path) -> None:
        """Write `path` (safetensors with the card inside) and the card beside it."""
        tensors = {f"g_ema.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        tensors |= {f"g.{name}": tensor for name, tensor in self.latest.items()}
        card = {
            "kind": KIND,
            "config": self.config.to_dict(),
            "spacing": self.spacing,
            "height": self.height,
            "facts": self.facts,
            "history": self.history,
        }
        write_weights(path, tensors, card)


def load_factory(path: str | Path) -> TrainedFactory:
    """Raises: UsageError if the file is missing, CheckpointError if it is damaged, foreign or of another kind."""
    tensors, card = read_weights(path, kind=KIND)
    try:
        config = FactoryConfig.from_dict(card["config"])
        generator = Generator(config)
        load_strictly(generator, _without_prefix(tensors, "g_ema."), path)
        load_strictly(Generator(config), latest := _without_prefix(tensors, "g."), path)
        return TrainedFactory(generator.eval(), latest, card["spacing"], card["height"], card["history"], card["facts"])
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: its card is not usable ({error})") from None


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name[len(prefix) :]: tensor.to(torch.float32) for name, tensor in tensors.items() if name.startswith(prefix)
    }
