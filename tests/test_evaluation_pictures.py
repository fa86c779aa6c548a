"""Label maps in pictures, names of classes, and the check by a second library."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from fedfactory.adaptation.evaluation import evaluate as evaluate_module
from fedfactory.adaptation.evaluation.cross_check import CrossCheck, second_scores
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.label_files import find_labels, read_label_picture
from fedfactory.adaptation.evaluation.scores import score_case
from fedfactory.cli import app
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.class_names import parse_names
from fedfactory.imaging.volume_files import write_volume
from fedfactory.imaging.volumes import Volume
from grand_challenge_metrics import stats
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist
from typer.testing import CliRunner


def write_picture(path: Path, labels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":  # OpenCV writes no grey GIF
        Image.fromarray(labels).save(path)
    else:
        assert cv2.imwrite(str(path), labels)
    return path


def box(*, at: int = 5, value: int = 1, side: int = 10) -> np.ndarray:
    """A square of ten pixels in a picture of 24 rows and 30 columns, `at` rows from the top."""
    labels = np.zeros((24, 30), np.uint8)
    labels[at : at + side, 6 : 6 + side] = value
    return labels


def flat(labels: np.ndarray) -> Volume:
    return Volume(labels[..., None].astype(np.uint16), np.eye(4))


def call(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, result.output


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), axis=st.integers(0, 2))
@example(seed=3, axis=2)
def test_a_single_slice_has_the_distances_of_its_outlines(seed, axis):
    """In three dimensions, all pixels of a single slice would be surface, and distances would come out too small."""
    rng = np.random.default_rng(seed)
    masks = [gaussian_filter(rng.normal(size=(18, 23)), 2.0) > 0.03 for _ in range(2)]
    if not all(mask.any() for mask in masks):
        return
    spacing = np.array([2.0, 0.5])
    affine = np.diag([*np.insert(spacing, axis, 7.0), 1.0])
    volumes = [Volume(np.expand_dims(mask, axis).astype(np.uint16), affine) for mask in masks]
    (in_mm,), (in_pixels,) = score_case("c", *volumes), score_case("c", *volumes, unit="px")
    assert (in_mm.unit, in_pixels.unit) == ("mm", "px")
    for score, sides in ((in_mm, spacing), (in_pixels, np.ones(2))):
        outlines = [np.argwhere(mask & ~binary_erosion(mask)) * sides for mask in masks]  # all pairs, in float64
        apart = cdist(*outlines)
        there, back = apart.min(axis=1), apart.min(axis=0)
        assert score.hd95 == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)), rel=1e-5)
        assert score.assd == pytest.approx(np.concatenate([there, back]).mean(), rel=1e-5)
        fewest = min(map(len, outlines))
        low, high = (
            stats.percentile_hausdorff_distance(*masks, share, sides.tolist())
            for share in (0.95, min(1.0, 0.95 + 1 / max(fewest - 1, 1)))
        )
        assert low - 1e-4 <= score.hd95 <= high + 1e-4
    ours, theirs = masks
    assert in_mm.iou == pytest.approx((ours & theirs).sum() / (ours | theirs).sum())
    assert in_mm.dice == pytest.approx(2 * in_mm.iou / (1 + in_mm.iou), abs=1e-6)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 1), (1, 1, 9), (2, 1, 9)])
def test_a_row_of_pixels_has_distances_too(shape):
    ours, theirs = (np.zeros(shape, np.uint16) for _ in range(2))
    ours.flat[0] = theirs.flat[-1] = 1
    (score,) = score_case("c", Volume(ours, np.eye(4)), Volume(theirs, np.eye(4)), unit="px")
    expected = math.dist((0, 0, 0), [side - 1 for side in shape])
    assert score.hd95 == score.assd == pytest.approx(expected)
    check = CrossCheck("px")
    check.add([score], Volume(ours, np.eye(4)), Volume(theirs, np.eye(4)))
    assert check.beyond == [] and check.compared["hd95"] == 1


# files


@pytest.mark.parametrize("suffix", [".png", ".tif", ".TIFF", ".bmp", ".gif"])
def test_a_label_picture_is_found_and_read(suffix, tmp_path):
    labels = box(value=255)
    path = write_picture(tmp_path / f"polyp{suffix}", labels)
    assert find_labels(tmp_path) == find_labels(path) == {"polyp": path}
    found = read_label_picture(path)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, labels > 0)  # 255 alone means class 1


def test_class_numbers_stay_as_they_are(tmp_path):
    labels = box(value=7).astype(np.uint16)
    labels[0, 0] = 63
    np.testing.assert_array_equal(read_label_picture(write_picture(tmp_path / "a.png", labels)), labels)
    grey = np.repeat(box(value=2)[..., None], 3, axis=2)
    np.testing.assert_array_equal(read_label_picture(write_picture(tmp_path / "c.png", grey)), box(value=2))
    opaque = np.concatenate([grey, np.full_like(grey[..., :1], 255)], axis=2)
    np.testing.assert_array_equal(read_label_picture(write_picture(tmp_path / "d.png", opaque)), box(value=2))


def test_a_picture_that_is_no_label_map_is_refused(tmp_path):
    colours = np.zeros((4, 5, 3), np.uint8)
    colours[0, 0] = 1, 2, 3
    with pytest.raises(VolumeError, match=r"a\.png: .*colour"):
        read_label_picture(write_picture(tmp_path / "a.png", colours))
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(VolumeError, match=r"b\.png: "):
        read_label_picture(tmp_path / "b.png")
    with pytest.raises(VolumeError, match=r"c\.tif: "):
        read_label_picture(write_picture(tmp_path / "c.tif", np.full((4, 5), 0.5, np.float32)))
    with pytest.raises(UsageError, match="no such file"):
        read_label_picture(tmp_path / "d.png")


def test_endings_of_public_data_sets_are_no_part_of_the_case(tmp_path):
    for name in (
        "ISIC_1_segmentation.png",
        "b_mask.tif",
        "b.tif",
        "c.gif",
        "_mask.png",
        ".hidden.png",
        "d.jpeg",
        "e_1stHO.png",
    ):
        write_picture(tmp_path / name, box())
    assert {case: path.name for case, path in find_labels(tmp_path).items()} == {
        "ISIC_1": "ISIC_1_segmentation.png",
        "b": "b_mask.tif",  # b.tif is the picture itself
        "c": "c.gif",
        "_mask": "_mask.png",
        "e": "e_1stHO.png",  # CHASE_DB1
    }
    write_picture(tmp_path / "b_segmentation.png", box())
    with pytest.raises(UsageError, match=r"b_mask\.tif and b_segmentation\.png are label maps of one case"):
        find_labels(tmp_path)


def test_a_picture_beside_a_volume_of_the_same_case_is_no_label_map(tmp_path):
    write_picture(tmp_path / "a.png", box())
    write_volume(tmp_path / "a.nii.gz", flat(box()))
    assert find_labels(tmp_path) == {"a": tmp_path / "a.nii.gz"}


def test_a_folder_of_cases_may_hold_label_pictures(tmp_path):
    path = write_picture(tmp_path / "case1" / "label" / "drawn.png", box())
    assert find_labels(tmp_path) == {"case1": path}
    write_picture(tmp_path / "case1" / "label" / "again.png", box())
    with pytest.raises(UsageError, match="2 label pictures"):
        find_labels(tmp_path)


# evaluation


@pytest.fixture
def pictures(tmp_path) -> tuple[Path, Path]:
    """Predictions and references of three pictures: equal, two rows apart, and with a second class that is missed."""
    predicted, reference = tmp_path / "pred", tmp_path / "ref"
    for name, moved in (("a", 0), ("b", 2), ("c", 0)):
        write_picture(predicted / f"{name}.png", box(at=5 + moved))
        write_picture(reference / f"{name}_mask.png", box() if name == "c" else box(value=255))
    labels = box()
    labels[20:23, 20:23] = 2
    write_picture(reference / "c_mask.png", labels)
    return predicted, reference


def test_pictures_are_scored_in_pixels(pictures, tmp_path):
    found = evaluate(*pictures, tmp_path / "m.csv")
    scores = {(score.case, score.label): score for score in found.scores}
    assert scores["a", 1].dice == scores["a", 1].iou == 1
    moved = scores["b", 1]
    assert (moved.dice, moved.iou, moved.hd95) == pytest.approx((0.8, 2 / 3, 2))
    assert (scores["c", 2].absent_in, scores["c", 2].iou) == ("prediction", 0)
    assert (scores["a", 2].absent_in, scores["a", 2].unit) == ("both", "px") and math.isnan(scores["a", 2].iou)
    assert found.warnings == [] and found.check is None
    with (tmp_path / "m.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 and {row["unit"] for row in rows} == {"px"} and "name" not in rows[0]
    page = (tmp_path / "m.html").read_text()
    assert "HD95 (px)" in page and "area error" in page and "(mm)" not in page and "IoU" in page
    assert page.count("<img") == 3


def test_a_picture_on_the_page_stands_upright_and_keeps_what_is_small(pictures, tmp_path, monkeypatch):
    shown = {}

    def keep(image, *labels):
        shown["labels"] = labels
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr("fedfactory.adaptation.evaluation.page.strip", keep)
    labels = np.zeros((1000, 2000), np.uint8)
    labels[3, 1990] = 1  # a single pixel near the upper right corner
    for folder in ("big", "bigger"):
        write_picture(tmp_path / folder / "x.png", labels)
    evaluate(tmp_path / "big", tmp_path / "bigger", tmp_path / "m.csv")
    (x, y, z), *others = np.argwhere(shown["labels"][0])  # x to the right, y upwards
    assert not others and shown["labels"][0].shape == (500, 250, 1)
    assert (x, y, z) == (497, 249, 0)


def test_pictures_and_volumes_are_not_mixed(pictures, tmp_path):
    predicted, reference = pictures
    write_volume(reference / "a.nii.gz", flat(box()))
    with pytest.raises(
        UsageError, match=r"is a picture and .*a\.nii\.gz a volume; evaluate pictures and volumes apart"
    ):
        evaluate(predicted, reference)


def test_pictures_of_different_sizes_are_refused(pictures):
    predicted, reference = pictures
    write_picture(predicted / "a.png", box()[:, :-1])
    with pytest.raises(VolumeError, match=r"another grid than .*\(24 x 29 x 1, not 24 x 30 x 1\)"):
        evaluate(predicted, reference)


def test_the_command_shows_names_of_classes(pictures, tmp_path):
    names = ["--class-names", "1=polyp, 2=<tool>"]
    code, output = call("evaluate", *pictures, "--out", tmp_path / "m.csv", *names)
    assert code == 0, output
    assert "mean foreground Dice 0.467, IoU 0.444" in output  # ((1 + .8 + 1) / 3 + 0) / 2
    assert "polyp: Dice 0.933, IoU 0.889, HD95 (px) 0.667" in output and "<tool>: Dice 0.000" in output
    with (tmp_path / "m.csv").open() as file:
        assert {(row["label"], row["name"]) for row in csv.DictReader(file)} == {("1", "polyp"), ("2", "<tool>")}
    page = (tmp_path / "m.html").read_text()
    assert "<td>polyp</td>" in page and "<td>&lt;tool&gt;</td>" in page and "class 1" not in page
    code, output = call("evaluate", *pictures, "--out", tmp_path / "m.csv")
    assert "class 1: Dice 0.933" in output


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("polyp", "write LABEL=NAME"),
        ("1=", "write LABEL=NAME"),
        ("1=a,1=b", "must name class 1 once"),
        ("-1=a", "write LABEL=NAME"),
        ("²=a", "write LABEL=NAME"),
    ],
)
def test_names_of_another_form_are_refused(text, reason):
    with pytest.raises(UsageError, match=reason):
        parse_names(text)


def test_names_must_be_unique_and_of_foreground(pictures):
    for names, reason in (({0: "nothing"}, "0 is the background"), ({1: "a", 2: "a"}, "not unique")):
        with pytest.raises(UsageError, match=reason):
            evaluate(*pictures, names=names)


def test_warnings_name_classes_too(tmp_path):
    labels = np.zeros((6, 7, 5), np.uint16)
    labels[0, 2:4] = 1
    for folder in ("pred", "ref"):
        write_volume(tmp_path / folder / "a.nii.gz", Volume(labels, np.diag([1.0, 1.0, 5.0, 1.0])))
    (warning,) = evaluate(tmp_path / "pred", tmp_path / "ref", names={1: "liver"}).warnings
    assert "a: label liver in 5 slices" in warning


# check by a second library


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.sampled_from([(12, 13, 9), (24, 17, 1), (3, 40, 1)]),
    sigma=st.sampled_from([0.5, 2.0]),
    unit=st.sampled_from(["mm", "px"]),
)
def test_scores_of_any_shape_pass_the_check(seed, shape, sigma, unit):
    rng = np.random.default_rng(seed)
    maps = []
    for _ in range(2):
        noise = gaussian_filter(rng.normal(size=shape), sigma)
        maps.append(
            Volume(np.digitize(noise / noise.std(), (0.5, 1.2)).astype(np.uint16), np.diag([0.7, 1.3, 4.0, 1.0]))
        )
    scores = score_case("c", *maps, classes=[1, 2, 3], unit=unit)
    check = CrossCheck(unit)
    check.add(scores, *maps)
    assert check.beyond == []
    assert max(check.largest[measure] for measure in ("dice", "iou", "volume_error")) < 1e-5
    assert check.compared["dice"] == sum(score.absent_in != "both" for score in scores)
    assert check.compared["hd95"] == sum(score.absent_in == "" for score in scores)


def test_the_bounds_of_distances_are_narrow_and_hold_no_other_definition():
    ours, theirs = flat(box(at=7)), flat(box())
    bounds = second_scores(1, ours, theirs, unit="px")
    assert bounds["hd95"] == (2, 2)
    low, high = bounds["assd"]
    assert 0 < high <= 2 * low
    assert bounds["dice"] == pytest.approx((0.8, 0.8))


@pytest.mark.parametrize(
    ("change", "measure"),
    [
        ({"dice": 0.801}, "Dice is 0.801; grand_challenge_metrics gives 0.8"),
        ({"iou": 0.7}, "IoU is 0.7"),
        ({"hd95": 2.01}, r"HD95 \(px\) is 2.01"),
        ({"assd": 2.5}, r"ASSD \(px\) is 2.5; grand_challenge_metrics gives from"),
        ({"volume_error": 0.02}, "area error is 0.02"),
        ({"volume_error": -0.02}, "area error is 0.02"),
        ({"hd95": math.nan}, "is nan"),
    ],
)
def test_a_wrong_score_is_named(change, measure):
    maps = flat(box(at=7)), flat(box())
    (score,) = score_case("polyp", *maps, unit="px")
    check = CrossCheck("px")
    check.add([replace(score, **change)], *maps)
    (text,) = check.beyond
    assert text.startswith("polyp, class 1: ") and re.search(measure, text)
    assert "1 beyond tolerance" in check.summary()


def test_the_command_ends_with_3_if_a_score_is_wrong(pictures, tmp_path, monkeypatch):
    words = ["evaluate", *pictures, "--out", tmp_path / "m.csv", "--check"]
    code, output = call(*words)
    assert code == 0, output
    assert "check: largest difference from grand_challenge_metrics in 4 pairs of case and class: Dice" in output
    assert "0 beyond tolerance" in output and "<h2>Check</h2>" in (tmp_path / "m.html").read_text()
    right = evaluate_module.score_case

    def wrong(case, *maps, **options):
        return [replace(score, iou=score.iou + (case == "b") * 0.01) for score in right(case, *maps, **options)]

    monkeypatch.setattr(evaluate_module, "score_case", wrong)
    code, output = call(*words)
    assert code == 3
    assert "check: b, class 1: IoU is 0.676667; grand_challenge_metrics gives 0.666667" in output
    assert "b, class 1: IoU" in (tmp_path / "m.html").read_text()
