"""Finds the cases of one patient by their names."""

from __future__ import annotations

import re

from ..errors import UsageError

# The shortest beginning that ends in digits: patient038 for patient038_ED and patient038_ES, all of hippocampus_001.
PATIENT = re.compile(r"sub-[A-Za-z0-9]+|.*?\d+(?=\D|$)")


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
