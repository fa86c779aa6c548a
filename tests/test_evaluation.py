"""Scores of label maps, their summary, and warnings about references that mislead."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.scores import MEASURES, Score, score_case, with_absent_classes
from fedfactory.adaptation.evaluation.summary import class_means, mean_dice, mean_over_classes, summarise
from fedfactory.cli import app
from fedfactory.errors import StoreError, UsageError, VolumeError
from fedfactory.imaging.accounting.case_sizes import CaseSize, cut_labels, in_plane_axes, outliers, size_warnings
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.reference_runs import from_runs, to_runs
from grand_challenge_metrics import stats
from helpers import ball_volume, oriented, write_site
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist
from typer.testing import CliRunner


def test_scores_of_shifted_boxes_are_those_worked_out_by_hand(tmp_path):
    reference, predicted = np.zeros((20, 20, 20), np.uint8), np.zeros((20, 20, 20), np.uint8)
    reference[5:15, 5:15, 5:15] = 1
    predicted[7:17, 5:15, 5:15] = 1
    affine = np.diag([2.0, 1.0, 1.0, 1.0])
    (score,) = score_case("c", Volume(predicted, affine), Volume(reference, affine))
    assert score.dice == pytest.approx(0.8)
    assert score.iou == pytest.approx(2 / 3)
    assert score.hd95 == pytest.approx(4.0)  # two voxels of 2 mm
    assert score.volume_error == 0
    assert 0 < score.assd < 4


def cube(present: bool) -> Volume:
    data = np.zeros((6, 6, 6), np.uint8)
    data[2:4, 2:4, 2:4] = present
    return Volume(data, np.eye(4))


@pytest.mark.parametrize(
    ("predicted", "reference", "absent_in", "dice", "hd95", "volume_error"),
    [
        (True, True, "", 1.0, 0.0, 0.0),
        (False, True, "prediction", 0.0, math.nan, -1.0),
        (True, False, "reference", 0.0, math.nan, math.nan),
        (False, False, "both", math.nan, math.nan, math.nan),
    ],
)
def test_an_absent_class_has_one_rule(predicted, reference, absent_in, dice, hd95, volume_error):
    (score,) = score_case("c", cube(predicted), cube(reference), classes=[1])
    assert score.absent_in == absent_in
    found = (score.dice, score.iou, score.hd95, score.assd, score.volume_error)
    np.testing.assert_array_equal(found, (dice, dice, hd95, hd95, volume_error))  # Dice and IoU agree at 0, 1 and NaN


def test_evaluation_writes_one_row_per_case_and_class(site, tmp_path):
    for number in range(3):
        mask = read_volume(site / f"case{number}" / "label" / "mask.nii.gz", integer=True)
        write_volume(tmp_path / "pred" / f"case{number}.nii.gz", mask)
    found = evaluate(tmp_path / "pred", site, tmp_path / "m.csv")
    assert mean_dice(found.scores) == 1.0 and found.warnings == []
    assert len((tmp_path / "m.csv").read_text().splitlines()) == 1 + 3 * 2
    write_volume(tmp_path / "pred" / "stranger.nii.gz", mask)
    with pytest.raises(UsageError, match="stranger"):
        evaluate(tmp_path / "pred", site)
    shifted = Volume(mask.data, mask.affine + np.eye(4))
    write_volume(tmp_path / "other" / "case0.nii.gz", shifted)
    with pytest.raises(VolumeError, match="another grid"):
        evaluate(tmp_path / "other", site)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), spacing=st.tuples(*[st.floats(0.5, 4.0)] * 3))
@example(seed=1507, spacing=(3.0, 3.0, 0.5))  # neighbouring distances far apart
def test_scores_equal_those_of_an_independent_library(seed, spacing):
    rng = np.random.default_rng(seed)
    masks = [gaussian_filter(rng.normal(size=(12, 13, 9)), 2.0) > 0.05 for _ in range(2)]
    if not all(mask.any() for mask in masks):
        return
    affine = np.diag([*spacing, 1.0])
    (score,) = score_case("c", *(Volume(mask.astype(np.uint8), affine) for mask in masks))
    ours, theirs = masks
    matrix = stats.calculate_confusion_matrix(theirs.astype(int), ours.astype(int), [0, 1])
    assert score.dice == pytest.approx(stats.dice_from_confusion_matrix(matrix)[1], abs=1e-6)
    assert score.iou == pytest.approx(stats.jaccard_from_confusion_matrix(matrix)[1], abs=1e-6)
    # Both in millimetres. The libraries interpolate differently between the two distances beside a percentile, which
    # can lie far apart: ours must lie between the other's percentiles two surface voxels below and above.
    surface = min(int((mask & ~binary_erosion(mask)).sum()) for mask in masks)
    low, high = (
        stats.percentile_hausdorff_distance(theirs, ours, share, spacing)
        for share in (max(0.0, 0.95 - 2 / surface), min(1.0, 0.95 + 2 / surface))
    )
    assert low - 1e-4 <= score.hd95 <= high + 1e-4
    assert score.volume_error == pytest.approx(ours.sum() / theirs.sum() - 1)
    surfaces = [np.argwhere(mask & ~binary_erosion(mask)) * spacing for mask in masks]  # all pairs, in float64
    apart = cdist(*surfaces)
    there, back = apart.min(axis=1), apart.min(axis=0)
    assert score.assd == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
    assert score.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)


def test_a_summary_has_means_with_intervals_and_counts_what_is_undefined(tmp_path):
    empty, box = np.zeros((8, 8, 8), np.uint8), np.zeros((8, 8, 8), np.uint8)
    box[2:6, 2:6, 2:6] = 1
    part = box.copy()
    part[2:4] = 0
    scores = []
    for number, found in enumerate((box, box, part, empty)):
        scores += score_case(str(number), Volume(found, np.eye(4)), Volume(box, np.eye(4)))
    rows = {(row.measure, row.label): row for row in summarise(scores)}
    dice = rows["dice", 1]
    assert dice.mean == pytest.approx((1 + 1 + 2 / 3 + 0) / 4)
    assert 0 <= dice.low < dice.mean < dice.high <= 1
    assert (dice.cases, dice.undefined) == (4, 0)
    assert (rows["hd95", 1].cases, rows["hd95", 1].undefined) == (3, 1)
    assert rows["dice", 0] == rows["dice", 0].__class__(**{**vars(dice), "label": 0})
    assert {row.measure for row in rows.values()} == set(MEASURES)


def test_an_evaluation_leaves_a_table_and_a_page_with_the_worst_cases(site, tmp_path):
    for number in range(3):
        mask = read_volume(site / f"case{number}" / "label" / "mask.nii.gz", integer=True)
        shifted = Volume(np.roll(mask.data, number, axis=0), mask.affine)
        write_volume(tmp_path / "pred" / f"case{number}.nii.gz", shifted)
    write_volume(tmp_path / "pred" / "case0_probabilities.nii.gz", ball_volume()[0])
    evaluate(tmp_path / "pred", site, tmp_path / "m.csv")
    with (tmp_path / "m.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == {"case0", "case1", "case2"}
    page = (tmp_path / "m.html").read_text()
    assert page.index("case2, mean Dice") < page.index("case1, mean Dice") < page.index("case0, mean Dice 1.000")
    assert "HD95 (mm)" in page
    assert page.count("<img") == 3


def score(case: str, label: int, value: float, *, patient: str | None = None) -> Score:
    nan = math.nan
    return Score(
        case=case,
        patient=patient or case,
        label=label,
        absent_in="",
        dice=value,
        iou=nan,
        hd95=nan,
        assd=nan,
        volume_error=nan,
    )


def test_means_are_over_cases_first_and_then_over_classes():
    scores = [score("a", 1, 1.0), score("b", 1, 0.0), score("a", 2, 0.8)]
    complete = with_absent_classes(scores, {"a": "a", "b": "b", "c": "c"})
    assert len(complete) == 6  # the mean over cases first gives (.9 + 0) / 2 = .45, over all pairs .6
    assert class_means(complete, "dice") == {1: 0.5, 2: 0.8}
    assert mean_dice(complete) == mean_over_classes(complete, "dice") == pytest.approx(0.65)
    rows = {row.label: row for row in summarise(complete) if row.measure == "dice"}
    assert [(rows[label].cases, rows[label].undefined) for label in (0, 1, 2)] == [(2, 1), (2, 1), (1, 2)]
    assert rows[0].mean == pytest.approx(0.65)
    assert math.isnan(rows[2].low)  # a single patient has no interval
    assert all(math.isnan(row.mean) and row.cases == 0 for row in summarise(complete) if row.measure == "hd95")
    with pytest.raises(UsageError, match="0 scores"):
        mean_dice([])


def test_intervals_are_drawn_over_patients_and_not_over_cases():
    values = np.random.default_rng(0).beta(5, 2, 60)
    single = [score(f"p{n}", 1, value) for n, value in enumerate(values)]
    pairs = [score(f"p{n}_{phase}", 1, v, patient=f"p{n}") for n, v in enumerate(values) for phase in ("ED", "ES")]
    alone = [replace(row, patient=row.case) for row in pairs]
    of_single, of_pairs, of_alone = (summarise(scores)[0] for scores in (single, pairs, alone))
    assert (of_pairs.cases, of_pairs.patients, of_alone.patients) == (120, 60, 120)
    # A patient's second, equal case adds nothing that was not known.
    assert (of_pairs.low, of_pairs.high) == pytest.approx((of_single.low, of_single.high))
    assert of_alone.high - of_alone.low < 0.8 * (of_pairs.high - of_pairs.low)
    half = 1.96 * values.std() / np.sqrt(len(values))  # central limit theorem
    assert (of_single.low, of_single.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=half / 6)
    assert summarise(single)[0] == of_single and summarise(single, seed=1)[0] != of_single


@settings(max_examples=20, deadline=None)
@given(arrays(np.uint8, st.tuples(*[st.integers(1, 5)] * 3), elements=st.sampled_from([0, 1, 2, 254, 255])))
def test_runs_give_back_the_label_map(labels):
    np.testing.assert_array_equal(from_runs(to_runs(labels), labels.shape), labels)


def test_runs_that_do_not_fit_are_refused():
    for runs in ([[0, 9, 1]], [[0, 3, 1], [2, 2, 1]]):
        with pytest.raises(StoreError, match="must follow each other"):
            from_runs(np.array(runs, np.uint32), (2, 2, 2))


@pytest.mark.parametrize("codes", ["RAS", "LPI", "SAR"])
def test_a_store_keeps_references_of_test_cases_on_their_own_grids(codes, tmp_path):
    for number in range(3):
        image, label = (oriented(volume, codes) for volume in ball_volume(seed=number))
        write_volume(tmp_path / "s" / f"case{number}" / "image" / "i.nii.gz", image)
        write_volume(tmp_path / "s" / f"case{number}" / "label" / "l.nii.gz", label)
    config = PrepareConfig(domain="x", size=16, z_bins=4, validation_share=0, test_share=0.34)
    store = prepare(tmp_path / "s", tmp_path / "store", config).store
    (case,) = [case for case in store.cases if case.split == "test"]
    found, expected = store.reference(case), read_volume(tmp_path / "s" / case.name / "label" / "l.nii.gz")
    np.testing.assert_array_equal(found.data, expected.data)
    np.testing.assert_allclose(found.affine, expected.affine)
    store.verify()
    with pytest.raises(StoreError, match="no reference"):
        store.reference(next(case for case in store.cases if case.split == "train"))


# warnings


def sizes(count=6, **changes) -> list[CaseSize]:
    ordinary = {"shape": (216, 256, 10), "spacing": (1.5, 1.5, 10.0), "foreground": 400.0}
    return [CaseSize(name=f"p{n}", **ordinary) for n in range(count)] + (
        [CaseSize(name="odd", **{**ordinary, **changes})] if changes else []
    )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"shape": (276, 384, 8), "foreground": 1277.0}, "field of view 576 mm, median 384 mm"),  # a real study's error
        ({"spacing": (0.15, 0.15, 10.0)}, "pixel 0.15 mm, median 1.5 mm"),
        ({"spacing": (1.5, 1.5, 1.0)}, None),  # coarsest axis is another one
        ({"spacing": (1.5, 1.5, 2.0)}, "slice distance 2 mm, median 10 mm"),
        ({"foreground": 4000.0}, "labelled volume 4e+03 ml, median 400 ml"),
        ({"shape": (276, 384, 8), "spacing": (1.0, 1.0, 10.0)}, ""),  # the same field of view in finer pixels
        ({"shape": (512, 428, 8), "spacing": (0.75, 0.75, 10.0)}, ""),
        ({"shape": (154, 224, 16)}, ""),  # a narrower field of view
        ({"foreground": 1000.0}, ""),
    ],
)
def test_a_case_of_an_odd_size_is_named_with_its_numbers_and_no_other(changes, reason):
    found = outliers(sizes(**changes))
    assert set(found) == ({"odd"} if reason != "" else set())
    assert not reason or reason in found["odd"]
    assert len(size_warnings(sizes(**changes))) == (reason != "")


@settings(max_examples=30, deadline=None)
@given(scale=st.floats(0.01, 100), seed=st.integers(0, 10_000), spread=st.floats(0, 0.1), count=st.integers(3, 40))
def test_sizes_that_vary_like_patients_give_no_warning_in_any_unit(scale, seed, spread, count):
    rng = np.random.default_rng(seed)
    cases = [
        CaseSize(
            name=str(n),
            shape=(256, int(rng.integers(200, 257)), int(rng.integers(6, 16))),
            spacing=(scale, scale, 6 * scale),
            foreground=scale**3 * float(np.exp(np.clip(rng.normal(0, spread), -0.5, 0.5))),
        )
        for n in range(count)
    ]
    assert size_warnings(cases) == []


def test_two_cases_are_too_few_to_tell_which_one_is_odd():
    assert outliers(sizes(1, shape=(500, 500, 10))) == {}


def test_labels_that_touch_the_border_are_counted_in_the_slices_plane_only():
    labels = np.zeros((6, 7, 5), np.uint8)
    labels[2:4, 2:4, :] = 1  # reaches the first and the last slice, as organs in stacks do
    assert cut_labels(labels, (1, 1, 8)) == {}
    labels[0, 3, 1:3] = 2
    labels[3, 6, 4] = 1
    assert cut_labels(labels, (1, 1, 8)) == {"1": 1, "2": 2}
    assert cut_labels(np.moveaxis(labels, 2, 0), (8, 1, 1)) == {"1": 1, "2": 2}  # stored with slices first
    assert cut_labels(labels[:, :, :1], (1, 1, 1)) == {}
    assert in_plane_axes((1, 1, 1)) == in_plane_axes((1.0005, 1, 1)) == [0, 1]
    single = np.ones((1, 6, 4), np.uint8)
    single[:, [0, -1]] = 0
    assert cut_labels(single, (1, 1, 8)) == {}  # an axis of one voxel has no border to be cut at


def planted_site(folder) -> None:
    """Five cases, of which case3 has voxels that are too large, and case1 a label that is cut."""
    write_site(folder, cases=5)
    image, label = ball_volume(seed=3)
    scaled = label.affine @ np.diag([1.5, 1.5, 1, 1])
    write_volume(folder / "case3" / "image" / "scan.nii.gz", Volume(image.data, scaled))
    write_volume(folder / "case3" / "label" / "mask.nii.gz", Volume(label.data, scaled))
    label = ball_volume(seed=1)[1]
    label.data[0, 10, 3:5] = 2
    write_volume(folder / "case1" / "label" / "mask.nii.gz", label)


def test_evaluate_and_the_quality_page_name_the_planted_cases_and_no_other(tmp_path):
    planted_site(tmp_path / "site")
    for number in range(5):
        mask = read_volume(tmp_path / "site" / f"case{number}" / "label" / "mask.nii.gz", integer=True)
        write_volume(tmp_path / "pred" / f"case{number}.nii.gz", mask)
    odd, cut = evaluate(tmp_path / "pred", tmp_path / "site", tmp_path / "m.csv").warnings
    assert "case3, 20 x 24 x 8 voxels of 4.5 x 4.5 x 5 mm" in odd and "field of view 108 mm, median 72 mm" in odd
    assert "case1: label 2 in 2 slices" in cut
    assert [re.findall(r"case\d", text) for text in (odd, cut)] == [["case3"], ["case1"]]
    store = prepare(tmp_path / "site", tmp_path / "store", PrepareConfig(domain="x", size=16, z_bins=4)).store
    assert odd in store.warnings and cut in store.warnings
    for page in (tmp_path / "m.html", tmp_path / "store" / "quality.html"):
        assert odd in page.read_text() and cut in page.read_text()


def test_the_command_groups_the_cases_of_a_patient_and_prints_the_warnings(tmp_path):
    planted_site(tmp_path / "site")
    words = ["evaluate", tmp_path / "site", tmp_path / "site", "--out", tmp_path / "m.csv"]

    def output(*extra) -> str:
        result = CliRunner().invoke(app, [str(word) for word in (*words, *extra)])
        assert result.exit_code == 0, result.output
        return result.output

    assert "5 cases of 5 patients, mean foreground Dice 1.000" in output()
    text = output("--patient-pattern", "case[0-2]?")
    assert "5 cases of 4 patients" in text
    assert "warning: 1 case of a size unlike the other cases" in text
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"]: row["patient"] for row in rows} == {
        "case0": "case0", "case1": "case1", "case2": "case2", "case3": "case", "case4": "case",
    }  # fmt: skip
    assert {row["absent_in"] for row in rows} == {""}
    assert "2 of 5 cases have no patient by 'case[0-2]'" in output("--patient-pattern", "case[0-2]")
    with pytest.raises(UsageError, match="--patient-pattern is '\\('"):
        CliRunner().invoke(app, [*map(str, words), "--patient-pattern", "("], catch_exceptions=False)
