"""Which reference a prediction is scored against, and how both come onto one grid."""

from __future__ import annotations

from pathlib import Path

import cv2
import nibabel as nib
import numpy as np
import pytest
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.label_files import find_labels
from fedfactory.adaptation.evaluation.summary import mean_dice
from fedfactory.cli import app
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.volume_files import write_volume
from fedfactory.imaging.volumes import Volume
from typer.testing import CliRunner

SHAPE = (12, 10, 6)


def blocks(shift: int = 0) -> np.ndarray:
    """Two structures without any symmetry."""
    labels = np.zeros(SHAPE, np.uint8)
    labels[2 + shift : 6 + shift, 1:8, 1:3] = 1
    labels[3 + shift : 9 + shift, 2:5, 3:5] = 2
    return labels


def tilted() -> np.ndarray:
    a = np.deg2rad(20)
    affine = np.array([[np.cos(a), -np.sin(a), 0, -40], [np.sin(a), np.cos(a), 0, 30], [0, 0, 1, 7], [0, 0, 0, 1.0]])
    return affine @ np.diag([1.5, 1.0, 4.0, 1.0])


def stored(volume: Volume, turn) -> Volume:
    """The same voxels, stored in another axis order."""
    turn = np.array(turn)
    affine = volume.affine @ nib.orientations.inv_ornt_aff(turn, volume.data.shape)
    return Volume(nib.orientations.apply_orientation(volume.data, turn), affine)


def command(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["evaluate", *map(str, words)])
    return result.exit_code, result.output


@pytest.mark.parametrize(
    "turn",
    [
        [[0, -1], [1, 1], [2, 1]],  # left and right
        [[0, 1], [1, -1], [2, -1]],
        [[2, 1], [0, -1], [1, 1]],
        [[1, -1], [2, 1], [0, -1]],
    ],
)
@pytest.mark.parametrize("which", ["pred", "ref"])
def test_one_grid_in_another_axis_order_is_scored_as_in_its_own(turn, which, tmp_path):
    ours, theirs = Volume(blocks(1), tilted()), Volume(blocks(), tilted())
    write_volume(tmp_path / "plain" / "pred" / "c.nii.gz", ours)
    write_volume(tmp_path / "plain" / "ref" / "c.nii.gz", theirs)
    turned = {"pred": ours, "ref": theirs} | {which: stored({"pred": ours, "ref": theirs}[which], turn)}
    for name, volume in turned.items():
        write_volume(tmp_path / "turned" / name / "c.nii.gz", volume)
    expected = evaluate(tmp_path / "plain" / "pred", tmp_path / "plain" / "ref").scores
    found = evaluate(tmp_path / "turned" / "pred", tmp_path / "turned" / "ref", tmp_path / "m.csv", check=True)
    assert found.check.beyond == []
    for one, other in zip(found.scores, expected, strict=True):
        for measure in ("dice", "iou", "hd95", "assd", "volume_error"):
            assert getattr(one, measure) == pytest.approx(getattr(other, measure), rel=1e-5), measure
        assert one.dice < 1


def test_a_grid_that_is_only_mirrored_is_another_grid(tmp_path):
    """The voxels are the same, and the header puts them elsewhere."""
    write_volume(tmp_path / "ref" / "c.nii.gz", Volume(blocks(), np.diag([2.0, 2, 4, 1])))
    write_volume(tmp_path / "pred" / "c.nii.gz", Volume(blocks(), np.diag([-2.0, 2, 4, 1])))
    with pytest.raises(VolumeError, match=r"pred/c\.nii\.gz: .*ref/c\.nii\.gz, so it lies on another grid: .* apart"):
        evaluate(tmp_path / "pred", tmp_path / "ref")


@pytest.mark.parametrize(("by", "accepted"), [(0.0, True), (0.011, True), (0.09, True), (0.11, False), (2.0, False)])
def test_one_rule_says_which_grids_are_equal(by, accepted, tmp_path):
    moved = tilted()
    moved[0, 3] += by  # the shortest side is 1 mm
    write_volume(tmp_path / "ref" / "c.nii.gz", Volume(blocks(), tilted()))
    write_volume(tmp_path / "pred" / "c.nii.gz", Volume(blocks(), moved))
    if accepted:
        assert mean_dice(evaluate(tmp_path / "pred", tmp_path / "ref").scores) == 1
    else:
        with pytest.raises(VolumeError, match=r"mm apart, 0\.1 mm are allowed"):
            evaluate(tmp_path / "pred", tmp_path / "ref")


def test_a_reference_that_was_drawn_by_the_qform_is_scored(tmp_path):
    """The prediction has the image's header, as `segment` writes it; an ITK program drew the reference."""
    place = tilted()
    sheared = place.copy()
    sheared[:3, 1] += 0.2 * place[:3, 0]
    image = nib.Nifti1Image(blocks(), None)
    image.header.set_qform(place, 1)
    image.header.set_sform(sheared, 1)
    (tmp_path / "pred").mkdir()
    nib.save(image, tmp_path / "pred" / "c.nii.gz")
    write_volume(tmp_path / "ref" / "c.nii.gz", Volume(blocks(), place))
    assert mean_dice(evaluate(tmp_path / "pred", tmp_path / "ref").scores) == 1


