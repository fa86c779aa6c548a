"""How alike labelled structures lie: against drawn angles, and where labels tell nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from fedfactory.adaptation.engine.orientation import orientation_spread
from fedfactory.adaptation.labelled_slices import LabelledSlices
from hypothesis import given, settings
from hypothesis import strategies as st

SIZE, SLICES = 64, 2
ROWS, COLUMNS = np.meshgrid(np.arange(SIZE) - 31.5, np.arange(SIZE) - 31.5, indexing="ij")


def two_discs(angle: float) -> np.ndarray:
    """Labels (2, S, S): class 2 lies at this angle from class 1, radians, from the direction of growing columns."""
    labels = np.zeros((SLICES, SIZE, SIZE), np.uint8)
    for label, sign in ((1, -1), (2, 1)):
        row, column = sign * 12 * math.sin(angle), sign * 12 * math.cos(angle)
        labels[:, np.hypot(ROWS - row, COLUMNS - column) < 7] = label
    return labels


def ellipse(angle: float, *, ratio: float = 0.4) -> np.ndarray:
    """Labels (2, S, S) of an ellipse whose long axis has this angle, radians."""
    along = COLUMNS * math.cos(angle) + ROWS * math.sin(angle)
    across = -COLUMNS * math.sin(angle) + ROWS * math.cos(angle)
    inside = np.hypot(along, across / ratio) < 24
    return np.repeat(inside[None].astype(np.uint8), SLICES, axis=0)


def slices(volumes: list[np.ndarray], classes: int) -> LabelledSlices:
    labels = np.concatenate(volumes)
    number = np.repeat(np.arange(len(volumes)), SLICES)
    return LabelledSlices(np.zeros(labels.shape, np.float32), labels, classes, number)


def deviation(angles: np.ndarray) -> float:
    """Circular standard deviation, written out with sines and cosines."""
    length = min(1.0, math.hypot(np.cos(angles).mean(), np.sin(angles).mean()))  # 1 and a rounding error if all agree
    return math.sqrt(-2 * math.log(length))


@settings(deadline=None, max_examples=25)
@given(st.floats(-math.pi, math.pi), st.lists(st.floats(-0.6, 0.6), min_size=3, max_size=8))
def test_the_spread_is_that_of_the_directions_between_two_structures(middle, differences):
    angles = middle + np.array(differences)
    spread, mirrored = orientation_spread([slices([two_discs(angle) for angle in angles], 3)])
    assert spread == pytest.approx(deviation(angles), abs=0.02)
    both = np.concatenate([angles, -angles])
    if math.hypot(np.cos(both).mean(), np.sin(both).mean()) > 0.05:  # otherwise it is large and badly determined
        assert mirrored == pytest.approx(deviation(both), abs=0.1)


@settings(deadline=None, max_examples=25)
@given(st.floats(-math.pi, math.pi), st.lists(st.floats(-0.4, 0.4), min_size=3, max_size=8))
def test_of_one_structure_the_long_axis_counts_and_has_no_front(middle, differences):
    angles = middle + np.array(differences)
    turned = angles + math.pi * (np.arange(len(angles)) % 2)
    spread, _ = orientation_spread([slices([ellipse(angle) for angle in turned], 2)])
    assert spread == pytest.approx(deviation(2 * angles) / 2, abs=0.02)


def test_a_mirror_image_lies_alike_only_if_the_structure_lies_along_an_axis():
    for angle, alike in ((0.0, True), (math.pi / 2, True), (math.pi / 4, False)):
        _, mirrored = orientation_spread([slices([ellipse(angle)] * 3, 2)])
        assert (mirrored < math.radians(5)) == alike
    _, mirrored = orientation_spread([slices([two_discs(math.pi / 2)] * 3, 3)])  # one above the other: upside down
    assert mirrored > math.radians(45)


def test_labels_that_show_no_orientation_tell_none():
    rings = ellipse(0.0, ratio=1.0)
    rings[:, np.hypot(ROWS, COLUMNS) < 10] = 2  # around one centre
    assert orientation_spread([slices([rings] * 5, 3)]) is None
    assert orientation_spread([slices([two_discs(0.0)] * 2, 3)]) is None  # too few volumes
    empty = np.zeros_like(rings)
    assert orientation_spread([slices([empty] * 9 + [two_discs(0.0)] * 2, 3)]) is None


def test_volumes_of_all_parts_count_and_a_missing_structure_does_not_matter():
    alone = two_discs(0.3)
    alone[alone == 2] = 0
    parts = [slices([two_discs(0.3), alone], 3), slices([two_discs(0.3)] * 2, 3)]
    spread, _ = orientation_spread(parts)
    assert spread == pytest.approx(0, abs=0.02)
