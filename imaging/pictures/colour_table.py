"""Tables that give the colours, or the grey values, of masks their classes."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...common.tables import read_table
from ...errors import UsageError
from ..slice_choices import UNLABELLED

MAX_CLASS = 63
MAX_VALUE = 65535
COLOUR_COLUMNS = ("R", "G", "B", "CLASS")
VALUE_COLUMNS = ("VALUE", "CLASS")
NAME_COLUMN = "NAME"

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
    """Read a table with the columns R, G, B, CLASS, or VALUE, CLASS for grey masks, and optionally NAME.

    See `read_table` for how it may be written.

    Raises: UsageError if it is missing, has other columns, a number out of range, a colour twice, or two names of one
        class.
    """
    found = read_table(path, known=(*COLOUR_COLUMNS, *VALUE_COLUMNS, NAME_COLUMN))
    columns = next((c for c in (COLOUR_COLUMNS, VALUE_COLUMNS) if found.has(c)), None)
    if columns is None:
        needed = "R,G,B,CLASS or VALUE,CLASS"
        raise UsageError(f"{path}: needs the columns {needed}; write them in its first line ({found.described})")
    table, named = ColourTable({}, {}), found.has([NAME_COLUMN])
    for row in found.rows():
        numbers = [_number(row.where, name, row.text(name)) for name in columns]
        _add(table, row.where, numbers, row.text(NAME_COLUMN) if named else "")
    if not table.classes:
        raise UsageError(f"{path}: has no row; give one for each colour")
    return table


def _number(where: str, name: str, text: str) -> int:
    most = {"CLASS": UNLABELLED, "VALUE": MAX_VALUE}.get(name, 255)
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
