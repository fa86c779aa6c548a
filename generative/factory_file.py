"""The factory as users hold it: networks with their configuration and history, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common.weights_file import load_strictly, read_weights, write_weights
from ..errors import CheckpointError, ConfigError, UsageError
from .config import FactoryConfig
from .networks.build import make_discriminator, make_generator
from .networks.discriminator import Discriminator
from .networks.generator import Generator

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
        discriminator: in evaluation mode; None where every site keeps its own.
    """

    generator: Generator
    latest: dict[str, Tensor]
    spacing: float
    height: float
    history: dict[str, list[dict[str, float]]]
    facts: dict[str, Any] = field(default_factory=dict)
    discriminator: Discriminator | None = None

    @property
    def config(self) -> FactoryConfig:
        return self.generator.config

    @torch.no_grad()
    def generate(
        self,
        z: Any,
        domain: str | int | Sequence[str] | Any,
        z_bin: int | Any,
        encoding: Any = None,
        *,
        randomize_noise: bool = True,
        seed: int | None = None,
    ) -> Tensor:
        """Slices under given conditions.

        Args:
            z: (B, latent_dim) unit normal numbers, tensor or array.
            domain: a name or index for all slices, or B of them.
            z_bin: a slice height 0 .. z_bins - 1 for all slices, or B of them.
            encoding: mean image embedding, (1, encoding_dim) for all slices or (B, encoding_dim); None without.
            randomize_noise: draw layer noise; otherwise the generator's own noise, the same slice every time.
            seed: of the layer noise; None takes PyTorch's global random state.

        Returns: (B, 1, S, S) float32, about [-1, 1], not clamped.

        Raises: UsageError for a wrong width, ConfigError for an unknown domain, both with what is known.
        """
        device = next(self.generator.parameters()).device
        z = torch.as_tensor(z, dtype=torch.float32, device=device)
        if z.ndim != 2 or z.shape[1] != self.config.latent_dim:
            raise UsageError(f"z has shape {tuple(z.shape)}, expected (B, {self.config.latent_dim})")
        conditions = self._conditions(len(z), z_bin, domain, encoding, device)
        noise = self.generator.fixed_noise()
        if randomize_noise:
            rng = torch.Generator(device)
            rng.manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
            noise = self.generator.draw_noise(len(z), rng)
        return self.generator(z, *conditions[:2], noise, conditions[2])

    @torch.no_grad()
    def discriminate(self, images: Any, domain: Any, z_bin: Any, encoding: Any = None) -> Tensor:
        """How real slices look, (B, 1), unbounded; a score depends on the batch (minibatch statistic).

        Args:
            images: (B, 1, S, S) in [-1, 1], tensor or array. domain, z_bin, encoding: as for `generate`.

        Raises: UsageError for a wrong shape or if the factory holds no discriminator; ConfigError for an unknown
            domain.
        """
        if self.discriminator is None:
            raise UsageError("this factory holds no discriminator: its sites kept theirs")
        device, side = next(self.discriminator.parameters()).device, self.config.image_size
        images = torch.as_tensor(images, dtype=torch.float32, device=device)
        if images.ndim != 4 or tuple(images.shape[1:]) != (1, side, side):
            raise UsageError(f"images have shape {tuple(images.shape)}, expected (B, 1, {side}, {side})")
        return self.discriminator(images, *self._conditions(len(images), z_bin, domain, encoding, device))

    def _conditions(
        self, batch: int, z_bin: Any, domain: Any, encoding: Any, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        config = self.config
        if isinstance(domain, str):
            domain = config.domain_index(domain)
        elif isinstance(domain, Sequence):
            domain = [config.domain_index(one) if isinstance(one, str) else one for one in domain]
        domains = self._indices("domain", domain, batch, len(config.domains), device)
        z_bins = self._indices("z_bin", z_bin, batch, config.z_bins, device)
        if encoding is None:
            return z_bins, domains, None
        encoding = torch.as_tensor(encoding, dtype=torch.float32, device=device)
        if not config.encoding_dim or encoding.ndim != 2 or encoding.shape[1] != config.encoding_dim:
            wanted = f"(1 or B, {config.encoding_dim})" if config.encoding_dim else "none: it was trained without"
            raise UsageError(f"encoding has shape {tuple(encoding.shape)}, this factory takes {wanted}")
        if len(encoding) not in (1, batch):
            raise UsageError(f"encoding has {len(encoding)} rows for {batch} slices; give one, or one for each")
        return z_bins, domains, encoding.expand(batch, -1)

    @staticmethod
    def _indices(name: str, values: Any, batch: int, count: int, device: torch.device) -> Tensor:
        values = torch.as_tensor(values, device=device)
        if values.is_floating_point() or values.ndim > 1 or (values.ndim == 1 and len(values) not in (1, batch)):
            raise UsageError(f"{name}: give one whole number, or {batch} of them")
        if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
            raise UsageError(f"{name} goes from {int(values.min())} to {int(values.max())}; known are 0 to {count - 1}")
        return values.long().reshape(-1).expand(batch)

    def save(self, path: str | Path) -> None:
        """Write `path` (safetensors with the card inside) and the card beside it."""
        tensors = {f"g_ema.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        tensors |= {f"g.{name}": tensor for name, tensor in self.latest.items()}
        if self.discriminator is not None:
            tensors |= {f"d.{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
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
        generator = make_generator(config)
        load_strictly(generator, _without_prefix(tensors, "g_ema."), path)
        load_strictly(make_generator(config), latest := _without_prefix(tensors, "g."), path)
        discriminator = None
        if scores := _without_prefix(tensors, "d."):
            discriminator = make_discriminator(config).eval()
            load_strictly(discriminator, scores, path)
        return TrainedFactory(
            generator.eval(), latest, card["spacing"], card["height"], card["history"], card["facts"], discriminator
        )
    except (KeyError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{path}: its card is not usable ({error})") from None


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name[len(prefix) :]: tensor.to(torch.float32) for name, tensor in tensors.items() if name.startswith(prefix)
    }
