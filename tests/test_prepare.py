"""A site's volumes become a slice store."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from fedfactory.errors import ConfigError, FedFactoryError, StoreError, UsageError, VolumeError
from fedfactory.generative.config import FactoryConfig
from fedfactory.imaging.images import Intensities, digest_of_array, half_precision, histogram_bins
from fedfactory.imaging.patients import patient_of
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.slice_format import (
    PAIRS_PAY,
    SliceFormat,
    count_bytes,
    count_intensities,
    count_whole,
    intensity_window,
    z_bins_of,
)
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.patient_split import split_patients
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from fedfactory.node.store.store_warnings import patients_line, store_warnings
from helpers import ball_volume, folder_bytes, oriented, write_dicom, write_site
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = PrepareConfig(domain="x", size=16, z_bins=4)


# what the numbers mean


def test_windows_ends_are_the_right_edges_of_the_first_bins_that_reach_their_share():
    counts = np.zeros(256, dtype=int)
    counts[10], counts[100], counts[200] = 5, 9_985, 10
    assert intensity_window(0.0, 256.0, counts) == (101.0, 102.0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 255), st.floats(0.05, 0.95)), min_size=1, max_size=50))
def test_intensities_are_counted_in_equal_bins_and_the_rest_is_left_out(positions):
    """Positions lie away from the edges of the bins, where rounding decides."""
    values = np.array([*(-5 + (k + share) * 10 / 256 for k, share in positions), np.nan, -99, 99], np.float32)
    expected = np.bincount([k for k, _ in positions], minlength=256)
    np.testing.assert_array_equal(count_intensities(values, -5, 5), expected)
    np.testing.assert_array_equal(count_intensities(np.array([-5.0, 5.0]), -5, 5)[[0, 255]], [1, 1])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60), st.sampled_from("CF"))
def test_bytes_are_counted_in_pairs_and_the_odd_one_counts_too(values, order):
    found = count_bytes(np.array(values, np.uint8))
    np.testing.assert_array_equal(found, np.bincount(values, minlength=256))
    square = np.array([values, values], np.uint8, order=order)
    np.testing.assert_array_equal(count_bytes(square), 2 * found)


@pytest.mark.parametrize("size", [PAIRS_PAY - 1, PAIRS_PAY, PAIRS_PAY + 1])
def test_bytes_of_large_arrays_are_counted_in_pairs_and_the_odd_one_counts_too(size):
    values = (np.random.default_rng(0).integers(0, 256, size) ** 2 // 300).astype(np.uint8)
    values[-1] = 255
    np.testing.assert_array_equal(count_bytes(values), np.bincount(values, minlength=256))


@settings(max_examples=50, deadline=None)
@given(
    low=st.integers(-40_000, 40_000), span=st.integers(1, 70_000), order=st.sampled_from("CF"), whole=st.booleans(),
    negative=st.booleans(),
)  # fmt: skip
def test_grey_levels_of_whole_numbers_are_those_of_all_voxels(low, span, order, whole, negative):
    """More voxels than are worked on at once. Mean and deviation are numpy's, bins those of every single voxel."""
    values = np.random.default_rng(span).integers(low, low + span + 1, (50, 40, 60)).astype(np.float32)
    values[0, 0, :2] = low, low + span
    if not whole:
        values[-1, -1, -1] += 0.5 if span < 2 else -0.5
    stored = np.array(values[:, ::-1], order=order)[:, ::-1] if negative else np.array(values, order=order)
    found = Intensities.of(stored)
    counted = whole and span < 1 << 16
    assert (count_whole(stored, found.low, found.high) is not None) == counted
    assert (found.low, found.high) == (values.min(), values.max())
    assert found.mean == pytest.approx(values.mean(dtype=np.float64), rel=1e-6, abs=1e-6)
    assert found.deviation == pytest.approx(values.std(dtype=np.float64), rel=1e-6)
    bins = histogram_bins(values, found.low, found.high)
    np.testing.assert_array_equal(found.counts, np.bincount(bins.ravel(), minlength=64))


