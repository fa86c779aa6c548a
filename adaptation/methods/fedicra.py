"""FedICRA: weak labels of different kinds, one personalised model per site (arXiv 2304.05635)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ...errors import ConfigError
from ..losses.gated_crf import RADIUS, SIGMA_PLACE, gated_crf
from ..losses.partial_losses import candidate_cross_entropy, partial_dice, uncertain
from ..losses.tree_energy import tree_energy
from ..networks.site_network import Encoded, SiteUNet
from .catalogue import METHOD_CATALOGUE
from .federated_averaging import WeightAveragingMethod
from .interface.box_options import BoxOptions, box_loss
from .interface.method_config import MethodConfig
from .interface.option_checks import check_at_least, check_positive
from .interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate
from .round_schedule import body_updates

BODY, OUTPUT = "body", "output"  # names of the optimizers
OUTPUT_LAYER = "final_conv"
MIX_OF = "mix_"  # prefix of a layer's name in a site's numbers
CONVERGENCE_STD = 0.1  # the mixing weights have converged when the last losses have this standard deviation
CONVERGENCE_WINDOW = 10  # number of last losses, batches
MAX_MIXING_EPOCHS = 10  # of the first adaptive aggregation; later ones take one epoch
PUBLISHED_SIZE = 256  # pixels per side


@dataclass(frozen=True, kw_only=True)
class FedICRAOptions(BoxOptions):
    """FedICRA's parts and weights, and those for boxes; a weight of 0 leaves a part out. Raises: ConfigError if a value
    is out of range.

    Attributes:
        tree_weight: weight of the tree energy.
        tree_sigma: its scale of squared differences of intensities, above 0, see `tree_energy`; published: 0.02.
        learnt_trees: whether three trees of learnt embeddings follow the image's tree; published: yes.
        crf_weight: weight of the gated CRF.
        dice_weight: weight of the partial Dice loss, which the other methods have too; published: 0.
        contrast_weight: weight alpha of the site-contrastive term.
        selections: number of deepest encoder levels that select channels by site.
        embedding: channels within the auxiliary heads of the learnt trees; published: 512.
        body_share: share of a round's updates, above 0 and below 1: the last ones, which train everything but the
            output layer; the updates before train the output layer only. Published: the last 3 of 10. None trains all
            layers in every update.
        adaptive: whether sites mix the higher layers of their own model and of the average element by element.
        adaptive_from: first round with that adaptive aggregation.
    """

    tree_weight: float = 0.1
    tree_sigma: float = 0.002
    learnt_trees: bool = False
    crf_weight: float = 0.1
    dice_weight: float = 1.0
    contrast_weight: float = 1.0
    selections: int = 1
    embedding: int = 32
    body_share: float | None = 0.8
    adaptive: bool = True
    adaptive_from: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tree_weight", "crf_weight", "dice_weight", "contrast_weight"):
            check_at_least(name, getattr(self, name), 0)
        check_positive("tree_sigma", self.tree_sigma)
        if self.body_share is not None and not 0 < self.body_share < 1:  # one of both parts would never learn
            raise ConfigError(
                f"body_share is {self.body_share}; choose a share above 0 and below 1, or None, which trains all "
                "layers in every update"
            )
        check_at_least("embedding", self.embedding, 1)
        check_at_least("selections", self.selections, 0)
        check_at_least("adaptive_from", self.adaptive_from, 2)
        if self.contrast_weight and not self.selections:
            raise ConfigError(
                f"contrast_weight is {self.contrast_weight}; it must be 0 without channel selections (selections is 0)"
            )


@dataclass(kw_only=True)
class FedICRAState(MethodState):
    """What adaptive aggregation keeps at a site; the tensors are on the CPU.

    Attributes:
        own: higher layers of the site's own model after its last round, by name; empty before the first.
        mix: mixing weights W in [0, 1] of the same shapes, by name; empty before the first adaptive aggregation.
    """

    own: dict[str, Tensor] = field(default_factory=dict)
    mix: dict[str, Tensor] = field(default_factory=dict)


class FedICRA(WeightAveragingMethod):
    """Adaptive representation (channels are selected by site, and the selections are pushed apart) and adaptive
    aggregation (how much of the average a site adopts is learnt element by element), with energies that carry sparse
    labels to the pixels between them."""

    description = METHOD_CATALOGUE["fedicra"]
    Options = FedICRAOptions
    State = FedICRAState

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if self.options.selections > config.levels:
            raise ConfigError(f"selections is {self.options.selections}; the network has {config.levels} levels")

    def network(self) -> SiteUNet:
        own = self.options
        return SiteUNet(
            self.config.classes,
            **self.config.unet_settings,
            dropout=0.1,
            sites=self.config.sites if own.selections else 0,
            selections=own.selections,
            embedding=own.embedding if own.tree_weight and own.learnt_trees else 0,
        )

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """One for the output layer and one for everything before it, because a round trains them in turn."""
        output = list(model.final_conv.parameters())
        body = [value for name, value in model.named_parameters() if not name.startswith(OUTPUT_LAYER)]
        return {OUTPUT: torch.optim.AdamW(output, self.rate), BODY: torch.optim.AdamW(body, self.rate)}

    def segmenter(self, model: nn.Module, context: SiteContext, state: MethodState | None = None) -> nn.Module:
        """The model, with the channel selection of the site; see `FederatedMethod.segmenter` for the shapes."""
        model.site = context.site
        return model

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        labelled_indices = site_round.data.labelled_indices
        if not len(labelled_indices):
            return SiteUpdate(0, math.nan)
        model, state = site_round.model, cast(FedICRAState, site_round.state)
        model.site = site_round.site
        numbers: dict[str, float] = {}
        with self.seeded_round(site_round):
            if self.options.adaptive and site_round.number >= self.options.adaptive_from and state.own:
                numbers = self.adaptive_aggregation(site_round, labelled_indices)
            model.train()
            losses = []
            for update, chosen in enumerate(self.draws(site_round, labelled_indices, self.config.updates)):
                parts = self._parts_to_train(update)
                self._train_only(model, parts)
                images, allowed, lines = self.batch_with_lines(site_round, chosen)
                loss = self.loss(model, images, allowed, lines=lines, site=site_round.site)
                losses.append(self.step(site_round, loss, parts, update=update))
            model.requires_grad_(True)
        state.own = {name: value.detach().cpu().clone() for name, value in model.higher_layers().items()}
        return SiteUpdate(len(labelled_indices), float(np.mean(losses)), numbers)

    def loss(
        self, model: SiteUNet, images: Tensor, allowed: Tensor, *, site: int, lines: Tensor | None = None
    ) -> Tensor:
        """Partial cross entropy + Dice + boxes + tree energy + gated CRF + site contrast, weighted; a scalar.

        Args:
            images: (B, channels, S, S) in [-1, 1].
            allowed: (B, classes, S, S) bool, candidates.
            site: index of the site.
            lines: (B, 2, S, S), see `box_loss`; None without boxes.
        """
        own = self.options
        encoded = model.encode(images, site)
        decoded = model.decode(encoded.features)
        logits = model.logits(decoded[-1])
        loss = candidate_cross_entropy(logits, allowed)
        if lines is not None:
            loss = loss + box_loss(logits, allowed, lines, own)
        if own.dice_weight:
            loss = loss + own.dice_weight * partial_dice(logits, allowed)
        probabilities, shown = torch.softmax(logits, 1), (images.clamp(-1, 1) + 1) / 2
        if own.tree_weight:
            guides = model.embeddings(decoded) if own.learnt_trees else []
            loss = loss + own.tree_weight * tree_energy(
                probabilities, shown, uncertain(allowed), embeddings=guides, sigma=own.tree_sigma
            )
        if own.crf_weight:
            radius, sigma_place = crf_window(self.config.size)
            crf = gated_crf(probabilities, shown, radius=radius, sigma_place=sigma_place)
            loss = loss + own.crf_weight * crf
        if own.contrast_weight and self.config.sites > 1:
            loss = loss + own.contrast_weight * self.contrast(model, encoded, site=site)
        return loss

    def contrast(self, model: SiteUNet, encoded: Encoded, *, site: int) -> Tensor:
        """Minus the mean squared distance of this site's heatmap to the heatmap of every other site for the same
        features, a scalar.

        The features come from the one forward pass of the round. In a pass of their own for every site, as published,
        dropout draws other features, and their distance is mostly that of the draws.
        """
        others = [other for other in range(self.config.sites) if other != site]
        with torch.no_grad():
            theirs = [model.heatmap(encoded.entering, other) for other in others]
        return -torch.stack([F.mse_loss(encoded.heatmap, other) for other in theirs]).mean()

    def adaptive_aggregation(self, site_round: SiteRound, labelled_indices: np.ndarray) -> dict[str, float]:
        """Mix the higher layers of the site's own model and of the received average.

        theta = L + (S - L) W, with L this site's own layers after its last round, S the average, and W in [0, 1]
        learnt by gradient descent on the partial cross entropy. W persists in the site's state.

        Args:
            site_round: its model is changed in place.
            labelled_indices: (N,) indices of the slices to learn W from.

        Returns: `mixing_numbers` of W.
        """
        model, state = site_round.model, cast(FedICRAState, site_round.state)
        average = {name: value.detach().clone() for name, value in model.higher_layers().items()}
        own = {name: state.own[name].to(site_round.device) for name in average}
        difference = {name: average[name] - own[name] for name in average}
        epochs = 1 if state.mix else MAX_MIXING_EPOCHS
        mix = {name: state.mix.get(name, torch.ones_like(own[name])).to(site_round.device) for name in average}
        model.eval()  # the mixing is learnt without dropout and with fixed running statistics
        losses: list[float] = []
        for epoch in range(epochs):
            batches = math.ceil(len(labelled_indices) / self.config.batch_size)
            for chosen in self.draws(site_round, labelled_indices, batches * (epoch + 1))[batches * epoch :]:
                images, allowed = self.batch(site_round, chosen)
                theta = {name: (own[name] + difference[name] * mix[name]).requires_grad_(True) for name in own}
                loss = candidate_cross_entropy(functional_call(model, theta, (images,)), allowed)
                slopes = torch.autograd.grad(loss, list(theta.values()))
                for name, slope in zip(theta, slopes, strict=True):
                    mix[name] = (mix[name] - slope * difference[name]).clamp(0, 1)
                losses.append(float(loss.detach()))
            last = losses[-CONVERGENCE_WINDOW:]
            if len(last) == CONVERGENCE_WINDOW and float(np.std(last)) < CONVERGENCE_STD:
                break
        with torch.no_grad():
            for name, value in model.higher_layers().items():
                value.copy_(own[name] + difference[name] * mix[name])
        state.mix = {name: value.cpu() for name, value in mix.items()}
        return mixing_numbers(mix)

    def _parts_to_train(self, update: int) -> list[str]:
        """Names of the optimizers that the round's update with this number, from 0, steps."""
        share, updates = self.options.body_share, self.config.updates
        if share is None:
            return [BODY, OUTPUT]
        return [BODY] if update >= updates - body_updates(updates, share) else [OUTPUT]

    def _train_only(self, model: SiteUNet, parts: Sequence[str]) -> None:
        """Gradients for the parameters of these optimizers alone."""
        for name, value in model.named_parameters():
            value.requires_grad_((OUTPUT if name.startswith(OUTPUT_LAYER) else BODY) in parts)


def crf_window(size: int) -> tuple[int, float]:
    """Radius of the gated CRF's window and standard deviation of its place, pixels, for slices of `size` pixels a side.

    The window is as wide in the organ as in published slices: in small slices a window of 11 pixels reaches from one
    structure over the next, and the energy is lowest where everything is background.
    """
    scale = size / PUBLISHED_SIZE
    return max(1, round(RADIUS * scale)), SIGMA_PLACE * scale


def mixing_numbers(mix: Mapping[str, Tensor]) -> dict[str, float]:
    """What a site reports of its mixing weights, in [0, 1]: "adopted", their mean, the share of the average that the
    site adopts; and "mix_" with a layer's name, such as "mix_upcat_1" or "mix_final_conv", the mean of each layer.

    Args:
        mix: mixing weights by name of a parameter, whose first part is the layer's.
    """
    layers: dict[str, list[Tensor]] = {}
    for name, value in mix.items():
        layers.setdefault(name.split(".")[0], []).append(value.flatten())
    numbers = {f"{MIX_OF}{layer}": float(torch.cat(values).mean()) for layer, values in layers.items()}
    return {"adopted": float(torch.cat([value.flatten() for value in mix.values()]).mean()), **numbers}
