"""Labels of an image archive: DICOM segmentations and structure sets on the grid of their image series."""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from fedfactory.adaptation.inference import Outputs, segment
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.archive.object_kinds import is_segmentation_object, kind_of_object
from fedfactory.imaging.archive.segmentation_object import read_segmentation
from fedfactory.imaging.archive.segmentation_writer import write_segmentation
from fedfactory.imaging.archive.series import find_series, read_grid, read_series
from fedfactory.imaging.archive.structure_set import inside, read_structure_set
from fedfactory.imaging.cases import find_cases, find_images
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from helpers import untrained_segmenter, write_dicom

pydicom = pytest.importorskip("pydicom", reason="DICOM objects need fedfactory[dicom]")
highdicom = pytest.importorskip("highdicom", reason="DICOM objects need fedfactory[dicom]")

NAMES = {1: "liver", 2: "Überlauf", 3: "tumour"}
FRAME = "1.2.3.99"
SHAPE = (7, 9, 5)  # 63 pixels of an image are no whole number of bytes


def rotated(order: tuple[int, ...], signs: tuple[int, ...], tilt: float = 0.0) -> np.ndarray:
    """(4, 4), an affine with different spacings whose axes are permuted, turned around, and tilted by some radians."""
    cosine, sine = np.cos(tilt), np.sin(tilt)
    turn = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ (np.eye(3)[list(order)] * signs) * [0.7, 1.3, 2.5]
    affine[:3, 3] = [-31.5, 20.25, 400.0]
    return affine


def make_series(folder: Path, affine: np.ndarray, *, uid: str = "1.2.3.4", shape=SHAPE) -> tuple[Path, ...]:
    """A series of random values whose images name a frame of reference, in the order in which the package reads it."""
    values = np.random.default_rng(0).integers(0, 1000, shape)
    write_dicom(folder, Volume(values, affine), uid=uid)
    for file in folder.iterdir():
        image = pydicom.dcmread(file)
        image.FrameOfReferenceUID, image.SpecificCharacterSet = FRAME, "ISO_IR 100"
        image.PatientName, image.PatientSex = "DÖE^JANE", "F"
        image.save_as(file)
    (files,) = find_series(folder).values()
    return files


def random_labels(files: tuple[Path, ...]) -> Volume:
    """A label map with three classes on the grid of a series; its second slice is empty."""
    volume = read_series(files)
    values = np.random.default_rng(1).integers(0, 4, volume.data.shape).astype(np.uint16)
    values[:, :, 1:2] = 0
    return Volume(values, volume.affine)


@pytest.fixture(scope="module")
def series(tmp_path_factory) -> tuple[Path, ...]:
    """A tilted series."""
    return make_series(tmp_path_factory.mktemp("series"), rotated((0, 1, 2), (-1, -1, 1), tilt=0.3))


@pytest.fixture
def written(series, tmp_path) -> tuple[Path, Volume]:
    """A segmentation of the series, and its labels."""
    labels = random_labels(series)
    write_segmentation(tmp_path / "labels.dcm", labels, series, names=NAMES, algorithm="a method")
    return tmp_path / "labels.dcm", labels


def edited(path: Path, change) -> Path:
    """A copy of a DICOM file after `change(dataset)`."""
    dataset = pydicom.dcmread(path)
    change(dataset)
    copy = path.with_name("edited.dcm")
    dataset.save_as(copy)
    return copy


# In the plane, and through the slices: all ways to lie along the axes of the body, and one in between.
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_a_segmentation_comes_back_on_the_grid_of_its_series(order, tmp_path):
    for number, signs in enumerate(product((-1, 1), repeat=2)):
        # The third sign follows: an image's rows, columns and slices are a right-handed system in DICOM.
        handed = np.linalg.det(np.eye(3)[list(order)] * [*signs, 1])
        files = make_series(tmp_path / f"{number}", rotated(order, (*signs, round(handed)), tilt=0.4 * (number % 2)))
        labels = random_labels(files)
        write_segmentation(tmp_path / f"{number}.dcm", labels, files, names=NAMES, algorithm="a method")
        found, names = read_segmentation(tmp_path / f"{number}.dcm", files)
        assert found.data.dtype == np.uint16 and names == NAMES
        np.testing.assert_array_equal(found.data, labels.data)
        np.testing.assert_array_equal(found.affine, read_series(files).affine)


