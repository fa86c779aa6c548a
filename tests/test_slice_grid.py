"""Between volumes and slices, both ways."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
from fedfactory.errors import ConfigError
from fedfactory.imaging.cropping import crop_box
from fedfactory.imaging.resampling.axis import Axis
from fedfactory.imaging.resampling.labels import interpolated_labels
from fedfactory.imaging.slice_choices import PLANES, UNLABELLED
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.imaging.volumes import Volume, orientation, turned_back
from helpers import ball_volume, image_of, image_slices, oriented
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

AXES = ["".join(o) for p in itertools.permutations(("RL", "AP", "SI")) for o in itertools.product(*p)]


def slice_format(size, spacing, **options) -> SliceFormat:
    return SliceFormat(size=size, spacing=spacing, window=(-1.0, 1.0), z_bins=4, **{"crop": "none", **options})


def rotation(angles) -> np.ndarray:
    x, y, z = angles
    turns = [((1, 2), x), ((0, 2), y), ((0, 1), z)]
    matrix = np.eye(3)
    for (i, j), angle in turns:
        turn = np.eye(3)
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = matrix @ turn
    return matrix


@settings(max_examples=40, deadline=None)
@given(codes=st.sampled_from(AXES))
def test_slices_do_not_depend_on_how_the_scanner_orders_its_axes(codes):
    image, label = ball_volume()
    fmt = slice_format(16, 4.5)
    plain, turned = image_of(image).grid(fmt), image_of(oriented(image, codes)).grid(fmt)
    np.testing.assert_allclose(
        image_slices(turned, oriented(image, codes)), image_slices(plain, image), atol=1e-3, equal_nan=True
    )
    np.testing.assert_array_equal(turned.label_slices(oriented(label, codes)), plain.label_slices(label))


@settings(max_examples=20, deadline=None)
@given(
    codes=st.sampled_from(AXES),
    shape=st.tuples(st.integers(40, 100), st.integers(40, 100), st.integers(4, 40)),
    pixel=st.floats(0.6, 1.7),
    order=st.sampled_from("CF"),
    resample_slices=st.booleans(),
)
def test_products_of_bands_equal_those_of_whole_matrices(codes, shape, pixel, order, resample_slices):
    """More samples than a band has, in every order of the voxels in memory; noise shows every weight."""
    noise = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    volume = oriented(Volume(noise, np.eye(4)), codes)
    volume = Volume(np.array(volume.data, order=order), volume.affine)
    fmt = slice_format(80, pixel, slice_spacing=1.3 if resample_slices else None)
    grid = image_of(volume).grid(fmt)
    rows, columns, places = (axis.forward(3, grid._blur(axis)) for axis in grid.axes)
    kept = grid.kept(volume)
    expected = np.einsum("kz,ix,jy,xyz->kij", places, rows, columns, kept, optimize=True).clip(kept.min(), kept.max())
    found = image_slices(grid, volume)
    inside = np.zeros(found.shape, bool)
    inside[tuple(axis.inside for axis in (grid.axes[2], *grid.axes[:2]))] = True
    np.testing.assert_array_equal(np.isfinite(found), inside)
    np.testing.assert_allclose(found[inside], expected[inside], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    kept=st.integers(1, 60),
    count=st.integers(1, 80),
    ratio=st.floats(0.3, 3.0),
    moved=st.floats(-3.0, 3.0),
    blur=st.sampled_from([0.0, 0.4, 1.3]),
)
def test_weights_of_cubic_splines_are_those_of_scipys_interpolation(kept, count, ratio, moved, blur):
    offset = (kept - 1) / 2 - ratio * (count - 1) / 2 + moved
    impulses = ndimage.gaussian_filter1d(np.eye(kept), blur, axis=0, mode="nearest") if blur else np.eye(kept)
    expected = ndimage.affine_transform(
        impulses, [ratio, 1.0], [offset, 0.0], output_shape=(count, kept), order=3, mode="nearest"
    )
    np.testing.assert_allclose(Axis(0, kept, count, ratio, offset).forward(3, blur), expected, atol=1e-6)


def samples(voxels: int) -> st.SearchStrategy[Axis]:
    """Axes over all voxels, equal grids and places in the middle between voxels among them."""

    def axis(count: int, ratio: float, moved: float) -> Axis:
        return Axis(0, voxels, count, ratio, (voxels - 1) / 2 - ratio * (count - 1) / 2 + moved)

    ratios = st.sampled_from([0.5, 1.0, 2.0]) | st.floats(0.4, 2.5)
    moved = st.sampled_from([0.0, 0.5]) | st.floats(-1.0, 1.0)
    return st.just(Axis(0, voxels, voxels, 1.0, 0.0)) | st.builds(axis, st.integers(1, 30), ratios, moved)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), seed=st.integers(0, 999), order=st.sampled_from("CF"), half=st.booleans())
def test_labels_are_those_with_the_largest_share_of_a_pixel(data, seed, order, half):
    """The reference interpolates the indicator of every label in double precision; 255 is a label as any other."""
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(1, 14, 3))
    regions = np.digitize(ndimage.gaussian_filter(rng.normal(size=shape), rng.choice([0.01, 1.5])), [-0.3, 0.0, 0.2])
    labels = np.array(np.array([0, 3, 255, 1], np.uint8)[regions], order=order)
    planes = np.moveaxis(labels, 2, 0)
    axes = [data.draw(samples(n)) for n in planes.shape]
    values = np.unique(labels)
    weights = [linear_weights(axis) for axis in axes]
    shares = [np.einsum("kz,ix,jy,zxy->kij", *weights, (planes == value).astype(float)) for value in values]
    if half:
        expected = np.zeros(shares[0].shape, np.uint8)
        for value, share in zip(values, shares, strict=True):
            expected[(share >= 0.5 - 1e-6) & (value > 0)] = value
    else:
        expected = values[np.argmax(np.array(shares) >= np.max(shares, axis=0) - 1e-6, axis=0)]
    np.testing.assert_array_equal(interpolated_labels(planes, axes, at_least_half=half), expected)


def linear_weights(axis: Axis) -> np.ndarray:
    """(n, voxels) float64, of the samples that lie in a voxel."""
    places = axis.offset + axis.ratio * np.arange(axis.inside.start, axis.inside.stop)
    weights = [np.interp(places, np.arange(axis.stop), unit) for unit in np.eye(axis.stop)]
    return np.stack(weights, axis=1)


@settings(max_examples=60, deadline=None)
@given(
    codes=st.sampled_from(AXES),
    shape=st.tuples(*[st.integers(12, 30)] * 3),
    spacing=st.tuples(*[st.floats(0.7, 4.0)] * 3),
    angles=st.tuples(*[st.floats(-0.4, 0.4)] * 3),
    finer=st.floats(0.6, 1.0),
    plane=st.sampled_from(PLANES),
    resample_slices=st.booleans(),
)
def test_a_smooth_function_survives_slicing_and_mapping_back(
    codes, shape, spacing, angles, finer, plane, resample_slices
):
    """A sine of 20 mm or more, at most 4 mm apart, in oblique, flipped, anisotropic volumes."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * np.array(spacing)
    affine[:3, 3] = [-20, 13, 5]
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    points = index @ affine[:3, :3].T + affine[:3, 3]
    volume = oriented(Volume(np.sin(points @ [0.11, 0.07, 0.05]).astype(np.float32), affine), codes)
    turned = volume.turned(plane)
    pixel = float(turned.spacing[:2].min()) * finer
    width = max(np.array(turned.data.shape[:2]) * turned.spacing[:2])
    fmt = slice_format(
        int(np.ceil(width / pixel)) + 3, pixel, plane=plane,
        slice_spacing=float(turned.spacing[2]) * finer if resample_slices else None,
    )  # fmt: skip
    grid = image_of(volume).grid(fmt)
    back = grid.image_to_volume(image_slices(grid, volume).copy())
    assert back.shape == volume.data.shape
    inner = tuple(slice(3, -3) for _ in range(3))  # splines of a cut-off sine are less exact at its ends
    np.testing.assert_allclose(back[inner], volume.data[inner], atol=0.03)


