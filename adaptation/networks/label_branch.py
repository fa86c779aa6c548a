"""The label-synthesis branch: a per-pixel classifier of the generator's feature maps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.precision import PRECISIONS
from ...generative.networks.generator import Generator, Synthesis

WIDTHS = (128, 32)  # channels of the classifier's hidden layers, as published
Folded = tuple[Tensor, Tensor]  # weight (c_out, c_in) and bias (c_out,) of a layer


class LabelBranch(nn.Module):
    """The published pixel classifier: every feature map is projected to 128 channels, the projections are summed at the
    image's resolution, then two layers follow. The tissue maps of a palette head are read as well.

    The domain is no input: what the branch learns in the labelled domain holds for the same anatomy in other domains.

    Args:
        channels: of each feature map.
        classes: channels of the logits, background included.
    """

    def __init__(self, channels: Sequence[int], classes: int) -> None:
        super().__init__()
        wide, narrow = WIDTHS
        self.classes = classes
        # Projecting before enlarging gives the same result as projecting the enlarged maps, and is much cheaper.
        self.project = nn.ModuleList(nn.Conv2d(count, wide, 1) for count in channels)
        self.classify = nn.Sequential(
            nn.ReLU(), nn.BatchNorm2d(wide), nn.Conv2d(wide, narrow, 1),
            nn.ReLU(), nn.BatchNorm2d(narrow), nn.Conv2d(narrow, classes, 1),
        )  # fmt: skip

    @classmethod
    def for_generator(cls, generator: Generator, classes: int) -> LabelBranch:
        """An untrained branch that fits the generator's feature maps."""
        return cls([*generator.feature_channels, *([generator.num_maps] if generator.num_maps else [])], classes)

    def forward(self, synthesis: Synthesis) -> Tensor:
        """Logits (B, classes, S, S) of synthetic slices (B, channels, S, S), from their feature maps."""
        maps = _input_maps(synthesis)
        total, side = None, synthesis.image.shape[-1]
        for project, features in zip(self.project, maps, strict=True):  # maps of equal side are added before enlarging
            projected = project(features)
            if total is not None and total.shape[-1] != projected.shape[-1]:
                total = F.interpolate(total, size=projected.shape[-2:], mode="bilinear", align_corners=True)
            total = projected if total is None else total + projected
        if total.shape[-1] != side:
            total = F.interpolate(total, size=(side, side), mode="bilinear", align_corners=True)
        return self.classify(total)