def move(file: Path, millimetres: list[float]) -> None:
    """Move an image of a series."""
    image = pydicom.dcmread(file)
    position = zip(image.ImagePositionPatient, millimetres, strict=True)
    image.ImagePositionPatient = [round(float(x) + y, 6) for x, y in position]
    image.save_as(file)


@pytest.mark.parametrize("kind", ["reversed", "one slice", "sheared", "uneven"])
def test_a_segmentation_of_an_unusual_series_comes_back(kind, tmp_path):
    shape = (*SHAPE[:2], 1) if kind == "one slice" else SHAPE
    files = make_series(tmp_path / "series", rotated((0, 1, 2), (-1, -1, 1)), shape=shape)
    if kind == "reversed":
        files = files[::-1]
    elif kind == "sheared":  # a tilted gantry
        for number, file in enumerate(files):
            move(file, [0.0, 0.9 * number, 0.0])
    elif kind == "uneven":  # by 4 % of the spacing, which `read_series` accepts
        move(files[2], [0.0, 0.0, 0.1])
    grid = read_series(files)
    values = np.random.default_rng(1).integers(0, 4, grid.data.shape).astype(np.uint16)
    write_segmentation(tmp_path / "a.dcm", Volume(values, grid.affine), files, names=NAMES, algorithm="a")
    np.testing.assert_array_equal(read_segmentation(tmp_path / "a.dcm", files)[0].data, values)


def test_the_headers_alone_give_the_grid_of_a_series(series):
    volume = read_series(series)
    shape, affine = read_grid(series)
    assert shape == volume.data.shape
    np.testing.assert_array_equal(affine, volume.affine)


def test_other_programs_find_each_segment_on_the_image_it_was_made_for(written, series):
    """highdicom and the plain elements are the references: no line of our reader takes part."""
    path, labels = written
    segmentation = highdicom.seg.segread(path)
    images = [pydicom.dcmread(file) for file in series]
    uids = [image.SOPInstanceUID for image in images]
    found = segmentation.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    np.testing.assert_array_equal(found, labels.data.T)
    plain = pydicom.dcmread(path)
    assert (plain.Modality, plain.SegmentationType, plain.FrameOfReferenceUID) == ("SEG", "BINARY", FRAME)
    assert (plain.PatientName, plain.PatientID, plain.PatientSex) == ("DÖE^JANE", "DOE^JANE-7", "F")
    assert plain.StudyInstanceUID == images[0].StudyInstanceUID
    assert plain.SeriesInstanceUID != images[0].SeriesInstanceUID == plain.ReferencedSeriesSequence[0].SeriesInstanceUID
    for item in plain.PerFrameFunctionalGroupsSequence:
        source = item.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        position = item.PlanePositionSequence[0].ImagePositionPatient
        np.testing.assert_allclose(position, images[uids.index(source)].ImagePositionPatient)
    for number, item in enumerate(plain.SegmentSequence, start=1):
        assert (item.SegmentNumber, item.SegmentLabel) == (number, NAMES[number])
        assert (item.SegmentAlgorithmType, item.SegmentAlgorithmName) == ("AUTOMATIC", "fedfactory")


def test_classes_without_a_voxel_or_a_name_are_written_too(series, tmp_path):
    grid = read_series(series)
    labels = Volume(np.zeros(grid.data.shape, dtype=np.uint16), grid.affine)
    write_segmentation(tmp_path / "a.dcm", labels, series, names={0: "background", 2: "b"}, algorithm="a")
    found, names = read_segmentation(tmp_path / "a.dcm", series)
    assert not found.data.any() and names == {1: "class 1", 2: "b"}
    with pytest.raises(UsageError, match="no class"):
        write_segmentation(tmp_path / "b.dcm", labels, series, names={}, algorithm="a")
    assert [path.name for path in tmp_path.iterdir()] == ["a.dcm"]


