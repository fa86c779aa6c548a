"""The ledger of a site: what was asked of it, what left it and what was refused, in a file that only grows.

The file is `var/ledger.jsonl` in the node's folder, one JSON object a line, readable by its owner alone. Each entry
holds the hash of the one before, so no line can be changed, taken out, put in or moved unnoticed. `var/ledger.head`
holds number and hash of the last entry, so the end cannot be cut off unnoticed. Whoever may write both files can make a
new chain: only a hash that was noted elsewhere, such as on a printed page, speaks against that.

Facts of each event, beside number, time and hashes:

| event | facts |
| --- | --- |
| policy | `policy_sha256`: digest of the policy that is in force from now on |
| approved | `plan`: its name; `plan_sha256`; `package_sha256`: digest of the installed package |
| refused | `researcher`, `experiment`, `plan`; `reasons`: list of texts, of which none travelled |
| round, scoring | those of the next table |
| answered | `researcher`; `request`: "search" or "list"; `descriptions`: list of the descriptions that left |
| mended | by the ledger itself, see below |

| fact of a round or a scoring | |
| --- | --- |
| `researcher`, `experiment` | who asked, and for which experiment |
| `domain` | of the data set |
| `plan`, `plan_sha256`, `package_sha256` | class of the plan, digests of its exact bytes and of the package |
| `settings_sha256` | digest of all settings of the request |
| `seconds`, `samples` | duration; number of samples that was announced |
| `tensors` | list of [name, shape, dtype, bytes] |
| `bytes` | of all tensors |
| `numbers` | name to the value that left |
| `withheld` | list of names of what did not leave, with the reason if the plan itself left it out |
| `epsilon`, `epsilon_budget` | what the store has spent and may spend, all experiments together; null if not counted |

A kill or a power cut can leave half a line at the end. The next entry is then `mended`, on a new line: `after` is the
number of the last whole entry, `expected` and `expected_sha256` are what the head said, `bytes` and `bytes_sha256`
describe what stands between. It is written after any other damage too, which it does not excuse.

A reply leaves a site only after its entry was written: what has no entry has not left.
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import io
import os
import re
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

from ...common.files import make_folder, sync
from ...errors import ConfigError, StoreError
from .ledger_check import MAX_GAP, MENDED, UNREADABLE, LedgerCheck, check_lines
from .ledger_entry import GENESIS, MAX_LINE, Entry, plain, read_entry, write_entry

LEDGER_FILE = Path("var") / "ledger.jsonl"  # below the node's folder
HEAD_FILE = Path("var") / "ledger.head"
HEAD_FORM = re.compile(rb" *(\d{1,20}) ([0-9a-f]{64})\n")
BLOCK = 1 << 16  # bytes that are read from the end at first
MAX_QUERIES = 1000  # that `count` keeps answers of
NO_LINKS = getattr(os, "O_NOFOLLOW", 0)


class Ledger:
    """The ledger of the node at `root`; any number of processes and threads may append at once."""

    def __init__(self, root: str | Path) -> None:
        self.path = Path(root) / LEDGER_FILE
        self.head = Path(root) / HEAD_FILE
        self._index = _Index(self.path)

    def append(self, event: str, /, **facts: object) -> Entry:
        """Write an entry and wait until it is on the disk. The time that it takes does not grow with the ledger.

        What an interrupted write or a damage left at the end stays where it is, and an entry `mended` after it says so.

        Args:
            event: kind, see this module.
            **facts: values that JSON knows, see `write_entry` for what becomes of others and of long ones.

        Raises: OSError or StoreError if it could not be written; then nothing may leave that belongs to it.
        """
        make_folder(self.path.parent)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | NO_LINKS, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)  # until the file is closed
            size = os.fstat(handle).st_size
            last, end = _last_entry(handle, size)
            place, expected = (0, GENESIS) if last is None else (last.number, last.sha256), self._read_head()
            if last is not None and expected == (last.number - 1, last.previous):
                self._write_head(last)  # a process was killed between its two writes
                expected = place
            if size > end or place != expected:
                damage = {
                    "after": place[0],
                    "expected": expected[0],
                    "expected_sha256": expected[1],
                    "bytes": size - end,
                    "bytes_sha256": _digest(handle, end, size),
                }
                written = self._write(handle, MENDED, damage, place, begin=b"\n" if size > end else b"")
                place = (written.number, written.sha256)
            return self._write(handle, event, facts, place)
        finally:
            os.close(handle)

    def exists(self) -> bool:
        """Whether anything was ever written; a ledger that was removed is one that exists and is not whole."""
        return self.path.exists() or self.head.exists()

    def entries(self) -> Iterator[Entry]:
        """All entries whose lines are whole, in the order of the file. `verify` tells whether any are missing."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for line in _lines_of(file):
                with suppress(ValueError):
                    yield read_entry(line)

    def verify(self) -> LedgerCheck:
        """Look at every byte of the ledger. Raises: OSError if it cannot be read."""
        try:
            handle = os.open(self.path, os.O_RDONLY | NO_LINKS)
        except FileNotFoundError:
            return check_lines((), self._read_head())
        with os.fdopen(handle, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)  # so that nobody stands between the two writes
            return check_lines(_lines_of(file), self._read_head())

    def count(self, event: str, since: datetime, **matching: object) -> int:
        """Number of whole entries of a kind from a moment on, by all processes, restarts of the node included.

        The first call reads the whole ledger, later ones what was added since.

        Args:
            event: kind.
            since: with a time zone. Entries from the future count too: a clock that was put back opens no quota.
            **matching: facts that must be equal: texts, whole numbers, True or False.

        Raises: OSError if the ledger cannot be read; ConfigError if `since` has no time zone.
        """
        if since.tzinfo is None:
            raise ConfigError(f"since is {since}; it must have a time zone")
        return self._index.count(event, since.timestamp(), {name: plain(value) for name, value in matching.items()})

    def _write(
        self, handle: int, event: str, facts: dict[str, Any], place: tuple[int, str], *, begin: bytes = b""
    ) -> Entry:
        """Append one entry after `place`, (number, hash), and move the head."""
        entry, line = write_entry(event, facts, number=place[0] + 1, previous=place[1])
        size = os.fstat(handle).st_size
        try:
            written = os.write(handle, begin + line)  # one write: nobody sees or leaves a half of it, short of a kill
        except OSError as error:
            raise StoreError(
                f"{self.path}: no entry can be written ({error.strerror}); nothing leaves without"
            ) from None
        if written < len(begin + line):
            with suppress(OSError):
                os.ftruncate(handle, size)
            raise StoreError(f"{self.path}: the disk is full; free some space, nothing leaves without an entry")
        os.fsync(handle)
        self._write_head(entry)
        if not size:  # the files are new: their names must be on the disk too
            sync(self.path.parent)
        return entry

    def _read_head(self) -> tuple[int, str]:
        """Number and hash of the last entry; (0, GENESIS) before the first, UNREADABLE if the file is damaged."""
        try:
            content = self.head.read_bytes()
        except FileNotFoundError:
            return 0, GENESIS
        found = HEAD_FORM.fullmatch(content)
        head = (int(found[1]), found[2].decode()) if found else UNREADABLE
        return head if content == _head_line(*head) else UNREADABLE

    def _write_head(self, entry: Entry) -> None:
        # In place and always as long: less than a sector of the disk, so it is written wholly or not at all.
        handle = os.open(self.head, os.O_WRONLY | os.O_CREAT | NO_LINKS, 0o600)
        try:
            os.pwrite(handle, _head_line(entry.number, entry.sha256), 0)
            os.fsync(handle)
        finally:
            os.close(handle)


