"""One case: what it is (survey), and its slices on the site's common format (cut)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ...common.files import sha256_of
from ...errors import UsageError, VolumeError
from ...imaging.accounting.case_sizes import cut_labels
from ...imaging.archive.series import patient_digest
from ...imaging.case_files import CaseFiles, is_label_table
from ...imaging.formats.label_values import suggestion
from ...imaging.image_reader import read_image
from ...imaging.images import Box, Image, ImageFacts, StandardisedSlices, StoredSlices
from ...imaging.label_maps import LabelMap, read_label_map, read_mask_volume
from ...imaging.patients import patient_of
from ...imaging.pictures.picture_image import is_picture_file
from ...imaging.slice_choices import UNLABELLED
from ...imaging.slice_format import SliceFormat, count_bytes, parts_of
from ...imaging.slice_grid import SliceGrid, span_around
from ...imaging.volumes import Volume
from .label_tables import MAX_CLASSES, read_gaze, read_presence
from .prepare_config import PrepareConfig
from .reference_runs import to_runs
from .slice_centres import centre_of, refuse_beside


@dataclass(frozen=True)
class Survey:
    """What must be known of all cases before the first can be cut.

    Attributes:
        digest: SHA-256 over the contents of the case's files.
        patient: equal for all cases of a patient; empty until the store names the patient of `header_digest`.
        header_digest: of the patient that the DICOM headers name, see `patient_digest`; None where something else tells
            the patient. It is never written.
        labelled: whether there is a label file.
        shape: of the stored image.
        affine: (4, 4) of the stored image.
        channels: number of its channels.
        box: first and last + 1 index of the part that is kept, along the turned axes.
        centre: voxel in the middle of the slices, along the first two turned axes; None is the middle of the box.
        spacing: (3,) millimetres along the turned axes.
        image: what is known of the voxels; None if they are read only when the case is cut, see `Image.deferred`.
        localiser: digest of the localiser that found the centre; None without one.
    """

    digest: str
    patient: str
    labelled: bool
    shape: tuple[int, ...]
    affine: np.ndarray
    channels: int
    box: Box
    centre: tuple[float, float] | None
    spacing: np.ndarray
    image: ImageFacts | None
    localiser: str | None = None
    header_digest: str | None = None

    @property
    def extent(self) -> np.ndarray:
        """(3,) millimetres that slices around the centre must span to show the whole box, and its height."""
        middles = (*(self.centre or (None, None)), None)
        spans = [span_around(*ends, middle) for ends, middle in zip(self.box, middles, strict=True)]
        return np.array(spans) * self.spacing


@dataclass(frozen=True, kw_only=True)
class LabelFacts:
    """What is known of a case's labels beside the labels themselves.

    Attributes:
        marks: whether they mark anything.
        highest_label: highest label value; 0 without labels.
        label_volumes: millilitres by label value.
        label_loss: share of the annotated voxels that lie outside the slices, in [0, 1].
        cut_labels: label value to the number of slices in which it touches the border of the image, see `cut_labels`.
        names: of the classes, as far as the label file tells them.
        remarks: what is unusual about the label file, one sentence each.
    """

    marks: bool = False
    highest_label: int = 0
    label_volumes: dict[str, float] = field(default_factory=dict)
    label_loss: float = 0.0
    cut_labels: dict[str, int] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CaseSlices:
    """A case cut into slices.

    Attributes:
        standardised: slices of which the window is not known yet; None where it is.
        stored: slices on the [-1, 1] scale; None where the window is not known yet.
        image: what is known of the image's voxels.
        labels: (n, size, size) uint8, 255 where nobody annotated; or None.
        presence: (n, C) uint8, 1 where a slice shows the class, for image-level labels; C is one more than the highest
            label of the case. Or None.
        gaze: (m, 4) float32: slice, row, column, milliseconds; or None.
        reference: (r, 3) uint32 runs of a test case's dense label map on the volume's own grid, see `to_runs`; or None.
        height: millimetres along the slice axis.
        facts: what is known of the labels.
    """

    standardised: StandardisedSlices | None = None
    stored: StoredSlices | None = None
    image: ImageFacts
    labels: np.ndarray | None = None
    presence: np.ndarray | None = None
    gaze: np.ndarray | None = None
    reference: np.ndarray | None = None
    height: float
    facts: LabelFacts

    @property
    def count(self) -> int:
        """Number of slices."""
        return len(self.stored.images) if self.standardised is None else self.standardised.count


def digest_of(case: CaseFiles, contents: Mapping[Path, bytes] | None = None) -> str:
    """SHA-256 over the contents of all files of a case, and over what they are, as far as it is no file's content.

    Args:
        contents: bytes of files that were read already.

    Raises: VolumeError if a file cannot be read.
    """
    whole = hashlib.sha256()
    # A channel moved to the place of a missing one, or a class folder with another number, is another case.
    missing = [number for number, image in enumerate(case.channels) if image is None]
    values = [label.value for label in case.labels if label.value is not None]
    if missing or values:
        whole.update(f"{missing} {values}".encode())
    if case.reading.frame is not None:
        whole.update(f"frame {case.reading.frame}".encode())
    for path in case.files:
        if contents and path in contents:
            whole.update(hashlib.sha256(contents[path]).hexdigest().encode())
            continue
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise VolumeError(f"{path}: no such file, or no regular one; give an ordinary file")
        try:
            whole.update(sha256_of(path).encode())
        except OSError as error:
            raise VolumeError(f"{path}: cannot be read ({error.strerror}); use a readable file") from None
    return whole.hexdigest()


def survey(case: CaseFiles, config: PrepareConfig) -> Survey:
    """Raises: VolumeError or UsageError naming the file of an unusable case."""
    # A picture's file is read once for both; of volumes, which are large, the digest comes in bounded memory first.
    pictures = any(is_picture_file(file) for file in case.channels)
    digest = "" if pictures else digest_of(case)
    image = read_image(case.channels, max_pixels=config.max_pixels, reading=case.reading)
    digest = digest or digest_of(case, image.contents)
    box = image.box(plane=config.plane, crop=config.crop, published=config.compatibility == "published")
    centre = centre_of(case.name, image, config=config)
    refuse_beside(case.name, centre, box=box, config=config)
    if case.mask is not None:
        box = (*box[:2], _mask_ends(case, image, config, ends=box[2]))
    in_header = _patient_in_header(case, config)
    return Survey(
        digest=digest,
        patient=_patient(case, config) if in_header is None else "",
        header_digest=in_header,
        labelled=bool(case.labels),
        shape=image.shape,
        affine=image.affine,
        channels=image.channels,
        box=box,
        centre=centre,
        spacing=image.turned_spacing(config.plane),
        image=None if image.deferred else image.facts(plane=config.plane, box=box),
        localiser=None if config.centres is None else config.centres.digest,
    )


def cut(
    case: CaseFiles, seen: Survey, fmt: SliceFormat, *, config: PrepareConfig, window_known: bool, held_out: bool
) -> CaseSlices:
    """The slices of a case; standardised ones if the window of `fmt` is not known yet.

    Args:
        case: the files.
        seen: what the survey found of them.
        fmt: of the slices.
        config: how slices are made.
        window_known: whether the window of `fmt` is the site's.
        held_out: whether it is a test case, which keeps the reference of its labels.

    Raises: VolumeError or UsageError naming the file of an unusable label, mask or table.
    """
    image = read_image(case.channels, fmt=fmt, max_pixels=config.max_pixels, reading=case.reading)
    grid = SliceGrid(seen.shape, seen.affine, box=seen.box, fmt=fmt, centre=seen.centre)
    known = image.facts(plane=fmt.plane, box=seen.box) if seen.image is None else seen.image
    labels = presence = gaze = reference = None
    facts = LabelFacts()
    if case.labels and config.label_kind == "gaze":
        gaze, remarks = read_gaze(case.labels[0].path, grid)
        facts = LabelFacts(marks=len(gaze) > 0, remarks=remarks)
    elif case.labels and config.label_kind == "image" and is_label_table(case.labels[0].path):
        presence = read_presence(case.labels[0].path, grid, config.label_values)
        facts = LabelFacts(highest_label=presence.shape[1] - 1, marks=presence.shape[1] > 1)
    elif case.labels:
        found = _read_label(case, image, config)
        label = found.volume
        if config.mask_as_class:
            label = _with_mask_class(case, image, label)
        label = _with_unlabelled(case.labels[0].path, label, config)
        labels = grid.sparse_label_slices(label) if config.sparse else grid.label_slices(label)
        voxel = abs(float(np.linalg.det(label.affine[:3, :3])))
        facts = label_facts(label.data, voxel=voxel, lost=_share_outside(grid, label), spacing=label.spacing)
        facts = replace(facts, names={str(k): name for k, name in found.names.items()}, remarks=found.remarks)
        reference = to_runs(label.data) if held_out and config.label_kind == "dense" else None
        if config.label_kind == "image":
            presence, labels = _presence(labels, facts.highest_label + 1), None
    return CaseSlices(
        standardised=None if window_known else image.standardised(grid, known.intensities),
        stored=image.stored(grid, known.intensities) if window_known else None,
        image=known,
        labels=labels,
        presence=presence,
        gaze=gaze,
        reference=reference,
        height=grid.height,
        facts=facts,
    )


def _patient(case: CaseFiles, config: PrepareConfig) -> str:
    """The patient of a case whose DICOM header does not tell: from the site's table, a pattern, or its name.

    Raises: UsageError if there is a table without a row for the case.
    """
    subject = case.subject or case.name
    if config.patients is not None:
        if found := config.patients.get(case.name) or config.patients.get(subject):
            return found
        raise UsageError(f"{subject}: has no row in the table of patients; add one")
    return patient_of(subject, config.patient_pattern)


def _patient_in_header(case: CaseFiles, config: PrepareConfig) -> str | None:
    """The digest of the patient in a case's DICOM header, if that is what tells its patient."""
    first = next(files for files in case.channels if files is not None)
    if config.patients is not None or config.patient_pattern is not None or not isinstance(first, tuple):
        return None
    return patient_digest(first)