def test_labels_of_another_grid_are_not_written(series, tmp_path):
    labels = random_labels(series)
    for wrong in (Volume(labels.data[:, :, :-1], labels.affine), labels.to_canonical()):
        with pytest.raises(VolumeError, match=r"labels (have shape|lie elsewhere)"):
            write_segmentation(tmp_path / "a.dcm", wrong, series, names=NAMES, algorithm="a")


@pytest.mark.parametrize("name", ["", "a\\b", "a" * 65, "a\nb"])
def test_a_name_that_the_format_cannot_hold_is_refused(name, series, tmp_path):
    with pytest.raises(UsageError, match="1 to 64 characters"):
        write_segmentation(tmp_path / "a.dcm", random_labels(series), series, names={1: name}, algorithm="a")


@pytest.mark.parametrize(
    ("kind", "syntax"),
    [
        ("FRACTIONAL", pydicom.uid.ExplicitVRLittleEndian),
        ("FRACTIONAL", pydicom.uid.RLELossless),
        ("LABELMAP", pydicom.uid.ExplicitVRLittleEndian),
    ],
)
def test_segmentations_of_other_types_are_read(kind, syntax, series, tmp_path):
    labels = random_labels(series)
    segments = [value == labels.data.T for value in NAMES]
    # Fractions: 0.6 inside, 0.4 outside. A threshold at any voxel above 0 would let all segments overlap.
    pixels = np.stack([np.where(mask, 0.6, 0.4) for mask in segments], axis=-1)
    code = highdicom.sr.CodedConcept("85756007", "SCT", "Tissue")
    segmentation = highdicom.seg.Segmentation(
        source_images=[with_thickness(pydicom.dcmread(file)) for file in series],
        pixel_array=pixels if kind == "FRACTIONAL" else np.ascontiguousarray(labels.data.T),
        segmentation_type=kind,
        segment_descriptions=[
            highdicom.seg.SegmentDescription(number, name, code, code, "MANUAL") for number, name in NAMES.items()
        ],
        series_instance_uid=highdicom.UID(),
        series_number=2,
        sop_instance_uid=highdicom.UID(),
        instance_number=1,
        manufacturer="m",
        manufacturer_model_name="m",
        software_versions="1",
        device_serial_number="1",
        specific_character_set="ISO_IR 192",
        transfer_syntax_uid=syntax,
    )
    segmentation.save_as(tmp_path / "a.dcm")
    found, names = read_segmentation(tmp_path / "a.dcm", series)
    np.testing.assert_array_equal(found.data, labels.data)
    assert names == NAMES


def with_thickness(image):
    image.SliceThickness = 2.5
    return image


