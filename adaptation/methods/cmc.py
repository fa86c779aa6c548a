"""CMC: semi-supervised segmentation of several modalities that are not aligned (arXiv 2408.07341)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import ConfigError, NodeDataError
from ..labels.candidate_labels import SiteSlices
from ..losses.cmc_losses import AGREEMENTS, DESCRIPTORS, channel_consistency, class_agreement, prototype_agreement
from ..losses.partial_losses import partial_loss
from ..network_names import check_modality
from ..networks.modality_network import FUSION_MODES, SHARINGS, ModalityUNet, OneModality, modality_of
from .catalogue import METHOD_CATALOGUE
from .federated_averaging import WeightAveragingMethod
from .interface.aggregation import mean_by_name
from .interface.option_checks import check_at_least, check_channels, check_choice, check_fraction
from .interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate

RAMPS = ("up", "down")
VIEWS = ONE, ALL = ("one", "all")
SLICES_OF = "modality_slices_"  # prefix of a modality's name in a site's numbers: how many slices of it the site has
RAMP_STEEPNESS = 5.0  # of the ramp exp(-5 (1 - t)^2)
WEIGHT_DECAY = 1e-5


@dataclass(frozen=True, kw_only=True)
class CMCOptions:
    """CMC's terms and weights. Raises: ConfigError if a value is out of range.

    Attributes:
        modalities: names of the one or two modalities; the researcher sets them from what the sites announce.
        modality_channels: channels of the slices of each modality, in the order of `modalities`; empty where all have
            the method's.
        encoder_sharing: what modalities share of the encoder: "shared", "norm_specific" or "separate", see
            `ModalityUNet`.
        decoder_sharing: the same for the decoder.
        fusion_mode: how fused features join those of a modality, "concat" or "add".
        start: share of the updates after which slices without labels are used for training; the weights of their terms
            rise, or fall, from there to the end.
        channel_weight: weight of the consistency of channels.
        descriptor: what describes a channel, see `channel_consistency`.
        agreement: agreement of classes: "prototype", "voxel" for slices of two modalities on one grid, or "off".
        agreement_weight: weight of the agreement of classes.
        agreement_ramp: whether that weight goes "up" with time, or "down" as in the released code.
        view_weight: weight of the consistency of two views of a slice.
        views: where two views must agree: at sites with "one" modality, where nothing else teaches without labels, or
            in each modality of "all" sites.
        unfused_share: share of the updates in which modalities are not fused, so that one modality suffices after
            training.
    """

    modalities: tuple[str, ...] = ()
    modality_channels: tuple[int, ...] = ()
    encoder_sharing: str = "norm_specific"
    decoder_sharing: str = "norm_specific"
    fusion_mode: str = "concat"
    start: float = 0.0
    channel_weight: float = 0.1
    descriptor: str = "gram"
    agreement: str = "prototype"
    agreement_weight: float = 0.1
    agreement_ramp: str = "up"
    view_weight: float = 1.0
    views: str = "one"
    unfused_share: float = 0.3

    def __post_init__(self) -> None:
        for name in ("modalities", "modality_channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON has lists, no tuples
        if len(self.modalities) not in (1, 2) or len(set(self.modalities)) < len(self.modalities):
            raise ConfigError(f"modalities is {', '.join(self.modalities) or 'empty'}; name one or two different ones")
        for name in self.modalities:
            check_modality(name)
        for count in self.modality_channels:
            check_channels("modality_channels", count)
        if self.modality_channels and len(self.modality_channels) != len(self.modalities):
            raise ConfigError(
                f"modality_channels has {len(self.modality_channels)} numbers; it must have {len(self.modalities)}, "
                "one for each of modalities"
            )
        check_choice("encoder_sharing", self.encoder_sharing, SHARINGS)
        check_choice("decoder_sharing", self.decoder_sharing, SHARINGS)
        check_choice("fusion_mode", self.fusion_mode, FUSION_MODES)
        check_choice("descriptor", self.descriptor, DESCRIPTORS)
        check_choice("agreement", self.agreement, AGREEMENTS)
        check_choice("agreement_ramp", self.agreement_ramp, RAMPS)
        check_choice("views", self.views, VIEWS)
        for name in ("channel_weight", "agreement_weight", "view_weight"):
            check_at_least(name, getattr(self, name), 0)
        check_fraction("start", self.start)
        check_fraction("unfused_share", self.unfused_share)


class CMC(WeightAveragingMethod):
    """One network for two modalities, fused where a site has both; on slices without labels, channels and classes of
    one modality must correspond to those of the other. Sites may lack a modality."""

    description = METHOD_CATALOGUE["cmc"]
    Options = CMCOptions

    def network(self) -> nn.Module:
        counts = self.channels_by_modality
        own = self.options
        return ModalityUNet(
            self.config.classes,
            list(counts),
            self.config.width,
            depth=self.config.levels,
            fold=self.config.pixel_fold,
            channels=list(counts.values()),
            encoder_sharing=own.encoder_sharing,
            decoder_sharing=own.decoder_sharing,
            fusion_mode=own.fusion_mode,
        )

    @property
    def channels_by_modality(self) -> dict[str, int]:
        """Channels of the slices of each modality, in the order of the method's modalities."""
        own = self.options
        counts = own.modality_channels or [self.config.channels] * len(own.modalities)
        return dict(zip(own.modalities, counts, strict=True))

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.AdamW(model.parameters(), self.rate, weight_decay=WEIGHT_DECAY)}

    def segmenter(self, model: nn.Module, context: SiteContext, state: MethodState | None = None) -> nn.Module:
        """The network of the context's modality; see `FederatedMethod.segmenter` for the shapes."""
        return OneModality(model, context.modality)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        """Raises: NodeDataError for a modality, or a number of channels, that the method does not have."""
        held = self._held(site_round)
        labelled_indices = {name: data.labelled_indices for name, data in held.items()}
        last = self.config.updates - 1
        if not any(map(len, labelled_indices.values())) and not self._uses_unlabelled(site_round, last):
            return SiteUpdate(0, math.nan)
        updates, labelled, unlabelled = self.config.updates, {}, {}
        for stream, (name, data) in enumerate(held.items()):
            everything = np.arange(len(data))
            preferred = labelled_indices[name] if len(labelled_indices[name]) else everything
            labelled[name] = self.draws(site_round, preferred, updates, stream=stream)
            unlabelled[name] = self.draws(site_round, everything, updates, stream=len(held) + stream)
        site_round.model.train()
        with self.seeded_round(site_round):
            losses = []
            for update in range(updates):
                chosen = {name: batches[update] for name, batches in labelled.items()}
                loss = self._supervised_loss(site_round, held, chosen=chosen, labelled_indices=labelled_indices)
                if self._uses_unlabelled(site_round, update):
                    chosen = {name: batches[update] for name, batches in unlabelled.items()}
                    progress = self._progress(site_round, update)
                    loss = loss + self._unsupervised_loss(site_round, held, chosen=chosen, progress=progress)
                if loss.requires_grad:
                    losses.append(self.step(site_round, loss, update=update))
        if not losses:
            return SiteUpdate(0, math.nan)
        numbers = {f"{SLICES_OF}{name}": float(len(data)) for name, data in held.items()}
        return SiteUpdate(sum(len(data) for data in held.values()), float(np.mean(losses)), numbers)

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """Weighted means of the tensors by name: the tensors of a modality over the sites that have it, in proportion
        to their slices of it; all others over all sites. The tensors of a modality that no site has stay unchanged."""
        total = sum(site_update.samples for site_update in site_updates.values())
        slices_of = {
            name: sum(site_update.numbers.get(f"{SLICES_OF}{name}", 0.0) for site_update in site_updates.values())
            for name in self.options.modalities
        }
        shares: dict[int, float] = {}
        shares_by_name: dict[int, dict[str, float]] = {}
        for site, site_update in site_updates.items():
            shares[site] = site_update.samples / total if total else 0.0
            own = {
                name: site_update.numbers.get(f"{SLICES_OF}{name}", 0.0) / count if count else 0.0
                for name, count in slices_of.items()
            }
            shares_by_name[site] = {name: own.get(modality_of(name), shares[site]) for name in before}
        return mean_by_name(sent, shares_by_name, before), shares

    def consistency(self, model: ModalityUNet, images: dict[str, Tensor], progress: float) -> Tensor:
        """The unsupervised terms with their weights, a scalar.

        Args:
            images: (B, channels, S, S) in [-1, 1] by modality, one or two.
            progress: share of the training that is done, from `start` to 1.
        """
        own = self.options
        since = (progress - own.start) / (1 - own.start) if own.start < 1 else 1.0
        rising = math.exp(-RAMP_STEEPNESS * (1 - since) ** 2)
        loss = torch.zeros((), device=next(iter(images.values())).device)
        if len(images) == 1 or own.views == ALL:
            views = [self._view_consistency(model, weak, name) for name, weak in images.items()]
            loss = own.view_weight * rising * torch.stack(views).mean()
        if len(images) == 1:
            return loss
        found = self.outputs(model, images)
        (z_a, d_a, f_a), (z_b, d_b, f_b) = found.values()
        loss = loss + own.channel_weight * rising * channel_consistency(f_a, f_b, own.descriptor)
        falling = (math.cos(math.pi * since) + 1) / 2
        weight = own.agreement_weight * (rising if own.agreement_ramp == "up" else falling)
        if own.agreement == "voxel":
            loss = loss + weight * class_agreement(z_a, z_b)
        elif own.agreement == "prototype":
            loss = loss + weight * prototype_agreement((z_a, d_a), (z_b, d_b))
        return loss

    def outputs(
        self, model: ModalityUNet, images: dict[str, Tensor], *, mix: bool = False
    ) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Logits (B, C, S, S), decoder features (B, K, S, S) and `described_features` (B, F, s, s) by modality.

        Args:
            images: (B, channels, S, S) in [-1, 1] by modality; two modalities are fused.
            mix: whether a random share of the calls does not fuse them.
        """
        encoded = {name: model.encode(batch, name) for name, batch in images.items()}
        unfused = len(images) == 1 or (mix and np.random.uniform() < self.options.unfused_share)
        found = {}
        for name, (skips, deep) in encoded.items():
            pair = (deep, deep) if unfused else tuple(features for _, features in encoded.values())
            found[name] = (*model.decode(model.fused(deep, *pair), skips, name), described_features([*skips, deep]))
        return found

    def _held(self, site_round: SiteRound) -> dict[str, SiteSlices]:
        """The site's slices by modality, in the order of the method's modalities."""
        wanted, held = self.options.modalities, site_round.modalities
        if not held or set(held) - set(wanted):
            raise NodeDataError(
                f"this site's modalities are {', '.join(sorted(held)) or 'not named'}; the method needs some of "
                f"{', '.join(wanted)} and no others"
            )
        for name, data in held.items():
            data.require_channels(self.channels_by_modality[name])
        return {name: held[name] for name in wanted if name in held}

    def _supervised_loss(
        self,
        site_round: SiteRound,
        held: dict[str, SiteSlices],
        *,
        chosen: dict[str, np.ndarray],
        labelled_indices: dict[str, np.ndarray],
    ) -> Tensor:
        """Mean of the modalities' losses, a scalar; a modality without labels takes part in the fusion only.

        Args:
            held: slices by modality.
            chosen: (B,) indices of the batch by modality.
            labelled_indices: (N,) indices of all labelled slices by modality.
        """
        views = {name: self.augmented(data, chosen[name], site_round.device) for name, data in held.items()}
        outputs = self.outputs(site_round.model, {name: images for name, (images, _) in views.items()}, mix=True)
        losses = [
            partial_loss(outputs[name][0], allowed)
            for name, (_, allowed) in views.items()
            if len(labelled_indices[name])
        ]
        return torch.stack(losses).mean() if losses else torch.zeros((), device=site_round.device)

    def _unsupervised_loss(
        self, site_round: SiteRound, held: dict[str, SiteSlices], *, chosen: dict[str, np.ndarray], progress: float
    ) -> Tensor:
        """`consistency` of augmented slices with the indices `chosen` (B,) by modality."""
        images = {name: self.augmented(data, chosen[name], site_round.device)[0] for name, data in held.items()}
        return self.consistency(site_round.model, images, progress)

    def _view_consistency(self, model: ModalityUNet, weak: Tensor, modality: str) -> Tensor:
        """Squared distance of the predictions for slices (B, channels, S, S) and for these with another appearance."""
        strong = self.restyled(weak)
        with torch.no_grad():
            target = torch.softmax(model(weak, modality), 1)
        found = torch.softmax(model(strong, modality), 1)
        return (found - target).square().sum(1).mean()

    def _progress(self, site_round: SiteRound, update: int) -> float:
        return ((site_round.number - 1) + update / self.config.updates) / self.config.rounds

    def _uses_unlabelled(self, site_round: SiteRound, update: int) -> bool:
        return self._progress(site_round, update) >= self.options.start


def described_features(levels: Sequence[Tensor]) -> Tensor:
    """The deepest features with more positions than channels, of features (B, F, s, s) from fine to coarse; the finest
    without any. Channels of fewer positions are linearly dependent, and their correlations say little."""
    fitting = [features for features in levels if features[0, 0].numel() > features.shape[1]]
    return (fitting or levels[:1])[-1]
