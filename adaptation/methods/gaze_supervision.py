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
from ..labels.candidate_labels import MAX_CERTAINTY, candidate_masks
from ..networks.site_network import SiteUNet
from ..networks.structure_logits import StructureLogits
from .catalogue import METHOD_CATALOGUE
from .federated_averaging import WeightAveragingMethod
from .interface.method_config import MethodConfig
from .interface.option_checks import check_at_least, check_positive
from .interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate

UNLABELLED_FROM = 0.2  # share of the rounds after which slices without labels are used for training
UNLABELLED_WEIGHT = 0.5
MIN_PSEUDO_PROBABILITY = 0.9  # from which a prediction is a pseudo-label


@dataclass(frozen=True, kw_only=True)
class GazeOptions:
    """Settings of gaze supervision. Raises: ConfigError if a value is out of range.

    Attributes:
        levels: number of levels of certainty, each with a network of its own: thresholds from the site's `tight` to its
            `loose` at equal distances; 1 has the tight one alone, and no agreement.
        consistency: weight lambda of the agreement of the levels.
        window: side of the neighbourhood over which features are averaged, an odd number of neighbours.
        dilation: distance of the neighbours, pixels of the slice.
        temperature: of the softmax of their cosine similarities.
    """

    levels: int = 2
    consistency: float = 3.0
    window: int = 5
    dilation: int = 2
    temperature: float = 0.1

    def __post_init__(self) -> None:
        check_at_least("levels", self.levels, 1)
        check_at_least("consistency", self.consistency, 0)
        check_positive("temperature", self.temperature)
        check_at_least("dilation", self.dilation, 1)
        if self.window < 1 or not self.window % 2:
            raise ConfigError(f"window is {self.window}; choose an odd number from 1")


class LevelEnsemble(nn.Module):
    """A network for every level of certainty, from pixels that are surely the target (tight) to those that may be
    (loose).

    Args:
        structures: channels of the logits.
        config: channels of the slices, width, depth, fold and normalisation of the U-Nets.
        levels: number of networks.

    Attributes:
        names: of the networks, which are attributes, from tight to loose.
    """

    def __init__(self, structures: int, config: MethodConfig, *, levels: int = 2) -> None:
        super().__init__()
        between = [f"between_{number}" for number in range(1, levels - 1)]
        self.names = ("tight", *between, "loose")[:levels]
        for name in self.names:
            setattr(self, name, SiteUNet(structures, **config.unet_settings))

    def networks(self) -> list[SiteUNet]:
        """From tight to loose."""
        return [getattr(self, name) for name in self.names]

    def forward(self, x: Tensor) -> Tensor:
        """Slices (B, channels, S, S) in [-1, 1] to the mean of the levels' logits (B, structures, S, S)."""
        return torch.stack([network(x) for network in self.networks()]).mean(0)