def test_frames_that_are_mirrored_and_cut_are_placed_by_their_position(written, series):
    """As programs write them that keep labels in their own order: from the last column on, without the first row."""
    path, labels = written

    def mirror(seg):
        frames = seg.pixel_array[:, 1:, ::-1]
        pixel = seg.SharedFunctionalGroupsSequence[0]
        across, down = np.reshape(pixel.PlaneOrientationSequence[0].ImageOrientationPatient, (2, 3)).astype(float)
        sides = pixel.PixelMeasuresSequence[0].PixelSpacing
        pixel.PlaneOrientationSequence[0].ImageOrientationPatient = [*(-across).tolist(), *down.tolist()]
        for item in seg.PerFrameFunctionalGroupsSequence:
            position = np.array(item.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
            moved = position + across * sides[1] * (seg.Columns - 1) + down * sides[0]
            item.PlanePositionSequence[0].ImagePositionPatient = [round(x, 9) for x in moved.tolist()]
        seg.Rows -= 1
        seg.PixelData = pydicom.pixels.utils.pack_bits(np.ascontiguousarray(frames))

    found, _ = read_segmentation(edited(path, mirror), series)
    np.testing.assert_array_equal(found.data[:, 1:], labels.data[:, 1:])
    assert not found.data[:, 0].any()


def test_frames_without_a_position_are_placed_by_their_image(written, series):
    path, labels = written

    def forget(seg):
        for item in seg.PerFrameFunctionalGroupsSequence:
            del item.PlanePositionSequence

    np.testing.assert_array_equal(read_segmentation(edited(path, forget), series)[0].data, labels.data)


def shift(millimetres: float, axis: int):
    """A change that moves all frames of a segmentation along an axis of the images (2: through the slices)."""

    def change(seg):
        orientation = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
        directions = np.reshape(orientation, (2, 3)).astype(float)
        direction = [*directions, np.cross(*directions)][axis]
        for item in seg.PerFrameFunctionalGroupsSequence:
            position = np.array(item.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
            moved = (position + direction * millimetres).tolist()
            item.PlanePositionSequence[0].ImagePositionPatient = [round(x, 9) for x in moved]

    return change


def set_first(**values):
    """A change of elements of the first frame, or of the whole object for names that frames do not have."""

    def change(seg):
        for keyword, value in values.items():
            if keyword == "ReferencedSegmentNumber":
                seg.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = value
            else:
                setattr(seg, keyword, value)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_first(FrameOfReferenceUID="1.2.9"), "another frame of reference"),
        (shift(0.05, axis=2), "does not lie on a slice"),  # 2 % of the spacing of 2.5 mm
        (shift(-2.5, axis=2), "but refers to slice"),
        (shift(0.35, axis=0), "other pixels"),
        (shift(0.7, axis=0), "reaches beyond"),
        (shift(1300.0, axis=1), "reaches beyond"),
        (
            lambda seg: setattr(seg, "PixelData", b"\xff" * len(seg.PixelData)),
            r"1 \(liver\) and 2 \(Überlauf\) overlap",
        ),
        (set_first(ReferencedSegmentNumber=9), "segment 9 is not described"),
        (set_first(NumberOfFrames=3), "numbers of frames"),
        (set_first(Rows=60000, Columns=60000), "other pixels|reaches beyond|does not lie"),
        (set_first(SegmentationType="OTHER"), "type is unknown"),
        (set_first(PixelData=b"\0" * 8), "cannot be read"),
    ],
)
def test_an_unusable_segmentation_is_refused_in_one_line(change, message, written, series):
    path, _ = written
    with pytest.raises(VolumeError, match=message) as caught:
        read_segmentation(edited(path, change), series)
    text = str(caught.value)
    assert "edited.dcm" in text and "\n" not in text and "JANE" not in text and "1.2.3" not in text


def test_a_segmentation_of_another_series_is_refused(written, tmp_path):
    path, _ = written
    other = make_series(tmp_path / "other", rotated((0, 1, 2), (-1, -1, 1), tilt=0.3), uid="1.2.3.5")
    with pytest.raises(VolumeError, match="another series"):
        read_segmentation(path, other)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.6, 0.9, 0.99])
def test_a_truncated_segmentation_is_refused(share, written, series):
    path, _ = written
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert kind_of_object(path) in ("seg", None)
    with pytest.raises(VolumeError):
        read_segmentation(path, series)


def test_the_kind_of_an_object_is_told_from_any_bytes(written, series, tmp_path):
    path, _ = written
    assert kind_of_object(path) == "seg" and is_segmentation_object(path)
    assert kind_of_object(series[0]) is None and kind_of_object(tmp_path) is None
    content = bytearray(path.read_bytes()[:600])
    random = np.random.default_rng(0)
    damaged = tmp_path / "damaged.dcm"
    for _ in range(200):
        changed = bytearray(content)
        for place in random.integers(132, 400, 3):
            changed[place] = int(random.integers(256))
        damaged.write_bytes(changed[: int(random.integers(132, 600))])
        assert kind_of_object(damaged) in ("seg", None)


def test_a_missing_package_is_named_with_its_extra(written, series, monkeypatch):
    path, labels = written
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(UsageError, match=r"highdicom is not installed.*fedfactory\[dicom\]"):
        write_segmentation(path, labels, series, names=NAMES, algorithm="a")
    monkeypatch.setitem(sys.modules, "pydicom", None)
    assert kind_of_object(path) == "seg"
    for read in (read_segmentation, read_structure_set):
        with pytest.raises(UsageError, match=r"pydicom is not installed.*fedfactory\[dicom\]"):
            read(path, series)


