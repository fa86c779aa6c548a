"""Folders as archives, scanners and CDs leave them: every DICOM file is read, passed over with a reason, or refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.archive.folder_content import content_of
from fedfactory.imaging.archive.headers import ELEMENTS, is_dicom, read_header
from fedfactory.imaging.archive.series import find_series, itk_library, read_grid
from fedfactory.imaging.case_files import Found
from fedfactory.imaging.cases import find_cases, find_images
from fedfactory.imaging.volume_files import read_volume

pydicom = pytest.importorskip("pydicom", reason="writes the files")

STORAGE = "1.2.840.10008.5.1.4.1.1."
MR, ENHANCED_MR, CAPTURE = f"{STORAGE}4", f"{STORAGE}4.1", f"{STORAGE}7"
SHAPE = (6, 5, 4)
SPACING = (1.5, 2.0, 3.0)


def voxels(seed: int = 0, shape=SHAPE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(np.int16)


def dataset(sop_class: str, uid: str, *, preamble: bool = True, **values):
    """A DICOM data set with what every object has, and other elements."""
    from pydicom.dataset import Dataset, FileMetaDataset

    made = Dataset()
    if preamble:
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        made.file_meta.MediaStorageSOPClassUID, made.file_meta.MediaStorageSOPInstanceUID = sop_class, uid
    made.SOPClassUID, made.SOPInstanceUID, made.Modality, made.PatientID = sop_class, uid, "MR", "7"
    made.StudyInstanceUID, made.SeriesInstanceUID, made.SeriesNumber = "1.2.3", uid.rpartition(".")[0], 1
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return made


def save(made, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if hasattr(made, "file_meta"):
        made.save_as(path, enforce_file_format=True)
    else:
        made.save_as(path, implicit_vr=True, little_endian=True)
    return path


def with_pixels(made, pixels: np.ndarray):
    """The data set with (rows, columns) or (frames, rows, columns) pixels."""
    made.Rows, made.Columns = pixels.shape[-2:]
    made.SamplesPerPixel, made.PhotometricInterpretation, made.PixelRepresentation = 1, "MONOCHROME2", 1
    made.BitsAllocated = made.BitsStored = 16
    made.HighBit = 15
    made.PixelData = np.ascontiguousarray(pixels.astype(np.int16)).tobytes()
    return made


def write_series(
    folder: Path,
    data: np.ndarray,
    *,
    uid: str = "1.2.9",
    first: int = 1,
    name: str = "IM{:04d}.dcm",
    heights: list[float] | None = None,
    preamble: bool = True,
    change: Callable = lambda made, z: None,
    sop_class: str = MR,
    **values,
) -> list[Path]:
    """A series of axial slices with (columns, rows, slices) values, one file each; numbered from `first`."""
    paths = []
    for z in range(data.shape[2]):
        made = dataset(sop_class, f"{uid}.{first + z}", preamble=preamble, InstanceNumber=first + z, **values)
        made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        made.ImagePositionPatient = [-7.5, 4.25, 10 + (SPACING[2] * z if heights is None else heights[z])]
        made.PixelSpacing = [SPACING[1], SPACING[0]]
        made = with_pixels(made, data[:, :, z].T)
        change(made, z)
        paths.append(save(made, folder / name.format(first + z)))
    return paths


def reason_of(folder: Path) -> str:
    """The line with which both commands refuse a folder: as a case among others, and as an image of its own."""
    lines = []
    for found in (find_cases(folder.parent), find_images([folder])):
        if found.problems:
            lines += found.problems.values()
            continue
        with pytest.raises(VolumeError) as error:
            read_volume(found.cases[0].channels[0])
        lines.append(str(error.value))
    assert lines[0] == lines[1] and "\n" not in lines[0]
    return lines[0]


# What lies beside images.


OBJECTS = {
    "481.2": "RTDOSE", "481.5": "radiotherapy", "88.67": "SR", "88.59": "KO", "11.1": "PR", "104.1": "document",
    "66.1": "REG", "66.3": "REG", "66": "raw data", "9.1.1": "waveform", "67": "real world", "4.2": "spectra",
    "30": "parametric",
}  # fmt: skip


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_beside_images_are_passed_over_with_what_they_are(kind, tmp_path):
    data = voxels()
    write_series(tmp_path / "s1" / "image", data)
    other = save(dataset(f"{STORAGE}{kind}", "1.2.8.1", Modality="OT"), tmp_path / "s1" / "image" / "AA.dcm")
    for found in (find_cases(tmp_path), find_cases(tmp_path / "s1"), find_images([other.parent])):
        (case,) = found.cases
        np.testing.assert_array_equal(read_volume(case.channels[0]).data, data)
        assert OBJECTS[kind] in found.passed_over[other] and not found.problems


@pytest.mark.parametrize("kind", ["481.3", "66.4"])
def test_labels_beside_images_are_named(kind, tmp_path):
    write_series(tmp_path / "s1" / "image", voxels())
    other = save(dataset(f"{STORAGE}{kind}", "1.2.8.1"), tmp_path / "s1" / "image" / "labels")
    found = find_cases(tmp_path)
    assert len(found.cases) == 1 and "holds labels in DICOM" in found.remarks["s1/image/labels"]
    assert other in found.passed_over


def test_private_objects_and_the_files_of_a_cd_are_passed_over(tmp_path):
    folder = tmp_path / "PAT1"
    write_series(folder, voxels(), name="I{}")
    private = save(dataset("1.3.12.2.1107.5.9.1", "1.2.8.1"), folder / "I9000")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0" * 50)
    (folder / "README").write_text("viewer")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    (tmp_path / "VIEWER").mkdir()
    (tmp_path / "VIEWER" / "v.exe").write_bytes(b"MZ" + bytes(100))
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["PAT1"] and not found.problems
    assert "private object" in found.passed_over[private]
    assert found.passed_over[folder / "Thumbs.db"] == found.passed_over[folder / "README"] == "no DICOM file"


def test_a_screenshot_without_a_place_is_passed_over_beside_a_scan_and_refused_alone(tmp_path):
    write_series(tmp_path / "a" / "scan", voxels())
    capture = with_pixels(dataset(CAPTURE, "1.2.77.1"), voxels()[:, :, 0].T)
    path = save(capture, tmp_path / "a" / "scan" / "dose.dcm")
    found = find_images([tmp_path / "a" / "scan"])
    assert len(found.cases[0].channels[0]) == SHAPE[2] and "screenshot" in found.passed_over[path]
    save(capture, tmp_path / "b" / "only" / "dose.dcm")
    assert "no PixelSpacing" in reason_of(tmp_path / "b" / "only")


def test_labels_that_are_none_are_named(tmp_path):
    for name in ("report", "images", "junk"):
        write_series(tmp_path / name / "image", voxels())
    report = dataset(f"{STORAGE}88.11", "1.2.8.1", Modality="SR")
    save(report, tmp_path / "report" / "label" / "r.dcm")
    write_series(tmp_path / "images" / "label", voxels(1))
    (tmp_path / "junk" / "label").mkdir()
    (tmp_path / "junk" / "label" / "seg.dcm").write_text("<html>")
    problems = find_cases(tmp_path).problems
    assert "is a structured report (SR), which holds no labels" in problems["report"]
    assert "holds DICOM images" in problems["images"]
    assert "seg.dcm, which is no DICOM file" in problems["junk"]


# Files without preamble, and damaged ones.


@pytest.mark.parametrize("meta", [False, True])
def test_files_without_preamble_are_read(meta, tmp_path):
    data = voxels()
    paths = write_series(tmp_path / "s1" / "image", data, preamble=meta, name="IM{}")
    if meta:  # the file meta information without preamble and magic bytes before it
        for path in paths:
            path.write_bytes(path.read_bytes()[132:])
    assert all(map(is_dicom, paths))
    for found in (find_cases(tmp_path), find_images([tmp_path / "s1" / "image"])):
        np.testing.assert_array_equal(read_volume(found.cases[0].channels[0]).data, data)


def test_other_files_are_not_taken_for_dicom(tmp_path):
    contents = [b"", b"\x08\x00", b"\x08\x00\x05\x00" + b"\xff" * 300, b"\x1f\x8b" + bytes(300), b"BM" + bytes(300)]
    contents += [b"\x08\x00\x00\x00" + bytes(300), b"text " * 50, bytes(500), b"\x5c\x01" + bytes(500)]
    for number, content in enumerate(contents):
        path = tmp_path / f"f{number}"
        path.write_bytes(content)
        assert not is_dicom(path) and read_header(path) is None


def damage(paths: list[Path], kind: str) -> Path:
    """Damage one file of a series; returns it."""
    content = paths[-1].read_bytes()
    path = {"first": paths[0], "middle": paths[1]}.get(kind, paths[-1])
    if kind in ("first", "middle", "pixels"):
        path.write_bytes(path.read_bytes()[:-10])
    elif kind in ("header", "meta"):
        path.write_bytes(content[: {"header": 400, "meta": 200}[kind]])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "zeros":
        path.write_bytes(bytes(len(content)))
    elif kind == "zeros after the magic bytes":
        path.write_bytes(content[:132] + bytes(len(content)))
    elif kind == "other":
        path.write_text("<html>404</html>")
    return path


KINDS = ("first", "middle", "pixels", "header", "meta", "empty", "zeros", "zeros after the magic bytes", "other")


@pytest.mark.parametrize("name", ["IM{:04d}.dcm", "IM{:04d}", "1.2.840.{}"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_slice_is_never_left_out_without_a_word(kind, name, tmp_path):
    folder = tmp_path / "s" / "scan"
    damaged = damage(write_series(folder, voxels(), name=name), kind)
    assert f"1 DICOM files cannot be read, such as {damaged.name}" in reason_of(folder)


def test_a_slice_of_another_size_is_named(tmp_path):
    folder = tmp_path / "s" / "scan"
    write_series(folder, voxels())
    write_series(folder, voxels(shape=(3, 3, 1)), first=20, name="odd{}.dcm", heights=[12.0])
    assert "different sizes" in reason_of(folder) and "odd20.dcm" in reason_of(folder)
    found = find_images([folder], series="largest")
    assert len(found.cases[0].channels[0]) == SHAPE[2] and list(found.passed_over) == [folder / "odd20.dcm"]


# What the slices of a series are.


def test_equal_copies_of_slices_are_left_out_and_counted(tmp_path):
    data, folder = voxels(), tmp_path / "s1" / "image"
    paths = write_series(folder, data)
    shutil.copy(paths[1], folder / "IM0002_copy.dcm")
    write_series(folder, data[:, :, 3:], first=104, heights=[9.0])  # again, as a new instance
    for found in (find_cases(tmp_path), find_images([folder])):
        np.testing.assert_array_equal(read_volume(found.cases[0].channels[0]).data, data)
        assert [text.split(" are")[0] for text in found.remarks.values()] == ["2 files"]
        assert found.passed_over[folder / "IM0002_copy.dcm"] == "a copy of another slice (same place, same pixels)"
        assert len(found.passed_over) == 2


REASONS = {
    "EchoTime": ([10.0, 20.0], "2 echoes lie at each place (EchoTime 10.0, 20.0)"),
    "TriggerTime": ([0.0, 40.0, 80.0], "3 time points"),
    "TemporalPositionIdentifier": ([1, 2], "2 time points"),
    "DiffusionBValue": ([0.0, 800.0], "2 b-values"),
    "AcquisitionNumber": ([1, 2], "2 acquisitions"),
    "InversionTime": ([100.0, 900.0], "2 inversion times"),
    "ImageType": (["ORIGINAL\\PRIMARY\\M", "ORIGINAL\\PRIMARY\\P"], "2 kinds of image"),
    "SliceThickness": ([1.0, 5.0], "2 reconstructions"),
    "PatientID": (["a", "b"], "images of 2 patients have one series identifier"),
    "ContentTime": (["10", "11"], "8 slices lie at 4 places"),
}


@pytest.mark.parametrize("keyword", REASONS)
def test_the_true_reason_for_several_slices_at_one_place_is_told(keyword, tmp_path):
    values, text = REASONS[keyword]
    folder = tmp_path / "s" / "scan"
    for number, value in enumerate(values):
        write_series(folder, voxels(number), first=1 + 10 * number, **{keyword: value})
    reason = reason_of(folder)
    assert text in reason and "missing" not in reason


GAPS = {
    "wider above": ([0, 2.5, 5, 7.5, 12.5, 17.5, 22.5], None, "vary from 2.50 to 5.00 mm, first at slice 4 of 7"),
    "no multiples": ([0, 3, 6, 10, 13], None, "vary from 3.00 to 4.00 mm"),
    "lost, numbered": ([0, 3, 6, 12, 15], [1, 2, 3, 5, 6], "1 slices are missing, between IM0003.dcm and IM0004.dcm"),
    "lost at a run of ends": ([0, 3, 9, 15], [1, 2, 4, 6], "2 slices are missing, between IM0002.dcm"),
    "lost, numbers alike": ([0, 3, 6, 12, 15], [1, 1, 1, 1, 1], "1 slices are missing"),
    "three lost": ([0, 3, 6, 18, 21, 24], [1, 2, 3, 7, 8, 9], "3 slices are missing"),
}


@pytest.mark.parametrize("kind", GAPS)
def test_gaps_that_vary_and_slices_that_are_missing_are_told_apart(kind, tmp_path):
    heights, numbers, text = GAPS[kind]

    def number(made, z):
        made.InstanceNumber = z + 1 if numbers is None else numbers[z]

    folder = tmp_path / "s" / "scan"
    write_series(folder, voxels(shape=(6, 5, len(heights))), heights=heights, change=number)
    assert text in reason_of(folder)


LACKING = {
    "PixelSpacing": "no PixelSpacing above 0",
    "ImagePositionPatient": "no ImagePositionPatient",
    "ImageOrientationPatient": "no ImageOrientationPatient",
}


@pytest.mark.parametrize("keyword", LACKING)
@pytest.mark.parametrize("which", ["all", "one"])
def test_images_without_geometry_are_refused(keyword, which, tmp_path):
    def without(made, z):
        if which == "all" or z == 2:
            delattr(made, keyword)
            made.ImagerPixelSpacing = [0.2, 0.2]

    folder = tmp_path / "s" / "scan"
    write_series(folder, voxels(), change=without)
    reason = reason_of(folder)
    assert LACKING[keyword] in reason and ("1 of 4 images, such as IM0003.dcm" in reason) == (which == "one")
    assert ("ImagerPixelSpacing" in reason) == (keyword == "PixelSpacing")


@pytest.mark.parametrize("value", [[0, 0], [-1, 1], ["", ""]])
def test_a_pixel_without_size_is_refused(value, tmp_path):
    write_series(tmp_path / "s" / "scan", voxels(), change=lambda made, z: setattr(made, "PixelSpacing", value))
    assert "no PixelSpacing above 0" in reason_of(tmp_path / "s" / "scan")


def test_tiles_of_a_mosaic_are_no_slice(tmp_path):
    write_series(tmp_path / "s" / "scan", voxels()[:, :, :1], ImageType="ORIGINAL\\PRIMARY\\M\\MOSAIC")
    assert "mosaic" in reason_of(tmp_path / "s" / "scan")


# Files of several frames.


def item(**values):
    made = pydicom.Dataset()
    for keyword, value in values.items():
        setattr(made, keyword, value)
    return pydicom.Sequence([made])


def write_frames(path: Path, frames: np.ndarray, heights: list[float], *, groups=lambda number: {}, told=True) -> Path:
    """An enhanced MR file of (columns, rows, frames) values; `groups` gives further functional groups of a frame."""
    made = dataset(ENHANCED_MR, "1.2.55.1", InstanceNumber=1, NumberOfFrames=frames.shape[2])
    made.SharedFunctionalGroupsSequence = item(
        PixelMeasuresSequence=item(PixelSpacing=[SPACING[1], SPACING[0]], SliceThickness=SPACING[2]),
        PlaneOrientationSequence=item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
    )
    if told:
        made.PerFrameFunctionalGroupsSequence = pydicom.Sequence(
            [
                item(PlanePositionSequence=item(ImagePositionPatient=[-7.5, 4.25, z]), **groups(number))[0]
                for number, z in enumerate(heights)
            ]
        )
    return save(with_pixels(made, np.moveaxis(frames, 2, 0).swapaxes(1, 2)), path)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [0, 2, 1, 3]])
def test_frames_that_are_one_volume_are_read_where_they_lie(order, tmp_path):
    data = voxels()
    write_series(tmp_path / "single", data)
    write_frames(tmp_path / "s" / "scan" / "e.dcm", data[:, :, order], [10 + SPACING[2] * z for z in order])
    (expected,), (found,) = (find_images([folder]).cases for folder in (tmp_path / "single", tmp_path / "s" / "scan"))
    expected, grid, found = (
        read_volume(expected.channels[0]),
        read_grid(found.channels[0]),
        read_volume(found.channels[0]),
    )
    np.testing.assert_array_equal(found.data, data)
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-6)
    np.testing.assert_array_equal(grid[1], found.affine)
    assert grid[0] == SHAPE


FRAMES = {
    "time": (lambda n: {"FrameContentSequence": item(TemporalPositionIndex=1 + n // 4)}, "2 time points"),
    "echo": (lambda n: {"MREchoSequence": item(EffectiveEchoTime=10.0 * (1 + n // 4))}, "2 echoes"),
    "b": (lambda n: {"MRDiffusionSequence": item(DiffusionBValue=800.0 * (n // 4))}, "2 b-values lie at each place"),
    "stack": (lambda n: {"FrameContentSequence": item(StackID=str(1 + n // 4))}, "2 stacks"),
    "phase": (
        lambda n: {"CardiacSynchronizationSequence": item(NominalCardiacTriggerDelayTime=30.0 * (n // 4))},
        "2 time points",
    ),
    "unknown": (lambda n: {}, "8 slices lie at 4 places"),
    "scale": (
        lambda n: {"PixelValueTransformationSequence": item(RescaleSlope=1 + n, RescaleIntercept=0)},
        "have scales of their own",
    ),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_that_are_several_volumes_are_refused(kind, tmp_path):
    groups, text = FRAMES[kind]
    frames, heights = voxels(shape=(6, 5, 8)), [10 + SPACING[2] * (n % 4) for n in range(8)]
    write_frames(tmp_path / "s" / "scan" / "e.dcm", frames, heights, groups=groups)
    assert text in reason_of(tmp_path / "s" / "scan")


def test_frames_whose_places_are_not_told_are_no_volume(tmp_path):
    write_frames(tmp_path / "a" / "film" / "e.dcm", voxels(), [], told=False)
    assert "has 4 frames whose places it does not tell" in reason_of(tmp_path / "a" / "film")
    write_frames(tmp_path / "b" / "half" / "e.dcm", voxels(), [0.0, 3.0])
    assert "has 4 frames and describes 2" in reason_of(tmp_path / "b" / "half")
    write_frames(tmp_path / "c" / "uneven" / "e.dcm", voxels(), [0.0, 3.0, 7.0, 11.0])
    assert "vary from 3.00 to 4.00 mm" in reason_of(tmp_path / "c" / "uneven")
    for number in (1, 2):
        write_frames(tmp_path / "d" / "two" / f"{number}.dcm", voxels(number), [0.0, 3.0, 6.0, 9.0])
    assert "2 of the 2 files of the series have several frames" in reason_of(tmp_path / "d" / "two")


# Several series, and folders in folders.


def with_localizer(folder: Path, seed: int = 0) -> np.ndarray:
    data = voxels(seed)
    write_series(folder, data, uid="1.2.9", SeriesDescription="T2 axial")
    write_series(folder, voxels(9)[:, :, :2], uid="1.2.10", SeriesDescription="localizer", name="L{}.dcm")
    return data


@pytest.mark.parametrize("choice", ["largest", "T2 axial", "t2*", "1.2.9"])
def test_one_of_several_series_is_chosen(choice, tmp_path):
    data = with_localizer(tmp_path / "s1" / "image")
    for found in (
        find_cases(tmp_path, series=choice),
        find_images([tmp_path], series=choice),
        find_images([tmp_path / "s1" / "image"], series=choice),
    ):
        (case,) = found.cases
        np.testing.assert_array_equal(read_volume(case.channels[0]).data, data)
        assert "'localizer' (2 slices)" in found.passed_over[tmp_path / "s1" / "image" / "L1.dcm"]


def test_series_that_are_not_chosen_are_listed(tmp_path):
    with_localizer(tmp_path / "s1" / "image")
    line = find_cases(tmp_path).problems["s1"]
    assert "2 DICOM series, expected one: 'localizer' (2 slices), 'T2 axial' (4 slices); choose with --series" in line
    assert "holds no DICOM series 'T1'" in find_cases(tmp_path, series="T1").problems["s1"]
    assert "2 DICOM series are called '*'" in find_cases(tmp_path, series="*").problems["s1"]
    write_series(tmp_path / "s1" / "image", voxels(3), uid="1.2.11", SeriesDescription="T1\n", name="T{}.dcm")
    line = find_cases(tmp_path, series="largest").problems["s1"]
    assert "2 DICOM series are the largest: 'T1' (4 slices), 'T2 axial' (4 slices)" in line


def test_series_without_descriptions_are_told_apart_by_their_identifiers(tmp_path):
    for number in (1, 2):
        write_series(tmp_path / "s1" / "image", voxels(number), uid=f"1.2.{number}", name=f"{number}-{{}}.dcm")
    line = find_cases(tmp_path).problems["s1"]
    assert "'without description' (4 slices) 1.2.1, 'without description' (4 slices) 1.2.2" in line
    assert len(find_cases(tmp_path, series="1.2.2").cases) == 1


def test_directions_of_a_localizer_are_no_volume(tmp_path):
    def turned(made, z):
        made.ImageOrientationPatient = [[1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1], [0, 1, 0, 0, 0, -1]][z % 3]

    write_series(tmp_path / "s" / "scan", voxels(shape=(6, 5, 9)), change=turned)
    assert "lie in 3 directions" in reason_of(tmp_path / "s" / "scan")


def test_exports_with_folders_for_patient_study_and_series_are_found(tmp_path):
    data = voxels()
    for place in ("PA0/ST0/SE0", "PA1/ST0/SE0", "PA1/ST1/SE0"):
        write_series(tmp_path / "DICOM" / place, data, name="IM{:04d}")
    (tmp_path / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM")
    for found in (find_cases(tmp_path), find_images([tmp_path])):
        assert [case.name for case in found.cases] == ["PA0", "PA1/ST0/SE0", "PA1/ST1/SE0"]
        np.testing.assert_array_equal(read_volume(found.cases[2].channels[0]).data, data)
    with_localizer(tmp_path / "DICOM" / "PA0" / "ST0" / "SE1")
    found = find_cases(tmp_path, series="largest")
    assert [case.name for case in found.cases][:2] == ["PA0/ST0/SE0", "PA0/ST0/SE1"] and len(found.cases) == 4


def test_a_modality_folder_may_hold_folders_of_series(tmp_path):
    write_series(tmp_path / "s1" / "image" / "ST0" / "SE0", voxels(), name="IM{:04d}")
    write_series(tmp_path / "s2" / "image", voxels(), name="IM{:04d}")
    assert [case.name for case in find_cases(tmp_path).cases] == ["s1", "s2"]
    write_series(tmp_path / "s1" / "image" / "ST0" / "SE1", voxels(1), uid="1.2.10", name="IM{:04d}")
    assert "2 DICOM series" in find_cases(tmp_path).problems["s1"]


def test_a_series_in_several_folders_is_one_case_where_it_is_one_volume(tmp_path):
    data = voxels()
    for part, z in enumerate((0, 2)):
        write_series(tmp_path / "P" / f"A{part}", data[:, :, z : z + 2], first=1 + z, heights=[3.0 * z, 3.0 * (z + 1)])
    write_series(tmp_path / "Q" / "A0", data, heights=[100, 103, 106, 109], PatientID="8")  # another patient, same UID
    write_series(tmp_path / "R" / "A0", data, uid="1.2.12")
    write_series(tmp_path / "R" / "A1", data, uid="1.2.12")  # the same again: two cases
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["P", "Q", "R/A0", "R/A1"] and not found.problems
    np.testing.assert_array_equal(read_volume(found.cases[0].channels[0]).data, data)
    assert found.remarks["P"] == "one series whose files lie in 2 folders, read as one"


def test_a_slice_that_is_a_broken_link_is_missed(tmp_path):
    *_, last = write_series(tmp_path / "s" / "scan", voxels(), name="IM{}")
    last.unlink()
    last.symlink_to(tmp_path / "gone")
    assert "IM4, which is a link to nothing" in reason_of(tmp_path / "s" / "scan")


def test_patients_and_studies_under_one_identifier_are_told_without_their_names(tmp_path):
    folder = tmp_path / "a" / "scan"
    for number, name in enumerate(("DOE^JANE", "ROE^RICHARD")):
        write_series(folder, voxels(number, shape=(6, 5 + number, 4)), first=1 + 10 * number, PatientName=name)
    assert "images of 2 patients" in reason_of(folder) and "DOE" not in reason_of(folder)
    folder = tmp_path / "b" / "scan"
    for number in range(2):
        write_series(folder, voxels(number), first=1 + 10 * number, change=partial(study, number))
    assert "2 studies lie at each place (StudyInstanceUID);" in reason_of(folder)


def study(number: int, made, z: int) -> None:
    made.StudyInstanceUID = f"1.2.{number + 1}"


def test_a_folder_of_damaged_files_is_named(tmp_path):
    write_series(tmp_path / "good", voxels())
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "IM1.dcm").write_bytes(b"")
    found = find_cases(tmp_path)
    assert [case.name for case in found.cases] == ["good"] and "IM1.dcm, which is empty" in found.problems["bad"]


def test_one_file_of_a_series_is_refused(tmp_path):
    path, *_ = write_series(tmp_path / "scan", voxels())
    with pytest.raises(UsageError, match="is one file of a DICOM series; give the folder"):
        find_images([path])


# The reader of headers, against ITK and pydicom.


def test_series_have_the_keys_and_the_order_that_itk_gives(tmp_path):
    """Names of cases in stores, and the digests of their files, depend on both."""

    def tilted(made, z):
        made.ImageOrientationPatient = [0.96, 0.28, 0, 0, 0, -1]
        made.ImagePositionPatient = [3.0 * 0.28 * z, -3.0 * 0.96 * z, 0]

    write_series(tmp_path, voxels(), uid="1.2.30", SliceThickness="3.50", SequenceName="*tse2d1_11", change=tilted)
    write_series(tmp_path, voxels(), uid="1.2.31", name="B{}.dcm", heights=[9, 6, 3, 0], SliceThickness=3)
    names = itk_library().GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.SetDirectory(str(tmp_path))
    expected = {uid: tuple(map(Path, names.GetFileNames(uid))) for uid in names.GetSeriesUIDs()}
    assert len(expected) == 2 and find_series(tmp_path) == expected


def test_values_of_headers_are_those_that_pydicom_reads():
    """On the files that pydicom brings for its own tests: of all forms and byte orders, and with private elements."""
    files = sorted((Path(pydicom.__file__).parent / "data" / "test_files").glob("*.dcm"))
    compared = 0
    for path in files:
        header = read_header(path)
        if header is None or header.fault:
            continue
        reference = pydicom.dcmread(path, force=True)
        assert (header.pixels is not None) == ("PixelData" in reference), path.name
        for tag, (keyword, _) in ELEMENTS.items():
            if tag >> 16 == 2 or keyword not in reference or keyword == "PatientName":  # a text of several parts
                continue
            value = reference[keyword].value
            parts = value if isinstance(value, pydicom.multival.MultiValue) else [value]
            text = "\\".join("" if part is None else str(getattr(part, "original_string", part)) for part in parts)
            assert header.values[keyword] == text, (path.name, keyword)
            compared += 1
    assert not files or compared > 500


def test_headers_cut_anywhere_or_with_changed_bytes_raise_nothing(tmp_path):
    path = write_frames(tmp_path / "e.dcm", voxels(), [0.0, 3.0, 6.0, 9.0])
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    for cut in range(0, len(content) - 1, 7):
        path.write_bytes(content[:cut])
        header = read_header(path)
        assert header is None or header.fault or header.pixels is None
    for _ in range(300):
        changed = bytearray(content)
        for place in rng.integers(132, len(content), 3):
            changed[place] = rng.integers(256)
        path.write_bytes(changed)
        try:
            for series in content_of([path]).series:
                read_grid(series.files)
        except VolumeError as error:
            assert "\n" not in str(error)


QUIET = """
import sys
from pathlib import Path
from fedfactory.errors import FedFactoryError
from fedfactory.imaging.cases import find_images
from fedfactory.imaging.volume_files import read_volume
for case in find_images([Path(sys.argv[1])]).cases:
    try:
        read_volume(case.channels[0])
    except FedFactoryError:
        pass