def test_numbers_without_an_end_are_not_counted_as_whole_ones():
    for odd in (np.nan, np.inf):
        values = np.array([[0.0, odd]], np.float32)
        assert count_whole(values, float(values.min()), float(values.max())) is None


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.integers(0, 6)] * 3), st.integers(0, 99))
def test_half_precision_is_that_of_numpy(shape, seed):
    """Rounding to the nearest, halves to the even one, numbers below the smallest normal one, and NaN."""
    rng = np.random.default_rng(seed)
    values = (rng.uniform(-1, 1, shape) * 10.0 ** rng.integers(-9, 1, shape)).astype(np.float32)
    values[rng.random(shape) < 0.2] = 1 + 2.0**-11
    values[rng.random(shape) < 0.1] = np.nan
    found = half_precision(values)
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, values.astype(np.float16))


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(*[st.integers(1, 7)] * 3) | st.just((50, 60, 40)), st.sampled_from(["u1", "u2", "f4", "f8"]),
    st.sampled_from("CF"), st.booleans(),
)  # fmt: skip
def test_the_digest_of_voxels_does_not_depend_on_their_order_in_memory(shape, dtype, order, flipped):
    values = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    stored = np.array(values, order=order)
    if flipped:
        stored = np.array(values[:, ::-1], order=order)[:, ::-1]
    expected = hashlib.sha256(str(shape).encode() + values.tobytes()).hexdigest()
    assert digest_of_array(stored) == expected


@settings(max_examples=50, deadline=None)
@given(slices=st.integers(1, 300), bins=st.integers(1, 64))
def test_height_bins_rise_and_stay_in_range(slices, bins):
    z_bin = z_bins_of(slices, bins)
    assert z_bin[0] == 0
    assert (np.diff(z_bin) >= 0).all()
    assert z_bin[-1] < bins
    if slices >= bins:
        assert set(z_bin) == set(range(bins))


def test_scaling_maps_the_window_to_minus_one_and_one_and_back():
    fmt = SliceFormat(size=2, spacing=1.0, window=((-1.0, 3.0), (0.0, 1.0)), z_bins=1)
    values = np.array([[-5.0, -1.0, 1.0, 3.0, 9.0, np.nan], [-5.0, 0.0, 0.25, 0.5, 9.0, np.nan]])
    expected = [[-1, -1, 0, 1, 1, -1], [-1, -1, -0.5, 0, 1, -1]]
    np.testing.assert_allclose(fmt.scale(values[None]), [expected])
    inside = np.array([[[-1.0, 0.5, 3.0], [0.0, 0.5, 1.0]]])
    np.testing.assert_allclose(fmt.unscale(fmt.scale(inside)), inside, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    patients=st.dictionaries(st.text("abc", min_size=1), st.booleans(), min_size=1, max_size=40),
    validation=st.floats(0, 0.4),
    test=st.floats(0, 0.4),
    seed=st.integers(0, 5),
)
def test_held_out_patients_are_labelled_ones_and_stay_held_out(patients, validation, test, seed):
    options = {"validation_share": validation, "test_share": test, "seed": seed}
    split = split_patients(patients, **options)
    assert split.keys() == patients.keys()
    held_out = [name for name, part in split.items() if part != "train"]
    assert len(held_out) <= (validation + test) * len(patients) + 1e-6
    assert "train" in split.values()
    if any(patients.values()):
        assert all(patients[name] for name in held_out)
    more = patients | {f"new{n}": True for n in range(20)}
    again = split_patients(more, **options, known=split)
    assert {name: again[name] for name in split} == split


def test_held_out_shares_are_the_configured_shares():
    split = split_patients({f"p{n}": n < 30 for n in range(40)}, validation_share=0.15, test_share=0.1, seed=0)
    assert [list(split.values()).count(part) for part in ("train", "validation", "test")] == [30, 6, 4]