@settings(max_examples=40, deadline=None)
@given(
    codes=st.sampled_from(AXES), spacing=st.floats(1.0, 2.0), margin=st.integers(0, 6), plane=st.sampled_from(PLANES)
)
def test_labels_come_back_to_the_grid_they_were_taken_from(codes, spacing, margin, plane):
    _, label = ball_volume(spacing=(3.0, 3.0, 4.0))
    label = oriented(label, codes)
    turned = label.turned(plane)
    extent = (np.array(turned.data.shape[:2]) * turned.spacing[:2]).max()
    grid = image_of(label).grid(slice_format(int(np.ceil(extent / spacing)) + margin, spacing, plane=plane))
    slices = grid.label_slices(label)
    back = grid.labels_to_volume(np.stack([slices == k for k in range(3)], axis=1).astype(np.float32))
    assert back.shape == label.data.shape
    for k in (1, 2):  # pixels at most two thirds of a voxel; larger pixels can fall between voxels and lose the border
        overlap = 2 * ((back == k) & (label.data == k)).sum() / ((back == k).sum() + (label.data == k).sum())
        assert overlap > 0.97


def test_equal_grids_are_copied_without_any_change():
    image, label = ball_volume(shape=(16, 15, 8))
    for size in (16, 17, 20):  # also where the middle of the slices lies half a voxel off
        grid = image_of(image).grid(slice_format(size, 3.0))
        before = (size - 16) // 2, (size - 15) // 2
        inner = np.s_[:, before[0] : before[0] + 16, before[1] : before[1] + 15]
        slices = image_slices(grid, image)
        np.testing.assert_array_equal(slices[inner], np.moveaxis(image.data, 2, 0))
        assert np.isfinite(slices).sum() == image.data.size
        one_hot = np.stack([grid.label_slices(label) == k for k in range(3)], axis=1).astype(np.float32)
        np.testing.assert_array_equal(grid.labels_to_volume(one_hot), label.data)


