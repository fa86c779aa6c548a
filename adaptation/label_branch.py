"""The label-synthesis branch: a per-pixel classifier that reads the generator's feature maps."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, UsageError
from ..generative.checkpoint import load_strictly, read_weights, write_weights
from ..generative.config import FactoryConfig
from ..generative.factory_file import TrainedFactory
from ..generative.generator import Generator, Synthesis
from ..generative.networks import make_generator
from ..generative.synthesis import synthesise_volume
from .segmenter import Segmenter

MOST_BRANCHES = 20
KIND = "labelled factory"
WIDTHS = (128, 32)  # of the classifier, as published
VIEWS = ("view", "own")


class LabelBranch(nn.Module):
    """The published pixel classifier: every feature map to 128 numbers a pixel, summed at the image's side, then two
    layers. A palette's tissue maps are read too.

    No domain is read: what the branch learns in the labelled domain holds for the same anatomy in any other.
    """

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        wide, narrow = WIDTHS
        self.classes = classes
        # Before enlarging, at each map's own side: the same function as of the enlarged maps, and much cheaper.
        self.project = nn.ModuleList(nn.Conv2d(count, wide, 1) for count in channels)
        self.classify = nn.Sequential(
            nn.ReLU(), nn.BatchNorm2d(wide), nn.Conv2d(wide, narrow, 1),
            nn.ReLU(), nn.BatchNorm2d(narrow), nn.Conv2d(narrow, classes, 1),
        )  # fmt: skip

    @classmethod
    def for_generator(cls, generator: Generator, classes: int) -> LabelBranch:
        return cls([*generator.feature_channels, *([generator.num_maps] if generator.num_maps else [])], classes)

    def forward(self, synthesis: Synthesis) -> Tensor:
        """Logits (B, classes, S, S) of the slices that `synthesis` shows."""
        maps = [*synthesis.features, *([synthesis.anatomy] if synthesis.anatomy.shape[1] else [])]
        total, side = None, synthesis.image.shape[-1]
        for project, one in zip(self.project, maps, strict=True):  # maps of equal side are added before enlarging
            projected = project(one)
            if total is not None and total.shape[-1] != projected.shape[-1]:
                total = F.interpolate(total, size=projected.shape[-2:], mode="bilinear", align_corners=True)
            total = projected if total is None else total + projected
        if total.shape[-1] != side:
            total = F.interpolate(total, size=(side, side), mode="bilinear", align_corners=True)
        return self.classify(total)


@dataclass
class LabelledFactory:
    """A factory that draws labelled slices.

    Attributes:
        factory: the generator it draws with.
        branches: its labels are the mean of what these say; the best one first.
        robust: the labelled site's segmenter, trained with random contrasts; gives every site's own images a first
            guess.
        card: "classes", "labelled_domain", "agreement" and "judged_on" (see `train_label_branch`), and "labels_from":
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
        factory = self.factory
        card = {
            "kind": KIND,
            "config": factory.config.to_dict(),
            "spacing": factory.spacing,
            "height": factory.height,
            "facts": factory.facts,
            "robust": {"format": self.robust.format.to_dict(), **self.robust.card},
            "branches": len(self.branches),
            **self.card,
        }
        write_weights(path, tensors, card)

    @classmethod
    def load(cls, path: str | Path) -> LabelledFactory:
        """Raises: UsageError if the file is missing, CheckpointError if it is damaged or of another kind."""
        tensors, card = read_weights(path, kind=KIND)
        try:
            generator = make_generator(FactoryConfig.from_dict(card["config"])).eval()
            if not 1 <= card["branches"] <= MOST_BRANCHES:
                raise UsageError(f"{card['branches']} label branches")
            branches = [LabelBranch.for_generator(generator, card["classes"]).eval() for _ in range(card["branches"])]
            robust = Segmenter.from_card(card["robust"])
            named = {f"branch{number}.": branch for number, branch in enumerate(branches)}
            for prefix, network in {"g_ema.": generator, "robust.": robust.network, **named}.items():
                own = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                load_strictly(network, own, path)
            factory = TrainedFactory(generator, {}, card["spacing"], card["height"], {}, card["facts"])
            kept = {k: card[k] for k in ("classes", "labelled_domain", "agreement", "judged_on", "labels_from")}
            factory.config.domain_index(kept["labelled_domain"])
            if any(kept["labels_from"][domain] not in VIEWS for domain in factory.config.domains):
                raise UsageError("labels_from names something unknown")
        except (KeyError, TypeError, ConfigError, UsageError) as error:
            raise CheckpointError(f"{path}: its card is not usable ({error})") from None
        return cls(factory, branches, robust, kept)

    def to(self, device: torch.device | str) -> LabelledFactory:
        for network in (self.factory.generator, *self.branches):
            network.to(device)
        return self

    @torch.no_grad()
    def labels(self, synthesis: Synthesis) -> Tensor:
        """(B, S, S) uint8, by the mean of the branches' probabilities."""
        total = sum(torch.softmax(branch(synthesis), dim=1) for branch in self.branches)
        return total.argmax(1).to(torch.uint8)

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
