"""The Brain Imaging Data Structure: `sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz`, label maps among its derivatives.

Names are made of entities, such as `sub-01`, and a suffix, such as `T1w` or `dseg` (a discrete segmentation). See the
specification at https://bids-specification.readthedocs.io.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ...errors import UsageError
from ..case_files import Found, LabelFile, Unusable, printable
from ..volume_files import case_name
from .folders import folders, folders_below, volumes_of
from .label_names import is_label_name
from .wanted import Wanted, add_case, ask_for_image, refuse_missing, remark_unlabelled, set_shared_labels_apart

ROOTS = ("", "rawdata", "raw", "bids")  # where the subjects are, in a data set
DERIVATIVES = "derivatives"
ANATOMY = "anat"
SEGMENTATION = "dseg"
MASKS = ("mask", "msk")  # of structures if an entity says so, otherwise of the brain
DEPTH = 4  # of label maps among derivatives
TELLING = ("label", "lesion", "roi")  # entities and words of masks that are label maps
OWN = ("desc", "label", "space", "res", "den", "atlas", "seg", "hemi")  # entities of label maps that images lack
NATIVE = ("orig", "individual", "native", "t1w", "t2w", "flair", "scanner", "anat")  # spaces of the images themselves


@dataclass(frozen=True)
class _Name:
    """A file by the parts of its name; `part` is the folder that it belongs to, such as `anat` or a derivative's."""

    path: Path
    entities: dict[str, str]
    suffix: str
    part: str

    @property
    def run(self) -> str:
        """The name without its suffix: images with the same one belong together."""
        return case_name(self.path)[: -len(self.suffix) - 1]


def find_bids(source: Path, wanted: Wanted) -> Found | None:
    """The cases of a BIDS data set, or of one subject of it.

    Images are the files of one suffix in `anat`; without any there, of all folders. Label maps are `dseg` files of the
    same subject and session, and masks whose names tell a structure (`label-lesion_mask`), beside the images or in
    `derivatives/*/`.

    Args:
        source: the data set.
        wanted: of the images the suffix, such as `T1w`; of the labels the folder in `derivatives`, or the end of names.

    Returns: cases; None if the folder is no BIDS data set.
    Raises: UsageError if there are several suffixes, or label maps of several derivatives, and none was chosen.
    """
    names = [name for root in ROOTS for name in _raw(source / root if root else source)]
    if not names:
        return None
    found = Found()
    images = [name for name in names if not is_label_name(case_name(name.path))]
    if any(name.part == ANATOMY for name in images):
        for name in images:
            if name.part != ANATOMY:
                found.passed_over[name.path] = f"a scan of {name.part}, for images are those of {ANATOMY}"
        images = [name for name in images if name.part == ANATOMY]
    keys = _keys(source, images, wanted)
    runs: dict[str, dict[str, _Name]] = {}
    for name in images:
        if name.suffix.casefold() not in map(str.casefold, keys):
            found.passed_over[name.path] = f"another image ({name.suffix}) than the chosen one"
        else:
            key = next(key for key in keys if key.casefold() == name.suffix.casefold())
            if (other := runs.setdefault(name.run, {}).setdefault(key, name)) is not name:
                found.problems[printable(name.run)] = f"{other.path} and {name.path}: are one image; keep one of them"
    labels = [name for name in (*names, *_derived(source)) if is_label_name(case_name(name.path))]
    _add_cases(source, runs, keys, [name for name in labels if _may_be_label(name, wanted)], wanted=wanted, found=found)
    set_shared_labels_apart(found)
    used = {path for case in found.cases for path in case.files}
    for name in labels:
        if name.path not in used and name.path not in found.passed_over:
            found.passed_over[name.path] = _reason(name, wanted)
    remark_unlabelled(found)
    return found


def _raw(root: Path) -> Iterator[_Name]:
    """The volumes of subjects' folders."""
    try:
        subjects = [path for path in folders(root) if path.name.startswith("sub-")]
        subjects += [root] if root.name.startswith("sub-") else []
        for subject in subjects:
            sessions = [path for path in folders(subject) if path.name.startswith("ses-")]
            for place in (subject, *sessions):
                for part in folders(place):
                    names = (_name(path, part.name) for path in volumes_of(part))
                    yield from (name for name in names if name is not None)
    except Unusable:
        return


