"""Damaged NIfTI and DICOM files: an error of this package in one line, or they are read; in bounded time and memory.

By default a few mutations of each kind; `pytest -m fuzz` runs two hundred. They are read in a process of their own, for
a reader in C could end it, and so that its memory can be measured.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fedfactory.imaging.volume_files import write_volume
from fedfactory.imaging.volumes import Volume
from helpers import ball_volume, write_dicom

pydicom = pytest.importorskip("pydicom", reason="DICOM objects need fedfactory[dicom]")

FEW, MANY = 12, 200
LONGEST = 5.0  # seconds
MOST = 2 << 30  # bytes
READER = Path(__file__).with_name("read_damaged_images.py")


def run(kind: str, source: Path, count: int) -> None:
    done = subprocess.run(
        [sys.executable, str(READER), kind, str(source), str(count)],
        capture_output=True, text=True, timeout=60 + 5 * count, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"ended with {done.returncode}\n{done.stdout[-500:]}\n{done.stderr[-3000:]}"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["faults"] == []
    assert found["longest"] < LONGEST
    assert found["memory"] < MOST, f"{found['memory'] >> 20} MiB"
    assert found["refused"] > count // 4 and found["refused"] + found["read"] >= count  # the mutations do something


@pytest.fixture
def source(tmp_path) -> Path:
    """A NIfTI file with labels, and a series of three slices."""
    image, label = ball_volume(shape=(12, 10, 6))
    write_volume(tmp_path / "image.nii", Volume(np.round(image.data).astype(np.int16), image.affine))
    write_volume(tmp_path / "label.nii", label)
    write_dicom(tmp_path / "series", Volume(np.round(image.data[:, :, :3]), image.affine))
    for path in (tmp_path / "series").iterdir():  # with forms of their values, which can be damaged too
        dataset = pydicom.dcmread(path)
        dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        dataset.save_as(path, implicit_vr=False, little_endian=True)
    return tmp_path


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_a_damaged_image_is_an_error_of_one_line_or_is_read(kind, source):
    run(kind, source, FEW)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_two_hundred_damaged_images_are_errors_of_one_line_or_are_read(kind, source):
    run(kind, source, MANY)
