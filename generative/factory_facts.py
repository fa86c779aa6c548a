"""How a factory came about: the part of its file that describes the training run, checked when it is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..common.records import read_record, record_to_dict


@dataclass(frozen=True)
class SharedAnatomy:
    """One measurement of the anatomy that domains share, see `metrics.shared_anatomy`.

    Attributes:
        round: number of the round after which it was measured.
        pairs: score by pair of domains ("a / b"), about 0 for chance, 1 for equal anatomy.
    """

    round: int
    pairs: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class FactoryFacts:
    """How a factory came about. An imported factory has the last two entries, a trained one the others.

    Attributes:
        tag: tag of the sites' data.
        seed: seed of the run.
        rounds: finished rounds.
        rounds_planned: rounds of all stages together.
        stages: settings of each stage, by name.
        federation: settings of the federation, by name.
        events: how often a site was left out of a round.
        shared_anatomy: the newest measurement; None if there is none.
        quality: by domain, the newest `SiteQuality` of a site, by name.
        alarms: reasons not to trust the factory's labels, one sentence each.
        imported: kind of the published file that the factory was imported from; None if it was trained here.
        geometry: where spacing and height come from, for imported factories.
    """

    tag: str | None = None
    seed: int | None = None
    rounds: int | None = None
    rounds_planned: int | None = None
    stages: tuple[dict[str, object], ...] = ()
    federation: dict[str, object] = field(default_factory=dict)
    events: int = 0
    shared_anatomy: SharedAnatomy | None = None
    quality: dict[str, dict[str, float]] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    imported: str | None = None
    geometry: str | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-able copy without empty entries, the inverse of `from_dict`."""
        return {name: value for name, value in record_to_dict(self).items() if value not in (None, [], {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> FactoryFacts:
        """Facts as read from JSON.

        Raises: ConfigError for unknown entries and for values of another type.
        """
        return read_record(cls, values)
