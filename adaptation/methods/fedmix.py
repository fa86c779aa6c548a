"""FedMix: pixel, box and image labels, or none, in one federation (arXiv 2205.01840)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, TrainingError
from ..networks.site_network import SiteUNet
from .catalogue import METHOD_CATALOGUE
from .federated_method import FederatedMethod, SiteContext, SiteRound, SiteUpdate

SMOOTH = 1e-4
RULES = ("presence", "reference")
EMPTY = ("reject", "accept")


@dataclass(frozen=True, kw_only=True)
class FedMixOptions:
    """FedMix's thresholds and weights. Raises: ConfigError if one is out of range.

    Attributes:
        loss_weight, loss_power: lambda and beta of the sites' weights; a lambda of 0 counts accepted slices alone.
        agreement: Dice of the two networks' masks from which a slice is accepted (tau); 0 accepts all.
        per_class: agreement is the worst of the predicted classes, not that of all together.
        box_cover: least Dice of prediction and box.
        refine: whether weak labels correct the predictions.
        image_rule: "presence": a structure that is there must be found by both networks; "reference": not asked.
        empty: whether slices without labels count on which both networks find nothing.
        largest_share: of one site in the average.
    """

    loss_weight: float = 10.0
    loss_power: float = 1.5
    agreement: float = 0.9
    per_class: bool = False
    box_cover: float = 0.5
    refine: bool = True
    image_rule: str = "presence"
    empty: str = "reject"
    largest_share: float = 1.0

    def __post_init__(self) -> None:
        if self.loss_weight < 0 or self.loss_power < 0 or not 0 < self.largest_share <= 1:
            raise ConfigError("loss_weight and loss_power must not be negative, largest_share above 0 and at most 1")
        if not 0 <= self.agreement <= 1 or not 0 <= self.box_cover <= 1:
            raise ConfigError("agreement and box_cover are Dice scores from 0 to 1")
        if self.image_rule not in RULES or self.empty not in EMPTY:
            raise ConfigError(f"image_rule is one of {', '.join(RULES)}, empty one of {', '.join(EMPTY)}")


class Pair(nn.Module):
    """Two networks that teach each other; the first one segments. Sigmoid outputs, one per structure."""

    def __init__(self, structures: int, width: int) -> None:
        super().__init__()
        self.first, self.second = (SiteUNet(structures, width=width, norm="group") for _ in range(2))


class Structures(nn.Module):
    """Logits of classes from those of structures: background has 0, so that a structure wins where its sigmoid is
    above one half and above all others."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits = self.network(x)
        return torch.cat([torch.zeros_like(logits[:, :1]), logits], 1)


