"""Where written files lie: label maps open over their images in ITK, in nibabel, and by the header alone."""

from __future__ import annotations

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fedfactory.errors import VolumeError
from fedfactory.imaging.images import VolumeImage, on_grid_of
from fedfactory.imaging.nifti.geometry import NiftiGeometry
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume, corner_distance, grid_tolerance

itk = pytest.importorskip("itk")

SHAPE = (7, 6, 5)
GEOMETRY_FIELDS = (
    "pixdim", "qform_code", "sform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "srow_x", "srow_y", "srow_z",
)  # fmt: skip
FREE_TEXTS = ("descrip", "aux_file", "intent_name", "db_name")


def oblique(sides=(1.25, 1.5, 4.0), degrees=(12.3, -7.1), flip=False) -> np.ndarray:
    a, b = np.deg2rad(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_z = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = about_x @ about_z @ np.diag([-1.0 if flip else 1.0, 1, 1]) @ np.diag(sides)
    affine[:3, 3] = -123.4567, 98.7654, -456.789
    return affine


def sheared(affine: np.ndarray, by: float = 0.02) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 1] += by * affine[:3, 0]
    return moved


def shifted(affine: np.ndarray, by: float) -> np.ndarray:
    moved = affine.copy()
    moved[:3, 3] += by
    return moved


def write_image(path: Path, *, qform=None, sform=None, codes=(0, 0), edit=None, kind=nib.Nifti1Image) -> Path:
    header = kind.header_class()
    header.set_data_dtype(np.float32)
    header["pixdim"][1:4] = 1.25, 1.5, 4.0
    if qform is not None:
        header.set_qform(qform, 1)
    if sform is not None:
        header.set_sform(sform, 1)
    header["qform_code"], header["sform_code"] = codes
    header.set_xyzt_units("mm", "sec")
    for name in set(FREE_TEXTS) & set(header.keys()):
        header[name] = b"DOE^JANE"
    if edit is not None:
        edit(header)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    nib.save(kind(data, None, header), path)
    return path


def itk_affine(path: Path) -> np.ndarray:
    image = itk.imread(str(path), itk.F)
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return np.diag([-1.0, -1, 1, 1]) @ affine


def label_beside(path: Path) -> Path:
    """A label map written on the grid of an image that was read."""
    image = VolumeImage(path, [read_volume(path)])
    out = path.with_name("label.nii.gz")
    write_volume(out, image.volume(np.ones(SHAPE, np.uint8)))
    return out


