"""Logits of classes from the sigmoid logits of structures."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StructureLogits(nn.Module):
    """Adds a background logit of 0 to a network with one sigmoid output per structure, so that a structure wins where
    its sigmoid is above one half and above that of all other structures.

    Args:
        network: slices (B, channels, S, S) to logits of structures (B, structures, S, S).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Slices (B, channels, S, S) in [-1, 1] to logits (B, structures + 1, S, S)."""
        return with_background(self.network(x))


def with_background(logits: Tensor) -> Tensor:
    """Sigmoid logits of structures (B, structures, S, S) to logits of classes (B, structures + 1, S, S): that of the
    background is 0."""
    return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)
