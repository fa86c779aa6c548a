"""A trained segmenter and its file: safetensors with a JSON card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..common.sketches import sketch
from ..common.weights_file import IMPOSSIBLE, load_strictly, read_weights, refuse_misfit, write_weights
from ..errors import CheckpointError, ConfigError, UsageError
from ..generative.networks.build import make_generator
from ..imaging.slice_format import SliceFormat
from .engine.object_rule import keep_single_objects
from .engine.planned_network import PlannedNetwork
from .engine.window_inference import turn, turn_back, view_agreement, window_probabilities
from .methods.registry import make_method
from .networks.translator_network import Translator
from .segmenter_card import FEDERATED, TRANSLATOR, SegmenterCard

KIND = "segmenter"
SLICES_AT_ONCE = 32

Design = TypeVar("Design")


class Segmenter:
    """A trained network with everything needed to apply it to a new image.

    Attributes:
        network: of a planned segmenter, see `PlannedNetwork`; otherwise whole slices (B, C, S, S) in [-1, 1] to logits
            (B, classes, S, S).
        format: the slice format that a new image must be brought into first.
        card: how the network is built, and what it was trained on.
    """

    def __init__(self, network: nn.Module, fmt: SliceFormat, card: SegmenterCard) -> None:
        self.network, self.format, self.card = network.eval(), fmt, card

    @property
    def classes(self) -> int:
        return self.card.classes

    def to(self, device: torch.device | str) -> Segmenter:
        self.network.to(device)
        return self

    def probabilities(self, images: Tensor, volume: np.ndarray | None = None, *, views: int = 1) -> Tensor:
        """Slices (N, C, S, S) in [-1, 1] to probabilities (N, classes, S, S), which sum to one over the classes.

        Args:
            images: (N, C, S, S) in [-1, 1], with the channels of the segmenter's slice format.
            volume: (N,) integer, the volume that a slice belongs to; slices of a volume follow each other. None: all
                slices are of one volume.
            views: number of turned, mirrored or shifted views that are averaged; at most as many as the card has.

        Raises: UsageError for more views than the network was trained in, or another number of channels.
        """
        self.check_views(views)
        return self._mean_of_views(images, volume, self.card.views[:views])

    def check_views(self, views: int) -> None:
        """Raises: UsageError if the network was not trained in this number of views."""
        if not 1 <= views <= len(self.card.views):
            raise UsageError(
                f"views is {views}; choose from 1 to {len(self.card.views)}, the views this segmenter was trained in"
            )

    def agreement(self, images: Tensor, volume: np.ndarray | None = None) -> float:
        """See `view_agreement`; NaN if the network was trained in one view only.

        Args:
            images: (N, C, S, S) in [-1, 1].
            volume: (N,) integer, see `probabilities`.

        Raises: UsageError for another number of channels than the segmenter's.
        """
        if len(self.card.views) == 1:
            return float("nan")
        mean, single = self.probabilities_and_views(images, volume)
        return view_agreement(single, mean.argmax(1), self.classes)

    def probabilities_and_views(self, images: Tensor, volume: np.ndarray | None = None) -> tuple[Tensor, list[Tensor]]:
        """Mean probabilities (N, classes, S, S) over all views, and the label map (N, S, S) of each single view.

        Args:
            images: (N, C, S, S) in [-1, 1].
            volume: (N,) integer, see `probabilities`.

        Raises: UsageError for another number of channels than the segmenter's.
        """
        mean, single = torch.zeros(()), []
        for view in self.card.views:
            found = self._mean_of_views(images, volume, (view,))
            mean = mean + found / len(self.card.views)
            single.append(found.argmax(1))
        return mean, single

    def tidied(self, labels: np.ndarray) -> np.ndarray:
        """A label map (X, Y, Z) that keeps the card's rule of single objects."""
        return keep_single_objects(labels, self.card.single_objects)

    @torch.no_grad()
    def _mean_of_views(self, images: Tensor, volume: np.ndarray | None, views: tuple[int, ...]) -> Tensor:
        """Mean probabilities (N, classes, S, S) over these views of slices (N, C, S, S) in [-1, 1].

        They are computed on the network's device and returned on that of the slices.
        """
        if images.ndim != 4 or images.shape[1] != self.format.channels:
            raise UsageError(
                f"images has shape {tuple(images.shape)}; it must be (slices, {self.format.channels}, rows, columns), "
                f"as this segmenter was trained on {self.format.channels} channel(s)"
            )
        given = images.to(next((values.device for values in self.network.parameters()), images.device))
        if self.card.plan is not None:
            given = (given.float() + 1) / 2
            found = window_probabilities(self.network, given, self.card.plan, volume=volume, views=views)
            return found.to(images.device)
        total = torch.zeros(())
        for view in views:
            parts = turn(given, view).split(SLICES_AT_ONCE)
            total = total + turn_back(torch.cat([self.network(part).softmax(1) for part in parts]), view)
        return (total / len(views)).to(images.device)

    def save(self, path: str | Path) -> None:
        write_weights(path, self.network.state_dict(), {**self.to_dict(), "kind": KIND})

    @classmethod
    def load(cls, path: str | Path) -> Segmenter:
        """Raises: UsageError if the file is missing, CheckpointError if it is damaged or no segmenter."""
        weights, card = read_weights(path, kind=KIND)
        return cls.with_weights(card, weights, path)

    @classmethod
    def with_weights(cls, card: Mapping[str, object], weights: dict[str, Tensor], path: str | Path) -> Segmenter:
        """The segmenter that a card describes, see `to_dict`, with the weights of the file at `path`.

        Raises: CheckpointError if the card is not usable, or the weights are of another network.
        """
        try:
            sketched = sketch(lambda: cls.from_dict(card), tensors=len(weights))  # before memory is taken
            refuse_misfit(sketched.network, weights, path)
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
        fmt = SliceFormat.from_dict(values["format"])
        if card.channels not in (None, fmt.channels):
            raise ConfigError(
                f"channels is {card.channels}, but {fmt.channels} in the slice format; both must be equal"
            )
        try:
            return cls(_build(card), fmt, card)
        except IMPOSSIBLE as error:
            raise ConfigError(f"no network can be made of these settings ({error})") from None


def _build(card: SegmenterCard) -> nn.Module:
    """The network that a card describes, with random weights."""
    if card.network == TRANSLATOR:
        design = _required(card.translator, TRANSLATOR)
        return Translator(make_generator(design.factory), card.classes, design.domains, config=design.encoder)
    if card.network == FEDERATED:
        design = _required(card.federated, FEDERATED)
        method = make_method(design.method)
        return method.segmenter(method.build(), design.context)
    return PlannedNetwork(_required(card.plan, card.network))


def _required(design: Design | None, name: str) -> Design:
    if design is None:
        raise ConfigError(f"network is '{name}', but the entry that it must be built from is missing")
    return design
