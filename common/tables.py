"""Tables of values, as spreadsheets and programs write them, and tables that spreadsheets open without harm."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from .files import atomic_file, encoding_of

MAX_BYTES = 32 << 20
MAX_ROWS = 1 << 20  # as many as a spreadsheet holds
MAX_COLUMNS = 4096
MAX_LINE = 1 << 20  # characters
HEAD_BYTES = 1 << 16  # enough for the first line, when only that is wanted
WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")  # how .xlsx and .ods, and .xls, begin
SEPARATORS = {";": "semicolons", "\t": "tabs", ",": "commas"}
NAMED_SEPARATOR = re.compile(r'"?sep=([;\t,])"?\s*', re.IGNORECASE)  # a first line that is for Excel alone
FORMULA = re.compile(r"'*[=+\-@\t\r\uff1d\uff0b\uff0d\uff20]")  # how a cell begins that a spreadsheet may run
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")  # which it may show as one
THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+")


class Row(NamedTuple):
    """One row of a table.

    Attributes:
        path: of the table.
        line: number of its line in the file, from 1.
        cells: text by column, whose name is in capital letters; without spaces around it.
        separator: of the table.
    """

    path: Path
    line: int
    cells: dict[str, str]
    separator: str

    @property
    def where(self) -> str:
        """File and line, for messages."""
        return f"{self.path}, line {self.line}"

    def text(self, column: str) -> str:
        """The cell of a column; empty if the row or the table lacks it. Raises: UsageError for one of several lines."""
        text = self.cells.get(column) or self.cells.get(column.upper(), "")
        if "\n" in text or "\r" in text:
            raise UsageError(f"{self.where}: {column} goes over several lines; look for a single quotation mark")
        return text[1:] if text.startswith("'") and FORMULA.match(text) else text

    def number(self, column: str) -> float:
        """The cell of a column as a number, with a decimal point; or a decimal comma, if commas do not separate cells.

        Raises: UsageError unless it is a finite number.
        """
        text = number = self.text(column)
        if "," in text and self.separator != "," and "." not in text:
            # A semicolon separates cells where commas are decimal, but tabs do so in any country.
            number = "" if self.separator == "\t" and THOUSANDS.fullmatch(text) else text.replace(",", ".", 1)
        try:
            value = math.nan if "_" in number else float(number)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise UsageError(f"{self.where}: {column} is '{text[:100]}'; it must be a finite number")
        return value


@dataclass(frozen=True)
class Table:
    """A table with a heading.

    Attributes:
        path: of its file.
        heading: names of the columns, as they are written.
        separator: of the cells.
        content: of the file.
        skipped: whether the first line names the separator alone.
    """

    path: Path
    heading: tuple[str, ...]
    separator: str
    content: str
    skipped: bool

    @property
    def names(self) -> str:
        """The columns in words, for messages about missing ones."""
        return ",".join(filter(None, self.heading)) or "missing"

    @property
    def described(self) -> str:
        """`names` with what separates them, as it was found."""
        several = len(self.heading) > 1
        return f"its columns are {self.names}" + (f", separated by {SEPARATORS[self.separator]}" if several else "")

    def has(self, columns: Iterable[str]) -> bool:
        """Whether the heading has all these columns, in capital or small letters.

        Raises: UsageError if it has one of them twice.
        """
        names = [name.upper() for name in self.heading]
        wanted = [name.upper() for name in columns]
        for name in wanted:
            if names.count(name) > 1:
                raise UsageError(f"{self.path}: has the column {name} {names.count(name)} times; keep one of them")
        return set(wanted) <= set(names)

    def rows(self) -> Iterator[Row]:
        """The rows that are not empty.

        Raises: UsageError for a row with more values than columns, or for too many rows.
        """
        names = [name.upper() for name in self.heading]
        lines = _lines(self.content, self.separator)
        count = 0
        try:
            for number, cells in lines:
                if (count == 0 and not any(cells)) or (self.skipped and number == 1):
                    continue
                count += 1
                where = f"{self.path}, line {number}"
                if count > MAX_ROWS + 1 or len(cells) > MAX_COLUMNS:
                    raise UsageError(f"{where}: at most {MAX_ROWS} rows and {MAX_COLUMNS} columns are read; split it")
                if count == 1 or not any(cells):
                    continue
                if any(cells[len(names) :]):
                    raise UsageError(f"{where}: has more values than columns; write decimals with a point")
                found = {name: text for name, text in zip(names, cells, strict=False) if name}
                yield Row(self.path, number, found, self.separator)
        except csv.Error as error:
            raise UsageError(f"{self.path}: cannot be read as a table ({error}); write it again") from None


def read_table(path: str | os.PathLike, known: Iterable[str] = ()) -> Table:
    """Read a table as spreadsheets and programs write it.

    UTF-8, or UTF-16 with a byte order mark; cells separated by commas, semicolons or tabs, with spaces or quotation
    marks around them or not; the names of columns in capital or small letters.

    Args:
        path: of at most 32 MiB, with the names of the columns in its first line.
        known: columns that the table may have. The separator is the one that finds most of them, then most cells.

    Raises: UsageError if it cannot be read, or is too large.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise UsageError(
                f"{path}: cannot be read as a table (no such file); give a file with comma-separated values"
            )
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"{path}: cannot be read as a table ({reason}); check the file") from None
    if len(content) > MAX_BYTES:
        raise UsageError(
            f"{path}: cannot be read as a table (over {MAX_BYTES >> 20} MiB); split it, or leave columns out"
        )
    if content.startswith(WORKBOOKS):
        raise UsageError(f"{path}: is the workbook of a spreadsheet; save it as 'CSV UTF-8' (Excel)")
    try:
        text = content.decode(encoding_of(content))
    except UnicodeError as error:
        line = content.count(b"\n", 0, getattr(error, "start", 0)) + 1
        raise UsageError(
            f"{path}: cannot be read as a table (line {line} is not in UTF-8); save it as 'CSV UTF-8' (Excel)"
        ) from None
    if "\0" in text:
        raise UsageError(f"{path}: cannot be read as a table (it is no text); give comma-separated values")
    if text.count('"') % 2:
        raise UsageError(f"{path}: cannot be read as a table (a quotation mark has no partner); write it again")
    _refuse_long_lines(path, text)
    return _table(path, text, {name.upper() for name in known})


