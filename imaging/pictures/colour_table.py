"""Tables that give the colours, or the grey values, of masks their classes."""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass

from ...errors import UsageError
from ..slice_format import UNLABELLED

MAX_CLASS = 63
MAX_VALUE = 65535
COLOUR_COLUMNS = ("R", "G", "B", "CLASS")
VALUE_COLUMNS = ("VALUE", "CLASS")

Colour = tuple[int, int, int] | int  # red, green, blue from 0 to 255; or a grey value from 0 to 65535


@dataclass(frozen=True)
class ColourTable:
    """What a table of colours says.

    Attributes:
        classes: class of every colour, 0 to 63, or 255 for what is unlabelled.
        names: names of the classes, as far as the table has them.
    """

    classes: dict[Colour, int]
    names: dict[int, str]

    @property
    def class_names(self) -> dict[int, str]:
        """The names without those of the background and of what is unlabelled, which are no classes."""
        return {label: name for label, name in self.names.items() if 0 < label < UNLABELLED}


def read_colour_table(path: str | os.PathLike) -> ColourTable:
    """Read a CSV file with the columns R, G, B, CLASS, or VALUE, CLASS for grey masks, and optionally NAME.

    Raises: UsageError if it is missing, has other columns, a number out of range, a colour twice, or two names of one
        class.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file, skipinitialspace=True)
            fields = {(name or "").strip().upper(): name for name in rows.fieldnames or ()}
            columns = next((c for c in (COLOUR_COLUMNS, VALUE_COLUMNS) if set(c) <= fields.keys()), None)
            if columns is None:
                raise UsageError(f"{path}: needs the columns R,G,B,CLASS or VALUE,CLASS; write them in its first line")
            table = ColourTable({}, {})
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                numbers = [_number(where, name, row[fields[name]]) for name in columns]
                name = (row[fields["NAME"]] or "").strip() if "NAME" in fields else ""
                _add(table, where, numbers, name)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read ({error}); give a CSV table of colours") from None
    if not table.classes:
        raise UsageError(f"{path}: has no row; give one for each colour")
    return table


def _number(where: str, name: str, text: str | None) -> int:
    most = {"CLASS": UNLABELLED, "VALUE": MAX_VALUE}.get(name, 255)
    text = (text or "").strip()
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else -1
    if not 0 <= number <= most or (name == "CLASS" and MAX_CLASS < number < UNLABELLED):
        allowed = f"0 to {MAX_CLASS}, or {UNLABELLED} for unlabelled" if name == "CLASS" else f"0 to {most}"
        raise UsageError(f"{where}: {name} is '{text}'; it must be a whole number from {allowed}")
    return number


def _add(table: ColourTable, where: str, numbers: list[int], name: str) -> None:
    *colour, label = numbers
    key = (colour[0], colour[1], colour[2]) if len(colour) == 3 else colour[0]
    if key in table.classes:
        raise UsageError(f"{where}: colour {key} is there twice; give it one class")
    table.classes[key] = label
    if name and table.names.setdefault(label, name) != name:
        raise UsageError(f"{where}: class {label} is '{name}' and '{table.names[label]}'; give it one name")
