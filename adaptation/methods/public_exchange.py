"""Predictions on public slices, which travel instead of weights (HSSF), and the public slices themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ...errors import NodeDataError
from ..engine.augmentation import Augmentation, augmented_slices
from ..labels.candidate_labels import SiteSlices, candidate_masks

MAX_MARGIN = 10.0  # a larger margin would reveal more of the training slices than of the teacher's knowledge
FUSION, CONDENSATION = 0, 1  # phases of a round: sites learn from the researcher, the researcher from sites


@dataclass(frozen=True)
class PublicBatch:
    """A batch of one random view of public slices.

    Attributes:
        images: (B, channels, S, S) float32 in [-1, 1].
        truth: (B, S, S) int64, classes.
        index: (B,) int64, indices among the public slices.
    """

    images: Tensor
    truth: Tensor
    index: Tensor

    def to(self, device: torch.device) -> PublicBatch:
        """The batch with images and classes on `device`."""
        return PublicBatch(self.images.to(device), self.truth.to(device), self.index)


class PublicPredictions(nn.Module):
    """The "model" of an experiment in which no weights travel.

    Attributes:
        margins: (epochs, N, C - 1, s, s) float16 in [-10, 10], logits of each structure minus that of background.
            On the way to a site: of the researcher's network on the sites' next views. On the way back: of the site's
            network on the researcher's next views.
        grades: (epochs, N) float32 in [0, 1], of these predictions; 0 before the first round.
        round: () int64, number of the round, with which both ends draw the same views.
    """

    def __init__(self, epochs: int, count: int, *, classes: int, side: int) -> None:
        super().__init__()
        self.register_buffer("margins", torch.zeros(epochs, count, classes - 1, side, side, dtype=torch.float16))
        self.register_buffer("grades", torch.zeros(epochs, count))
        self.register_buffer("round", torch.ones((), dtype=torch.int64))


class PublicSlices:
    """The public slices with random views that depend on seed, round, phase and epoch only.

    Args:
        data: the slices.
        augmentation: what the views look like.
        seed: of the views.

    Raises: NodeDataError if a slice is not densely labelled.
    """

    def __init__(self, data: SiteSlices, *, augmentation: Augmentation, seed: int) -> None:
        if odd := int((data.kinds != "dense").sum()):
            raise NodeDataError(f"{odd} of {len(data)} public slices lack dense labels; all need them")
        self.data, self.augmentation, self.seed = data, augmentation, seed

    def __len__(self) -> int:
        return len(self.data)

    def views(self, number: int, *, phase: int, epoch: int, batch_size: int) -> Iterator[PublicBatch]:
        """All slices once in random order, the same at the researcher and at all sites.

        Args:
            number: of the round.
            phase: FUSION or CONDENSATION.
            epoch: pass over the slices within the phase, from 0.
            batch_size: slices in a batch; the last may be smaller.
        """
        with seeded(seed_of(self.seed, number, phase, epoch)):
            order = np.random.permutation(len(self.data))
            images, candidates = augmented_slices(
                torch.from_numpy(self.data.images[order].astype(np.float32)),
                torch.from_numpy(self.data.candidates[order].astype(np.int64))[:, None],
                self.augmentation,
                rng=torch.default_generator,
            )
        # Corners that a rotation brings in have no label; they are air, which is background.
        truth = candidate_masks(candidates[:, 0], self.data.classes).to(torch.uint8).argmax(1)
        index = torch.from_numpy(order)
        for start in range(0, len(order), batch_size):
            part = slice(start, start + batch_size)
            yield PublicBatch(images[part], truth[part], index[part])


def to_margins(logits: Tensor, stride: int) -> Tensor:
    """Logits (B, C, S, S) to margins (B, C - 1, S / stride, S / stride) float16 in [-10, 10].

    Softmax at any temperature depends on margins only: nothing but the stride and the half precision loses anything.
    """
    margins = (logits[:, 1:] - logits[:, :1]).clamp(-MAX_MARGIN, MAX_MARGIN)
    return F.avg_pool2d(margins, stride).to(torch.float16)


def from_margins(margins: Tensor, side: int) -> Tensor:
    """Margins (B, C - 1, s, s) to logits (B, C, side, side) float32, those of background 0."""
    wide = F.interpolate(margins.float(), (side, side), mode="bilinear", align_corners=False)
    return torch.cat([torch.zeros_like(wide[:, :1]), wide], 1)
