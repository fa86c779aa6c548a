"""Two hundred volumes that are broken in some way: each gives a single line, and the good cases are prepared."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from fedfactory.imaging.volume_files import write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from helpers import ball_volume, write_site

BROKEN = 200
# Offsets in a NIfTI-1 header.
DIM, DATATYPE, PIXDIM, VOX_OFFSET, SLOPE = 40, 70, 76, 108, 112
QFORM, SFORM, SROW, MAGIC = 252, 254, 280, 344


def patched(content: bytes, *changes: tuple[int, str, tuple]) -> bytes:
    """The file with other numbers in its header."""
    raw = bytearray(content)
    for offset, kind, values in changes:
        struct.pack_into(kind, raw, offset, *values)
    return bytes(raw)


def unsized(kind: str, values: tuple) -> tuple:
    """Header changes after which the geometry follows from the pixel sizes alone."""
    return (SFORM, "<h", (0,)), (QFORM, "<h", (0,)), (PIXDIM + 4, kind, values)


def breakers(rng: np.random.Generator) -> list[Callable[[Path], None]]:
    """Functions that each break the case folder they are called with."""
    image, label = ball_volume()
    good = nib.Nifti1Image(image.data, image.affine).to_bytes()

    def raw(content: bytes, name: str = "scan.nii") -> Callable[[Path], None]:
        def write(case: Path) -> None:
            (case / "image" / "scan.nii.gz").unlink()
            (case / "image" / name).write_bytes(content)

        return write

    def volume(data: np.ndarray) -> Callable[[Path], None]:
        return raw(nib.Nifti1Image(data, image.affine).to_bytes())

    def mask(data: np.ndarray, affine: np.ndarray = label.affine) -> Callable[[Path], None]:
        return lambda case: write_volume(case / "label" / "mask.nii.gz", Volume(data, affine))

    def link(target: str) -> Callable[[Path], None]:
        def write(case: Path) -> None:
            (case / "image" / "scan.nii.gz").unlink()
            (case / "image" / "scan.nii.gz").symlink_to(target)

        return write

    def fifo(case: Path) -> None:
        (case / "image" / "scan.nii.gz").unlink()
        os.mkfifo(case / "image" / "scan.nii.gz")

    packed = gzip.compress(good, 1)
    spoiled = image.data.copy()
    spoiled[tuple(rng.integers(0, 8, 3))] = rng.choice([np.nan, np.inf, -np.inf])
    shear = image.affine.copy()
    shear[:3, 1] = shear[:3, 0]
    flipped = bytearray(packed)
    flipped[int(rng.integers(40, len(packed) - 40))] ^= 0xFF
    many = int(rng.integers(2, 6))
    return [
        raw(packed[: int(rng.integers(1, len(packed) - 30))], "scan.nii.gz"),  # truncated gzip
        raw(bytes(flipped), "scan.nii.gz"),  # damaged gzip
        raw(good[: int(rng.integers(1, len(good)))]),  # truncated
        raw(b""),
        raw(bytes(rng.integers(0, 256, 600, dtype=np.uint8))),  # noise
        raw(patched(good, (MAGIC, "4s", (b"nope",)))),
        raw(patched(good, *unsized("<3f", (-3.0, 3.0, 5.0)))),  # negative spacing, and no other geometry
        raw(patched(good, (DIM, "<4h", (3, 0, 24, 8)))),  # empty
        raw(patched(good, (DIM, "<4h", (3, -20, 24, 8)))),
        raw(patched(good, (DIM, "<4h", (3, 32767, 32767, 32767)))),  # 140 TB
        raw(patched(good, (DIM, "<4h", (3, 400, 400, int(rng.integers(100, 900)))))),  # more than the file holds
        raw(gzip.compress(patched(good, (DIM, "<4h", (3, 3000, 3000, 100)))), "scan.nii.gz"),
        raw(patched(good, (DIM, "<h", (int(rng.integers(8, 99)),)))),  # too many dimensions
        raw(patched(good, *unsized("<3f", (0.0, 3.0, 5.0)))),  # zero spacing
        raw(patched(good, *unsized("<3f", (np.nan, 3.0, 5.0)))),
        raw(patched(good, (DATATYPE, "<h", (int(rng.integers(5000, 9999)),)))),
        raw(patched(good, (VOX_OFFSET, "<f", (float(rng.integers(10**6, 10**7)),)))),
        raw(patched(good, (VOX_OFFSET, "<f", (float("nan"),)))),
        raw(patched(good, (SLOPE, "<2f", (1e38, 1e38)))),  # overflows
        volume(spoiled),
        volume(np.full_like(image.data, rng.integers(-5, 5))),  # constant
        raw(patched(good, (SROW, "<12f", tuple(shear[:3].ravel())))),  # cannot be inverted
        raw(patched(good, (SROW, "<12f", (3.0, 0, 0, 0, 0, 3.0, 0, 0, 0, 0, 0, 0)))),
        raw(patched(good, (SROW, "<12f", (np.nan,) * 12))),
        volume(image.data[:, :, 0]),  # 2-D
        volume(np.stack([image.data] * many, axis=3)),  # 4-D
        volume(image.data.astype(np.complex64)),
        volume(np.zeros(image.data.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])),  # colour
        mask(label.data[:, :, :-1]),
        mask(label.data, label.affine + np.eye(4) * 0.5),
        mask(label.data + np.float32(0.5)),
        mask(label.data.astype(np.int16) - many),  # negative
        mask(label.data.astype(np.uint16) * int(rng.integers(128, 30000))),  # out of range
        mask(np.where(label.data > 0, np.float32(np.nan), 0)),
        lambda case: (case / "label" / "mask.nii.gz").write_bytes(packed[:99]),
        link("scan.nii.gz"),  # to itself
        link("../../nowhere.nii.gz"),
        link("/"),
        fifo,
        lambda case: (case / "image" / "more.nii.gz").write_bytes(packed),  # two images in a case
        lambda case: (case / "label" / "more.nii.gz").write_bytes(packed),
    ]


NAMES = (
    "case {n}",
    "cäse{n}",
    "case{n} ..",
    "...case{n}",
    "case\n{n}",
    "-rf{n}",
    "$HOME{n}",
    "case{n}" + "x" * 180,
    "[red]{n}",
    "病人{n}",
)


def test_two_hundred_broken_cases_give_a_line_each_and_the_good_cases_become_a_store(tmp_path):
    rng = np.random.default_rng(0)
    source = tmp_path / "s"
    write_site(source, cases=4)
    names = []
    while len(names) < BROKEN:
        for breaker in breakers(rng)[: BROKEN - len(names)]:
            name = "bad " + NAMES[len(names) % len(NAMES)].format(n=len(names))
            write_site(tmp_path / "new", cases=1)
            (tmp_path / "new" / "case0").rename(source / name)
            breaker(source / name)
            names.append(name)
    config = PrepareConfig(domain="x", size=16, z_bins=4)
    result = prepare(source, tmp_path / "out", config, workers=2)
    used = {case.name for case in result.store.cases}
    # A link to a folder is no volume: such subjects count as lacking an image and share a warning.
    without = [text for text in result.store.warnings if "without an image" in text]
    assert used == {"case0", "case1", "case2", "case3"}
    assert len(result.failed) + sum(name.startswith("bad") for name in _linked_to_a_folder(source)) == BROKEN
    assert without
    for name, reason in result.failed.items():
        assert reason.isprintable()
        assert name.isprintable()
        assert len(reason) < 700
    result.store.verify()
    assert len(SliceStore(tmp_path / "out").slices()) == 32
    again = prepare(source, tmp_path / "out", config)
    assert again.unchanged == 4
    assert again.failed == result.failed


def _linked_to_a_folder(source: Path) -> list[str]:
    return [case.name for case in source.iterdir() if (case / "image" / "scan.nii.gz").is_dir()]


def test_an_unreadable_file_gives_a_single_line(site, tmp_path, monkeypatch):
    """The error is simulated: tests may run as an administrator, whom permissions do not stop."""
    opened = Path.open

    def refuse(self, *arguments, **options):
        if self.parent.parent.name == "case1":
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    result = prepare(site, tmp_path / "out", PrepareConfig(domain="x", size=16, z_bins=4))
    assert "cannot be read (Permission denied)" in result.failed["case1"]
    assert len(result.store.cases) == 2
