"""The factory as users hold it: networks with their configuration and history, saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from ..common.sketches import sketch
from ..common.weights_file import IMPOSSIBLE, load_strictly, read_weights, refuse_misfit, write_weights
from ..errors import CheckpointError, ConfigError, UsageError
from .config import FactoryConfig
from .factory_facts import FactoryFacts
from .networks.build import make_discriminator, make_generator
from .networks.discriminator import Discriminator
from .networks.generator import Generator

if TYPE_CHECKING:
    import numpy as np  # the networks must be importable without it

KIND = "factory"
Numbers: TypeAlias = "Tensor | np.ndarray | Sequence[float]"
Domains: TypeAlias = "str | int | Sequence[str | int] | Tensor | np.ndarray"
Bins: TypeAlias = "int | Sequence[int] | Tensor | np.ndarray"


@dataclass(kw_only=True)
class TrainedFactory:
    """A factory after its federated training (phase one), as every site receives it.

    Attributes:
        generator: moving average of the global generator, in evaluation mode.
        latest: state dict of the global generator after the last round, to continue training from.
        spacing: millimetres per pixel of the slices.
        height: millimetres from the lowest to the highest bin; without meaning if there is one bin.
        history: per domain, a list with the mean losses of each round by name.
        facts: how the factory came about.
        discriminator: in evaluation mode; None if every site has its own.
    """

    generator: Generator
    latest: dict[str, Tensor]
    spacing: float
    height: float
    history: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    facts: FactoryFacts = field(default_factory=FactoryFacts)
    discriminator: Discriminator | None = None

    @property
    def config(self) -> FactoryConfig:
        """The generator's description."""
        return self.generator.config

    @torch.no_grad()
    def generate(
        self,
        z: Numbers,
        domain: Domains,
        z_bin: Bins,
        *,
        encoding: Numbers | None = None,
        randomize_noise: bool = True,
        seed: int | None = None,
    ) -> Tensor:
        """Slices under given conditions.

        Args:
            z: (B, latent_dim) unit normal numbers, tensor or array.
            domain: a name or index for all slices, or B of them.
            z_bin: a height bin from 0 to z_bins - 1 for all slices, or B of them.
            encoding: mean image embedding, (1, encoding_dim) for all slices or (B, encoding_dim); None without.
            randomize_noise: draw layer noise; otherwise the generator's own noise, which gives the same slice every
                time.
            seed: seed of the layer noise; None uses PyTorch's global random state.

        Returns: (B, C, S, S) float32, about [-1, 1], not clamped.
        Raises: UsageError for a wrong shape or bin; ConfigError for an unknown domain. Both list what is possible.
        """
        device = next(self.generator.parameters()).device
        z = torch.as_tensor(z, dtype=torch.float32, device=device)
        if z.ndim != 2 or z.shape[1] != self.config.latent_dim:
            raise UsageError(f"z has shape {tuple(z.shape)}, expected (B, {self.config.latent_dim})")
        domains, z_bins = self._domains(domain, len(z), device), self._z_bins(z_bin, len(z), device)
        encoding = self._encodings(encoding, len(z), device)
        noise = self.generator.fixed_noise()
        if randomize_noise:
            rng = torch.Generator(device)
            rng.manual_seed(int(torch.randint(2**31, ())) if seed is None else seed)
            noise = self.generator.draw_noise(len(z), rng)
        return self.generator(z, z_bins, domains, noise=noise, encoding=encoding)

    @torch.no_grad()
    def discriminate(self, images: Numbers, domain: Domains, z_bin: Bins, *, encoding: Numbers | None = None) -> Tensor:
        """Scores (B, 1) of how real slices appear, unbounded; a score depends on the batch (minibatch statistic).

        Args:
            images: (B, C, S, S) in [-1, 1], tensor or array.
            domain: as for `generate`.
            z_bin: as for `generate`.
            encoding: as for `generate`.

        Raises: UsageError for a wrong shape or if the factory holds no discriminator; ConfigError for an unknown
            domain.
        """
        if self.discriminator is None:
            raise UsageError(
                f"discriminator is {self.discriminator}; use a factory whose file holds one, such as of a run with "
                "discriminator 'shared'"
            )
        device, side = next(self.discriminator.parameters()).device, self.config.image_size
        expected = (self.config.image_channels, side, side)
        images = torch.as_tensor(images, dtype=torch.float32, device=device)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise UsageError(f"images have shape {tuple(images.shape)}, expected (B, {', '.join(map(str, expected))})")
        batch = len(images)
        domains, z_bins = self._domains(domain, batch, device), self._z_bins(z_bin, batch, device)
        return self.discriminator(images, z_bins, domains, encoding=self._encodings(encoding, batch, device))

    def _domains(self, domain: Domains, batch: int, device: torch.device) -> Tensor:
        """Indices of domains, (batch,)."""
        config = self.config
        if isinstance(domain, str):
            domain = config.domain_index(domain)
        elif isinstance(domain, Sequence):
            domain = [config.domain_index(entry) if isinstance(entry, str) else entry for entry in domain]
        domains = torch.as_tensor(domain, device=device)
        return _expanded(domains, batch, name="domain", count=len(config.domains))

    def _z_bins(self, z_bin: Bins, batch: int, device: torch.device) -> Tensor:
        """Height bins, (batch,)."""
        return _expanded(torch.as_tensor(z_bin, device=device), batch, name="z_bin", count=self.config.z_bins)

    def _encodings(self, encoding: Numbers | None, batch: int, device: torch.device) -> Tensor | None:
        """Mean embeddings, (batch, encoding_dim), or None."""
        if encoding is None:
            return None
        encoding, width = torch.as_tensor(encoding, dtype=torch.float32, device=device), self.config.encoding_dim
        if not width:
            raise UsageError(f"encoding has shape {tuple(encoding.shape)}, but encoding_dim is 0; leave encoding out")
        if encoding.ndim != 2 or encoding.shape[1] != width:
            raise UsageError(f"encoding has shape {tuple(encoding.shape)}, expected (1 or B, {width})")
        if len(encoding) not in (1, batch):
            raise UsageError(f"encoding has {len(encoding)} rows for {batch} slices; give 1 row or {batch}")
        return encoding.expand(batch, -1)

    def save(self, path: str | Path) -> None:
        """Write `path` (safetensors with the card inside) and a readable copy of the card beside it."""
        tensors = {f"g_ema.{name}": tensor for name, tensor in self.generator.state_dict().items()}
        tensors |= {f"g.{name}": tensor for name, tensor in self.latest.items()}
        if self.discriminator is not None:
            tensors |= {f"d.{name}": tensor for name, tensor in self.discriminator.state_dict().items()}
        card = {
            "kind": KIND,
            "config": self.config.to_dict(),
            "spacing": self.spacing,
            "height": self.height,
            "facts": self.facts.to_dict(),
            "history": self.history,
        }
        write_weights(path, tensors, card)