def structure_set(path: Path, files: tuple[Path, ...], regions: dict[str, list], *, numbers=(), **changes) -> Path:
    """Write a structure set whose contours are (slice, (n, 2) columns and rows); the slice may lie between two.

    The positions follow from the headers of the images, by the equation of the standard (C.7.6.2.1.1).
    """
    images = [pydicom.dcmread(file) for file in files]
    dataset = pydicom.Dataset()
    dataset.SOPClassUID, dataset.SOPInstanceUID = pydicom.uid.RTStructureSetStorage, "1.2.3.7"
    dataset.Modality, dataset.StructureSetLabel = "RTSTRUCT", "test"
    series, study, frame = (pydicom.Dataset() for _ in range(3))
    series.SeriesInstanceUID = changes.get("series", images[0].SeriesInstanceUID)
    study.RTReferencedSeriesSequence = [series]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = FRAME, [study]
    dataset.ReferencedFrameOfReferenceSequence = [frame]
    dataset.StructureSetROISequence, dataset.ROIContourSequence = [], []
    for number, (name, contours) in zip(numbers or range(1, 99), regions.items(), strict=False):
        listed, drawn = pydicom.Dataset(), pydicom.Dataset()
        listed.ROINumber, listed.ROIName = number, name
        listed.ReferencedFrameOfReferenceUID = changes.get("frame", FRAME)
        drawn.ReferencedROINumber, drawn.ContourSequence = number, []
        for at, corners in contours:
            image, after = images[int(at)], images[min(int(at) + 1, len(images) - 1)]
            position, following = (np.array(i.ImagePositionPatient, dtype=float) for i in (image, after))
            across, down = np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float)
            sides = image.PixelSpacing  # between rows, between columns
            x, y = np.asarray(corners, dtype=float).T[:, :, None]
            points = x * across * sides[1] + y * down * sides[0] + position
            points += (at - int(at)) * (following - position)
            item = pydicom.Dataset()
            item.ContourGeometricType = changes.get("kind", "CLOSED_PLANAR")
            item.NumberOfContourPoints = changes.get("points", len(corners))
            item.ContourData = [f"{x:.10g}" for x in points.ravel()]
            drawn.ContourSequence.append(item)
        dataset.StructureSetROISequence.append(listed)
        dataset.ROIContourSequence.append(drawn)
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.save_as(path, enforce_file_format=True)
    return path


def circle(x: float, y: float, radius: float) -> np.ndarray:
    angles = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    return np.stack([x + radius * np.cos(angles), y + radius * np.sin(angles)], axis=1)


def square(low: float, high: float) -> list[tuple[float, float]]:
    return [(low, low), (high, low), (high, high), (low, high)]


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> tuple[Path, ...]:
    """A tilted series of 24 x 20 pixels whose rows run to the patient's right."""
    affine = rotated((0, 1, 2), (1, -1, -1), tilt=0.4)
    return make_series(tmp_path_factory.mktemp("wide"), affine, shape=(24, 20, 4))


def test_a_disc_with_a_hole_has_the_pixels_whose_centres_lie_between_its_circles(wide, tmp_path):
    """And an inner region is cut out of the outer one; values follow the ROI numbers, not the order in the file."""
    rings = {"ring": [(1, circle(11.3, 9.2, 7.1)), (1, circle(11.3, 9.2, 3.2))], "part": [(1, circle(6.2, 9.2, 1.4))]}
    path = structure_set(tmp_path / "a.dcm", wide, {**rings, "empty": []}, numbers=(40, 7, 90))
    assert kind_of_object(path) == "rtstruct"
    found, names = read_structure_set(path, wide)
    assert names == {1: "part", 2: "ring", 3: "empty"}
    assert found.data.dtype == np.uint16
    np.testing.assert_array_equal(found.affine, read_series(wide).affine)
    column, row = np.indices((24, 20))
    distance = np.hypot(column - 11.3, row - 9.2)
    expected = np.zeros((24, 20, 4))
    expected[:, :, 1][(distance < 7.1) & (distance > 3.2)] = 2
    expected[:, :, 1][np.hypot(column - 6.2, row - 9.2) < 1.4] = 1
    np.testing.assert_array_equal(found.data, expected)


