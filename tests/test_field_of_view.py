"""Slices that show a part of the body: their field of view, and the place around which they are cut."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from fedfactory.errors import ConfigError, UsageError, VolumeError
from fedfactory.imaging.centre_table import CentreTable, read_centre_table
from fedfactory.imaging.slice_choices import PLANES
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.imaging.slice_grid import Axis, SliceGrid
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume, turned_positions
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from helpers import folder_bytes, image_slices, oriented
from hypothesis import given, settings
from hypothesis import strategies as st
from test_slice_grid import AXES, rotation, slice_format

CONFIG = PrepareConfig(domain="x", size=32, z_bins=4, field_of_view=48.0, validation_share=0, test_share=0)
ORGAN = (40, 14)  # voxels of 2 mm: in-plane place of the organ's middle, far from that of the body


def organ_volume(seed=0) -> tuple[Volume, Volume]:
    """A body of 120 x 90 mm in air with an organ of 10 mm, a tenth of its width, near a corner; and its label."""
    image = np.random.default_rng(seed).normal(0, 0.5, (70, 60, 4)).astype(np.float32)
    image[5:65, 5:50] += 50
    label = np.zeros(image.shape, np.uint8)
    label[ORGAN[0] - 2 : ORGAN[0] + 3, ORGAN[1] - 2 : ORGAN[1] + 3, 1:3] = 1
    image[label == 1] += 40
    affine = np.diag([2.0, 2.0, 5.0, 1.0])
    affine[:3, 3] = [-70, 30, 400]
    return Volume(image, affine), Volume(label, affine)


@pytest.fixture
def organs(tmp_path):
    for number in range(3):
        for volume, name in zip(organ_volume(number), ("image", "label"), strict=True):
            write_volume(tmp_path / "organs" / f"case{number}" / name / "v.nii.gz", volume)
    return tmp_path / "organs"


def table(path, rows, head="case,i,j,k") -> CentreTable:
    path.write_text("\n".join([head, *(",".join(map(str, row)) for row in rows)]) + "\n")
    return read_centre_table(path)


def organ_table(folder, cases=range(3)) -> CentreTable:
    return table(folder / "centres.csv", [(f"case{number}", *ORGAN, 1) for number in cases])


# where the pixels lie


@settings(max_examples=80, deadline=None)
@given(
    codes=st.sampled_from(AXES),
    shape=st.tuples(*[st.integers(6, 30)] * 3),
    spacing=st.tuples(*[st.floats(0.5, 4.0)] * 3),
    angles=st.tuples(*[st.floats(-0.5, 0.5)] * 3),
    place=st.tuples(*[st.floats(0, 1)] * 3),
    plane=st.sampled_from(PLANES),
    size=st.integers(1, 40),
    view=st.one_of(st.floats(3.0, 200.0), st.none()),
    compatibility=st.sampled_from(["none", "published"]),
    in_voxels=st.booleans(),
)
def test_the_given_place_lands_in_the_middle_pixel(
    codes, shape, spacing, angles, place, plane, size, view, compatibility, in_voxels
):
    """Without a field of view, pixels are as large as the voxels of the first turned axis: values are copied."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(angles) * np.array(spacing)
    affine[:3, 3] = [-20, 13, 5]
    volume = oriented(Volume(np.zeros(shape, np.float32), affine), codes)
    voxel = np.array(place) * (np.array(volume.data.shape) - 1)
    world = volume.affine[:3] @ [*voxel, 1.0]
    given_place = tuple((voxel if in_voxels else world).tolist())
    found = CentreTable("t", in_voxels, {"a": given_place}).voxel("a", volume.data.shape, volume.affine)
    np.testing.assert_allclose(found, voxel, atol=1e-6)
    turned = volume.turned(plane)
    centre = turned_positions(found[None], volume.data.shape, affine=volume.affine, plane=plane)[0]
    np.testing.assert_allclose((turned.affine @ [*centre, 1.0])[:3], world, atol=1e-4)  # an independent way there
    pixel = float(turned.spacing[0]) if view is None else view / size
    fmt = slice_format(size, pixel, plane=plane, compatibility=compatibility)
    box = tuple((0, n) for n in turned.data.shape)
    grid = SliceGrid(volume.data.shape, volume.affine, box=box, fmt=fmt, centre=tuple(centre[:2].tolist()))
    _, row, column = grid.pixels_of(voxel[None])[0]
    assert abs(row - (size - 1) / 2) <= 0.5 + 1e-6
    assert abs(column - (size - 1) / 2) <= 0.5 + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    codes=st.sampled_from(AXES),
    spacing=st.tuples(*[st.floats(1.0, 3.0)] * 3),
    place=st.tuples(*[st.floats(0.1, 0.9)] * 2),
    view=st.floats(15.0, 90.0),
    finer=st.floats(0.5, 1.0),
    plane=st.sampled_from(PLANES),
)
def test_slices_with_a_field_of_view_go_back_to_the_same_place(codes, spacing, place, view, finer, plane):
    """The smooth image returns to its own voxels and nothing else does; so does a random label map."""
    shape = (24, 20, 18)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1) * np.array(spacing)
    volume = oriented(Volume(np.sin(index @ [0.11, 0.07, 0.05]).astype(np.float32), np.diag([*spacing, 1.0])), codes)
    turned = volume.turned(plane)
    pixel = float(turned.spacing[:2].min()) * finer
    size = math.ceil(view / pixel)
    centre = tuple(share * (n - 1) for share, n in zip(place, turned.data.shape, strict=False))
    box = tuple((0, n) for n in turned.data.shape)
    fmt = SliceFormat(size=size, spacing=view / size, window=(-1.0, 1.0), z_bins=4, plane=plane, crop="none")
    grid = SliceGrid(volume.data.shape, volume.affine, box=box, fmt=fmt, centre=centre)
    back = grid.image_to_volume(image_slices(grid, volume).copy())
    shown = Volume(np.isfinite(back), volume.affine).turned(plane).data
    for axis in (0, 1):
        distance = abs(np.arange(shown.shape[axis]) - centre[axis]) * turned.spacing[axis]
        found = shown.any(axis=tuple(other for other in range(3) if other != axis))
        slack = fmt.spacing / 2 + 1e-3  # where pixels are voxels, the middle moves by up to half a pixel
        assert found[distance <= view / 2 - slack].all() and not found[distance > view / 2 + slack].any()
    ends = [np.flatnonzero(shown.any(axis=tuple(o for o in range(3) if o != a)))[[0, -1]] for a in (0, 1)]
    inner = np.zeros_like(shown)  # splines are less exact at the ends of the slices
    inner[ends[0][0] + 3 : ends[0][1] - 2, ends[1][0] + 3 : ends[1][1] - 2, 3:-3] = True
    error = abs(Volume(back, volume.affine).turned(plane).data - turned.data)
    assert not inner.any() or error[inner].max() < 0.03
    label = Volume((volume.data > 0).astype(np.uint8), volume.affine)
    slices = grid.label_slices(label)
    one_hot = np.stack([slices == value for value in (0, 1)], axis=1).astype(np.float32)
    returned = Volume(grid.labels_to_volume(one_hot), volume.affine).turned(plane).data
    assert not returned[~shown].any()
    assert (returned != label.turned(plane).data)[inner].mean() < 0.05 if inner.any() else True


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 60)] * 3),
    start=st.tuples(*[st.integers(0, 20)] * 3),
    voxel=st.floats(0.3, 5.0),
    size=st.integers(1, 64),
    pixel=st.one_of(st.floats(0.2, 9.0), st.none()),
    named=st.booleans(),
)
def test_without_a_centre_every_sample_is_exactly_where_it_was(shape, start, voxel, size, pixel, named):
    """The rule before there were centres, which decides all bytes; the box's middle, given as centre, is no other."""
    box = tuple((first, first + n) for first, n in zip(start, shape, strict=True))
    pixel = voxel if pixel is None else pixel
    expected = []
    for first, stop in box[:2]:
        ratio = 1.0 if abs(pixel / voxel - 1) < 1e-6 else pixel / voxel
        offset = (first + stop - 1) / 2 - ratio * (size - 1) / 2
        expected.append(Axis(first, stop, size, ratio, math.ceil(offset) if ratio == 1 else offset))
    fmt = slice_format(size, pixel, plane="stored")
    centre = tuple((first + stop - 1) / 2 for first, stop in box[:2]) if named else None
    whole = tuple(stop + 3 for _, stop in box)
    grid = SliceGrid(whole, np.diag([voxel, voxel, 2.0, 1.0]), box=box, fmt=fmt, centre=centre)
    for axis, wanted in zip(grid.axes, expected, strict=False):
        assert (axis.start, axis.stop, axis.count, axis.offset) == (
            wanted.start,
            wanted.stop,
            wanted.count,
            wanted.offset,
        )
        assert axis.ratio == wanted.ratio


