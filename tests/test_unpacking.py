"""Packed files that would fill the memory: refused by their headers, in a process whose memory is measured."""

from __future__ import annotations

import gzip
import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from fedfactory.errors import VolumeError
from fedfactory.imaging.archive.folder_content import content_of
from fedfactory.imaging.archive.headers import coded_size, read_header
from fedfactory.imaging.formats.unpacking import MAX_RATIO, read_into, refuse_bomb, unpack_into, unpacks_beyond
from fedfactory.imaging.volume_files import read_volume
from helpers import write_dicom
from test_cases import tilted  # noqa: F401

MOST = 2 << 30  # bytes of memory
MEASURED = """
import resource, sys
from pathlib import Path
from fedfactory.errors import FedFactoryError
{imports}
path = Path(sys.argv[1])
try:
    {read}
    print("read")
except FedFactoryError as error:
    print("refused:", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
VOLUME = ("from fedfactory.imaging.volume_files import read_volume", "read_volume(path)")
LABELS = (VOLUME[0], "read_volume(path, integer=True)")
MARKS = ("from fedfactory.imaging.formats.kinds import marked_frames", "marked_frames(path)")
PICTURE = ("from fedfactory.imaging.pictures.decoding import read_picture", "read_picture(path)")
SERIES = (
    "from fedfactory.imaging.archive.series import find_series, read_series\nfrom fedfactory.errors import VolumeError",
    "found = find_series(path)\n    read_series(next(iter(found.values()), tuple(path.iterdir())))",
)
ALL_FILES = (SERIES[0], "read_series(tuple(sorted(path.iterdir())))")
CHECKPOINT = (
    "from fedfactory.generative.original_checkpoint import import_checkpoint",
    "import_checkpoint(path)",
)


def outcome(path: Path, kind: tuple[str, str]) -> str:
    """What came of reading a file in a process of its own, whose memory is checked."""
    code = MEASURED.format(imports=kind[0], read=kind[1])
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    text, memory = done.stdout.strip().splitlines()
    assert int(memory) < MOST, f"{int(memory) >> 20} MiB: {text}"
    assert path.is_dir() or path.stat().st_size < 8 << 20
    return text


def zeros(path: Path, start: bytes, count: int) -> Path:
    """A gzip file of a beginning and zeros, in parts that are packed once."""
    part = 1 << 22
    path.write_bytes(
        gzip.compress(start) + gzip.compress(bytes(part)) * (count // part) + gzip.compress(bytes(count % part))
    )
    return path


def zlib_zeros(count: int) -> bytes:
    """A zlib stream of zeros, in parts that are packed once; its checksum is missing."""
    packer = zlib.compressobj()
    parts = [packer.compress(bytes(1 << 22)) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2)]
    return parts[0] + parts[1] * (count // (1 << 22) - 1)


def nifti(shape: tuple[int, ...], dtype: str, *, slope: float = 1.0) -> bytes:
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(dtype)
    header.set_sform(np.eye(4), 1)
    header["magic"], header["vox_offset"], header["scl_slope"] = b"n+1", 352, slope
    return header.binaryblock + bytes(4)


def test_a_packed_volume_may_unpack_to_what_is_likely(tmp_path):
    refuse_bomb("a", packed=1000, unpacked=1 << 29, most=1 << 29)
    refuse_bomb("a", packed=10 << 20, unpacked=MAX_RATIO * (10 << 20), most=1 << 29)
    with pytest.raises(VolumeError, match="a: its header claims 2048 MiB in a file of 10485760 bytes"):
        refuse_bomb("a", packed=10 << 20, unpacked=2 << 30, most=1 << 29)


@pytest.mark.parametrize("length", [0, 1, 99, 100, 101, 300])
def test_unpacking_into_memory_gives_the_bytes_and_tells_whether_there_are_more(length):
    content = bytes(range(100)) * 3
    buffer = bytearray(100)
    count = unpack_into(io.BytesIO(zlib.compress(content[:length])), zlib.decompressobj(), memoryview(buffer))
    assert count == min(length, 101)
    assert buffer[: min(length, 100)] == content[: min(length, 100)]
    assert read_into(io.BytesIO(content[:length]), memoryview(buffer)) == min(length, 100)
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(content[:length]) + packer.flush()
    assert unpacks_beyond(io.BytesIO(packed), 100) == (length > 100)


def test_scaled_voxels_are_those_of_nibabel_in_every_part(tmp_path, monkeypatch):
    monkeypatch.setattr("fedfactory.imaging.formats.nifti.PART", 7)
    values = np.random.default_rng(0).integers(-300, 300, (5, 4, 3))
    for dtype, slope, inter in (
        ("<i2", 0.1, 3.0),
        (">i2", 2.0, 0.5),
        ("u1", 1e-3, 0.0),
        ("f4", 0.7, 0.1),
        ("f8", 1, 0),
    ):
        image = nib.Nifti1Image(values.astype(dtype), np.eye(4))
        image.header.set_data_dtype(dtype)
        image.header.set_slope_inter(slope, inter)
        nib.save(image, tmp_path / "a.nii.gz")
        wanted = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj, dtype=np.float32)
        np.testing.assert_array_equal(read_volume(tmp_path / "a.nii.gz").data, wanted)


@pytest.mark.fuzz
def test_a_small_file_of_any_kind_takes_less_than_two_gigabytes(tmp_path):
    gib = 1 << 30
    read = {
        "likely image": (zeros(tmp_path / "a.nii.gz", nifti((512, 512, 512), "u1", slope=0.5), gib // 8), VOLUME),
        "likely labels": (zeros(tmp_path / "b.nii.gz", nifti((512, 512, 2048), "u1"), gib // 2), LABELS),
        "labels of eight bytes": (zeros(tmp_path / "c.nii.gz", nifti((512, 512, 512), "f8"), gib), LABELS),
        "scaled labels": (zeros(tmp_path / "d.nii.gz", nifti((512, 512, 512), "u1", slope=2.0), gib // 8), LABELS),
    }
    for name, (path, kind) in read.items():
        assert outcome(path, kind) == "read" or "all voxels" in outcome(path, kind), name
    mha = "ObjectType = Image\nNDims = 3\nDimSize = 1024 1024 {}\nElementSpacing = 1 1 1\nElementType = {}\n"
    mha += "CompressedData = True\nElementDataFile = LOCAL\n"
    packed = zlib_zeros(2 * gib)
    (tmp_path / "e.mha").write_bytes(mha.format(1024, "MET_SHORT").encode() + packed)
    (tmp_path / "f.mha").write_bytes(mha.format(128, "MET_UCHAR").encode() + packed)
    nrrd = b"NRRD0004\ntype: double\ndimension: 3\nspacings: 1 1 1\nsizes: 1024 1024 256\n"
    nrrd += b"encoding: gzip\nendian: little\n\n"
    head = tmp_path / "g.nrrd"
    head.write_bytes(nrrd + gzip.compress(bytes(1 << 22)) * 512)
    refused = {
        "image": (zeros(tmp_path / "h.nii.gz", nifti((1024, 1024, 1024), "u1"), gib), VOLUME),
        "image of eight bytes": (zeros(tmp_path / "i.nii.gz", nifti((1024, 1024, 256), "f8"), 2 * gib), VOLUME),
        "frames": (zeros(tmp_path / "j.nii.gz", nifti((512, 512, 4, 1024), "u2"), 2 * gib), MARKS),
        "zlib": (tmp_path / "e.mha", VOLUME),
        "longer zlib": (tmp_path / "f.mha", LABELS),
        "gzip in NRRD": (head, VOLUME),
    }
    for name, (path, kind) in refused.items():
        assert outcome(path, kind).startswith("refused: "), name


def png(rows: int, columns: int, *, bits: int, colour: int, name: Path) -> Path:
    """A black PNG."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    row = bytes(1 + columns * {0: 1, 2: 3, 6: 4}[colour] * bits // 8)
    packer = zlib.compressobj(9)
    data = b"".join([*(packer.compress(row) for _ in range(rows)), packer.flush()])
    header = struct.pack(">IIBBBBB", columns, rows, bits, colour, 0, 0, 0)
    name.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return name