def test_missing_predictions_are_counted_and_said(tmp_path):
    for number in range(4):
        write_volume(tmp_path / "ref" / f"case{number}.nii.gz", Volume(blocks(), tilted()))
    for number in (0, 2):
        write_volume(tmp_path / "pred" / f"case{number}.nii.gz", Volume(blocks(), tilted()))
    code, output = command(tmp_path / "pred", tmp_path / "ref", "--out", tmp_path / "m.csv")
    assert code == 0, output
    assert "warning: 2 of 4 references have no prediction: case1, case3" in output
    assert "2 cases of 2 patients" in output
    assert "2 of 4 references have no prediction: case1, case3" in (tmp_path / "m.html").read_text()
    write_volume(tmp_path / "pred" / "stranger.nii.gz", Volume(blocks(), tilted()))
    with pytest.raises(UsageError, match=r"ref: has no label map for stranger \(1 in all\)"):
        evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "n.csv")
    assert not (tmp_path / "n.csv").exists()


def test_many_missing_predictions_are_not_all_listed(tmp_path):
    for number in range(15):
        write_volume(tmp_path / "ref" / f"case{number:02d}.nii.gz", Volume(blocks(), tilted()))
    write_volume(tmp_path / "pred" / "case00.nii.gz", Volume(blocks(), tilted()))
    (warning,) = evaluate(tmp_path / "pred", tmp_path / "ref").warnings
    assert warning.startswith("14 of 15 references have no prediction: case01, ")
    assert warning.endswith("case10 and 4 more")


# pictures


def box(value: int = 1, at: int = 5) -> np.ndarray:
    labels = np.zeros((24, 30), np.uint8)
    labels[at : at + 10, 6:16] = value
    return labels


def write(path: Path, pixels: np.ndarray, *options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels, list(options))


def test_masks_are_matched_by_the_names_that_data_sets_give(tmp_path):
    """As DRIVE names them; `_training` and `_manual1` are no parts of the case."""
    for number in (21, 22):
        write(tmp_path / "pred" / f"{number}_training.png", box())
        write(tmp_path / "1st_manual" / f"{number}_manual1.tif", box(255))
    found = evaluate(tmp_path / "pred", tmp_path / "1st_manual", tmp_path / "m.csv")
    assert mean_dice(found.scores) == 1 and found.warnings == []
    assert {score.case for score in found.scores} == {"21_training", "22_training"}
    assert "<img" in (tmp_path / "m.html").read_text()


def test_masks_of_a_second_observer_are_no_references(tmp_path):
    write(tmp_path / "pred" / "Image_01L.png", box())
    write(tmp_path / "ref" / "Image_01L_1stHO.png", box(255))
    write(tmp_path / "ref" / "Image_01L_2ndHO.png", box(255, at=9))
    found = evaluate(tmp_path / "pred", tmp_path / "ref")
    assert mean_dice(found.scores) == 1 and found.warnings == []


def test_references_may_be_jpeg_files_where_there_are_no_others(tmp_path):
    write(tmp_path / "pred" / "a.png", box())
    write(tmp_path / "masks" / "a.jpg", box(255), cv2.IMWRITE_JPEG_QUALITY, 90)
    found = evaluate(tmp_path / "pred", tmp_path / "masks", tmp_path / "m.csv")
    assert mean_dice(found.scores) == 1
    assert found.warnings == ["1 references are JPEG files, so their values were split at 128: a"]
    assert find_labels(tmp_path / "masks" / "a.jpg") == {"a": tmp_path / "masks" / "a.jpg"}
    write(tmp_path / "masks" / "a_segmentation.png", box(255, at=7))  # now the JPEG is what was photographed
    assert find_labels(tmp_path / "masks") == {"a": tmp_path / "masks" / "a_segmentation.png"}
    write(tmp_path / "numbers" / "a.jpg", box(2), cv2.IMWRITE_JPEG_QUALITY, 100)
    with pytest.raises(VolumeError, match=r"a\.jpg: is a JPEG with values such as"):
        evaluate(tmp_path / "pred", tmp_path / "numbers")


def test_references_of_colours_are_read_by_a_table(tmp_path):
    colours = np.zeros((24, 30, 3), np.uint8)
    colours[box(1) > 0] = 0, 0, 255  # red, as OpenCV orders it
    write(tmp_path / "masks" / "a.png", colours)
    write(tmp_path / "pred" / "a.png", box(2))
    (tmp_path / "t.csv").write_text("\ufeffr;g;b;class;name\r\n0;0;0;0;\r\n255;0;0;2;tool\r\n", encoding="utf-8")
    with pytest.raises(VolumeError, match="give their classes by --mask-colours"):
        evaluate(tmp_path / "pred", tmp_path / "masks")
    words = [tmp_path / "pred", tmp_path / "masks", "--out", tmp_path / "m.csv", "--mask-colours", tmp_path / "t.csv"]
    code, output = command(*words)
    assert code == 0, output
    assert "tool: Dice 1.000" in output
    assert "<img" in (tmp_path / "m.html").read_text()
