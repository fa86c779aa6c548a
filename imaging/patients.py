"""Finds the cases of one patient by their names."""

from __future__ import annotations

import os
import re

from ..common.tables import read_table
from ..errors import UsageError

# The shortest beginning that ends in digits: patient038 for patient038_ED and patient038_ES, all of hippocampus_001.
PATIENT = re.compile(r"sub-[A-Za-z0-9]+|.*?\d+(?=\D|$)")
PATIENT_COLUMNS = (("CASE", "PATIENT"), ("NAME", "GROUP"))  # of a table, the first pair that it has


def check_pattern(patient_pattern: str | None) -> None:
    """Raises: UsageError if `patient_pattern` is no regular expression."""
    try:
        re.compile(patient_pattern or "")
    except re.error as error:
        raise UsageError(f"patient_pattern is '{patient_pattern}'; it must be a regular expression ({error})") from None


def patient_of(name: str, pattern: str | None) -> str:
    """The patient a case of this name belongs to; the whole name if the pattern does not match.

    Args:
        name: of the case.
        pattern: regular expression that matches from the name's beginning; its first group, or all it matches, is the
            patient. Default: the name's beginning up to the end of its first digits.
    """
    match = re.match(pattern, name) if pattern else PATIENT.match(name)
    return (match.group(1) if match.groups() else match.group(0)) if match else name


def read_patient_table(path: str | os.PathLike) -> dict[str, str]:
    """The patient of every case that a table names.

    Args:
        path: a table, see `read_table`, with the columns CASE and PATIENT, or NAME and GROUP.

    Returns: patient by case.
    Raises: UsageError if it cannot be read, has other columns, an empty field, or two patients of one case.
    """
    patients: dict[str, str] = {}
    table = read_table(path, known=[name for pair in PATIENT_COLUMNS for name in pair])
    columns = next((pair for pair in PATIENT_COLUMNS if table.has(pair)), None)
    if columns is None:
        raise UsageError(f"{path}: needs the columns CASE,PATIENT; write them in its first line ({table.described})")
    for row in table.rows():
        case, patient = map(row.text, columns)
        if not case or not patient:
            raise UsageError(f"{row.where}: a case or its patient is empty; fill it in")
        if patients.setdefault(case, patient) != patient:
            raise UsageError(f"{row.where}: case '{case}' has two patients; keep one")
    if not patients:
        raise UsageError(f"{path}: has no row; give one for each case")
    return patients