def test_image_slices_are_those_of_scipys_own_cubic_splines():
    image, _ = ball_volume(shape=(20, 24, 8))
    slices = image_slices(image_of(image).grid(slice_format(30, 2.0)), image)
    ratio = 2 / 3
    offset = (np.array([20, 24]) - 1) / 2 - ratio * 29 / 2
    expected = ndimage.affine_transform(
        image.data.astype(np.float64), [ratio, ratio, 1.0], [*offset, 0.0], output_shape=(30, 30, 8), order=3,
        mode="nearest",
    )  # fmt: skip
    expected = np.clip(np.moveaxis(expected, 2, 0), image.data.min(), image.data.max())
    np.testing.assert_allclose(slices[:, 2:-2], expected[:, 2:-2], atol=2e-3)


def test_a_linear_ramp_is_resampled_to_its_own_values():
    x = np.arange(20, dtype=np.float32)
    ramp = Volume(np.broadcast_to(x[:, None, None], (20, 20, 3)).copy(), np.diag([2.0, 2.0, 5.0, 1.0]))
    slices = image_slices(image_of(ramp).grid(slice_format(10, 3.0)), ramp)
    centres = 9.5 + 1.5 * (np.arange(10) - 4.5)  # in voxels; away from the border blur and splines keep a ramp
    np.testing.assert_allclose(slices[1, 2:8, 5], centres[2:8], atol=2e-2)


def test_coarser_pixels_average_instead_of_skipping():
    stripes = np.zeros((32, 32, 2), np.float32)
    stripes[::2] = 1
    slices = image_slices(image_of(Volume(stripes, np.eye(4))).grid(slice_format(8, 4.0)), Volume(stripes, np.eye(4)))
    assert np.abs(slices[:, 2:-2] - 0.5).max() < 0.05  # without the blur every pixel would be near 0 or 1


def test_slices_can_be_spaced_anew_and_keep_their_height():
    image, label = ball_volume(shape=(16, 16, 12), spacing=(3.0, 3.0, 2.0))
    grid = image_of(image).grid(slice_format(16, 3.0, slice_spacing=4.0))
    assert image_slices(grid, image).shape == (6, 16, 16)
    assert grid.label_slices(label).shape == (6, 16, 16)
    assert grid.height == pytest.approx(24)


@settings(max_examples=30, deadline=None)
@given(codes=st.sampled_from(AXES), plane=st.sampled_from(PLANES), coarse=st.sampled_from([1.0, 3.0, 7.0, 12.0]))
def test_no_annotated_voxel_of_a_sparse_label_map_is_lost(codes, plane, coarse):
    """One voxel per class, which a majority vote would drop as soon as pixels are coarser."""
    data = np.full((20, 18, 16), UNLABELLED, dtype=np.uint8)
    data[2, 3, 4], data[15, 10, 4], data[8, 14, 12], data[10, 2, 13] = 1, 2, 3, 0
    label = oriented(Volume(data, np.diag([3.0, 3.0, 3.0, 1.0])), codes)
    slices = image_of(label).grid(slice_format(64, coarse, plane=plane)).sparse_label_slices(label)
    assert set(np.unique(slices)) == {0, 1, 2, 3, UNLABELLED}
    if coarse >= 3:  # where pixels are not finer, one voxel marks one pixel
        assert [(slices == k).sum() for k in (0, 1, 2, 3)] == [1, 1, 1, 1]


def test_points_land_on_the_pixels_that_show_them():
    data = np.zeros((20, 24, 8), np.float32)
    data[5, 17, 3] = 1
    for codes in ("RAS", "LPI", "SAR"):
        volume = oriented(Volume(data, np.diag([3.0, 3.0, 5.0, 1.0])), codes)
        grid = image_of(volume).grid(slice_format(64, 2.0))
        voxel = np.argwhere(volume.data == 1).astype(float)
        pixel = np.round(grid.pixels_of(voxel)[0]).astype(int)
        slices = np.nan_to_num(image_slices(grid, volume))
        assert tuple(pixel) == np.unravel_index(slices.argmax(), slices.shape)


