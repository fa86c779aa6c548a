"""Which numbers may leave a site, and to how many digits: a closed list of names with a rule for each."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .policy import Policy

MAX_TEXT = 100  # characters of a text that leaves
# A modality is named by a site's administrator, a kind of label and a class by this package.
_NAME = r"[^\W_][\w.-]{0,39}"


def rounded(value: float, decimals: int) -> float:
    """`value` to a number of decimals."""
    return round(value, decimals)


def significant(value: float, digits: int) -> float:
    """`value` to a number of significant digits, at least 1."""
    return float(f"{value:.{digits - 1}e}")


@dataclass(frozen=True)
class _Rule:
    """How numbers leave whose whole name matches `names`.

    Attributes:
        names: regular expression.
        digits: from the value to what leaves.
        leave: whether a policy lets them leave.
    """

    names: str
    digits: Callable[[float], float]
    leave: Callable[[Policy], bool] = lambda policy: True


def _scores_leave(policy: Policy) -> bool:
    return policy.scores_leave


def _quality_leaves(policy: Policy) -> bool:
    return policy.quality_leaves


_SCORED = rf"(?:global|own)_(?:{_NAME}_)?"  # of the average or the site's own model, of one of several modalities
_RULES = (
    # Counts, the pixels' size and the organ's height are announced when a store is registered.
    _Rule(rf"samples|slices|(?:modality_)?slices_{_NAME}|(?:labelled|synthetic)_slices|alarms", float),
    _Rule(rf"(?:{_SCORED}|test_)test_cases|test_cases", float),
    _Rule(r"accepted|accepted_empty|distilled|adopted|augment_p", lambda value: rounded(value, 3)),
    _Rule(r"spacing|height", float),
    _Rule(r"seconds|images_per_second", lambda value: significant(value, 3)),
    # A network can be made whose loss is the value of one pixel.
    _Rule(r"loss|loss_(?:discriminator|generator|r1|path|guidance)", lambda value: significant(value, 3)),
    _Rule(rf"(?:{_SCORED}|test_)dice(?:_\d+)?", lambda value: rounded(value, 3), _scores_leave),
    _Rule(rf"{_SCORED}hd95(?:_\d+)?", lambda value: significant(value, 3), _scores_leave),
    _Rule(rf"{_SCORED}(?:dice|hd95)_undefined", float, _scores_leave),
    _Rule(r"quality_(?:layout|contrast)", lambda value: rounded(value, 2), _quality_leaves),
    _Rule(r"quality_distance", lambda value: significant(value, 2), _quality_leaves),
    # A network can be made whose classes single out one pixel: it changes these by less than half a hundredth.
    _Rule(r"explained_(?:adapted|first_guess)", lambda value: rounded(value, 2), _quality_leaves),
)


def leaving_numbers(
    values: Mapping[str, object], policy: Policy
) -> tuple[dict[str, str | float | int], dict[str, str]]:
    """What of a plan's report may leave the site.

    Applying it again to its own result changes nothing. That scores and numbers about synthetic slices come from enough
    patients is not visible here; training plans leave them out otherwise.

    Args:
        values: name to number, or to text for "domain". NaN means not measured, and leaves as it is.
        policy: of the site.

    Returns: the rounded values that may leave by name, and the reason for each of the other names.
    """
    kept: dict[str, str | float | int] = {}
    withheld: dict[str, str] = {}
    for name, value in values.items():
        if reason := _reason(name, value, policy):
            withheld[name] = reason
        elif isinstance(value, (str, int)) or math.isnan(value):
            kept[name] = value
        else:
            kept[name] = _rule(name).digits(value)
    return kept, withheld


def _rule(name: str) -> _Rule | None:
    return next((rule for rule in _RULES if re.fullmatch(rule.names, name)), None)


def _reason(name: object, value: object, policy: Policy) -> str | None:
    """Why a value may not leave; None if it may."""
    if name == "domain":
        is_name = isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()
        return None if is_name else "no short text"
    rule = _rule(name) if isinstance(name, str) else None
    if rule is None:
        return "not in the list of numbers that leave"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "no number"
    if math.isinf(value):
        return "infinite"
    return None if rule.leave(policy) else "the site's policy keeps it"
