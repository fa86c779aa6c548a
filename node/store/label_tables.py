"""Labels in tables: fixations of the eyes, and which structures a slice shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...common.tables import read_table
from ...errors import UsageError, VolumeError
from ...imaging.case_files import is_label_table
from ...imaging.formats.label_values import LARGEST, LabelValues
from ...imaging.slice_choices import UNLABELLED
from ...imaging.slice_grid import SliceGrid

MAX_CLASSES = UNLABELLED  # labels are stored in one byte, and 255 means that nobody annotated
SHORTEST_FIXATION = 50.0  # milliseconds; shorter rows of the table are no fixations
ROUGHLY = (0.01, 0.1, 0.5)  # shares of the rows of a table
LABEL = "LABEL"
X, Y, SLICE, DURATION = "CURRENT_FIX_X", "CURRENT_FIX_Y", "SLICE", "CURRENT_FIX_DURATION"


def read_presence(path: Path, grid: SliceGrid, values: LabelValues | None = None) -> np.ndarray:
    """Which slices show which structures, of a table with a row for each structure that is seen.

    Args:
        path: table with the columns SLICE (from 0, along the stored third axis) and LABEL; of a picture LABEL alone.
        grid: of the case's slices.
        values: class of each number in LABEL; None takes them for class numbers.

    Returns: (slices, 1 + highest label) uint8, 1 where a slice shows the class; class 0 is always there.
    Raises: VolumeError for a table that cannot be used.
    """
    rows, lines = _read_table(path, (SLICE, LABEL), default={SLICE: 0.0} if grid.fmt.pictures else {})
    _require_whole_numbers(path, SLICE, rows[:, 0], lines, most=grid.stored_shape[2] - 1)
    if values is not None:
        _require_whole_numbers(path, LABEL, rows[:, 1], lines, most=LARGEST)
        rows[:, 1] = _classes_of(path, rows[:, 1], values)
    _require_whole_numbers(path, LABEL, rows[:, 1], lines, most=MAX_CLASSES - 1)
    highest = int(rows[:, 1].max()) if len(rows) else 0
    present = np.zeros((grid.axes[2].count, highest + 1), dtype=np.uint8)
    present[:, 0] = 1
    middle = [(n - 1) / 2 for n in grid.stored_shape[:2]]
    places = grid.pixels_of(np.array([[*middle, row[0]] for row in rows]).reshape(-1, 3))
    for place, (_, value) in zip(np.round(places[:, 0]).astype(int), rows, strict=True):
        if 0 <= place < len(present):
            present[place, int(value)] = 1
    return present


def _require_whole_numbers(path: Path, name: str, numbers: np.ndarray, lines: Sequence[int], *, most: int) -> None:
    """Raises: VolumeError naming the first line whose number in a column (n,) is not whole, or not from 0 to `most`."""
    if len(wrong := np.flatnonzero((numbers != np.round(numbers)) | (numbers < 0) | (numbers > most))):
        where = f"{path}, line {lines[wrong[0]]}"
        raise VolumeError(f"{where}: {name} is {numbers[wrong[0]]:g}; it must be a whole number from 0 to {most}")


def _classes_of(path: Path, numbers: np.ndarray, values: LabelValues) -> np.ndarray:
    """Classes (n,) of the numbers (n,) in a table. Raises: VolumeError for a number without a class."""
    try:
        return values.apply(numbers.astype(np.int64))
    except VolumeError as error:
        raise VolumeError(f"{path}: {error}") from None


def read_gaze(path: Path, grid: SliceGrid) -> tuple[np.ndarray, tuple[str, ...]]:
    """Fixations on the slices of a case.

    Args:
        path: table with the columns CURRENT_FIX_X and CURRENT_FIX_Y, which are shares of the image, SLICE (from 0) and
            CURRENT_FIX_DURATION (milliseconds). X and Y go along the first and second stored axis of a volume; of a
            picture from left to right and from top to bottom, and SLICE is left out.
        grid: of the case's slices.

    Returns: (m, 4) float32: slice, row, column, milliseconds; and what was left out, one remark for each reason.
    Raises: UsageError if the file is no table; VolumeError for a table that cannot be used, or of which every row lies
        far outside the image or in no slice of it.
    """
    if not is_label_table(path):
        raise UsageError(f"{path}: is no table, but label_kind is 'gaze'; give a table of fixations, .csv")
    pictures = grid.fmt.pictures
    columns = (Y, X, SLICE, DURATION) if pictures else (X, Y, SLICE, DURATION)
    rows, lines = _read_table(path, columns, default={SLICE: 0.0} if pictures else {})
    if len(wrong := np.flatnonzero((rows[:, 3] < 0) | (abs(rows[:, :2]) > 1e6).any(axis=1))):
        where = f"{path}, line {lines[wrong[0]]}"
        raise VolumeError(f"{where}: a fixation with a negative duration, or a place far outside the image")
    if len(wrong := np.flatnonzero(rows[:, 2] != np.round(rows[:, 2]))):
        raise VolumeError(
            f"{path}, line {lines[wrong[0]]}: {SLICE} is {rows[wrong[0], 2]:g}; it must be a whole number, from 0"
        )
    shape = grid.stored_shape
    voxels = np.stack([rows[:, 0] * shape[0] - 0.5, rows[:, 1] * shape[1] - 0.5, rows[:, 2]], axis=1)
    places = grid.pixels_of(voxels)
    places[:, 0] = np.round(places[:, 0])
    last = np.array([grid.axes[2].count, grid.axes[0].count, grid.axes[1].count]) - 0.5
    on_image = (rows[:, :2] >= 0).all(axis=1) & (rows[:, :2] <= 1).all(axis=1)
    on_image &= (rows[:, 2] >= 0) & (rows[:, 2] <= shape[2] - 1)
    low, high = (rows[:, :2].min(), rows[:, :2].max()) if len(rows) else (0.0, 0.0)
    other_unit = low < -1 or high > 2 or not ((rows[:, 2] >= 0) & (rows[:, 2] <= shape[2] - 1)).any()
    if len(rows) and not on_image.any() and other_unit:  # a reader may look beside the image, but not so far
        raise VolumeError(
            f"{path}: none of its {len(rows)} rows lies on the image: {X} and {Y} go from {low:g} to {high:g} and must "
            f"be shares of the image, from 0 to 1; {SLICE} goes from {rows[:, 2].min():g} to {rows[:, 2].max():g} and "
            f"must be from 0 to {shape[2] - 1}"
        )
    on_slices = (places >= -0.5).all(axis=1) & (places <= last).all(axis=1)
    lasting = rows[:, 3] >= SHORTEST_FIXATION
    left_out = {
        "outside the image": ~on_image,
        "outside the slices, which show a part of the image": on_image & ~on_slices,
        f"shorter than {SHORTEST_FIXATION:g} ms": on_image & on_slices & ~lasting,
    }
    remarks = tuple(
        f"{_share_in_words(rows)} of its fixations left out: {text}" for text, rows in left_out.items() if rows.any()
    )
    usable = on_image & on_slices & lasting
    return np.concatenate([places, rows[:, 3:]], axis=1)[usable].astype(np.float32), remarks


def _share_in_words(chosen: np.ndarray) -> str:
    """How many rows (n,) are chosen, roughly, so that many cases have one remark together."""
    share = float(chosen.mean())
    return next((f"up to {most:.0%}" for most in ROUGHLY if share <= most), "all" if share == 1 else "most")


def _read_table(path: Path, columns: tuple[str, ...], *, default: dict[str, float]) -> tuple[np.ndarray, list[int]]:
    """(rows, columns) float64 of a table with a heading, and the line of each row; a column with a default may lack."""
    values: list[list[float]] = []
    lines: list[int] = []
    try:
        table = read_table(path, known=columns)
        missing = [name for name in columns if not table.has([name]) and name not in default]
        if missing:
            raise VolumeError(
                f"{path}: lacks the column {missing[0]}; it must have {', '.join(columns)}, and {table.described}"
            )
        given = [name for name in columns if table.has([name])]
        for row in table.rows():
            values.append([row.number(name) if name in given else default[name] for name in columns])
            lines.append(row.line)
    except UsageError as error:  # as every file of one case among many
        raise VolumeError(str(error)) from None
    return np.array(values, dtype=np.float64).reshape(-1, len(columns)), lines