def test_regions_that_share_an_edge_share_no_pixel(wide, tmp_path):
    """Also where it runs through pixel centres, whose places in millimetres are rounded."""
    left, right = [(2, 3), (9, 3), (9, 8), (2, 8)], [(9, 3), (15, 3), (15, 8), (9, 8)]
    data = read_structure_set(structure_set(tmp_path / "a.dcm", wide, {"l": [(0, left)], "r": [(0, right)]}), wide)[
        0
    ].data
    expected = np.zeros((24, 20))
    expected[2:9, 3:8], expected[9:15, 3:8] = 1, 2
    np.testing.assert_array_equal(data[:, :, 0], expected)


def test_polygons_are_filled_as_matplotlib_fills_them():
    from matplotlib.path import Path as Outline

    random = np.random.default_rng(0)
    centres = np.stack(np.meshgrid(np.arange(31), np.arange(23), indexing="ij"), axis=-1).reshape(-1, 2)
    for _ in range(20):
        angles = np.sort(random.uniform(0, 2 * np.pi, 12))
        radii = random.uniform(2, 18, 12)
        star = np.stack([15 + radii * np.cos(angles), 11 + radii * np.sin(angles)], axis=1)
        expected = Outline(np.concatenate([star, star[:1]]), closed=True).contains_points(centres)
        np.testing.assert_array_equal(inside([star], (31, 23)), expected.reshape(31, 23))


@pytest.mark.parametrize(
    ("regions", "changes", "message"),
    [
        ({"a": [(1, square(2, 9))], "b": [(1, square(5, 12))]}, {}, "regions b and a overlap in part"),
        ({"a": [(1, square(2, 9))], "b": [(1, square(2, 9))]}, {}, "region a is covered"),
        ({"a": [(1.5, square(2, 9))]}, {}, "region a has a contour beside the slices"),
        ({"a": [(1, square(2, 9)), (1, square(2, 9))]}, {}, "region a has a contour twice"),
        ({"a": [(1, square(2, 9))]}, {"kind": "OPEN_PLANAR"}, "region a has an open contour"),
        ({"a": [(1, square(2, 9))]}, {"points": 5}, "region a has a contour with missing coordinates"),
        ({"a": [(1, square(2, 9))]}, {"series": "1.2.9"}, "another series"),
        ({"a": [(1, square(2, 9))]}, {"frame": "1.2.9"}, "another frame of reference"),
    ],
)
def test_an_unusable_structure_set_is_refused(regions, changes, message, wide, tmp_path):
    path = structure_set(tmp_path / "a.dcm", wide, regions, **changes)
    with pytest.raises(VolumeError, match=message):
        read_structure_set(path, wide)


def test_a_truncated_or_foreign_file_is_no_structure_set(wide, tmp_path):
    path = structure_set(tmp_path / "a.dcm", wide, {"a": [(1, square(2, 9))]})
    content = path.read_bytes()
    for share in (0.2, 0.5, 0.8, 0.97):
        path.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(VolumeError, match="structure set"):
            read_structure_set(path, wide)
    with pytest.raises(VolumeError, match="is no DICOM structure set"):
        read_structure_set(wide[0], wide)


def test_a_large_deflated_file_is_refused_before_it_is_unpacked(written, series, monkeypatch):
    path, labels = written
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    dataset.save_as(path)
    np.testing.assert_array_equal(read_segmentation(path, series)[0].data, labels.data)
    for name in ("MAX_BESIDE", "USUAL_RATIO"):
        monkeypatch.setattr(f"fedfactory.imaging.archive.headers.{name}", 0)
    with pytest.raises(VolumeError, match="is deflated"):
        read_segmentation(path, series)


def test_a_point_has_a_name_and_no_voxels(wide, tmp_path):
    path = structure_set(tmp_path / "a.dcm", wide, {"isocentre": [(1.3, [(4, 4)])]}, kind="POINT")
    found, names = read_structure_set(path, wide)
    assert names == {1: "isocentre"} and not found.data.any()


# DICOM labels in `prepare` and `segment`.


def blocks_of(files: tuple[Path, ...]) -> Volume:
    """Labels 1 and 2 in blocks that no mirroring leaves as they are, on the grid of a series."""
    volume = read_series(files)
    values = np.zeros(volume.data.shape, np.uint16)
    values[3:11, 2:9, 1:3], values[13:20, 11:17, 2] = 1, 2
    return Volume(values, volume.affine)


