"""FedMix: pixel, box and image labels, or none, in one federation (arXiv 2205.01840)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, TrainingError
from ..networks.site_network import SiteUNet
from ..networks.structure_logits import StructureLogits, with_background
from .catalogue import METHOD_CATALOGUE
from .federated_averaging import WeightAveragingMethod
from .interface.box_options import BoxOptions, box_loss
from .interface.method_config import MethodConfig
from .interface.option_checks import check_at_least, check_choice, check_fraction
from .interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate

DICE_SMOOTHING = 1e-4
CAP_TOLERANCE = 1e-12  # rounding by which a share may exceed the largest share
IMAGE_RULES = ("presence", "reference")
EMPTY_RULES = ("reject", "accept")


@dataclass(frozen=True, kw_only=True)
class FedMixOptions(BoxOptions):
    """FedMix's thresholds and weights, and those for boxes. Raises: ConfigError if a value is out of range.

    Attributes:
        loss_weight: lambda of the sites' weights; 0 weighs by the number of accepted slices only.
        loss_power: beta of the sites' weights.
        agreement: Dice of the two networks' masks from which a slice is accepted (tau); 0 accepts all slices.
        per_class: whether agreement is that of the worst class instead of all classes together.
        box_cover: smallest Dice of prediction and box with which a slice with boxes is accepted.
        refine: whether weak labels correct the predictions before the networks are compared; published: yes.
        image_rule: "presence" accepts a slice with image labels only if both networks find every structure that is
            present; "reference" does not require it.
        empty: "accept" or "reject": slices without labels in which both networks find nothing.
        largest_share: largest share of one site in the average, above 0 and at most 1.
    """

    loss_weight: float = 10.0
    loss_power: float = 1.5
    agreement: float = 0.9
    per_class: bool = False
    box_cover: float = 0.5
    refine: bool = False
    image_rule: str = "presence"
    empty: str = "reject"
    largest_share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("loss_weight", self.loss_weight, 0)
        check_at_least("loss_power", self.loss_power, 0)
        if not 0 < self.largest_share <= 1:
            raise ConfigError(f"largest_share is {self.largest_share}; choose above 0 and at most 1")
        check_fraction("agreement", self.agreement)
        check_fraction("box_cover", self.box_cover)
        check_choice("image_rule", self.image_rule, IMAGE_RULES)
        check_choice("empty", self.empty, EMPTY_RULES)


@dataclass(frozen=True, kw_only=True)
class PseudoLabels:
    """Accepted slices with the masks that the two networks found.

    Attributes:
        images: (n, channels, S, S) float32 in [-1, 1], augmented once.
        first: (n, structures, S, S) 0 or 1, refined masks of the first network.
        second: (n, structures, S, S) 0 or 1, refined masks of the second network.
        allowed: (n, structures + 1, S, S) bool, candidates.
        lines: (n, 2, S, S) int64, rows and columns of boxes, see `losses.box_losses.tightness`.
    """

    images: Tensor
    first: Tensor
    second: Tensor
    allowed: Tensor
    lines: Tensor

    def __len__(self) -> int:
        return len(self.images)


class NetworkPair(nn.Module):
    """Two networks that train each other; the first one is the segmenter. One sigmoid output per structure."""

    def __init__(self, structures: int, config: MethodConfig) -> None:
        super().__init__()
        self.first, self.second = (SiteUNet(structures, **config.unet_settings) for _ in range(2))


class FedMix(WeightAveragingMethod):
    """Sites without masks make pseudo-labels with the received pair of networks: the weak label refines them, a slice
    is accepted where both networks agree, and each network is trained on the masks of the other. Sites are weighed by
    their accepted slices and by their loss."""

    description = METHOD_CATALOGUE["fedmix"]
    Options = FedMixOptions

    def network(self) -> NetworkPair:
        return NetworkPair(self.config.classes - 1, self.config)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.Adam(model.parameters(), self.rate, weight_decay=1e-4)}

    def segmenter(self, model: nn.Module, context: SiteContext, state: MethodState | None = None) -> nn.Module:
        return StructureLogits(model.first)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        dense = np.flatnonzero(site_round.data.kinds == "dense")
        weak = np.flatnonzero(site_round.data.kinds != "dense")
        with self.seeded_round(site_round):
            pseudo, numbers = self.pseudo_labels(site_round, weak)
            accepted = len(dense) + len(pseudo)
            if not accepted:
                return SiteUpdate(0, math.nan, numbers)
            site_round.model.train()
            losses = []
            for update, chosen in enumerate(self.draws(site_round, np.arange(accepted), self.config.updates)):
                part = self._training_batch(site_round, chosen, dense=dense, pseudo=pseudo)
                # Crossed: each network learns the masks that the other network found.
                first, second = (network(part.images) for network in (site_round.model.first, site_round.model.second))
                first_loss = soft_dice_loss(torch.sigmoid(first), part.second)
                second_loss = soft_dice_loss(torch.sigmoid(second), part.first)
                boxes = self._box_loss(first, part) + self._box_loss(second, part)
                self.step(site_round, first_loss + second_loss + boxes, update=update)
                # Without the boxes: this loss weighs the sites, whatever labels they have.
                losses.append(float(first_loss.detach()))
        return SiteUpdate(accepted, float(np.mean(losses)), numbers)

    @torch.no_grad()
    def pseudo_labels(self, site_round: SiteRound, weak: np.ndarray) -> tuple[PseudoLabels, dict[str, float]]:
        """The accepted slices among those with the indices `weak` (N,); the numbers of accepted slices, and of
        accepted slices in which the first network finds no structure."""
        model, size, structures = site_round.model, self.config.size, self.config.classes - 1
        was, found = model.training, []
        model.eval()
        for start in range(0, len(weak), self.config.batch_size):
            chosen = weak[start : start + self.config.batch_size]
            images, allowed, lines = self.batch_with_lines(site_round, chosen)
            kinds = site_round.data.kinds[chosen]
            first, second = (
                self.refined(torch.sigmoid(network(images)) > 0.5, allowed) for network in (model.first, model.second)
            )
            accepted = self.accepted(first, second, allowed=allowed, kinds=kinds)
            found.append([tensor[accepted] for tensor in (images, first, second, allowed, lines)])
        model.train(was)
        if not found:
            counts = (self.config.channels, structures, structures, structures + 1, 2)
            found = [[torch.zeros(0, count, size, size, device=site_round.device) for count in counts]]
        images, first, second, allowed, lines = (torch.cat(parts) for parts in zip(*found, strict=True))
        blank = int((~first.any(dim=(1, 2, 3))).sum()) if len(first) else 0
        pseudo = PseudoLabels(
            images=images, first=first.float(), second=second.float(), allowed=allowed.bool(), lines=lines.long()
        )
        return pseudo, {"accepted": float(len(images)), "accepted_empty": float(blank)}

    def refined(self, masks: Tensor, allowed: Tensor) -> Tensor:
        """Masks (B, structures, S, S) bool, corrected by the weak labels.

        Args:
            masks: (B, structures, S, S) bool.
            allowed: (B, structures + 1, S, S) bool, candidates. Classes that are not allowed are removed, and where
                a single class is allowed the mask is that class.
        """
        if not self.options.refine:
            return masks
        known, single = allowed.any(1, keepdim=True), allowed.sum(1, keepdim=True) == 1
        masks = torch.where(known, masks & allowed[:, 1:], masks)
        return torch.where(single, allowed[:, 1:], masks)

    def accepted(self, first: Tensor, second: Tensor, *, allowed: Tensor, kinds: np.ndarray) -> Tensor:
        """(B,) bool: the slices on which both networks agree, and whose weak labels the masks fulfil.

        Args:
            first: (B, structures, S, S) bool, masks of the first network.
            second: (B, structures, S, S) bool, masks of the second network.
            allowed: (B, structures + 1, S, S) bool, candidates.
            kinds: (B,) kind of each slice's labels.
        """
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

    def _training_batch(
        self, site_round: SiteRound, chosen: np.ndarray, *, dense: np.ndarray, pseudo: PseudoLabels
    ) -> PseudoLabels:
        """The chosen (B,) slices with masks for both networks; densely labelled slices have the true masks twice.

        Args:
            dense: (D,) indices of the site's densely labelled slices; `chosen` numbers these, then `pseudo`.
            pseudo: the accepted slices.
        """
        parts = []
        if len(own := chosen[chosen < len(dense)]):
            images, allowed, lines = self.batch_with_lines(site_round, dense[own])
            truth = allowed[:, 1:].float()
            parts.append((images, truth, truth, allowed, lines))
        if len(made := chosen[chosen >= len(dense)] - len(dense)):
            rows = torch.from_numpy(made).to(site_round.device)
            fields = (pseudo.images, pseudo.first, pseudo.second, pseudo.allowed, pseudo.lines)
            parts.append(tuple(tensor[rows] for tensor in fields))
        images, first, second, allowed, lines = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return PseudoLabels(images=images, first=first, second=second, allowed=allowed, lines=lines)

    def _box_loss(self, logits: Tensor, part: PseudoLabels) -> Tensor | float:
        """`box_loss` of a network's logits (n, structures, S, S), a scalar."""
        return box_loss(with_background(logits), part.allowed, part.lines, self.options)


