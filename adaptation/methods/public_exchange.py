"""Predictions on public slices, which travel instead of weights (HSSF), and the public slices themselves."""

from __future__ import annotations

import math
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
from .strong_views import StrongView

GRADING_BATCH = 64  # slices in a batch for which no gradient is needed
MAX_MARGIN = 10.0  # a larger margin would reveal more of the training slices than of the teacher's knowledge
EXCHANGED_STREAM = 1  # number of the random draws for slices that are exchanged, beside those that are fitted
FUSION, CONDENSATION = 0, 1  # phases of a round: sites learn from the researcher, the researcher from sites


@dataclass(frozen=True)
class PublicBatch:
    """A batch of one random view of public slices.

    Attributes:
        images: (B, channels, S, S) float32 in [-1, 1].
        truth: (B, S, S) int64, classes.
        index: (B,) int64, indices among the slices that are fitted, or among those that are exchanged.
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
        margins: (epochs, N, C - 1, s, s) float16 in [-10, 10], logits of each structure minus that of background, for
            the N public slices that are exchanged. On the way to a site: of the researcher's network on the sites' next
            views. On the way back: of the site's network on the researcher's next views.
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

    The networks are fitted to the labels of one part. On the other, the held-out part, they are compared and teach each
    other: what a network has learnt by heart says nothing about what it can teach.

    Args:
        data: the slices.
        augmentation: what the views look like.
        strong: what is changed in strong views: all those of slices that are exchanged, and a share of the others.
        strong_share: that share.
        seed: of the views.
        held_out: share of the slices that nobody fits, the last ones, so that neighbours in a volume stay together; 0
            fits and exchanges all slices, as published.

    Attributes:
        fitted: the slices that networks are fitted to.
        exchanged: the slices on which predictions are compared.

    Raises: NodeDataError if a slice is not densely labelled.
    """

    def __init__(
        self,
        data: SiteSlices,
        *,
        augmentation: Augmentation,
        strong: StrongView,
        strong_share: float,
        seed: int,
        held_out: float,
    ) -> None:
        if odd := int((data.kinds != "dense").sum()):
            raise NodeDataError(f"{odd} of {len(data)} public slices lack dense labels; all need them")
        self.augmentation, self.strong, self.strong_share, self.seed = augmentation, strong, strong_share, seed
        first = len(data) - exchanged_count(len(data), held_out)
        self.exchanged = _part(data, slice(first, None))
        self.fitted = _part(data, slice(first)) if first else self.exchanged

    def __len__(self) -> int:
        return len(self.fitted) if self.fitted is self.exchanged else len(self.fitted) + len(self.exchanged)

    def batches(self, batch_size: int) -> int:
        """Number of updates in a pass, in which slices of both parts together make about `batch_size`."""
        return min(math.ceil(len(self) / batch_size), len(self.fitted))

    def fitted_views(self, number: int, *, phase: int, epoch: int, batches: int) -> Iterator[PublicBatch]:
        """All slices that are fitted once in random order, the same at the researcher and at all sites.

        Args:
            number: of the round.
            phase: FUSION or CONDENSATION.
            epoch: pass over the slices within the phase, from 0.
            batches: into how many batches they are dealt; some may be empty.
        """
        numbers = (number, phase, epoch)
        yield from self._views(self.fitted, self.strong_share, numbers=numbers, batches=batches)

    def exchanged_views(self, number: int, *, phase: int, epoch: int, batches: int) -> Iterator[PublicBatch]:
        """As `fitted_views`, strong views of the slices that are exchanged."""
        numbers = (number, phase, epoch, EXCHANGED_STREAM)
        yield from self._views(self.exchanged, 1.0, numbers=numbers, batches=batches)

    def _views(
        self, data: SiteSlices, strong_share: float, *, numbers: tuple[int, ...], batches: int
    ) -> Iterator[PublicBatch]:
        rng = torch.default_generator
        with seeded(seed_of(self.seed, *numbers)):
            order = np.random.permutation(len(data))
            images, candidates = augmented_slices(
                torch.from_numpy(data.images[order].astype(np.float32)),
                torch.from_numpy(data.candidates[order].astype(np.int64))[:, None],
                self.augmentation,
                rng=rng,
            )
            chosen = torch.rand(len(images), 1, 1, 1, generator=rng) < strong_share
            images = torch.where(chosen, self.strong.of(images, rng=rng), images)
        index = torch.from_numpy(order)
        for part in np.array_split(np.arange(len(order)), batches):
            # Corners that a rotation brings in have no label; they are air, which is background.
            truth = candidate_masks(candidates[part, 0], data.classes).to(torch.uint8).argmax(1)
            yield PublicBatch(images[part], truth, index[part])


def exchanged_count(public_slices: int, held_out: float) -> int:
    """Number of public slices on which predictions are compared, of all `public_slices`; see `PublicSlices`."""
    if not held_out or public_slices < 2:
        return public_slices
    return min(max(1, round(held_out * public_slices)), public_slices - 1)


def _part(data: SiteSlices, chosen: slice) -> SiteSlices:
    return SiteSlices(data.images[chosen], data.candidates[chosen], data.kinds[chosen], data.classes)


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
