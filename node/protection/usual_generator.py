"""Whether a received generator is the usual next one after what a site sent, without keeping its weights.

Numbers that compare a generator's slices with a site's own are answers to a question: a generator made for the purpose
turns them into grey values of chosen pixels. A site answers only for a generator that lies as near to the one that it
sent last as averages of sites do, and in one of several rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ...common.files import write_json
from ...common.json_text import read_json
from ...common.records import read_record, record_to_dict
from ...errors import FedFactoryError
from .site_secret import mixed_seed

RECORD_SUFFIX = ".generator.json"  # after the store's name
SKETCH_LENGTH = 256  # distances are right to about 1 / sqrt(2 * 256) = 4 %
# Largest distance of the received generator from the one sent last, in units of the site's own change in that round.
MAX_RATIO = 8.0
INTERVAL = 10  # rounds of a store, of all experiments together, from one answer to the next


@dataclass(frozen=True, kw_only=True)
class GeneratorRecord:
    """What a site remembers of the generator that it sent last, beside its store and independent of all states.

    Attributes:
        sketch: SKETCH_LENGTH random projections of the weights, which only the site can compute.
        changed: length of the site's own change of the weights in that round.
        rounds: rounds of training of the store since an answer left; None if none ever did.
    """

    sketch: tuple[float, ...] = ()
    changed: float = 0.0
    rounds: int | None = None

    @classmethod
    def load(cls, store: Path) -> GeneratorRecord:
        """The record beside a store; an empty one, with which nothing is usual, without a usable file."""
        try:
            record = read_record(cls, read_json(record_file(store)))
        except (OSError, ValueError, FedFactoryError):
            return cls()
        return record if len(record.sketch) == SKETCH_LENGTH else cls()

    def save(self, store: Path) -> None:
        """Write the record beside a store, for its owner alone."""
        write_json(record_file(store), record_to_dict(self), compact=True)

    def ratio(self, weights: Mapping[str, Tensor], secret: bytes) -> float:
        """Distance of the received weights, name to tensor, from those that were sent last, in units of the site's own
        change then; infinite without a record."""
        if not self.sketch or not self.changed > 0:
            return math.inf
        sent = torch.tensor(self.sketch, dtype=torch.float64)
        return float((sketch_of(weights, secret) - sent).norm()) / self.changed

    def is_usual(self, weights: Mapping[str, Tensor], secret: bytes) -> bool:
        """Whether the received generator lies as near to the one that was sent last as averages of sites do."""
        return self.ratio(weights, secret) <= MAX_RATIO

    @property
    def is_due(self) -> bool:
        """Whether enough rounds lie between the last answer and this one."""
        return self.rounds is None or self.rounds >= INTERVAL

    def answers(self, weights: Mapping[str, Tensor], secret: bytes) -> bool:
        """Whether a number about the slices of the received generator may leave."""
        return self.is_due and self.is_usual(weights, secret)

    def after_round(
        self, received: Mapping[str, Tensor], sent: Mapping[str, Tensor], secret: bytes, *, answered: bool
    ) -> GeneratorRecord:
        """The record after a round of training.

        Args:
            received: name to weights of the generator before the round.
            sent: the same after it.
            secret: of the site.
            answered: whether numbers about the received generator leave.
        """
        squares = [float((sent[name].double() - received[name].double()).square().sum()) for name in sent]
        rounds = 0 if answered else None if self.rounds is None else self.rounds + 1
        sketch = tuple(sketch_of(sent, secret).tolist())
        return replace(self, sketch=sketch, changed=math.sqrt(sum(squares)), rounds=rounds)


def record_file(store: Path) -> Path:
    """The file of the record of a store."""
    return store.with_name(store.name + RECORD_SUFFIX)


def sketch_of(weights: Mapping[str, Tensor], secret: bytes) -> Tensor:
    """Random projections (SKETCH_LENGTH,) float64 of weights, name to tensor; lengths of differences are kept.

    Every weight is added, with a random sign, to one of the sums (Charikar et al. 2002, count sketch). Signs and places
    follow from the site's secret: otherwise a generator could be made that differs only where no sum sees it.
    """
    sketch = torch.zeros(SKETCH_LENGTH, dtype=torch.float64)
    for name in sorted(weights):
        values = weights[name].detach().cpu().double().flatten()
        rng = torch.Generator().manual_seed(mixed_seed(secret, "sketch", name, tuple(weights[name].shape)))
        place = torch.randint(0, 2 * SKETCH_LENGTH, values.shape, generator=rng)
        sketch.index_add_(0, place // 2, values * (place % 2 * 2 - 1))
    return sketch
