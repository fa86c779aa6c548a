"""A segmentation network of any architecture that also says, per pixel, whether it is right (HSSF)."""

from __future__ import annotations

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from .architectures import build_network
from .network_names import check_architecture

FEATURES = 16
SMALLEST = 8  # sides are multiples of it


class SelfAssessment(nn.Module):
    """Features (B, F, S, S) and logits (B, C, S, S) to logits (B, S, S) of "this pixel's class is right".

    Two of three blocks weigh their channels by their means, squashed to (0, 1): the published product of unbounded
    means can explode.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = _conv(FEATURES + classes)
        self.second, self.third, self.last = (_conv(2 * FEATURES) for _ in range(3))
        self.out = nn.Conv2d(FEATURES, 1, 1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        g1 = _pooled(self.first(torch.cat([features, logits], 1)))
        g2 = _pooled(g1 + self.second(torch.cat([g1, features], 1)))
        g3 = g2 + self.third(torch.cat([g1, g2], 1))
        return self.out(self.last(torch.cat([g3, g2], 1)))[:, 0]


class AssessedNetwork(nn.Module):
    """Slices (B, 1, S, S) to logits (B, classes, S, S), S a multiple of 8.

    Args:
        architecture: one of ARCHITECTURES.

    Raises: ConfigError for another one.
    """

    def __init__(self, architecture: str, classes: int) -> None:
        super().__init__()
        check_architecture(architecture)
        self.body = build_network(architecture, FEATURES)
        self.classifier = nn.Sequential(nn.ReLU(), _conv(FEATURES), nn.Conv2d(FEATURES, classes, 1))
        self.assessment = SelfAssessment(classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(x))

    def assess(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, classes, S, S), logits of being right (B, S, S), and features for `perturbed`.

        Nothing is detached: what assesses itself better also segments better.
        """
        features = self.body(x)
        logits = self.classifier(features)
        return logits, self.assessment(features, logits), features

    def perturbed(self, features: Tensor) -> Tensor:
        """Logits when half of the channels of the features are missing."""
        return self.classifier(nn.functional.dropout2d(features, 0.5))


def _conv(channels: int) -> nn.Module:
    return Convolution(2, channels, FEATURES, norm=("group", {"num_groups": 4}), act="relu", bias=False)


def _pooled(x: Tensor) -> Tensor:
    return x + x * torch.sigmoid(x.mean((2, 3), keepdim=True))
