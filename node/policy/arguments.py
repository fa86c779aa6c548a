"""Which arguments of a training plan a researcher may set, and to what: a closed table of dotted names and limits."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from reprlib import repr as shortened

from ...errors import ConfigError, one_line
from .default_arguments import ANYTHING, TEXT

MOST_VALUES, MOST_LEVELS, LONGEST_TEXT = 5000, 12, 1000  # of what a researcher sends
LONGEST_NAME = 200  # signs of it that are shown
LARGEST_NUMBER = 2**53  # of what ANYTHING admits
ELEMENT, ONE, REST = "[]", "*", "**"  # parts of a name: an element of a list, any name, any names below
# The card of a labelled factory describes networks in the words in which the other plans get theirs.
SAME_AS = {
    ("model_args", "card", "config"): ("model_args", "factory"),
    ("model_args", "card", "robust", "federated", "method"): ("model_args", "config"),
}
Name = tuple[str, ...]


def check_limit(name: str, limit: object) -> None:
    """Raises: ConfigError unless `limit` is a list: of two numbers, the lower first, or of values and such pairs."""
    if not isinstance(limit, list):
        raise ConfigError(f"{name} is {shown(limit)}; it must be a list: the lowest and the highest number, or values")
    for part in _alternatives(limit):
        if isinstance(part, list):
            if not _is_range(part):
                raise ConfigError(
                    f"{name} has {shown(part)}; a list within a list must be two numbers, the lower first"
                )
        elif not (part is None or isinstance(part, (bool, str)) or _is_number(part)):
            raise ConfigError(f"{name} has {shown(part)}; a value must be a number, a text, true, false or null")


def admits(limit: list[object], value: object) -> bool:
    """Whether `limit`, see `check_limit`, admits a single value that a researcher sent."""
    return any(_matches(part, value) for part in _alternatives(limit))


def is_wider(limit: list[object], than: list[object]) -> bool:
    """Whether one limit may admit what another does not."""
    others = _alternatives(than)
    ranges = [other for other in others if isinstance(other, list)]

    def covered(part: object) -> bool:
        if isinstance(part, list):
            return any(low <= part[0] and part[1] <= high for low, high in ranges)
        return part in others if part in (TEXT, ANYTHING) else admits(than, part)

    return ANYTHING not in others and not all(covered(part) for part in _alternatives(limit))


def described(limit: list[object]) -> str:
    """A limit in words, for "it must be ..."."""
    parts = [
        f"from {part[0]} to {part[1]}" if isinstance(part, list) else _WORDS.get(str(part), json.dumps(part))
        for part in _alternatives(limit)
    ]
    return " or ".join(parts) or "left out"


class ArgumentTable:
    """The arguments that a site admits. All others are refused.

    Args:
        limits: dotted name to limit. In a name, `[]` is an element of a list, `*` any name at its place, and a final
            `**` all that is below, except below what has a name of its own.
    """

    def __init__(self, limits: Mapping[str, list[object]]) -> None:
        self.limits = {tuple(name.replace("[]", ".[]").split(".")): limit for name, limit in limits.items()}
        self.patterns = [name for name in self.limits if ONE in name or REST in name]
        self.beginnings = {name[:end] for name in self.limits for end in range(1, len(name))}

    def refusals(self, whole: str, value: object) -> Iterator[str]:
        """Why the values below an argument are refused, one sentence for each that is.

        Args:
            whole: name of all that is looked at, such as "model_args".
            value: what came from the network: anything.
        """
        try:
            values = list(_values((whole,), value))
        except ConfigError as error:
            yield str(error)
            return
        for path, part in values:
            name = _renamed(path)
            limit = self._limit_of(name)
            if isinstance(part, (Mapping, list, tuple)) and (name in self.beginnings or limit == [ANYTHING]):
                continue  # it is empty
            if limit is None:
                yield f"{dotted(path)} is {shown(part)}; it must be left out, for this site's policy does not name it"
            elif not admits(limit, part):
                yield f"{dotted(path)} is {shown(part)}; it must be {described(limit)}"

    def _limit_of(self, path: Name) -> list[object] | None:
        if path in self.limits:
            return self.limits[path]
        for pattern in self.patterns:
            if pattern[-1] == REST:
                begins = pattern[:-1]
                named = any(path[:end] in self.limits for end in range(len(begins) + 1, len(path)))
                if path[: len(begins)] == begins and len(path) > len(begins) and not named:
                    return self.limits[pattern]
            elif len(pattern) == len(path) and all(
                ours in (ONE, theirs) for ours, theirs in zip(pattern, path, strict=True)
            ):
                return self.limits[pattern]
        return None


def shown(value: object) -> str:
    """A value that a researcher sent, short, on one line and in printable signs."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST_NUMBER:
        return "a very large number"  # Python writes none of more than 4300 digits
    if not (value is None or isinstance(value, (bool, int, float, str, list, tuple, dict))):
        return f"of type {type(value).__name__}"
    try:
        return one_line(shortened(value))
    except ValueError:  # such a number is in it
        return f"of type {type(value).__name__}"


def dotted(path: Name) -> str:
    """A name as it stands in the table; signs that cannot be shown are escaped."""
    return one_line(".".join(path).replace(".[]", "[]")[:LONGEST_NAME])


_WORDS = {TEXT: f"a text of at most {LONGEST_TEXT} signs", ANYTHING: "a number, a text, true, false or null"}


def _alternatives(limit: list[object]) -> list[object]:
    return [limit] if _is_range(limit) else limit


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 2**63 and value == value


def _is_range(value: list[object]) -> bool:
    return len(value) == 2 and all(_is_number(part) for part in value) and value[0] <= value[1]


def _matches(part: object, value: object) -> bool:
    """Whether one alternative of a limit admits a value. True and 1 are different here."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(part, list):
        return number and part[0] <= value <= part[1]
    if part in (TEXT, ANYTHING) and isinstance(part, str):
        if isinstance(value, str):
            return len(value) <= LONGEST_TEXT
        plain = value is None or isinstance(value, bool) or (number and not LARGEST_NUMBER < abs(value) < math.inf)
        return part == ANYTHING and plain
    if _is_number(part):
        return number and part == value
    return type(part) is type(value) and part == value


def _renamed(path: Name) -> Name:
    for begins, other in SAME_AS.items():
        if path[: len(begins)] == begins:
            return (*other, *path[len(begins) :])
    return path


def _values(path: Name, value: object, count: list[int] | None = None) -> Iterator[tuple[Name, object]]:
    """Name and value of everything below `value` that is no table and no list; empty ones too.

    Raises: ConfigError if there are too many values or levels, or if a name is no text.
    """
    count = [0] if count is None else count
    count[0] += 1
    if count[0] > MOST_VALUES:
        raise ConfigError(f"{path[0]} has more than {MOST_VALUES} values; a request must have fewer")
    if len(path) > MOST_LEVELS:
        raise ConfigError(f"{path[0]} is nested in more than {MOST_LEVELS} levels; a request must have fewer")
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            if not isinstance(key, str):
                raise ConfigError(f"{dotted(path)} has the name {shown(key)}; names must be texts")
            yield from _values((*path, repr(key) if key in (ELEMENT, ONE, REST) else key), part, count)
    elif isinstance(value, (list, tuple)) and value:
        for part in value:
            yield from _values((*path, ELEMENT), part, count)
    else:
        yield path, value
