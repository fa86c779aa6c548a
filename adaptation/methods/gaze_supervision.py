"""Gaze supervision: one network per level of certainty, which regularise each other (GazeMedSeg, arXiv 2407.07406)."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ..networks.site_network import SiteUNet
from ..networks.structure_logits import StructureLogits
from .catalogue import METHOD_CATALOGUE
from .federated_averaging import WeightAveragingMethod
from .interface.option_checks import check_at_least, check_positive
from .interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate

UNLABELLED_FROM = 0.2  # share of the rounds after which slices without labels are used for training
UNLABELLED_WEIGHT = 0.5
MIN_PSEUDO_PROBABILITY = 0.9  # from which a prediction is a pseudo-label


@dataclass(frozen=True, kw_only=True)
class GazeOptions:
    """Settings of gaze supervision. Raises: ConfigError if a value is out of range.

    Attributes:
        consistency: weight lambda of the agreement of the two levels.
        window: side of the neighbourhood over which features are averaged, an odd number of pixels.
        dilation: distance of the neighbours, pixels.
        temperature: of the softmax of their cosine similarities.
    """

    consistency: float = 3.0
    window: int = 5
    dilation: int = 2
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_at_least("consistency", self.consistency, 0)
        check_positive("temperature", self.temperature)
        check_at_least("dilation", self.dilation, 1)
        if self.window < 1 or not self.window % 2:
            raise ConfigError(f"window is {self.window}; choose an odd number from 1")


class LevelPair(nn.Module):
    """A network trained on pixels that are surely the target (tight), and one on pixels that may be (loose)."""

    def __init__(self, structures: int, width: int, *, channels: int = 1) -> None:
        super().__init__()
        self.tight, self.loose = (SiteUNet(structures, channels=channels, width=width, norm="group") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Slices (B, channels, S, S) in [-1, 1] to the mean of the levels' logits (B, structures, S, S)."""
        return (self.tight(x) + self.loose(x)) / 2


class GazeSupervision(WeightAveragingMethod):
    """Each level of certainty, made from fixations, trains a network; features averaged over similar neighbours carry
    what the network of one level has learnt to the other. Sites with drawn masks train both levels on them."""

    description = METHOD_CATALOGUE["gaze"]
    Options = GazeOptions
    default_rate = 1e-3

    def network(self) -> LevelPair:
        return LevelPair(self.config.classes - 1, self.config.width, channels=self.config.channels)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.AdamW(model.parameters(), self.rate)}

    def segmenter(self, model: nn.Module, context: SiteContext, state: MethodState | None = None) -> nn.Module:
        return StructureLogits(model)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        training_indices = site_round.data.labelled_indices
        late = site_round.number > UNLABELLED_FROM * self.config.rounds
        if late:
            training_indices = np.arange(len(site_round.data))
        if not len(training_indices):
            return SiteUpdate(0, math.nan)
        frozen = copy.deepcopy(site_round.model).eval().requires_grad_(False) if late else None
        site_round.model.train()
        with self.seeded_round(site_round):
            losses = []
            for chosen in self.draws(site_round, training_indices, self.config.updates):
                images, allowed = self.batch(site_round, chosen)
                losses.append(self.step(site_round, self.loss(site_round.model, images, allowed, frozen=frozen)))
        return SiteUpdate(len(training_indices), float(np.mean(losses)))

    def loss(self, model: LevelPair, images: Tensor, allowed: Tensor, *, frozen: nn.Module | None = None) -> Tensor:
        """Cross entropy of each level with its own masks + lambda (1 - agreement of the levels), a scalar.

        Args:
            images: (B, channels, S, S) in [-1, 1].
            allowed: (B, classes, S, S) bool, candidates.
            frozen: model whose certain predictions are the pseudo-labels of slices without labels; None for no
                training on these slices.
        """
        known = allowed.any(1, keepdim=True)
        single = allowed.sum(1, keepdim=True) == 1
        masks = {"tight": allowed[:, 1:] & single, "loose": allowed[:, 1:]}
        labelled = known.flatten(1).any(1)
        spread, plain, loss = {}, {}, images.new_zeros(())
        for level, network in (("tight", model.tight), ("loose", model.loose)):
            features = network.decode(network.encode(images).features)[-1]
            plain[level] = network.final_conv(features)
            wide = propagate(features, self.options.window, self.options.dilation, temperature=self.options.temperature)
            spread[level] = torch.sigmoid(network.final_conv(wide))
            loss = loss + masked_entropy(plain[level], masks[level], known.expand_as(plain[level]))
        if frozen is not None and not labelled.all():
            guess = torch.sigmoid(frozen(images))
            positive, negative = guess > MIN_PSEUDO_PROBABILITY, guess < 1 - MIN_PSEUDO_PROBABILITY
            certain = (positive | negative) & ~labelled[:, None, None, None]
            for logits in plain.values():
                loss = loss + UNLABELLED_WEIGHT * masked_entropy(logits, positive, certain)
        for level, other in (("tight", "loose"), ("loose", "tight")):
            peer = torch.sigmoid(plain[other].detach())
            agreement = spread[level] * peer + (1 - spread[level]) * (1 - peer)
            loss = loss + self.options.consistency * (1 - agreement.mean())
        return loss


def masked_entropy(logits: Tensor, masks: Tensor, where: Tensor) -> Tensor:
    """Mean binary cross entropy over the entries with `where`; 0 without any; a scalar.

    Args:
        logits: (B, structures, S, S).
        masks: (B, structures, S, S) 0 or 1.
        where: (B, structures, S, S) bool.
    """
    each = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none")
    return torch.where(where, each, 0.0).sum() / where.sum().clamp(min=1)


def propagate(features: Tensor, window: int, dilation: int, *, temperature: float) -> Tensor:
    """Features (B, K, H, W) averaged over a window of neighbours, weighted by softmax of cosine similarity /
    temperature. Neighbours outside of the slice do not count.

    One shifted view at a time and a running softmax: memory is that of a few copies, not of the window.
    """
    unit = F.normalize(features, dim=1)
    reach = window // 2 * dilation
    padded, unit_padded = (F.pad(tensor, [reach] * 4) for tensor in (features, unit))
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
