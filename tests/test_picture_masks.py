"""Masks of pictures become label maps, and what is no class is refused by name."""

from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.case_files import LabelFile
from fedfactory.imaging.pictures.colour_table import read_colour_table
from fedfactory.imaging.pictures.masks import read_mask
from PIL import Image

SIZE = (24, 32)
DISC = np.zeros(SIZE, np.uint8)
DISC[4:20, 6:26] = 1
CUP = np.zeros(SIZE, np.uint8)
CUP[8:14, 10:18] = 1
BOTH = DISC + CUP  # 0, 1 and 2


@pytest.fixture
def mask(tmp_path):
    """Writes an image of Pillow or an array, and reads it as a mask."""

    def write(image, name="a.png", *, value=None, **options) -> LabelFile:
        image = image if isinstance(image, Image.Image) else Image.fromarray(image)
        image.save(tmp_path / name, **options)
        return LabelFile(tmp_path / name, value)

    return write


def with_palette(indices: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(indices, "P")
    image.putpalette([value for colour in colours for value in colour])
    return image


def labels_of(*files: LabelFile, **options) -> np.ndarray:
    labels, warnings = read_mask(files, SIZE, **options)
    assert labels.dtype == np.uint16 and not warnings
    return labels


# one mask


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (DISC * 255, DISC),
        (DISC, DISC),
        (BOTH, BOTH),
        (BOTH * 31, BOTH * 31),
        (np.zeros_like(DISC), DISC * 0),
        (np.full_like(DISC, 255), DISC * 0 + 1),
        (BOTH.astype(np.uint16), BOTH),
        (DISC.astype(np.uint16) * 65535, DISC),
        (DISC.astype(np.uint16) * 255, DISC),
        (np.repeat(DISC[..., None] * 255, 3, axis=2), DISC),
        (np.repeat(BOTH[..., None], 3, axis=2), BOTH),
        (np.dstack([DISC * 255] * 3 + [np.full_like(DISC, 255)]), DISC),
    ],
)
def test_grey_masks_are_black_and_white_or_class_numbers(mask, values, expected):
    np.testing.assert_array_equal(labels_of(mask(values)), expected)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.bmp", "a.gif"])
def test_masks_of_one_bit_are_black_and_white(mask, name):
    image = Image.fromarray(DISC * 255).convert("1")
    np.testing.assert_array_equal(labels_of(mask(image, name)), DISC)


@pytest.mark.parametrize("name", ["a.png", "a.gif", "a.tif", "a.bmp"])
def test_indices_of_a_palette_are_class_numbers_unless_its_colours_are_black_and_white(mask, name):
    coloured = with_palette(BOTH, (9, 9, 200), (200, 9, 9), (9, 200, 9))
    np.testing.assert_array_equal(labels_of(mask(coloured, name)), BOTH)
    white_first = with_palette(1 - DISC, (255, 255, 255), (0, 0, 0))  # the indices alone would mark the background
    np.testing.assert_array_equal(labels_of(mask(white_first, name)), DISC)
    np.testing.assert_array_equal(labels_of(mask(white_first, name, value=5)), DISC * 5)


def test_grey_class_numbers_stay_when_a_program_packs_them_into_a_palette(mask):
    """GIF has palettes only: classes 0 and 3 get the indices 0 and 1."""
    np.testing.assert_array_equal(labels_of(mask(DISC * 3, "a.gif")), DISC * 3)
    np.testing.assert_array_equal(labels_of(mask(BOTH, "a.gif")), BOTH)


def test_class_numbers_of_few_bits_are_not_stretched(mask, tmp_path):
    """Decoders make 0, 85, 170 and 255 of the four values that two bits have."""
    cv2.imwrite(str(tmp_path / "a.png"), BOTH)
    raw = two_bits(BOTH)
    (tmp_path / "b.png").write_bytes(raw)
    np.testing.assert_array_equal(labels_of(LabelFile(tmp_path / "b.png")), BOTH)
    (tmp_path / "c.png").write_bytes(two_bits(DISC * 3))
    np.testing.assert_array_equal(labels_of(LabelFile(tmp_path / "c.png")), DISC)


