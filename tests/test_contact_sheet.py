"""The page that `segment --page` writes: volumes, unusual cases first, slices with contours."""

from __future__ import annotations

import math
import re
from statistics import median

import numpy as np
import pytest
from fedfactory.adaptation.contact_sheet import OUTLIER, SHEET, SheetCase, robust_scores, write_sheet
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.inference import Outputs, segment
from fedfactory.imaging.overlays import COLOURS
from fedfactory.imaging.pictures.contours import thumbnail, volume_thumbnails
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.labelling import train_on_store
from helpers import ball_volume, small_config
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

some = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
volumes = st.lists(st.integers(0, 200).map(float), min_size=3, max_size=20)


@some
@given(volumes)
def test_scores_are_those_of_the_definition(values):
    middle = median(values)
    spread = 1.482602218505602 * median(abs(value - middle) for value in values)
    for value, score in zip(values, robust_scores(values), strict=True):
        if spread:
            assert score == pytest.approx((value - middle) / spread, rel=1e-6, abs=1e-9)
        else:
            assert score == (0 if value == middle else math.copysign(math.inf, value - middle))


@some
@given(volumes, st.floats(0.1, 10), st.floats(-50, 50))
def test_scores_depend_on_neither_unit_nor_origin(values, factor, shift):
    assume(median(abs(value - median(values)) for value in values))
    changed = robust_scores([factor * value + shift for value in values])
    np.testing.assert_allclose(changed, robust_scores(values), rtol=1e-5, atol=1e-5)


def test_one_wrong_case_hides_neither_itself_nor_others():
    """Mean and standard deviation would give the wrong case 2.8 and hide it: it spreads what it is measured by."""
    values = [10.0, 11.0, 12.0, 13.0, 9.0, 10.5, 11.5, 12.5, 1000.0]
    scores = robust_scores(values)
    assert scores[-1] > 100 and np.abs(scores[:-1]).max() < OUTLIER
    assert abs(values[-1] - np.mean(values)) / np.std(values) < OUTLIER
    assert np.isnan(robust_scores([1.0, 50.0])).all()


def cards_of(page: str) -> list[tuple[str, str, dict[str, tuple[str, str]]]]:
    """Of each case, in the page's order: its class, its name, and class to volume and score."""
    found = []
    for kind, name, rest in re.findall(r'<div class="(card[^"]*)"><p>(.*?)</p>(.*?)</table>', page, re.S):
        rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td>(.*?)</td></tr>", rest)
        found.append((kind, name, {label: (volume, score) for label, volume, score in rows}))
    return found


def test_unusual_cases_come_first_and_names_are_escaped(tmp_path):
    picture = np.zeros((4, 4, 3), np.uint8)
    values = {"a": 50.0, "b": 51.0, "<i>c": 120.0, "d": 49.0, "e": 50.5, "f": 2.0}
    cases = [SheetCase(name, picture, {1: value, 2: float(name == "a")}) for name, value in values.items()]
    write_sheet(tmp_path / "sheet.html", cases, {1: "<b>liver"}, unit="mL")
    page = (tmp_path / "sheet.html").read_text()
    assert "<i>" not in page and "<b>liver" not in page
    cards = cards_of(page)
    names = [re.sub("<.*", "", name).strip() for _, name, _ in cards]
    assert names[:3] == ["a", "&lt;i&gt;c", "f"] and set(names[3:]) == {"b", "d", "e"}
    assert [kind for kind, _, _ in cards] == ["card odd"] * 3 + ["card"] * 3
    assert cards[0][2]["class 2"] == ("1.00", "unlike most")  # no other case has the class
    assert cards[1][2]["&lt;b&gt;liver"][0] == "120" and "6 cases, 3 unusual" in page


def test_the_sheet_of_a_segmentation_has_the_volumes_of_its_label_maps(store, tmp_path):
    train_on_store(store, small_config()).save(tmp_path / "m.safetensors")
    for number in range(3):
        write_volume(tmp_path / f"case{number}.nii.gz", ball_volume(seed=number, spacing=(2.0, 3.0, 4.0))[0])
    images = [tmp_path / f"case{number}.nii.gz" for number in range(3)]
    paths = segment(images, [tmp_path / "m.safetensors"], tmp_path / "out", outputs=Outputs(page=True))
    cards = {name.split(" ")[0]: rows for _, name, rows in cards_of((tmp_path / "out" / SHEET).read_text())}
    assert len(cards) == 3
    for path in paths:
        labels = read_volume(path, integer=True).data
        own = cards[path.name.removesuffix(".nii.gz")]
        assert len(own) == 2
        for label, (shown, _) in enumerate(own.values(), start=1):
            assert float(shown) == pytest.approx((labels == label).sum() * 24 / 1000, abs=0.51)
    # The page is no label map.
    assert len({score.case for score in evaluate(tmp_path / "out", tmp_path / "out").scores}) == 3


def test_a_thumbnail_has_the_shape_of_the_body_and_the_contours_of_the_labels():
    """Pixels are four times as high as wide; the square of 20 x 5 pixels is a square of the body."""
    labels = np.zeros((10, 40), int)
    labels[3:8, 10:30] = 2
    made = thumbnail(np.full((10, 40, 1), 0.5), labels, side=200, pixel=(4.0, 1.0))
    assert made.shape == (200, 200, 3)
    drawn = (abs(made.astype(int) - np.round(COLOURS[1] * 255)) <= 1).all(-1)
    rows, columns = np.nonzero(drawn)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (60, 159, 50, 149)
    assert (made[~drawn] == 128).all() and not drawn[70:150, 60:140].any()
    reduced = thumbnail(np.ones((600, 300, 3)), np.zeros((600, 300), int), side=100)
    assert reduced.shape == (100, 50, 3) and (reduced == 255).all()


def test_the_thumbnail_of_a_volume_shows_the_slice_with_most_labels_front_of_the_body_up():
    image, labels = np.zeros((8, 16, 5)), np.zeros((8, 16, 5), np.int16)
    image[2, 12, 3] = 1.0  # in front, on the left
    labels[1:7, 2:14, 3] = 1
    labels[0, 0, 1] = 1
    for axes in ([0, 1, 2], [2, 0, 1]):
        affine = np.eye(4)[:, [*axes, 3]]
        stored = [Volume(np.transpose(array, axes), affine) for array in (image, labels, np.zeros_like(labels))]
        first, second = volume_thumbnails(*stored, plane="axial", side=160)
        assert first.shape == second.shape == (160, 80, 3)
        row, column = (int(np.mean(places)) for places in np.nonzero(second[..., 0] > 200))
        assert (row // 10, column // 10) == (16 - 1 - 12, 2)
        assert (first != second).any()
