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


class BranchEnsemble:
    """What several branches say together, for inference.

    The branches' projections are stacked, so that every map is read once, and maps of one side are projected together;
    norms, whose statistics are fixed now, are folded into the layers behind them. One slice at a time, and at the full
    side one branch at a time: what is worked on stays in the processor's cache. The numbers are those of the mean of
    the branches, up to rounding.
    """

    def __init__(self, branches: Sequence[LabelBranch]) -> None:
        # (c, branches * wide) for every map, and the sum of the biases of all maps
        maps = range(len(branches[0].project))
        self.project = [torch.cat([one.project[n].weight[:, :, 0, 0] for one in branches]).t() for n in maps]
        self.bias = torch.cat([sum(layer.bias for layer in one.project) for one in branches])
        self.heads = [
            (_folded(one.classify[1], one.classify[2]), _folded(one.classify[4], one.classify[5])) for one in branches
        ]

    @torch.no_grad()
    def labels(self, synthesis: Synthesis) -> Tensor:
        """(B, S, S) uint8."""
        maps = [*synthesis.features, *([synthesis.anatomy] if synthesis.anatomy.shape[1] else [])]
        layers = []
        for side in sorted({one.shape[-1] for one in maps}):
            chosen = [number for number, one in enumerate(maps) if one.shape[-1] == side]
            together = torch.cat([maps[number] for number in chosen], dim=1)
            rows = together.permute(0, 2, 3, 1).flatten(1, 2)  # (B, side * side, c)
            layers.append((side, rows, torch.cat([self.project[number] for number in chosen])))
        return torch.stack([self._slice(number, layers) for number in range(len(synthesis.image))])

    def _slice(self, number: int, layers: list[tuple[int, Tensor, Tensor]]) -> Tensor:
        *coarse, (side, rows, weight) = layers
        total, last = self.bias.expand(1, -1), 1
        for to, given, projection in coarse:
            total, last = _enlarge(total, last, to).addmm_(given[number], projection), to
        parts = zip(total.chunk(len(self.heads), 1), weight.chunk(len(self.heads), 1), self.heads, strict=True)
        likely = sum(self._branch(_enlarge(own, last, side), rows[number], *rest) for own, *rest in parts)
        return _largest(likely).view(side, side)

    @staticmethod
    def _branch(total: Tensor, rows: Tensor, weight: Tensor, head: tuple) -> Tensor:
        """Probabilities (classes, pixels) of one branch."""
        (first, first_bias), (second, second_bias) = head
        hidden = torch.addmm(first_bias, total.addmm_(rows, weight).relu_(), first.t()).relu_()
        return torch.softmax(torch.addmm(second_bias[:, None], second, hidden.t()), dim=0)


def _folded(norm: nn.BatchNorm2d, layer: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight (c_out, c_in) and bias of `layer` after `norm`, as one layer."""
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = layer.weight[:, :, 0, 0]
    return weight * gain, layer.bias + weight @ (norm.bias - norm.running_mean * gain)


def _enlarge(rows: Tensor, side: int, to: int) -> Tensor:
    """(side * side, c) to a new (to * to, c), bilinear with aligned corners."""
    if side == to:
        return rows.clone()
    image = rows.view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(to, to), mode="bilinear", align_corners=True)
    return image.permute(0, 2, 3, 1).reshape(to * to, -1)


def _largest(values: Tensor) -> Tensor:
    """argmax over dimension 0 as uint8; for a few classes several times faster than argmax itself."""
    best, found = values[0], torch.zeros(values.shape[1], dtype=torch.uint8, device=values.device)
    for number in range(1, len(values)):
        found.masked_fill_(values[number] > best, number)
        best = torch.maximum(best, values[number])
    return found


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