def _read_label(case: CaseFiles, image: Image, config: PrepareConfig) -> LabelMap:
    path = case.labels[0].path
    if is_label_table(path):
        raise UsageError(f"{path}: is a table, but label_kind is '{config.label_kind}'; give a label map")
    values, unlabelled = config.label_values, config.unlabelled_value
    if values is not None and unlabelled is not None:
        values = values.with_unlabelled(unlabelled)
    found = read_label_map(case, image, colours=config.mask_colours, class_numbers=config.sparse, values=values)
    return found.with_class_names(config.class_names, path)


def _mask_ends(case: CaseFiles, image: Image, config: PrepareConfig, *, ends: tuple[int, int]) -> tuple[int, int]:
    """First and last + 1 slice that touch the mask. An empty mask keeps all slices.

    The published program loses the last slice.
    """
    mask = read_mask_volume(case.mask, image, reading=case.reading).turned(config.plane).data
    touched = np.flatnonzero(mask.any(axis=(0, 1)))
    if not len(touched):
        return ends
    last = int(touched[-1]) + (0 if config.compatibility == "published" else 1)
    start, stop = max(ends[0], int(touched[0])), min(ends[1], last)
    return (start, stop) if stop > start else ends


def _with_mask_class(case: CaseFiles, image: Image, label: Volume) -> Volume:
    """Label values raised by 1, and label 1 for the rest of the mask."""
    raised = label.data.astype(np.uint32) + 1  # the highest of 16 bits would become background
    rest = 0 if case.mask is None else read_mask_volume(case.mask, image, reading=case.reading).data > 0
    return Volume(np.where(label.data > 0, raised, rest).astype(np.uint32), label.affine)