@pytest.mark.parametrize(
    ("name", "patient"),
    [("patient038_ED", "patient038"), ("patient038_ES", "patient038"), ("hippocampus_001", "hippocampus_001"),
     ("sub-A12_ses-2_T1w", "sub-A12"), ("anna", "anna"), ("P7-visit2", "P7")],
)  # fmt: skip
def test_the_patient_is_read_from_the_name(name, patient):
    assert patient_of(name, None) == patient


def test_a_pattern_finds_the_patient_in_a_name():
    assert patient_of("ward3-p17-t2", r"ward\d+-(p\d+)") == "p17"
    assert patient_of("ward3-p17-t2", r"ward\d+-p\d+") == "ward3-p17"
    assert patient_of("other", r"ward\d+") == "other"


# a store and what it holds


def test_a_prepared_site_holds_scaled_images_and_its_labels(store):
    assert store.images.shape == (24, 1, 16, 16)
    assert store.images.min() >= -1
    assert store.images.max() <= 1
    assert store.classes == 3
    assert [case.name for case in store.cases] == ["case0", "case1", "case2"]
    means = [float(store.images[:, 0][store.labels == k].mean()) for k in range(3)]
    assert means[0] < means[1] < means[2]
    (warning,) = store.warnings
    assert "none of 3 patients is held out" in warning
    store.verify()


@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "PIL"])
def test_what_is_in_the_store_can_be_brought_back_to_the_original_volume(tmp_path, codes):
    """Image and labels of an oblique volume with air around it, through files, store and back."""
    image, label = ball_volume(shape=(30, 32, 9), spacing=(2.0, 2.5, 4.0), radius=10)
    image.data[:5] = 0
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.2), -np.sin(0.2)], [np.sin(0.2), np.cos(0.2)]]
    image, label = (oriented(Volume(v.data, turn @ v.affine), codes) for v in (image, label))
    write_volume(tmp_path / "s" / "a" / "image" / "i.nii.gz", image)
    write_volume(tmp_path / "s" / "a" / "label" / "l.nii.gz", label)
    store = prepare(tmp_path / "s", tmp_path / "st", PrepareConfig(domain="x", size=64, z_bins=4, spacing=1.5)).store
    case = store.cases[0]
    grid, (grey,) = store.grid(case), case.intensities
    one_hot = np.stack([store.labels == k for k in range(3)], axis=1).astype(np.float32)
    back = grid.labels_to_volume(one_hot)
    assert back.shape == label.data.shape
    for k in (1, 2):
        assert 2 * ((back == k) & (label.data == k)).sum() / ((back == k).sum() + (label.data == k).sum()) > 0.93
    values = grid.image_to_volume(store.format.unscale(store.images)[:, 0]) * grey.deviation + grey.mean
    finite = np.isfinite(values)
    low, high = (w * grey.deviation + grey.mean for w in store.format.window[0])
    error = np.abs(values - np.clip(image.data, low, high))[finite]
    assert finite.sum() >= 0.8 * image.data.size  # all but the air that was cut off
    assert np.median(error) < 2.5  # noise of 2 is rougher than splines; the ball's steps are 50
    assert np.quantile(error, 0.9) < 8


def test_a_site_without_labels_has_none_in_its_store(site, tmp_path):
    store = prepare(site, tmp_path / "out", replace(CONFIG, label_kind="none")).store
    assert store.labels is None
    assert store.files.keys() == {"images"}
    with pytest.raises(StoreError, match="no case"):
        store.labelled_slices()


def test_cases_without_labels_stand_beside_labelled_ones(site, tmp_path):
    (site / "case1" / "label" / "mask.nii.gz").unlink()
    store = prepare(site, tmp_path / "out", CONFIG).store
    assert [case.labelled for case in store.cases] == [True, False, True]
    assert (store.labels[store.cases[1].span] == UNLABELLED).all()
    assert len(store.labelled_slices()) == 16


