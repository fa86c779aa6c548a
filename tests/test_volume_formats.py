"""Volumes in NRRD, MetaImage and NIfTI files: the same voxels in the same places as ITK reads them, or one line."""

from __future__ import annotations

import bz2
import gzip
import struct
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fedfactory.adaptation.evaluation.label_files import find_labels
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.case_files import CaseFiles, Found, LabelFile, Reading
from fedfactory.imaging.cases import find_cases, find_images
from fedfactory.imaging.formats.frames import choose_reading
from fedfactory.imaging.formats.kinds import frames_of
from fedfactory.imaging.image_reader import read_image
from fedfactory.imaging.label_maps import read_label_map
from fedfactory.imaging.volume_files import case_name, read_volume

itk = pytest.importorskip("itk")

UNITS = 123  # offset of the units in a NIfTI-1 header
SHAPE = (5, 6, 4)
TURN = np.array([[0.0, -1.0, 0.0], [0.8, 0.0, -0.6], [0.6, 0.0, 0.8]])
STEPS = TURN * [1.5, 2.0, 4.0]  # columns: from voxel to voxel along each axis, LPS
ORIGIN = np.array([-12.5, 30.25, 7.0])


def voxels(dtype="i2") -> np.ndarray:
    """(5, 6, 4) numbers that are all different."""
    return np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(dtype)


def write_itk(path: Path, data: np.ndarray, *, compression: bool) -> Path:
    image = itk.image_from_array(np.ascontiguousarray(data.T))
    image.SetSpacing(np.linalg.norm(STEPS, axis=0).tolist())
    image.SetOrigin(ORIGIN.tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(TURN)))
    itk.imwrite(image, str(path), compression=compression)
    return path