@pytest.mark.parametrize("codes", AXES[::5])
@pytest.mark.parametrize("plane", PLANES)
def test_turning_and_turning_back_is_the_identity(codes, plane):
    volume = oriented(ball_volume()[0], codes)
    turned = volume.turned(plane)
    np.testing.assert_array_equal(turned_back(turned.data, volume.affine, plane), volume.data)
    world = volume.affine @ [3, 5, 2, 1]  # the same voxel has the same world coordinates
    index = np.round(np.linalg.inv(turned.affine) @ world).astype(int)[:3]
    assert turned.data[tuple(index)] == volume.data[3, 5, 2]


def test_planes_put_the_named_axis_last():
    volume = oriented(ball_volume()[0], "PIR")
    last = {plane: nib.aff2axcodes(volume.turned(plane).affine)[2] for plane in PLANES}
    assert last == {"axial": "S", "coronal": "A", "sagittal": "R", "acquired": "R", "stored": "R"}
    assert nib.aff2axcodes(volume.turned("acquired").affine) == ("A", "S", "R")
    np.testing.assert_array_equal(orientation(volume.affine, "stored")[:, 0], [0, 1, 2])


def test_air_is_cropped_and_patients_are_not():
    image, _ = ball_volume(shape=(40, 36, 12))
    image.data[:7], image.data[33:] = np.random.default_rng(0).normal(0, 1.0, (7, 36, 12)), 0
    image.data[10] = 0  # a dark plane inside stays
    box = crop_box(image.data, "air")
    assert box[0][0] == 7
    assert box[0][1] == 33
    assert box[1:] == ((0, 36), (0, 12))
    shifted = image.data - 1024  # scales that start below zero, such as Hounsfield units
    assert crop_box(shifted, "air") == box
    assert crop_box(image.data, "none") == ((0, 40), (0, 36), (0, 12))
    with pytest.raises(ConfigError, match="crop is 'skin'"):
        crop_box(image.data, "skin")


def test_what_was_cropped_is_background_when_labels_come_back():
    image, label = ball_volume(shape=(40, 36, 12))
    image.data[:7] = 0
    grid = image_of(image).grid(slice_format(40, 3.0, crop="air"))
    back = grid.labels_to_volume(
        np.repeat(np.array([0.0, 1.0, 0.0])[None, :, None, None], 12, 0) + np.zeros((12, 3, 40, 40))
    )
    assert back.shape == label.data.shape
    assert (back[:7] == 0).all()
    assert (back[7:] == 1).all()


def test_the_published_rules_place_and_label_as_the_published_program():
    """12 x 10 voxels of 2 mm to pixels of 1.5 mm: resized to 16 x 13, then padded to 20 from floor(rest / 2)."""
    image, label = ball_volume(shape=(12, 10, 4), spacing=(2.0, 2.0, 1.5), radius=4)
    fmt = slice_format(20, 1.5, slice_spacing=1.5, plane="stored", compatibility="published")
    slices = image_slices(image_of(image).grid(fmt), image)
    inside = np.argwhere(np.isfinite(slices[0]))
    assert inside.min(0).tolist() == [2, 3]
    assert inside.max(0).tolist() == [17, 15]
    resized = ndimage.zoom(
        image.data.astype(np.float64), (16 / 12, 13 / 10, 1), order=3, mode="nearest", grid_mode=True
    )
    resized = np.clip(resized, image.data.min(), image.data.max())
    np.testing.assert_allclose(slices[:, 2:18, 3:16], np.moveaxis(resized, 2, 0), atol=1e-3)
    shares = [ndimage.zoom((label.data == k).astype(float), (16 / 12, 1.3, 1), order=1, mode="nearest", grid_mode=True)
              for k in (1, 2)]  # fmt: skip
    expected = np.where(shares[1] >= 0.5, 2, shares[0] >= 0.5)
    found = image_of(label).grid(fmt).label_slices(label)[:, 2:18, 3:16]
    assert (found != np.moveaxis(expected, 2, 0)).mean() < 0.002  # shares of exactly one half may round either way


def test_the_published_crop_trims_the_tail_by_the_heads_count():
    profile = np.concatenate([np.zeros(30), np.full(40, 100.0), np.zeros(10)])
    data = np.broadcast_to(profile[:, None, None], (80, 6, 6)).astype(np.float32)
    start, stop = crop_box(data, "air", published=True)[0]
    assert 30 <= start <= 32
    assert 66 <= stop <= 71
    assert crop_box(data, "air")[0] == (30, 70)