def test_volumes_of_one_patient_stay_together(tmp_path):
    write_site(tmp_path / "s", cases=20)
    for number in range(20):
        (tmp_path / "s" / f"case{number}").rename(tmp_path / "s" / f"p{number // 2:02d}_{'ED' if number % 2 else 'ES'}")
    store = prepare(tmp_path / "s", tmp_path / "out", CONFIG).store
    by_patient = {}
    for case in store.cases:
        by_patient.setdefault(case.patient, set()).add(case.split)
    assert len(by_patient) == 10
    assert all(len(parts) == 1 for parts in by_patient.values())
    parts = [store.slices(part) for part in ("train", "validation", "test")]
    assert [len(part) for part in parts] == [128, 16, 16]
    assert sorted(np.concatenate(parts)) == list(range(len(store)))


def test_a_mask_chooses_the_slices_and_can_be_a_class(tmp_path):
    write_site(tmp_path / "s", cases=2)
    mask = np.zeros((20, 24, 8), np.uint8)
    mask[2:18, 2:20, 2:6] = 1
    for case in (tmp_path / "s").iterdir():
        write_volume(case / "brain" / "m.nii.gz", Volume(mask, np.diag([3.0, 3.0, 5.0, 1.0])))
    store = prepare(tmp_path / "s", tmp_path / "a", replace(CONFIG, mask_key="brain")).store
    assert [case.count for case in store.cases] == [4, 4]
    assert store.classes == 3
    store = prepare(tmp_path / "s", tmp_path / "b", replace(CONFIG, mask_key="brain", mask_as_class=True)).store
    assert store.classes == 4
    assert all((store.labels[n] == 1).any() for n in range(len(store)))
    published = replace(CONFIG, mask_key="brain", compatibility="published", slice_spacing=5.0)
    store = prepare(tmp_path / "s", tmp_path / "c", published).store
    assert [case.count for case in store.cases] == [3, 3]  # the published program loses the last slice


def test_the_highest_label_value_does_not_become_background_beside_a_mask(tmp_path):
    write_site(tmp_path / "s", cases=2)
    for case in (tmp_path / "s").iterdir():
        label = read_volume(case / "label" / "mask.nii.gz", integer=True)
        write_volume(case / "brain" / "m.nii.gz", Volume(np.ones(label.data.shape, np.uint8), label.affine))
    write_volume(
        case / "label" / "mask.nii.gz", Volume(np.where(label.data > 0, 65535, 0).astype(np.uint16), label.affine)
    )
    result = prepare(tmp_path / "s", tmp_path / "out", replace(CONFIG, mask_key="brain", mask_as_class=True))
    assert list(result.failed) == [case.name] and "holds label 65536" in result.failed[case.name]


def test_the_published_preparation_resamples_all_axes_to_their_median(tmp_path):
    for number, spacing in enumerate([(1.0, 1.0, 2.0), (1.5, 1.5, 3.0), (2.0, 2.0, 4.0)]):
        image, _ = ball_volume(shape=(30, 24, 8), spacing=spacing, seed=number)
        write_volume(tmp_path / "s" / f"v{number}.nii.gz", image)
    config = PrepareConfig(domain="x", size=64, z_bins=4, compatibility="published", crop="none")
    store = prepare(tmp_path / "s", tmp_path / "out", config).store
    assert (store.format.spacing, store.format.slice_spacing) == (1.5, 3.0)
    assert [case.count for case in store.cases] == [5, 8, 11]
    side = store.images[store.cases[2].first + 5, 0] > -1
    assert np.flatnonzero(side.any(1))[[0, -1]].tolist() == [12, 51]  # 40 rows, padded from floor(24 / 2)


# labels of every kind


def test_sparse_labels_mark_unannotated_pixels_as_unlabelled(site, tmp_path):
    for case in site.iterdir():
        path = case / "label" / "mask.nii.gz"
        label = read_volume(path, integer=True)
        scribble = np.full(label.data.shape, 4, np.uint8)
        scribble[10, 12, :], scribble[1, 1, :] = 2, 0
        write_volume(path, Volume(scribble, label.affine))
    config = replace(CONFIG, label_kind="scribble", unlabelled_value=4)
    store = prepare(site, tmp_path / "out", config).store
    assert store.classes == 3
    assert set(np.unique(store.labels)) == {0, 2, UNLABELLED}
    assert all((store.labels[n] == 2).any() for n in range(len(store)))
    with pytest.raises(UsageError, match="give unlabelled_value"):
        replace(CONFIG, label_kind="point")
    with pytest.raises(UsageError, match="no unlabelled value"):
        replace(CONFIG, unlabelled_value=4)