"""


def test_nothing_of_other_packages_reaches_the_screen(tmp_path):
    def odd(made, z):
        made.SpacingBetweenSlices, made.SliceThickness = 77.0, 0.1
        if z == 1:
            made.PixelData = made.PixelData + bytes(64)

    write_series(tmp_path / "odd", voxels(), change=odd)
    write_series(tmp_path / "gap", voxels(), heights=[0, 3, 9, 13], uid="1.2.66")
    child = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", QUIET, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (child.returncode, child.stdout, child.stderr) == (0, "", "")


def test_passed_over_files_are_never_used_ones(tmp_path):
    write_series(tmp_path / "s", voxels())
    (tmp_path / "s" / "scan.nii.gz").write_bytes(b"\x1f\x8b")
    found = find_cases(tmp_path)
    assert isinstance(found, Found) and {case.name for case in found.cases} == {"s", "s/scan"}
    assert not found.passed_over


# What ITK would read as something else, or not survive.


@pytest.mark.parametrize("kind", ["PALETTE COLOR", "YBR_FULL", "FOO"])
def test_numbers_that_stand_for_colours_are_refused(kind, tmp_path):
    """GDCM throws a type that nothing catches at a palette that is missing, which would end the process."""

    def last_alone(made, z):
        made.PhotometricInterpretation = kind if z == SHAPE[2] - 1 else "MONOCHROME2"

    write_series(tmp_path / "s", voxels(), change=last_alone)
    assert "colour images" in reason_of(tmp_path / "s")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *((name, text) for name in ("RescaleSlope", "RescaleIntercept") for text in ("nan", "1e400", "one")),
        ("RescaleSlope", "0.0"),
    ],
)
def test_a_scale_that_cannot_be_one_is_refused(name, text, tmp_path):
    def change(made, z):
        setattr(made, name, "1")
        made[name]._value = text

    write_series(tmp_path / "s", voxels(), change=change)
    assert f"{name} of IM0001.dcm is '{text}'" in reason_of(tmp_path / "s")


def test_pixels_of_which_the_header_does_not_know_are_named(tmp_path):
    def change(made, z):
        made.PixelData = made.PixelData * 3 if z == 1 else made.PixelData

    write_series(tmp_path / "s", voxels(), change=change)
    assert "IM0002.dcm, which has 180 bytes of pixels, 3 times the 60 of its header" in reason_of(tmp_path / "s")


@pytest.mark.parametrize(("packing", "named"), [("4.90", "JPEG 2000"), ("4.50", "JPEG"), ("5", "RLE")])
def test_packed_pixels_that_nobody_can_unpack_are_named(packing, named, tmp_path):
    def change(made, z):
        made.file_meta.TransferSyntaxUID = pydicom.uid.UID(f"1.2.840.10008.1.2.{packing}")
        made.PixelData = pydicom.encaps.encapsulate([bytes(range(64))])
        made["PixelData"].is_undefined_length = True

    write_series(tmp_path / "s", voxels(), change=change)
    assert f"its pixels are packed ({named}), and ITK does not unpack them" in reason_of(tmp_path / "s")
