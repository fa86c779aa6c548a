"""A page for a site's data protection officer: what left this hospital, and whether the record of it is whole."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from ...common.html_pages import table
from ...errors import one_line
from .ledger_check import LedgerCheck
from .ledger_entry import Entry
from .ledger_summary import LedgerSummary, NumberThatLeft, Total, summarise

MAX_ROWS = 120  # of a table whose rows a researcher names
MAX_DAYS = 1000
MAX_NAME, MAX_REASON = 80, 300  # characters
UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
WHAT_LEAVES = (
    "The training plans of fedfactory send no image, no label map and no file. What can leave is listed here: the "
    "weights of a network, which are large tables of numbers that were learnt from the images, and single numbers, "
    "such as a loss or a score."
)


def ledger_page(entries: Iterable[Entry], check: LedgerCheck, *, site: str, made: datetime) -> list[str]:
    """Parts of the page's body, as HTML. The page's size does not grow with the number of rounds.

    Args:
        entries: of the ledger, oldest first.
        check: of the same ledger.
        site: name of the hospital or its node.
        made: when the page was made, in UTC.
    """
    found = summarise(entries)
    return [
        f"<h1>What left this hospital: {_safe(site)}</h1>",
        f"<p>Made on {made:%Y-%m-%d at %H:%M} UTC from the ledger of this site, in which the site's computer writes "
        "down every request of a researcher before it answers. All days are in UTC.</p>",
        _whether_whole(check),
        *_in_short(found),
        *_experiments(found),
        *_days(found),
        *_what_left(found),
        *_refusals(found),
        *_approvals(found),
        *_how_to_check(check),
    ]


def size_of(number: int) -> str:
    """A number of bytes for people, such as 12.3 MB."""
    amount, unit = float(number), 0
    while amount >= 1000 and unit < len(UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.1f} {UNITS[unit]}" if unit else f"{number} B"


def counted(number: int, word: str, plural: str = "") -> str:
    """A number and a word in the number that it needs, such as "2 rounds"."""
    return f"{number} {word if number == 1 else plural or word + 's'}"


def shortened(text: str, length: int) -> str:
    """At most `length` characters of a text, on one line and harmless to a terminal."""
    text = one_line(text[: length + 1])
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _whether_whole(check: LedgerCheck) -> str:
    if check.problem is not None:
        text = (
            f"<b>The record is not whole.</b> In line {check.line} of the ledger: {_safe(check.problem, 300)}. The "
            f"{check.entries} entries before are as they were written. Nothing after them, and no sum on this page, "
            "can be relied on until the administrator has explained this."
        )
    else:
        text = (
            f"<b>The record is whole.</b> All {check.entries} entries are linked to each other, and none of them was "
            "changed, removed or added afterwards."
        )
        for note in check.notes[-5:]:
            text += f" An interruption was noticed, by which nothing was lost ({_safe(note, 300)})."
    return f'<p class="note">{text}</p>'


def _in_short(found: LedgerSummary) -> list[str]:
    total = found.total
    if not total.first:
        return ["<h2>In short</h2><p>Nothing has left this hospital, and no researcher has asked for anything.</p>"]
    days = f"On {total.first}" if total.first == total.last else f"From {total.first} to {total.last}"
    served = sum(row.rounds + row.scorings > 0 for row in found.experiments.values())
    lines = [
        f"{days}, this site took part in {counted(total.rounds, 'training round')} and "
        f"{counted(total.scorings, 'scoring')} for {counted(served, 'experiment')}.",
        f"{size_of(total.bytes)} of network weights and {counted(total.numbers, 'single number')} left.",
        f"Refused: {counted(total.refused, 'request')}, for which nothing left.",
        f"{counted(total.answered, 'search', 'searches')} of a researcher got the description of a data set: its size "
        "and format, but no image and no name of a patient.",
    ]
    for domain, (spent, budget) in found.epsilon.items():
        of_all = "there is no limit" if budget is None else f"the limit is {budget:.3g}"
        lines.append(
            f"Privacy budget (epsilon) of the data set {_safe(domain)} that is spent: {spent:.3g}; {of_all}. The "
            "smaller this number, the less can be learnt about a single patient."
        )
    items = "".join(f"<li>{line}</li>" for line in lines[:MAX_ROWS])
    return [f"<h2>In short</h2><ul>{items}</ul><p>{WHAT_LEAVES}</p>"]


def _experiments(found: LedgerSummary) -> list[str]:
    rows = sorted(found.experiments.items(), key=lambda row: row[1].last)
    head = ("researcher", "experiment", "training plan", "data set", "first day", "last day", *SUMS)
    return _section(
        "By experiment",
        head,
        rows,
        lambda who, total: (*who, _few(total.plans), _few(total.domains), total.first, total.last, *_sums(total)),
    )


def _days(found: LedgerSummary) -> list[str]:
    rows = sorted(found.days.items())
    head = ("day", *SUMS, "searches answered")
    return _section("By day", head, rows, lambda day, total: (day, *_sums(total), str(total.answered)), most=MAX_DAYS)


SUMS = ("rounds", "scorings", "weights that left", "numbers that left", "refused")


def _sums(total: Total) -> tuple[str, ...]:
    return str(total.rounds), str(total.scorings), size_of(total.bytes), str(total.numbers), str(total.refused)


def _what_left(found: LedgerSummary) -> list[str]:
    return [
        *_section(
            "Numbers that left",
            ("name", "times", "smallest", "largest", "last"),
            list(found.numbers.items()),
            lambda name, row: (name, str(row.times), *_range(row)),
        ),
        *_section(
            "Weights that left",
            ("name", "shape", "type", "times", "in all"),
            list(found.tensors.items()),
            lambda tensor, row: (*tensor, str(row.times), size_of(row.bytes)),
        ),
        *_section(
            "Held back by this site", ("name", "times"), list(found.withheld.items()), lambda *row: map(str, row)
        ),
    ]


def _range(row: NumberThatLeft) -> tuple[str, str, str]:
    if row.least > row.most:  # no finite number among the values
        return "", "", row.last
    return f"{row.least:.4g}", f"{row.most:.4g}", row.last


def _refusals(found: LedgerSummary) -> list[str]:
    rows = sorted(found.refusals.items(), key=lambda row: row[1][1])
    head = ("last day", "times", "researcher", "experiment", "training plan", "reasons, which stayed at the site")
    return _section("Refused", head, rows, lambda refusal, when: (when[1], str(when[0]), *refusal), longest=MAX_REASON)


def _approvals(found: LedgerSummary) -> list[str]:
    head = ("day", "training plan", "SHA-256 of the plan", "SHA-256 of the software")
    return [
        *_section("Approved by this site's administrator", head, found.approved, lambda *row: row),
        *_section("Rules of this site", ("in force from", "SHA-256 of the policy"), found.policies, lambda *row: row),
    ]


def _how_to_check(check: LedgerCheck) -> list[str]:
    return [
        "<h2>How this can be checked</h2><p>Each entry holds a fingerprint of the entry before it, so that changing "
        "one of them breaks the chain. A person who can write all files of the node could make a new chain. So keep "
        f"this page: entry {check.entries} of the ledger must always have this fingerprint:</p>"
        f"<p><code>{_safe(check.last)}</code></p><p><code>fedfactory site ledger NODE</code> checks the ledger again, "
        "and with <code>--json</code> it lists all entries.</p>"
    ]


def _section(
    title: str,
    head: Sequence[str],
    rows: Sequence[tuple],
    cells: Callable[..., Iterable[str]],
    *,
    most: int = MAX_ROWS,
    longest: int = MAX_NAME,
) -> list[str]:
    """A heading and a table of the newest rows; nothing if there are none.

    Args:
        title: of the table, as HTML.
        head: of its columns.
        rows: oldest first.
        cells: called with the parts of a row; returns plain texts.
        most: number of rows that are shown.
        longest: number of characters of the last cell; the others have MAX_NAME at most.
    """
    if not rows:
        return []
    left_out = len(rows) - most
    more = f"<p>{left_out} earlier rows are in the ledger and not on this page.</p>" if left_out > 0 else ""
    shown = []
    for row in rows[-most:]:
        *first, last = cells(*row)
        shown.append([*(shortened(cell, MAX_NAME) for cell in first), shortened(last, longest)])
    return [f'<h2>{title}</h2>{more}<div class="texts">{table(head, shown)}</div>']


def _few(names: set[str]) -> str:
    """Some of the names as one text."""
    listed = [shortened(name, MAX_NAME) for name in sorted(names)[:3]]
    return ", ".join([*listed, f"and {len(names) - 3} more"] if len(names) > 3 else listed)


def _safe(text: str, length: int = MAX_NAME) -> str:
    return html.escape(shortened(text, length))