def test_boxes_without_an_unlabelled_value_have_background_outside(site, tmp_path):
    store = prepare(site, tmp_path / "out", replace(CONFIG, label_kind="box")).store
    assert set(np.unique(store.labels)) == {0, 1, 2}


def test_fixations_land_on_the_fixated_pixels(site, tmp_path):
    """Positions in the table are shares of the stored axes; the brightest voxel of a slice is fixated."""
    for case in site.iterdir():
        image = read_volume(case / "image" / "scan.nii.gz")
        (case / "label" / "mask.nii.gz").unlink()
        x, y = np.unravel_index(image.data[:, :, 5].argmax(), image.data.shape[:2])
        rows = [(x + 0.5) / 20, (y + 0.5) / 24, 5, 300], [0.5, 0.5, 5, 20], [1.2, 0.5, 5, 300]
        text = "CURRENT_FIX_X,CURRENT_FIX_Y,SLICE,CURRENT_FIX_DURATION,IMAGE\n"
        (case / "label" / "gaze.csv").write_text(text + "".join(",".join(map(str, r)) + ",a\n" for r in rows))
    store = prepare(site, tmp_path / "out", replace(CONFIG, label_kind="gaze", size=32)).store
    assert store.gaze.shape == (3, 4)  # fixations that are too short or beside the image are left out
    for case, (number, row, column, milliseconds) in zip(store.cases, store.gaze, strict=True):
        assert number == case.first + 5
        assert milliseconds == 300
        pixels = np.asarray(store.images[int(number), 0], dtype=np.float32)
        near = pixels[int(row) - 1 : int(row) + 3, int(column) - 1 : int(column) + 3]
        assert near.max() >= np.quantile(pixels, 0.99)


def test_image_level_labels_come_from_tables_or_from_maps(site, tmp_path):
    (site / "case0" / "label" / "mask.nii.gz").unlink()
    (site / "case0" / "label" / "seen.csv").write_text("SLICE,LABEL\n2,1\n3,1\n3,2\n")
    store = prepare(site, tmp_path / "out", replace(CONFIG, label_kind="image")).store
    assert store.labels is None
    expected = np.zeros((8, 3), np.uint8)
    expected[:, 0] = expected[2, 1] = expected[3, 1:] = 1
    np.testing.assert_array_equal(store.presence[:8], expected)
    assert store.presence[8:, 1].sum() >= 8


def test_a_label_map_stored_in_another_axis_order_is_turned(site, tmp_path):
    plain = prepare(site, tmp_path / "plain", CONFIG).store
    for case in site.iterdir():
        path = case / "label" / "mask.nii.gz"
        write_volume(path, oriented(read_volume(path, integer=True), "LPS"))
    turned = prepare(site, tmp_path / "turned", CONFIG).store
    np.testing.assert_array_equal(turned.labels, plain.labels)


# what the site should check


