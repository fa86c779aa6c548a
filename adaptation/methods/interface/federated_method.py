"""The interface of methods by which sites with uneven labels train a segmenter together.

A method defines what a round is at a site, what of the model leaves the site, and how the researcher aggregates. It
knows neither Fed-BioMed nor files: real nodes (`fedfactory.node.plans.segmentation_plan`) and studies in one process
run the same code. A new method is a subclass in its own module, an entry in `catalogue` and a line in `registry`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ....common.seeding import drawing_on, seed_of, seeded
from ....errors import ConfigError, TrainingError
from ...engine.augmentation import Augmentation, augmented_slices, restyled_slices
from ...engine.random_windows import WindowVariation
from ...engine.segmenter_config import first_guess_contrast
from ...labels.boxes import line_numbers
from ...labels.candidate_labels import SiteSlices, candidate_masks
from ..catalogue import MethodDescription
from ..round_schedule import decayed_rate
from .method_config import COLOURS, MethodConfig
from .site_round import MethodState, SiteContext, SiteRound, SiteUpdate


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """The settings of a method without settings of its own."""


class FederatedMethod(ABC):
    """A federated segmentation method.

    Attributes:
        description: the method in words, from the catalogue.
        Options: record of the method's own settings; it checks them.
        State: record of what the method keeps at a site between rounds.
        default_rate: learning rate where the configuration has none.
        private_rate: the same with differential privacy, whose noise asks for smaller steps.
        has_average: whether the aggregated model is a segmenter.
        config: shared settings.
        options: the method's own settings, an instance of `Options`.
        rate: learning rate of the first update, see `rate_after`.
        augmentation: random position, shape, appearance and, for a first guess, contrast of slices.
        public: the public slices at the researcher, for methods that need them.
    """

    description: ClassVar[MethodDescription]
    Options: ClassVar[type] = NoOptions
    State: ClassVar[type[MethodState]] = MethodState
    default_rate: ClassVar[float] = 3e-3
    private_rate: ClassVar[float] = 1e-3
    has_average: ClassVar[bool] = True
    public: SiteSlices | None = None

    def __init__(self, config: MethodConfig) -> None:
        self.config = config
        self.options: Any = self._options_from(config.options)
        self.rate = config.learning_rate or (self.private_rate if config.private else self.default_rate)
        self.augmentation = Augmentation(
            windows=WindowVariation(rotation=config.rotation, mirror=config.mirror),
            contrast=first_guess_contrast(colour=config.colour) if config.first_guess else None,
            colour=config.colour,
        )

    def _options_from(self, values: Mapping[str, object]) -> object:
        try:
            return self.Options(**values)
        except TypeError as error:
            raise ConfigError(
                f"options are {', '.join(values)}; these must be settings of {self.description.name} ({error})"
            ) from None

    # The model that travels

    def build(self) -> nn.Module:
        """The model that travels, the same at every site for the same seed."""
        with seeded(seed_of(self.config.seed)):
            return self.network()

    @abstractmethod
    def network(self) -> nn.Module:
        """A fresh model that travels; the caller has seeded the random numbers."""

    def local_parameters(self, model: nn.Module) -> set[str]:
        """Names of the model's tensors that stay at their site, between rounds too."""
        return set()

    def segmenter(self, model: nn.Module, context: SiteContext, state: MethodState | None = None) -> nn.Module:
        """A network from slices (B, channels, S, S) in [-1, 1] to logits (B, classes, S, S).

        Args:
            model: the model that travels.
            context: which segmenter is meant.
            state: of the site, for its own segmenter; None for the aggregated one.
        """
        return model

    # At a site

    def new_state(self) -> MethodState:
        """What the method keeps at a site, before the first round."""
        return self.State()

    def optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        """New optimizers of the model that travels, by name; the node keeps their states between rounds."""
        return {}

    @abstractmethod
    def train_round(self, site_round: SiteRound) -> SiteUpdate:
        """Train at the site. Raises: TrainingError if a loss is NaN or infinite."""

    # At the researcher

    @abstractmethod
    def aggregate(
        self,
        site_updates: Mapping[int, SiteUpdate],
        sent: Callable[[int], Mapping[str, Tensor]],
        before: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[int, float]]:
        """The tensors by name that all sites receive next, and the share of each site in them.

        Args:
            site_updates: by site, in the order of the sites.
            sent: returns the tensors of a site by name; called for one site at a time.
            before: tensors by name that the sites had received for this round.

        Raises: FederationError for NaN or infinite tensors of a site with a share.
        """

    @property
    def server(self) -> nn.Module | None:
        """A segmenter that the researcher trains, for methods with such a network."""
        return None

    def server_state(self) -> dict[str, Any]:
        """What the method keeps at the researcher between rounds, besides the tensors that travel: tensors, numbers,
        text, and dictionaries of these. With it an interrupted run goes on; empty for methods that keep nothing."""
        return {}

    def load_server_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `server_state` gave; nothing of methods that keep nothing."""
        if state:
            raise NotImplementedError(f"{self.description.name} keeps nothing at the researcher")

    # Tools of the methods

    def batch(self, site_round: SiteRound, chosen: np.ndarray) -> tuple[Tensor, Tensor]:
        """`augmented` for the site's slices with the indices `chosen` (B,).

        Raises: NodeDataError for slices of another number of channels.
        """
        site_round.data.require_channels(self.config.channels)
        return self.augmented(site_round.data, chosen, site_round.device)

    def augmented(self, data: SiteSlices, chosen: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
        """Augmented slices (B, channels, S, S) in [-1, 1] and candidates (B, classes, S, S), see `candidate_masks`.

        Draws from PyTorch's global generator of the device.
        """
        return self._augmented_with_lines(data, chosen, device)[:2]

    def batch_with_lines(self, site_round: SiteRound, chosen: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """`batch`, and where the rows and columns of boxes lie in it, (B, 2, S, S) int64, see `losses.box_losses`.

        Raises: NodeDataError for slices of another number of channels.
        """
        site_round.data.require_channels(self.config.channels)
        return self._augmented_with_lines(site_round.data, chosen, site_round.device)

    def _augmented_with_lines(
        self, data: SiteSlices, chosen: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        images = torch.from_numpy(data.images[chosen].astype(np.float32))
        maps = torch.from_numpy(data.candidates[chosen].astype(np.int64))[:, None]
        boxed = torch.from_numpy(data.kinds[chosen] == "box")
        if boxed.any():  # rows and columns move with the slice, as its labels do
            maps = torch.cat([maps, line_numbers(images.shape[-1]) * boxed[:, None, None, None]], 1)
        images, maps = self.varied(images, maps, self.augmentation_of(images), device=device)
        allowed = candidate_masks(maps[:, 0], self.config.classes)
        lines = maps[:, 1:] if boxed.any() else torch.zeros_like(maps).expand(-1, 2, -1, -1)
        return images, allowed, lines

    def varied(
        self, images: Tensor, maps: Tensor, augmentation: Augmentation, *, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """`augmented_slices` of images (B, channels, S, S) and maps (B, L, S, S), computed on `device`; random contrast
        is computed on the CPU, image by image."""
        computed_on = device if augmentation.contrast is None else torch.device("cpu")
        with drawing_on(computed_on) as rng:
            images, maps = augmented_slices(images.to(computed_on), maps.to(computed_on), augmentation, rng=rng)
        return images.to(device), maps.to(device)

    def restyled(self, images: Tensor) -> Tensor:
        """Slices (B, channels, S, S) in [-1, 1] with another appearance, drawn from their device's global generator."""
        with drawing_on(images.device) as rng:
            return restyled_slices(images, self.augmentation_of(images), rng=rng)

    def augmentation_of(self, images: Tensor) -> Augmentation:
        """The augmentation of slices (B, channels, S, S), which are colour pictures only if they have three channels: a
        modality beside colour pictures may have others."""
        return replace(self.augmentation, colour=self.config.colour and images.shape[1] == COLOURS)

    def draws(
        self, site_round: SiteRound, among: np.ndarray, updates: int, *, stream: int | None = None
    ) -> list[np.ndarray]:
        """Indices (batch_size,) of `updates` batches: passes over `among` (N,), each in a new random order.

        Args:
            stream: number of an independent sequence of draws within the round; None is the main one.
        """
        numbers = self.seed_numbers(site_round)
        rng = np.random.default_rng(numbers if stream is None else (*numbers, stream))
        wanted = updates * self.config.batch_size
        order = np.concatenate([rng.permutation(among) for _ in range(math.ceil(wanted / len(among)))])
        return list(order[:wanted].reshape(updates, -1))

    def seed_numbers(self, site_round: SiteRound) -> tuple[int, int, int]:
        """From what the draws of a round at a site follow."""
        seed = self.config.seed if site_round.seed is None else site_round.seed
        return seed, site_round.site, site_round.number

    def seeded_round(self, site_round: SiteRound) -> AbstractContextManager:
        """Random numbers of a round that neither depend on earlier draws nor disturb later ones."""
        return seeded(seed_of(*self.seed_numbers(site_round)))

    def rate_after(self, number: int, update: int) -> float:
        """Learning rate of an update, counted from 0, in round `number`, counted from 1, see `decayed_rate`."""
        updates = self.config.updates
        return decayed_rate(self.rate, done=(number - 1) * updates + update, total=self.config.rounds * updates)

    def check_loss(self, loss: Tensor, number: int) -> None:
        """Raises: TrainingError if the loss, a scalar, of round `number` is NaN or infinite."""
        if not torch.isfinite(loss):
            raise TrainingError(
                f"{self.description.name}: the loss is {float(loss)} in round {number}; choose a lower learning_rate"
            )
