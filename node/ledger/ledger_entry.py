"""One line of a site's ledger: what it holds, and how its hash is made and checked."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import re
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

from ...common.json_text import parse_json
from ...errors import one_line

GENESIS = "0" * 64  # stands for the entry before the first one
MAX_LINE = 4 << 20  # bytes, with the end of the line
MAX_TEXT = 1000  # characters
MAX_PARTS = 20_000  # of a list or a table
MAX_DEPTH = 6
MAX_WHOLE = 2**63  # larger numbers are not numbers to many readers of JSON
KINDS = {"event": str, "facts": dict, "number": int, "previous": str, "time": str}  # fields of a line, without its hash
HASH = re.compile(rb',"sha256":"([0-9a-f]{64})"\}')
HASH_LENGTH = 77  # characters that HASH matches


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What happened once.

    Attributes:
        number: 1 for the first entry of a ledger.
        time: ISO 8601 in UTC, to the millisecond.
        event: kind, see `ledger`.
        facts: as JSON gives them back.
        previous: `sha256` of the entry before; GENESIS in the first.
        sha256: of this entry's line without this field, in hexadecimal.
    """

    number: int
    time: str
    event: str
    facts: dict[str, Any]
    previous: str
    sha256: str

    @property
    def moment(self) -> datetime:
        """`time`, with its time zone."""
        return datetime.fromisoformat(self.time)


def write_entry(event: str, facts: Mapping[str, object], *, number: int, previous: str) -> tuple[Entry, bytes]:
    """A new entry and its line: JSON of ASCII characters with sorted names and no spaces, the hash at the end.

    Nothing that a researcher sends can make a line that breaks another one, commands a terminal or has no end: texts
    are on one line and at most 1,000 characters, numbers are finite and of 64 bits or written as text, and the largest
    facts of a line of more than 4 MiB are replaced by size and SHA-256. What was cut says so.
    """
    kept = plain(facts)
    time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    content = {"event": plain(event), "facts": kept, "number": number, "previous": previous, "time": time}
    body = _json(content)
    if len(body) + HASH_LENGTH > MAX_LINE:
        for name in sorted(kept, key=lambda name: len(_json(kept[name])), reverse=True):
            left_out = _json(kept[name])
            kept[name] = f"(left out: {len(left_out)} bytes of JSON, SHA-256 {hashlib.sha256(left_out).hexdigest()})"
            body = _json(content)
            if len(body) + HASH_LENGTH <= MAX_LINE:
                break
    digest = hashlib.sha256(body).hexdigest()
    return Entry(**content, sha256=digest), body[:-1] + b',"sha256":"%s"}\n' % digest.encode()


def read_entry(line: bytes) -> Entry:
    """The entry of a line, whose hash is checked; its place in the chain is not.

    Raises: ValueError saying what is wrong with the line.
    """
    if not line.endswith(b"\n"):
        raise ValueError("it has no end")
    found = HASH.fullmatch(line, max(0, len(line) - HASH_LENGTH - 1), len(line) - 1)
    if found is None:
        raise ValueError("it is no entry")
    body = line[: found.start()] + b"}"
    if hashlib.sha256(body).hexdigest().encode() != found[1]:
        raise ValueError("its hash is not that of its content")
    try:
        content = parse_json(body)
        if {name: type(content[name]) for name in content} != KINDS:
            raise ValueError("it has other fields")
        entry = Entry(**content, sha256=found[1].decode())
        if entry.moment.tzinfo is None:
            raise ValueError("its time has no time zone")
    except (ValueError, TypeError) as error:
        raise ValueError(f"it is no entry ({one_line(str(error))[:200]})") from None
    return entry


def plain(value: object, depth: int = 0) -> Any:
    """A copy of `value` of what JSON knows, see `write_entry` for its limits; arrays are given by their shape alone."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, numbers.Integral):
        return int(value) if abs(value) < MAX_WHOLE else f"a whole number of {int(value).bit_length()} bits"
    if isinstance(value, numbers.Real):
        number = float(value)
        return number if math.isfinite(number) else str(number)
    if not isinstance(value, (Mapping, list, tuple, AbstractSet)):
        shape = getattr(value, "shape", None)
        if shape is None:
            return _text(str(value))
        return f"an array of shape {tuple(shape)}" if tuple(shape) else plain(value.item(), depth)
    if depth == MAX_DEPTH:
        return "(nested too deeply)"
    if isinstance(value, Mapping):
        copy: dict[str, Any] = {}
        for name, part in _first(value.items()):
            key = _text(str(name))
            while key in copy:  # two names that differ where they were cut
                key += "'"
            copy[key] = plain(part, depth + 1)
        if len(value) > MAX_PARTS:
            copy["(left out)"] = len(value) - MAX_PARTS
        return copy
    parts = [plain(part, depth + 1) for part in _first(value)]
    return parts if len(value) <= MAX_PARTS else [*parts, f"(left out: {len(value) - MAX_PARTS} more)"]


def _first(parts: Any) -> Iterator[Any]:
    return (part for _, part in zip(range(MAX_PARTS), parts, strict=False))


def _text(text: str) -> str:
    cut = text[:MAX_TEXT]
    cut = cut if cut.isprintable() else one_line(cut)  # the whole text is checked much faster than each sign
    return cut if len(text) <= MAX_TEXT else f"{cut} ... ({len(text)} characters in all)"


def _json(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")