class FedMix(FederatedMethod):
    """Sites without masks make their own, by the pair of networks that comes: refined by the weak label, kept where
    both agree, each teaching the other network. Sites are weighed by accepted slices and by their loss."""

    description = METHOD_CATALOGUE["fedmix"]
    Options = FedMixOptions

    def network(self) -> Pair:
        return Pair(self.config.classes - 1, self.config.width)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.Adam(model.parameters(), self.rate, weight_decay=1e-4)}

    def segmenter(self, model: nn.Module, context: SiteContext, kept: Mapping[str, Any] | None = None) -> nn.Module:
        return Structures(model.first)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        dense = np.flatnonzero(site_round.data.kinds == "dense")
        weak = np.flatnonzero(site_round.data.kinds != "dense")
        with self.seeded_round(site_round):
            pseudo, numbers = self.pseudo_labels(site_round, weak)
            accepted = len(dense) + len(pseudo[0])
            if not accepted:
                return SiteUpdate(0, math.nan, numbers)
            site_round.model.train()
            losses = []
            updates = min(self.config.updates, math.ceil(accepted / self.config.batch_size))
            rng = np.random.default_rng((self.config.seed, site_round.site, site_round.number))
            for chosen in np.array_split(rng.permutation(accepted), updates):
                images, first, second = self._lessons(site_round, dense, pseudo, chosen)
                # Crossed: each network learns what the other one found.
                one = soft_dice_loss(torch.sigmoid(site_round.model.first(images)), second)
                two = soft_dice_loss(torch.sigmoid(site_round.model.second(images)), first)
                self.step(site_round, one + two)
                losses.append(float(one.detach()))
        return SiteUpdate(accepted, float(np.mean(losses)), numbers)

    @torch.no_grad()
    def pseudo_labels(
        self, site_round: SiteRound, weak: np.ndarray
    ) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, float]]:
        """Accepted slices (n, 1, S, S), augmented once, with the refined masks (n, structures, S, S) of the first and
        of the second network; and how many were accepted, and of these how many without any structure."""
        model, size, structures = site_round.model, self.config.size, self.config.classes - 1
        was, found = model.training, []
        model.eval()
        for start in range(0, len(weak), self.config.batch_size):
            chosen = weak[start : start + self.config.batch_size]
            images, allowed = self.batch(site_round, chosen)
            kinds = site_round.data.kinds[chosen]
            first, second = (
                self.refined(torch.sigmoid(network(images)) > 0.5, allowed) for network in (model.first, model.second)
            )
            accepted = self.accepted(first, second, allowed, kinds)
            found.append([one[accepted] for one in (images, first, second)])
        model.train(was)
        if not found:
            empty = torch.zeros(0, 1, size, size, device=site_round.device)
            found = [[empty, empty.expand(-1, structures, -1, -1), empty.expand(-1, structures, -1, -1)]]
        images, first, second = (torch.cat(parts) for parts in zip(*found, strict=True))
        blank = int((~first.any(dim=(1, 2, 3))).sum()) if len(first) else 0
        return (images, first.float(), second.float()), {"accepted": float(len(images)), "accepted_empty": float(blank)}

    def refined(self, masks: Tensor, allowed: Tensor) -> Tensor:
        """Masks (B, structures, S, S) without what the weak labels exclude, and with what they are sure of."""
        if not self.options.refine:
            return masks
        known, sure = allowed.any(1, keepdim=True), allowed.sum(1, keepdim=True) == 1
        masks = torch.where(known, masks & allowed[:, 1:], masks)
        return torch.where(sure, allowed[:, 1:], masks)

    def accepted(self, first: Tensor, second: Tensor, allowed: Tensor, kinds: np.ndarray) -> Tensor:
        """(B,) bool: which slices the two networks agree on, as far as their labels demand."""
        own = self.options
        good = agreement(first, second, per_class=own.per_class) >= own.agreement
        blank = ~(first.any(dim=(1, 2, 3)) | second.any(dim=(1, 2, 3)))
        labelled = torch.from_numpy(kinds != "none").to(first.device)
        if own.empty == "reject":
            good &= labelled | ~blank
        boxed = torch.from_numpy(kinds == "box").to(first.device)
        cover = agreement(first, allowed[:, 1:], per_class=False)
        good &= ~boxed | (cover >= own.box_cover)
        if own.image_rule == "presence":
            imaged = torch.from_numpy(kinds == "image").to(first.device)
            there = allowed[:, 1:].any(dim=(2, 3))
            missed = (there & ~(first.any(dim=(2, 3)) & second.any(dim=(2, 3)))).any(1)
            good &= ~imaged | ~missed
        return good

    def shares(self, site_updates: Sequence[SiteUpdate]) -> list[float]:
        own = self.options
        return site_weights(
            [site_update.samples for site_update in site_updates],
            [site_update.loss for site_update in site_updates],
            loss_weight=own.loss_weight,
            loss_power=own.loss_power,
            largest=own.largest_share,
        )

    def _lessons(
        self, site_round: SiteRound, dense: np.ndarray, pseudo: tuple[Tensor, Tensor, Tensor], chosen: np.ndarray
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Slices, and what the first and the second network say of them; of labelled ones the truth, twice."""
        parts = []
        if len(own := chosen[chosen < len(dense)]):
            images, allowed = self.batch(site_round, dense[own])
            truth = allowed[:, 1:].float()
            parts.append((images, truth, truth))
        if len(made := chosen[chosen >= len(dense)] - len(dense)):
            rows = torch.from_numpy(made).to(site_round.device)
            parts.append(tuple(one[rows] for one in pseudo))
        return tuple(torch.cat(one) for one in zip(*parts, strict=True))


def soft_dice_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """1 - mean over slices of (2 sum p y + eps) / (sum p + sum y + eps), over all structures and pixels together."""
    both = (probabilities * masks).sum(dim=(1, 2, 3))
    total = probabilities.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3))
    return 1 - ((2 * both + SMOOTH) / (total + SMOOTH)).mean()


def agreement(first: Tensor, second: Tensor, *, per_class: bool) -> Tensor:
    """(B,) Dice of masks (B, structures, S, S), all structures together, or the worst of them; 1 for two empty ones."""
    dims = (2, 3) if per_class else (1, 2, 3)
    both = (first & second).sum(dim=dims).double()
    total = (first.sum(dim=dims) + second.sum(dim=dims)).double()
    dice = (2 * both + SMOOTH) / (total + SMOOTH)
    return dice.amin(1) if per_class else dice


def site_weights(
    accepted: Sequence[int], losses: Sequence[float], *, loss_weight: float, loss_power: float, largest: float = 1.0
) -> list[float]:
    """w_i ~ n_i / N + lambda l_i^beta / S over the sites with accepted slices, adding up to one; others have 0.

    Args:
        accepted: n_i, slices. losses: l_i of the first network.
        loss_weight, loss_power: lambda and beta. largest: share no site exceeds while others can take over.

    Raises: TrainingError for a loss that is negative, NaN or infinite at a site that has trained.
    """
    active = [index for index, count in enumerate(accepted) if count]
    if not active:
        return [0.0] * len(accepted)
    if any(not math.isfinite(losses[index]) or losses[index] < 0 for index in active):
        raise TrainingError(f"a site reports the loss {min((losses[i] for i in active), key=lambda v: (v == v, v))}")
    n = sum(accepted[index] for index in active)
    s = sum(losses[index] ** loss_power for index in active)
    raw = [0.0] * len(accepted)
    for index in active:
        driven = losses[index] ** loss_power / s if s else 1 / len(active)
        raw[index] = (accepted[index] / n + loss_weight * driven) / (1 + loss_weight)
    return _capped(raw, max(largest, 1 / len(active)))


def _capped(weights: list[float], largest: float) -> list[float]:
    """What some have above `largest` goes to the others, in proportion."""
    capped: set[int] = set()
    while True:
        free = sum(value for index, value in enumerate(weights) if index not in capped)
        room = 1 - largest * len(capped)
        scaled = [largest if i in capped else value * room / free if free else 0.0 for i, value in enumerate(weights)]
        over = {index for index, value in enumerate(scaled) if value > largest + 1e-12}
        if not over:
            return scaled
        capped |= over
