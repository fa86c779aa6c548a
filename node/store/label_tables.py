"""Labels in tables: fixations of the eyes, and which structures a slice shows."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from ...errors import UsageError, VolumeError
from ...imaging.formats.label_values import LabelValues
from ...imaging.slice_format import UNLABELLED
from ...imaging.slice_grid import SliceGrid

MAX_CLASSES = UNLABELLED  # labels are stored in one byte, and 255 means that nobody annotated
SHORTEST_FIXATION = 50.0  # milliseconds; shorter rows of the table are no fixations
X, Y, SLICE, DURATION = "CURRENT_FIX_X", "CURRENT_FIX_Y", "SLICE", "CURRENT_FIX_DURATION"


def is_table(path: Path) -> bool:
    """Whether a file has the name of a table."""
    return path.suffix.lower() == ".csv"


def read_presence(path: Path, grid: SliceGrid, values: LabelValues | None = None) -> np.ndarray:
    """Which slices show which structures, of a table with a row for each structure that is seen.

    Args:
        path: table with the columns SLICE (from 0, along the stored third axis) and LABEL; of a picture LABEL alone.
        grid: of the case's slices.
        values: class of each number in LABEL; None takes them for class numbers.

    Returns: (slices, 1 + highest label) uint8, 1 where a slice shows the class; class 0 is always there.
    Raises: VolumeError for a table that cannot be used.
    """
    rows = _read_table(path, (SLICE, "LABEL"), default={SLICE: 0.0} if grid.fmt.pictures else {})
    if (rows != np.round(rows)).any() or (rows < 0).any():
        raise VolumeError(f"{path}: SLICE and LABEL must be whole numbers from 0")
    if values is not None and len(rows):
        rows[:, 1] = _classes_of(path, rows[:, 1], values)
    slices = grid.stored_shape[2]
    if len(rows) and (rows[:, 0].max() >= slices or rows[:, 1].max() >= MAX_CLASSES):
        raise VolumeError(f"{path}: names slice {rows[:, 0].max():.0f} and label {rows[:, 1].max():.0f}: out of range")
    highest = int(rows[:, 1].max()) if len(rows) else 0
    present = np.zeros((grid.axes[2].count, highest + 1), dtype=np.uint8)
    present[:, 0] = 1
    middle = [(n - 1) / 2 for n in grid.stored_shape[:2]]
    places = grid.pixels_of(np.array([[*middle, row[0]] for row in rows]).reshape(-1, 3))
    for place, (_, value) in zip(np.round(places[:, 0]).astype(int), rows, strict=True):
        if 0 <= place < len(present):
            present[place, int(value)] = 1
    return present


def _classes_of(path: Path, numbers: np.ndarray, values: LabelValues) -> np.ndarray:
    """Classes (n,) of the numbers (n,) in a table. Raises: VolumeError for a number without a class."""
    try:
        return values.apply(numbers.astype(np.int64))
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from None


def read_gaze(path: Path, grid: SliceGrid) -> np.ndarray:
    """Fixations on the slices of a case.

    Args:
        path: table with the columns CURRENT_FIX_X and CURRENT_FIX_Y, which are shares of the image, SLICE (from 0) and
            CURRENT_FIX_DURATION (milliseconds). X and Y go along the first and second stored axis of a volume; of a
            picture from left to right and from top to bottom, and SLICE is left out.
        grid: of the case's slices.

    Returns: (m, 4) float32: slice, row, column, milliseconds.
    Raises: UsageError if the file is no table; VolumeError for a table that cannot be used.
    """
    if not is_table(path):
        raise UsageError(f"{path}: is no table, but label_kind is 'gaze'; give a table of fixations, .csv")
    pictures = grid.fmt.pictures
    columns = (Y, X, SLICE, DURATION) if pictures else (X, Y, SLICE, DURATION)
    rows = _read_table(path, columns, default={SLICE: 0.0} if pictures else {})
    if len(rows) and (rows[:, 3].min() < 0 or abs(rows[:, :2]).max() > 1e6):
        raise VolumeError(f"{path}: fixations with negative durations or places far outside the image")
    shape = grid.stored_shape
    voxels = np.stack([rows[:, 0] * shape[0] - 0.5, rows[:, 1] * shape[1] - 0.5, rows[:, 2]], axis=1)
    places = grid.pixels_of(voxels)
    places[:, 0] = np.round(places[:, 0])
    last = np.array([grid.axes[2].count, grid.axes[0].count, grid.axes[1].count]) - 0.5
    on_image = (rows[:, :2] >= 0).all(axis=1) & (rows[:, :2] <= 1).all(axis=1)
    usable = on_image & (places >= -0.5).all(axis=1) & (places <= last).all(axis=1) & (rows[:, 3] >= SHORTEST_FIXATION)
    return np.concatenate([places, rows[:, 3:]], axis=1)[usable].astype(np.float32)


def _read_table(path: Path, columns: tuple[str, ...], *, default: dict[str, float]) -> np.ndarray:
    """(rows, columns) float64 of a comma-separated file with a heading; columns with a default may be missing."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in columns if name not in (*(reader.fieldnames or ()), *default)]
            if missing:
                raise VolumeError(f"{path}: lacks the column {missing[0]}; it must have {', '.join(columns)}")
            rows = np.array([[float(row.get(name, default.get(name))) for name in columns] for row in reader])
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise VolumeError(f"{path}: not readable as a table of numbers ({error}); use comma-separated values") from None
    if not np.isfinite(rows).all():
        raise VolumeError(f"{path}: holds NaN or infinite numbers; all must be finite")
    return rows.reshape(-1, len(columns))