GOOD = oblique()
IN_METRES = np.diag([0.001, 0.001, 0.001, 1.0]) @ GOOD
HEADERS = {
    "both, scanner": {"qform": GOOD, "sform": GOOD, "codes": (1, 1)},
    "both, MNI": {"qform": GOOD, "sform": GOOD, "codes": (4, 4)},
    "both, aligned to something": {"qform": GOOD, "sform": shifted(GOOD, 5.0), "codes": (1, 2)},
    "sform alone": {"sform": GOOD, "codes": (0, 1)},
    "sform alone, aligned": {"sform": GOOD, "codes": (0, 2)},
    "qform alone": {"qform": GOOD, "codes": (1, 0)},
    "qform alone, Talairach": {"qform": GOOD, "codes": (3, 0)},
    "sheared sform, good qform": {"qform": GOOD, "sform": sheared(GOOD), "codes": (1, 1)},
    "sheared sform of MNI, good qform": {"qform": GOOD, "sform": sheared(GOOD), "codes": (1, 4)},
    "left-handed": {"qform": oblique(flip=True), "sform": oblique(flip=True), "codes": (1, 1)},
    "left-handed qform alone": {"qform": oblique(flip=True), "codes": (1, 0)},
    "no code": {"qform": GOOD, "codes": (0, 0)},
    "metres": {
        "qform": IN_METRES,
        "sform": IN_METRES,
        "codes": (1, 1),
        "edit": lambda header: header.set_xyzt_units("meter"),
    },
    "micrometres": {"qform": GOOD, "codes": (1, 0), "edit": lambda header: header.set_xyzt_units("micron")},
    "no unit": {"sform": GOOD, "codes": (0, 1), "edit": lambda header: header.set_xyzt_units(0)},
    "NIfTI-2": {"qform": GOOD, "sform": sheared(GOOD), "codes": (1, 1), "kind": nib.Nifti2Image},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_label_map_lies_where_its_image_lies(name, tmp_path):
    path = write_image(tmp_path / "image.nii.gz", **HEADERS[name])
    label = label_beside(path)
    before, after = nib.load(path).header, nib.load(label).header
    assert type(before) is type(after)
    for field in GEOMETRY_FIELDS:
        np.testing.assert_array_equal(after[field], before[field], err_msg=field)
    assert after.get_xyzt_units()[0] == before.get_xyzt_units()[0]
    np.testing.assert_array_equal(nib.load(label).affine, nib.load(path).affine)
    if name != "NIfTI-2":  # which ITK does not read
        np.testing.assert_array_equal(itk_affine(label), itk_affine(path))  # the shear alone could not be read
    assert nib.load(label).get_data_dtype() == np.uint8


@pytest.mark.parametrize("qfac", [0.0, 3.0, -1.0])
def test_a_sign_of_the_qform_is_kept_as_it_is_stored(qfac, tmp_path):
    path = write_image(tmp_path / "image.nii", qform=GOOD, codes=(1, 0))
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 76, qfac)
    path.write_bytes(content)
    label = label_beside(path)
    np.testing.assert_array_equal(itk_affine(label), itk_affine(path))
    np.testing.assert_array_equal(nib.load(label).affine, nib.load(path).affine)


def test_an_image_of_the_other_byte_order_keeps_its_place(tmp_path):
    path = write_image(tmp_path / "image.nii", qform=GOOD, sform=sheared(GOOD), codes=(1, 1))
    swapped = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(swapped.dataobj), None, swapped.header.as_byteswapped()), tmp_path / "big.nii")
    label = label_beside(tmp_path / "big.nii")
    np.testing.assert_array_equal(itk_affine(label), itk_affine(path))
    np.testing.assert_array_equal(nib.load(label).affine, nib.load(path).affine)


def test_texts_of_a_header_are_not_copied(tmp_path):
    path = write_image(tmp_path / "image.nii", qform=GOOD, sform=GOOD, codes=(1, 1))
    image = nib.load(path)
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"DOE^JANE"))
    nib.save(image, path)
    assert b"DOE^JANE" in path.read_bytes()
    write_volume(tmp_path / "label.nii", VolumeImage(path, [read_volume(path)]).volume(np.ones(SHAPE, np.uint8)))
    assert b"DOE" not in (tmp_path / "label.nii").read_bytes()


@pytest.mark.parametrize("affine", [GOOD, oblique(flip=True), np.diag([2.0, 2, 4, 1]), np.diag([-2.0, -2, 4, 1])])
def test_a_volume_without_a_header_lies_alike_by_qform_and_sform(affine, tmp_path):
    path = tmp_path / "label.nii.gz"
    write_volume(path, Volume(np.ones(SHAPE, np.uint8), affine))
    header = nib.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (1, 1)
    assert header.get_xyzt_units()[0] == "mm"
    for found in (header.get_qform(), header.get_sform(), itk_affine(path)):
        np.testing.assert_allclose(found, affine, atol=1e-4)


