"""Training a slice segmenter on labelled slices, and its file: safetensors with a JSON card."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.losses import DiceCELoss
from torch import Tensor, nn

from ..errors import CheckpointError, ConfigError, TrainingError, UsageError
from ..generative.checkpoint import load_strictly, read_weights, write_weights
from ..progress import track
from ..slicing import SliceFormat
from .augmentation import augmentation
from .networks import build_network

KIND = "segmenter"


@dataclass(frozen=True, kw_only=True)
class SegmenterConfig:
    """How a segmenter is trained. Raises: ConfigError if a value is out of range."""

    network: str = "unet"
    updates: int = 300
    batch_size: int = 32
    learning_rate: float = 4e-3  # AdamW, the peak of a one-cycle schedule
    mirror: bool = True  # left-right flips
    remap_contrast: float = 0.0  # share of slices with a random grey scale
    seed: int = 0

    def __post_init__(self) -> None:
        if self.updates < 1 or self.batch_size < 1 or self.learning_rate <= 0:
            raise ConfigError("updates, batch_size and learning_rate must be positive")
        if not 0 <= self.remap_contrast <= 1:
            raise ConfigError(f"remap_contrast is {self.remap_contrast}; choose a share from 0 to 1")


@dataclass(frozen=True)
class LabelledSlices:
    """Training data: images (N, S, S) float in [-1, 1], labels (N, S, S) integer below `classes`."""

    images: np.ndarray
    labels: np.ndarray
    classes: int


class Segmenter:
    """A trained network with everything needed to apply it to a new image.

    Attributes:
        network: slices (B, 1, S, S) to logits (B, classes, S, S).
        format: what a new image must be turned into first.
        card: where it came from; JSON-able.
    """

    def __init__(self, network: nn.Module, fmt: SliceFormat, card: dict[str, Any]) -> None:
        self.network, self.format, self.card = network.eval(), fmt, card

    @property
    def classes(self) -> int:
        return self.card["classes"]

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """(B, 1, S, S) in [-1, 1] to (B, classes, S, S) summing to one."""
        return torch.softmax(self.network(images), dim=1)

    def save(self, path: str | Path) -> None:
        write_weights(path, self.network.state_dict(), {**self.card, "kind": KIND, "format": self.format.to_dict()})

    @classmethod
    def load(cls, path: str | Path) -> Segmenter:
        """Raises: UsageError if the file is missing, CheckpointError if it is damaged or no segmenter."""
        weights, card = read_weights(path, kind=KIND)
        try:
            segmenter = cls.from_card(card)
        except (KeyError, TypeError, ConfigError, UsageError) as error:
            raise CheckpointError(f"{path}: its card is not usable ({error})") from None
        load_strictly(segmenter.network, weights, path)
        return segmenter

    @classmethod
    def from_card(cls, card: dict[str, Any]) -> Segmenter:
        """An untrained segmenter of the card's kind, to load weights into. Raises KeyError for a card that lacks it."""
        network = build_network(card["config"]["network"], card["classes"])
        return cls(network, SliceFormat.from_dict(card["format"]), card)


def train_segmenter(
    data: LabelledSlices, fmt: SliceFormat, config: SegmenterConfig, *, title: str, card: dict[str, Any]
) -> Segmenter:
    """Cross entropy + Dice on augmented slices, AdamW with a one-cycle schedule.

    Args:
        data: labelled slices. fmt: their format, kept with the network.
        title: text of the progress bar.
        card: facts about the data to keep with the network.

    Raises: TrainingError if the loss becomes NaN or infinite.
    """
    with seeded(config.seed):
        network = build_network(config.network, data.classes).train()
        optimizer = torch.optim.AdamW(network.parameters(), lr=config.learning_rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.learning_rate, total_steps=config.updates)
        # Dice over the whole batch: a class that is absent from most slices has no gradient in a slice's own Dice.
        loss_function = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)
        batches = _batches(data, config)
        for update in track(range(config.updates), title):
            images, labels = next(batches)
            loss = loss_function(network(images), labels)
            if not torch.isfinite(loss):
                raise TrainingError(f"{title}: the loss is {loss.item()} at update {update}")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return Segmenter(network, fmt, {"classes": data.classes, "config": asdict(config), **card})


def _batches(data: LabelledSlices, config: SegmenterConfig) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless augmented batches (B, 1, S, S), every slice once per pass."""
    transform = augmentation(mirror=config.mirror, remap_contrast=config.remap_contrast)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < config.batch_size:
            order = np.concatenate([order, np.random.permutation(len(data.images))])
        chosen, order = np.sort(order[: config.batch_size]), order[config.batch_size :]
        images = data.images[chosen].astype(np.float32)[:, None]
        labels = data.labels[chosen].astype(np.float32)[:, None]
        batch = transform(data=images, seg=labels)
        yield torch.from_numpy(batch["data"]).float(), torch.from_numpy(batch["seg"]).float()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python's, numpy's and PyTorch's global generators inside, and restore them afterwards.

    batchgenerators draws from the first two, MONAI initialises from the third.
    """
    python, array, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(torch_state)
