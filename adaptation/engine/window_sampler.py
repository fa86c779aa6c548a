"""Random augmented windows of labelled slices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...errors import UsageError
from ..labelled_slices import LabelledSlices
from .augmentation import Augmentation, augmented_windows
from .labelled_volumes import structure_centres, volumes_of
from .random_appearance import standardised
from .training_plan import TrainingPlan

RARE_SHARE = 1 / 3  # of a batch: slices with a class that is drawn first, so that rare classes are seen as often


class WindowSampler:
    """Draws windows, of single slices or for 3-D networks of stacks of neighbouring slices.

    Args:
        data: slices to draw from.
        plan: size of the windows.
        augmentation: what they look like.

    Raises: UsageError for stacks if it is unknown which slices form a volume.
    """

    def __init__(self, data: LabelledSlices, plan: TrainingPlan, augmentation: Augmentation) -> None:
        if plan.slices > 1 and data.volume is None:
            raise UsageError("volume is None for these slices; a 3-D network needs their volumes: choose a 2-D network")
        self.plan, self.augmentation = plan, augmentation
        self.images = torch.from_numpy((np.asarray(data.images, np.float32) + 1) / 2)
        self.labels = torch.from_numpy(np.asarray(data.labels).astype(np.uint8))
        whole = plan.window >= self.images.shape[-1]  # then the window lies in the middle, as in inference
        middle = np.full((len(data.images), 2), (self.images.shape[-1] - 1) / 2, np.float32)
        self.centres = torch.from_numpy(middle if whole else structure_centres(data))
        self.volume_ends = np.empty((len(data.images), 2), np.int64)
        for part in volumes_of(data):
            self.volume_ends[part] = part.start, part.stop
        present = [np.flatnonzero((data.labels == label).any((1, 2))) for label in range(1, data.classes)]
        self.by_class = [indices for indices in present if len(indices)]

    def batch(self, count: int, *, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Windows (count, C, W, W) as the network sees them, and labels (count, 1, W, W) int64.

        For 3-D networks windows are (count, C, D, W, W) and labels (count, 1, D, W, W).
        """
        chosen = self.draw_slices(count, rng=rng)
        stacks = torch.stack([self._stack(int(index), rng) for index in chosen])  # (count, D), -1 where there is none
        outside = (stacks < 0)[:, None, :, None, None]
        images = self.images[stacks].movedim(1, 2).masked_fill(outside, 0)
        labels = self.labels[stacks][:, None].masked_fill(outside, 0)
        if self.plan.dimensions == 2:
            images, labels = images[:, :, 0], labels[:, :, 0]
        windows, found = augmented_windows(
            images, labels, self.centres[chosen], window=self.plan.window, augmentation=self.augmentation, rng=rng
        )
        return standardised(windows, colour=self.plan.colour), found

    def draw_slices(self, count: int, *, rng: torch.Generator) -> Tensor:
        """(count,) indices: a third by a class that is drawn first, the others from all slices."""
        chosen = torch.randint(len(self.images), (count,), generator=rng)
        for index in range(round(RARE_SHARE * count) if self.by_class else 0):
            indices = self.by_class[int(torch.randint(len(self.by_class), (), generator=rng))]
            chosen[index] = int(indices[int(torch.randint(len(indices), (), generator=rng))])
        return chosen

    def _stack(self, index: int, rng: torch.Generator) -> Tensor:
        """(D,) indices of neighbouring slices of a volume, among them `index`; -1 beyond the volume's ends."""
        depth = self.plan.slices
        if depth == 1:
            return torch.tensor([index])
        first, end = self.volume_ends[index].tolist()
        start = index - int(torch.randint(depth, (), generator=rng))
        start = max(first, min(start, end - depth))
        places = torch.arange(start, start + depth)
        return torch.where(places < end, places, -1)
