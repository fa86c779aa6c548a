"""Training of a planned segmenter on random windows of labelled slices."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ..labelled_slices import LabelledSlices, foreground_dice
from .augmentation import Augmentation
from .labelled_volumes import volumes_of
from .planned_network import PlannedNetwork
from .training_loop import Trainer
from .training_plan import TrainingPlan
from .window_inference import window_probabilities
from .window_sampler import WindowSampler

WEIGHT_DECAY = 1e-4
WARM_UP = 0.1  # share of the updates in which the learning rate rises
MAX_GRADIENT_NORM = 5.0
AVERAGE_DECAY = 0.99  # of the weights' moving average, which is what is evaluated and kept


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Slices that make up a share of every batch.

    Attributes:
        slices: with labels.
        augmentation: what their windows look like.
        share: relative to the shares of the other streams.
    """

    slices: LabelledSlices
    augmentation: Augmentation
    share: float = 1.0


class WindowTrainer(Trainer):
    """Cross entropy and batch Dice on random windows; the moving average of the weights is evaluated and kept.

    Args:
        streams: slices to train on.
        plan: network and training.
        settings: description of data and training; an unfinished training is resumed only with equal ones.
        validation: labelled slices that are not trained on; None keeps the last state.
        start: state of a network of this plan to begin with; None begins with random weights.
        seed: of everything random.
        device: to train on.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        plan: TrainingPlan,
        *,
        settings: Mapping[str, object] | None = None,
        validation: LabelledSlices | None = None,
        start: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        self.plan, self.seed, self.validation, self.device = plan, seed, validation, device
        self.settings = {**(settings or {}), "plan": plan.to_dict(), "seed": seed}
        counts = _counts(plan.batch_size, [stream.share for stream in streams])
        self.samplers = [
            (WindowSampler(stream.slices, plan, stream.augmentation), count)
            for stream, count in zip(streams, counts, strict=True)
        ]
        with seeded(seed):
            self.trained = PlannedNetwork(plan).train()
        if start is not None:
            self.trained.load_state_dict(start)
        self.trained = self.trained.to(device)
        self.network: nn.Module = copy.deepcopy(self.trained).requires_grad_(False).eval()
        optimizer = torch.optim.AdamW(
            self.trained.parameters(), plan.learning_rate, weight_decay=WEIGHT_DECAY, fused=True
        )
        self.optimizers = [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate))]
        # Dice over the whole batch: a class that is absent from most windows has no gradient in a window's own Dice.
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, include_background=False)
        self.updates_done = 0

    def modules(self) -> dict[str, nn.Module]:
        return {"network": self.network, "trained": self.trained}

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """Windows and labels of update `number`, see `WindowSampler.batch`."""
        rng = torch.Generator().manual_seed(seed_of(self.seed, number))
        parts = [sampler.batch(count, rng=rng) for sampler, count in self.samplers]
        windows, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return windows, labels

    def update(self, number: int) -> dict[str, float]:
        windows, labels = (tensor.to(self.device) for tensor in self.batch(number))
        low = self.plan.precision == "bfloat16"
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16, enabled=low):
            logits = self.trained(windows).float()
        loss = self.loss(logits, labels)
        optimizer, schedule = self.optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.trained.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        decay = min(AVERAGE_DECAY, number / (number + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.network.parameters()), list(self.trained.parameters()), 1 - decay)
        self.updates_done = number + 1
        return {"labels": float(loss.detach())}

    def score(self) -> float:
        """Mean foreground Dice on the validation slices; without them, the number of updates: the last one is best."""
        data = self.validation
        if data is None:
            return float(self.updates_done)
        images = torch.from_numpy((np.asarray(data.images, np.float32) + 1) / 2).to(self.device)
        volume = np.concatenate([np.full(part.stop - part.start, part.start) for part in volumes_of(data)])
        found = window_probabilities(self.network, images, self.plan, volume=volume).argmax(1)
        score = foreground_dice(found.cpu(), torch.from_numpy(data.labels.astype(np.int64)), data.classes)
        return 0.0 if math.isnan(score) else score

    def _rate(self, done: int) -> float:
        """Factor of the learning rate: a linear rise, then half a cosine."""
        rise = max(1, round(WARM_UP * self.plan.updates))
        if done < rise:
            return (done + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (done - rise) / max(1, self.plan.updates - rise)))


def _counts(batch_size: int, shares: Sequence[float]) -> list[int]:
    """Windows of each stream in a batch: at least one each, the rest by the shares."""
    total = sum(shares)
    counts = [max(1, round(batch_size * share / total)) for share in shares[1:]]
    return [max(1, batch_size - sum(counts)), *counts]