# a store


def test_a_field_of_view_is_a_spacing_byte_for_byte(organs, tmp_path):
    seen = prepare(organs, tmp_path / "view", CONFIG).store
    same = prepare(organs, tmp_path / "spacing", replace(CONFIG, field_of_view=None, spacing=1.5)).store
    assert (seen.format.spacing, seen.format.field_of_view) == (1.5, 48.0)
    assert folder_bytes(seen.path) == folder_bytes(same.path)
    assert prepare(organs, tmp_path / "spacing", CONFIG).unchanged == 3


def test_small_organs_get_pixels_where_the_table_says_and_come_back(organs, tmp_path):
    whole = prepare(organs, tmp_path / "whole", replace(CONFIG, field_of_view=None)).store
    body = prepare(organs, tmp_path / "body", CONFIG).store
    seen = prepare(organs, tmp_path / "organ", replace(CONFIG, centres=organ_table(tmp_path))).store
    assert (whole.labels == 1).sum(axis=(1, 2)).max() <= 9  # 10 mm in pixels of 3.75 mm
    assert (seen.labels[1] == 1).sum() >= 36  # in pixels of 1.5 mm
    rows, columns = np.nonzero(seen.labels[1] == 1)
    assert abs(rows.mean() - 15.5) <= 0.5 and abs(columns.mean() - 15.5) <= 0.5
    assert replace(seen.format, window=body.format.window) == body.format
    case = SliceStore(seen.path).cases[0]
    assert case.centre == ORGAN and body.cases[0].centre is None
    label = read_volume(organs / "case0" / "label" / "v.nii.gz", integer=True).data
    one_hot = np.stack([seen.labels[case.span] == value for value in (0, 1)], axis=1).astype(np.float32)
    back = seen.grid(case).labels_to_volume(one_hot)
    assert 2 * (back & label).sum() / (back.sum() + label.sum()) > 0.85
    assert [case.facts.label_loss for case in seen.cases] == [0, 0, 0]


