"""Noise and slice height to anatomy, anatomy and domain to a slice."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import FactoryConfig
from .layers import EqualisedLinear, ModulatedConv, activate, pixel_norm, upsample
from .palette import PaletteHead


@dataclass(frozen=True)
class Synthesis:
    """What one synthesis pass makes.

    Attributes:
        image: (B, 1, S, S), about [-1, 1].
        anatomy: (B, maps, S, S), soft tissue maps shared by all domains, summing to one.
        features: activated feature maps, (B, c, r, r) for r = start_size .. S.
    """

    image: Tensor
    anatomy: Tensor
    features: list[Tensor]


class Generator(nn.Module):
    """A small StyleGAN2 synthesis network with one learnt constant per slice height and a palette head."""

    def __init__(self, config: FactoryConfig) -> None:
        super().__init__()
        self.config = config
        d, widths = config.latent_dim, config.channels
        self.bin_embedding = nn.Parameter(torch.randn(config.z_bins, d))
        self.mapping = nn.ModuleList(
            EqualisedLinear(2 * d if layer == 0 else d, d, lr_multiplier=config.mapping_lr_multiplier)
            for layer in range(config.mapping_layers)
        )
        self.constant = nn.Parameter(torch.randn(config.z_bins, widths[0], config.start_size, config.start_size))
        self.first = ModulatedConv(widths[0], widths[0], 3, d)
        pairs = list(itertools.pairwise(widths))
        self.grow = nn.ModuleList(ModulatedConv(wide, narrow, 3, d) for wide, narrow in pairs)
        self.refine = nn.ModuleList(ModulatedConv(narrow, narrow, 3, d) for _, narrow in pairs)
        # The palette's own generator: adding a layer above must not change which palette a seed gives.
        self.head = PaletteHead(len(config.domains), d, torch.Generator().manual_seed(len(config.domains)))
        self.to_logits = nn.ModuleList(
            ModulatedConv(width, self.head.num_maps, 1, d, demodulate=False) for width in widths
        )

    def latent(self, z: Tensor, z_bin: Tensor) -> Tensor:
        """z: (B, latent_dim) unit normal; z_bin: (B,) integer. Returns w, (B, latent_dim)."""
        w = torch.cat([pixel_norm(z), pixel_norm(self.bin_embedding[z_bin])], dim=1)
        for layer in self.mapping:
            w = activate(layer(w))
        return w

    def latent_at(self, z: Tensor, height: Tensor) -> Tensor:
        """As `latent` at a fractional height (B,) in [0, z_bins - 1]: linear between the neighbouring bins."""
        low, high, share = self._neighbours(height)
        return torch.lerp(self.latent(z, low), self.latent(z, high), share[:, None])

    def constant_at(self, height: Tensor) -> Tensor:
        """(B,) heights in [0, z_bins - 1] to the constant the network starts from, (B, c, start, start)."""
        low, high, share = self._neighbours(height)
        return torch.lerp(self.constant[low], self.constant[high], share[:, None, None, None])

    def _neighbours(self, height: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        low = height.floor().long().clamp(0, self.config.z_bins - 1)
        high = (low + 1).clamp(max=self.config.z_bins - 1)
        return low, high, height - low

    def synthesise(self, w: Tensor, constant: Tensor, domain: Tensor, noise: Tensor) -> Synthesis:
        """w: (B, latent_dim); constant: (B, c, s, s); domain: (B,) integer; noise: (B, 1, S, S) unit normal."""
        x = activate(self.first(constant, w))
        features, logits = [x], self.to_logits[0](x, w)
        for grow, refine, to_logits in zip(self.grow, self.refine, self.to_logits[1:], strict=True):
            x = activate(grow(upsample(x), w))
            x = activate(refine(x, w))
            features.append(x)
            logits = upsample(logits) + to_logits(x, w)
        anatomy = self.head.anatomy(logits)
        return Synthesis(self.head.paint(anatomy, w, domain, noise), anatomy, features)

    def forward(self, z: Tensor, z_bin: Tensor, domain: Tensor, noise: Tensor) -> Tensor:
        """Slices (B, 1, S, S) from latents (B, latent_dim), bins (B,), domains (B,) and noise (B, 1, S, S)."""
        return self.synthesise(self.latent(z, z_bin), self.constant[z_bin], domain, noise).image