def dicom_case(folder: Path, uid: str, labels: str, names=NAMES) -> None:
    """A case of a series with blocks as SEG, RTSTRUCT or NIfTI; the values of its classes follow from `names`."""
    shape, affine = (24, 20, 4), rotated((0, 1, 2), (1, -1, -1), tilt=0.4)
    files = make_series(folder / "image", affine, uid=uid, shape=shape)
    blocks = blocks_of(files)
    (folder / "label").mkdir()
    if labels == "seg":
        write_segmentation(folder / "label" / "a.dcm", blocks, files, names=names, algorithm="a")
    elif labels == "rtstruct":
        rectangles = [[(3, 2), (11, 2), (11, 9), (3, 9)], [(13, 11), (20, 11), (20, 17), (13, 17)]]
        regions = {names[1]: [(1, rectangles[0]), (2, rectangles[0])], names[2]: [(2, rectangles[1])]}
        structure_set(folder / "label" / "a.dcm", files, regions)
    else:
        write_volume(folder / "label" / "a.nii.gz", blocks)


def prepared(folder: Path, **changes) -> SliceStore:
    values = {"domain": "x", "size": 24, "z_bins": 2, "validation_share": 0.0, "test_share": 0.0, **changes}
    return prepare(folder, folder.with_name(f"{folder.name}-store"), PrepareConfig(**values)).store


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_labels_in_dicom_are_prepared_as_those_in_nifti(kind, tmp_path):
    names = {1: "liver", 2: "Überlauf"}
    for folder, labels in (("dicom", kind), ("nifti", "nifti")):
        dicom_case(tmp_path / folder / "case", "1.2.3.4", labels, names)
    found, expected = prepared(tmp_path / "dicom"), prepared(tmp_path / "nifti")
    assert (expected.labels == 1).sum() > 15 < (expected.labels == 2).sum()
    np.testing.assert_array_equal(found.labels, expected.labels)
    np.testing.assert_array_equal(found.images, expected.images)
    assert found.class_names == names and expected.class_names == {}
    assert "liver" in (found.path / "quality.html").read_text(encoding="utf-8")


def test_classes_that_two_files_number_differently_are_matched_by_their_names(tmp_path):
    source = tmp_path / "s"
    dicom_case(source / "a", "1.2.3.4", "seg", {1: "liver", 2: "spleen"})
    dicom_case(source / "b", "1.2.3.5", "seg", {1: "Spleen", 2: "liver"})
    with pytest.raises(
        UsageError, match=r"label 1 is 'liver' in one label file and 'Spleen' in another; give"
    ) as error:
        prepared(source)
    assert "\n" not in str(error.value) and not (tmp_path / "s-store").exists()
    wanted = {1: "spleen", 2: "kidney", 3: "liver"}
    store = prepared(source, class_names=wanted)
    assert store.class_names == wanted and store.classes == 4
    first, second = (store.labels[case.span] for case in store.cases)
    np.testing.assert_array_equal(np.array([0, 3, 0, 1])[first], second)  # liver and spleen change places
    assert {1, 3} <= set(np.unique(first))
    with pytest.raises(UsageError, match="label 2 is 'kidney' in the store, not 'liver'"):
        prepared(source, class_names={1: "spleen", 2: "liver"})
    with pytest.raises(UsageError, match="'Liver' is label 3 in the store, not 4"):
        prepared(source, class_names={1: "spleen", 4: "Liver"})
    dicom_case(source / "c", "1.2.3.6", "seg", {1: "liver", 2: "stent"})
    config = PrepareConfig(domain="x", size=24, z_bins=2, class_names=wanted)
    result = prepare(source, tmp_path / "s-store", config)
    assert list(result.failed) == ["c"] and "'stent' is none of the classes" in result.failed["c"]


