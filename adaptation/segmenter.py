"""A trained segmenter and its file: safetensors with a JSON card."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor, nn

from ..common.weights_file import load_strictly, read_weights, write_weights
from ..errors import CheckpointError, ConfigError, UsageError
from ..generative.config import FactoryConfig
from ..generative.networks.build import make_generator
from ..imaging.slice_format import SliceFormat
from .methods.federated_method import MethodConfig, SiteContext
from .methods.registry import make_method
from .networks.architectures import build_network
from .networks.network_names import dimensions
from .networks.translator_network import EncoderConfig, Translator

KIND = "segmenter"
TRANSLATOR, FEDERATED = "translator", "federated"  # networks' names in such segmenters' cards
PATCH_DEPTH = 8  # slices that a 3-D network sees at once
SLICES_AT_ONCE = 32


class Segmenter:
    """A trained network with everything needed to apply it to a new image.

    Attributes:
        network: slices (B, 1, S, S) to logits (B, classes, S, S), or stacks of slices (B, 1, D, S, S) alike.
        format: what a new image must be turned into first.
        card: where it came from; JSON-able.
    """

    def __init__(self, network: nn.Module, fmt: SliceFormat, card: dict[str, Any]) -> None:
        self.network, self.format, self.card = network.eval(), fmt, card

    @property
    def classes(self) -> int:
        return self.card["classes"]

    @property
    def dimensions(self) -> int:
        """2 if a slice is segmented by itself, 3 if its neighbours are seen."""
        name = self.card["config"]["network"]
        return 2 if name in (TRANSLATOR, FEDERATED) else dimensions(name)

    def to(self, device: torch.device | str) -> Segmenter:
        self.network.to(device)
        return self

    @torch.no_grad()
    def probabilities(self, images: Tensor, volume: np.ndarray | None = None) -> Tensor:
        """Slices (N, 1, S, S) in [-1, 1] to (N, classes, S, S) summing to one.

        Args:
            volume: (N,) which volume a slice belongs to, for 3-D networks; a volume's slices follow each other. None
                takes all for one volume's.
        """
        if self.dimensions == 2:
            parts = [torch.softmax(self.network(part), dim=1) for part in images.split(SLICES_AT_ONCE)]
            return torch.cat(parts)
        if volume is not None:
            ends = np.flatnonzero(np.diff(volume)) + 1
            counts = np.diff([0, *ends, len(volume)]).tolist()
            return torch.cat([self.probabilities(part) for part in images.split(counts)])
        size = (PATCH_DEPTH, *images.shape[2:])
        windows = SlidingWindowInferer(size, sw_batch_size=1, overlap=0.5, mode="gaussian", cval=-1.0)
        return torch.softmax(windows(images[:, 0][None, None], self.network)[0].movedim(0, 1), dim=1)

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
        name, classes = card["config"]["network"], card["classes"]
        if name == TRANSLATOR:
            generator = make_generator(FactoryConfig.from_dict(card["factory"]))
            encoder = EncoderConfig(**card["config"]["encoder"])
            network: nn.Module = Translator(generator, classes, card["domains"], config=encoder)
        elif name == FEDERATED:
            method = make_method(MethodConfig.from_dict(card["config"]["method"]))
            network = method.segmenter(method.build(), SiteContext(**card["config"]["context"]))
        else:
            network = build_network(name, classes)
        return cls(network, SliceFormat.from_dict(card["format"]), card)