def test_labels_beside_the_field_of_view_are_measured_and_named(organs, tmp_path):
    config = replace(CONFIG, field_of_view=20.0)
    store = prepare(organs, tmp_path / "out", config).store
    assert [case.facts.label_loss for case in store.cases] == [1, 1, 1]
    assert any("annotation outside the slices: case0, case1, case2" in text for text in store.warnings)
    seen = prepare(organs, tmp_path / "organ", replace(config, centres=organ_table(tmp_path))).store
    assert [case.facts.label_loss for case in seen.cases] == [0, 0, 0]
    assert not any("annotation outside" in text for text in seen.warnings)
    assert any("rims are cut off" in text for text in seen.warnings)


def test_a_centre_far_from_the_middle_cuts_a_rim_off_and_that_is_named(organs, tmp_path):
    config = replace(CONFIG, field_of_view=126.0, centres=organ_table(tmp_path))
    store = prepare(organs, tmp_path / "out", config).store  # wide enough for the body around its own middle
    assert any("3 cases wider than the slices; their rims are cut off" in text for text in store.warnings)
    fits = prepare(organs, tmp_path / "fits", replace(config, field_of_view=None)).store
    assert fits.format.field_of_view == pytest.approx(2 * (49.5 - ORGAN[1]) * 2)  # to the far end of the columns
    assert fits.warnings == []


