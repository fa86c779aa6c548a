"""Scores how realistic a slice is for its domain and height."""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import SMALLEST_MAP, FactoryConfig
from .layers import EqualisedConv, EqualisedLinear, activate

STATISTIC_GROUP = 4


def minibatch_statistic(x: Tensor) -> Tensor:
    """Append one channel with the standard deviation over groups of the batch (Karras et al. 2018).

    The group size is the largest divisor of B that is at most 4; sample n is in group n mod (B / size).

    Args:
        x: (B, c, H, W) features.

    Returns: (B, c + 1, H, W).
    """
    batch, _, height, width = x.shape
    size = next(n for n in range(min(STATISTIC_GROUP, batch), 0, -1) if batch % n == 0)
    grouped = x.reshape(size, batch // size, *x.shape[1:])
    spread = (grouped.var(dim=0, unbiased=False) + 1e-8).sqrt().mean(dim=(1, 2, 3))  # (B / size,)
    return torch.cat([x, spread.repeat(size)[:, None, None, None].expand(-1, 1, height, width)], dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions and a pooled shortcut; halves the side."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = EqualisedConv(c_in, c_in, 3)
        self.conv2 = EqualisedConv(c_in, c_out, 3)
        self.skip = EqualisedConv(c_in, c_out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H/2, W/2)."""
        u = activate(self.conv2(F.avg_pool2d(activate(self.conv1(x)), 2)))
        return (u + self.skip(F.avg_pool2d(x, 2))) / math.sqrt(2)


class Discriminator(nn.Module, ABC):
    """Scores slices under their conditions."""

    @abstractmethod
    def forward(self, image: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Tensor:
        """Scores (B, 1), unbounded.

        Args:
            image: (B, C, S, S), about [-1, 1], with the configuration's image_channels, followed by its label_channels
                if labels are drawn.
            z_bin: (B,) integers, the height bins.
            domain: (B,) integers, the domain indices.
            encoding: (B, encoding_dim), mean image embeddings, or None.
        """


class ProjectionDiscriminator(Discriminator):
    """Small residual discriminator with a projection on domain and bin (Miyato and Koyama 2018)."""

    def __init__(self, config: FactoryConfig) -> None:
        super().__init__()
        widths = list(reversed(config.channels))
        side = config.start_size
        while side > SMALLEST_MAP:  # the generator may start above 4 x 4
            widths.append(widths[-1])
            side //= 2
        last = widths[-1]
        self.stem = EqualisedConv(config.image_channels + config.label_channels, widths[0], 1)
        self.blocks = nn.ModuleList(ResidualBlock(narrow, wide) for narrow, wide in itertools.pairwise(widths))
        self.final_conv = EqualisedConv(last + 1, last, 3)
        self.final_linear = EqualisedLinear(last * SMALLEST_MAP**2, last)
        self.score = EqualisedLinear(last, 1)
        self.domain_embedding = nn.Parameter(torch.randn(len(config.domains), last))
        self.bin_embedding = nn.Parameter(torch.randn(config.z_bins, last))

    def forward(self, image: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Tensor:
        """Scores (B, 1), see `Discriminator.forward`."""
        x = activate(self.stem(image))
        for block in self.blocks:
            x = block(x)
        x = activate(self.final_conv(minibatch_statistic(x)))
        x = activate(self.final_linear(x.flatten(1)))
        condition = self.domain_embedding[domain] + self.bin_embedding[z_bin]
        return self.score(x) + (x * condition).sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])
