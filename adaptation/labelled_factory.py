"""A factory that draws labelled slices, and its file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..common.weights_file import load_strictly, read_weights, write_weights
from ..errors import CheckpointError, ConfigError, UsageError
from ..generative.config import FactoryConfig
from ..generative.factory_facts import FactoryFacts
from ..generative.factory_file import TrainedFactory
from ..generative.networks.build import make_generator
from ..generative.networks.generator import Synthesis
from ..generative.synthesis import synthesise_volume
from .networks.label_branch import BranchEnsemble, LabelBranch
from .segmenter import Segmenter

MOST_BRANCHES, MOST_CLASSES = 20, 255
KIND = "labelled factory"
VIEWS = ("view", "own")


@dataclass
class LabelledFactory:
    """A factory that draws labelled slices.

    Attributes:
        factory: the generator it draws with.
        branches: its labels are the mean of what these say; the best one first.
        robust: the labelled site's segmenter, trained with random contrasts; gives every site's own images a first
            guess.
        card: "classes", "labelled_domain", "agreement" and "validated_on" (see `train_label_branch`), "labels_from":
            by domain, "view" (the labelled domain's view of the same latent gives the labels) or "own" (the domain's
            own features do).
    """

    factory: TrainedFactory
    branches: list[LabelBranch]
    robust: Segmenter
    card: dict[str, Any]

    def save(self, path: str | Path) -> None:
        tensors = {f"g_ema.{name}": tensor for name, tensor in self.factory.generator.state_dict().items()}
        for number, branch in enumerate(self.branches):
            tensors |= {f"branch{number}.{name}": tensor for name, tensor in branch.state_dict().items()}
        tensors |= {f"robust.{name}": tensor for name, tensor in self.robust.network.state_dict().items()}
        write_weights(path, tensors, self.full_card())

    @classmethod
    def load(cls, path: str | Path) -> LabelledFactory:
        """Raises: UsageError if the file is missing, CheckpointError if it is damaged or of another kind."""
        tensors, card = read_weights(path, kind=KIND)
        try:
            made = cls.from_card(card)
        except UsageError as error:
            raise CheckpointError(f"{path}: {error}") from None
        named = {f"branch{number}.": branch for number, branch in enumerate(made.branches)}
        networks = {"g_ema.": made.factory.generator, "robust.": made.robust.network, **named}
        for prefix, network in networks.items():
            own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            load_strictly(network, own, path)
        return made

    def full_card(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able."""
        factory = self.factory
        return {
            "kind": KIND,
            "config": factory.config.to_dict(),
            "spacing": factory.spacing,
            "height": factory.height,
            "facts": factory.facts.to_dict(),
            "robust": {"format": self.robust.format.to_dict(), **self.robust.card},
            "branches": len(self.branches),
            **self.card,
        }

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> LabelledFactory:
        """Untrained, to load weights into. Raises: UsageError for a card that is not usable."""
        try:
            generator = make_generator(FactoryConfig.from_dict(card["config"])).eval()
            if not 1 <= card["branches"] <= MOST_BRANCHES or not 2 <= card["classes"] <= MOST_CLASSES:
                raise UsageError(f"{card['branches']} label branches of {card['classes']} classes")
            branches = [LabelBranch.for_generator(generator, card["classes"]).eval() for _ in range(card["branches"])]
            robust = Segmenter.from_card(card["robust"])
            facts = FactoryFacts.from_dict(card["facts"])
            factory = TrainedFactory(
                generator=generator, latest={}, spacing=card["spacing"], height=card["height"], facts=facts
            )
            kept = {k: card[k] for k in ("classes", "labelled_domain", "agreement", "validated_on", "labels_from")}
            factory.config.domain_index(kept["labelled_domain"])
            if any(kept["labels_from"][domain] not in VIEWS for domain in factory.config.domains):
                raise UsageError("labels_from names something unknown")
        except (KeyError, TypeError, ConfigError, UsageError) as error:
            raise UsageError(f"its card is not usable ({error})") from None
        return cls(factory, branches, robust, kept)

    def to(self, device: torch.device | str) -> LabelledFactory:
        for network in (self.factory.generator, *self.branches):
            network.to(device)
        return self

    @torch.no_grad()
    def labels(self, synthesis: Synthesis) -> Tensor:
        """(B, S, S) uint8, by the mean of the branches' probabilities."""
        return BranchEnsemble(self.branches).labels(synthesis)

    @torch.no_grad()
    def draw_volume(
        self,
        domain: str,
        heights: Tensor,
        *,
        seed: int,
        z: Tensor | None = None,
        encoding: Tensor | None = None,
        truncation: float = 1.0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """One synthetic subject: images (N, S, S) float32 in [-1, 1] and labels (N, S, S) uint8.

        Raises: ConfigError for an unknown domain.

        Args:
            heights: (N,) in [0, z_bins - 1], see `slice_heights`.
            seed: of the noise, and of the latent if none is given; the same arguments give the same volume.
            z: (1, latent_dim), the subject's latent.
            encoding: (encoding_dim,), the domain's mean embedding, or None.
            truncation: see `synthesise_volume`.
        """
        config, labelled = self.factory.config, self.card["labelled_domain"]
        if z is None:
            z = torch.randn(1, config.latent_dim, generator=torch.Generator().manual_seed(seed))

        def walk(shown: str) -> Iterator[Synthesis]:
            rng = torch.Generator().manual_seed(seed + 1)  # the same noise in every view
            given = encoding if shown == domain else None
            options = {"rng": rng, "z": z, "encoding": given, "truncation": truncation}
            return synthesise_volume(self.factory.generator, heights, domain=config.domain_index(shown), **options)

        images, labels = [], []
        # Where the domain enters at the palette alone, features are equal in all views.
        again = self.card["labels_from"][domain] == "view" and domain != labelled and config.domain_enters != "head"
        views = walk(labelled) if again else itertools.repeat(None)
        for part, view in zip(walk(domain), views, strict=False):
            images.append(part.image[:, 0].clamp(-1, 1).cpu().numpy())
            labels.append(self.labels(part if view is None else view).cpu().numpy())
        return np.concatenate(images), np.concatenate(labels)