class BranchEnsemble:
    """The mean of several label branches, computed fast, for inference.

    The branches' projections are stacked, so that every map is read once, and maps of equal side are projected
    together; norms, whose statistics are fixed at inference, are folded into the layers that follow them. One slice at
    a time, and at full resolution one branch at a time, so that the data stays in the processor's cache. Results equal
    the mean of the branches up to rounding.

    Args:
        branches: trained branches of one generator; a single one is its own mean.
        precision: of the products at full resolution, "float32" or "bfloat16"; the coarser sides, whose sums are
            enlarged again, and the last layer stay in float32.
    """

    def __init__(self, branches: Sequence[LabelBranch], *, precision: str = "float32") -> None:
        self.fine = PRECISIONS[precision] or torch.float32
        # (c, branches * wide) for every map, and the sum of the biases of all maps
        maps = range(len(branches[0].project))
        self.project = [torch.cat([branch.project[n].weight[:, :, 0, 0] for branch in branches]).t() for n in maps]
        self.bias = torch.cat([sum(layer.bias for layer in branch.project) for branch in branches])
        classifiers = [branch.classify for branch in branches]
        self.heads = [(_folded(layers[1], layers[2]), _folded(layers[4], layers[5])) for layers in classifiers]

    @torch.no_grad()
    def labels(self, synthesis: Synthesis) -> Tensor:
        """Most likely class (B, S, S) uint8 of every pixel of synthetic slices (B, channels, S, S)."""
        side = synthesis.image.shape[-1]
        return torch.stack([_argmax(summed).view(side, side) for summed in self._summed_probabilities(synthesis)])

    @torch.no_grad()
    def probabilities(self, synthesis: Synthesis) -> Tensor:
        """Mean probabilities (B, classes, S, S) of the classes in synthetic slices (B, channels, S, S)."""
        side = synthesis.image.shape[-1]
        summed = torch.stack(list(self._summed_probabilities(synthesis)))
        return (summed / len(self.heads)).unflatten(2, (side, side))

    def _summed_probabilities(self, synthesis: Synthesis) -> Iterator[Tensor]:
        """Slice by slice, the sum over the branches of their probabilities (classes, pixels)."""
        maps = _input_maps(synthesis)
        sides = sorted({features.shape[-1] for features in maps})
        levels = []
        for side in sides:
            chosen = [number for number, features in enumerate(maps) if features.shape[-1] == side]
            kind = self.fine if side == sides[-1] else torch.float32
            together = torch.cat([maps[number].to(kind) for number in chosen], dim=1)
            pixels = together.permute(0, 2, 3, 1).flatten(1, 2)
            levels.append(_Level(side, pixels, torch.cat([self.project[number] for number in chosen]).to(kind)))
        return (self._summed_of_slice(number, levels) for number in range(len(synthesis.image)))

    def _summed_of_slice(self, number: int, levels: list[_Level]) -> Tensor:
        """(classes, S * S) of the slice with this number in the batch, from the maps of all sides, coarse to fine."""
        *coarse, finest = levels
        total, side = self.bias.expand(1, -1), 1
        for level in coarse:
            total = _enlarge(total, side, level.side).addmm_(level.pixels[number], level.projection)
            side = level.side
        totals = total.chunk(len(self.heads), 1)
        projections = finest.projection.chunk(len(self.heads), 1)
        pixels = finest.pixels[number]
        return sum(
            _branch_probabilities(_enlarge(total, side, finest.side).to(self.fine).addmm_(pixels, projection), head)
            for total, projection, head in zip(totals, projections, self.heads, strict=True)
        )


class _Level(NamedTuple):
    """All feature maps of one side: pixels (B, side * side, c), and their projections (c, branches * wide)."""

    side: int
    pixels: Tensor
    projection: Tensor


def _input_maps(synthesis: Synthesis) -> list[Tensor]:
    """The maps (B, c, r, r) that a branch reads: the generator's features, and the tissue maps of a palette head."""
    return [*synthesis.features, *([synthesis.anatomy] if synthesis.anatomy.shape[1] else [])]


def _branch_probabilities(total: Tensor, head: tuple[Folded, Folded]) -> Tensor:
    """Probabilities (classes, pixels) float32 of one branch, from its summed projections (pixels, wide), which it
    changes."""
    (first, first_bias), (second, second_bias) = head
    hidden = torch.addmm(first_bias.to(total.dtype), total.relu_(), first.to(total.dtype).t()).relu_().float()
    return torch.softmax(torch.addmm(second_bias[:, None], second, hidden.t()), dim=0)


def _folded(norm: nn.BatchNorm2d, layer: nn.Conv2d) -> Folded:
    """Weight (c_out, c_in) and bias (c_out,) of one layer that equals `norm` followed by `layer`."""
    gain = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    weight = layer.weight[:, :, 0, 0]
    return weight * gain, layer.bias + weight @ (norm.bias - norm.running_mean * gain)


def _enlarge(pixels: Tensor, side: int, new_side: int) -> Tensor:
    """(side * side, c) to a new tensor (new_side * new_side, c), bilinear with aligned corners."""
    if side == new_side:
        return pixels.clone()
    image = pixels.view(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(new_side, new_side), mode="bilinear", align_corners=True)
    return image.permute(0, 2, 3, 1).reshape(new_side * new_side, -1)


def _argmax(values: Tensor) -> Tensor:
    """(classes, pixels) to the argmax over classes (pixels,) uint8; several times faster than `Tensor.argmax`."""
    best, found = values[0], torch.zeros(values.shape[1], dtype=torch.uint8, device=values.device)
    for number in range(1, len(values)):
        found.masked_fill_(values[number] > best, number)
        best = torch.maximum(best, values[number])
    return found
