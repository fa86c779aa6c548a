"""Names of classes, which tables and pages show in place of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..common.names import check_label
from ..errors import UsageError

FORM = "LABEL=NAME,LABEL=NAME, such as 1=polyp,2=instrument"


def parse_names(text: str) -> dict[int, str]:
    """Class to name, from a text such as "1=polyp,2=instrument"; empty for an empty text.

    Raises: UsageError if the text has another form, names a class twice or the background, or two classes alike.
    """
    names: dict[int, str] = {}
    for part in text.split(",") if text.strip() else []:
        label, _, name = (side.strip() for side in part.partition("="))
        if not (label.isascii() and label.isdecimal() and name):
            raise UsageError(f"class_names is '{text}'; write {FORM}")
        if int(label) in names:
            raise UsageError(f"class_names is '{text}'; it must name class {int(label)} once")
        names[int(label)] = name
    return check_names(names)


def check_names(names: Mapping[int, str]) -> dict[int, str]:
    """The same names.

    Raises: UsageError if one belongs to the background or cannot be printed, or two classes have the same.
    """
    if low := [label for label in names if label < 1]:
        raise UsageError(f"class {low[0]} has a name, but 0 is the background; name classes from 1 up")
    for label, name in names.items():
        check_label(f"the name of class {label}", name)
    if len({name.casefold() for name in names.values()}) < len(names):
        raise UsageError(f"the names {', '.join(names.values())} are not unique; give every class a name of its own")
    return dict(names)


def class_name(label: int, names: Mapping[int, str]) -> str:
    """What a class is called: its name, or "class 2" if it has none."""
    return names.get(label, f"class {label}")


def numbers_of(names: Mapping[int, str], wanted: Mapping[int, str]) -> dict[int, int]:
    """The label value that a site gives to each label value of a file, by the names of both; case does not count.

    Args:
        names: of the file's label values.
        wanted: of the site's.

    Raises: UsageError for a name that the site does not know.
    """
    numbers = {name.casefold(): value for value, name in wanted.items()}
    if unknown := [name for name in names.values() if name.casefold() not in numbers]:
        raise UsageError(f"'{unknown[0]}' is none of the classes {', '.join(wanted.values())}; add it to class_names")
    return {value: numbers[name.casefold()] for value, name in names.items()}


def united_names(names: Mapping[int, str], of_files: Iterable[Mapping[int, str]]) -> dict[int, str]:
    """The names by label value, and those that label files tell besides.

    Raises: UsageError if one value has several names.
    """
    united = dict(names)
    for given in of_files:
        for value, name in given.items():
            if united.setdefault(value, name).casefold() != name.casefold():
                raise UsageError(
                    f"label {value} is '{united[value]}' in one label file and '{name}' in another; give class_names, "
                    "by which their classes are matched"
                )
    return united


def refuse_other_names(there: Mapping[int, str], wanted: Mapping[int, str], store: Path) -> None:
    """Raises: UsageError if names by label value contradict those by which the labels of a store are numbered."""
    numbers = {name.casefold(): value for value, name in there.items()}
    for value, name in wanted.items():
        if there.get(value, name).casefold() != name.casefold():
            problem = f"label {value} is '{there[value]}' in the store, not '{name}'"
        elif numbers.get(name.casefold(), value) != value:
            problem = f"'{name}' is label {numbers[name.casefold()]} in the store, not {value}"
        else:
            continue
        raise UsageError(f"{store}: {problem}; give the store's class_names, or choose another folder")