def test_a_segmentation_that_segment_writes_is_prepared_again(tmp_path, monkeypatch):
    """The oracle divides the slices by their grey levels; highdicom and plain elements are the references."""

    def by_level(self, images, volume=None, *, views=1):
        levels = (images[:, 0] > -0.4).long() + (images[:, 0] > -0.3).long()
        return torch.nn.functional.one_hot(levels, 3).movedim(-1, 1).float()

    monkeypatch.setattr(Segmenter, "probabilities", by_level)
    made = untrained_segmenter()
    made.card = replace(made.card, class_names={"1": "liver", "2": "Überlauf"})
    made.save(tmp_path / "m.safetensors")
    dicom_case(tmp_path / "s" / "case", "1.2.3.4", "none")
    (tmp_path / "s" / "case" / "label" / "a.nii.gz").unlink()
    series_folder = tmp_path / "s" / "case" / "image"
    (path,) = segment([series_folder], [tmp_path / "m.safetensors"], tmp_path / "out", outputs=Outputs(dicom_seg=True))
    labels = read_volume(path, integer=True)
    assert set(np.unique(labels.data)) == {0, 1, 2}
    (files,) = find_series(series_folder).values()
    uids = [pydicom.dcmread(file).SOPInstanceUID for file in files]
    read = highdicom.seg.segread(tmp_path / "out" / "image.dcm")
    frames = read.get_pixels_by_source_instance(
        uids, combine_segments=True, assert_missing_frames_are_empty=True, ignore_spatial_locations=True
    )
    np.testing.assert_array_equal(frames, labels.ordered_like(read_series(files)).data.T)
    plain = pydicom.dcmread(tmp_path / "out" / "image.dcm")
    assert [item.SegmentLabel for item in plain.SegmentSequence] == ["liver", "Überlauf"]
    (tmp_path / "out" / "image.dcm").rename(tmp_path / "s" / "case" / "label" / "a.dcm")
    found = prepared(tmp_path / "s")
    assert found.class_names == {1: "liver", 2: "Überlauf"}
    (tmp_path / "s" / "case" / "label" / "a.dcm").unlink()
    path.rename(tmp_path / "s" / "case" / "label" / "a.nii.gz")
    (tmp_path / "s").rename(tmp_path / "t")
    np.testing.assert_array_equal(found.labels, prepared(tmp_path / "t").labels)


def test_only_series_get_a_dicom_segmentation(tmp_path):
    untrained_segmenter().save(tmp_path / "m.safetensors")
    write_volume(tmp_path / "a.nii.gz", Volume(np.random.default_rng(0).normal(size=SHAPE), np.eye(4)))
    with pytest.raises(UsageError, match="dicom_seg is True, but 1 images, such as a, are no DICOM series"):
        segment([tmp_path / "a.nii.gz"], [tmp_path / "m.safetensors"], tmp_path / "o", outputs=Outputs(dicom_seg=True))


@pytest.mark.parametrize("kind", ["seg", "rtstruct"])
def test_labels_that_an_archive_keeps_beside_the_images_are_no_images(kind, tmp_path):
    dicom_case(tmp_path / "s" / "case", "1.2.3.4", kind, {1: "liver", 2: "spleen"})
    case = tmp_path / "s" / "case"
    (case / "label" / "a.dcm").rename(case / "image" / "a.dcm")
    for source, place in ((tmp_path / "s", "case/image/a.dcm"), (case, "image/a.dcm")):
        found = find_cases(source)
        assert [len(files.channels[0]) for files in found.cases] == [4] and not found.problems
        assert list(found.remarks) == [place] and "holds labels in DICOM beside images" in found.remarks[place]
    (images,) = find_images([case / "image"]).cases
    assert images.name == "image" and len(images.channels[0]) == 4


def test_a_structure_set_without_regions_or_contours_is_named(wide, tmp_path):
    """An empty one was "0 labelled" without a word."""
    path = structure_set(tmp_path / "a.dcm", wide, {"a": [(1, square(2, 9))]})
    dataset = pydicom.dcmread(path)
    del dataset.ROIContourSequence
    dataset.save_as(path)
    with pytest.raises(VolumeError, match="is a structure set without contours"):
        read_structure_set(path, wide)
    del dataset.StructureSetROISequence
    dataset.save_as(path)
    with pytest.raises(VolumeError, match="is a structure set without regions"):
        read_structure_set(path, wide)