def test_a_place_in_millimetres_is_the_same_place(organs, tmp_path):
    volume = read_volume(organs / "case0" / "image" / "v.nii.gz")
    point = volume.affine[:3] @ [*ORGAN, 1.0, 1.0]
    rows = [(f"case{number}", *point.tolist()) for number in range(3)]
    millimetres = table(tmp_path / "mm.csv", rows, "case,x,y,z")
    seen = prepare(organs, tmp_path / "a", replace(CONFIG, centres=millimetres)).store
    same = prepare(organs, tmp_path / "b", replace(CONFIG, centres=organ_table(tmp_path))).store
    np.testing.assert_allclose(seen.cases[0].centre, ORGAN, atol=1e-4)
    np.testing.assert_allclose(np.array(seen.images, float), np.array(same.images, float), atol=2e-3)


def test_another_site_takes_the_field_of_view_over_and_needs_no_table(organs, tmp_path):
    seen = prepare(organs, tmp_path / "a", replace(CONFIG, centres=organ_table(tmp_path))).store
    plain = PrepareConfig(domain="x", validation_share=0, test_share=0)
    other = prepare(organs, tmp_path / "b", plain.like(seen.path)).store
    assert other.format == seen.format and other.cases[0].centre is None
    assert replace(plain, field_of_view=48.0).like(seen.path).spacing == 1.5
    with pytest.raises(UsageError, match=r"field_of_view is 150 mm, but the slices of .* show 48 mm"):
        replace(plain, field_of_view=150.0).like(seen.path)


def test_a_moved_centre_replaces_its_case_alone(organs, tmp_path):
    config = replace(CONFIG, centres=organ_table(tmp_path))
    prepare(organs, tmp_path / "out", config)
    before = folder_bytes(tmp_path / "out")
    again = prepare(organs, tmp_path / "out", config)
    assert (again.unchanged, again.replaced) == (3, 0) and folder_bytes(tmp_path / "out") == before
    moved = table(tmp_path / "moved.csv", [("case0", *ORGAN, 1), ("case1", 30, 20, 1), ("case2", *ORGAN, 1)])
    after = prepare(organs, tmp_path / "out", replace(config, centres=moved))
    assert (after.unchanged, after.replaced) == (2, 1)
    assert [case.centre for case in after.store.cases] == [ORGAN, (30, 20), ORGAN]
    after.store.verify()
    assert prepare(organs, tmp_path / "out", CONFIG).replaced == 3  # around the body's middle again


def test_an_older_store_without_centres_is_read(organs, tmp_path):
    store = prepare(organs, tmp_path / "out", CONFIG).store
    index = store.path / "store.json"
    index.write_text(index.read_text().replace('"centre": null, ', ""))
    assert '"centre"' not in index.read_text()
    assert SliceStore(store.path).cases == store.cases


# what is refused


def test_cases_without_a_row_rows_without_a_case_and_places_outside_are_named(organs, tmp_path):
    rows = [("case0", *ORGAN, 1), ("case1", 500, 14, 1), ("cas2", *ORGAN, 1)]
    result = prepare(organs, tmp_path / "out", replace(CONFIG, centres=table(tmp_path / "centres.csv", rows)))
    assert [case.name for case in result.store.cases] == ["case0"]
    where = f"{tmp_path / 'centres.csv'}: "
    assert result.failed == {
        "cas2": f"{where}has a row for this name, but there is no such case; correct or remove the row",
        "case1": f"{where}the centre of case1 is (500, 14, 1) in voxels; it must be inside of the volume of 70 x 60 "
        "x 4 voxels",
        "case2": f"{where}has no row for case2; add its centre",
    }
    excluded = replace(CONFIG, centres=organ_table(tmp_path), exclude=("case1",))
    assert prepare(organs, tmp_path / "second", excluded).failed == {}


