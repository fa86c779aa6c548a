"""The network of CMC: one encoder and decoder for several modalities, fused at the bottleneck (arXiv 2408.07341)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .site_network import GROUPS

DEPTH = 4  # levels; sides are multiples of 2 ** (DEPTH - 1)
NORMS_OF = ".norms."  # in names of tensors, before the modality's


class ModalityUnit(nn.Module):
    """Convolution, normalisation of the modality's own, ReLU. Group norm: no image depends on those beside it."""

    def __init__(self, channels_in: int, channels: int, modalities: Sequence[str]) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleDict({name: nn.GroupNorm(GROUPS, channels) for name in modalities})

    def forward(self, x: Tensor, modality: str) -> Tensor:
        return torch.relu(self.norms[modality](self.conv(x)))


class ModalityBlock(nn.Module):
    """Two units."""

    def __init__(self, channels_in: int, channels: int, modalities: Sequence[str]) -> None:
        super().__init__()
        self.first = ModalityUnit(channels_in, channels, modalities)
        self.second = ModalityUnit(channels, channels, modalities)

    def forward(self, x: Tensor, modality: str) -> Tensor:
        return self.second(self.first(x, modality), modality)


class ChannelAttention(nn.Module):
    """Modality-independent aware module: x + gamma A x, A = softmax(max - E) of the channels' products E (C, C).

    E is divided by the number of pixels, so that the softmax does not depend on the slice's size; gamma begins at 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(2).float()
        energy = rows @ rows.mT / rows.shape[-1]
        weights = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1)
        return x + self.gamma * (weights @ rows).view_as(x).to(x.dtype)


class ModalityUNet(nn.Module):
    """Slices of one modality, or a slice of each of two that need show neither the same patient nor the same place.

    Args:
        classes: of the logits. modalities: their names. width: channels of the first level, a multiple of 4.
    """

    def __init__(self, classes: int, modalities: Sequence[str], width: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(DEPTH)]
        self.down = nn.ModuleList(
            ModalityBlock(before, after, modalities) for before, after in zip([1, *widths], widths, strict=False)
        )
        self.pool = nn.MaxPool2d(2)
        self.attention = ChannelAttention()
        deepest = widths[-1]
        self.fusion = nn.Sequential(
            nn.Conv2d(2 * deepest, deepest, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, deepest), nn.ReLU(),
            nn.Conv2d(deepest, deepest, 3, padding=1, bias=False), nn.GroupNorm(GROUPS, deepest), nn.ReLU(),
            nn.Sigmoid(),
        )  # fmt: skip
        self.conversion = nn.Sequential(
            nn.GroupNorm(GROUPS, 2 * deepest), nn.ReLU(), nn.Conv2d(2 * deepest, deepest, 1)
        )
        self.widen = nn.ModuleList(nn.ConvTranspose2d(2 * one, 2 * one, 2, 2) for one in reversed(widths[:-1]))
        self.up = nn.ModuleList(ModalityBlock(3 * one, one, modalities) for one in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor, modality: str) -> Tensor:
        """Logits (B, classes, S, S) of slices (B, 1, S, S) of one modality alone: fused with themselves."""
        skips, deep = self.encode(x, modality)
        return self.decode(self.fused(deep, deep, deep), skips, modality)[0]

    def encode(self, x: Tensor, modality: str) -> tuple[list[Tensor], Tensor]:
        """Features of the upper levels, and the deepest ones (B, 8 width, S / 8, S / 8)."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(self.pool(x) if level else x, modality)
            skips.append(x)
        return skips[:-1], x

    def fused(self, own: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """What the decoder of a modality gets: its own deepest features with those of both, in the modalities' order.

        Raises: ValueError for features of unequal shape.
        """
        if not own.shape == first.shape == second.shape:
            raise ValueError("modalities can only be fused at equal sizes and equally many slices")
        own, first, second = (self.attention(one) for one in (own, first, second))
        return self.conversion(torch.cat([self.fusion(torch.cat([first, second], 1)), own], 1))

    def decode(self, deep: Tensor, skips: list[Tensor], modality: str) -> tuple[Tensor, Tensor]:
        """Logits (B, classes, S, S), and the features before them (B, width, S, S)."""
        x = deep
        for widen, block, skip in zip(self.widen, self.up, reversed(skips), strict=True):
            x = block(torch.cat([skip, widen(x)], 1), modality)
        return self.head(x), x


class OneModality(nn.Module):
    """The network for slices of one modality."""

    def __init__(self, network: ModalityUNet, modality: str) -> None:
        super().__init__()
        self.network, self.modality = network, modality

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x, self.modality)


def modality_of(name: str) -> str | None:
    """Of a tensor's name, the modality that it belongs to; None if it serves all."""
    return name.partition(NORMS_OF)[2].partition(".")[0] or None
