"""FedICRA: weak labels of different kinds, one personalised model per site (arXiv 2304.05635)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import ConfigError
from ..losses.gated_crf import RADIUS, SIGMA_PLACE, gated_crf
from ..losses.partial_losses import candidate_cross_entropy, informative, partial_dice
from ..losses.tree_energy import tree_energy
from ..networks.site_network import LEVELS, SiteUNet
from .catalogue import METHOD_CATALOGUE
from .federated_method import FederatedMethod, SiteContext, SiteRound, SiteUpdate

BODY, OUTPUT = "body", "output"
POWER = 0.9  # of the falling learning rate
SETTLED = 0.1  # standard deviation of the last losses at which the first aggregation ends
LOOKED_AT = 10
MOST_EPOCHS = 10  # of the first aggregation
PUBLISHED_SIZE = 256  # pixels per side
OWN, MIX = "own.", "mix."  # in what a site keeps


@dataclass(frozen=True, kw_only=True)
class FedICRAOptions:
    """FedICRA's parts and weights; each can be left out by a 0. Raises: ConfigError if one is out of range.

    Attributes:
        tree_weight, crf_weight: of the tree energy and the gated CRF. dice_weight: of the partial Dice.
        contrast_weight: of the site-contrastive term (alpha).
        selections: encoder levels that select channels by site.
        embedding: channels within the auxiliary heads of the tree energy.
        body_updates: last updates of a round, that train everything but the output layer; those before train it alone.
        adaptive: sites mix their own and the average's higher layers element by element.
        adaptive_from: round from which they do.
    """

    tree_weight: float = 0.1
    crf_weight: float = 0.1
    dice_weight: float = 0.0
    contrast_weight: float = 1.0
    selections: int = 1
    embedding: int = 512
    body_updates: int = 3
    adaptive: bool = True
    adaptive_from: int = 4

    def __post_init__(self) -> None:
        if min(self.tree_weight, self.crf_weight, self.dice_weight, self.contrast_weight) < 0:
            raise ConfigError("weights of losses must not be negative")
        if not 0 <= self.selections <= LEVELS or self.embedding < 1 or self.body_updates < 0 or self.adaptive_from < 2:
            raise ConfigError(
                f"selections from 0 to {LEVELS}, embedding from 1, body_updates from 0, adaptive_from from 2"
            )
        if self.contrast_weight and not self.selections:
            raise ConfigError("the site-contrastive term compares channel selections: set selections or no weight")


class FedICRA(FederatedMethod):
    """Adaptive representation (channel selection by site, pushed apart) and adaptive aggregation (what a site takes of
    the average is learnt, element by element), with energies that carry sparse labels to the pixels between them."""

    description = METHOD_CATALOGUE["fedicra"]
    Options = FedICRAOptions
    default_rate = 1e-2

    def network(self) -> SiteUNet:
        own = self.options
        return SiteUNet(
            self.config.classes,
            width=self.config.width,
            norm=self.config.norm,
            dropout=0.1,
            sites=self.config.sites if own.selections else 0,
            selections=own.selections,
            embedding=own.embedding if own.tree_weight else 0,
        )

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """One for the output layer, one for all before it: a round trains the one, then the other."""
        output = list(model.final_conv.parameters())
        body = [value for name, value in model.named_parameters() if not name.startswith("final_conv")]
        return {OUTPUT: torch.optim.AdamW(output, self.rate), BODY: torch.optim.AdamW(body, self.rate)}

    def segmenter(self, model: nn.Module, context: SiteContext, kept: Mapping[str, Any] | None = None) -> nn.Module:
        model.site = context.site
        return model

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        labelled_indices = site_round.data.labelled_indices
        if not len(labelled_indices):
            return SiteUpdate(0, math.nan)
        model = site_round.model
        model.site = site_round.site
        numbers: dict[str, float] = {}
        with self.seeded_round(site_round):
            if (
                self.options.adaptive
                and site_round.number >= self.options.adaptive_from
                and f"{OWN}ready" in site_round.kept
            ):
                numbers["taken"] = self.adaptive_aggregation(site_round, labelled_indices)
            model.train()
            losses = []
            for update, chosen in enumerate(self.draws(site_round, labelled_indices, self.config.updates)):
                body = update >= self.config.updates - self.options.body_updates
                self._train_only(model, body)
                self._set_rates(site_round, (site_round.number - 1) * self.config.updates + update)
                images, allowed = self.batch(site_round, chosen)
                loss = self.loss(model, images, allowed, site_round.site)
                losses.append(self.step(site_round, loss, [BODY if body else OUTPUT]))
            model.requires_grad_(True)
        higher = model.higher_layers().items()
        site_round.kept |= {f"{OWN}{name}": value.detach().cpu().clone() for name, value in higher} | {f"{OWN}ready": 1}
        return SiteUpdate(len(labelled_indices), float(np.mean(losses)), numbers)

    def loss(self, model: SiteUNet, images: Tensor, allowed: Tensor, site: int) -> Tensor:
        """Partial cross entropy + tree energy + gated CRF + site contrast, each with its weight."""
        own = self.options
        features, heatmap = model.encode(images, site)
        decoded = model.decode(features)
        logits = model.final_conv(decoded[-1])
        loss = candidate_cross_entropy(logits, allowed)
        if own.dice_weight:
            loss = loss + own.dice_weight * partial_dice(logits, allowed)
        probabilities, grey = torch.softmax(logits, 1), (images.clamp(-1, 1) + 1) / 2
        if own.tree_weight:
            unknown = ~informative(allowed)
            loss = loss + own.tree_weight * tree_energy(probabilities, grey, unknown, model.embeddings(decoded))
        if own.crf_weight:
            # The window is as wide in the organ as in published slices: in small ones that of 11 pixels reaches from
            # one structure over the next, and the energy is lowest where everything is background.
            scale = self.config.size / PUBLISHED_SIZE
            options = {"radius": max(1, round(RADIUS * scale)), "sigma_place": SIGMA_PLACE * scale}
            loss = loss + own.crf_weight * gated_crf(probabilities, grey, **options)
        if own.contrast_weight and self.config.sites > 1:
            loss = loss + own.contrast_weight * self.contrast(model, images, heatmap, site)
        return loss

    def contrast(self, model: SiteUNet, images: Tensor, heatmap: Tensor, site: int) -> Tensor:
        """Minus the mean squared distance of this site's heatmap to every other site's of the same slices."""
        others = [other for other in range(self.config.sites) if other != site]
        with torch.no_grad():
            theirs = [model.encode(images, other)[1] for other in others]
        return -torch.stack([F.mse_loss(heatmap, one) for one in theirs]).mean()

    def adaptive_aggregation(self, site_round: SiteRound, labelled_indices: np.ndarray) -> float:
        """theta = L + (S - L) W for the higher layers, with L this site's own of the round before, S the average that
        came, and W in [0, 1] learnt by descent on the partial cross entropy; W persists. Returns its mean.
        """
        model, kept = site_round.model, site_round.kept
        average = {name: value.detach().clone() for name, value in model.higher_layers().items()}
        own = {name: kept[f"{OWN}{name}"].to(site_round.device) for name in average}
        apart = {name: average[name] - own[name] for name in average}
        first = f"{MIX}{next(iter(average))}" not in kept
        mix = {name: kept.get(f"{MIX}{name}", torch.ones_like(own[name])).to(site_round.device) for name in average}
        model.eval()  # dropout and running statistics are the training's
        losses: list[float] = []
        for epoch in range(MOST_EPOCHS if first else 1):
            batches = math.ceil(len(labelled_indices) / self.config.batch_size)
            for chosen in self.draws(site_round, labelled_indices, batches * (epoch + 1))[batches * epoch :]:
                images, allowed = self.batch(site_round, chosen)
                theta = {name: (own[name] + apart[name] * mix[name]).requires_grad_(True) for name in own}
                loss = candidate_cross_entropy(functional_call(model, theta, (images,)), allowed)
                slopes = torch.autograd.grad(loss, list(theta.values()))
                for name, slope in zip(theta, slopes, strict=True):
                    mix[name] = (mix[name] - slope * apart[name]).clamp(0, 1)
                losses.append(float(loss.detach()))
            if len(losses) >= LOOKED_AT and float(np.std(losses[-LOOKED_AT:])) < SETTLED:
                break
        with torch.no_grad():
            for name, value in model.higher_layers().items():
                value.copy_(own[name] + apart[name] * mix[name])
        kept |= {f"{MIX}{name}": value.cpu() for name, value in mix.items()}
        return float(torch.cat([value.flatten() for value in mix.values()]).mean())

    def _train_only(self, model: SiteUNet, body: bool) -> None:
        for name, value in model.named_parameters():
            value.requires_grad_(name.startswith("final_conv") != body)

    def _set_rates(self, site_round: SiteRound, done: int) -> None:
        rate = self.rate * (1 - done / (self.config.rounds * self.config.updates)) ** POWER
        for optimizer in site_round.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = rate