def test_a_place_in_the_air_is_named_with_the_voxels_to_choose_from(organs, tmp_path):
    air = table(tmp_path / "t.csv", [(f"case{number}", 40, 57, 1) for number in range(3)])
    with pytest.raises(VolumeError, match=r"voxel 57 along the slices' columns, in the air .* from 5 to 49"):
        prepare(organs, tmp_path / "out", replace(CONFIG, centres=air))
    assert prepare(organs, tmp_path / "out", replace(CONFIG, centres=air, crop="none")).failed == {}
    millimetres = table(tmp_path / "mm.csv", [("case0", -70, 30, 300)], "case,x,y,z")
    with pytest.raises(VolumeError, match=r"\(-70, 30, 300\) in millimetres, voxel \(0, 0, -20\); it must be inside"):
        prepare(organs, tmp_path / "no", replace(CONFIG, centres=millimetres, exclude=("case1", "case2")))


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "its columns are missing; they must be case,x,y,z or case,i,j,k"),
     ("case,x,y\na,1,2\n", "its columns are case,x,y; they must be"),
     ("case,x,y,z,i,j,k\na,1,2,3,4,5,6\n", "its columns are case,x,y,z,i,j,k; they must be"),
     ("case|x|y|z\na|1|2|3\n", "its columns are case|x|y|z; they must be"),
     ("case,x,y,z\na,1,2,\n", "line 2: z is ''; it must be a finite number"),
     ("case,x,y,z\na,1,2\n", "line 2: z is ''"),
     ("case,x,y,z\na,1,2,3\nb,1,nan,3\n", "line 3: y is 'nan'"),
     ("case,x,y,z\na,1,2,inf\n", "z is 'inf'"),
     ("case,x,y,z\na,1,two,3\n", "y is 'two'"),
     ("case,x,y,z\na,1,5,2,5,3,5\n", "line 2: has more values than columns; write decimals with a point"),
     ("case,x,y,z\n,1,2,3\n", "line 2: case is empty"),
     ("case,x,y,z\na,1,2,3\na,1,2,3\n", "line 3: a has a row already")],
)  # fmt: skip
def test_a_table_that_cannot_be_right_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UsageError) as error:
        read_centre_table(tmp_path / "t.csv")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_table_is_read_as_spreadsheets_write_it(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffcase, x, y, z, note\r\np 1, -1.5, 2e1, 3, left kidney\r\n\r\n".encode())
    read = read_centre_table(tmp_path / "t.csv")
    assert not read.in_voxels and read.places == {"p 1": (-1.5, 20.0, 3.0)}
    for content in (b"case,x,y,z\n\xff\xfe,1,2,3\n", None):
        path = tmp_path / ("bytes.csv" if content else "nowhere.csv")
        _ = path.write_bytes(content) if content else None
        with pytest.raises(UsageError, match="cannot be read as a table"):
            read_centre_table(path)


def test_spacing_and_field_of_view_together_are_refused():
    with pytest.raises(UsageError, match="spacing is 2 and field_of_view is 48 mm; give one of them"):
        replace(CONFIG, spacing=2.0)
    for value in (0, -1.0, math.nan):
        with pytest.raises(ConfigError, match=r"field_of_view is .*; it must be above 0 mm"):
            replace(CONFIG, field_of_view=value)


def test_a_store_is_not_extended_with_another_field_of_view(organs, tmp_path):
    prepare(organs, tmp_path / "out", CONFIG)
    with pytest.raises(UsageError, match=r"spacing is 1\.5, not 3"):
        prepare(organs, tmp_path / "out", replace(CONFIG, field_of_view=96.0))