def _head_line(number: int, sha256: str) -> bytes:
    return f"{number:20d} {sha256}\n".encode()


def _lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends, in pieces if they are longer than any line of a ledger."""
    while line := file.readline(MAX_LINE + 1):
        yield line


def _last_entry(handle: int, size: int) -> tuple[Entry | None, int]:
    """The last whole entry of an open file of `size` bytes, if any, and where its line ends, found from the end."""
    length = BLOCK
    while True:
        start = max(0, size - length)
        end, lines = size, io.BytesIO(os.pread(handle, size - start, start)).readlines()
        for line in reversed(lines[1:] if start else lines):  # the first begins before this part of the file
            with suppress(ValueError):
                return read_entry(line), end
            end -= len(line)
        if not start:
            return None, 0
        if length > MAX_GAP:
            raise StoreError(
                "the end of the ledger holds no entry; keep both its files elsewhere, then a new one begins"
            )
        length *= 4


def _digest(handle: int, start: int, end: int) -> str:
    """SHA-256 of a part of an open file."""
    digest = hashlib.sha256()
    while start < end and (block := os.pread(handle, min(1 << 20, end - start), start)):
        digest.update(block)
        start += len(block)
    return digest.hexdigest()


class _Index:
    """Moments of a ledger's entries by what was counted, read once and then as the file grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._file, self._read = 0, 0  # number of the file, and bytes of it that were read
        self._forget()

    def count(self, event: str, since: float, wanted: dict[str, Any]) -> int:
        """Number of entries of a kind with the wanted facts from a moment, in seconds, on."""
        query = (event, tuple(sorted(wanted.items())))
        with self._lock:
            self._follow()
            if query not in self._moments:
                if len(self._moments) >= MAX_QUERIES:  # names of experiments are a researcher's choice
                    self._moments.clear()
                self._moments[query] = sorted(moment for moment, facts in self._rows[event] if _has(facts, wanted))
            moments = self._moments[query]
            return len(moments) - bisect.bisect_left(moments, since)

    def _follow(self) -> None:
        """Read what was added to the file; all of it if it is another file."""
        try:
            status = self._path.stat()
        except FileNotFoundError:
            return self._forget()
        if status.st_ino != self._file or status.st_size < self._read:
            self._forget()
            self._file = status.st_ino
        if status.st_size == self._read:
            return None
        with self._path.open("rb") as file:
            file.seek(self._read)
            for line in _lines_of(file):
                if not line.endswith(b"\n") and len(line) <= MAX_LINE:
                    break  # it is being written
                self._read += len(line)
                with suppress(ValueError):
                    self._add(read_entry(line))
        return None

    def _add(self, entry: Entry) -> None:
        facts = {sys.intern(name): value for name, value in entry.facts.items() if isinstance(value, (str, int))}
        moment = entry.moment.timestamp()
        self._rows[entry.event].append((moment, facts))
        for (event, wanted), moments in self._moments.items():
            if event == entry.event and _has(facts, dict(wanted)):
                bisect.insort(moments, moment)  # clocks may be put back

    def _forget(self) -> None:
        self._file, self._read = 0, 0
        self._rows: dict[str, list[tuple[float, dict[str, Any]]]] = defaultdict(list)
        self._moments: dict[tuple[str, tuple[tuple[str, Any], ...]], list[float]] = {}


def _has(facts: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(name in facts and facts[name] == value for name, value in wanted.items())