def test_odd_cases_get_a_warning_and_good_cases_get_none(tmp_path):
    write_site(tmp_path / "s", cases=6)
    image, label = ball_volume(seed=0)
    write_volume(tmp_path / "s" / "again7" / "image" / "i.nii.gz", image)  # the voxels of case0
    blank = ball_volume(seed=8)[0]
    blank.data[:, :, 4] = blank.data.min()
    write_volume(tmp_path / "s" / "blank8" / "image" / "i.nii.gz", blank)
    write_volume(
        tmp_path / "s" / "huge9" / "image" / "i.nii.gz", Volume(ball_volume(seed=9)[0].data, np.diag([9, 9, 15, 1.0]))
    )
    write_volume(tmp_path / "s" / "none10" / "image" / "i.nii.gz", ball_volume(seed=10)[0])
    write_volume(tmp_path / "s" / "none10" / "label" / "l.nii.gz", Volume(label.data * 0, label.affine))
    write_volume(
        tmp_path / "s" / "thin11" / "image" / "i.nii.gz", Volume(ball_volume(seed=11)[0].data[:, :, 3:4], label.affine)
    )
    (tmp_path / "s" / "bare12").mkdir()
    store = prepare(tmp_path / "s", tmp_path / "out", replace(CONFIG, spacing=4.5)).store
    found = {
        word: next((w for w in store.warnings if word in w), "")
        for word in (
            "one volume",
            "all voxels are equal",
            "marks nothing",
            "single slice",
            "without an image",
        )
    }
    assert {word: sorted(text.split(": ")[-1].split(", ")) for word, text in found.items()} == {
        "one volume": ["again7", "case0"],
        "all voxels are equal": ["blank8"],
        "marks nothing": ["none10"],
        "single slice": ["thin11"],
        "without an image": ["bare12"],
    }
    (odd,) = [text for text in store.warnings if "of a size unlike" in text]
    assert "1 case of" in odd and "huge9, 20 x 24 x 8 voxels of 9 x 9 x 15 mm" in odd


def test_labels_that_do_not_fit_into_the_slices_get_a_warning(site, tmp_path):
    store = prepare(site, tmp_path / "out", replace(CONFIG, spacing=1.5)).store
    assert any("annotation outside" in text for text in store.warnings)
    assert any("rims are cut off" in text for text in store.warnings)


def test_names_that_hide_the_patients_get_a_warning(tmp_path):
    write_site(tmp_path / "s", cases=4)
    for number in range(4):
        (tmp_path / "s" / f"case{number}").rename(tmp_path / "s" / f"T1_{number}")
    store = prepare(tmp_path / "s", tmp_path / "out", CONFIG).store
    assert any("--patient-pattern" in text for text in store.warnings)
    pattern = replace(CONFIG, patient_pattern=r"T1_(\d+)")
    (warning,) = prepare(tmp_path / "s", tmp_path / "out2", pattern).store.warnings
    assert "none of 4 patients is held out" in warning


def test_the_patients_are_shown_and_a_site_without_any_held_out_is_warned(site, tmp_path):
    store = prepare(site, tmp_path / "out", CONFIG).store
    assert patients_line(store.cases) == "3 cases, 3 patients (3 train): case0, case1, case2"
    assert "3 cases, 3 patients (3 train): case0, case1, case2" in (tmp_path / "out" / "quality.html").read_text()
    together = [replace(case, patient="a", split="test") if case.name != "case1" else case for case in store.cases]
    assert patients_line(together) == "3 cases, 2 patients (1 train, 1 test): a (2 cases), case1"

    def warns(cases, **given) -> bool:
        texts = store_warnings(cases, store.format, classes=3, without_image=[], config=replace(CONFIG, **given))
        return any("held out" in text for text in texts)

    assert warns(store.cases) and not warns(together)
    assert not warns(store.cases, split="train") and not warns(store.cases, validation_share=0, test_share=0)


def test_the_quality_page_shows_every_case_and_loads_nothing_from_the_network(site, tmp_path):
    (site / "case1").rename(site / "a<b>&c 1")
    store = prepare(site, tmp_path / "out", CONFIG).store
    page = (store.path / "quality.html").read_text()
    assert "stays at this site" in page
    assert "a&lt;b&gt;&amp;c 1" in page
    assert "<b>&c" not in page
    assert page.count("data:image/png;base64,") == 4
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_a_store_made_of_dicom_contains_nothing_of_the_headers(tmp_path):
    for number, patient in enumerate(["DOE^JANE", "DOE^JANE", "ROE^RICHARD"]):
        image, _ = ball_volume(seed=number)
        write_dicom(tmp_path / "s" / f"study{number}", image, patient=patient, uid=f"1.2.99.{number}")
    store = prepare(tmp_path / "s", tmp_path / "out", CONFIG).store
    assert len(store) == 24
    assert store.cases[0].patient == store.cases[1].patient != store.cases[2].patient
    everything = b"".join(folder_bytes(store.path).values())
    # The letters of a picture in the page may spell any short name.
    everything = re.sub(rb"base64,([^\"]*)", lambda found: base64.b64decode(found[1]), everything)
    for private in (b"DOE", b"JANE", b"ROE", b"1.2.99"):
        assert private not in everything