def soft_dice_loss(probabilities: Tensor, masks: Tensor) -> Tensor:
    """1 - mean over slices of (2 sum p y + eps) / (sum p + sum y + eps), sums over all structures and pixels; a scalar.

    Args:
        probabilities: p, (B, structures, S, S) in [0, 1].
        masks: y, (B, structures, S, S) 0 or 1.
    """
    both = (probabilities * masks).sum(dim=(1, 2, 3))
    total = probabilities.sum(dim=(1, 2, 3)) + masks.sum(dim=(1, 2, 3))
    return 1 - ((2 * both + DICE_SMOOTHING) / (total + DICE_SMOOTHING)).mean()


def agreement(first: Tensor, second: Tensor, *, per_class: bool) -> Tensor:
    """(B,) Dice of masks (B, structures, S, S) bool: of all structures together, or of the worst structure; 1 for two
    empty masks."""
    dims = (2, 3) if per_class else (1, 2, 3)
    both = (first & second).sum(dim=dims).double()
    total = (first.sum(dim=dims) + second.sum(dim=dims)).double()
    dice = (2 * both + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    return dice.amin(1) if per_class else dice


def site_weights(
    accepted: Sequence[int], losses: Sequence[float], *, loss_weight: float, loss_power: float, largest: float = 1.0
) -> list[float]:
    """w_i ~ n_i / N + lambda l_i^beta / S over the sites with accepted slices, adding up to one; others have 0.

    Args:
        accepted: n_i, numbers of slices by site.
        losses: l_i of the first network by site.
        loss_weight: lambda.
        loss_power: beta.
        largest: largest share of one site, as far as the other sites can make up for it.

    Raises: TrainingError for a loss that is negative, NaN or infinite at a site that has trained.
    """
    active = [index for index, count in enumerate(accepted) if count]
    if not active:
        return [0.0] * len(accepted)
    if any(not math.isfinite(losses[index]) or losses[index] < 0 for index in active):
        worst = min((losses[index] for index in active), key=lambda loss: (not math.isnan(loss), loss))
        raise TrainingError(f"the loss of a site is {worst}; it must be finite and not negative to weigh the site")
    n = sum(accepted[index] for index in active)
    s = sum(losses[index] ** loss_power for index in active)
    raw = [0.0] * len(accepted)
    for index in active:
        driven = losses[index] ** loss_power / s if s else 1 / len(active)
        raw[index] = (accepted[index] / n + loss_weight * driven) / (1 + loss_weight)
    return _capped(raw, max(largest, 1 / len(active)))


def _capped(weights: list[float], largest: float) -> list[float]:
    """Shares of at most `largest`; what is above it goes to the other sites in proportion."""
    capped: set[int] = set()
    while True:
        free = sum(value for index, value in enumerate(weights) if index not in capped)
        room = 1 - largest * len(capped)
        scaled = [largest if i in capped else value * room / free if free else 0.0 for i, value in enumerate(weights)]
        over = {index for index, value in enumerate(scaled) if value > largest + CAP_TOLERANCE}
        if not over:
            return scaled
        capped |= over
