"""Finding the cases of a hospital's folder, and reading DICOM."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.archive.series import find_series, patient_digest, read_series
from fedfactory.imaging.cases import find_cases, printable
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from helpers import ball_volume, write_dicom, write_site


@pytest.fixture(scope="module")
def tilted() -> Volume:
    """A volume of whole numbers whose slices are tilted by 0.2 radians."""
    image, _ = ball_volume(shape=(12, 10, 6))
    cosine, sine = np.cos(0.2), np.sin(0.2)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]]) * [2.0, 1.5, 3.0]
    affine[:3, 3] = [5, -7, 11]
    return Volume(np.round(image.data), affine)


def test_nnunet_data_sets_and_plain_folders_are_found(tmp_path):
    image, label = ball_volume()
    raw = tmp_path / "Dataset001"
    for number in (1, 2):
        write_volume(raw / "imagesTr" / f"b_{number:03d}_0000.nii.gz", image)
        write_volume(raw / "imagesTr" / f"b_{number:03d}_0001.nii.gz", image)
        write_volume(raw / "labelsTr" / f"b_{number:03d}.nii.gz", label)
    (raw / "dataset.json").write_text("{}")
    cases = find_cases(raw, image_key="1").cases
    assert [c.channels[0].name for c in cases] == ["b_001_0001.nii.gz", "b_002_0001.nii.gz"]
    assert cases[0].labels[0].path.name == "b_001.nii.gz"
    assert [c.labels for c in find_cases(raw / "imagesTr").cases] == [()] * 4
    assert len(find_cases(raw, image_key="1", label_key=None).cases) == 2


@pytest.mark.parametrize(
    ("content", "message"), [("{", "not readable as JSON"), ("[" * 100_000, "not readable as JSON")]
)
def test_a_damaged_dataset_description_is_refused(tmp_path, content, message):
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        find_cases(tmp_path)


def test_an_unclear_subject_is_named_and_the_others_are_found(tmp_path):
    write_site(tmp_path, cases=3)
    write_volume(tmp_path / "case0" / "image" / "second.nii", ball_volume()[0])
    (tmp_path / "empty" / "other").mkdir(parents=True)
    found = find_cases(tmp_path)
    assert [c.name for c in found.cases] == ["case1", "case2"]
    assert "2 volumes" in found.problems["case0"]
    assert found.without_image == ["empty"]


def test_volumes_in_subfolders_are_cases_of_their_own(tmp_path):
    write_volume(tmp_path / "x.nii", ball_volume()[0])
    write_volume(tmp_path / "visit 2 ü" / "x.nii.gz", ball_volume()[0])
    assert [c.name for c in find_cases(tmp_path).cases] == ["visit 2 ü/x", "x"]


def test_names_that_would_break_a_line_or_an_encoding_are_escaped():
    assert printable("a\nb\x1b[31m") == "a\\x0ab\\x1b[31m"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("Müller 3") == "Müller 3"


def test_a_dicom_series_is_the_volume_it_was_made_from(tmp_path, tilted):
    write_dicom(tmp_path / "a", tilted)
    (files,) = find_series(tmp_path / "a").values()
    volume = read_series(files)
    np.testing.assert_allclose(volume.turned("axial").affine, tilted.turned("axial").affine, atol=1e-4)
    np.testing.assert_array_equal(volume.turned("axial").data, tilted.turned("axial").data)


def test_mixed_series_in_a_folder_are_separate_cases(tmp_path, tilted):
    write_dicom(tmp_path / "mixed", tilted, uid="1.2.5")
    write_dicom(tmp_path / "mixed", Volume(tilted.data + 9, tilted.affine), uid="1.2.6")
    write_dicom(tmp_path / "single", tilted, uid="1.2.7")
    cases = find_cases(tmp_path).cases
    assert len(cases) == 3
    assert cases[2].name == "single"
    first, second = (read_volume(case.channels[0]).data for case in cases[:2])
    assert abs(float(first.mean() - second.mean())) == pytest.approx(9, abs=1e-4)
    assert not any("1.2." in case.name for case in cases)  # an identifier of the hospital is no name


def test_the_image_of_a_medical_folder_can_be_a_dicom_series(tmp_path, tilted):
    write_dicom(tmp_path / "s1" / "image", tilted)
    write_volume(tmp_path / "s1" / "label" / "l.nii.gz", tilted)
    (case,) = find_cases(tmp_path).cases
    assert len(case.channels[0]) == 6
    assert case.labels[0].path.name == "l.nii.gz"
    write_dicom(tmp_path / "s1" / "image", tilted, uid="1.9")
    assert "2 DICOM series" in find_cases(tmp_path).problems["s1"]


def test_the_digest_of_a_series_patient_is_equal_for_one_patient_alone(tmp_path, tilted):
    for folder, patient in (("a", "DOE^JANE"), ("b", "DOE^JANE"), ("c", "ROE^RICHARD")):
        write_dicom(tmp_path / folder, tilted, patient=patient)
    a, b, c = (patient_digest(next(iter(find_series(tmp_path / folder).values()))) for folder in "abc")
    assert a == b != c
    assert "DOE" not in a


def test_a_series_with_a_missing_or_damaged_slice_is_refused(tmp_path, tilted):
    write_dicom(tmp_path / "gap", tilted, leave_out=(3,))
    with pytest.raises(VolumeError, match="slices are missing"):
        read_volume(next(iter(find_series(tmp_path / "gap").values())))
    write_dicom(tmp_path / "cut", tilted)
    last = sorted((tmp_path / "cut").iterdir())[-1]
    last.write_bytes(last.read_bytes()[:200])
    found = find_cases(tmp_path)
    assert "1 DICOM files cannot be read" in found.problems["cut"]
    assert [c.name for c in found.cases] == ["gap"]