def known_in_heading(path: str | os.PathLike, known: Iterable[str]) -> set[str]:
    """Which of some columns the first line of a file has; none if the file is no readable text."""
    wanted = {name.upper() for name in known}
    try:
        with open(path, "rb") as file:
            content = file.read(HEAD_BYTES)
        table = _table(Path(path), content.decode(encoding_of(content), "replace"), wanted)
    except (OSError, UsageError):
        return set()
    return wanted & {name.upper() for name in table.heading}


def write_table(path: str | os.PathLike, heading: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write comma-separated values in UTF-8, atomically. A text that a spreadsheet would run gets an apostrophe.

    Args:
        path: file to write.
        heading: names of the columns.
        rows: one value for each column; numbers stay numbers.
    """
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([harmless(name) for name in heading])
        writer.writerows([harmless(value) for value in row] for row in rows)


def harmless(value: object) -> object:
    """A value for a cell; a text that begins as formulas do has an apostrophe before it, which `Row.text` removes."""
    if not isinstance(value, str) or not FORMULA.match(value) or NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def _refuse_long_lines(path: Path, text: str) -> None:
    """Raises: UsageError for a line that would become more cells than memory should hold."""
    start = 0
    while len(text) - start > MAX_LINE:
        end = max(text.rfind(mark, start, start + MAX_LINE) for mark in "\n\r")
        if end < 0:
            raise UsageError(f"{path}: cannot be read as a table (a line has over {MAX_LINE} characters); is it one?")
        start = end + 1


def _table(path: Path, text: str, known: set[str]) -> Table:
    """The table of a text."""
    first = text.split("\n", 1)[0]
    named = NAMED_SEPARATOR.fullmatch(first)
    start = text[len(first) + 1 :] if named else text
    headings = {separator: _heading(path, start, separator) for separator in (named[1] if named else SEPARATORS)}

    def fitness(separator: str) -> tuple[int, int]:
        names = [name.upper() for name in headings[separator] if name]
        return len(known.intersection(names)), len(names)

    separator = max(headings, key=lambda each: (*fitness(each), each == ","))
    return Table(path, headings[separator], separator, text, skipped=named is not None)


def _heading(path: Path, text: str, separator: str) -> tuple[str, ...]:
    """Cells of the first line that is not empty."""
    try:
        for _, cells in _lines(text, separator):
            if len(cells) > MAX_COLUMNS:
                raise UsageError(f"{path}: has {len(cells)} columns; at most {MAX_COLUMNS} are read")
            if any(cells):
                return tuple(cells)
    except csv.Error:  # the wrong separator can make a cell too long
        pass
    return ()


def _lines(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the line that a row ends in, and its cells without spaces around them."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=separator != "\t")
    for cells in reader:
        yield reader.line_num, [cell.strip() for cell in cells]