def load_factory(path: str | Path) -> TrainedFactory:
    """A factory from its file.

    Raises: UsageError if the file is missing; CheckpointError if it is damaged, foreign or of another kind.
    """
    tensors, card = read_weights(path, kind=KIND)
    try:
        config = FactoryConfig.from_dict(card["config"])
        average, latest, scores = (_without_prefix(tensors, prefix) for prefix in ("g_ema.", "g.", "d."))
        sketched = sketch(
            lambda: make_generator(config), tensors=len(tensors)
        )  # before memory is taken for what the card claims
        for weights in (average, latest):
            refuse_misfit(sketched, weights, path)
        if scores:
            refuse_misfit(sketch(lambda: make_discriminator(config), tensors=len(tensors)), scores, path)
        generator = make_generator(config)
        load_strictly(generator, average, path)
        load_strictly(make_generator(config), latest, path)
        discriminator = None
        if scores:
            discriminator = make_discriminator(config).eval()
            load_strictly(discriminator, scores, path)
        return TrainedFactory(
            generator=generator.eval(),
            latest=latest,
            spacing=card["spacing"],
            height=card["height"],
            history=card["history"],
            facts=FactoryFacts.from_dict(card["facts"]),
            discriminator=discriminator,
        )
    except (KeyError, ConfigError, *IMPOSSIBLE) as error:
        raise CheckpointError(f"{path}: its card is not usable ({error}); export or copy the file again") from None


def _expanded(values: Tensor, batch: int, *, name: str, count: int) -> Tensor:
    """Whole numbers below `count`, a scalar or (batch,), as int64 (batch,).

    Raises: UsageError for another shape or type, or a number out of range.
    """
    if values.is_floating_point() or values.ndim > 1 or (values.ndim == 1 and len(values) not in (1, batch)):
        raise UsageError(
            f"{name} has shape {tuple(values.shape)} and type {values.dtype}; give one whole number, or {batch} of them"
        )
    if values.numel() and not 0 <= int(values.min()) <= int(values.max()) < count:
        raise UsageError(f"{name} is {int(values.min())} to {int(values.max())}; choose from 0 to {count - 1}")
    return values.long().reshape(-1).expand(batch)


def _without_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries of a state dict whose names start with `prefix`, as float32, named without it."""
    return {
        name[len(prefix) :]: tensor.to(torch.float32) for name, tensor in tensors.items() if name.startswith(prefix)
    }
