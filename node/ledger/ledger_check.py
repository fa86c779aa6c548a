"""Whether a site's ledger is whole: every line, the order of lines, and its end."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from .ledger_entry import GENESIS, Entry, read_entry

MENDED = "mended"  # event of an entry that follows an interrupted write or a damage, see `ledger`
UNREADABLE = (-1, "")  # a head that is none
MAX_GAP = 64 << 20  # bytes without an entry, beyond which nothing more is looked at


@dataclass(frozen=True, kw_only=True)
class LedgerCheck:
    """What `Ledger.verify` found.

    Attributes:
        entries: number of entries up to the first problem.
        problem: what is wrong, in one line; None if the chain is whole.
        line: of the file, from 1, at which the problem is; None without a problem.
        notes: of writes that were interrupted and changed nothing that had been recorded.
        last: hash of the last entry before the first problem; to be noted elsewhere.
    """

    entries: int
    problem: str | None
    line: int | None
    notes: tuple[str, ...] = ()
    last: str = GENESIS


def check_lines(lines: Iterable[bytes], head: tuple[int, str]) -> LedgerCheck:
    """Check a ledger.

    Args:
        lines: of the file, with their ends.
        head: number and hash of the last entry, as kept beside the ledger; (0, GENESIS) for none, or UNREADABLE.
    """
    notes: list[str] = []
    place = before = (0, GENESIS)  # number and hash of the last entry, and of the one before it
    gap, reason, first, entries, line_number = b"", "", 0, 0, 0

    def broken(problem: str, line: int) -> LedgerCheck:
        return LedgerCheck(entries=entries, problem=problem, line=line, notes=tuple(notes), last=place[1])

    for line_number, line in enumerate(lines, 1):
        entry, wrong = _entry_after(place, line)
        if entry is None:
            first, reason = first or line_number, reason or wrong
            gap += line
            if len(gap) > MAX_GAP:
                return broken(reason, first)
            continue
        if gap or entry.event == MENDED:
            if problem := _unmended(entry, gap, place):
                return broken(reason or problem, first or line_number)
            notes.append(
                f"line {first}: an interrupted write, of which nothing had left; entry {entry.number} names it"
            )
            gap, reason, first = b"", "", 0
        before, place = place, (entry.number, entry.sha256)
        entries += 1
    if gap and (b"\n" in gap or head != place):
        return broken(reason, first)
    if gap:
        notes.append(f"line {first}: a torn line of {len(gap)} bytes after the last entry: a write was interrupted")
    elif head == before and head != place:
        notes.append(f"the head is one entry behind: a process was ended after it wrote entry {place[0]}")
    elif head != place:
        return broken(_about_the_end(head, place[0]), line_number + 1)
    return LedgerCheck(entries=entries, problem=None, line=None, notes=tuple(notes), last=place[1])


def _entry_after(place: tuple[int, str], line: bytes) -> tuple[Entry | None, str]:
    """The entry of a line if it follows the one at `place`, (number, hash); or else why not."""
    try:
        entry = read_entry(line)
    except ValueError as error:
        return None, f"entry {place[0] + 1} is damaged: {error}"
    if entry.number != place[0] + 1:
        return None, f"entry {entry.number} stands where entry {place[0] + 1} must stand"
    if entry.previous != place[1]:
        return None, f"entry {entry.number} does not follow from the one before it"
    return entry, ""


def _unmended(entry: Entry, gap: bytes, place: tuple[int, str]) -> str:
    """Why the bytes before an entry are more than an interrupted write that the entry names; empty if they are not."""
    facts, left = entry.facts, gap.removesuffix(b"\n")
    named = (facts.get("bytes"), facts.get("bytes_sha256")) == (len(left), hashlib.sha256(left).hexdigest())
    if entry.event != MENDED or not named:
        return "there is something that no entry names"  # only if there is a gap, which has its own reason
    expected = (facts.get("expected"), facts.get("expected_sha256"))
    if expected != place:
        return f"the end of the ledger had been changed when entry {entry.number} was written after entry {place[0]}"
    return "a line is no entry" if b"\n" in left or not left else ""


def _about_the_end(head: tuple[int, str], last: int) -> str:
    if head == UNREADABLE:
        return "ledger.head, which names the last entry, is damaged"
    if head[0] > last:
        return f"the end is missing: the last entry is {last}, but entry {head[0]} had been written"
    return f"the last entry is {last}, but ledger.head names another entry {head[0]}"
