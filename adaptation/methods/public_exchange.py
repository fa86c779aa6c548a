"""What travels instead of weights: predictions on labelled slices that researcher and sites all have (HSSF)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ...errors import NodeDataError
from ..labels.candidate_labels import SiteSlices, candidate_masks

LARGEST = 10.0  # of a margin: what is surer tells more of the training slices than of the teacher
FUSION, CONDENSATION = 0, 1  # what views are for


@dataclass(frozen=True)
class PublicBatch:
    """Slices (B, 1, S, S) in [-1, 1], their classes (B, S, S), and their indices among the public slices (B,)."""

    images: Tensor
    truth: Tensor
    index: Tensor


class Exchange(nn.Module):
    """The "model" of an experiment in which no weights travel.

    Attributes:
        margins: (epochs, N, C - 1, s, s) float16, logits of each structure minus background's: of the researcher's
            network on the sites' next views when it comes, of the site's own on the researcher's next views when it
            leaves.
        grades: (epochs, N) of the researcher's predictions; 0 before there are any.
        round: the number of the round, by which both ends draw the same views.
    """

    def __init__(self, epochs: int, count: int, classes: int, side: int) -> None:
        super().__init__()
        self.register_buffer("margins", torch.zeros(epochs, count, classes - 1, side, side, dtype=torch.float16))
        self.register_buffer("grades", torch.zeros(epochs, count))
        self.register_buffer("round", torch.ones((), dtype=torch.int64))


class PublicSlices:
    """The public slices with random views that depend on seed, round, phase and epoch alone.

    Raises: NodeDataError if a slice is not densely labelled.
    """

    def __init__(self, data: SiteSlices, geometry: object, appearance: object, seed: int) -> None:
        if (data.kinds != "dense").any():
            raise NodeDataError("public slices need dense labels")
        self.data, self.geometry, self.appearance, self.seed = data, geometry, appearance, seed

    def __len__(self) -> int:
        return len(self.data)

    def views(self, number: int, phase: int, epoch: int, batch_size: int) -> Iterator[PublicBatch]:
        """All slices once, in an order of this epoch; the same at both ends."""
        with seeded(seed_of(self.seed, number, phase, epoch)):
            order = np.random.permutation(len(self.data))
            one = self.geometry(
                data=self.data.images[order][:, None].astype(np.float32),
                seg=self.data.candidates[order][:, None].astype(np.float32),
            )
            one = self.appearance(**one)
        candidates = torch.from_numpy(one["seg"][:, 0].astype(np.int64))
        # Turned corners have no label; they are air, which is background.
        truth = candidate_masks(candidates, self.data.classes).to(torch.uint8).argmax(1)
        images, index = torch.from_numpy(one["data"]).float(), torch.from_numpy(order)
        for start in range(0, len(order), batch_size):
            part = slice(start, start + batch_size)
            yield PublicBatch(images[part], truth[part], index[part])


def to_margins(logits: Tensor, stride: int) -> Tensor:
    """Logits (B, C, S, S) to margins (B, C - 1, S / stride, S / stride) in half precision.

    Softmax at any temperature depends on margins alone: only the stride and the half precision lose anything.
    """
    margins = (logits[:, 1:] - logits[:, :1]).clamp(-LARGEST, LARGEST)
    return F.avg_pool2d(margins, stride).to(torch.float16)


def from_margins(margins: Tensor, side: int) -> Tensor:
    """Logits (B, C, side, side), background's 0."""
    wide = F.interpolate(margins.float(), (side, side), mode="bilinear", align_corners=False)
    return torch.cat([torch.zeros_like(wide[:, :1]), wide], 1)
