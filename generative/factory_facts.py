"""How a factory came about: the part of its file that describes the training run, checked when it is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields

from ..errors import ConfigError


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
    stages: tuple[Mapping[str, object], ...] = ()
    federation: Mapping[str, object] = field(default_factory=dict)
    events: int = 0
    shared_anatomy: SharedAnatomy | None = None
    quality: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    alarms: tuple[str, ...] = ()
    imported: str | None = None
    geometry: str | None = None

    def to_dict(self) -> dict[str, object]:
        """JSON-able copy without empty entries, the inverse of `from_dict`."""
        values = asdict(self)
        values |= {"stages": list(values["stages"]), "alarms": list(values["alarms"])}
        return {name: value for name, value in values.items() if value not in (None, [], {})}

    @classmethod
    def from_dict(cls, values: Mapping[str, object]) -> FactoryFacts:
        """Facts as read from JSON.

        Raises: ConfigError for unknown entries and for values of another type.
        """
        if not isinstance(values, Mapping):
            raise ConfigError(f"the facts of the factory are a {type(values).__name__}; they must be named entries")
        unknown = set(values) - {entry.name for entry in fields(cls)}
        if unknown:
            raise ConfigError(f"the facts of the factory have unknown entries {sorted(map(str, unknown))}; remove them")
        for name, value in values.items():
            wanted, fits = KINDS[name]
            if value is not None and not fits(value):
                raise ConfigError(f"{name} is {str(value)[:60]!r}; it must be {wanted}")
        known = {name: value for name, value in values.items() if value is not None}
        for name in ("stages", "alarms"):
            if name in known:
                known[name] = tuple(known[name])
        if "shared_anatomy" in known:
            known["shared_anatomy"] = SharedAnatomy(**known["shared_anatomy"])
        return cls(**known)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_record(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in value)


def _is_numbers(value: object) -> bool:
    return _is_record(value) and all(isinstance(number, (int, float)) for number in value.values())


def _is_table(value: object) -> bool:
    return _is_record(value) and all(_is_numbers(row) for row in value.values())


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _is_anatomy(value: object) -> bool:
    return (
        _is_record(value)
        and value.keys() == {"round", "pairs"}
        and _is_count(value["round"])
        and _is_numbers(value["pairs"])
    )


Kind = tuple[str, Callable[[object], bool]]  # of a value: what it must be, and the check
TEXT: Kind = ("a text", lambda value: isinstance(value, str))
COUNT: Kind = ("a whole number", _is_count)
RECORD: Kind = ("settings by name", _is_record)
KINDS: dict[str, Kind] = {
    "tag": TEXT,
    "seed": COUNT,
    "rounds": COUNT,
    "rounds_planned": COUNT,
    "stages": ("a list of settings by name", lambda value: _is_list(value) and all(_is_record(row) for row in value)),
    "federation": RECORD,
    "events": COUNT,
    "shared_anatomy": ("a round and the scores of pairs", _is_anatomy),
    "quality": ("numbers by name for each domain", _is_table),
    "alarms": ("a list of texts", lambda value: _is_list(value) and all(isinstance(text, str) for text in value)),
    "imported": TEXT,
    "geometry": TEXT,
}