def _with_unlabelled(path: Path, label: Volume, config: PrepareConfig) -> Volume:
    """The label map with 255 where nobody annotated. Raises VolumeError for labels out of range."""
    data, nobody = label.data, None
    if config.unlabelled_value is not None:  # label values have made it 255 already
        nobody = data == (config.unlabelled_value if config.label_values is None else UNLABELLED)
        data = np.where(nobody, 0, data)
    limit = MAX_CLASSES if config.classes is None else config.classes
    if (highest := int(data.max())) >= limit:
        text, values = f"{path}: holds label {highest}; {limit - 1} is the highest that is expected", np.unique(data)
        if config.label_values is None and len(values) <= highest:  # with gaps: no class numbers
            text += f"; give every value its class, such as {suggestion(values)}"
        raise VolumeError(text)
    data = data.astype(np.uint8)
    if nobody is not None:
        data[nobody] = UNLABELLED
    return Volume(data, label.affine)


def label_facts(labels: np.ndarray, *, voxel: float, lost: float, spacing: np.ndarray | None = None) -> LabelFacts:
    """Highest label, volumes and cut labels of a label map.

    Args:
        labels: label map (X, Y, Z) or slices (n, S, S), uint8, 255 where nobody annotated.
        voxel: cubic millimetres of each value.
        lost: share of the annotated voxels that lie outside the slices.
        spacing: (3,) voxel size along the axes of a label map, millimetres; None where its border is not the image's.
    """
    counts = count_bytes(labels)[:UNLABELLED]
    volumes = {str(k): float(n * voxel / 1000) for k, n in enumerate(counts) if k and n}
    highest = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
    cut = {} if spacing is None else cut_labels(labels, spacing.tolist())
    cut.pop(str(UNLABELLED), None)
    return LabelFacts(
        marks=bool(volumes), highest_label=highest, label_volumes=volumes, label_loss=lost, cut_labels=cut
    )


def _share_outside(grid: SliceGrid, label: Volume) -> float:
    """Of the annotated voxels, the share that no slice covers."""
    covered = grid.covered_part(label)
    if covered.size == label.data.size:
        return 0.0
    total, inside = (
        sum(np.count_nonzero((part > 0) & (part < UNLABELLED)) for part in parts_of(values))
        for values in (label.data, covered)
    )
    return 1 - inside / total if total else 0.0


def _presence(labels: np.ndarray, classes: int) -> np.ndarray:
    """(n, classes) 1 where a slice shows the class; class 0 is always there."""
    present = np.stack([(labels == value).any(axis=(1, 2)) for value in range(classes)], axis=1)
    present[:, 0] = True
    return present.astype(np.uint8)
