"""The label-synthesis branch: a per-pixel classifier that reads the generator's feature maps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...generative.networks.generator import Generator, Synthesis

WIDTHS = (128, 32)  # of the classifier, as published


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
