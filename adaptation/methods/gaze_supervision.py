"""Gaze supervision: one network per level of certainty, which regularise each other (GazeMedSeg, arXiv 2407.07406)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ..networks.site_network import SiteUNet
from .catalogue import METHOD_CATALOGUE
from .federated_method import FederatedMethod, SiteContext, SiteRound, SiteUpdate
from .fedmix import Structures

UNLABELLED_FROM = 0.2  # share of the rounds after which slices without labels teach
UNLABELLED_WEIGHT = 0.5
SURE = 0.9  # probability from which a prediction is a label


@dataclass(frozen=True, kw_only=True)
class GazeOptions:
    """Raises: ConfigError if a value is out of range.

    Attributes:
        consistency: weight of the levels' agreement (lambda).
        window, dilation: of the neighbourhood over which features are spread.
        temperature: of their cosine similarities.
    """

    consistency: float = 3.0
    window: int = 5
    dilation: int = 2
    temperature: float = 0.1

    def __post_init__(self) -> None:
        if self.consistency < 0 or self.temperature <= 0 or self.window < 1 or not self.window % 2 or self.dilation < 1:
            raise ConfigError("consistency not negative, temperature positive, window odd, dilation at least 1")


class Levels(nn.Module):
    """A network that learns what is surely the target, and one that learns what may be it."""

    def __init__(self, structures: int, width: int) -> None:
        super().__init__()
        self.tight, self.loose = (SiteUNet(structures, width=width, norm="group") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Mean of the levels' logits (B, structures, S, S)."""
        return (self.tight(x) + self.loose(x)) / 2


class GazeSupervision(FederatedMethod):
    """Levels of certainty made from fixations teach a network each; features spread to neighbours that look alike carry
    what one level knows to the other. Sites with drawn masks teach both levels the same."""

    description = METHOD_CATALOGUE["gaze"]
    Options = GazeOptions
    default_rate = 1e-3

    def network(self) -> Levels:
        return Levels(self.config.classes - 1, self.config.width)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.AdamW(model.parameters(), self.rate)}

    def segmenter(self, model: nn.Module, context: SiteContext, kept: Mapping[str, Any] | None = None) -> nn.Module:
        return Structures(model)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        teaching = site_round.data.labelled_indices
        late = site_round.number > UNLABELLED_FROM * self.config.rounds
        if late:
            teaching = np.arange(len(site_round.data))
        if not len(teaching):
            return SiteUpdate(0, math.nan)
        frozen = copy.deepcopy(site_round.model).eval().requires_grad_(False) if late else None
        site_round.model.train()
        with self.seeded_round(site_round):
            losses = []
            for chosen in self.draws(site_round, teaching, self.config.updates):
                images, allowed = self.batch(site_round, chosen)
                losses.append(self.step(site_round, self.loss(site_round.model, images, allowed, frozen)))
        return SiteUpdate(len(teaching), float(np.mean(losses)))

    def loss(self, model: Levels, images: Tensor, allowed: Tensor, frozen: nn.Module | None = None) -> Tensor:
        """Cross entropy of each level with its own masks + lambda (1 - agreement of the levels), which is at least 0;
        for slices of which nothing is known, the sure predictions of a frozen model take the labels' context."""
        known = allowed.any(1, keepdim=True)
        alone = allowed.sum(1, keepdim=True) == 1
        masks = {"tight": allowed[:, 1:] & alone, "loose": allowed[:, 1:]}
        labelled = known.flatten(1).any(1)
        spread, plain, loss = {}, {}, images.new_zeros(())
        for level, network in (("tight", model.tight), ("loose", model.loose)):
            features = network.decode(network.encode(images)[0])[-1]
            plain[level] = network.final_conv(features)
            wide = propagate(features, self.options.window, self.options.dilation, self.options.temperature)
            spread[level] = torch.sigmoid(network.final_conv(wide))
            loss = loss + masked_entropy(plain[level], masks[level], known.expand_as(plain[level]))
        if frozen is not None and not labelled.all():
            guess = torch.sigmoid(frozen(images))
            sure = ((guess > SURE) | (guess < 1 - SURE)) & ~labelled[:, None, None, None]
            for logits in plain.values():
                loss = loss + UNLABELLED_WEIGHT * masked_entropy(logits, guess > SURE, sure)
        for level, other in (("tight", "loose"), ("loose", "tight")):
            peer = torch.sigmoid(plain[other].detach())
            agreement = spread[level] * peer + (1 - spread[level]) * (1 - peer)
            loss = loss + self.options.consistency * (1 - agreement.mean())
        return loss


def masked_entropy(logits: Tensor, masks: Tensor, where: Tensor) -> Tensor:
    """Binary cross entropy (B, structures, S, S), mean over the places asked for; 0 without any."""
    each = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none")
    return torch.where(where, each, 0.0).sum() / where.sum().clamp(min=1)


def propagate(features: Tensor, window: int, dilation: int, temperature: float) -> Tensor:
    """Features (B, K, H, W) averaged over a window of neighbours, weighted by softmax of cosine similarity /
    temperature. Neighbours outside of the slice take no part.

    One shifted view at a time and a running softmax: memory is that of a few copies, not of the window.
    """
    unit = F.normalize(features, dim=1)
    reach = window // 2 * dilation
    padded, unit_padded = (F.pad(one, [reach] * 4) for one in (features, unit))
    inside = F.pad(torch.ones_like(features[:1, :1]), [reach] * 4)
    height, width = features.shape[2:]
    total, weights = torch.zeros_like(features), torch.zeros_like(features[:, :1])
    for down in range(0, 2 * reach + 1, dilation):
        for right in range(0, 2 * reach + 1, dilation):
            view = (..., slice(down, down + height), slice(right, right + width))
            similar = (unit * unit_padded[view]).sum(1, keepdim=True)
            # Similarities end at 1, so that nothing overflows without the usual search for the largest.
            weight = torch.exp((similar - 1) / temperature) * inside[view]
            total, weights = total + weight * padded[view], weights + weight
    return total / weights