@pytest.mark.fuzz
def test_a_small_picture_takes_less_than_two_gigabytes(tmp_path):
    assert outcome(png(10_000, 10_000, bits=8, colour=6, name=tmp_path / "a.png"), PICTURE) == "read"
    assert outcome(png(10_000, 10_000, bits=8, colour=2, name=tmp_path / "b.png"), PICTURE) == "read"
    text = outcome(png(10_000, 10_000, bits=16, colour=6, name=tmp_path / "c.png"), PICTURE)
    assert "its header claims 762 MiB" in text
    from PIL import Image

    Image.new("RGB", (10_000, 10_000)).save(tmp_path / "d.tif", compression="tiff_adobe_deflate")
    assert outcome(tmp_path / "d.tif", PICTURE) == "read"
    Image.new("RGB", (10_000, 9_900)).save(tmp_path / "e.jpg", progressive=True)
    assert outcome(tmp_path / "e.jpg", PICTURE) == "read"


@pytest.mark.fuzz
def test_a_small_checkpoint_with_packed_entries_is_refused(tmp_path):
    torch.save({"g": {"a": torch.zeros(16)}, "d": {}, "g_ema": {"a": torch.zeros(16)}}, tmp_path / "small.pt")
    with (
        zipfile.ZipFile(tmp_path / "small.pt") as source,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.namelist():
            with target.open(entry, "w", force_zip64=True) as file:
                file.write(source.read(entry))
                for _ in range(32 if "/data/" in entry else 0):
                    file.write(bytes(1 << 22))
    assert "packed" in outcome(tmp_path / "bomb.pt", CHECKPOINT)


def deflated(path: Path, more: int) -> None:
    """Deflate a DICOM file, with an element of zeros behind its pixels."""
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.DeflatedExplicitVRLittleEndian
    if more:
        dataset.add_new(0xFFFCFFFC, "OB", bytes(more))
    dataset.save_as(path, enforce_file_format=True)


def test_a_deflated_series_may_hold_its_pixels_and_little_more(tmp_path, tilted, monkeypatch):  # noqa: F811
    write_dicom(tmp_path / "a", tilted)
    files = sorted((tmp_path / "a").iterdir())
    deflated(files[0], 0)
    assert read_header(files[0]).fault == ""
    monkeypatch.setattr("fedfactory.imaging.archive.headers.MAX_BESIDE", 1 << 16)
    deflated(files[1], 1 << 20)
    assert "is deflated and unpacks to more than" in read_header(files[1]).fault


def encapsulated(path: Path, code: bytes, *, rows: int | None = None) -> None:
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.dcmread(path)
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.JPEG2000Lossless
    dataset.PixelData = pydicom.encaps.encapsulate([code])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    if rows is not None:
        dataset.Rows = dataset.Columns = rows
    dataset.save_as(path, enforce_file_format=True)


def test_packed_pixels_of_another_size_than_the_headers_are_refused(tmp_path, tilted):  # noqa: F811
    write_dicom(tmp_path / "a", tilted)
    path = min((tmp_path / "a").iterdir())
    code = b"\xff\x4f\xff\x51" + struct.pack(">HHIIII", 41, 0, 30_000, 20_000, 0, 0) + bytes(40)
    assert coded_size(code) == (20_000, 30_000)
    encapsulated(path, code)
    assert "has packed pixels of 20000 x 30000, its header says 10 x 12" in read_header(path).fault
    encapsulated(path, code, rows=60_000)
    assert "more than 100 times its size" in read_header(path).fault


def test_the_size_in_a_code_is_found():
    jpeg = b"\xff\xd8\xff\xe0\x00\x10" + bytes(14) + b"\xff\xc0\x00\x11\x08" + struct.pack(">HH", 7, 9) + bytes(12)
    assert coded_size(jpeg) == (7, 9)
    assert coded_size(jpeg.replace(b"\xff\xc0", b"\xff\xf7")) == (7, 9)  # JPEG-LS
    for length in range(len(jpeg)):
        assert coded_size(jpeg[:length]) in (None, (7, 9))
    assert coded_size(bytes(80)) is None  # run lengths, which the header alone limits


@pytest.mark.fuzz
def test_a_small_series_takes_less_than_two_gigabytes(tmp_path, tilted):  # noqa: F811
    for name, more in (("deflated", 256 << 20), ("sound", 0)):
        write_dicom(tmp_path / name, tilted)
        deflated(min((tmp_path / name).iterdir()), more)
    # The damaged file is told and left out, and the slices beside it still make a volume; asked for, it is refused.
    (fault,) = content_of(list((tmp_path / "deflated").iterdir())).damaged.values()
    assert "is deflated and unpacks to more than" in fault
    assert outcome(tmp_path / "deflated", SERIES) == "read"
    assert outcome(tmp_path / "deflated", ALL_FILES).startswith("refused: ")
    assert outcome(tmp_path / "sound", SERIES) == "read"
    for rows in (None, 23_000, 60_000):
        folder = tmp_path / f"code{rows}"
        write_dicom(folder, tilted)
        for path in sorted(folder.iterdir())[1:]:
            os.remove(path)
        code = b"\xff\x4f\xff\x51" + struct.pack(
            ">HHIIIIIIIIH", 41, 0, *[rows or 30_000] * 2, 0, 0, *[rows or 30_000] * 2, 0, 0, 1
        )
        encapsulated(next(folder.iterdir()), code + b"\x0f\x01\x01\xff\xd9", rows=rows)
        assert outcome(folder, SERIES).startswith("refused: "), rows
