"""A segmentation network of any architecture that also predicts, per pixel, whether its class is right (HSSF)."""

from __future__ import annotations

import math

import torch
from monai.networks.blocks import Convolution
from torch import Tensor, nn

from ...errors import ConfigError
from ..engine.planned_network import PlannedNetwork
from ..engine.random_appearance import standardised
from ..engine.segmenter_config import SegmenterConfig
from ..engine.training_plan import FIRST_WIDTH, FOLDED_FROM, NORM_GROUPS, DataFacts, halvable_levels, plan_training
from ..network_names import parts_of_site_network

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
        network: below both, one of SITE_NETWORKS, planned for whole slices.
        classes: channels of the logits.
        size: pixels per side of the slices.
        width: channels of the first level of a network without a size in its name; rounded up to a multiple of 8 for
            SegResNet.
        depth: number of resolution levels; None has as many as the size asks for.
        channels: of the slices.
        colour: whether these are red, green and blue, which are standardised together.

    Raises: ConfigError for an unknown network, or for a size that cannot be halved twice, or not for each level.
    """

    def __init__(
        self,
        network: str,
        classes: int,
        *,
        size: int,
        width: int = 16,
        depth: int | None = None,
        channels: int = 1,
        colour: bool = False,
    ) -> None:
        super().__init__()
        self.colour = colour
        architecture, named_size = parts_of_site_network(network)
        if named_size is not None:
            width = FIRST_WIDTH[named_size]
        if architecture == "segresnet":
            width = NORM_GROUPS * math.ceil(width / NORM_GROUPS)
        facts = DataFacts(size=size, extent=None, classes=FEATURES, channels=channels, colour=colour)
        levels = depth or halvable_levels(size // 2 if size >= FOLDED_FROM else size)
        plan = plan_training(facts, SegmenterConfig(network=architecture, width=width, depth=levels))
        if size % plan.side_multiple:
            raise ConfigError(f"depth is {levels}; slices of {size} px cannot be halved so often in {network}")
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