class GazeSupervision(WeightAveragingMethod):
    """Each level of certainty, made from fixations, trains a network; features averaged over similar neighbours carry
    what the network of one level has learnt to the others. Sites with drawn masks train all levels on them."""

    description = METHOD_CATALOGUE["gaze"]
    Options = GazeOptions

    def network(self) -> LevelEnsemble:
        return LevelEnsemble(self.config.classes - 1, self.config, levels=self.options.levels)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.AdamW(model.parameters(), self.rate)}

    def segmenter(self, model: nn.Module, context: SiteContext, state: MethodState | None = None) -> nn.Module:
        return StructureLogits(model)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        training_indices = site_round.data.labelled_indices
        frozen = None
        if site_round.number > UNLABELLED_FROM * self.config.rounds and len(training_indices) < len(site_round.data):
            training_indices = np.arange(len(site_round.data))
            frozen = copy.deepcopy(site_round.model).eval().requires_grad_(False)
        if not len(training_indices):
            return SiteUpdate(0, math.nan)
        site_round.model.train()
        with self.seeded_round(site_round):
            losses = []
            for update, chosen in enumerate(self.draws(site_round, training_indices, self.config.updates)):
                images, allowed, certainty = self.graded_batch(site_round, chosen)
                loss = self.loss(site_round.model, images, allowed, certainty=certainty, frozen=frozen)
                losses.append(self.step(site_round, loss, update=update))
        return SiteUpdate(len(training_indices), float(np.mean(losses)))

    def graded_batch(self, site_round: SiteRound, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """`FederatedMethod.batch` with the certainty (B, 1, S, S), int64 from 0 to MAX_CERTAINTY, at the same places;
        halfway for labels without grades."""
        data = site_round.data
        data.require_channels(self.config.channels)
        images = torch.from_numpy(data.images[chosen].astype(np.float32))
        candidates = data.candidates[chosen].astype(np.int64)
        graded = np.full(candidates.shape, MAX_CERTAINTY // 2) if data.certainty is None else data.certainty[chosen]
        maps = torch.from_numpy(np.stack([candidates, graded.astype(np.int64)], 1))
        images, labels = self.varied(images, maps, self.augmentation_of(images), device=site_round.device)
        return images, candidate_masks(labels[:, 0], self.config.classes), labels[:, 1:]

    def loss(
        self,
        model: LevelEnsemble,
        images: Tensor,
        allowed: Tensor,
        *,
        certainty: Tensor | None = None,
        frozen: nn.Module | None = None,
    ) -> Tensor:
        """Cross entropy of each level with its own masks + lambda (1 - agreement with the other levels), a scalar.

        Args:
            images: (B, channels, S, S) in [-1, 1].
            allowed: (B, classes, S, S) bool, candidates.
            certainty: (B, 1, S, S) of pixels with several candidates, 0 to MAX_CERTAINTY; None is halfway.
            frozen: model whose certain predictions are the pseudo-labels of slices without labels; None for no
                training on these slices.
        """
        known = allowed.any(1, keepdim=True)
        labelled = known.flatten(1).any(1)
        masks = level_masks(allowed, certainty, len(model.names))
        spread, plain, loss = [], [], images.new_zeros(())
        for network, mask in zip(model.networks(), masks, strict=True):
            features = network.decode(network.encode(images).features)[-1]
            plain.append(network.logits(features))
            loss = loss + masked_entropy(plain[-1], mask, known.expand_as(plain[-1]))
            if len(masks) > 1 and self.options.consistency:
                dilation = max(1, self.options.dilation // network.fold)
                wide = propagate(features, self.options.window, dilation, temperature=self.options.temperature)
                spread.append(torch.sigmoid(network.logits(wide)))
        if frozen is not None and not labelled.all():
            guess = torch.sigmoid(frozen(images))
            positive, negative = guess > MIN_PSEUDO_PROBABILITY, guess < 1 - MIN_PSEUDO_PROBABILITY
            certain = (positive | negative) & ~labelled[:, None, None, None]
            for logits in plain:
                loss = loss + UNLABELLED_WEIGHT * masked_entropy(logits, positive, certain)
        certainties = [torch.sigmoid(logits.detach()) for logits in plain]
        for level, own in enumerate(spread):
            peers = [peer for other, peer in enumerate(certainties) if other != level]
            agreements = [(own * peer + (1 - own) * (1 - peer)).mean() for peer in peers]
            loss = loss + self.options.consistency * (1 - torch.stack(agreements).mean())
        return loss


def level_masks(allowed: Tensor, certainty: Tensor | None, levels: int) -> list[Tensor]:
    """Masks (B, structures, S, S) bool of the levels, from tight to loose.

    Every level has the pixels that must be a structure; the loose one also those that may be, and the levels between
    them those whose certainty is above thresholds at equal distances.

    Args:
        allowed: (B, classes, S, S) bool, candidates.
        certainty: (B, 1, S, S) of pixels with several candidates, 0 to MAX_CERTAINTY; None is halfway.
        levels: number of levels, at least 1.
    """
    single = allowed.sum(1, keepdim=True) == 1
    graded = torch.full_like(single, MAX_CERTAINTY // 2, dtype=torch.int64) if certainty is None else certainty
    thresholds = [MAX_CERTAINTY * (1 - level / (levels - 1)) for level in range(1, levels)]
    return [allowed[:, 1:] & single, *(allowed[:, 1:] & (single | (graded >= threshold)) for threshold in thresholds)]


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
