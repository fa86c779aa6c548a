"""What a batch is conditioned on and guided towards, and the random inputs of its synthesis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import FactoryConfig
from .networks.generator import Generator, Style
from .pairs import as_channels

ENCODING_KEPT = 0.5  # share of updates that see the site's embedding; in the others the networks train without it


@dataclass(frozen=True)
class Conditions:
    """The conditions of a batch of B slices.

    Attributes:
        z_bin: (B,) integers, the height bins.
        domain: (B,) integers, the domain indices.
        encoding: (1, encoding_dim), the site's mean embedding, or None.
        known: (B, 1, S, S), 1 where the site knows the label of the real slice, else 0; None without labels. Drawn
            labels are shown to the discriminator at the same pixels.
    """

    z_bin: Tensor
    domain: Tensor
    encoding: Tensor | None
    known: Tensor | None = None

    def first(self, count: int) -> Conditions:
        """The conditions of the first `count` slices."""
        known = None if self.known is None else self.known[:count]
        return Conditions(self.z_bin[:count], self.domain[:count], self.encoding, known)

    def split(self, size: int) -> list[Conditions]:
        """The conditions cut into parts of `size` slices."""
        z_bins, domains = self.z_bin.split(size), self.domain.split(size)
        known = [None] * len(z_bins) if self.known is None else self.known.split(size)
        cut = zip(z_bins, domains, known, strict=True)
        return [Conditions(z_bin, domain, self.encoding, mask) for z_bin, domain, mask in cut]


@dataclass(frozen=True)
class Guide:
    """Guidance of synthetic slices towards the site's mean embedding.

    Attributes:
        embed: a frozen image encoder, (B, C, S, S) in [-1, 1] to unit vectors (B, encoding_dim).
        mean: (encoding_dim,), the site's mean embedding.
    """

    embed: nn.Module | Callable[[Tensor], Tensor]
    mean: Tensor

    def to(self, device: torch.device | str) -> Guide:
        """The same guidance on another device."""
        embed = self.embed.to(device) if isinstance(self.embed, nn.Module) else self.embed
        return Guide(embed, self.mean.to(device))


def draw_uniform(rng: torch.Generator) -> float:
    """One number from [0, 1)."""
    return float(torch.rand((), generator=rng, device=rng.device))


def draw_style(generator: Generator, conditions: Conditions, rng: torch.Generator) -> Style:
    """The styles of a batch, one latent per slice, or two with a random crossover layer (style mixing).

    The published program never mixed styles.
    """
    config = generator.config

    def draw() -> Style:
        z = torch.randn(len(conditions.z_bin), config.latent_dim, generator=rng, device=rng.device)
        encoding = None if conditions.encoding is None else conditions.encoding.expand(len(z), -1)
        return generator.style_of(z, conditions.z_bin, conditions.domain, encoding=encoding)

    style = draw()
    mixing = config.style_mixing and config.compatibility != "published"
    if mixing and draw_uniform(rng) < config.style_mixing:
        crossover = int(torch.randint(1, generator.n_latent, (), generator=rng, device=rng.device))
        style = style.mixed_with(draw(), crossover)
    return style


def draw_slices(generator: Generator, conditions: Conditions, rng: torch.Generator) -> Tensor:
    """Synthetic slices (B, C + label_channels, S, S), about [-1, 1], with fresh latents and layer noise: images,
    followed by their labels if the generator draws some."""
    style = draw_style(generator, conditions, rng)
    noise = generator.draw_noise(len(conditions.z_bin), rng)
    made = generator.synthesise(style, noise)
    return made.image if made.labels is None else torch.cat([made.image, as_channels(made.labels)], dim=1)


def draw_encoding(encoding: Tensor | None, rng: torch.Generator) -> Tensor | None:
    """The site's embedding (encoding_dim,) as (1, encoding_dim) in half of the updates, None in the others."""
    if encoding is None or draw_uniform(rng) >= ENCODING_KEPT:
        return None
    return encoding[None].to(rng.device)


def jitter(real: Tensor, config: FactoryConfig, rng: torch.Generator) -> Tensor:
    """Real slices (B, C, S, S), with or without their labels in further channels, shifted by a few pixels and, where
    the organ allows it, mirrored left to right.

    Slices have the axis order of the slice store: dimension 2 of a volume's slice runs from left to right, dimension 3
    from back to front. A picture is stored as rows and columns: its dimension 3 runs from left to right.
    """
    if config.shift:
        low, high = -config.shift, config.shift + 1
        down, right = torch.randint(low, high, (2,), generator=rng, device=real.device).tolist()
        real = torch.roll(real, shifts=(down, right), dims=(2, 3))
    if config.mirror:
        flip = torch.rand(len(real), 1, 1, 1, generator=rng, device=real.device) < 0.5
        real = torch.where(flip, real.flip(3 if config.pictures else 2), real)
    return real
