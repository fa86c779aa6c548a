"""Training a segmenter on labelled slices, with a site's own unlabelled or few labelled ones if there are any."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, MaskedDiceLoss
from torch import Tensor

from ...common.precision import UNSCALED_PRECISIONS
from ...common.seeding import seed_of, seeded
from ...errors import ConfigError, UsageError
from ...imaging.slice_format import BACKGROUND, SliceFormat
from ..augmentation import ROTATION, appearance, geometry
from ..labelled_slices import LabelledSlices, foreground_dice
from ..networks.architectures import build_network
from ..networks.network_names import dimensions
from ..segmenter import PATCH_DEPTH, Segmenter, predict
from ..segmenter_card import ChosenState, SegmenterCard, TrainingFacts
from .training_loop import Kept, Learner, LoopConfig, one_cycle, train

FEW_SHARE = 0.25  # of a batch: a site's own labelled slices, where there are any
RAMP = 0.2  # share of the updates over which self-training gains its weight
TEACHER_DECAY = 0.99
LARGEST_CONFIDENCE = 0.95  # asked of a pseudo-label; less for a class of which the teacher is less sure


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """How a segmenter is trained. Raises: ConfigError if a value is out of range, UsageError for unknown networks.

    Attributes:
        network: see `fedfactory.adaptation.networks.architectures`.
        updates, batch_size: steps, and slices in each; a 3-D network takes stacks of eight slices.
        learning_rate: AdamW, the peak of a one-cycle schedule.
        mirror: left-right flips.
        rotation: largest random angle in the slice's plane, radians; pi where scans have no common orientation.
        remap_contrast: share of slices with a random grey scale.
        self_training: weight of a mean teacher's labels of the site's own slices (Tarvainen and Valpola 2017); 0 is
            off.
        precision: "bfloat16" computes the network in half precision; losses stay in float32.
    """

    network: str = "unet"
    updates: int = 300
    batch_size: int = 32
    learning_rate: float = 4e-3
    mirror: bool = True
    rotation: float = ROTATION
    remap_contrast: float = 0.0
    self_training: float = 0.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        dimensions(self.network)
        if self.updates < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ConfigError("updates, batch_size and learning_rate must be positive")
        if not 0 <= self.remap_contrast <= 1:
            raise ConfigError(f"remap_contrast is {self.remap_contrast}; choose a share from 0 to 1")
        if self.self_training < 0 or self.precision not in UNSCALED_PRECISIONS:
            raise ConfigError(f"self_training must not be negative, precision one of {', '.join(UNSCALED_PRECISIONS)}")


class Sampler:
    """Endless batches of slices, or of stacks of neighbouring slices, every one once per pass, in an order that
    depends on the seed and the number of the batch alone.

    Raises: UsageError if stacks are asked for and it is not known which slices belong together.
    """

    def __init__(self, data: LabelledSlices, *, stacks: bool, seed: int) -> None:
        self.data, self.seed = data, seed
        if not stacks:
            self.first = np.arange(len(data.images))
            self.depth = 0
            return
        if data.volume is None:
            raise UsageError("a 3-D network needs slices in volumes; these come without")
        starts = np.flatnonzero(np.r_[True, np.diff(data.volume) != 0])
        self.ends = np.r_[starts[1:], len(data.volume)]
        self.first, self.depth = starts, PATCH_DEPTH

    def batch(self, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels (count, 1, S, S) or (count, 1, D, S, S), float32."""
        size = len(self.first)
        places = np.arange(number * count, (number + 1) * count)
        orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(size) for epoch in set(places // size)}
        chosen = np.array([orders[place // size][place % size] for place in places])
        if not self.depth:
            return self.data.images[chosen][:, None].astype(np.float32), self._labels(chosen)[:, None]
        parts = [self._stack(one, seed_of(self.seed, place)) for one, place in zip(chosen, places, strict=True)]
        return np.stack([part[0] for part in parts])[:, None], np.stack([part[1] for part in parts])[:, None]

    def _stack(self, volume: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbouring slices from anywhere in the volume; a short one is filled up with background."""
        first, end = self.first[volume], self.ends[volume]
        room = max(0, end - first - self.depth)
        start = first + int(np.random.default_rng(seed).integers(room + 1))
        chosen = np.arange(start, min(start + self.depth, end))
        missing = [(0, self.depth - len(chosen)), (0, 0), (0, 0)]
        images = np.pad(self.data.images[chosen].astype(np.float32), missing, constant_values=BACKGROUND)
        return images, np.pad(self._labels(chosen), missing)

    def _labels(self, chosen: np.ndarray) -> np.ndarray:
        return self.data.labels[chosen].astype(np.float32)


class SegmenterLearner(Learner):
    """Cross entropy and Dice on augmented labelled slices; if asked for, agreement with a mean teacher on own ones."""

    def __init__(
        self,
        data: LabelledSlices,
        config: SegmenterConfig,
        *,
        own: LabelledSlices | None = None,
        few: LabelledSlices | None = None,
        validation: LabelledSlices | None = None,
        device: str = "cpu",
        facts: TrainingFacts,
    ) -> None:
        self.config, self.validation, self.device, self.done = config, validation, device, 0
        self.facts = {**asdict(config), **asdict(facts)}
        self.dims = dimensions(config.network)
        with seeded(config.seed):
            self.network = build_network(config.network, data.classes).to(device).train()
        self.teacher = copy.deepcopy(self.network).requires_grad_(False).eval() if config.self_training else None
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.learning_rate)
        self.optimizers = [(optimizer, one_cycle(optimizer, config.updates))]
        options = {"stacks": self.dims == 3, "seed": config.seed}
        count = config.batch_size if self.dims == 2 else max(1, config.batch_size // PATCH_DEPTH)
        from_few = max(1, round(FEW_SHARE * count)) if few is not None else 0
        self.labelled = [(Sampler(data, **options), max(1, count - from_few))]
        if few is not None:
            self.labelled.append((Sampler(few, **options), from_few))
        self.own = (Sampler(own, **options), count) if config.self_training and own is not None else None
        self.geometry = geometry(mirror=config.mirror, rotation=config.rotation, dimensions=self.dims)
        self.appearance = appearance(remap_contrast=config.remap_contrast)
        # Dice over the whole batch: a class that is absent from most slices has no gradient in a slice's own Dice.
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        self.masked_dice = MaskedDiceLoss(softmax=True, batch=True)
        self.classes = data.classes

    def modules(self) -> dict[str, torch.nn.Module]:
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return {**super().modules(), **teacher}

    def update(self, number: int) -> dict[str, float]:
        parts = [sampler.batch(number, count) for sampler, count in self.labelled]
        images, labels = (np.concatenate(one) for one in zip(*parts, strict=True))
        batch = self.appearance(**self.geometry(data=images, seg=labels))
        images, labels = self._tensor(batch["data"]), self._tensor(batch["seg"])
        losses = {}
        if self.own is None:
            losses["labels"] = self.loss(self._logits(images), labels)
        else:
            shown, guess, sure = self._pseudo_labels(number)
            logits = self._logits(torch.cat([images, shown]))
            losses["labels"] = self.loss(logits[: len(images)], labels)
            weight = self._weight(number) * self.config.self_training
            losses["own"] = weight * self._own_loss(logits[len(images) :], guess, sure)
        (optimizer, schedule) = self.optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        if self.teacher is not None:
            self._follow(number)
        self.done = number + 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def score(self) -> float:
        """Mean foreground Dice on labelled slices that are not trained on; without such ones the last state counts."""
        if self.validation is None:
            return float(self.done)
        self.network.eval()
        images = self._tensor(self.validation.images)[:, None]
        found = predict(self.network, images, dimensions=self.dims, volume=self.validation.volume).argmax(1)
        self.network.train()
        score = foreground_dice(found.cpu(), torch.from_numpy(self.validation.labels.astype(np.int64)), self.classes)
        return 0.0 if math.isnan(score) else score

    def _pseudo_labels(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Own slices as the student sees them, the teacher's labels of them, and where it is sure.

        Both see the same place; the student sees another appearance. How sure it must be follows the class: a rare one
        would otherwise never be taught.
        """
        sampler, count = self.own
        images, nothing = sampler.batch(number, count)
        images = self.geometry(data=images, seg=nothing)["data"]
        shown = self.appearance(data=images.copy(), seg=nothing)["data"]
        with torch.no_grad():
            confidence, guess = torch.softmax(self.teacher(self._tensor(images)), dim=1).max(1, keepdim=True)
        asked = torch.full((self.classes,), LARGEST_CONFIDENCE, device=self.device)
        for value in range(self.classes):
            mine = confidence[guess == value]
            if len(mine):
                asked[value] = min(LARGEST_CONFIDENCE, float(mine.median()))
        return self._tensor(shown), guess, (confidence >= asked[guess]).float()

    def _own_loss(self, logits: Tensor, guess: Tensor, sure: Tensor) -> Tensor:
        entropy = F.cross_entropy(logits, guess[:, 0], reduction="none")
        shown = F.one_hot(guess[:, 0], self.classes).movedim(-1, 1).float()
        return (entropy * sure[:, 0]).sum() / sure.sum().clamp(min=1) + self.masked_dice(logits, shown, sure)

    def _weight(self, number: int) -> float:
        return math.exp(-5 * (1 - min(1.0, number / max(1, RAMP * self.config.updates))) ** 2)

    @torch.no_grad()
    def _follow(self, number: int) -> None:
        decay = min(1 - 1 / (number + 1), TEACHER_DECAY)
        for slow, fast in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

    def _logits(self, images: Tensor) -> Tensor:
        low = self.config.precision == "bfloat16"
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
            return self.network(images).float()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).float().to(self.device)


def train_segmenters(
    data: LabelledSlices,
    fmt: SliceFormat,
    config: SegmenterConfig,
    *,
    title: str,
    facts: TrainingFacts | None = None,
    own: LabelledSlices | None = None,
    few: LabelledSlices | None = None,
    validation: LabelledSlices | None = None,
    loop: LoopConfig | None = None,
    device: str = "cpu",
) -> list[Segmenter]:
    """Segmenters, the best first; as many as `loop.keep`.

    Args:
        data: labelled slices. fmt: their format, kept with the network.
        title: text of the progress bar.
        facts: where the data came from, for the segmenter's card.
        own: the site's slices for self-training; their labels are not read.
        few: the site's own labelled slices, a quarter of every batch.
        validation: labelled slices that are not trained on, to choose states by; None keeps the last.

    Raises: TrainingError if the loss becomes NaN or infinite.
    """
    loop, facts = loop or LoopConfig(evaluations=1), facts or TrainingFacts(slices=len(data.images))
    options = {"own": own, "few": few, "validation": validation, "device": device}
    learner = SegmenterLearner(data, config, **options, facts=facts)
    kept = train(learner, config.updates, loop, title=title, seed=config.seed)
    card = SegmenterCard(classes=data.classes, network=config.network, settings=asdict(config), training=facts)
    return [_segmenter(learner, state, fmt, card) for state in kept]


def train_segmenter(data: LabelledSlices, fmt: SliceFormat, config: SegmenterConfig, **options: Any) -> Segmenter:
    """The best of `train_segmenters`."""
    return train_segmenters(data, fmt, config, **options)[0]


def _segmenter(learner: SegmenterLearner, kept: Kept, fmt: SliceFormat, card: SegmenterCard) -> Segmenter:
    network = copy.deepcopy(learner.network).cpu()
    network.load_state_dict(kept.weights)
    chosen = ChosenState(update=kept.update, score=kept.score if learner.validation is not None else None)
    return Segmenter(network, fmt, replace(card, chosen=chosen))
