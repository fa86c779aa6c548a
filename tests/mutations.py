"""Damaging files at random: bytes of any file, and values and structure of JSON."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308, math.nan, math.inf, -math.inf,
    "", "x", "9" * 5000, "\x1b[2J\x00\u202e", "../../etc/passwd", "=1+1", [], [[]], {}, {"": None},
    [None] * 3, "NaN", [1e400],
)  # fmt: skip


def damaged_bytes(content: bytes, rng: random.Random) -> bytes:
    """The content with a few bytes changed, a part cut out, doubled or filled, or its end missing."""
    changed = bytearray(content)
    kind = rng.randrange(6)
    if kind == 0 and changed:
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
    elif kind == 1 and changed:  # more often where headers are
        for _ in range(rng.randint(1, 8)):
            changed[rng.randrange(min(len(changed), 400))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        del changed[rng.randrange(len(changed) + 1) :]
    elif kind == 3:
        start = rng.randrange(len(changed) + 1)
        del changed[start : start + rng.randint(1, 200)]
    elif kind == 4:
        start = rng.randrange(len(changed) + 1)
        changed[start:start] = bytes([rng.randrange(256)]) * rng.randint(1, 300)
    else:
        start = rng.randrange(len(changed) + 1)
        changed[start : start + 40] = changed[start : start + 40] * 2
    return bytes(changed)


def damaged_json(text: str, rng: random.Random) -> str:
    """The text with odd values, missing, doubled or renamed entries, or brackets nested without end."""
    if rng.random() < 0.06:
        return rng.choice(["[" * 200_000, '{"a":' * 100_000, "1" * 6000, "null", "[]", '"text"', "\ufeff" + text, ""])
    content = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        content = _changed(content, rng)
    return json.dumps(content, ensure_ascii=rng.random() < 0.5)


def _changed(content: Any, rng: random.Random) -> Any:
    """A copy with one change at a random place."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    if not places:
        return rng.choice(ODD_VALUES)
    parent, key = rng.choice(places)
    kind = rng.randrange(5)
    if kind == 0 and isinstance(parent, dict):
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["", "x", str(key) + "s", "9" * 400])] = parent.pop(key)
    elif kind == 2 and isinstance(parent, list):
        parent.insert(rng.randrange(len(parent) + 1), parent[key])
    else:
        parent[key] = rng.choice(ODD_VALUES)
    return content


def _places(content: Any) -> list[tuple[Any, Any]]:
    """Every container with the key or index of every entry in it."""
    found: list[tuple[Any, Any]] = []
    waiting = [content]
    while waiting:
        part = waiting.pop()
        entries = (
            list(part.items()) if isinstance(part, dict) else list(enumerate(part)) if isinstance(part, list) else []
        )
        for key, value in entries:
            found.append((part, key))
            waiting.append(value)
    return found