# what is refused


def test_missing_empty_and_used_folders_are_refused(site, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(UsageError, match=str(source)):
            prepare(source, tmp_path / "out", CONFIG)
    with pytest.raises(UsageError, match="not empty"):
        prepare(site, site, CONFIG)
    assert not (tmp_path / "out").exists()


def test_a_site_of_which_nothing_can_be_used_leaves_no_store(site, tmp_path):
    for case in site.iterdir():
        (case / "image" / "scan.nii.gz").write_text("x")
    with pytest.raises(VolumeError, match="not one of 3 cases"):
        prepare(site, tmp_path / "out", CONFIG)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["site"]


@pytest.mark.parametrize(
    ("change", "error"),
    [({"domain": " "}, UsageError), ({"split": "odd"}, UsageError), ({"label_kind": "odd"}, UsageError),
     ({"plane": "odd"}, UsageError),
     ({"size": 0}, ConfigError), ({"spacing": -1.0}, ConfigError), ({"spacing": float("nan")}, ConfigError),
     ({"validation_share": 0.6, "test_share": 0.4}, ConfigError), ({"classes": 1}, ConfigError),
     ({"patient_pattern": "("}, UsageError), ({"mask_as_class": True}, UsageError)],
)  # fmt: skip
def test_settings_that_make_no_sense_are_refused(change, error):
    with pytest.raises(error):
        replace(CONFIG, **change)


@pytest.mark.parametrize(
    "change", ["version", "shape", "bins", "json", "array", "pickle", "path", "dtype", "order", "split", "missing"]
)
def test_a_damaged_store_is_refused(store, change):
    index = json.loads((store.path / "store.json").read_text())
    images = store.path / index["arrays"]["images"]
    if change == "version":
        index["version"] = 99
    elif change == "shape":
        index["cases"] = index["cases"][:-1]
    elif change == "bins":
        index["z_bin"][0] = 4
    elif change == "path":
        index["arrays"]["images"] = f"../{store.path.name}/{images.name}"
    elif change == "order":
        index["cases"][0]["first"] = 8
    elif change == "split":
        index["cases"][0]["split"] = "x"
    elif change == "missing":
        del index["cases"][0]["affine"]
    (store.path / "store.json").write_text("{" if change == "json" else json.dumps(index))
    if change == "array":
        images.write_bytes(b"")
    if change == "pickle":
        np.save(images, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    if change == "dtype":
        np.save(images, np.zeros((24, 16, 16)))
    with pytest.raises(FedFactoryError, match=str(store.path)):
        SliceStore(store.path)


def test_a_changed_slice_is_noticed(store):
    path = store.path / store.files["images"]
    content = bytearray(path.read_bytes())
    content[-300] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="case2 have changed"):
        SliceStore(store.path).verify()


def test_a_store_of_another_size_is_refused_with_the_command_that_helps(store):
    with pytest.raises(StoreError, match="--size 32 --z-bins 4"):
        store.require_factory(FactoryConfig(domains=("x",), image_size=32, z_bins=4))
    with pytest.raises(StoreError, match="1 channels, the factory needs 3"):
        store.require_factory(FactoryConfig(domains=("x",), image_size=16, z_bins=4, image_channels=3, channels=(8, 8)))


def test_volumes_written_and_read_again_are_the_same(tmp_path):
    image, label = ball_volume()
    write_volume(tmp_path / "a b ü.nii.gz", image)
    write_volume(tmp_path / "l.nii", label)
    back = read_volume(tmp_path / "a b ü.nii.gz")
    np.testing.assert_array_equal(back.data, image.data)
    np.testing.assert_allclose(back.affine, image.affine)
    assert read_volume(tmp_path / "l.nii", integer=True).data.max() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b ü.nii.gz", "l.nii"]