def two_bits(values: np.ndarray) -> bytes:
    """A grey PNG of two bits for each pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    four = values.reshape(values.shape[0], -1, 4).astype(int) @ [64, 16, 4, 1]
    rows = b"".join(b"\0" + row.astype(np.uint8).tobytes() for row in four)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 2, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_255_means_unlabelled_where_class_numbers_are_asked_for(mask):
    scribble = np.where(CUP > 0, 1, 255).astype(np.uint8)
    scribble[0] = 0
    np.testing.assert_array_equal(labels_of(mask(scribble), class_numbers=True), scribble)
    with pytest.raises(VolumeError, match="values such as 255"):
        read_mask([mask(scribble)], SIZE)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BOTH * 127, r"values such as 127, 254; classes are 0 to 63, .* by --mask-colours"),
        (DISC * 254, "values such as 254"),
        (DISC.astype(np.uint16) * 300, "values such as 300"),
        (np.dstack([DISC * 255, DISC * 9, DISC]), r"2 colours such as \(0, 0, 0\), \(255, 9, 1\); .*--mask-colours"),
        (DISC[:, :30] * 255, "has 24 x 30 pixels, but its picture 24 x 32; give a mask of the picture's size"),
        (np.zeros((4000, 4000), np.uint8), "but its picture 24 x 32|at most"),
    ],
)
def test_values_that_are_no_classes_and_other_sizes_are_refused(mask, values, message):
    with pytest.raises(VolumeError, match=message) as error:
        read_mask([mask(values)], SIZE)
    assert "a.png: " in str(error.value) and "\n" not in str(error.value)


def test_damaged_masks_are_refused(mask, tmp_path):
    for name in ("a.gif", "b.png"):
        file = mask(with_palette(BOTH, (9, 9, 200), (200, 9, 9), (9, 200, 9)), name)
        content = file.path.read_bytes()
        for length in range(1, len(content), 7):
            file.path.write_bytes(content[:length])
            with pytest.raises(VolumeError, match=name):
                read_mask([file], SIZE)
    frames = [Image.fromarray(BOTH), Image.fromarray(DISC)]
    frames[0].save(tmp_path / "c.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(VolumeError, match="holds 2 pictures"):
        read_mask([LabelFile(tmp_path / "c.gif")], SIZE)
    with pytest.raises(UsageError, match="no such file"):
        read_mask([LabelFile(tmp_path / "none.png")], SIZE)


# JPEG


def test_a_black_and_white_jpeg_is_split_with_a_warning(mask):
    file = mask(DISC * 255, "a.jpg", quality=60)
    assert len(np.unique(cv2.imread(str(file.path), 0))) > 2
    labels, warnings = read_mask([file], SIZE)
    np.testing.assert_array_equal(labels, DISC)
    assert len(warnings) == 1 and "a.jpg: is a JPEG" in warnings[0]
    assert read_mask([mask(np.full(SIZE, 255, np.uint8), "b.jpg")], SIZE)[0].min() == 1
    assert read_mask([mask(np.zeros(SIZE, np.uint8), "c.jpg")], SIZE)[0].max() == 0


@pytest.mark.parametrize("values", [BOTH * 120, BOTH * 3, DISC * 130, np.dstack([DISC * 255, CUP * 255, CUP])])
def test_a_jpeg_of_anything_else_is_refused(mask, values):
    with pytest.raises(VolumeError, match=r"a.jpg: is a JPEG.*save it as PNG"):
        read_mask([mask(values, "a.jpg", quality=95)], SIZE)


@pytest.mark.parametrize("options", [{"class_numbers": True}, {"colours": {0: 0, 255: 1}}])
def test_a_jpeg_has_no_exact_values(mask, options):
    with pytest.raises(VolumeError, match="changes colours and class numbers"):
        read_mask([mask(DISC * 255, "a.jpg")], SIZE, **options)


# tables of colours

RED, BLUE, BLACK = (255, 0, 0), (0, 0, 255), (0, 0, 0)
TABLE = {BLACK: 0, RED: 2, BLUE: 1}


def painted(*extra: tuple[int, int, tuple[int, int, int]]) -> np.ndarray:
    shown = np.array([BLACK, BLUE, RED], np.uint8)[BOTH]
    for row, column, colour in extra:
        shown[row, column] = colour
    return shown


def test_colours_get_the_classes_of_the_table(mask):
    np.testing.assert_array_equal(labels_of(mask(painted()), colours=TABLE), BOTH)
    palette = with_palette(BOTH, BLACK, BLUE, RED)
    np.testing.assert_array_equal(labels_of(mask(palette), colours={BLACK: 0, RED: 1, BLUE: 2}), BOTH * 2 % 3)


def test_a_colour_that_the_table_lacks_is_named(mask):
    with pytest.raises(VolumeError, match=r"has colour \(7, 8, 9\), which the table of --mask-colours lacks"):
        read_mask([mask(painted((3, 3, (7, 8, 9))))], SIZE, colours=TABLE)


def test_grey_values_get_the_classes_of_the_table(mask):
    grey = {0: 0, 128: 2, 255: 1}
    values = np.array([0, 255, 128], np.uint8)[BOTH]
    np.testing.assert_array_equal(labels_of(mask(values), colours=grey), BOTH)
    np.testing.assert_array_equal(labels_of(mask(values, "a.gif"), colours=grey), BOTH)  # not the palette's indices
    np.testing.assert_array_equal(labels_of(mask(BOTH.astype(np.uint16) * 300), colours={0: 0, 300: 1, 600: 2}), BOTH)
    with pytest.raises(VolumeError, match="has value 127, which"):
        read_mask([mask(BOTH * 127)], SIZE, colours=grey)
    with pytest.raises(VolumeError, match=r"is a colour mask; .* R,G,B,CLASS"):
        read_mask([mask(painted())], SIZE, colours=grey)


def test_only_sparse_labels_may_have_unlabelled_colours(mask):
    table = {BLACK: 255, RED: 1, BLUE: 0}
    expected = np.array([255, 0, 1])[BOTH]
    np.testing.assert_array_equal(labels_of(mask(painted()), colours=table, class_numbers=True), expected)
    with pytest.raises(VolumeError, match="pixels of class 255"):
        read_mask([mask(painted())], SIZE, colours=table)


def test_tables_of_colours_are_read(tmp_path):
    (tmp_path / "t.csv").write_text("r, g, b, class, name\n0,0,0,0,background\n255,0,0,2,cup\n0,0,255,1,disc\n")
    table = read_colour_table(tmp_path / "t.csv")
    assert table.classes == TABLE
    assert table.names == {0: "background", 1: "disc", 2: "cup"}
    (tmp_path / "t.csv").write_text("\ufeffVALUE,CLASS\n0,0\n65535,255\n", encoding="utf-8")
    assert read_colour_table(tmp_path / "t.csv").classes == {0: 0, 65535: 255}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("R,G,CLASS\n0,0,0\n", "needs the columns R,G,B,CLASS or VALUE,CLASS"),
        ("", "needs the columns"),
        ("VALUE,CLASS\n", "has no row"),
        ("R,G,B,CLASS\n0,0,256,1\n", "line 2: B is '256'; it must be a whole number from 0 to 255"),
        ("VALUE,CLASS\n5,64\n", "CLASS is '64'; it must be a whole number from 0 to 63, or 255"),
        ("VALUE,CLASS\n5,1.0\n", "CLASS is '1.0'"),
        ("VALUE,CLASS\n5\n", "CLASS is ''"),
        ("VALUE,CLASS\n5,1\n05,2\n", "line 3: colour 5 is there twice"),
        ("VALUE,CLASS,NAME\n5,1,a\n6,1,b\n", "class 1 is 'b' and 'a'"),
    ],
)
def test_a_wrong_table_of_colours_is_named(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(UsageError, match=message):
        read_colour_table(tmp_path / "t.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        read_colour_table(tmp_path / "none.csv")


# several masks


def test_masks_of_several_lesions_are_united(mask):
    left, right = DISC.copy(), DISC.copy()
    left[:, 18:], right[:, :14] = 0, 0
    np.testing.assert_array_equal(labels_of(mask(left * 255, "a.png"), mask(right * 255, "b.png")), DISC)


def test_label_maps_are_united_where_they_agree(mask):
    lower = np.zeros_like(DISC)
    lower[21:] = 3
    np.testing.assert_array_equal(labels_of(mask(BOTH, "a.png"), mask(lower, "b.png")), BOTH + lower)
    with pytest.raises(VolumeError, match=r"b.png: gives class 1 to pixels of class 2 in another mask .*\(48 pixels\)"):
        read_mask([mask(BOTH, "a.png"), mask(DISC, "b.png")], SIZE)


def test_sparse_labels_are_united_where_one_has_none(mask):
    one, two = np.full(SIZE, 255, np.uint8), np.full(SIZE, 255, np.uint8)
    one[3], two[5] = 0, 2
    expected = np.minimum(one, two)
    np.testing.assert_array_equal(labels_of(mask(one, "a.png"), mask(two, "b.png"), class_numbers=True), expected)
    two[3, 3] = 2  # background for the one, class 2 for the other
    with pytest.raises(VolumeError, match="class 2 to pixels of class 0"):
        read_mask([mask(one, "a.png"), mask(two, "b.png")], SIZE, class_numbers=True)


def test_a_file_with_a_class_marks_it_and_a_structure_inside_another_stays(mask):
    """Folders in the order of their names are CUP and DISC: the disc, which comes later, would cover the cup."""
    cup, disc = mask(CUP * 255, "cup.png", value=1), mask(DISC, "disc.png", value=2)
    expected = np.where(CUP > 0, 1, DISC * 2)
    np.testing.assert_array_equal(labels_of(cup, disc), expected)
    np.testing.assert_array_equal(labels_of(disc, cup), expected)


def test_a_later_class_counts_where_masks_overlap(mask):
    left, right = np.zeros_like(DISC), np.zeros_like(DISC)
    left[:, :20], right[:, 10:] = 7, 9
    labels = labels_of(mask(left, "a.png", value=1), mask(right, "b.png", value=2))
    np.testing.assert_array_equal(labels[0], [1] * 10 + [2] * 22)
    labels, warnings = read_mask([mask(left, "a.png", value=1), mask(left, "b.png", value=2)], SIZE)
    assert set(labels.ravel()) == {0, 2}
    assert warnings[0].endswith("a.png: class 1 is wholly covered by other masks of this picture")


def test_no_mask_marks_nothing():
    labels, warnings = read_mask([], SIZE)
    assert labels.shape == SIZE and not labels.any() and not warnings
