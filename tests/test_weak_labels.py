"""Weak labels made of dense labels: the labels that remain are few and correct."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
from fedfactory.adaptation.labels.boxes import boxes_of, certain_core
from fedfactory.adaptation.labels.candidate_labels import candidates_from_boxes, candidates_from_labels
from fedfactory.adaptation.labels.weak_labels import CONVERTERS, boxes, weaken, weaken_folder
from fedfactory.cli import app
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.cases import CaseFiles, Found, LabelFile
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner


def slice_of(seed: int) -> np.ndarray:
    """A ring (1) around a disc (2), and a block (3) beside them, somewhere."""
    rng = np.random.default_rng(seed)
    row, column = rng.integers(10, 20, 2)
    distance = np.hypot(*(axis - at for axis, at in zip(np.indices((40, 36)), (row, column), strict=True)))
    labels = np.select([distance < 4, distance < 7], [2, 1], 0).astype(np.uint8)
    labels[30:36, 5:15] = 3
    return labels


@pytest.mark.parametrize("kind", ["point", "scribble", "block"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_sparse_labels_are_few_and_correct(kind, seed):
    labels = slice_of(seed)
    weak = CONVERTERS[kind](labels, np.random.default_rng(seed))
    labelled = weak != UNLABELLED
    assert (weak[labelled] == labels[labelled]).all()
    assert 0 < labelled.mean() < 0.2
    if kind != "block":
        assert set(np.unique(weak[labelled])) == {0, 1, 2, 3}


@given(seed=st.integers(0, 10_000), margin=st.integers(0, 4))
@settings(max_examples=20, deadline=None)
def test_candidate_labels_of_boxes_contain_the_true_class(seed, margin):
    labels = slice_of(seed)
    weak = boxes(labels, np.random.default_rng(seed), margin=margin)
    candidates, truth = candidates_from_boxes(weak, 4).astype(int), candidates_from_labels(labels, 4).astype(int)
    excluded = (candidates & truth) == 0
    # The true class is excluded only in the middle of a box, where the structure of the box is assumed.
    drawn = boxes_of(weak, 4)
    cores = np.any([certain_core(value, drawn, labels.shape) for value in drawn], axis=0)
    assert not (excluded & ~cores).any()
    assert excluded.mean() < 0.035  # the most in 10,000 seeds with a margin of 4 is .032
    for value, box in boxes_of(labels, 4).items():
        for side, wide in zip(box, drawn[value], strict=True):  # no box hides a side of another one
            assert wide.start <= side.start and side.stop <= wide.stop
    if margin == 0:
        assert drawn == boxes_of(labels, 4)


def test_a_slice_without_structures_is_background_whatever_the_kind():
    empty = np.zeros((32, 32), np.uint8)
    for kind, make in CONVERTERS.items():
        weak = make(empty, np.random.default_rng(0))
        assert set(np.unique(weak)) <= {0, UNLABELLED} and (weak == 0).any(), kind


def test_a_weakened_copy_can_be_prepared(site, tmp_path):
    assert weaken_folder(site, tmp_path / "weak", "scribble") == 3
    config = PrepareConfig(domain="x", size=16, z_bins=4, label_kind="scribble", unlabelled_value=UNLABELLED)
    store = prepare(tmp_path / "weak", tmp_path / "store", config).store
    dense = prepare(site, tmp_path / "dense", PrepareConfig(domain="x", size=16, z_bins=4)).store
    np.testing.assert_array_equal(store.images, dense.images)
    labelled = store.labels != UNLABELLED
    assert store.label_kind == "scribble" and 0 < labelled.mean() < 0.5
    assert (store.labels[labelled] == dense.labels[labelled]).mean() > 0.9  # positions are resampled
    with pytest.raises(UsageError, match="point, scribble"):
        weaken_folder(site, tmp_path / "other", "gaze")
    with pytest.raises(UsageError, match="no case has a label"):
        weaken_folder(site, tmp_path / "other", "box", label_key="nothing")
    assert not (tmp_path / "other").exists()


def test_labelled_cases_are_weakened_with_all_their_channels(tmp_path, monkeypatch):
    image, label = tmp_path / "image.nii.gz", LabelFile(tmp_path / "label.nii.gz")
    labels = np.stack([slice_of(0)] * 2, axis=2)
    write_volume(image, Volume(labels.astype(np.float32), np.eye(4)))
    write_volume(label.path, Volume(labels, np.eye(4)))
    found = Found([CaseFiles("plain", (image,), (label,)), CaseFiles("bare", (image,))])
    monkeypatch.setattr("fedfactory.adaptation.labels.weak_labels.find_cases", lambda source, **keys: found)
    assert weaken_folder(tmp_path, tmp_path / "weak", "point") == 1
    written = read_volume(tmp_path / "weak" / "plain" / "label" / "point.nii.gz", integer=True).data
    assert (written != UNLABELLED).any() and (written == labels)[written != UNLABELLED].all()
    found.cases.append(CaseFiles("two", (image, image), (label,)))
    assert weaken_folder(tmp_path, tmp_path / "channels", "point") == 2
    assert sorted(path.name for path in (tmp_path / "channels" / "two").iterdir()) == ["image0", "image1", "label"]
    write_volume(label.path, Volume(np.where(labels > 0, 300, 0).astype(np.uint16), np.eye(4)))
    with pytest.raises(VolumeError, match="holds label 300; 254 is the highest"):
        weaken_folder(tmp_path, tmp_path / "other", "point")
    found.problems["bad"] = "bad/image: holds 2 volumes, expected one"
    with pytest.raises(UsageError, match="holds 2 volumes"):
        weaken_folder(tmp_path, tmp_path / "other", "point")
    assert not (tmp_path / "other").exists()


def test_a_volume_is_weakened_slice_by_slice_and_repeats_with_its_seed():
    volume = np.stack([slice_of(n) for n in range(3)], axis=2)
    first, again = weaken(volume, "scribble", seed=1), weaken(volume, "scribble", seed=1)
    assert first.shape == volume.shape and (first == again).all()
    assert (first != weaken(volume, "scribble", seed=2)).any()
    with pytest.raises(UsageError, match="point, scribble, block, box"):
        weaken(volume, "gaze")


@pytest.mark.parametrize("value", [255, 256, 500, 65535])
@pytest.mark.parametrize("kind", CONVERTERS)
def test_values_that_would_become_others_are_refused(kind, value, tmp_path):
    """500 is 244 in one byte, 256 is background, and 255 means that nobody annotated."""
    labels = np.stack([slice_of(0).astype(np.uint16)] * 2, axis=2)
    labels[labels == 1] = value
    with pytest.raises(VolumeError, match=f"holds label {value}; 254 is the highest"):
        weaken(labels, kind)
    for part in ("image", "label"):
        write_volume(tmp_path / "s" / "case1" / part / "v.nii.gz", Volume(labels, np.eye(4)))
    with pytest.raises(VolumeError, match=rf"label/v\.nii\.gz: holds label {value}"):
        weaken_folder(tmp_path / "s", tmp_path / "out", kind)
    assert not (tmp_path / "out").exists()


def test_values_of_one_byte_stay_in_wider_types():
    labels = np.stack([slice_of(0)] * 2, axis=2)
    labels[labels == 1] = 254
    for dtype in (np.uint16, np.int32, np.int64):
        np.testing.assert_array_equal(weaken(labels.astype(dtype), "block"), weaken(labels, "block"))


def test_a_copy_lies_where_the_original_lies_and_its_images_can_be_chosen(tmp_path):
    place = np.diag([1.5, 1.5, 4.0, 1.0])
    tilted = place.copy()
    tilted[:3, 3] = 10, 20, 30
    labels = np.stack([slice_of(0)] * 2, axis=2)
    for folder, data in (("t1", labels.astype(np.float32)), ("t2", labels * 2.0), ("label", labels)):
        image = nib.Nifti1Image(data.astype(np.uint8), None)
        image.header.set_qform(tilted, 1)
        image.header.set_sform(place, 2)
        image.header.set_xyzt_units("mm")
        (tmp_path / "s" / "case1" / folder).mkdir(parents=True)
        nib.save(image, tmp_path / "s" / "case1" / folder / "v.nii.gz")
    words = ["weaken-labels", tmp_path / "s", "--out", tmp_path / "weak", "--kind", "box", "--image-key", "t2,t1"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    for part, data in (("image0/image", labels * 2), ("image1/image", labels), ("label/box", None)):
        written = nib.load(tmp_path / "weak" / "case1" / f"{part}.nii.gz")
        np.testing.assert_array_equal(written.affine, place)
        np.testing.assert_allclose(written.header.get_qform(coded=True)[0], tilted)
        assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 2)
        if data is not None:
            np.testing.assert_array_equal(np.asarray(written.dataobj), data)
