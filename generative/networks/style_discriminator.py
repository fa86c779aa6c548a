"""The published discriminator (RobustMedSeg, after StyleGAN2): the score multiplies image, condition and embedding.

Module names give the state-dict keys of the published files.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, one_hot

from ..config import SMALLEST_MAP, FactoryConfig
from .discriminator import Discriminator, minibatch_statistic
from .layers import BiasActivation, EqualisedLinear, MixedPrecision, activate, pixel_norm
from .resampling import blur, halve


class ScaledConv(nn.Module):
    """Convolution without bias, weights scaled by 1 / sqrt(c_in k^2)."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, padding: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.scale, self.stride, self.padding = 1 / math.sqrt(c_in * kernel**2), stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H', W')."""
        return conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class Blur(nn.Module):
    """Low-pass before the convolution of stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) to (B, c, H + 1, W + 1)."""
        return blur(x, pad=2)


class Halve(nn.Module):
    """Low-pass and every second sample: the 1 x 1 convolution of stride 2 that follows needs only these."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W) to (B, c, H/2, W/2)."""
        return halve(x)


class DownBlock(nn.Module):
    """Two convolutions and a shortcut; halves the side."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(ScaledConv(c_in, c_in, 3, padding=1), BiasActivation(c_in))
        self.conv2 = nn.Sequential(Blur(), ScaledConv(c_in, c_out, 3, stride=2), BiasActivation(c_out))
        self.skip = nn.Sequential(Halve(), ScaledConv(c_in, c_out, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H/2, W/2)."""
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class StyleDiscriminator(MixedPrecision, Discriminator):
    """Any side from 8 to 1024; as wide as the generator."""

    def __init__(self, config: FactoryConfig) -> None:
        super().__init__()
        self.config = config
        d, widths, condition = config.latent_dim, config.channels[::-1], len(config.domains) + config.z_bins
        self.label_embed = EqualisedLinear(condition, d)
        if config.encoding_dim:
            self.encoding_embed = EqualisedLinear(config.encoding_dim, d)
        stem = nn.Sequential(ScaledConv(config.image_channels, widths[0], 1), BiasActivation(widths[0]))
        self.convs = nn.Sequential(stem, *(DownBlock(narrow, wide) for narrow, wide in itertools.pairwise(widths)))
        last = widths[-1]
        self.final_conv = nn.Sequential(ScaledConv(last + 1, last, 3, padding=1), BiasActivation(last))
        self.final_linear = nn.Sequential(EqualisedLinear(last * SMALLEST_MAP**2, d), EqualisedLinear(d, d))

    def forward(self, image: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Tensor:
        """Scores (B, 1), see `Discriminator.forward`."""
        x, largest = image, self.config.image_size
        for layer, side in zip(self.convs, (largest, *self.config.resolutions[:0:-1]), strict=True):
            with self.precision_at(side, largest, x.device):
                x = layer(x)
        x = self.final_conv(minibatch_statistic(x.to(image.dtype)))
        x = self.final_linear[1](activate(self.final_linear[0](x.flatten(1))))
        domains, bins = len(self.config.domains), self.config.z_bins
        label = torch.cat([one_hot(domain, domains), one_hot(z_bin, bins)], dim=1).to(x.dtype)
        product = x * pixel_norm(self.label_embed(label))
        if encoding is not None:
            product = product * self.encoding_embed(encoding)
        return product.sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
