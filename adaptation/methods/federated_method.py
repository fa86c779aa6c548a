"""One interface for methods by which sites with uneven labels train a segmenter together.

A method says what a round is at a site, what of the model leaves it, and how the researcher weighs the sites. It knows
neither Fed-BioMed nor files: real nodes (`fedfactory.node.plans.segmentation_plan`) and studies in one process run the
same code. A new method is a subclass in a module of its own and a line in `fedfactory.adaptation.methods.registry`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ...errors import ConfigError, FederationError, TrainingError
from ..augmentation import ROTATION, appearance, geometry
from ..labels.candidate_labels import SiteSlices, candidate_masks, check_classes
from ..losses.partial_losses import partial_loss
from ..networks.site_network import GROUPS, NORMS, SIDE_MULTIPLE, SiteUNet
from .catalogue import METHOD_CATALOGUE, MethodDescription


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What all sites of a federated segmentation share. Raises: ConfigError if a value is out of range.

    Attributes:
        method: name, see `fedfactory.adaptation.methods.registry`. options: the method's own settings.
        classes: label values, background included. size: pixels per side of the slices.
        sites: number of sites. rounds, updates: how many, and steps of a site in each.
        width: channels of the network's first level.
        norm: "group", or "batch" as FedAvg, FedBN and FedICRA were published with; FedMix and gaze have groups always.
        learning_rate: None takes the method's own.
        mirror, rotation: of the augmentation, see `SegmenterConfig`.
    """

    method: str
    classes: int
    size: int
    sites: int
    rounds: int
    updates: int = 20
    batch_size: int = 12
    width: int = 16
    norm: str = "group"
    learning_rate: float | None = None
    mirror: bool = True
    rotation: float = ROTATION
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_classes(self.classes)
        for name in ("sites", "rounds", "updates", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.size < 2 * SIDE_MULTIPLE or self.size % SIDE_MULTIPLE:
            raise ConfigError(f"size is {self.size}; choose a multiple of {SIDE_MULTIPLE} from {2 * SIDE_MULTIPLE}")
        if self.norm not in NORMS:
            raise ConfigError(f"norm is '{self.norm}'; choose one of {', '.join(NORMS)}")
        if self.width < GROUPS or self.width % GROUPS:
            raise ConfigError(f"width is {self.width}; choose a multiple of {GROUPS}")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise ConfigError("learning_rate must be positive")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MethodConfig:
        """Raises: ConfigError for unknown or impossible settings."""
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"these settings of a method are not usable ({error})") from None


@dataclass
class SiteRound:
    """One round at one site.

    Attributes:
        model: what came, with what stayed here in its place; changed in place.
        optimizers: by name, with their state of the round before.
        data: the site's training slices.
        site: its index among the sites. number: of the round, from 1.
        kept: what the method keeps at the site between rounds, tensors and numbers; never sent.
        network: name of the one that the site has chosen. public: the labelled slices that all sites have.
        modalities: by name, where a method tells them apart; `data` are all of them.
    """

    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    data: SiteSlices
    site: int
    number: int
    kept: dict[str, Any]
    network: str = ""
    public: SiteSlices | None = None
    modalities: dict[str, SiteSlices] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return next(iter(self.model.state_dict().values())).device


@dataclass(frozen=True, kw_only=True)
class SiteContext:
    """Whose segmenter, and for which images: the site's index, the network it chose, the modality; "" where a method
    asks for none."""

    site: int = 0
    network: str = ""
    modality: str = ""


