"""A trained segmenter and its file: safetensors with a JSON card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from ..common.weights_file import load_strictly, read_weights, write_weights
from ..errors import CheckpointError, ConfigError, UsageError
from ..generative.networks.build import make_generator
from ..imaging.slice_format import SliceFormat
from .methods.registry import make_method
from .networks.architectures import build_network
from .networks.network_names import dimensions
from .networks.translator_network import Translator
from .segmenter_card import FEDERATED, TRANSLATOR, SegmenterCard

KIND = "segmenter"
PATCH_DEPTH = 8  # slices that a 3-D network sees at once
SLICES_AT_ONCE = 32

Design = TypeVar("Design")


class Segmenter:
    """A trained network with everything needed to apply it to a new image.

    Attributes:
        network: slices (B, 1, S, S) to logits (B, classes, S, S); a 3-D network takes and gives stacks of slices,
            (B, 1, D, S, S) and (B, classes, D, S, S).
        format: the slice format that a new image must be brought into first.
        card: how the network is built, and what it was trained on.
    """

    def __init__(self, network: nn.Module, fmt: SliceFormat, card: SegmenterCard) -> None:
        self.network, self.format, self.card = network.eval(), fmt, card

    @property
    def classes(self) -> int:
        return self.card.classes

    @property
    def dimensions(self) -> int:
        """2 if every slice is segmented by itself, 3 if the network sees neighbouring slices too."""
        return 2 if self.card.network in (TRANSLATOR, FEDERATED) else dimensions(self.card.network)

    def to(self, device: torch.device | str) -> Segmenter:
        self.network.to(device)
        return self

    def probabilities(self, images: Tensor, volume: np.ndarray | None = None) -> Tensor:
        """Slices (N, 1, S, S) in [-1, 1] to probabilities (N, classes, S, S), which sum to one over the classes.

        Args:
            images: (N, 1, S, S) in [-1, 1].
            volume: (N,) integer, the volume that a slice belongs to, for 3-D networks; slices of a volume follow each
                other. None: all slices are of one volume.
        """
        return predict(self.network, images, dimensions=self.dimensions, volume=volume)

    def save(self, path: str | Path) -> None:
        write_weights(path, self.network.state_dict(), {**self.to_dict(), "kind": KIND})

    @classmethod
    def load(cls, path: str | Path) -> Segmenter:
        """Raises: UsageError if the file is missing, CheckpointError if it is damaged or no segmenter."""
        weights, card = read_weights(path, kind=KIND)
        try:
            segmenter = cls.from_dict(card)
        except UsageError as error:
            raise CheckpointError(f"{path}: its card is not usable ({error}); give a segmenter's file") from None
        load_strictly(segmenter.network, weights, path)
        return segmenter

    def to_dict(self) -> dict[str, Any]:
        """Everything but the weights, JSON-able."""
        return {"format": self.format.to_dict(), **self.card.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> Segmenter:
        """A segmenter of the described kind with random weights, to load weights into.

        Raises: ConfigError or UsageError for a description that is not usable.
        """
        card = SegmenterCard.from_dict(values)
        if not isinstance(values.get("format"), dict):
            raise ConfigError(f"format is {values.get('format')}; it must be a slice format")
        return cls(_build(card), SliceFormat.from_dict(values["format"]), card)


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, *, dimensions: int, volume: np.ndarray | None = None) -> Tensor:
    """Slices (N, 1, S, S) in [-1, 1] to probabilities (N, classes, S, S) by a network in evaluation mode.

    Args:
        network: see `Segmenter`.
        images: (N, 1, S, S) in [-1, 1].
        dimensions: 2 or 3, of the network.
        volume: (N,), see `Segmenter.probabilities`.
    """
    if dimensions == 2:
        return torch.cat([torch.softmax(network(part), dim=1) for part in images.split(SLICES_AT_ONCE)])
    if volume is not None:
        ends = np.flatnonzero(np.diff(volume)) + 1
        counts = np.diff([0, *ends, len(volume)]).tolist()
        return torch.cat([predict(network, part, dimensions=dimensions) for part in images.split(counts)])
    size = (PATCH_DEPTH, *images.shape[2:])
    windows = SlidingWindowInferer(size, sw_batch_size=1, overlap=0.5, mode="gaussian", cval=-1.0)
    return torch.softmax(windows(images[:, 0][None, None], network)[0].movedim(0, 1), dim=1)


def _build(card: SegmenterCard) -> nn.Module:
    """The network that a card describes, with random weights."""
    if card.network == TRANSLATOR:
        design = _required(card.translator, TRANSLATOR)
        return Translator(make_generator(design.factory), card.classes, design.domains, config=design.encoder)
    if card.network == FEDERATED:
        design = _required(card.federated, FEDERATED)
        method = make_method(design.method)
        return method.segmenter(method.build(), design.context)
    return build_network(card.network, card.classes)


def _required(design: Design | None, name: str) -> Design:
    if design is None:
        raise ConfigError(f"network is '{name}', but the entry '{name}', which it must be built from, is missing")
    return design
