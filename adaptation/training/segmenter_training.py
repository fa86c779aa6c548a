"""Training a segmenter on labelled slices, optionally also on a site's own unlabelled or few labelled slices."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, MaskedDiceLoss
from torch import Tensor

from ...common.seeding import seed_of, seeded
from ...errors import ConfigError, UsageError
from ...imaging.slice_format import BACKGROUND, SliceFormat
from ..augmentation import ROTATION, appearance, geometry
from ..choices import UNSCALED_PRECISIONS
from ..labelled_slices import LabelledSlices, foreground_dice
from ..networks.architectures import build_network
from ..networks.network_names import dimensions
from ..segmenter import PATCH_DEPTH, Segmenter, predict
from ..segmenter_card import ChosenState, SegmenterCard, TrainingFacts
from .training_loop import Checkpoint, LoopConfig, Trainer, one_cycle, train

OWN_LABELLED_SHARE = 0.25  # of a batch: the site's own labelled slices, if there are any
RAMP_SHARE = 0.2  # of the updates: the weight of self-training increases over them
TEACHER_DECAY = 0.99
MAX_CONFIDENCE_THRESHOLD = 0.95  # of a pseudo-label; lower for classes of which the teacher is less confident


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """How a segmenter is trained. Raises: ConfigError if a value is out of range, UsageError for an unknown network.

    Attributes:
        network: one of `fedfactory.adaptation.networks.network_names.NETWORKS`.
        updates: optimizer steps.
        batch_size: slices per update; a 3-D network takes stacks of eight slices.
        learning_rate: of AdamW, the peak of a one-cycle schedule.
        mirror: whether slices are flipped left to right at random.
        rotation: largest random angle in the plane of the slice, radians; pi if scans have no common orientation.
        remap_contrast: share of slices with a random grey scale, 0 to 1.
        self_training: weight of the loss on pseudo-labels of the site's own slices by a mean teacher (Tarvainen and
            Valpola 2017); 0 trains without.
        precision: "float32", or "bfloat16" to compute the network in half precision; losses stay in float32.
        seed: of everything random.
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
        for name in ("updates", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate is {self.learning_rate}; it must be positive")
        if not 0 <= self.remap_contrast <= 1:
            raise ConfigError(f"remap_contrast is {self.remap_contrast}; choose a share from 0 to 1")
        if self.self_training < 0:
            raise ConfigError(f"self_training is {self.self_training}; it must be at least 0")
        if self.precision not in UNSCALED_PRECISIONS:
            raise ConfigError(f"precision is '{self.precision}'; choose one of {', '.join(UNSCALED_PRECISIONS)}")


@dataclass(frozen=True, kw_only=True)
class SegmenterData:
    """Slices for the training of a segmenter.

    Attributes:
        labelled: slices to train on, such as synthetic ones.
        unlabelled: the site's own slices for self-training; their labels are not read.
        own_labelled: the site's own labelled slices, a quarter of every batch.
        validation: labelled slices that are not trained on, to choose checkpoints; None chooses the last checkpoint.
    """

    labelled: LabelledSlices
    unlabelled: LabelledSlices | None = None
    own_labelled: LabelledSlices | None = None
    validation: LabelledSlices | None = None


class Sampler:
    """Endless batches of slices, or of stacks of neighbouring slices.

    Every slice (or volume) is drawn once per epoch, in an order that depends only on the seed and the batch's number.

    Args:
        data: slices to draw from.
        stacks: whether to draw stacks of slices, one volume each.
        seed: of the order, and of the position of stacks.

    Raises: UsageError for stacks if it is unknown which slices form a volume.
    """

    def __init__(self, data: LabelledSlices, *, stacks: bool, seed: int) -> None:
        self.data, self.seed = data, seed
        if not stacks:
            self.first = np.arange(len(data.images))
            self.depth = 0
            return
        if data.volume is None:
            raise UsageError("volume is None for these slices; a 3-D network needs their volumes: choose a 2-D network")
        starts = np.flatnonzero(np.r_[True, np.diff(data.volume) != 0])
        self.ends = np.r_[starts[1:], len(data.volume)]
        self.first, self.depth = starts, PATCH_DEPTH

    def batch(self, number: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Batch `number`, from 0, of `count` images in [-1, 1] and their labels.

        Returns: images and labels, each (count, 1, S, S) or with stacks (count, 1, D, S, S), float32.
        """
        size = len(self.first)
        positions = np.arange(number * count, (number + 1) * count)  # in the endless sequence of slices
        epochs = set(positions // size)
        orders = {epoch: np.random.default_rng((self.seed, epoch)).permutation(size) for epoch in epochs}
        chosen = np.array([orders[position // size][position % size] for position in positions])
        if not self.depth:
            return self.data.images[chosen][:, None].astype(np.float32), self._labels(chosen)[:, None]
        seeds = [seed_of(self.seed, position) for position in positions]
        stacks = [self._stack(volume, seed) for volume, seed in zip(chosen, seeds, strict=True)]
        images, labels = (np.stack(arrays) for arrays in zip(*stacks, strict=True))
        return images[:, None], labels[:, None]

    def _stack(self, volume: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels (D, S, S) at a random position of the volume; a short one is padded with background."""
        first, end = self.first[volume], self.ends[volume]
        room = max(0, end - first - self.depth)
        start = first + int(np.random.default_rng(seed).integers(room + 1))
        chosen = np.arange(start, min(start + self.depth, end))
        missing = [(0, self.depth - len(chosen)), (0, 0), (0, 0)]
        images = np.pad(self.data.images[chosen].astype(np.float32), missing, constant_values=BACKGROUND)
        return images, np.pad(self._labels(chosen), missing)

    def _labels(self, chosen: np.ndarray) -> np.ndarray:
        """Labels (n, S, S) float32 of the slices with the indices (n,)."""
        return self.data.labels[chosen].astype(np.float32)


class SegmenterTrainer(Trainer):
    """Cross entropy and Dice on augmented labelled slices; with self-training, also on a mean teacher's pseudo-labels.

    Args:
        data: slices to train on.
        config: how to train.
        facts: description of the data, part of the settings of the training.
        device: to train on.
    """

    def __init__(
        self, data: SegmenterData, config: SegmenterConfig, *, facts: TrainingFacts, device: str = "cpu"
    ) -> None:
        self.config, self.validation, self.device, self.updates_done = config, data.validation, device, 0
        self.settings = {**asdict(config), **asdict(facts)}
        self.dims, self.classes = dimensions(config.network), data.labelled.classes
        with seeded(config.seed):
            self.network = build_network(config.network, self.classes).to(device).train()
        self.teacher = copy.deepcopy(self.network).requires_grad_(False).eval() if config.self_training else None
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=config.learning_rate)
        self.optimizers = [(optimizer, one_cycle(optimizer, config.updates))]
        self._make_samplers(data)
        self.geometry = geometry(mirror=config.mirror, rotation=config.rotation, dimensions=self.dims)
        self.appearance = appearance(remap_contrast=config.remap_contrast)
        # Dice over the whole batch: a class that is absent from most slices has no gradient in a slice's own Dice.
        self.loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        self.masked_dice = MaskedDiceLoss(softmax=True, batch=True)

    def _make_samplers(self, data: SegmenterData) -> None:
        """Set `labelled` and `unlabelled`: samplers with their number of slices or stacks in a batch."""
        options = {"stacks": self.dims == 3, "seed": self.config.seed}
        count = self.config.batch_size if self.dims == 2 else max(1, self.config.batch_size // PATCH_DEPTH)
        own_count = max(1, round(OWN_LABELLED_SHARE * count)) if data.own_labelled is not None else 0
        self.labelled = [(Sampler(data.labelled, **options), max(1, count - own_count))]
        if data.own_labelled is not None:
            self.labelled.append((Sampler(data.own_labelled, **options), own_count))
        self.unlabelled = None
        if self.config.self_training and data.unlabelled is not None:
            self.unlabelled = (Sampler(data.unlabelled, **options), count)

    def modules(self) -> dict[str, torch.nn.Module]:
        teacher = {} if self.teacher is None else {"teacher": self.teacher}
        return {**super().modules(), **teacher}

    def update(self, number: int) -> dict[str, float]:
        parts = [sampler.batch(number, count) for sampler, count in self.labelled]
        images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        batch = self.appearance(**self.geometry(data=images, seg=labels))
        images, labels = self._tensor(batch["data"]), self._tensor(batch["seg"])
        losses = {}
        if self.unlabelled is None:
            losses["labels"] = self.loss(self._logits(images), labels)
        else:
            own_images, pseudo_labels, confident = self._pseudo_labels(number)
            logits = self._logits(torch.cat([images, own_images]))
            losses["labels"] = self.loss(logits[: len(images)], labels)
            weight = self._ramp(number) * self.config.self_training
            losses["pseudo-labels"] = weight * self._pseudo_label_loss(logits[len(images) :], pseudo_labels, confident)
        (optimizer, schedule) = self.optimizers[0]
        optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        if self.teacher is not None:
            self._update_teacher(number)
        self.updates_done = number + 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def score(self) -> float:
        """Mean foreground Dice on the validation slices; without them, the number of updates: the last one is best."""
        if self.validation is None:
            return float(self.updates_done)
        self.network.eval()
        images = self._tensor(self.validation.images)[:, None]
        predicted = predict(self.network, images, dimensions=self.dims, volume=self.validation.volume).argmax(1)
        self.network.train()
        labels = torch.from_numpy(self.validation.labels.astype(np.int64))
        score = foreground_dice(predicted.cpu(), labels, self.classes)
        return 0.0 if math.isnan(score) else score

    def _pseudo_labels(self, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """The site's own slices as the student sees them, and the teacher's pseudo-labels.

        Teacher and student see the same geometry; the student sees another appearance. The confidence threshold depends
        on the class: with one threshold for all, a rare class would never get a pseudo-label.

        Returns: images (B, 1, S, S) in [-1, 1], pseudo-labels (B, 1, S, S) integer, and where the teacher is confident
            (B, 1, S, S) float, 0 or 1. Stacks have D after the channel.
        """
        sampler, count = self.unlabelled
        images, ignored_labels = sampler.batch(number, count)
        images = self.geometry(data=images, seg=ignored_labels)["data"]
        student_images = self.appearance(data=images.copy(), seg=ignored_labels)["data"]
        with torch.no_grad():
            probabilities = torch.softmax(self.teacher(self._tensor(images)), dim=1)
        confidence, pseudo_labels = probabilities.max(1, keepdim=True)
        threshold = torch.full((self.classes,), MAX_CONFIDENCE_THRESHOLD, device=self.device)
        for value in range(self.classes):
            of_class = confidence[pseudo_labels == value]
            if len(of_class):
                threshold[value] = min(MAX_CONFIDENCE_THRESHOLD, float(of_class.median()))
        return self._tensor(student_images), pseudo_labels, (confidence >= threshold[pseudo_labels]).float()

    def _pseudo_label_loss(self, logits: Tensor, pseudo_labels: Tensor, confident: Tensor) -> Tensor:
        """Cross entropy and Dice of logits (B, classes, S, S) where the teacher is confident, see `_pseudo_labels`."""
        entropy = F.cross_entropy(logits, pseudo_labels[:, 0], reduction="none")
        one_hot = F.one_hot(pseudo_labels[:, 0], self.classes).movedim(-1, 1).float()
        mean_entropy = (entropy * confident[:, 0]).sum() / confident.sum().clamp(min=1)
        return mean_entropy + self.masked_dice(logits, one_hot, confident)

    def _ramp(self, number: int) -> float:
        """Factor of self-training at an update, rising to 1: exp(-5 (1 - t)^2) of Laine and Aila (2017)."""
        return math.exp(-5 * (1 - min(1.0, number / max(1, RAMP_SHARE * self.config.updates))) ** 2)

    @torch.no_grad()
    def _update_teacher(self, number: int) -> None:
        """Exponential moving average of the student's weights, a plain mean in the first updates."""
        decay = min(1 - 1 / (number + 1), TEACHER_DECAY)
        for teacher, student in zip(self.teacher.parameters(), self.network.parameters(), strict=True):
            teacher.lerp_(student, 1 - decay)

    def _logits(self, images: Tensor) -> Tensor:
        """(B, 1, S, S) to logits (B, classes, S, S) float32, computed in the precision of the config."""
        low = self.config.precision == "bfloat16"
        with torch.autocast(images.device.type, dtype=torch.bfloat16, enabled=low):
            return self.network(images).float()

    def _tensor(self, array: np.ndarray) -> Tensor:
        """A float32 tensor of the same shape on the device."""
        return torch.from_numpy(np.ascontiguousarray(array)).float().to(self.device)


def train_segmenters(
    data: SegmenterData,
    fmt: SliceFormat,
    config: SegmenterConfig,
    *,
    title: str,
    facts: TrainingFacts | None = None,
    loop: LoopConfig | None = None,
    device: str = "cpu",
) -> list[Segmenter]:
    """Segmenters from the best checkpoints, the best first; as many as `loop.keep`.

    Args:
        data: slices to train on.
        fmt: format of the slices, kept with the network.
        config: how to train.
        title: text of the progress bar.
        facts: description of the data, for the segmenter's card.
        loop: evaluations and checkpoints; None evaluates at the end alone.
        device: to train on.

    Raises: TrainingError if the loss becomes NaN or infinite.
    """
    facts = facts or TrainingFacts(slices=len(data.labelled.images))
    trainer = SegmenterTrainer(data, config, facts=facts, device=device)
    checkpoints = train(trainer, config.updates, loop or LoopConfig(evaluations=1), title=title, seed=config.seed)
    card = SegmenterCard(classes=data.labelled.classes, network=config.network, settings=asdict(config), training=facts)
    return [_segmenter(trainer, checkpoint, fmt, card=card) for checkpoint in checkpoints]


def train_segmenter(
    data: LabelledSlices,
    fmt: SliceFormat,
    config: SegmenterConfig,
    *,
    title: str,
    facts: TrainingFacts | None = None,
) -> Segmenter:
    """A segmenter trained on labelled slices alone, see `train_segmenters`."""
    return train_segmenters(SegmenterData(labelled=data), fmt, config, title=title, facts=facts)[0]


def _segmenter(
    trainer: SegmenterTrainer, checkpoint: Checkpoint, fmt: SliceFormat, *, card: SegmenterCard
) -> Segmenter:
    network = copy.deepcopy(trainer.network).cpu()
    network.load_state_dict(checkpoint.weights)
    score = checkpoint.score if trainer.validation is not None else None
    return Segmenter(network, fmt, replace(card, chosen=ChosenState(update=checkpoint.update, score=score)))
