"""Frozen dataclasses from parsed JSON and back, every entry checked against the type of its field."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ..errors import ConfigError

PLAIN = {int, float, str, bool, type(None)}  # what JSON knows too
Record = TypeVar("Record")


def read_record(kind: type[Record], values: object, *, extra: str = "refuse") -> Record:
    """The record that a JSON object describes.

    Args:
        kind: a dataclass whose fields are numbers, strings, tuples, dictionaries with string keys or further records.
        values: parsed JSON of unknown origin.
        extra: entries without a field: "refuse" or "ignore".

    Raises: ConfigError for a missing, unknown or wrongly typed entry, naming it, or where the record refuses a value.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(f"{kind.__name__} is of type {type(values).__name__}; it must be a JSON object")
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    if extra == "refuse" and values.keys() - names:
        raise ConfigError(
            f"{kind.__name__} has the unknown entries {sorted(values.keys() - names)}; use {sorted(names)}"
        )
    for field in fields(kind):  # type: ignore[arg-type]
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{kind.__name__} lacks the entry '{field.name}', which it must have")
    hints = _hints(kind)
    return kind(**{name: _checked(name, values[name], hints[name]) for name in names & values.keys()})


def write_record(record: object) -> Any:
    """JSON-able copy of a record, the inverse of `read_record`; tuples become lists."""
    if type(record) in PLAIN:  # most parts of most records
        return record
    if hasattr(record, "to_dict"):
        return record.to_dict()
    if is_dataclass(record):
        return {name: write_record(getattr(record, name)) for name in _names(type(record))}
    if isinstance(record, Mapping):
        return {name: write_record(value) for name, value in record.items()}
    if isinstance(record, (list, tuple)):
        if PLAIN.issuperset(map(type, record)):
            return list(record)
        return [write_record(value) for value in record]
    return record


def record_to_dict(record: object) -> dict[str, Any]:
    """`write_record` of a record that has a `to_dict` of its own, which may call this."""
    return {name: write_record(getattr(record, name)) for name in _names(type(record))}


@functools.lru_cache(maxsize=256)
def _names(kind: type) -> tuple[str, ...]:
    """Names of a record's fields."""
    return tuple(field.name for field in fields(kind))


@functools.lru_cache(maxsize=256)
def _hints(kind: type) -> dict[str, Any]:
    """Types of a record's fields by name; finding them takes longer than all checks."""
    return get_type_hints(kind)


def _checked(name: str, value: object, hint: Any) -> Any:
    """`value` as a `hint`, which is a type or a generic alias. Raises: ConfigError if it is none."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _checked(name, value, hint)
    if hint in (Any, object):
        return value
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} is of type {type(value).__name__}; it must be a JSON object")
        return hint.from_dict(value) if hasattr(hint, "from_dict") else read_record(hint, value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if origin is tuple and isinstance(value, (list, tuple)):
        if arguments[1:] == (...,) and arguments[0] in (int, str) and all(type(part) is arguments[0] for part in value):
            return tuple(value)  # long lists of numbers are the rule in stores
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(kinds) == len(value):
            return tuple(_checked(name, part, kind) for part, kind in zip(value, kinds, strict=True))
    elif origin in (dict, Mapping) and isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _checked(f"{name}.{key}", part, arguments[1]) for key, part in value.items()}
    elif isinstance(hint, type) and isinstance(value, hint) and not (hint in (int, float) and isinstance(value, bool)):
        return value
    wanted = hint.__name__ if isinstance(hint, type) and origin is None else str(hint)
    raise ConfigError(f"{name} is {str(value)[:80]!r}; it must be of type {wanted}")
