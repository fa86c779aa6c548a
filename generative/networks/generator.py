"""The interface of all generators of the factory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import FactoryConfig

Edit = Callable[[Tensor], Tensor]  # of a feature map (B, c, r, r) on its way to the next resolution


@dataclass(frozen=True)
class Style:
    """The input of a synthesis pass.

    Attributes:
        w: (B, n_latent, latent_dim), one latent per styled layer (the space called W+).
        constant: (B, c, s, s), the smallest feature map.
        domain: (B,) domain indices.
    """

    w: Tensor
    constant: Tensor
    domain: Tensor

    def mixed_with(self, other: Style, crossover: int) -> Style:
        """This style's latents below layer `crossover`, the other's from there on (style mixing)."""
        w = torch.cat([self.w[:, :crossover], other.w[:, crossover:]], dim=1)
        return Style(w, self.constant, self.domain)

    def at(self, position: Tensor) -> Style:
        """Linear interpolation along the batch: position (N,) in [0, B - 1]."""
        low = position.floor().long().clamp(0, len(self.w) - 1)
        high = (low + 1).clamp(max=len(self.w) - 1)
        first, second = (Style(self.w[n], self.constant[n], self.domain[n]) for n in (low, high))
        return first.between(second, position - low)

    def between(self, other: Style, share: Tensor) -> Style:
        """Linear interpolation: share (B,), 0 gives this style, 1 the other."""
        w = torch.lerp(self.w, other.w, share[:, None, None])
        return Style(w, torch.lerp(self.constant, other.constant, share[:, None, None, None]), self.domain)


@dataclass(frozen=True)
class Synthesis:
    """The result of a synthesis pass.

    Attributes:
        image: (B, C, S, S), about [-1, 1], with the configuration's image_channels.
        anatomy: (B, maps, S, S), soft tissue maps shared by all domains, which sum to 1; no maps without a palette.
        features: feature maps (B, c, r, r), coarse to fine, with the widths in `Generator.feature_channels`.
        labels: (B, classes, S, S), soft labels of the configuration's classes, which sum to 1; None of a generator
            that draws images alone.
    """

    image: Tensor
    anatomy: Tensor
    features: list[Tensor]
    labels: Tensor | None = None

    def first(self, count: int) -> Synthesis:
        """The first `count` slices."""
        labels = None if self.labels is None else self.labels[:count]
        return Synthesis(self.image[:count], self.anatomy[:count], [part[:count] for part in self.features], labels)


class Generator(nn.Module, ABC):
    """Network from latent, layer noise, height bin and domain to a slice.

    Attributes:
        config: the factory's configuration.
        n_latent: number of styled layers.
        num_maps: channels of `Synthesis.anatomy`.
        grain: True if noise is the scanner's grain, drawn for every slice; False if it is part of the anatomy, drawn
            once per volume.
        noise_channels: channels of the noise maps that are drawn.
    """

    config: FactoryConfig
    n_latent: int
    num_maps: int = 0
    grain: bool = False
    noise_channels: int = 1

    @abstractmethod
    def style_of(self, z: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Style:
        """The styles of a batch.

        Args:
            z: (B, latent_dim), unit normal latents.
            z_bin: (B,) integers, the height bins.
            domain: (B,) integers, the domain indices.
            encoding: (B, encoding_dim), mean image embeddings, or None.
        """

    @abstractmethod
    def synthesise(self, style: Style, noise: list[Tensor], edit: Edit | None = None) -> Synthesis:
        """Slices of a batch of styles.

        Args:
            style: as returned by `style_of`.
            noise: maps (B or 1, noise_channels or 1, r, r), as returned by `draw_noise` or `fixed_noise`.
            edit: changes the features of each resolution before they are enlarged; the returned features are
                unchanged.
        """

    @property
    @abstractmethod
    def noise_sides(self) -> list[int]:
        """Side of every noise map, in the order of the layers."""

    @abstractmethod
    def fixed_noise(self) -> list[Tensor]:
        """The noise maps stored in the network, (1, 1, r, r) each, which give equal slices for equal styles."""

    @property
    @abstractmethod
    def feature_channels(self) -> tuple[int, ...]:
        """Width of every map in `Synthesis.features`."""

    def draw_noise(self, batch: int, rng: torch.Generator) -> list[Tensor]:
        """Fresh unit normal maps, (B, noise_channels, r, r) each, on the device of `rng`."""
        maps = self.noise_channels
        return [torch.randn(batch, maps, r, r, generator=rng, device=rng.device) for r in self.noise_sides]

    def style_at(self, z: Tensor, height: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Style:
        """As `style_of` at fractional heights (B,) in [0, z_bins - 1]: linear between the neighbouring bins."""
        low = height.floor().long().clamp(0, self.config.z_bins - 1)
        high = (low + 1).clamp(max=self.config.z_bins - 1)
        below = self.style_of(z, low, domain, encoding=encoding)
        return below.between(self.style_of(z, high, domain, encoding=encoding), height - low)

    def forward(
        self, z: Tensor, z_bin: Tensor, domain: Tensor, *, noise: list[Tensor], encoding: Tensor | None = None
    ) -> Tensor:
        """Slices (B, C, S, S), about [-1, 1]; arguments as for `style_of`, and noise as for `synthesise`."""
        return self.synthesise(self.style_of(z, z_bin, domain, encoding=encoding), noise).image