def test_the_tilted_grid_of_a_scanner_is_readable_everywhere(tmp_path):
    tilted = np.diag([0.5, 0.5, 3.0, 1.0])
    tilted[1, 2] = 1.2  # a gantry tilt: slices move along their columns
    path = tmp_path / "label.nii.gz"
    write_volume(path, Volume(np.ones(SHAPE, np.uint8), tilted))
    np.testing.assert_allclose(nib.load(path).affine, tilted, atol=1e-6)
    seen = itk_affine(path)  # it cannot hold a shear: the first slice is right, and slices are as far apart as they are
    np.testing.assert_allclose(seen[:, :2], tilted[:, :2], atol=1e-5)
    np.testing.assert_allclose(seen[:3, 2], [0, 0, np.hypot(3.0, 1.2)], atol=1e-5)


def test_probabilities_lie_where_their_image_lies(tmp_path):
    path = write_image(tmp_path / "image.nii.gz", **HEADERS["sheared sform, good qform"])
    image = VolumeImage(path, [read_volume(path)])
    write_volume(tmp_path / "p.nii.gz", image.volume(np.ones((*SHAPE, 3), np.float32)))
    written = nib.load(tmp_path / "p.nii.gz")
    assert written.shape == (*SHAPE, 3)
    np.testing.assert_array_equal(written.affine, nib.load(path).affine)
    np.testing.assert_allclose(written.header.get_qform(), GOOD, atol=1e-4)


def test_turned_volumes_do_not_take_a_header_along_that_is_no_longer_theirs(tmp_path):
    volume = read_volume(write_image(tmp_path / "image.nii.gz", **HEADERS["both, scanner"]))
    assert volume.geometry is not None
    turned = volume.turned("sagittal")
    assert turned.geometry is None
    write_volume(tmp_path / "turned.nii.gz", turned)
    np.testing.assert_allclose(nib.load(tmp_path / "turned.nii.gz").affine, turned.affine, atol=1e-4)


def labels_on(affine: np.ndarray, shape=SHAPE) -> Volume:
    return Volume(np.arange(np.prod(shape)).reshape(shape).astype(np.uint16), affine)


def test_the_distance_of_grids_is_that_of_their_furthest_corners():
    one = np.diag([1.0, 1.0, 4.0, 1.0])
    other = np.diag([1.009, 1.009, 4.0, 1.0])
    # 256 voxels end at 255.5 times the size, on both axes
    assert corner_distance(one, other, (256, 256, 4)) == pytest.approx(0.009 * 255.5 * 2**0.5)
    assert corner_distance(one, shifted(one, 0.5), SHAPE) == pytest.approx(0.5 * 3**0.5)
    turned = np.diag([-1.0, 1.0, 4.0, 1.0])
    assert corner_distance(one, turned, (10, 5, 2)) == pytest.approx(2 * 9.5)


@pytest.mark.parametrize(
    ("moved", "accepted"),
    [
        (GOOD.astype(np.float32).astype(float), True),  # rounded, as headers are
        (shifted(GOOD, 0.011 / 3**0.5), True),  # an origin 0.011 mm off
        (shifted(GOOD, 0.12 / 3**0.5), True),
        (shifted(GOOD, 0.13 / 3**0.5), False),  # the shortest side is 1.25 mm
        (GOOD @ np.diag([1.02, 1, 1, 1]), False),  # 0.16 mm at the far end
        (GOOD @ np.diag([1.001, 1.001, 1.001, 1]), True),
        (oblique(degrees=(12.3, -8.1)), False),
        (sheared(GOOD), False),
    ],
)
def test_grids_are_equal_up_to_a_tenth_of_a_voxel_at_their_corners(moved, accepted):
    image, label = labels_on(GOOD), labels_on(moved)
    assert grid_tolerance(GOOD) == pytest.approx(0.125)
    if accepted:
        found = on_grid_of(image, label, Path("label.nii"))
        np.testing.assert_array_equal(found.data, label.data)
        np.testing.assert_array_equal(found.affine, image.affine)
    else:
        with pytest.raises(VolumeError, match=r"label.nii: its affine differs .* mm apart, 0.12 mm are allowed"):
            on_grid_of(image, label, Path("label.nii"))


