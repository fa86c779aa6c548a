"""Reading and writing pictures: what comes back, and what is refused instead of being read wrongly."""

from __future__ import annotations

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import tifffile
from fedfactory.errors import FedFactoryError, UsageError, VolumeError
from fedfactory.imaging.overlays import CLASS_COLOURS
from fedfactory.imaging.pictures.contours import with_contours
from fedfactory.imaging.pictures.decoding import (
    PictureFacts,
    decode_picture,
    is_mask,
    is_picture,
    picture_facts,
    read_picture,
    write_picture,
)
from PIL import Image, ImageCms, ImageOps

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (20, 30), np.uint8)
RGB = RNG.integers(0, 256, (20, 30, 3), np.uint8)
GREY16 = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
RGB16 = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
ALPHA = np.array([0, 51, 255], np.uint8)[RNG.integers(0, 3, (20, 30))]
EXIF = 274  # the tag of the orientation


def smooth(rows: int, columns: int) -> np.ndarray:
    """A picture that JPEG keeps well."""
    y, x = np.mgrid[0:rows, 0:columns]
    return np.stack([x * 255 // columns, y * 255 // rows, (x + y) * 255 // (rows + columns)], -1).astype(np.uint8)


def packed(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    """A file of this kind as Pillow writes it."""
    file = io.BytesIO()
    image = Image.fromarray(array) if mode in (None, "1") else Image.fromarray(array, mode)
    (image.convert("1") if mode == "1" else image).save(file, kind, **options)
    return file.getvalue()


def tiff(array: np.ndarray, **options) -> bytes:
    """A TIFF file as tifffile writes it."""
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def png_with(content: bytes, offset: int, form: str, *values: int) -> bytes:
    """A PNG file with other numbers in its header, and the checksum that goes with them."""
    raw = bytearray(content)
    struct.pack_into(form, raw, offset, *values)
    raw[29:33] = struct.pack(">I", zlib.crc32(bytes(raw[12:29])))
    return bytes(raw)


def read(content: bytes, **options) -> np.ndarray:
    return decode_picture(content, "x.png", **options).pixels


def palette_png(**options) -> bytes:
    image = Image.fromarray(GREY % 3, "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 250, 7])
    file = io.BytesIO()
    image.save(file, options.pop("kind", "PNG"), **options)
    return file.getvalue()


# what is read


EXPANDED = np.array([[10, 20, 30], [200, 0, 0], [0, 250, 7]], np.uint8)[GREY % 3]
PALETTE_ALPHA = np.where((GREY % 3 == 1)[..., None], 0, EXPANDED)
OVER_BLACK = np.round(RGB * (ALPHA[..., None] / 255.0)).astype(np.uint8)
KINDS = {
    "grey PNG": (packed(GREY), GREY[..., None]),
    "colour PNG": (packed(RGB), RGB),
    "interlaced PNG of 16 bits": (cv2.imencode(".png", GREY16)[1].tobytes(), GREY16[..., None]),
    "colour PNG of 16 bits": (cv2.imencode(".png", RGB16[..., ::-1])[1].tobytes(), RGB16),
    "PNG of one bit": (packed(GREY // 128 * 255, mode="1"), GREY[..., None] // 128 * 255),
    "palette PNG": (palette_png(), EXPANDED),
    "palette PNG with a transparent colour": (palette_png(transparency=1), PALETTE_ALPHA),
    "PNG with opacity": (packed(np.dstack([RGB, ALPHA])), OVER_BLACK),
    "opaque PNG": (packed(np.dstack([RGB, np.full_like(ALPHA, 255)])), RGB),
    "grey PNG with opacity": (packed(np.dstack([GREY, np.full_like(ALPHA, 255)]), mode="LA"), GREY[..., None]),
    "grey PNG with a transparent value": (packed(GREY, transparency=9), np.where(GREY == 9, 0, GREY)[..., None]),
    "grey BMP": (packed(GREY, "BMP"), GREY[..., None]),
    "colour BMP": (packed(RGB, "BMP"), RGB),
    "grey TIFF": (tiff(GREY), GREY[..., None]),
    "TIFF where 0 is white": (tiff(255 - GREY, photometric="miniswhite"), GREY[..., None]),
    "TIFF of 16 bits where 0 is white": (tiff(65535 - GREY16, photometric="miniswhite"), GREY16[..., None]),
    "colour TIFF": (tiff(RGB, photometric="rgb", compression="zlib"), RGB),
    "TIFF of planes": (tiff(np.moveaxis(RGB, 2, 0).copy(), photometric="rgb", planarconfig="separate"), RGB),
    "tiled TIFF of 16 bits": (tiff(RGB16, photometric="rgb", tile=(16, 16)), RGB16),
    "BigTIFF in the other byte order": (tiff(GREY16, bigtiff=True, byteorder=">"), GREY16[..., None]),
    "TIFF of one bit": (packed(GREY // 128 * 255, "TIFF", "1", compression="group4"), GREY[..., None] // 128 * 255),
    "palette TIFF": (palette_png(kind="TIFF"), EXPANDED),
    "TIFF with opacity": (packed(np.dstack([RGB, ALPHA]), "TIFF"), OVER_BLACK),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_keep_their_values(kind):
    content, expected = KINDS[kind]
    picture = decode_picture(content, "x.png")
    assert picture.pixels.dtype == expected.dtype
    np.testing.assert_array_equal(picture.pixels, expected)
    assert picture.facts == PictureFacts(*expected.shape, 16 if expected.dtype == np.uint16 else 8)
    assert picture.pixels.flags.c_contiguous


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF of 16 bits"])
def test_pictures_are_turned_as_their_camera_says(tmp_path, kind, turn):
    exif = Image.Exif()
    exif[EXIF] = turn
    source = smooth(20, 30)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(packed(source, exif=exif)))))
    if kind == "TIFF of 16 bits":
        content = tiff(source.astype(np.uint16) * 257, photometric="rgb", extratags=[(EXIF, 3, 1, turn, True)])
        found = read(content) // 257
    else:
        content = packed(source, kind, exif=exif)
        found = read(content)
    (tmp_path / "x.png").write_bytes(content)
    facts = picture_facts(tmp_path / "x.png")
    assert (facts.rows, facts.columns) == found.shape[:2] == expected.shape[:2]
    assert np.abs(found.astype(int) - expected).max() <= 20  # JPEG is not exact; another turn differs by 200


def test_colour_becomes_luminance_and_grey_is_repeated():
    weights = RGB.astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read(packed(RGB), channels=1)[..., 0], weights, atol=0.51)
    np.testing.assert_array_equal(read(packed(GREY), channels=3), np.repeat(GREY[..., None], 3, axis=2))
    content = packed(smooth(40, 40), "JPEG", quality=95)
    expected = read(content).astype(float) @ [0.299, 0.587, 0.114]
    np.testing.assert_allclose(read(content, channels=1)[..., 0], expected, atol=2)
    assert read(packed(smooth(40, 40)[..., 0], "JPEG"), channels=3).shape == (40, 40, 3)


@pytest.mark.parametrize(("at_least", "reduction"), [(None, 1), (101, 1), (100, 2), (51, 2), (50, 4), (26, 4), (1, 8)])
def test_a_jpeg_is_reduced_only_as_far_as_the_caller_allows(at_least, reduction):
    content = packed(smooth(199, 160), "JPEG", quality=95)
    picture = decode_picture(content, "x.jpg", at_least=at_least)
    assert picture.reduction == reduction
    assert picture.facts == PictureFacts(199, 160, 3, 8)
    assert picture.pixels.shape == (-(-199 // reduction), -(-160 // reduction), 3)
    whole = read(content)[:192, :160].astype(float)
    means = whole.reshape(192 // reduction, reduction, 160 // reduction, reduction, 3).mean((1, 3))
    assert (
        np.abs(means - picture.pixels[: 192 // reduction]).max() < 4
    )  # a shift by one pixel would give 1.6 * reduction


def test_a_reduced_jpeg_is_turned():
    exif = Image.Exif()
    exif[EXIF] = 6
    picture = decode_picture(packed(smooth(80, 160), "JPEG", exif=exif), "x.jpg", at_least=80)
    assert picture.pixels.shape == (80, 40, 3)
    assert (picture.facts.rows, picture.facts.columns) == (160, 80)


def cmyk_profile() -> bytes:
    """An ICC profile of four inks: no ink is white, black is black, each of the others takes a third of the light."""
    corners = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1).reshape(16, 4)  # the last ink runs fastest
    lightness = 255 * (1 - corners[:, :3].sum(1) / 3) * (1 - corners[:, 3])
    table = np.stack([lightness, *np.full((2, 16), 128)], -1).round().astype(np.uint8)
    ramp = bytes(range(256))
    one = [65536 if k % 4 == 0 else 0 for k in range(9)]
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + struct.pack(">9i", *one) + ramp * 4 + table.tobytes() + ramp * 3
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(lut))
    head = struct.pack(">I4sI4s4s4s", 144 + len(lut), b"", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + tags + lut


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_printers_colours_are_converted_by_their_profile(kind):
    inks = np.zeros((32, 64, 4), np.uint8)
    inks[:, 16:32, 3], inks[:, 32:48, 0], inks[:, 48:, :2] = 255, 255, 255
    files = [io.BytesIO(), io.BytesIO()]
    Image.fromarray(inks, "CMYK").save(files[0], kind)
    Image.fromarray(inks, "CMYK").save(files[1], kind, icc_profile=cmyk_profile())
    with pytest.raises(
        VolumeError, match=r"x.png: has printer's colours \(CMYK\) without an ICC profile; save it as RGB"
    ):
        read(files[0].getvalue())
    picture = decode_picture(files[1].getvalue(), "x.png", at_least=8)
    assert picture.facts == PictureFacts(32, 64, 3, 8)
    shown = picture.pixels[16, [8, 24, 40, 56]].astype(int)
    assert np.ptp(shown, axis=1).max() <= 3  # grey
    np.testing.assert_allclose(shown[:, 0], [255, 0, 162, 79], atol=6)  # lightness 100, 0, 67 and 33 in sRGB


def test_a_profile_that_does_not_fit_is_refused():
    file = io.BytesIO()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGB).convert("CMYK").save(file, "JPEG", icc_profile=profile)
    with pytest.raises(VolumeError, match=r"x.png: cannot be decoded"):
        read(file.getvalue())


def test_the_content_decides_and_not_the_name(tmp_path):
    (tmp_path / "x.png").write_bytes(packed(smooth(20, 30), "JPEG"))
    assert read_picture(tmp_path / "x.png").shape == (20, 30, 3)
    (tmp_path / "hello.png").write_text("no picture")
    with pytest.raises(VolumeError, match=r"hello.png: is no PNG, JPEG, TIFF or BMP file"):
        read_picture(tmp_path / "hello.png")


def test_names_of_pictures_and_masks(tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert is_picture(tmp_path / "A.JPG") and is_picture(tmp_path / "a.tiff")
    assert not any(is_picture(tmp_path / name) for name in (".a.png", "a.gif", "a.txt", "folder.png"))
    assert is_mask(tmp_path / "a.GIF") and is_mask(tmp_path / "a.bmp") and not is_mask(tmp_path / "._a.gif")


@pytest.mark.parametrize("array", [GREY, GREY16[..., None], RGB, RGB16])
def test_written_pictures_are_read_again(tmp_path, array):
    write_picture(tmp_path / "new" / "x.png", array)
    np.testing.assert_array_equal(read_picture(tmp_path / "new" / "x.png").reshape(array.shape), array)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    ("name", "array"), [("x.jpg", RGB), ("x.png", RGB.astype(float)), ("x.png", RGB[..., :2]), ("x.png", RGB[:0])]
)
def test_what_is_no_picture_is_not_written(tmp_path, name, array):
    with pytest.raises(UsageError):
        write_picture(tmp_path / name, array)
    assert not list(tmp_path.iterdir())


# what is refused


def frames(kind: str) -> bytes:
    """Two pictures in one file."""
    file = io.BytesIO()
    images = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    images[0].save(file, kind, save_all=True, append_images=images[1:])
    return file.getvalue()


def half_a_jpeg(**options) -> bytes:
    """A JPEG whose scan was cut, and that some program then ended properly."""
    content = packed(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG", **options)
    return content[: len(content) // 2] + b"\xff\xd9"


PNG = packed(RGB)
SEVERAL = {"photometric": "minisblack", "planarconfig": "contig"}
REFUSED = {
    "text": (b"hello", "is no PNG"),
    "GIF": (packed(GREY, "GIF"), "is no PNG"),
    "animated PNG": (frames("PNG"), "is an animation; give one file"),
    "TIFF of two pages": (frames("TIFF"), "has several pages; give one file"),
    "floating-point TIFF": (tiff(GREY.astype(np.float32)), "holds floating-point numbers"),
    "complex TIFF": (tiff(GREY.astype(np.complex64)), "holds complex numbers"),
    "signed TIFF": (tiff(GREY.astype(np.int16)), "holds signed numbers"),
    "TIFF of 32 bits": (tiff(GREY.astype(np.uint32)), "channels of 32 bits"),
    "TIFF of five channels": (tiff(np.zeros((20, 30, 5), np.uint8), **SEVERAL), "5 channels"),
    "bomb": (png_with(PNG, 16, ">II", 60000, 60000), "its header claims 60000 x 60000 pixels; at most"),
    "empty PNG": (png_with(PNG, 16, ">II", 0, 20), "has 20 x 0 pixels"),
    "PNG that claims more rows": (png_with(PNG, 20, ">I", 900), "cannot be decoded"),
    "PNG of an unknown kind": (png_with(PNG, 24, ">BB", 8, 5), "is damaged"),
    "PNG with a flipped bit": (PNG[:60] + bytes([PNG[60] ^ 1]) + PNG[61:], "is damaged; copy it again"),
    "cut JPEG with an end mark": (half_a_jpeg(), "is truncated; copy it again"),
    "JPEG with a short frame": (b"\xff\xd8\xff\xc0\0\x04\0\0\xff\xd9", "is a damaged or an unusual JPEG"),
    "JPEG of no scan": (packed(RGB, "JPEG")[:200] + b"\xff\xd9", "is truncated"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_unusable_files_are_refused_with_one_line(kind):
    content, message = REFUSED[kind]
    with pytest.raises(VolumeError, match=message) as error:
        read(content)
    assert str(error.value).startswith("x.png: ") and "\n" not in str(error.value)


def test_files_that_cannot_be_opened_are_refused(tmp_path):
    (tmp_path / "empty.png").touch()
    with pytest.raises(VolumeError, match=r"empty.png: is empty; copy it again"):
        read_picture(tmp_path / "empty.png")
    for name in ("missing.png", "."):
        with pytest.raises(UsageError, match="no such file"):
            read_picture(tmp_path / name)


def test_a_grey_corner_of_jpegs_grey_is_no_damage():
    content = packed(np.full((64, 64, 3), 128, np.uint8), "JPEG")
    assert (read(content) == 128).all()
    for progressive in (False, True):
        picture = smooth(64, 64)
        picture[-24:, -24:] = 128
        assert read(packed(picture, "JPEG", progressive=progressive, quality=95), at_least=32).shape == (32, 32, 3)


def test_the_size_is_checked_before_anything_is_decoded():
    with pytest.raises(VolumeError, match="at most 599 are read"):
        read(PNG, max_pixels=599)
    assert read(PNG, max_pixels=600).shape == RGB.shape


VICTIMS = {
    "png": PNG,
    "palette": palette_png(),
    "jpeg": packed(smooth(48, 40), "JPEG", quality=90),
    "progressive": packed(smooth(48, 40), "JPEG", quality=90, progressive=True),
    "tiff": tiff(RGB, photometric="rgb"),
    "deflate": tiff(RGB16, photometric="rgb", compression="zlib", predictor=True),
    "tags first": packed(RGB, "TIFF", compression="tiff_lzw"),
    "bmp": packed(RGB, "BMP"),
}  # fmt: skip


@pytest.mark.parametrize("kind", VICTIMS)
def test_a_truncated_file_is_always_refused(kind):
    content = VICTIMS[kind]
    lengths = {*range(1, 12), *range(12, len(content), max(1, len(content) // 60)), len(content) - 1}
    for length in lengths:
        with pytest.raises(VolumeError) as error:
            read(content[:length])
        assert "\n" not in str(error.value), length


@pytest.mark.parametrize("kind", VICTIMS)
def test_a_damaged_file_gives_a_picture_or_one_line(kind):
    """Two hundred files of each kind with flipped bytes, lying numbers, and lost or repeated pieces."""
    rng, content, decoded = np.random.default_rng(len(kind)), VICTIMS[kind], 0
    for trial in range(200):
        raw = bytearray(content)
        at = int(rng.integers(0, len(raw) if trial % 2 else min(len(raw), 200)))
        if trial % 4 == 0:
            raw[at : at + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        elif trial % 4 == 1:
            raw[at] ^= 1 << int(rng.integers(8))
        elif trial % 4 == 2:
            raw[at : at + 4] = [b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff"][int(rng.integers(3))]
        else:
            del raw[at : at + int(rng.integers(1, 40))]
        try:
            picture = decode_picture(bytes(raw), "x.png", max_pixels=1_000_000)
        except FedFactoryError as error:
            assert isinstance(error, VolumeError) and "\n" not in str(error), trial
        else:
            decoded += 1
            facts = picture.facts
            assert picture.pixels.shape == (facts.rows, facts.columns, facts.channels), trial
            assert picture.pixels.dtype == (np.uint16 if facts.bits == 16 else np.uint8)
    assert decoded < 200


# contours


def test_contours_have_the_colours_of_the_classes():
    labels = np.zeros((60, 80), np.uint8)
    labels[10:30, 10:30], labels[35:50, 40:70], labels[2:4, 2:4] = 1, 2, 255
    grey = np.full((60, 80, 1), 100, np.uint8)
    shown = with_contours(grey, labels)
    colours = [tuple(int(text[k : k + 2], 16) for k in (1, 3, 5)) for text in CLASS_COLOURS[:2]]
    assert shown.shape == (60, 80, 3) and shown.dtype == np.uint8
    assert tuple(shown[10, 20]) == colours[0] and tuple(shown[35, 50]) == colours[1]
    for inside in ((20, 20), (3, 3), (0, 0)):
        assert tuple(shown[inside]) == (100, 100, 100)
    assert (grey == 100).all()
    large = with_contours(np.zeros((1024, 1024, 3), np.uint16), np.kron(labels[:32, :32], np.ones((32, 32), np.uint8)))
    assert (large == colours[0]).all(-1)[:, 640].sum() in (8, 10)  # two lines of four pixels or one more


def test_a_picture_of_16_bits_is_shown_with_8():
    shown = with_contours(RGB16, np.zeros((20, 30), np.uint8))
    np.testing.assert_array_equal(shown, RGB16 >> 8)
