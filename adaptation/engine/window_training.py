"""Training of a planned segmenter on random windows of labelled slices."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ..labelled_slices import LabelledSlices, foreground_dice
from ..training.training_loop import Trainer
from .planned_network import PlannedNetwork
from .random_appearance import MILD, AppearanceVariation, random_appearance, standardised
from .random_contrast import ContrastMix, random_contrast
from .random_windows import WindowVariation, draw_centres, random_windows
from .training_plan import DataFacts, TrainingPlan
from .window_inference import volume_probabilities

WEIGHT_DECAY = 1e-4
WARM_UP = 0.1  # share of the updates in which the learning rate rises
MAX_GRADIENT_NORM = 5.0
RARE_SHARE = 1 / 3  # of a batch: slices with a class that is drawn first, so that rare classes are seen as often
AVERAGE_DECAY = 0.99  # of the weights' moving average, which is what is evaluated and kept
EXTENT_SHARE = 0.95  # of the volumes whose structures fit into the extent


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What random windows look like.

    Attributes:
        windows: their position and shape.
        contrast: random contrast; None leaves the contrast as it is.
        appearance: gamma, bias, blur, resolution and noise.
    """

    windows: WindowVariation = field(default_factory=WindowVariation)
    contrast: ContrastMix | None = None
    appearance: AppearanceVariation = MILD


def data_facts(data: LabelledSlices) -> DataFacts:
    """What a training plan follows from, of labelled slices."""
    sides = [
        int(max(np.ptp(axis) for axis in np.nonzero(shown)) + 1)
        for shown in (data.labels[part].any(0) for part in volumes_of(data))
        if shown.any()
    ]
    extent = math.ceil(float(np.quantile(sides, EXTENT_SHARE))) if sides else None
    return DataFacts(size=data.images.shape[-1], extent=extent, classes=data.classes)


def volumes_of(data: LabelledSlices) -> list[slice]:
    """The slices of each volume; without known volumes, every slice is one."""
    if data.volume is None:
        return [slice(index, index + 1) for index in range(len(data.images))]
    starts = np.flatnonzero(np.r_[True, np.diff(data.volume) != 0]).tolist()
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(data.images)], strict=True)]


def structure_centres(data: LabelledSlices) -> np.ndarray:
    """(N, 2) float32 row and column of the structures' centre in each slice's volume; the middle without structures."""
    middle = (data.images.shape[-1] - 1) / 2
    centres = np.full((len(data.images), 2), middle, np.float32)
    for part in volumes_of(data):
        shown = data.labels[part].any(0)
        if shown.any():
            centres[part] = [places.mean() for places in np.nonzero(shown)]
    return centres


class WindowTrainer(Trainer):
    """Cross entropy and batch Dice on random windows; the moving average of the weights is evaluated and kept.

    Args:
        data: slices to train on.
        plan: network and training.
        augmentation: what windows look like.
        validation: labelled slices that are not trained on, whole volumes in order; None keeps the last state.
        seed: of everything random.
    """

    def __init__(
        self,
        data: LabelledSlices,
        plan: TrainingPlan,
        augmentation: Augmentation,
        *,
        validation: LabelledSlices | None = None,
        seed: int = 0,
    ) -> None:
        self.plan, self.augmentation, self.seed, self.validation = plan, augmentation, seed, validation
        self.settings: Mapping[str, object] = {**asdict(plan), **asdict(augmentation), "seed": seed}
        self.images = torch.from_numpy((np.asarray(data.images, np.float32) + 1) / 2)[:, None]
        self.labels = torch.from_numpy(np.asarray(data.labels).astype(np.int64))
        self.centres = torch.from_numpy(structure_centres(data))
        present = [np.flatnonzero((data.labels == label).any((1, 2))) for label in range(1, data.classes)]
        self.by_class = [indices for indices in present if len(indices)]
        with seeded(seed):
            self.trained = PlannedNetwork(plan).train()
        self.network: nn.Module = copy.deepcopy(self.trained).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(self.trained.parameters(), plan.learning_rate, weight_decay=WEIGHT_DECAY)
        self.optimizers = [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate))]
        # Dice over the whole batch: a class that is absent from most windows has no gradient in a window's own Dice.
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)
        self.updates_done = 0

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "trained": self.trained}

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Windows (B, 1, W, W) with mean 0 and deviation 1, and labels (B, W, W) int64, of update `number`."""
        rng = torch.Generator().manual_seed(seed_of(self.seed, number))
        chosen = self._draw_slices(rng)
        variation = self.augmentation.windows
        centres = draw_centres(self.centres[chosen], self.images.shape[-1], variation, rng=rng)
        windows, labels = random_windows(
            self.images[chosen], self.labels[chosen], centres, window=self.plan.window, variation=variation, rng=rng
        )
        if self.augmentation.contrast is not None:
            windows = random_contrast(windows, self.augmentation.contrast, rng=rng)
        return standardised(random_appearance(windows, self.augmentation.appearance, rng=rng)), labels

    def update(self, number: int) -> dict[str, float]:
        windows, labels = self.batch(number)
        low = self.plan.precision == "bfloat16"
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
            logits = self.trained(windows).float()
        loss = self.loss(logits, labels[:, None])
        optimizer, schedule = self.optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        decay = min(AVERAGE_DECAY, number / (number + 10))
        with torch.no_grad():
            for average, weight in zip(self.network.parameters(), self.trained.parameters(), strict=True):
                average.lerp_(weight, 1 - decay)
        self.updates_done = number + 1
        return {"labels": float(loss.detach())}

    def score(self) -> float:
        """Mean foreground Dice on the validation volumes; without them, the number of updates: the last one is best."""
        if self.validation is None:
            return float(self.updates_done)
        images = torch.from_numpy((np.asarray(self.validation.images, np.float32) + 1) / 2)[:, None]
        found = torch.cat(
            [
                volume_probabilities(self.network, images[part], window=self.plan.window).argmax(1)
                for part in volumes_of(self.validation)
            ]
        )
        labels = torch.from_numpy(self.validation.labels.astype(np.int64))
        score = foreground_dice(found, labels, self.validation.classes)
        return 0.0 if math.isnan(score) else score

    def _draw_slices(self, rng: torch.Generator) -> Tensor:
        """(B,) indices: a third by a class that is drawn first, the others from all slices."""
        count = self.plan.batch_size
        chosen = torch.randint(len(self.images), (count,), generator=rng)
        for index in range(round(RARE_SHARE * count) if self.by_class else 0):
            indices = self.by_class[int(torch.randint(len(self.by_class), (), generator=rng))]
            chosen[index] = int(indices[int(torch.randint(len(indices), (), generator=rng))])
        return chosen

    def _rate(self, done: int) -> float:
        """Factor of the learning rate: a linear rise, then half a cosine."""
        rise = max(1, round(WARM_UP * self.plan.updates))
        if done < rise:
            return (done + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (done - rise) / max(1, self.plan.updates - rise)))
