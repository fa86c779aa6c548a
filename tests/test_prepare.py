"""Volumes to slices and back, and the store."""

from __future__ import annotations

import itertools
import json

import nibabel as nib
import numpy as np
import pytest
from fedfactory.errors import FedFactoryError, StoreError, UsageError, VolumeError
from fedfactory.node.prepare import prepare
from fedfactory.node.store import SliceStore
from fedfactory.slicing import SliceFormat, SliceGrid, intensity_window, z_bins_of
from fedfactory.sources import find_cases
from fedfactory.volumes import Volume, read_volume, write_volume
from helpers import ball_volume, write_site
from hypothesis import given, settings
from hypothesis import strategies as st

AXES = ["".join(o) for p in itertools.permutations(("RL", "AP", "SI")) for o in itertools.product(*p)]


def oriented(volume: Volume, codes: str) -> Volume:
    """The same anatomy in another axis order."""
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    data = nib.orientations.apply_orientation(volume.data, change)
    return Volume(data, volume.affine @ nib.orientations.inv_ornt_aff(change, volume.data.shape))


@settings(max_examples=40, deadline=None)
@given(codes=st.sampled_from(AXES))
def test_slices_do_not_depend_on_how_the_scanner_orders_its_axes(codes):
    image, label = ball_volume()
    plain = SliceGrid(image, 16, 4.5)
    turned = SliceGrid(oriented(image, codes), 16, 4.5)
    np.testing.assert_allclose(
        turned.image_slices(oriented(image, codes)), plain.image_slices(image), atol=1e-3, equal_nan=True
    )
    np.testing.assert_array_equal(turned.label_slices(oriented(label, codes)), plain.label_slices(label))


@settings(max_examples=40, deadline=None)
@given(codes=st.sampled_from(AXES), spacing=st.floats(1.0, 2.0), margin=st.integers(0, 6))
def test_labels_come_back_to_the_grid_they_were_taken_from(codes, spacing, margin):
    _, label = ball_volume()
    label = oriented(label, codes)
    extent = (np.array(label.to_canonical().data.shape[:2]) * label.to_canonical().spacing[:2]).max()
    grid = SliceGrid(label, int(np.ceil(extent / spacing)) + margin, spacing)
    slices = grid.label_slices(label)
    probabilities = np.stack([slices == k for k in range(3)], axis=1).astype(np.float32)
    back = grid.labels_to_volume(probabilities)
    assert back.shape == label.data.shape
    for k in (1, 2):  # pixels at most two thirds of a voxel; equal ones can fall between voxels and lose the border
        overlap = 2 * ((back == k) & (label.data == k)).sum() / ((back == k).sum() + (label.data == k).sum())
        assert overlap > 0.97