@dataclass(frozen=True)
class SiteUpdate:
    """What a site says of its round.

    Attributes:
        samples: slices that taught; 0 for a site that trained nothing.
        loss: mean of the steps' losses, or of the one that weighs the sites; NaN without a step.
        numbers: further ones, by name.
    """

    samples: int
    loss: float
    numbers: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, float]:
        return {"samples": self.samples, "loss": self.loss, **self.numbers}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SiteUpdate:
        """From a reply, whatever else it says."""
        known = {name: float(value) for name, value in values.items() if isinstance(value, (int, float))}
        samples, loss = int(known.pop("samples")), known.pop("loss")
        return cls(samples, loss, known)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Of a method without settings of its own."""


class FederatedMethod(ABC):
    """A way of training together.

    Attributes:
        description: the method in words.
        Options: record of its settings.
        default_rate: learning rate where the configuration has none.
        public: these slices, at the researcher.
    """

    description: ClassVar[MethodDescription]
    Options: ClassVar[type] = NoOptions
    default_rate: ClassVar[float] = 1e-3
    public: SiteSlices | None = None

    def __init__(self, config: MethodConfig) -> None:
        self.config = config
        try:
            self.options = self.Options(**config.options)
        except TypeError as error:
            raise ConfigError(f"{self.description.name}: these options are not usable ({error})") from None
        self.rate = config.learning_rate or self.default_rate
        self.geometry = geometry(mirror=config.mirror, rotation=config.rotation)
        self.appearance = appearance()

    def build(self) -> nn.Module:
        """The model that travels, the same at every site for the same seed."""
        with seeded(seed_of(self.config.seed)):
            return self.network()

    @abstractmethod
    def network(self) -> nn.Module:
        """A fresh model; random numbers are seeded outside."""

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"all": torch.optim.Adam(model.parameters(), self.rate)}

    def local_parameters(self, model: nn.Module) -> set[str]:
        """Names of the tensors of the model that stay at their site, between rounds too."""
        return set()

    @property
    def server(self) -> nn.Module | None:
        """A segmenter of the researcher's own, where the method trains one."""
        return None

    @property
    def has_average(self) -> bool:
        """Whether the model that comes to a site is a segmenter."""
        return True

    def segmenter(self, model: nn.Module, context: SiteContext, kept: Mapping[str, Any] | None = None) -> nn.Module:
        """A network from slices (B, 1, S, S) to logits (B, classes, S, S), of the model and what a site keeps."""
        return model

    @abstractmethod
    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        """The site's share of a round. Raises: TrainingError if a loss is NaN or infinite."""

    def shares(self, site_updates: Sequence[SiteUpdate]) -> list[float]:
        """Weights of the sites in the average, adding up to one; all 0 if no site has trained."""
        total = sum(site_update.samples for site_update in site_updates)
        return [site_update.samples / total if total else 0.0 for site_update in site_updates]

    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """At the researcher: what all sites get next, and each one's part in it.

        Args:
            site_updates: by site, in the order of the sites. sent: of a site, its tensors by name; asked one at a time.
            before: what the sites had got for this round.

        Raises: FederationError for NaN or infinite tensors of a site that counts.
        """
        shares = dict(zip(site_updates, self.shares(list(site_updates.values())), strict=True))
        return weighted_mean(sent, shares, before), shares

    def batch(self, site_round: SiteRound, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """`augmented`, of the site's slices."""
        return self.augmented(site_round.data, chosen, site_round.device)

    def augmented(self, data: SiteSlices, chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Augmented slices (B, 1, S, S) in [-1, 1] and their candidates (B, classes, S, S), see `candidate_masks`.

        Draws from numpy's global generator.
        """
        one = self.geometry(
            data=data.images[chosen][:, None].astype(np.float32),
            seg=data.candidates[chosen][:, None].astype(np.float32),
        )
        one = self.appearance(**one)
        candidates = torch.from_numpy(one["seg"][:, 0].astype(np.int64)).to(device)
        return torch.from_numpy(one["data"]).float().to(device), candidate_masks(candidates, self.config.classes)

    def draws(self, site_round: SiteRound, among: np.ndarray, updates: int, *stream: int) -> list[np.ndarray]:
        """`updates` batches of indices: passes over `among`, each in an order of its own; every stream has others."""
        rng = np.random.default_rng((self.config.seed, site_round.site, site_round.number, *stream))
        wanted = updates * self.config.batch_size
        order = np.concatenate([rng.permutation(among) for _ in range(math.ceil(wanted / len(among)))])
        return list(order[:wanted].reshape(updates, -1))

    def seeded_round(self, site_round: SiteRound) -> Any:
        """Random numbers of a round, that neither depend on those before nor disturb others."""
        return seeded(seed_of(self.config.seed, site_round.site, site_round.number))

    def step(self, site_round: SiteRound, loss: Tensor, names: Sequence[str] = ("all",)) -> float:
        """One update by the optimizers named. Raises: TrainingError before anything moves if the loss is no number."""
        self.check(loss, site_round.number)
        for name in names:
            site_round.optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        for name in names:
            site_round.optimizers[name].step()
        return float(loss.detach())

    def check(self, loss: Tensor, number: int) -> None:
        """Raises: TrainingError if the loss of a round is NaN or infinite."""
        if not torch.isfinite(loss):
            raise TrainingError(f"{self.description.name}: the loss is {float(loss)} in round {number}")


class FederatedAveraging(FederatedMethod):
    """Every site trains the whole network with whatever labels it has; weights are averaged by numbers of slices
    (McMahan et al. 2017). The ground that other methods stand on."""

    description = METHOD_CATALOGUE["fedavg"]

    def network(self) -> nn.Module:
        return SiteUNet(self.config.classes, width=self.config.width, norm=self.config.norm)

    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        labelled_indices = site_round.data.labelled_indices
        if not len(labelled_indices):
            return SiteUpdate(0, math.nan)
        before = {name: value.detach().clone() for name, value in site_round.model.named_parameters()}
        site_round.model.train()
        with self.seeded_round(site_round):
            losses = []
            for chosen in self.draws(site_round, labelled_indices, self.config.updates):
                images, allowed = self.batch(site_round, chosen)
                loss = partial_loss(site_round.model(images), allowed) + self.proximal_term(site_round.model, before)
                losses.append(self.step(site_round, loss))
        return SiteUpdate(len(labelled_indices), float(np.mean(losses)))

    def proximal_term(self, model: nn.Module, before: dict[str, Tensor]) -> Tensor | float:
        """A further term, of the weights alone."""
        return 0.0


class LocalTraining(FederatedAveraging):
    """Every site for itself: what federation must beat."""

    description = METHOD_CATALOGUE["local"]

    def local_parameters(self, model: nn.Module) -> set[str]:
        return set(model.state_dict())


@dataclass(frozen=True, kw_only=True)
class ProximalOptions:
    """proximal: weight of mu / 2 |w - w_global|^2."""

    proximal: float = 0.01

    def __post_init__(self) -> None:
        if not self.proximal >= 0:
            raise ConfigError(f"proximal is {self.proximal}; it must not be negative")


class FederatedProximal(FederatedAveraging):
    """Federated averaging whose sites are held near what came (Li et al. 2020)."""

    description = METHOD_CATALOGUE["fedprox"]
    Options = ProximalOptions

    def proximal_term(self, model: nn.Module, before: dict[str, Tensor]) -> Tensor | float:
        apart = sum((value - before[name]).square().sum() for name, value in model.named_parameters())
        return self.options.proximal / 2 * apart


class FederatedNorms(FederatedAveraging):
    """Federated averaging with normalisation layers of each site's own (FedBN, Li et al. 2021)."""

    description = METHOD_CATALOGUE["fedbn"]

    def local_parameters(self, model: nn.Module) -> set[str]:
        return model.norm_names()


def weighted_mean(
    sent: Callable[[int], Mapping[str, Tensor]], shares: Mapping[int, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean of the sites' tensors, one site in memory at a time; `before` where no site has a share.

    Args:
        sent: of a site, name to tensor. Whole numbers, such as counters of batches, are rounded.
        shares: by site, adding up to one, or all 0.

    Raises: FederationError for NaN or infinite weights of a site that counts.
    """
    return mean_by_name(sent, {site: dict.fromkeys(before, share) for site, share in shares.items()}, before)


def mean_by_name(
    sent: Callable[[int], Mapping[str, Tensor]],
    shares: Mapping[int, Mapping[str, float]],
    before: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """As `weighted_mean`, with shares by site and name of a tensor."""
    sums: dict[str, Tensor] = {}
    for site, own in shares.items():
        if not any(own.values()):
            continue
        for name, tensor in sent(site).items():
            if not own[name]:
                continue
            if not torch.isfinite(tensor).all():
                raise FederationError(f"site {site + 1} sent NaN or infinite weights")
            sums[name] = sums.get(name, 0) + own[name] * tensor.double()
    merged = dict(before)
    for name, tensor in sums.items():
        kind = before[name].dtype
        merged[name] = tensor.to(kind) if kind.is_floating_point else tensor.round().to(kind)
    return merged