def _derived(source: Path) -> Iterator[_Name]:
    """The volumes among derivatives."""
    try:
        pipelines = folders(source / DERIVATIVES)
    except Unusable:
        return
    for pipeline in pipelines:
        part = "" if pipeline.name.startswith("sub-") else pipeline.name
        for folder in folders_below(pipeline, DEPTH):
            yield from (name for path in volumes_of(folder) if (name := _name(path, part)) is not None)


def _name(path: Path, part: str) -> _Name | None:
    """The parts of a name; None if it does not begin with a subject."""
    *pairs, suffix = case_name(path).split("_")
    if not pairs or not pairs[0].startswith("sub-"):
        return None
    entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
    return _Name(path, entities, suffix, part)


def _keys(source: Path, images: list[_Name], wanted: Wanted) -> tuple[str, ...]:
    """The suffixes of the wanted images. Raises: UsageError if they must be chosen, or no image has the chosen one."""
    present = sorted({name.suffix for name in images})
    if wanted.any_image:
        if len(present) > 1:
            raise ask_for_image(source, "this BIDS data set", present)
        return tuple(present)
    known = {suffix.casefold() for suffix in present}
    if unknown := [key for key in wanted.keys if key.casefold() not in known]:
        raise UsageError(
            f"image_key is '{','.join(wanted.keys)}', but no image of the BIDS data set {source} ends in "
            f"_{unknown[0]}; choose of {', '.join(present)}"
        )
    return wanted.keys


def _may_be_label(label: _Name, wanted: Wanted) -> bool:
    """Whether a file may be a label map of an image, by its name alone."""
    space = label.entities.get("space", "orig").casefold()
    if wanted.label_key is None or space not in NATIVE:
        return False
    if (chosen := wanted.chosen_label) is not None:
        return label.part == chosen or case_name(label.path).casefold().endswith(chosen.casefold())
    tells = any(word in case_name(label.path).casefold() for word in TELLING)
    return label.suffix not in MASKS or (tells and label.entities.get("label") != "brain") or label.suffix == "msk"


def _belongs(label: _Name, image: _Name) -> bool:
    """Whether a label map is of the image's subject and session, and contradicts no other entity of it."""
    same = all(label.entities.get(entity) == image.entities.get(entity) for entity in ("sub", "ses"))
    others = {k: v for k, v in label.entities.items() if k not in (*OWN, "sub", "ses")}
    return same and all(image.entities.get(entity) == value for entity, value in others.items())


def _add_cases(
    source: Path,
    runs: dict[str, dict[str, _Name]],
    keys: tuple[str, ...],
    labels: list[_Name],
    *,
    wanted: Wanted,
    found: Found,
) -> None:
    for run, of_run in runs.items():
        name = printable(run)
        if name in found.problems:
            continue
        first = next(iter(of_run.values()))
        fitting = [label for label in labels if _belongs(label, first)]
        exact = [label for label in fitting if label.suffix == SEGMENTATION]
        fitting = exact or fitting
        if len(parts := sorted({label.part for label in fitting})) > 1:
            raise UsageError(
                f"{source}: {run} has label maps of {' and '.join(part or DERIVATIVES for part in parts)}; choose by "
                f"label_key, such as {parts[-1]}"
            )
        try:
            if len(fitting) > 1:
                raise Unusable(
                    f"{fitting[0].path} and {fitting[1].path}: are both label maps of {run}; choose one by the end "
                    "of its name (--label-key)"
                )
            channels = {key: of_run[key].path if key in of_run else None for key in keys}
            refuse_missing(first.path.parent / run, channels, fill_missing=wanted.fill_missing)
            add_case(found, run, channels, tuple(LabelFile(label.path) for label in fitting))
        except Unusable as error:
            found.problems[name] = str(error)


def _reason(label: _Name, wanted: Wanted) -> str:
    """Why a label map is not used."""
    if wanted.label_key is not None and label.entities.get("space", "orig").casefold() not in NATIVE:
        return f"a label map in another space ({label.entities['space']}) than the image"
    if wanted.chosen_label is not None and not _may_be_label(label, wanted):
        return "another label map than the chosen one"
    if wanted.chosen_label is None and label.suffix in MASKS and not _may_be_label(label, wanted):
        return "a mask whose name tells no structure, unless label_key chooses it"
    return wanted.over()
