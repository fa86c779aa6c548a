"""CMC: semi-supervised segmentation of several modalities that are not aligned (arXiv 2408.07341)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, NodeDataError
from ..labels.candidate_labels import SiteSlices
from ..losses.cmc_losses import AGREEMENTS, DESCRIPTORS, channel_consistency, class_agreement, prototype_agreement
from ..losses.partial_losses import partial_loss
from ..networks.modality_network import ModalityUNet, OneModality, modality_of
from ..networks.network_names import check_modality
from .catalogue import METHOD_CATALOGUE
from .federated_method import FederatedMethod, MethodConfig, SiteContext, SiteRound, SiteUpdate, mean_by_name

RAMPS = ("up", "down")
HELD = "held_"  # in site_updates, before a modality's name: how many slices of it the site has
STEEP = 5.0  # of the ramp exp(-5 (1 - t)^2)
DECAY = 1e-5


@dataclass(frozen=True, kw_only=True)
class CMCOptions:
    """Raises: ConfigError if a value is out of range.

    Attributes:
        modalities: their names, one or two; the researcher sets them from what the sites announce.
        start: share of the updates after which slices without labels teach.
        channels: weight of the channels' consistency; descriptor: see `channel_consistency`.
        agreement: "prototype", "voxel" for slices of two modalities on one grid, or "off". classes: its weight.
        agreement_ramp: whether that weight goes up with time, or down as released.
        views: weight of the consistency of two views, where a site has one modality.
        alone: share of the updates in which modalities are not fused, so that one is enough at the end.
    """

    modalities: tuple[str, ...] = ()
    start: float = 0.7
    channels: float = 0.1
    descriptor: str = "gram"
    agreement: str = "prototype"
    classes: float = 0.1
    agreement_ramp: str = "up"
    views: float = 1.0
    alone: float = 0.3

    def __post_init__(self) -> None:
        _check_modalities(self.modalities)
        if self.descriptor not in DESCRIPTORS or self.agreement not in AGREEMENTS or self.agreement_ramp not in RAMPS:
            raise ConfigError(
                f"descriptor is one of {', '.join(DESCRIPTORS)}, agreement one of {', '.join(AGREEMENTS)}, "
                f"agreement_ramp one of {', '.join(RAMPS)}"
            )
        if min(self.channels, self.classes, self.views) < 0 or not (0 <= self.start <= 1 and 0 <= self.alone <= 1):
            raise ConfigError("weights must not be negative, start and alone are from 0 to 1")


class CMC(FederatedMethod):
    """One network for two modalities, fused where both are there; without labels, what its channels and classes are in
    one modality must be found again in the other. Sites may lack a modality."""

    description = METHOD_CATALOGUE["cmc"]
    Options = CMCOptions
    default_rate = 1e-3

    def __init__(self, config: MethodConfig) -> None:
        if isinstance(given := config.options.get("modalities"), list):  # JSON has no tuples
            config.options["modalities"] = tuple(given)
        super().__init__(config)
        if not self.options.modalities:
            raise ConfigError("cmc: no modality is named")

    def network(self) -> nn.Module:
        return ModalityUNet(self.config.classes, self.options.modalities, self.config.width)

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.AdamW(model.parameters(), self.rate, weight_decay=DECAY)}

    def segmenter(self, model: nn.Module, context: SiteContext, kept: Mapping[str, Any] | None = None) -> nn.Module:
        return OneModality(model, context.modality)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        """Raises: NodeDataError for a modality that the method does not have."""
        held = {name: site_round.modalities[name] for name in self.options.modalities if name in site_round.modalities}
        if set(site_round.modalities) - set(held) or not held:
            raise NodeDataError(
                "this site has other modalities than the method, or has not said of which its slices are"
            )
        labelled_indices = {name: data.labelled_indices for name, data in held.items()}
        numbers = {f"{HELD}{name}": float(len(data)) for name, data in held.items()}
        if not any(len(one) for one in labelled_indices.values()) and not self._unlabelled_now(
            site_round, self.config.updates - 1
        ):
            return SiteUpdate(0, math.nan)
        batches = {
            name: self.draws(
                site_round,
                labelled_indices[name] if len(labelled_indices[name]) else np.arange(len(data)),
                self.config.updates,
                stream,
            )
            for stream, (name, data) in enumerate(held.items())
        }
        free = {
            name: self.draws(site_round, np.arange(len(data)), self.config.updates, len(held) + stream)
            for stream, (name, data) in enumerate(held.items())
        }
        site_round.model.train()
        with self.seeded_round(site_round):
            losses = []
            for update in range(self.config.updates):
                loss = self._labelled(
                    site_round, held, labelled_indices, {name: one[update] for name, one in batches.items()}
                )
                if self._unlabelled_now(site_round, update):
                    progress = self._progress(site_round, update)
                    loss = loss + self._unlabelled(
                        site_round, held, {n: one[update] for n, one in free.items()}, progress
                    )
                if loss.requires_grad:
                    losses.append(self.step(site_round, loss))
        if not losses:
            return SiteUpdate(0, math.nan)
        return SiteUpdate(sum(len(data) for data in held.values()), float(np.mean(losses)), numbers)

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """Name by name: a modality's own tensors are averaged over the sites that have it, by their slices of it; all
        others over all. What nobody has stays as it was."""
        total = sum(site_update.samples for site_update in site_updates.values())
        all_of = {name: sum(site_update.numbers.get(f"{HELD}{name}", 0.0) for site_update in site_updates.values())
                  for name in self.options.modalities}  # fmt: skip
        shares: dict[int, dict[str, float]] = {}
        for site, site_update in site_updates.items():
            share = site_update.samples / total if total else 0.0
            own = {
                n: site_update.numbers.get(f"{HELD}{n}", 0.0) / count if count else 0.0 for n, count in all_of.items()
            }
            shares[site] = {name: own.get(modality_of(name), share) for name in before}
        parts = {site: site_update.samples / total if total else 0.0 for site, site_update in site_updates.items()}
        return mean_by_name(sent, shares, before), parts

    def _labelled(
        self,
        site_round: SiteRound,
        held: dict[str, SiteSlices],
        labelled_indices: dict[str, np.ndarray],
        chosen: dict[str, np.ndarray],
    ) -> Tensor:
        """Mean of the modalities' losses where there are labels; slices without are only fused."""
        views = {name: self.augmented(data, chosen[name], site_round.device) for name, data in held.items()}
        outputs = self.outputs(site_round.model, {name: images for name, (images, _) in views.items()}, mix=True)
        losses = [
            partial_loss(outputs[name][0], allowed)
            for name, (_, allowed) in views.items()
            if len(labelled_indices[name])
        ]
        return torch.stack(losses).mean() if losses else torch.zeros((), device=site_round.device)

    def _unlabelled(
        self, site_round: SiteRound, held: dict[str, SiteSlices], chosen: dict[str, np.ndarray], progress: float
    ) -> Tensor:
        """Consistency of two modalities, or of two views of the only one."""
        images = {name: self.augmented(data, chosen[name], site_round.device)[0] for name, data in held.items()}
        return self.consistency(site_round.model, images, progress)

    def consistency(self, model: ModalityUNet, images: dict[str, Tensor], progress: float) -> Tensor:
        """The unsupervised terms, with their weights at `progress` in [0, 1] of the training."""
        own = self.options
        rising = math.exp(-STEEP * (1 - progress) ** 2)
        if len(images) == 1:
            ((name, weak),) = images.items()
            strong = self.appearance(data=weak.cpu().numpy().copy())["data"]
            with torch.no_grad():
                target = torch.softmax(model(weak, name), 1)
            found = torch.softmax(model(torch.from_numpy(strong).to(weak), name), 1)
            return own.views * rising * (found - target).square().sum(1).mean()
        found = self.outputs(model, images)
        (z_a, d_a, f_a), (z_b, d_b, f_b) = found.values()
        loss = own.channels * rising * channel_consistency(f_a, f_b, own.descriptor)
        falling = (math.cos(math.pi * progress) + 1) / 2
        weight = own.classes * (rising if own.agreement_ramp == "up" else falling)
        if own.agreement == "voxel":
            loss = loss + weight * class_agreement(z_a, z_b)
        elif own.agreement == "prototype":
            loss = loss + weight * prototype_agreement((z_a, d_a), (z_b, d_b))
        return loss

    def outputs(
        self, model: ModalityUNet, images: dict[str, Tensor], *, mix: bool = False
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """By modality: logits, decoder features, deepest features. Two modalities are fused, but, with `mix`, for a
        random share of the calls."""
        encoded = {name: model.encode(one, name) for name, one in images.items()}
        alone = len(images) == 1 or (mix and np.random.uniform() < self.options.alone)
        found = {}
        for name, (skips, deep) in encoded.items():
            pair = (deep, deep) if alone else tuple(one for _, one in encoded.values())
            found[name] = (*model.decode(model.fused(deep, *pair), skips, name), deep)
        return found

    def _progress(self, site_round: SiteRound, update: int) -> float:
        return ((site_round.number - 1) + update / self.config.updates) / self.config.rounds

    def _unlabelled_now(self, site_round: SiteRound, update: int) -> bool:
        return self._progress(site_round, update) >= self.options.start


def _check_modalities(names: tuple[str, ...]) -> None:
    if len(names) > 2 or len(set(names)) < len(names):
        raise ConfigError(f"modalities are {', '.join(names)}; this method knows two different ones")
    for name in names:
        check_modality(name)
