"""Range checks of methods' settings: one rule each, with the value received and what is wanted."""

from __future__ import annotations

import math
from collections.abc import Collection

from ....errors import ConfigError
from ....imaging.slice_choices import MAX_CHANNELS


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises: ConfigError if `value` is below `least` or NaN."""
    if not value >= least:
        raise ConfigError(f"{name} is {value}; it must be at least {least}")


def check_positive(name: str, value: float) -> None:
    """Raises: ConfigError if `value` is not above 0."""
    if not value > 0:
        raise ConfigError(f"{name} is {value}; it must be positive")


def check_number(name: str, value: object) -> None:
    """Raises: ConfigError if `value` is not a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ConfigError(f"{name} is {value!r}; it must be a finite number")


def check_fraction(name: str, value: float) -> None:
    """Raises: ConfigError if `value` is not in [0, 1]."""
    if not 0 <= value <= 1:
        raise ConfigError(f"{name} is {value}; choose from 0 to 1")


def check_channels(name: str, value: int) -> None:
    """Raises: ConfigError if `value` is not a number of channels that a slice can have."""
    if value not in range(1, MAX_CHANNELS + 1):
        raise ConfigError(f"{name} is {value}; choose a whole number from 1 to {MAX_CHANNELS}")


def check_choice(name: str, value: object, choices: Collection[object]) -> None:
    """Raises: ConfigError if `value` is not among `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} is '{value}'; choose one of {', '.join(map(str, choices))}")
