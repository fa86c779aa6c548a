"""What the trainer reports of its updates, and what a site stores between rounds to continue them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from ..common.records import read_record
from .adaptive_augmentation import AugmentationStrength


@dataclass(frozen=True, kw_only=True)
class StepLosses:
    """Losses of one update, for curves; None where this update did not compute the term.

    Attributes:
        discriminator: logistic loss of the discriminator.
        generator: non-saturating loss of the generator.
        r1: R1 gradient penalty, unweighted.
        path: path length penalty, unweighted.
        guidance: mean squared angle to the site's mean embedding, radians squared, unweighted.
    """

    discriminator: float | None = None
    generator: float | None = None
    r1: float | None = None
    path: float | None = None
    guidance: float | None = None


def mean_losses(steps: Sequence[StepLosses]) -> dict[str, float]:
    """For each term, the mean over the updates that computed it; terms that no update computed are left out."""
    means = {}
    for term in StepLosses.__dataclass_fields__:
        values = [getattr(step, term) for step in steps if getattr(step, term) is not None]
        if values:
            means[term] = sum(values) / len(values)
    return means


@dataclass
class TrainerState:
    """What a site stores between rounds besides the moments of its optimizers; it is never sent.

    Attributes:
        updates_done: number of updates so far; lazy penalties are scheduled by it.
        path_mean: running mean of the path lengths.
        augmentation: strength of the adaptive augmentation.
    """

    updates_done: int = 0
    path_mean: float = 0.0
    augmentation: AugmentationStrength = field(default_factory=AugmentationStrength)

    def to_dict(self) -> dict[str, object]:
        """JSON-able copy, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> TrainerState:
        """The state that `to_dict` wrote.

        Raises: ConfigError for other content.
        """
        return read_record(cls, values)
