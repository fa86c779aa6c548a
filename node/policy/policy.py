"""What the administrator of a node allows a researcher to ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ...common.files import atomic_file
from ...common.json_text import read_json
from ...common.records import read_record
from ...errors import ConfigError, UsageError
from .arguments import ArgumentTable, check_limit, described, is_wider, shown
from .default_arguments import GROUPS, default_arguments

POLICY_FILE = Path("etc") / "policy.json"  # below the node's folder
EXPLAINED = "explained"  # entry of the file for people, which is not read
INTRODUCTION = (
    "What this node's administrator allows a researcher to ask for. Edit the values below this block, then type "
    "`fedfactory site policy NODE --check`; each request is held against the file as it is then. What stands in this "
    "block is for people only. A setting that is left out has its default."
)
STRICTER_HIGH = ("least_patients", "least_slices", "least_batch", "least_updates", "least_patients_scored")
DAILY = ("rounds_a_day", "scorings_a_day", "scores_a_day", "qualities_a_day")
STRICTER_LOW = (*DAILY, "most_parameters", "most_memory", "most_disk")
PERMISSIONS = ("scores_leave", "quality_leaves", "allow_federated_analytics", "allow_preprocessing")

EXPLANATIONS = {
    "least_patients": "A store with fewer training patients takes part in no round. At least 1.",
    "least_slices": "A store with fewer training slices takes part in no round. At least 1.",
    "least_batch": (
        "Smallest number of slices in an update whose result leaves. The weights of an update with one slice may show "
        "that slice. At least 1."
    ),
    "least_updates": "Smallest number of updates in a round whose result leaves. At least 1.",
    "least_patients_scored": "No score leaves that was measured on fewer test patients. At least 1.",
    "scores_leave": "true or false: whether scores on test cases (Dice, HD95) leave the site.",
    "quality_leaves": "true or false: whether numbers that compare synthetic with this site's slices leave it.",
    "rounds_a_day": "Most trainings in 24 hours, all researchers and experiments together. 0 stops training.",
    "scorings_a_day": "Most requests in 24 hours that score weights without training, all together. 0 forbids them.",
    "scores_a_day": (
        "Most trainings in 24 hours of which scores on test cases leave, all together. Later ones train without. "
        "A request that only scores, as at the end of a run, is counted by scorings_a_day."
    ),
    "qualities_a_day": "Most rounds in 24 hours of which numbers about synthetic slices leave, all together.",
    "most_parameters": "Largest number of parameters of all networks of a round together.",
    "most_memory": (
        "Largest estimated memory of a round, GiB. The estimate is rather high than low: for federated segmentations "
        "one to two times what most rounds took."
    ),
    "most_disk": "Most disk space, GiB, of all states that the node keeps between rounds.",
    "require_secure_aggregation": (
        "true or false: whether weights leave encrypted only, so that the researcher learns their sum over sites. Only "
        "the data factory can be trained so."
    ),
    "allow_federated_analytics": (
        "true or false: whether the framework's statistics of data sets may be asked for. No plan needs it."
    ),
    "allow_preprocessing": (
        "true or false: whether the framework's preprocessing of data sets may be asked for. No plan needs it."
    ),
    "most_epsilon": (
        "Largest privacy budget (epsilon) that trainings with differential privacy may spend on a store, all "
        "experiments and researchers together, for as long as the store is there; null for no limit. 10 allows a run "
        "with the usual 8 and one with 4. Trainings without differential privacy are not counted."
    ),
    "arguments": (
        "Which arguments a researcher may set, and to what: two numbers are the lowest and the highest; otherwise the "
        "list has the values that are allowed, with pairs of numbers among them as ranges. An argument that is not in "
        'the table is refused. In a name, [] is an element of a list and * any name. "<text>" is any text, and '
        '"<anything>" any number, text, true, false or null. Batch and updates must keep to the numbers above, too.'
    ),
}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Limits of a node for all researchers and experiments together.

    Raises: ConfigError for a value out of range.

    Attributes:
        least_patients: training patients that a store must have to take part in a round.
        least_slices: training slices that a store must have to take part in a round.
        least_batch: smallest number of slices in an update.
        least_updates: smallest number of updates in a round.
        least_patients_scored: test patients below whose number no score leaves.
        scores_leave: whether scores on test cases may leave.
        quality_leaves: whether numbers that compare synthetic with real slices may leave.
        rounds_a_day: trainings in 24 hours.
        scorings_a_day: requests in 24 hours that score weights without training.
        scores_a_day: trainings in 24 hours of which scores on test cases leave.
        qualities_a_day: rounds in 24 hours of which numbers about synthetic slices leave.
        most_parameters: of the networks of a round.
        most_memory: estimated memory of a round, GiB.
        most_disk: of all states that the node keeps between rounds, GiB.
        require_secure_aggregation: whether weights leave encrypted only.
        allow_federated_analytics: whether the framework's statistics of data sets may be asked for.
        allow_preprocessing: whether the framework's preprocessing of data sets may be asked for.
        most_epsilon: privacy budget of a store, all experiments together; None for no limit.
        arguments: dotted name of each argument that may be set to its limit, see `arguments.ArgumentTable`.
    """

    least_patients: int = 2
    least_slices: int = 4
    least_batch: int = 2
    least_updates: int = 2
    least_patients_scored: int = 2
    scores_leave: bool = True
    quality_leaves: bool = True
    rounds_a_day: int = 2000
    scorings_a_day: int = 20
    scores_a_day: int = 60
    qualities_a_day: int = 30
    most_parameters: int = 200_000_000
    most_memory: float = 96.0
    most_disk: float = 50.0
    require_secure_aggregation: bool = False
    allow_federated_analytics: bool = False
    allow_preprocessing: bool = False
    most_epsilon: float | None = 10.0
    arguments: dict[str, Any] = field(default_factory=default_arguments)

    def __post_init__(self) -> None:
        for name in STRICTER_HIGH:
            self._check(name, lambda value: value >= 1, "at least 1")
        for name in DAILY:
            self._check(name, lambda value: value >= 0, "at least 0")
        self._check("most_parameters", lambda value: value >= 1, "at least 1")
        for name in ("most_memory", "most_disk"):
            self._check(name, _is_positive, "a positive number of GiB")
        if self.most_epsilon is not None:
            self._check("most_epsilon", _is_positive, "a positive number, or null for no limit")
        for name, limit in self.arguments.items():
            check_limit(f"arguments: {name}", limit)

    def _check(self, name: str, is_right: Callable[[float], bool], wanted: str) -> None:
        if not is_right(getattr(self, name)):
            raise ConfigError(f"{name} is {shown(getattr(self, name))}; it must be {wanted}")

    @classmethod
    def load(cls, root: str | Path) -> Policy:
        """The policy of the node at `root`.

        Raises: UsageError if there is none, ConfigError for unknown settings and wrong values; both name the file.
        """
        path = policy_file(root)
        try:
            return cls.from_dict(read_json(path, unique=True))
        except FileNotFoundError:
            raise UsageError(
                f"{path}: this node has no policy; write one with `fedfactory site policy {root}`"
            ) from None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: it cannot be read as JSON ({error}); correct it, or write it anew") from None
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, values: object) -> Policy:
        """The policy that parsed JSON describes; its explanations are not read.

        Raises: ConfigError for unknown settings and wrong values.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"the policy is {shown(values)}; it must be a table of settings")
        settings = {name: value for name, value in values.items() if name != EXPLAINED}
        known = [setting.name for setting in fields(cls)]
        if unknown := [name for name in settings if name not in known]:
            raise ConfigError(f"{shown(unknown[0])} is no setting of a policy; choose from {', '.join(known)}")
        return read_record(cls, settings)

    def save(self, root: str | Path) -> Path:
        """Write the policy of the node at `root`, for its owner alone, with explanations. Returns: the file."""
        path = policy_file(root)
        with atomic_file(path) as temporary:
            temporary.write_text(self.text(), encoding="utf-8")
        return path

    def text(self) -> str:
        """The file's content: JSON, with a sentence on each setting in a block that reading ignores."""
        explained = {"policy": INTRODUCTION, **EXPLANATIONS, **{name: about for name, (_, about) in GROUPS.items()}}
        settings = asdict(self)
        table = settings.pop("arguments")
        return (
            f'{{\n  "{EXPLAINED}": {{\n{_entries(explained, 4)}\n  }},\n{_entries(settings, 2)},\n'
            f'  "arguments": {{\n{_entries(table, 4)}\n  }}\n}}\n'
        )

    def unusual(self) -> list[str]:
        """One sentence on each setting that allows more than the default, and on each argument that is not admitted."""
        usual = Policy()
        found = []
        for name in (*STRICTER_HIGH, *STRICTER_LOW):
            own, default = getattr(self, name), getattr(usual, name)
            if own < default if name in STRICTER_HIGH else own > default:
                found.append(f"{name} is {own}; the default, {default}, allows less")
        if self.most_epsilon is None or self.most_epsilon > usual.most_epsilon:
            own = "null" if self.most_epsilon is None else f"{self.most_epsilon:g}"
            found.append(f"most_epsilon is {own}; the default, {usual.most_epsilon:g}, allows less")
        for name in PERMISSIONS:
            if getattr(self, name) and not getattr(usual, name):
                found.append(f"{name} is true; the default, false, allows less")
        for name, limit in self.arguments.items():
            if name not in usual.arguments:
                found.append(f"arguments: {name} is admitted, but no plan of this package has such an argument")
            elif is_wider(limit, than=usual.arguments[name]):
                found.append(
                    f"arguments: {name} may be {described(limit)}; the default, {described(usual.arguments[name])}, "
                    "allows less"
                )
        if missing := [name for name in usual.arguments if name not in self.arguments]:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            found.append(f"arguments: {', '.join(missing[:3])}{more} are not there; requests that set them are refused")
        return found

    def table(self) -> ArgumentTable:
        """The arguments that may be set."""
        return ArgumentTable(self.arguments)


def policy_file(root: str | Path) -> Path:
    """Where the policy of the node at `root` is."""
    return Path(root) / POLICY_FILE


def default_text() -> str:
    """The default policy as its file has it, with a sentence on each setting."""
    return Policy().text()


def _is_positive(value: float) -> bool:
    return 0 < value < float("inf")


def _entries(values: dict[str, object], indent: int) -> str:
    """The inside of a JSON object, one line for each entry."""
    pairs = (f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}" for name, value in values.items())
    return ",\n".join(" " * indent + pair for pair in pairs)