def as_itk_reads(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (X, Y, Z) and the affine (4, 4) in RAS, by ITK."""
    image = itk.imread(str(path))
    affine = np.eye(4)
    affine[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return itk.array_from_image(image).T, np.diag([-1, -1, 1, 1]) @ affine


def assert_like_itk(path: Path) -> None:
    expected, affine = as_itk_reads(path)
    found = read_volume(path)
    np.testing.assert_array_equal(found.data, expected.astype(np.float32))
    np.testing.assert_allclose(found.affine, affine, atol=1e-6)


@pytest.mark.parametrize("name", ["a.mha", "a.mhd", "a.nrrd", "a.nhdr", "a.NRRD"])
@pytest.mark.parametrize("compression", [False, True], ids=["raw", "packed"])
def test_what_itk_writes_is_read_as_itk_reads_it(tmp_path, name, compression):
    for dtype in ("u1", "i2", "u2", "i4", "f4", "f8"):
        assert_like_itk(write_itk(tmp_path / name, voxels(dtype), compression=compression))


NRRD = "NRRD0004\n# made by hand\ntype: {type}\ndimension: 3\nsizes: 5 6 4\nendian: {endian}\nencoding: raw\n{more}\n\n"


@pytest.mark.parametrize(
    "more",
    [
        "space: right-anterior-superior\nspace directions: (1.5,0,0) (0,2,0) (0,0.5,4)\nspace origin: (1,2,3)",
        "space: RAS\nspace directions: (0, 1.5, 0) (2, 0, 0) (0, 0, -4)\nspace origin: (1, 2, 3)",
        "space: left-posterior-superior\nspace directions: (1.5,0,0) (0,2,0) (0,0,4)\nspace origin: (1,2,3)",
        "space: left-anterior-superior\nspace directions: (1.5,0,0) (0,2,0) (0,0.5,4)\nspace origin: (1,2,3)",
        "space dimension: 3\nspace directions: (1.5,0,0) (0,2,0) (0,0,4)\nspace origin: (1,2,3)",
        "spacings: 1.5 2 4",
        "space: LPS\nspace directions: (1.5,0,0) (0,2,0) (0,0,4)\nkinds: domain domain domain\nkey:=value with: colon",
    ],
)
@pytest.mark.parametrize(("kind", "endian"), [("short", "little"), ("uint16", "big"), ("double", "big")])
def test_nrrd_headers_of_other_programs_are_read_as_itk_reads_them(tmp_path, more, kind, endian):
    path = tmp_path / "a.nrrd"
    code = {"short": "i2", "uint16": "u2", "double": "f8"}[kind]
    data = voxels(("<" if endian == "little" else ">") + code)
    path.write_bytes(NRRD.format(type=kind, endian=endian, more=more).encode() + data.tobytes("F"))
    assert_like_itk(path)


META = "ObjectType = Image\nNDims = 3\nDimSize = 5 6 4\nElementType = {type}\n{more}\nElementDataFile = {data}\n"


@pytest.mark.parametrize(
    ("more", "order"),
    [
        ("ElementSpacing = 1.5 2 4\nOffset = 1 2 3", "<"),
        ("ElementSpacing = 1.5 2 4\nPosition = 1 2 3\nElementByteOrderMSB = True", ">"),
        ("ElementSpacing = 1.5 2 4\nTransformMatrix = 0 1 0 -1 0 0 0 0 1\nBinaryDataByteOrderMSB = True", ">"),
        ("ElementSize = 1.5 2 4\nAnatomicalOrientation = RAI\nCenterOfRotation = 0 0 0", "<"),
    ],
)
def test_meta_image_headers_of_other_programs_are_read_as_itk_reads_them(tmp_path, more, order):
    path, apart = tmp_path / "a.mha", tmp_path / "b.mhd"
    content = voxels(order + "i2").tobytes("F")
    path.write_bytes(META.format(type="MET_SHORT", more=more, data="LOCAL").encode() + content)
    apart.write_bytes(META.format(type="MET_SHORT", more=more + "\nHeaderSize = -1", data="b.raw").encode())
    (tmp_path / "b.raw").write_bytes(b"a header of another format" + content)
    assert_like_itk(path)
    assert_like_itk(apart)


def meta(more: str = "ElementSpacing = 1 1 1", data: str = "LOCAL", kind: str = "MET_UCHAR") -> bytes:
    return META.format(type=kind, more=more, data=data).encode()


def nrrd(more: str = "spacings: 1 1 1", **changes: str) -> bytes:
    text = NRRD.format(type="uchar", endian="little", more=more)
    for old, new in changes.items():
        text = text.replace({"sizes": "sizes: 5 6 4", "raw": "encoding: raw", "magic": "NRRD0004"}[old], new)
    return text.encode()


BYTES = voxels("u1").tobytes("F")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.mha", meta() + BYTES[:-1], "more than the file can hold"),
        ("a.mha", meta("Offset = 0 0 0") + BYTES, "no voxel size"),
        ("a.mha", meta("ElementSpacing = 1 0 1") + BYTES, "all must be positive"),
        ("a.mha", meta("ElementSpacing = 1 nan 1") + BYTES, "all must be positive"),
        ("a.mha", meta("ElementSpacing = 1 1") + BYTES, "it must be 3 numbers"),
        ("a.mha", meta("ElementSpacing = 1 1 1\nElementNumberOfChannels = 3") + BYTES * 3, "3 numbers for each voxel"),
        ("a.mha", meta(kind="MET_BOOL") + BYTES, "ElementType is 'MET_BOOL'"),
        ("a.mha", meta().replace(b"5 6 4", b"99999 99999 99999") + BYTES, "claims"),
        ("a.mha", meta().replace(b"5 6 4", b"0 6 4") + BYTES, "is empty"),
        ("a.mha", meta().replace(b"5 6 4", b"5 6 x") + BYTES, "DimSize"),
        ("a.mha", meta().replace(b"5 6 4", b"5 6 4 2") + BYTES * 2, "must be 4 numbers"),
        ("a.mha", meta("ElementSpacing = 1 1 1\nCompressedData = True") + zlib.compress(BYTES)[:-9], "copy it again"),
        ("a.mha", meta("ElementSpacing = 1 1 1\nCompressedData = True") + BYTES, "cannot be read"),
        ("a.mha", b"\x00\xff" * 300, "is no MetaImage file"),
        ("a.mha", b"ObjectType = Image\nNDims = 3\n", "header"),
        ("a.mhd", meta(data="../a.raw"), "only one file in the folder"),
        ("a.mhd", meta(data="/etc/passwd"), "only one file in the folder"),
        ("a.mhd", meta(data="LIST") + b"a.raw\n", "which is not there"),
        ("a.mhd", meta(data="s%03d.raw 1 4 1"), "which is not there"),
        ("a.mhd", meta(data="a.raw"), "which is not there"),
        ("a.nrrd", nrrd() + BYTES[:-1], "more than the file can hold"),
        ("a.nrrd", nrrd("") .replace(b"\n\n\n", b"\n\n") + BYTES, "no voxel size"),
        ("a.nrrd", nrrd("spacings: 1 -1 1") + BYTES, "all must be positive"),
        ("a.nrrd", nrrd("space: 3D-left-handed\nspace directions: (1,0,0) (0,1,0) (0,0,1)") + BYTES, "space is"),
        ("a.nrrd", nrrd("space: LPS\nspace directions: (1,0,0) (0,1,0) (0,0,0)") + BYTES, "axis of 0 mm"),
        ("a.nrrd", nrrd("space: LPS\nspace directions: (1,0,0) (0,1,0)") + BYTES, "must be 3 vectors"),
        ("a.nrrd", nrrd("space: LPS\nspace directions: none (0,1,0) (0,0,1)") + BYTES, "2 axes of space"),
        ("a.nrrd", nrrd(sizes="sizes: 9 9 99999999999") + BYTES, "claims"),
        ("a.nrrd", nrrd(raw="encoding: hex") + BYTES, "raw, gzip or bzip2"),
        ("a.nrrd", nrrd(raw="encoding: bzip2") + bz2.compress(BYTES)[:-9], "cannot be read"),
        ("a.nrrd", nrrd(raw="encoding: bzip2") + BYTES, "cannot be read"),
        ("a.nrrd", nrrd(raw="encoding: bz2") + bz2.compress(BYTES + b"more"), "its header claims 120"),
        ("a.nrrd", nrrd(raw="encoding: bzip2", sizes="sizes: 900 900 900") + bz2.compress(bytes(900)), "claims"),
        ("a.nrrd", nrrd(raw="encoding: gzip") + gzip.compress(BYTES)[:-9], "cannot be read"),
        ("a.nrrd", nrrd(raw="encoding: gzip") + gzip.compress(BYTES + b"more"), "its header claims 120"),
        ("a.nrrd", nrrd(magic="NOPE0004") + BYTES, "is no NRRD file"),
        ("a.nhdr", nrrd("spacings: 1 1 1\ndata file: ../a.raw"), "only one file in the folder"),
        ("a.nhdr", nrrd("spacings: 1 1 1\ndata file: LIST"), "which is not there"),
        ("a.nhdr", nrrd("spacings: 1 1 1\ndata file: s%03d.raw 1 4 1"), "which is not there"),
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_header_is_one_line(tmp_path, name, content, message):
    (tmp_path / "inside").mkdir()
    (tmp_path / "a.raw").write_bytes(BYTES)  # outside of the folder
    path = tmp_path / "inside" / name
    path.write_bytes(content)
    with pytest.raises(VolumeError, match=message) as error:
        read_volume(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("encoding", ["bz2", "bzip2"])
def test_voxels_packed_by_bzip2_are_those_of_the_raw_file(tmp_path, encoding):
    (tmp_path / "raw.nrrd").write_bytes(nrrd() + BYTES)
    (tmp_path / "packed.nrrd").write_bytes(nrrd(raw=f"encoding: {encoding}") + bz2.compress(BYTES))
    raw, packed = read_volume(tmp_path / "raw.nrrd"), read_volume(tmp_path / "packed.nrrd")
    np.testing.assert_array_equal(packed.data, raw.data)
    np.testing.assert_array_equal(packed.affine, raw.affine)


def test_packed_voxels_are_unpacked_no_further_than_the_header_announces(tmp_path, monkeypatch):
    bomb = zlib.compress(bytes(1 << 26))
    (tmp_path / "a.mha").write_bytes(meta("ElementSpacing = 1 1 1\nCompressedData = True") + bomb)
    with pytest.raises(VolumeError, match="holds 121 bytes of voxels"):
        read_volume(tmp_path / "a.mha")


def test_the_unit_of_length_that_a_text_header_names_is_converted_to_millimetres(tmp_path):
    more = 'space: LPS\nspace directions: (15,0,0) (0,20,0) (0,0,40)\nspace units: "um" "um" "um"'
    (tmp_path / "a.nrrd").write_bytes(nrrd(more) + BYTES)
    (tmp_path / "a.mha").write_bytes(meta("ElementSpacing = 0.15 0.2 0.4\nDistanceUnits = cm") + BYTES)
    np.testing.assert_allclose(read_volume(tmp_path / "a.nrrd").spacing, (0.015, 0.02, 0.04))
    np.testing.assert_allclose(read_volume(tmp_path / "a.mha").spacing, (1.5, 2, 4))


def test_frames_lie_along_the_axis_that_is_none_of_space(tmp_path):
    """As sequences of 3D Slicer have it: the first axis; a layered segmentation and colours look alike and are none."""
    data = np.arange(3 * 120, dtype="u1").reshape(3, *SHAPE)
    head = (
        "NRRD0005\ntype: uchar\ndimension: 4\nsizes: 3 5 6 4\nencoding: raw\nspace: LPS\nkinds: {} domain domain domain"
        "\nspace directions: none (1,0,0) (0,1,0) (0,0,1)\n{}\n"
    )
    path = tmp_path / "a.seq.nrrd"
    path.write_bytes(head.format("list", "").encode() + data.tobytes("F"))
    assert frames_of(path) == 3
    np.testing.assert_array_equal(read_volume(path, reading=Reading(frame=2)).data, data[1])
    with pytest.raises(VolumeError, match=r"3 frames of 5 x 6 x 4 voxels.*--frames"):
        read_volume(path)
    path.write_bytes(head.format("list", "Segment0_ID:=a\n").encode() + data.tobytes("F"))
    with pytest.raises(VolumeError, match="3 layers of overlapping segments"):
        read_volume(path)
    path.write_bytes(head.format("RGB-color", "").encode() + data.tobytes("F"))
    with pytest.raises(VolumeError, match="3 numbers for each voxel"):
        read_volume(path)


def test_header_and_voxels_are_one_case_whose_digest_knows_both(tmp_path):
    for key in ("image", "label"):
        folder = tmp_path / "case1" / key
        folder.mkdir(parents=True)
        write_itk(folder / "a.mhd", voxels("u1"), compression=False)
    write_itk(tmp_path / "case1" / "image" / "a.mhd", voxels("f4"), compression=True)
    (case,) = find_cases(tmp_path).cases
    assert sorted(path.name for path in case.files) == ["a.mhd", "a.mhd", "a.raw", "a.zraw"]
    assert read_image(case.channels).shape == SHAPE


def test_every_way_of_finding_takes_the_other_formats(tmp_path):
    for name in ("a.mha", "b.nrrd", "c.nhdr"):
        write_itk(tmp_path / name, voxels("u1"), compression=False)
    (tmp_path / "a.mha").rename(tmp_path / "a.MHA")
    assert read_volume(tmp_path / "a.MHA").data.shape == SHAPE
    assert [case.name for case in find_images([tmp_path]).cases] == ["a", "b", "c"]
    assert [case.name for case in find_images([tmp_path / "b.nrrd"]).cases] == ["b"]
    assert sorted(find_labels(tmp_path)) == ["a", "b", "c"]
    assert [case_name(Path(name)) for name in ("x.NII.gz", "x.nii", "a.b.mha", "c.seg.nrrd")] == [
        "x", "x", "a.b", "c.seg",
    ]  # fmt: skip
    (tmp_path / "set" / "imagesTr").mkdir(parents=True)
    (tmp_path / "set" / "labelsTr").mkdir()
    (tmp_path / "set" / "dataset.json").write_text('{"channel_names": {"0": "MR"}, "file_ending": ".nrrd"}')
    write_itk(tmp_path / "set" / "imagesTr" / "a_0000.nrrd", voxels("f4"), compression=True)
    write_itk(tmp_path / "set" / "labelsTr" / "a.nrrd", voxels("u1"), compression=True)
    (case,) = find_cases(tmp_path / "set").cases
    assert [label.path.name for label in case.labels] == ["a.nrrd"]


# NIfTI


def nifti(data: np.ndarray, affine: np.ndarray | None = None, unit: int = 2) -> bytes:
    raw = bytearray(nib.Nifti1Image(data, np.diag([2.0, 3, 4, 1]) if affine is None else affine).to_bytes())
    raw[UNITS] = unit
    return bytes(raw)


@pytest.mark.parametrize(("unit", "factor"), [(0, 1.0), (1, 1000.0), (2, 1.0), (3, 0.001), (3 + 16, 0.001), (8, 1.0)])
def test_the_unit_of_length_of_nifti_is_converted_to_millimetres(tmp_path, unit, factor):
    """Bits of the unit of time, 8 for seconds and 16 for milliseconds, are none of length."""
    affine = np.diag([0.02, 0.03, 0.04, 1.0])
    affine[:3, 3] = (0.1, -0.2, 0.3)
    (tmp_path / "a.nii").write_bytes(nifti(voxels(), affine, unit))
    np.testing.assert_allclose(read_volume(tmp_path / "a.nii").affine[:3], affine[:3] * factor, rtol=1e-6)


def test_a_unit_that_cannot_be_is_refused(tmp_path):
    (tmp_path / "a.nii").write_bytes(nifti(voxels(), unit=1))
    with pytest.raises(VolumeError, match="metres as the unit, which makes voxels of 4000 mm"):
        read_volume(tmp_path / "a.nii")


def test_whether_a_file_is_packed_is_told_by_its_content(tmp_path):
    content = nifti(voxels())
    (tmp_path / "a.nii").write_bytes(gzip.compress(content))
    (tmp_path / "b.nii.gz").write_bytes(content)
    for name in ("a.nii", "b.nii.gz"):
        np.testing.assert_array_equal(read_volume(tmp_path / name).data, voxels())
    (tmp_path / "a.nii").write_bytes(gzip.compress(content)[:-10])
    with pytest.raises(VolumeError, match="cannot be read as NIfTI"):
        read_volume(tmp_path / "a.nii")


def test_a_packed_file_is_unpacked_no_further_than_its_header_announces(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(nifti(voxels()) + bytes(1 << 26)))
    with pytest.raises(VolumeError, match="has more than the 592 bytes of its header"):
        read_volume(tmp_path / "a.nii.gz")


@pytest.mark.parametrize("offset", [0.0, 100.0, -1.0, 1e9, float("inf"), float("nan")])
def test_a_header_that_hides_where_voxels_begin_is_refused(tmp_path, offset):
    raw = bytearray(nifti(voxels()))
    struct.pack_into("<f", raw, 108, offset)
    (tmp_path / "a.nii").write_bytes(raw)
    with pytest.raises(VolumeError):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("more", [(1,), (1, 1), (1, 1, 1, 1)])
def test_axes_of_length_one_are_dropped(tmp_path, more):
    (tmp_path / "a.nii").write_bytes(nifti(voxels().reshape(*SHAPE, *more)))
    assert read_volume(tmp_path / "a.nii").data.shape == SHAPE
    assert frames_of(tmp_path / "a.nii") == 1


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((*SHAPE, 1, 3), "f4"), "5-D .* 3 numbers for each voxel, such as a vector field"),
        (np.zeros((*SHAPE, 2, 3), "f4"), "5-D"),
        (np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours"),
        (np.zeros(SHAPE, "c8"), "complex"),
        (np.zeros(SHAPE[:2], "f4"), "2-D"),
        (np.zeros((5, 6, 1, 7), "f4"), "4-D, 7 frames of 5 x 6 x 1 voxels"),
    ],
)
def test_what_is_no_volume_is_said(tmp_path, data, message):
    (tmp_path / "a.nii").write_bytes(nifti(data))
    with pytest.raises(VolumeError, match=message):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
@pytest.mark.parametrize("shape", [(5, 6, 4), (2, 2, 2)])  # small ones lie whole in the bytes that are read first
def test_a_frame_is_read_alone(tmp_path, packed, kind, shape):
    data = np.arange(np.prod(shape) * 3, dtype=np.int16).reshape(*shape, 3)
    image = kind(data, np.eye(4))
    image.header.set_slope_inter(0.5, 10)
    content = image.to_bytes()
    (tmp_path / "a.nii").write_bytes(gzip.compress(content) if packed else content)
    expected = np.asarray(image.from_bytes(content).dataobj)
    for frame in (1, 2, 3):
        found = read_volume(tmp_path / "a.nii", reading=Reading(frame=frame))
        np.testing.assert_allclose(found.data, expected[..., frame - 1])
    with pytest.raises(VolumeError, match="has no frame 4; it has the frames 1 to 3"):
        read_volume(tmp_path / "a.nii", reading=Reading(frame=4))
    (tmp_path / "a.nii").write_bytes(content[:-3])
    with pytest.raises(VolumeError, match=r"more than the file can hold|cannot be read"):
        read_volume(tmp_path / "a.nii", reading=Reading(frame=3))


# Frames as cases


def cine(folder: Path, *, image: int = 3, label: int | None = 3, channels: int = 1) -> Found:
    folder.mkdir(exist_ok=True)

    def write(name: str, frames: int) -> Path:
        data = np.stack([voxels() + k for k in range(frames)], axis=3) if frames > 1 else voxels()
        (folder / name).write_bytes(nifti(data))
        return folder / name

    images = tuple(write(f"i{k}.nii", image + k) for k in range(channels))
    labels = () if label is None else (LabelFile(write("l.nii", label)),)
    return Found([CaseFiles("anna", images, labels)])


def chosen(found: Found, frames: str | None) -> dict[str, int | None]:
    choose_reading(found, frames=frames, nan=None)
    return {case.name: case.reading.frame for case in found.cases}


def test_every_frame_is_a_case_of_the_same_subject(tmp_path):
    found = cine(tmp_path)
    assert chosen(found, "each") == {"anna_frame01": 1, "anna_frame02": 2, "anna_frame03": 3}
    assert {case.subject for case in found.cases} == {"anna"}
    for number, case in enumerate(found.cases):
        np.testing.assert_array_equal(read_image(case.channels, reading=case.reading).shown(), voxels() + number)


@pytest.mark.parametrize("packed", [False, True])
def test_frames_whose_label_maps_mark_nothing_have_no_labels(tmp_path, packed):
    """Often the frames of end-diastole and end-systole are drawn alone; the others are no background."""
    found = cine(tmp_path)
    label = np.zeros((*SHAPE, 3), "u1")
    label[1, 1, 1, 1] = 1
    content = nifti(label)
    found.cases[0].labels[0].path.write_bytes(gzip.compress(content) if packed else content)
    choose_reading(found, frames="each", nan=None)
    assert [bool(case.labels) for case in found.cases] == [False, True, False]
    assert found.remarks == {"anna": "2 of 3 frames have no labels: their label maps mark nothing"}
    for frames, labelled in (("first", False), ("2", True)):
        one = Found([CaseFiles("anna", found.cases[0].channels, (LabelFile(tmp_path / "l.nii"),))])
        choose_reading(one, frames=frames, nan=None)
        assert bool(one.cases[0].labels) == labelled


def test_several_label_maps_of_one_image_are_named(tmp_path):
    (case,) = cine(tmp_path, image=1, label=2).cases
    with pytest.raises(VolumeError, match="holds 2 volumes, its image one"):
        read_label_map(case, read_image(case.channels))


def test_one_frame_keeps_the_name(tmp_path):
    assert chosen(cine(tmp_path), "first") == {"anna": 1}
    assert chosen(cine(tmp_path), "3") == {"anna": 3}
    assert chosen(cine(tmp_path, image=1, label=1), "3") == {"anna": None}  # a single volume has no frames
    assert chosen(cine(tmp_path), None) == {"anna": None}


@pytest.mark.parametrize(
    ("frames", "given", "message"),
    [
        ("each", {"label": 1}, "is of one frame, the image has 3; say which one by its number"),
        ("first", {"label": 1}, "is of one frame"),
        ("each", {"label": 2}, "holds 2 frames, the image 3"),
        ("2", {"label": 2}, "holds 2 frames, the image 3"),
        ("4", {"label": None}, "has no frame 4; it has the frames 1 to 3"),
        ("each", {"label": None, "channels": 2}, "holds 3 frames, another channel 4"),
    ],
)
def test_frames_that_do_not_fit_together_are_named(tmp_path, frames, given, message):
    found = cine(tmp_path, **given)
    assert chosen(found, frames) == {}
    (problem,) = found.problems.values()
    assert message in problem


def test_a_label_map_of_one_frame_belongs_to_the_number_that_is_given(tmp_path):
    assert chosen(cine(tmp_path, label=1), "2") == {"anna": 2}


@pytest.mark.parametrize(("frames", "nan"), [("0", None), ("-1", None), ("all", None), ("1.5", None), (None, "zero")])
def test_other_choices_are_refused(frames, nan):
    with pytest.raises(UsageError, match="choose"):
        choose_reading(Found(), frames=frames, nan=nan)


# NaN


def test_nan_and_infinity_become_the_lowest_finite_value_of_their_image(tmp_path):
    data = voxels("f4") + 10
    data[0], data[1, 1, 1] = np.nan, np.inf
    (tmp_path / "a.nii").write_bytes(nifti(data))
    with pytest.raises(VolumeError, match=r"25 voxels are NaN or infinite; .*--nan background"):
        read_volume(tmp_path / "a.nii")
    found = read_volume(tmp_path / "a.nii", reading=Reading(nan="background")).data
    known = np.isfinite(data)
    np.testing.assert_array_equal(found[known], data[known])
    assert set(found[~known]) == {data[known].min()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("nan", ["refuse", "background"])
def test_an_image_of_nan_alone_is_refused_without_a_warning(tmp_path, nan):
    (tmp_path / "a.nii").write_bytes(nifti(np.full(SHAPE, np.nan, "f4")))
    with pytest.raises(VolumeError, match="all voxels are NaN or infinite"):
        read_volume(tmp_path / "a.nii", reading=Reading(nan=nan))


def test_nan_in_labels_is_never_background(tmp_path):
    data = voxels("f4") * np.nan
    data[1:] = 0
    (tmp_path / "a.nii").write_bytes(nifti(data))
    with pytest.raises(VolumeError, match="NaN"):
        read_volume(tmp_path / "a.nii", integer=True, reading=Reading(nan="background"))


# What lies in the place of a volume.

WRONG = {
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "is a pointer of Git LFS"),
    "page": (b"\xef\xbb\xbf\n<!DOCTYPE html><html>404</html>", "is a web page"),
    "zip": (b"PK\x03\x04" + bytes(600), "is a ZIP archive; unpack it"),
    "zeros": (bytes(4000), "holds zeros"),
    "bzip2": (b"BZh91AY" + bytes(600), "packed by bzip2"),
    "PNG": (b"\x89PNG\r\n\x1a\n" + bytes(600), "is a PNG picture"),
    "DICOM": (bytes(128) + b"DICM" + b"\x02\0\0\0UL\4\0" * 100, "is a DICOM file; give the folder of its series"),
    "pair": (
        nib.Nifti1Pair(np.zeros((2, 2, 2), np.uint8), np.eye(4)).header.binaryblock + bytes(200),
        "of a pair of files",
    ),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(600), "is an HDF5 or MINC file"),
}


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("kind", WRONG)
def test_a_file_that_is_no_volume_is_called_what_it_is(kind, name, tmp_path):
    content, words = WRONG[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VolumeError, match=f"is no .* file; it .*{words}"):
        read_volume(tmp_path / name)


def test_a_file_that_is_packed_twice_is_called_so(tmp_path):
    (tmp_path / "a.nii.gz").write_bytes(gzip.compress(gzip.compress(bytes(1000))))
    with pytest.raises(VolumeError, match="is no NIfTI file; it is packed twice by gzip; unpack it once"):
        read_volume(tmp_path / "a.nii.gz")


def test_nan_in_labels_is_not_sent_to_an_option_that_does_not_help(tmp_path):
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), np.nan, np.float32), np.eye(4)), tmp_path / "l.nii")
    with pytest.raises(VolumeError, match="8 voxels are NaN or infinite; labels must be whole numbers, so write 0"):
        read_volume(tmp_path / "l.nii", integer=True)
