"""A segmentation network of any architecture that also predicts, per pixel, whether its class is right (HSSF)."""

from __future__ import annotations

from dataclasses import replace

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from ..engine.planned_network import PlannedNetwork
from ..engine.random_appearance import standardised
from ..engine.segmenter_config import SegmenterConfig
from ..engine.training_plan import DataFacts, plan_training
from ..network_names import check_architecture

FEATURES = 16  # channels of the features that segmentation and self-assessment share


class SelfAssessment(nn.Module):
    """Predicts from features and logits whether the most likely class of each pixel is right.

    Two of the three blocks weight their channels by the sigmoid of their means: the published product of unbounded
    means can explode.

    Args:
        classes: channels of the logits.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.first = _conv(FEATURES + classes)
        self.second, self.third, self.last = (_conv(2 * FEATURES) for _ in range(3))
        self.out = nn.Conv2d(FEATURES, 1, 1)

    def forward(self, features: Tensor, logits: Tensor) -> Tensor:
        """Features (B, 16, S, S) and logits (B, classes, S, S) to logits of being right (B, S, S), unbounded."""
        g1 = _channel_weighted(self.first(torch.cat([features, logits], 1)))
        g2 = _channel_weighted(g1 + self.second(torch.cat([g1, features], 1)))
        g3 = g2 + self.third(torch.cat([g1, g2], 1))
        return self.out(self.last(torch.cat([g3, g2], 1)))[:, 0]


class AssessedNetwork(nn.Module):
    """A network with a classifier and a self-assessment on top of its features.

    Args:
        architecture: of the network below both, one of ARCHITECTURES; planned as a small one for whole slices.
        classes: channels of the logits.
        size: pixels per side of the slices.
        channels: of the slices.
        colour: whether these are red, green and blue, which are standardised together.

    Raises: ConfigError for an unknown architecture, or for a size that cannot be halved twice.
    """

    def __init__(self, architecture: str, classes: int, *, size: int, channels: int = 1, colour: bool = False) -> None:
        super().__init__()
        self.colour = colour
        check_architecture(architecture)
        config = SegmenterConfig(network=architecture, network_size="small")
        facts = DataFacts(size=size, extent=None, classes=FEATURES, channels=channels, colour=colour)
        plan = plan_training(facts, config)
        while size % plan.side_multiple:  # the network sees whole slices, which fewer levels can halve
            plan = plan_training(facts, replace(config, depth=len(plan.widths) - 1))
        self.body = PlannedNetwork(plan)
        self.classifier = nn.Sequential(nn.ReLU(), _conv(FEATURES), nn.Conv2d(FEATURES, classes, 1))
        self.assessment = SelfAssessment(classes)

    def forward(self, x: Tensor) -> Tensor:
        """Slices (B, channels, S, S) in [-1, 1], S as planned, to logits (B, classes, S, S)."""
        return self.classifier(self.body(standardised(x, colour=self.colour)))

    def assess(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Segmentation with self-assessment. Nothing is detached: the assessment's loss also trains the segmentation.

        Args:
            x: slices (B, channels, S, S) in [-1, 1].

        Returns: logits (B, classes, S, S), logits of being right (B, S, S), and features (B, 16, S, S) for `perturbed`.
        """
        features = self.body(standardised(x, colour=self.colour))
        logits = self.classifier(features)
        return logits, self.assessment(features, logits), features

    def perturbed(self, features: Tensor) -> Tensor:
        """Logits (B, classes, S, S) of features (B, 16, S, S) of which a random half of the channels is set to zero."""
        return self.classifier(nn.functional.dropout2d(features, 0.5))


def _conv(channels: int) -> nn.Module:
    return Convolution(2, channels, FEATURES, norm=("group", {"num_groups": 4}), act="relu", bias=False)


def _channel_weighted(x: Tensor) -> Tensor:
    """(B, C, S, S) plus itself times the sigmoid of each channel's mean."""
    return x + x * torch.sigmoid(x.mean((2, 3), keepdim=True))
