"""Finds the cases of one patient by their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..common.tables import read_table
from ..errors import UsageError

# The shortest beginning that ends in digits: patient038 for patient038_ED and patient038_ES, all of hippocampus_001.
PATIENT = re.compile(r".*?\d+(?=\D|$)")
# Subjects as public data sets name them, where the shortest beginning would be a centre, a year or a part of a code.
# The first group, if there is one, is the patient: the same one in another year.
PUBLISHED = tuple(
    re.compile(pattern + r"(?![A-Za-z0-9])")
    for pattern in (
        r"sub-[A-Za-z0-9]+",  # BIDS
        r"(?:ADNI_)?(\d{3}_S_\d{4,5})",  # ADNI: centre, S, subject
        r"Bra[Tt][Ss]1\d_([A-Za-z0-9]+_[A-Za-z0-9]+)",  # BraTS 2017 to 2019: year, centre, subject, number of the scan
        r"Bra[Tt][Ss]20(?:2\d)?_(?:[A-Za-z]+_)?\d+",  # BraTS 2020 and 2021
        r"BraTS(?:-[A-Za-z]+)+-\d+",  # BraTS since 2023: kind of tumour, subject, time point
        r"[A-Z]\d[A-Z]\d[A-Z]\d",  # M&Ms
        r"OAS\d_\d{4}",  # OASIS
        r"TCGA-[A-Z0-9]{2}-[A-Z0-9]{4}",
        r"C3[LN]-\d{5}",  # CPTAC
        r"(?:LUNG1|R01|AMC)-\d{3}",  # NSCLC-Radiomics, NSCLC Radiogenomics
        r"ISPY[12]_\d+",
        r"NDAR_INV[A-Z0-9]{8}",  # ABCD
    )
)
# Names that say nothing of a patient: each case counts as one of its own.
CODES = tuple(
    re.compile(pattern + r"(?![A-Za-z0-9])")
    for pattern in (
        r"c[a-z0-9]{24}",  # Kvasir-SEG
        r"ISIC_\d{7}",
        r"\d+(?:\.\d+){4,}",  # a DICOM identifier, as in LUNA16
        r"series-[0-9a-f]{8}",  # ours, of a DICOM series without a patient
        r"(?:0[xX])?(?=[A-Fa-f]*\d)[0-9A-Fa-f]{16,}",  # EchoNet-Dynamic and digests
        r"[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}",
    )
)
EARLY_BRATS, LATE_BRATS = re.compile(r"Bra[Tt][Ss]1\d_"), re.compile(r"Bra[Tt][Ss]20|BraTS-GLI")
MANY, CASES_EACH = 6, 2.5  # from so many cases, with so many for each patient, on, the guess is called in question
TABLE_ENDINGS = (".csv", ".tsv")
PATIENT_COLUMNS = (("CASE", "PATIENT"), ("NAME", "GROUP"))  # of a table, the first pair that it has


def check_pattern(patient_pattern: str | None) -> None:
    """Raises: UsageError if `patient_pattern` is no regular expression."""
    try:
        re.compile(patient_pattern or "")
    except re.error as error:
        raise UsageError(f"patient_pattern is '{patient_pattern}'; it must be a regular expression ({error})") from None


def patient_of(name: str, pattern: str | None) -> str:
    """The patient a case of this name belongs to; the whole name if nothing in it tells.

    Args:
        name: of the case.
        pattern: regular expression that matches from the name's beginning; its first group, or all it matches, is the
            patient. Default: the subject, in names such as public data sets have; the whole of a code that tells no
            patient; otherwise the name's beginning up to the end of its first digits.
    """
    if pattern:
        match = re.match(pattern, name)
        return (match.group(1) if match.groups() else match.group(0)) if match else name
    for known in (*PUBLISHED, *CODES):
        for part in name.split("/"):
            if match := known.match(part):
                return match.group(1) if match.groups() else match.group(0)
    match = PATIENT.match(name)
    return match.group(0) if match else name


def doubts(patients: Mapping[str, str]) -> list[str]:
    """What should be asked about patients that were guessed from the names of cases, one sentence each.

    Args:
        patients: patient by name of the case, as `patient_of` gives it without a pattern.
    """
    texts = []
    coded = [name for name in patients if any(code.match(part) for code in CODES for part in name.split("/"))]
    if len(coded) > 1:
        texts.append(
            f"the names of {len(coded)} cases, such as {coded[0]}, tell no patient, so each counts as one of its own; "
            "if some are of one patient or video, give a table (--patients)"
        )
    early, late = ([n for n in patients if rule.match(n.split("/")[-1])] for rule in (EARLY_BRATS, LATE_BRATS))
    if early and late:
        texts.append(
            f"BraTS since 2020 has patients of earlier years under other names, and {early[0]} and {late[0]} are both "
            "here; give a table of the patients (--patients), as from the name_mapping.csv of the data set"
        )
    groups: dict[str, list[str]] = {}
    for name, patient in patients.items():
        groups.setdefault(patient, []).append(name)
    if len(groups) > 1 and len(patients) >= max(MANY, CASES_EACH * len(groups)):
        patient, names = max(groups.items(), key=lambda group: len(group[1]))
        texts.append(
            f"{len(patients)} cases are only {len(groups)} patients by their names, for example {names[0]} and "
            f"{names[-1]} are both '{patient}'; if that is wrong, give a --patient-pattern or a table (--patients)"
        )
    return texts


def unused_tables(folder: Path, names: Iterable[str], *, used: Iterable[Path] = ()) -> list[str]:
    """Files in a folder that `read_patient_table` reads and that name the patient of every case, sorted.

    Args:
        folder: of the data set; its subfolders are not searched.
        names: of the cases.
        used: files that are known to be something else, such as labels.
    """
    wanted, others = set(names), set(used)
    tables = (path for path in sorted(folder.glob("*")) if path.suffix.lower() in TABLE_ENDINGS and path.is_file())
    return [path.name for path in tables if path not in others and wanted <= _cases_of(path)] if wanted else []


def _cases_of(path: Path) -> set[str]:
    """The cases in a table of patients; none if it is another table."""
    try:
        return set(read_patient_table(path))
    except UsageError:
        return set()


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
