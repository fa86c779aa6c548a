"""One case: what it is (survey), and its slices on the site's common format (cut)."""

from __future__ import annotations

import csv
import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ...common.files import sha256_of
from ...errors import UsageError, VolumeError
from ...imaging.case_sizes import cut_labels
from ...imaging.cases import CaseFiles
from ...imaging.cropping import crop_box
from ...imaging.dicom import patient_key
from ...imaging.patients import patient_of
from ...imaging.slice_format import UNLABELLED, SliceFormat, mean_and_deviation
from ...imaging.slice_grid import SliceGrid, span_around
from ...imaging.volume_files import read_volume
from ...imaging.volumes import Volume
from .prepare_config import PrepareConfig
from .reference_runs import to_runs
from .slice_centres import centre_of, refuse_beside

MAX_CLASSES = UNLABELLED  # labels are stored in one byte, and 255 means that nobody annotated
HISTOGRAM_BINS = 64
SHORTEST_FIXATION = 50.0  # milliseconds; shorter rows of the table are no fixations
GAZE_COLUMNS = ("CURRENT_FIX_X", "CURRENT_FIX_Y", "SLICE", "CURRENT_FIX_DURATION")
AFFINE_TOLERANCE = 1e-2  # millimetres


@dataclass(frozen=True)
class Survey:
    """What must be known of all cases before the first can be cut.

    Attributes:
        digest: SHA-256 over the contents of the case's files.
        voxels: SHA-256 over the image's voxels and shape alone.
        patient: equal for all cases of a patient.
        labelled: whether there is a label file.
        shape: of the stored volume.
        affine: (4, 4) of the stored volume.
        box: first and last + 1 index of the part that is kept, along the turned axes.
        centre: voxel in the middle of the slices, along the first two turned axes; None is the middle of the box.
        spacing: (3,) millimetres along the turned axes.
        mean: of the kept voxels.
        deviation: standard deviation of the kept voxels.
        blank: number of slices of the box in which all voxels are equal.
        low: lowest kept voxel.
        high: highest kept voxel.
        counts: (64,) histogram of the kept voxels in equal bins from `low` to `high`.
        localiser: digest of the localiser that found the centre; None without one.
    """

    digest: str
    voxels: str
    patient: str
    labelled: bool
    shape: tuple[int, ...]
    affine: np.ndarray
    box: tuple[tuple[int, int], ...]
    centre: tuple[float, float] | None
    spacing: np.ndarray
    mean: float
    deviation: float
    blank: int
    low: float
    high: float
    counts: np.ndarray
    localiser: str | None = None

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
    """

    marks: bool = False
    highest_label: int = 0
    label_volumes: dict[str, float] = field(default_factory=dict)
    label_loss: float = 0.0
    cut_labels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CaseSlices:
    """A case cut into slices.

    Attributes:
        standardised: (n, size, size) float32, NaN outside the volume.
        labels: (n, size, size) uint8, 255 where nobody annotated; or None.
        presence: (n, C) uint8, 1 where a slice shows the class, for image-level labels; C is one more than the highest
            label of the case. Or None.
        gaze: (m, 4) float32: slice, row, column, milliseconds; or None.
        reference: (r, 3) uint32 runs of the dense label map on the volume's own grid, see `to_runs`; or None.
        height: millimetres along the slice axis.
        facts: what is known of the labels.
    """

    standardised: np.ndarray
    labels: np.ndarray | None = None
    presence: np.ndarray | None = None
    gaze: np.ndarray | None = None
    reference: np.ndarray | None = None
    height: float
    facts: LabelFacts


def digest_of(case: CaseFiles) -> str:
    """SHA-256 over the contents of all files of a case. Raises: VolumeError if a file cannot be read."""
    whole = hashlib.sha256()
    for path in case.files:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise VolumeError(f"{path}: no such file, or no regular one; give an ordinary file")
        try:
            whole.update(sha256_of(path).encode())
        except OSError as error:
            raise VolumeError(f"{path}: cannot be read ({error.strerror}); use a readable file") from None
    return whole.hexdigest()


def survey(case: CaseFiles, config: PrepareConfig) -> Survey:
    """Raises: VolumeError or UsageError naming the file of an unusable case."""
    digest = digest_of(case)
    image = read_volume(case.image)
    published = config.compatibility == "published"
    turned = image.turned(config.plane)
    box = crop_box(turned.data, config.crop, published=published)
    centre = centre_of(case.name, image, config=config)
    refuse_beside(case.name, centre, box=box, config=config)
    if case.mask is not None:
        box = (*box[:2], _mask_ends(case, image, config, ends=box[2]))
    kept = turned.data[tuple(slice(*ends) for ends in box)]
    try:
        mean, deviation = mean_and_deviation(kept)
    except VolumeError as error:
        raise VolumeError(f"{case.files[0]}: {error}; give an image with contrast") from None
    low, high = float(kept.min()), float(kept.max())
    return Survey(
        digest=digest,
        voxels=digest_of_array(image.data),
        patient=_patient(case, config.patient_pattern),
        labelled=case.label is not None,
        shape=image.data.shape,
        affine=image.affine,
        box=box,
        centre=centre,
        spacing=turned.spacing,
        mean=mean,
        deviation=deviation,
        blank=int((kept.max(axis=(0, 1)) == kept.min(axis=(0, 1))).sum()),
        low=low,
        high=high,
        counts=histogram(kept, low, high),
        localiser=None if config.centres is None else config.centres.digest,
    )


def cut(case: CaseFiles, seen: Survey, fmt: SliceFormat, *, config: PrepareConfig) -> CaseSlices:
    """The slices of a case; `fmt` needs no window yet.

    Raises: VolumeError or UsageError naming the file of an unusable label, mask or table.
    """
    image = read_volume(case.image)
    grid = SliceGrid(seen.shape, seen.affine, box=seen.box, fmt=fmt, centre=seen.centre)
    slices = grid.image_slices(image)
    slices -= np.float32(seen.mean)
    slices /= np.float32(seen.deviation)
    labels = presence = gaze = reference = None
    facts = LabelFacts()
    if case.label is not None and config.label_kind == "gaze":
        gaze = _read_gaze(case, grid, seen)
        facts = LabelFacts(marks=len(gaze) > 0)
    elif case.label is not None and config.label_kind == "image" and case.label.suffix == ".csv":
        presence = _read_presence(case.label, seen, grid)
        facts = LabelFacts(highest_label=presence.shape[1] - 1, marks=presence.shape[1] > 1)
    elif case.label is not None:
        label = _read_label(case, image, config)
        if config.mask_as_class:
            label = _with_mask_class(case, image, label)
        label = _with_unlabelled(case.label, label, config)
        labels = grid.sparse_label_slices(label) if config.sparse else grid.label_slices(label)
        voxel = abs(float(np.linalg.det(label.affine[:3, :3])))
        facts = label_facts(label.data, voxel=voxel, lost=_share_outside(grid, label), spacing=label.spacing)
        reference = to_runs(label.data) if config.label_kind == "dense" else None
        if config.label_kind == "image":
            presence, labels = _presence(labels, facts.highest_label + 1), None
    return CaseSlices(
        standardised=slices,
        labels=labels,
        presence=presence,
        gaze=gaze,
        reference=reference,
        height=grid.height,
        facts=facts,
    )


def _patient(case: CaseFiles, pattern: str | None) -> str:
    """The patient of a case: from its DICOM header, else from its name; from the name if a pattern is given."""
    from_header = patient_key(case.image) if pattern is None and isinstance(case.image, tuple) else None
    return from_header or patient_of(case.name, pattern)


def _read_label(case: CaseFiles, image: Volume, config: PrepareConfig) -> Volume:
    if case.label.suffix == ".csv":
        raise UsageError(f"{case.label}: is a table, but label_kind is '{config.label_kind}'; give a label map")
    return _on_grid_of(image, read_volume(case.label, integer=True), case.label)


def _on_grid_of(image: Volume, other: Volume, path: Path) -> Volume:
    """`other` in the stored axis order of the image. Raises VolumeError if it is of another grid."""
    other = other.ordered_like(image)
    if other.data.shape != image.data.shape:
        raise VolumeError(f"{path}: shape is {other.data.shape}; it must be that of its image, {image.data.shape}")
    if not np.allclose(other.affine, image.affine, atol=AFFINE_TOLERANCE):
        raise VolumeError(f"{path}: its affine differs from that of its image; both must be equal")
    return other


def _mask_ends(case: CaseFiles, image: Volume, config: PrepareConfig, *, ends: tuple[int, int]) -> tuple[int, int]:
    """First and last + 1 slice that touch the mask. An empty mask keeps all slices.

    The published program loses the last slice.
    """
    mask = _on_grid_of(image, read_volume(case.mask, integer=True), case.mask).turned(config.plane).data
    touched = np.flatnonzero(mask.any(axis=(0, 1)))
    if not len(touched):
        return ends
    last = int(touched[-1]) + (0 if config.compatibility == "published" else 1)
    start, stop = max(ends[0], int(touched[0])), min(ends[1], last)
    return (start, stop) if stop > start else ends


def _with_mask_class(case: CaseFiles, image: Volume, label: Volume) -> Volume:
    """Label values raised by 1, and label 1 for the rest of the mask."""
    if case.mask is None:
        return Volume(np.where(label.data > 0, label.data + 1, 0).astype(np.uint16), label.affine)
    mask = _on_grid_of(image, read_volume(case.mask, integer=True), case.mask).data > 0
    return Volume(np.where(label.data > 0, label.data + 1, mask).astype(np.uint16), label.affine)


def _with_unlabelled(path: Path, label: Volume, config: PrepareConfig) -> Volume:
    """The label map with 255 where nobody annotated. Raises VolumeError for labels out of range."""
    data, nobody = label.data, None
    if config.unlabelled_value is not None:
        nobody = data == config.unlabelled_value
        data = np.where(nobody, 0, data)
    limit = MAX_CLASSES if config.classes is None else config.classes
    if (highest := int(data.max())) >= limit:
        raise VolumeError(f"{path}: holds label {highest}; {limit - 1} is the highest that is expected")
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
    counts = np.bincount(labels.ravel(order="K"), minlength=2)[:UNLABELLED]
    volumes = {str(k): float(n * voxel / 1000) for k, n in enumerate(counts) if k and n}
    highest = int(np.flatnonzero(counts)[-1]) if counts.any() else 0
    cut = {} if spacing is None else cut_labels(labels, spacing.tolist())
    cut.pop(str(UNLABELLED), None)
    return LabelFacts(
        marks=bool(volumes), highest_label=highest, label_volumes=volumes, label_loss=lost, cut_labels=cut
    )


def _share_outside(grid: SliceGrid, label: Volume) -> float:
    """Of the annotated voxels, the share that no slice covers."""
    total, inside = (
        np.count_nonzero((part > 0) & (part < UNLABELLED)) for part in (label.data, grid.covered_part(label))
    )
    return 1 - inside / total if total else 0.0


def _presence(labels: np.ndarray, classes: int) -> np.ndarray:
    """(n, classes) 1 where a slice shows the class; class 0 is always there."""
    present = np.stack([(labels == value).any(axis=(1, 2)) for value in range(classes)], axis=1)
    present[:, 0] = True
    return present.astype(np.uint8)


def _read_presence(path: Path, seen: Survey, grid: SliceGrid) -> np.ndarray:
    """A table with columns SLICE (0-based, along the stored third axis) and LABEL, a row for each structure seen."""
    rows = _read_table(path, ("SLICE", "LABEL"))
    if (rows != np.round(rows)).any() or (rows < 0).any():
        raise VolumeError(f"{path}: SLICE and LABEL must be whole numbers from 0")
    if len(rows) and (rows[:, 0].max() >= seen.shape[2] or rows[:, 1].max() >= MAX_CLASSES):
        raise VolumeError(f"{path}: names slice {rows[:, 0].max():.0f} and label {rows[:, 1].max():.0f}: out of range")
    highest = int(rows[:, 1].max()) if len(rows) else 0
    present = np.zeros((grid.axes[2].count, highest + 1), dtype=np.uint8)
    present[:, 0] = 1
    middle = [(n - 1) / 2 for n in seen.shape[:2]]
    places = grid.pixels_of(np.array([[*middle, row[0]] for row in rows]).reshape(-1, 3))
    for place, (_, value) in zip(np.round(places[:, 0]).astype(int), rows, strict=True):
        if 0 <= place < len(present):
            present[place, int(value)] = 1
    return present


def _read_gaze(case: CaseFiles, grid: SliceGrid, seen: Survey) -> np.ndarray:
    """Fixations (m, 4) float32: slice, row, column, milliseconds.

    In the table X and Y are shares of the first and second stored axis, SLICE is an index along the third.
    """
    if case.label.suffix != ".csv":
        raise UsageError(f"{case.label}: is no table, but label_kind is 'gaze'; give a table of fixations, .csv")
    rows = _read_table(case.label, GAZE_COLUMNS)
    if len(rows) and (rows[:, 3].min() < 0 or abs(rows[:, :2]).max() > 1e6):
        raise VolumeError(f"{case.label}: fixations with negative durations or places far outside the image")
    voxels = np.stack([rows[:, 0] * seen.shape[0] - 0.5, rows[:, 1] * seen.shape[1] - 0.5, rows[:, 2]], axis=1)
    places = grid.pixels_of(voxels)
    places[:, 0] = np.round(places[:, 0])
    last = np.array([grid.axes[2].count, grid.axes[0].count, grid.axes[1].count]) - 0.5
    on_image = (rows[:, :2] >= 0).all(axis=1) & (rows[:, :2] <= 1).all(axis=1)
    usable = on_image & (places >= -0.5).all(axis=1) & (places <= last).all(axis=1) & (rows[:, 3] >= SHORTEST_FIXATION)
    return np.concatenate([places, rows[:, 3:]], axis=1)[usable].astype(np.float32)


def _read_table(path: Path, columns: tuple[str, ...]) -> np.ndarray:
    """(rows, columns) float64 of a comma-separated file with a heading."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (reader.fieldnames or ())]
            if missing:
                raise VolumeError(f"{path}: lacks the column {missing[0]}; it must have {', '.join(columns)}")
            rows = np.array([[float(row[name]) for name in columns] for row in reader], dtype=np.float64)
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise VolumeError(f"{path}: not readable as a table of numbers ({error}); use comma-separated values") from None
    if not np.isfinite(rows).all():
        raise VolumeError(f"{path}: holds NaN or infinite numbers; all must be finite")
    return rows.reshape(-1, len(columns))


def histogram(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """(64,) how many values lie in each equal bin from low to high."""
    scaled = (values.ravel(order="K") - np.float32(low)) * np.float32(HISTOGRAM_BINS / max(high - low, 1e-30))
    return np.bincount(np.clip(scaled, 0, HISTOGRAM_BINS - 1).astype(np.uint8), minlength=HISTOGRAM_BINS)


def digest_of_array(array: np.ndarray) -> str:
    """SHA-256 over shape and values."""
    digest = hashlib.sha256(str(array.shape).encode())
    digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