def test_equal_grids_are_copied_without_any_change():
    image, label = ball_volume(shape=(16, 16, 8))
    grid = SliceGrid(image, 16, 3.0)
    np.testing.assert_array_equal(grid.image_slices(image), np.moveaxis(image.data, 2, 0))
    one_hot = np.stack([grid.label_slices(label) == k for k in range(3)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(grid.labels_to_volume(one_hot), label.data)


def test_a_linear_ramp_is_resampled_to_its_own_values():
    x = np.arange(20, dtype=np.float32)
    ramp = Volume(np.broadcast_to(x[:, None, None], (20, 20, 3)).copy(), np.diag([2.0, 2.0, 5.0, 1.0]))
    slices = SliceGrid(ramp, 10, 3.0).image_slices(ramp)
    centres = 9.5 + 1.5 * (np.arange(10) - 4.5)  # in voxels; away from the border the blur keeps a ramp
    np.testing.assert_allclose(slices[1, 2:8, 5], centres[2:8], atol=1e-3)


def test_windows_ends_are_the_right_edges_of_the_first_bins_that_reach_their_share():
    counts = np.zeros(256, dtype=int)
    counts[10], counts[100], counts[200] = 5, 9_985, 10
    low, high = intensity_window(0.0, 256.0, counts)
    assert (low, high) == (101.0, 101.0 + 1.0) or (low, high) == (101.0, 102.0)


@settings(max_examples=50, deadline=None)
@given(slices=st.integers(1, 300), bins=st.integers(1, 64))
def test_height_bins_rise_and_stay_in_range(slices, bins):
    z_bin = z_bins_of(slices, bins)
    assert z_bin[0] == 0
    assert (np.diff(z_bin) >= 0).all()
    assert z_bin[-1] < bins
    if slices >= bins:
        assert set(z_bin) == set(range(bins))


def test_a_prepared_site_holds_scaled_images_and_its_labels(store):
    assert store.images.shape == (24, 16, 16)
    assert store.images.min() >= -1
    assert store.images.max() <= 1
    assert store.classes == 3
    assert [case.name for case in store.cases] == ["case0", "case1", "case2"]
    means = [float(store.images[store.labels == k].mean()) for k in range(3)]
    assert means[0] < means[1] < means[2]


def test_a_site_without_labels_has_none_in_its_store(site, tmp_path):
    store = prepare(site, tmp_path / "out", domain="x", size=16, z_bins=4, label_kind="none")
    assert store.labels is None
    assert not (store.path / "labels.npy").exists()
    with pytest.raises(StoreError, match="no case"):
        store.labelled_slices()


def test_nnunet_data_sets_and_plain_folders_are_found(tmp_path):
    image, label = ball_volume()
    raw = tmp_path / "Dataset001"
    for number in (1, 2):
        write_volume(raw / "imagesTr" / f"b_{number:03d}_0000.nii.gz", image)
        write_volume(raw / "imagesTr" / f"b_{number:03d}_0001.nii.gz", image)
        write_volume(raw / "labelsTr" / f"b_{number:03d}.nii.gz", label)
    (raw / "dataset.json").write_text("{}")
    cases = find_cases(raw, image_key="1")
    assert [c.image.name for c in cases] == ["b_001_0001.nii.gz", "b_002_0001.nii.gz"]
    assert cases[0].label.name == "b_001.nii.gz"
    assert [c.label for c in find_cases(raw / "imagesTr")] == [None] * 4


def damage(site, what):
    """Break one file of a good site."""
    image, mask = site / "case1" / "image" / "scan.nii.gz", site / "case1" / "label" / "mask.nii.gz"
    volume, label = ball_volume(seed=1)
    if what == "text":
        image.write_text("patient notes")
    elif what == "truncated":
        image.write_bytes(image.read_bytes()[:500])
    elif what == "2-D":
        nib.save(nib.Nifti1Image(volume.data[:, :, 0], volume.affine), image)
    elif what == "4-D":
        nib.save(nib.Nifti1Image(np.stack([volume.data] * 2, axis=3), volume.affine), image)
    elif what == "NaN":
        volume.data[3, 3, 3] = np.nan
        write_volume(image, volume)
    elif what == "constant":
        write_volume(image, Volume(np.ones_like(volume.data), volume.affine))
    elif what == "shape":
        write_volume(mask, Volume(label.data[:, :, :-1], label.affine))
    elif what == "affine":
        write_volume(mask, Volume(label.data, label.affine + np.eye(4) * 0.5))
    elif what == "fractional labels":
        write_volume(mask, Volume(label.data + np.float32(0.5), label.affine))
    elif what == "singular affine":
        header = nib.Nifti1Image(volume.data, None)
        header.header.set_sform(np.zeros((4, 4)), code=1)
        nib.save(header, image)
    elif what == "complex":
        nib.save(nib.Nifti1Image(volume.data.astype(np.complex64), volume.affine), image)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", "cannot be read"),
        ("truncated", "cannot be read"),
        ("2-D", "2-D"),
        ("4-D", "4-D"),
        ("NaN", "1 voxels are NaN"),
        ("constant", "same value"),
        ("shape", "shape"),
        ("affine", "affine differs"),
        ("fractional labels", "whole numbers"),
        ("singular affine", "cannot be inverted"),
        ("complex", "complex"),
    ],
)
def test_an_unusable_volume_is_named_in_one_line_and_leaves_nothing_behind(site, tmp_path, what, message):
    damage(site, what)
    with pytest.raises(VolumeError, match=message) as caught:
        prepare(site, tmp_path / "out", domain="x", size=16, z_bins=4)
    assert "case1" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["site"]


def test_missing_empty_and_used_folders_are_refused(site, tmp_path):
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(UsageError, match=str(source)):
            prepare(source, tmp_path / "out", domain="x", size=16, z_bins=4)
    with pytest.raises(UsageError, match="not empty"):
        prepare(site, site, domain="x", size=16, z_bins=4)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change", ["version", "shape", "bins", "json", "array", "pickle"])
def test_a_damaged_store_is_refused(store, change):
    index = json.loads((store.path / "store.json").read_text())
    if change == "version":
        index["version"] = 99
    elif change == "shape":
        index["cases"] = index["cases"][:-1]
    elif change == "bins":
        index["z_bin"][0] = 4
    (store.path / "store.json").write_text("{" if change == "json" else json.dumps(index))
    if change == "array":
        (store.path / "images.npy").write_bytes(b"")
    if change == "pickle":
        np.save(store.path / "images.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(FedFactoryError, match=str(store.path)):
        SliceStore(store.path)


def test_a_store_of_another_size_is_refused_with_the_command_that_helps(store):
    with pytest.raises(StoreError, match="--size 32 --z-bins 4"):
        store.require(size=32, z_bins=4)


def test_volumes_written_and_read_again_are_the_same(tmp_path):
    image, label = ball_volume()
    write_volume(tmp_path / "a b ü.nii.gz", image)
    write_volume(tmp_path / "l.nii", label)
    back = read_volume(tmp_path / "a b ü.nii.gz")
    np.testing.assert_array_equal(back.data, image.data)
    np.testing.assert_allclose(back.affine, image.affine)
    assert read_volume(tmp_path / "l.nii", integer=True).data.max() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a b ü.nii.gz", "l.nii"]


def test_scaling_maps_the_window_to_minus_one_and_one():
    fmt = SliceFormat(size=2, spacing=1.0, window=(-1.0, 3.0), z_bins=1)
    np.testing.assert_allclose(fmt.scale(np.array([-5.0, -1.0, 1.0, 3.0, 9.0, np.nan])), [-1, -1, 0, 1, 1, -1])


def test_two_volumes_in_a_modality_folder_are_refused(site):
    write_site(site.parent / "other", cases=1)
    extra = site / "case0" / "image" / "second.nii"
    write_volume(extra, ball_volume()[0])
    with pytest.raises(UsageError, match="2 volumes"):
        find_cases(site)
