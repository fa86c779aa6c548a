"""What is unusual about a site's volumes, in sentences for the site itself."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import numpy as np

from ...imaging.accounting.case_sizes import CaseSize, size_warnings
from ...imaging.formats.label_values import suggestion
from ...imaging.patients import doubts, patient_of
from ...imaging.slice_format import SliceFormat
from ...imaging.slice_grid import span_around
from .patient_split import SPLITS
from .prepare_config import PrepareConfig
from .slice_store import Case

CLIPPED = 0.05  # share of a case's voxels far outside the site's intensity window
SMALLEST, LARGEST = 0.05, 25.0  # plausible voxel sizes, millimetres
LOST_LABELS = 0.01  # share of annotated voxels outside the slices
CUT_OFF = 0.01  # share of a volume's width that does not fit into the slices
NAMES = 5  # cases named in one sentence


def store_warnings(
    cases: list[Case], fmt: SliceFormat, *, classes: int, without_image: list[str], config: PrepareConfig
) -> list[str]:
    """One sentence per kind of oddity. Names stay at the site."""
    findings = [
        ("of one volume, under several names", _duplicates(cases)),
        (f"with more than {CLIPPED:.0%} of the voxels far outside the intensity window", _names(
            case for case in cases if case.facts.clipped > CLIPPED)),
        ("with slices in which all voxels are equal", _names(case for case in cases if case.facts.blank)),
        ("wider than the slices; their rims are cut off", _names(case for case in cases if _too_wide(case, fmt))),
        ("with a label file that marks nothing", _names(
            case for case in cases if case.labelled and not case.facts.marks)),
        (f"with more than {LOST_LABELS:.0%} of the annotation outside the slices", _names(
            case for case in cases if case.facts.label_loss > LOST_LABELS)),
        ("without an image", without_image),
    ]  # fmt: skip
    if not fmt.pictures:  # these have one slice, and no millimetres
        findings += [
            (f"with voxels that no scanner has (below {SMALLEST} or above {LARGEST:g} mm)", _names(
                case for case in cases if min(case.facts.spacing) < SMALLEST or max(case.facts.spacing) > LARGEST)),
            ("with a single slice", _names(case for case in cases if case.count == 1)),
        ]  # fmt: skip
    findings += [(f"with a remark: {remark}", _names(
        case for case in cases if remark in case.facts.remarks)) for remark in _remarks(cases)]  # fmt: skip
    sentences = [f"{len(names)} cases {what}: {_some(names)}" for what, names in findings if names]
    sentences += [] if fmt.pictures else size_warnings([_size(case) for case in cases])
    sentences += _patient_warnings(cases, config)
    return sentences + _unused_classes(cases, classes)


def patients_line(cases: list[Case]) -> str:
    """How many patients the cases have and who they are, such as "10 cases, 4 patients: 002 (3 cases), ...".

    The numbers of patients in the parts of the split follow the number of all.
    """
    groups = Counter(case.patient for case in cases)
    split = {case.patient: case.split for case in cases}
    parts = ", ".join(f"{count} {part}" for part in SPLITS if (count := list(split.values()).count(part)))
    rising = sorted(groups, key=lambda patient: (-groups[patient], patient))
    names = [f"{patient} ({groups[patient]} cases)" if groups[patient] > 1 else patient for patient in rising]
    return f"{len(cases)} cases, {len(groups)} patients ({parts}): {_some(names)}"


def _patient_warnings(cases: list[Case], config: PrepareConfig) -> list[str]:
    """What is unusual about the patients, or about those who are held out."""
    patients = {case.patient for case in cases}
    if len(cases) > 1 and len(patients) == 1:
        return [
            f"all {len(cases)} cases seem to be of one patient ('{cases[0].patient}') and none is held out; run "
            "`fedfactory prepare` with a --patient-pattern that finds the patient in a case's name"
        ]
    texts = []
    drawn = config.split is None and config.validation_share + config.test_share > 0
    if drawn and len(patients) > 1 and all(case.split == "train" for case in cases):
        share = max(config.validation_share, config.test_share)
        texts.append(
            f"none of {len(patients)} patients is held out, since {share:.0%} of them is less than one; for scores on "
            "other patients, raise --validation-share or --test-share, or add cases of other patients"
        )
    guessed = {case.name: case.patient for case in cases if case.patient == patient_of(case.name, None)}
    return texts + (doubts(guessed) if config.patients is None and config.patient_pattern is None else [])


def _names(cases: Iterable[Case]) -> list[str]:
    return [case.name for case in cases]


def _remarks(cases: list[Case]) -> list[str]:
    return sorted({remark for case in cases for remark in case.facts.remarks})


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMES]) + (f" and {len(names) - NAMES} more" if len(names) > NAMES else "")


def _duplicates(cases: list[Case]) -> list[str]:
    groups = defaultdict(list)
    for case in cases:
        groups[case.voxels].append(case.name)
    return [name for names in groups.values() if len(names) > 1 for name in names]


def _size(case: Case) -> CaseSize:
    """The size of a case; its labelled volume only from dense labels, for others mark parts of a structure."""
    spacing = np.linalg.norm(np.array(case.affine)[:3, :3], axis=0)
    dense = case.label_kind == "dense"
    return CaseSize(
        name=case.name,
        shape=case.shape,
        spacing=spacing.tolist(),
        foreground=sum(case.facts.label_volumes.values()) if dense else None,
        cut_labels=case.facts.cut_labels,
    )


def _too_wide(case: Case, fmt: SliceFormat) -> bool:
    spans = [span_around(*ends, middle) for ends, middle in zip(case.box, case.centre or (None, None), strict=False)]
    widths = [span * mm for span, mm in zip(spans, case.facts.spacing, strict=False)]
    return max(widths) > fmt.field_of_view * (1 + CUT_OFF)


def _unused_classes(cases: list[Case], classes: int) -> list[str]:
    seen = {int(value) for case in cases for value in case.facts.label_volumes}
    missing = [value for value in range(1, classes) if value not in seen] if seen else []
    if not missing:
        return []
    text = f"labels {_some([str(value) for value in missing])} never occur, though {max(seen)} does"
    if len(missing) > len(seen):
        text += f"; if values are no class numbers, run `fedfactory prepare` with {suggestion(seen)}"
    return [text]