def test_small_differences_of_the_size_add_up_over_many_voxels():
    one, other = np.diag([1.0, 1, 4, 1]), np.diag([1.009, 1.009, 4, 1])
    shape = (256, 256, 4)
    image, label = (Volume(np.zeros(shape, np.uint8), affine) for affine in (one, other))
    with pytest.raises(VolumeError, match=r"up to 3.25 mm apart, 0.1 mm are allowed"):
        on_grid_of(image, label, Path("label.nii"))
    small = (4, 4, 4)
    on_grid_of(*(Volume(np.zeros(small, np.uint8), affine) for affine in (one, other)), Path("label.nii"))


@pytest.mark.parametrize("angle", [45.0, -45.0, 135.0])
def test_the_axes_of_one_grid_are_matched_however_it_is_tilted(angle):
    """At 45 degrees, rounding decides which axis of the body a voxel axis lies nearest to."""
    affine = oblique((1.0, 1.0, 1.0), (angle, 0.0))
    data = labels_on(affine, (5, 5, 5)).data
    for noise in np.random.default_rng(0).normal(size=(8, 4, 4)) * 1e-9:
        noise[3] = 0
        image = Volume(data, affine)
        found = on_grid_of(image, Volume(data, affine + noise), Path("label.nii"))
        np.testing.assert_array_equal(found.data, data)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2), (2, 1, 0)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (1, -1, -1), (-1, -1, -1)])
def test_a_label_map_in_another_axis_order_is_turned(order, flips):
    image = labels_on(GOOD)
    turn = np.array(list(zip(order, flips, strict=True)))
    stored = nib.orientations.apply_orientation(image.data, turn)
    affine = GOOD @ nib.orientations.inv_ornt_aff(turn, SHAPE)
    found = on_grid_of(image, Volume(stored, affine), Path("label.nii"))
    np.testing.assert_array_equal(found.data, image.data)


def test_what_was_drawn_by_the_qform_of_an_image_lies_on_it(tmp_path):
    path = write_image(tmp_path / "image.nii.gz", **HEADERS["sheared sform, good qform"])
    shown = itk.imread(str(path), itk.F)  # ITK takes the qform, and writes it as both
    values = np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(np.int16)
    drawn = itk.image_from_array(np.ascontiguousarray(values.T))
    drawn.CopyInformation(shown)
    itk.imwrite(drawn, str(tmp_path / "label.nii.gz"))
    image, label = read_volume(path), read_volume(tmp_path / "label.nii.gz", integer=True)
    assert corner_distance(image.affine, label.affine, SHAPE) > grid_tolerance(image.affine)
    found = on_grid_of(image, label, tmp_path / "label.nii.gz")
    np.testing.assert_array_equal(found.data, values)
    np.testing.assert_array_equal(found.affine, image.affine)
    # and the other way round, as a reference beside a label map of `segment`
    np.testing.assert_array_equal(on_grid_of(label, image, path).affine, label.affine)


def test_equal_qforms_do_not_make_different_grids_equal(tmp_path):
    """Programs that move an image by its sform may leave the qform behind."""
    parts = [
        read_volume(write_image(tmp_path / f"{by}.nii.gz", qform=GOOD, sform=shifted(GOOD, by), codes=(1, 2)))
        for by in (3.0, 9.0)
    ]
    with pytest.raises(VolumeError, match="its affine differs"):
        on_grid_of(*parts, Path("label.nii"))


def test_a_damaged_qform_is_no_place(tmp_path):
    def broken(header):
        header["quatern_b"] = np.nan

    path = write_image(tmp_path / "image.nii.gz", qform=GOOD, sform=GOOD, codes=(1, 1), edit=broken)
    assert read_volume(path).geometry.qform_affine is None
    assert NiftiGeometry.of_header(nib.Nifti1Header()).qform_affine is None
    with pytest.raises(VolumeError, match="its affine differs"):
        on_grid_of(read_volume(path), labels_on(shifted(GOOD, 3.0)), Path("label.nii"))
