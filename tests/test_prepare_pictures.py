"""Pictures to slice stores: where pixels land, what becomes of colours, labels of every kind, and unusable files."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import tifffile
from fedfactory.errors import StoreError, UsageError, VolumeError
from fedfactory.imaging.image_reader import read_image
from fedfactory.imaging.patients import read_patient_table
from fedfactory.imaging.pictures.colour_table import read_colour_table
from fedfactory.imaging.pictures.decoding import write_picture
from fedfactory.imaging.pictures.picture_image import _resized, picture_affine
from fedfactory.imaging.slice_grid import SliceGrid
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import FORMAT_VERSION, SliceStore
from fedfactory.node.store.store_format import picture_format
from helpers import SHADES, figure, image_slices
from PIL import Image

SIDE = 48  # pixels of a slice


def photo(rows: int, columns: int) -> np.ndarray:
    """(rows, columns, 3) uint8: the figure in colours."""
    return SHADES[figure(rows, columns)]


def waves(rows: int, columns: int) -> np.ndarray:
    """(rows, columns, 3) uint8: smooth waves, six over the longer side, along both axes and of another phase in each
    channel."""
    longer = max(rows, columns)
    y, x = np.mgrid[0:rows, 0:columns] * 2 * np.pi / longer
    shades = [np.sin(5 * y + phase) * 0.22 + np.sin(6 * x - 2 * phase) * 0.22 for phase in (0.0, 0.9, 2.1)]
    return np.round((np.stack(shades, -1) + 0.5) * 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ("name,group\na,one\nb,one\nc,two\n", True),
        ("CASE,PATIENT\na,one\nb,one\n", False),  # lacks a case, so it is of something else
        ("name,age\na,7\nb,8\nc,9\n", False),
    ],
)
def test_a_table_of_the_patients_beside_the_pictures_is_remarked_until_it_is_given(tmp_path, table, named):
    site = picture_site(tmp_path / "site")
    (site / "groups.csv").write_text(table)
    made = prepare(site, tmp_path / "guessed", settings())
    assert ("is not used; give it by --patients" in made.remarks.get("groups.csv", "")) == named
    assert {case.patient for case in made.store.cases} == {"a", "b", "c"}
    if named:
        given = prepare(site, tmp_path / "given", settings(patients=read_patient_table(site / "groups.csv")))
        assert not given.remarks and {case.patient for case in given.store.cases} == {"one", "two"}


def write_jpeg(path: Path, pixels: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=97, subsampling=0, **options)


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, pixels)


def picture_site(folder: Path, sizes=((60, 90), (90, 60), (48, 48))) -> Path:
    """A folder of colour pictures with a mask for each; their names tell the patients a, b, c, ..."""
    for letter, size in zip("abcdefgh", sizes, strict=False):
        write_png(folder / "images" / f"{letter}.png", photo(*size))
        write_png(folder / "masks" / f"{letter}.png", figure(*size))
    return folder


def settings(**changes) -> PrepareConfig:
    return PrepareConfig(**{"domain": "x", "size": SIDE, "validation_share": 0.0, "test_share": 0.0, **changes})


def dice(found: np.ndarray, expected: np.ndarray) -> float:
    return float(2 * (found & expected).sum() / (found.sum() + expected.sum()))


def where_it_belongs(labels: np.ndarray) -> np.ndarray:
    """(SIDE, SIDE) labels of a whole picture, longer side over the slice, nearest pixels; 0 beside it."""
    rows, columns = labels.shape
    ratio = max(labels.shape) / SIDE
    places = [np.round((np.arange(SIDE) - (SIDE - 1) / 2) * ratio + (n - 1) / 2).astype(int) for n in (rows, columns)]
    inside = [(p >= 0) & (p < n) for p, n in zip(places, (rows, columns), strict=True)]
    shown = labels[np.ix_(*(p.clip(0, n - 1) for p, n in zip(places, (rows, columns), strict=True)))]
    return shown * (inside[0][:, None] & inside[1])


# Where pixels land.


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("size", [(187, 256), (1000, 667), (37, 41), (96, 96), (95, 300), (1531, 1100)])
def test_slices_of_a_picture_are_those_of_a_volume(size, ending, tmp_path):
    """The reference is the resampling of volumes, from all pixels; OpenCV, and a JPEG decoded smaller, come close."""
    pixels, path = waves(*size), tmp_path / f"a.{ending}"
    write_png(path, pixels) if ending == "png" else write_jpeg(path, pixels)
    fmt = picture_format(96, colour=True)
    image = read_image((path,), fmt=fmt)
    grid = image.grid(fmt)
    found = grid.padded(image.inner(grid), np.nan)
    assert found.shape == (1, 3, 96, 96)
    reductions = {(1000, 667): 8, (1531, 1100): 8, (187, 256): 2, (95, 300): 2} if ending == "jpg" else {}
    assert image.picture.reduction == reductions.get(size, 1)
    for channel in range(3):
        whole = Volume(pixels[..., channel, None].astype(np.float32) / 255, picture_affine(*size))
        expected = image_slices(grid, whole)
        np.testing.assert_array_equal(np.isnan(found[:, channel]), np.isnan(expected))
        assert np.nanmean(abs(found[:, channel] - expected)) < 0.008
        assert np.nanmax(abs(found[:, channel] - expected)) < 0.03  # a shift by half a pixel makes 0.08


@pytest.mark.parametrize("size", [(300, 187), (1531, 1100)])
def test_what_is_finer_than_a_slice_is_blurred_as_in_a_volume(size, tmp_path):
    """Noise has detail of every size: without the blur, or with one that is too narrow or too wide, its deviation is
    another one. The larger picture is reduced in blocks first."""
    noise = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    write_png(tmp_path / "a.png", noise)
    fmt = picture_format(96, colour=False)
    image = read_image((tmp_path / "a.png",), fmt=fmt)
    grid = image.grid(fmt)
    _, rows, columns = grid.kept_pixels
    found = grid.padded(image.inner(grid), np.nan)[0, 0, rows, columns]
    expected = image_slices(grid, Volume(noise[..., None].astype(np.float32) / 255, picture_affine(*size)))[
        0, rows, columns
    ]
    assert found.std() == pytest.approx(expected.std(), rel=0.06)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.97


@pytest.mark.parametrize("size", [(187, 256), (667, 1000), (1000, 667), (37, 41), (64, 64)])
def test_labels_of_slices_come_back_to_the_pixels_of_the_picture(size):
    mask = figure(*size)
    grid = SliceGrid((*size, 1), picture_affine(*size), box=((0, size[0]), (0, size[1]), (0, 1)),
                     fmt=picture_format(64, colour=True))  # fmt: skip
    slices = grid.label_slices(Volume(mask[..., None], picture_affine(*size)))
    shares = np.stack([slices == value for value in range(3)], axis=1).astype(np.float32)
    found = grid.labels_to_volume(shares)[..., 0]
    assert found.shape == size
    assert min(dice(found == value, mask == value) for value in (1, 2)) > 0.95


def test_a_store_has_the_rows_of_a_picture_as_rows(tmp_path):
    store = prepare(picture_site(tmp_path / "s"), tmp_path / "out", settings()).store
    assert store.format == picture_format(SIDE, colour=True)
    assert (store.images.shape, store.classes, store.label_kind) == ((3, 3, SIDE, SIDE), 3, "dense")
    assert store.z_bin.tolist() == [0, 0, 0]
    for case, (rows, columns) in zip(store.cases, [(60, 90), (90, 60), (48, 48)], strict=True):
        expected = where_it_belongs(figure(rows, columns))
        found = np.asarray(store.labels[case.first])
        assert min(dice(found == value, expected == value) for value in (1, 2)) > 0.9  # mirrored or turned: below 0.5
        for value in (1, 2):
            shown = np.median(store.images[case.first][:, found == value], axis=1)
            np.testing.assert_allclose((shown + 1) / 2 * 255, SHADES[value], atol=0.5)
        assert case.shape == (rows, columns, 1)
    store.verify()


def test_the_quality_page_shows_pictures_upright_and_in_their_colours(tmp_path):
    prepare(picture_site(tmp_path / "s"), tmp_path / "out", settings(class_names={1: "<polyp>", 2: "tool"}))
    page = (tmp_path / "out" / "quality.html").read_text(encoding="utf-8")
    assert "in colour" in page and "1 &lt;polyp&gt;" in page and "millimetre" not in page.lower()
    shown = cv2.imdecode(np.frombuffer(base64.b64decode(re.search(r"base64,([^\"]+)", page)[1]), np.uint8), 1)[
        ..., ::-1
    ]
    assert shown.shape == (SIDE + 2, 3 * (SIDE + 2), 3)
    first = shown[1:-1, 1 : SIDE + 1].astype(int)
    expected = where_it_belongs(figure(60, 90))
    warm = first[..., 0] - first[..., 2]  # class 1 is reddish, class 2 green, and the labels' colours lie over both
    assert dice(warm > 60, expected == 1) > 0.9
    assert (first[expected == 2].mean(axis=0).argmax(), first[expected == 1].mean(axis=0).argmax()) == (1, 0)


def test_a_photograph_that_its_camera_turned_fits_its_upright_mask(tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise for display
    write_jpeg(tmp_path / "s" / "images" / "a.jpg", np.ascontiguousarray(np.rot90(photo(60, 90))), exif=exif)
    write_png(tmp_path / "s" / "masks" / "a_mask.png", figure(60, 90))
    store = prepare(tmp_path / "s", tmp_path / "out", settings()).store
    assert store.cases[0].shape == (60, 90, 1)
    for value in (1, 2):
        shown = np.median(store.images[0][:, store.labels[0] == value], axis=1)
        np.testing.assert_allclose((shown + 1) / 2 * 255, SHADES[value], atol=6)


@pytest.mark.parametrize("size", [(40, 33000), (33000, 40), (1, 700)])
def test_a_strip_of_pixels_is_a_picture(size, tmp_path):
    """Earlier versions of OpenCV refuse more than 32767 pixels; a single row lies in no pixel of a slice, or in one."""
    write_png(tmp_path / "s" / "long.png", (np.indices(size).sum(0) % 251).astype(np.uint8))
    write_png(tmp_path / "s" / "plain.png", figure(40, 50) * 100)
    result = prepare(tmp_path / "s", tmp_path / "out", settings())
    assert {case.name for case in result.store.cases} | set(result.failed) == {"long", "plain"}
    assert "plain" not in result.failed


# What becomes of intensities.


def test_colours_have_an_absolute_meaning_in_8_and_16_bits(tmp_path):
    patches = np.kron(np.array([[[0, 255, 128], [255, 0, 64]], [[255, 255, 255], [0, 0, 0]]], np.uint8),
                      np.ones((24, 24, 1), np.uint8))  # fmt: skip
    write_png(tmp_path / "s" / "a8.png", patches)
    write_png(tmp_path / "s" / "b16.png", patches.astype(np.uint16) * 257)
    (tmp_path / "s" / "c16.tif").write_bytes(_tiff(patches.astype(np.uint16) * 257))
    store = prepare(tmp_path / "s", tmp_path / "out", settings()).store
    expected = np.moveaxis(patches, -1, 0) / 127.5 - 1
    for image in np.asarray(store.images, np.float32):
        np.testing.assert_allclose(image, expected, atol=2e-3)
    assert store.images.min() == -1 and store.images.max() == 1
    assert store.format.window == ((0.0, 1.0),) * 3


def _tiff(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, photometric="rgb")
    return file.getvalue()


def test_grey_pictures_are_standardised(tmp_path):
    """A picture and the same one with another brightness and contrast, in 16 bits, give the same slice."""
    grey = waves(SIDE, SIDE)[..., 0]
    write_png(tmp_path / "s" / "a.png", grey)
    write_png(tmp_path / "s" / "b.png", grey.astype(np.uint16) * 100 + 7000)
    store = prepare(tmp_path / "s", tmp_path / "out", settings()).store
    assert store.images.shape == (2, 1, SIDE, SIDE) and not store.format.colour
    first, second = np.asarray(store.images[:, 0], np.float64)
    np.testing.assert_allclose(first, second, atol=2e-3)
    standardised = (grey - grey.mean()) / grey.std()
    ((low, high),) = store.format.window
    assert low == pytest.approx(standardised.min(), abs=0.05) and high == pytest.approx(standardised.max(), abs=0.05)
    np.testing.assert_allclose(first, np.clip((standardised - low) / (high - low), 0, 1) * 2 - 1, atol=2e-3)


def test_one_picture_in_colour_makes_a_store_of_colours_unless_grey_is_asked_for(tmp_path):
    grey = waves(SIDE, SIDE)[..., 0]
    write_png(tmp_path / "s" / "a.png", grey)
    write_png(tmp_path / "s" / "b.png", photo(SIDE, SIDE))
    store = prepare(tmp_path / "s", tmp_path / "colour", settings()).store
    assert store.format.colour
    np.testing.assert_allclose(np.asarray(store.images[0], np.float32), np.stack([grey / 127.5 - 1] * 3), atol=2e-3)
    asked = prepare(tmp_path / "s", tmp_path / "grey", settings(colour="grey")).store
    assert asked.format.channels == 1 and not asked.format.colour
    (tmp_path / "s" / "b.png").unlink()
    only = prepare(tmp_path / "s", tmp_path / "other", settings(colour="colour")).store
    assert only.format.colour and len(only.cases) == 1


def test_a_grey_store_takes_a_colour_picture_as_luminance(tmp_path):
    write_png(tmp_path / "s" / "a.png", waves(SIDE, SIDE)[..., 0])
    first = prepare(tmp_path / "s", tmp_path / "out", settings()).store.format
    picture = photo(SIDE, SIDE)
    write_png(tmp_path / "s" / "b.png", picture)
    write_png(tmp_path / "s" / "c.png", np.round(picture @ [0.299, 0.587, 0.114]).astype(np.uint8))
    result = prepare(tmp_path / "s", tmp_path / "out", settings())
    assert (result.added, result.unchanged, result.store.format) == (2, 1, first)
    np.testing.assert_allclose(result.store.images[1], result.store.images[2], atol=0.03)
    with pytest.raises(UsageError, match="colour is False, not True"):
        prepare(tmp_path / "s", tmp_path / "out", settings(colour="colour"))


def test_another_sites_format_is_taken_over(tmp_path):
    picture_site(tmp_path / "colours")
    write_png(tmp_path / "grey" / "a.png", waves(80, 50)[..., 0])
    write_png(tmp_path / "dark" / "b.png", waves(50, 80)[..., 1] // 3)
    colour = prepare(tmp_path / "colours", tmp_path / "one", settings()).store
    grey = prepare(tmp_path / "grey", tmp_path / "two", settings(size=32)).store
    like_colour = prepare(tmp_path / "grey", tmp_path / "three", PrepareConfig(domain="y").like(tmp_path / "one"))
    assert like_colour.store.format == colour.format
    same = prepare(
        tmp_path / "dark", tmp_path / "four", PrepareConfig(domain="x").like(tmp_path / "two" / "format.json")
    )
    assert same.store.format == grey.format  # of the same domain: the window too
    other = prepare(tmp_path / "dark", tmp_path / "five", PrepareConfig(domain="y").like(tmp_path / "two"))
    assert other.store.format.window != grey.format.window and other.store.format.size == 32
    with pytest.raises(UsageError, match=r"spacing is '2\.0', but the folder holds pictures"):
        prepare(tmp_path / "grey", tmp_path / "six", settings(spacing=2.0).like(tmp_path / "one"))


def test_what_only_volumes_have_is_refused(tmp_path):
    picture_site(tmp_path / "s")
    for name, value in {"spacing": 1.0, "field_of_view": 90.0, "mask_key": "m", "compatibility": "published"}.items():
        with pytest.raises(UsageError, match=f"{name} is '{value}', but the folder holds pictures"):
            prepare(tmp_path / "s", tmp_path / "out", settings(**{name: value}))
    assert not (tmp_path / "out").exists()


# Labels.


def test_several_masks_of_a_picture_are_united(tmp_path):
    labels = figure(60, 90)
    write_png(tmp_path / "s" / "a.png", photo(60, 90))
    write_png(tmp_path / "s" / "a_mask.png", (labels == 1).astype(np.uint8) * 255)
    write_png(tmp_path / "s" / "a_mask_1.png", (labels == 2).astype(np.uint8) * 255)
    store = prepare(tmp_path / "s", tmp_path / "out", settings()).store
    assert len(store.cases) == 1 and store.classes == 2
    assert dice(store.labels[0] == 1, where_it_belongs(labels) > 0) > 0.9


def class_site(folder: Path, names: dict[str, int], letters="ab") -> Path:
    """Pictures with a folder of masks for each class of the figure."""
    for letter in letters:
        write_png(folder / "images" / f"{letter}.png", photo(60, 90))
        for name, value in names.items():
            write_png(folder / "masks" / name / f"{letter}.png", (figure(60, 90) == value).astype(np.uint8) * 255)
    return folder


def shade_of(store: SliceStore, value: int, number: int = 0) -> list[int]:
    """The colour below a label."""
    shown = np.median(np.asarray(store.images[number], np.float32)[:, store.labels[number] == value], axis=1)
    return np.round((shown + 1) / 2 * 255).astype(int).tolist()


def test_folders_of_classes_give_labels_and_names(tmp_path):
    source = class_site(tmp_path / "s", {"Background": 0, "polyp": 1, "adenoma": 2})
    store = prepare(source, tmp_path / "out", settings()).store
    assert store.class_names == {1: "adenoma", 2: "polyp"}
    assert shade_of(store, 2) == SHADES[1].tolist() and shade_of(store, 1) == SHADES[2].tolist()
    assert "1 adenoma, 2 polyp" in (tmp_path / "out" / "quality.html").read_text(encoding="utf-8")


def test_folders_of_classes_get_the_numbers_that_a_site_gives_to_their_names(tmp_path):
    """Sites of a federation must number alike, also where one of them lacks a class."""
    source = class_site(tmp_path / "s", {"Polyp": 1})
    wanted = {1: "adenoma", 2: "polyp"}
    store = prepare(source, tmp_path / "out", settings(class_names=wanted)).store
    assert store.class_names == wanted
    assert shade_of(store, 2) == SHADES[1].tolist() and not (store.labels[0] == 1).any()
    class_site(tmp_path / "s", {"cyst": 2})
    with pytest.raises(UsageError, match="'cyst' is none of the classes adenoma, polyp"):
        prepare(source, tmp_path / "new", settings(class_names=wanted))


def test_a_new_folder_of_a_class_renumbers_the_cases_of_before_or_is_refused(tmp_path):
    source = class_site(tmp_path / "s", {"polyp": 1})
    assert prepare(source, tmp_path / "out", settings()).store.class_names == {1: "polyp"}
    class_site(source, {"adenoma": 2})
    result = prepare(source, tmp_path / "out", settings())
    assert (result.replaced, result.unchanged) == (2, 0)
    assert shade_of(result.store, 2) == SHADES[1].tolist() and result.store.class_names[2] == "polyp"
    for letter in "ab":  # now the store keeps cases whose numbers cannot follow
        (source / "images" / f"{letter}.png").rename(source / "images" / f"new{letter}.png")
        for folder in ("polyp", "adenoma"):
            (source / "masks" / folder / f"{letter}.png").rename(source / "masks" / folder / f"new{letter}.png")
    class_site(source, {"aaa": 1}, letters=["newa"])
    with pytest.raises(UsageError, match="label 1 is 'adenoma' in the store, not 'aaa'"):
        prepare(source, tmp_path / "out", settings())
    assert SliceStore(tmp_path / "out").class_names == {1: "adenoma", 2: "polyp"}


def test_colours_of_masks_become_classes_by_a_table(tmp_path):
    write_png(tmp_path / "s" / "images" / "a.png", photo(60, 90))
    write_png(
        tmp_path / "s" / "masks" / "a.png", np.array([[0, 0, 0], [0, 0, 255], [255, 255, 0]], np.uint8)[figure(60, 90)]
    )
    with pytest.raises(VolumeError, match=r"colour mask with 3 colours.*--mask-colours"):
        prepare(tmp_path / "s", tmp_path / "out", settings())
    (tmp_path / "t.csv").write_text("R,G,B,CLASS,NAME\n0,0,0,0,background\n0,0,255,2,wall\n255,255,0,1,lumen\n")
    table = read_colour_table(tmp_path / "t.csv")
    config = settings(mask_colours=table.classes, class_names=table.class_names)
    store = prepare(tmp_path / "s", tmp_path / "out", config).store
    assert store.class_names == {1: "lumen", 2: "wall"}
    assert shade_of(store, 2) == SHADES[1].tolist() and shade_of(store, 1) == SHADES[2].tolist()
    assert prepare(tmp_path / "s", tmp_path / "out", config).unchanged == 1
    swapped = settings(mask_colours={(0, 0, 0): 0, (0, 0, 255): 1, (255, 255, 0): 2})
    result = prepare(tmp_path / "s", tmp_path / "out", swapped)  # a corrected table is no unchanged case
    assert result.replaced == 1 and shade_of(result.store, 1) == SHADES[1].tolist()


def test_scribbles_leave_pixels_unlabelled(tmp_path):
    labels = figure(60, 90)
    drawn = np.full(labels.shape, 255, np.uint8)
    drawn[12, 15:25], drawn[40, 30:70], drawn[56, 5:80] = 1, 2, 0
    write_png(tmp_path / "s" / "images" / "a.png", photo(60, 90))
    write_png(tmp_path / "s" / "masks" / "a.png", drawn)
    store = prepare(tmp_path / "s", tmp_path / "out", settings(label_kind="scribble", unlabelled_value=255)).store
    found = np.asarray(store.labels[0])
    assert set(np.unique(found)) == {0, 1, 2, 255} and (found == 255).mean() > 0.9
    expected = where_it_belongs(labels)
    assert (expected[found == 1] == 1).all() and (expected[found == 2] == 2).all() and (expected[found == 0] == 0).all()


def test_boxes_are_label_maps_that_mark_every_pixel(tmp_path):
    box = np.zeros((60, 90), np.uint8)
    box[6:27, 9:32] = 255
    write_png(tmp_path / "s" / "images" / "a.png", photo(60, 90))
    write_png(tmp_path / "s" / "masks" / "a.png", box)
    store = prepare(tmp_path / "s", tmp_path / "out", settings(label_kind="box")).store
    assert store.label_kind == "box" and set(np.unique(store.labels)) == {0, 1}


def test_a_table_names_what_a_picture_shows(tmp_path):
    for name, rows in {"a": "2\n1", "b": "", "c": "2"}.items():
        write_png(tmp_path / "s" / "images" / f"{name}.png", photo(60, 90))
        (tmp_path / "s" / "labels").mkdir(exist_ok=True)
        ending = "CSV" if name == "c" else "csv"
        (tmp_path / "s" / "labels" / f"{name}.{ending}").write_text(
            f"\ufeffLABEL\n{rows}\n", encoding="utf-8"
        )  # of Excel
    result = prepare(tmp_path / "s", tmp_path / "out", settings(label_kind="image"))
    assert not result.failed
    assert result.store.presence.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 1]]


def test_fixations_count_from_the_left_and_from_the_top(tmp_path):
    write_png(tmp_path / "s" / "images" / "a.png", photo(60, 90))
    (tmp_path / "s" / "labels").mkdir()
    text = "CURRENT_FIX_X,CURRENT_FIX_Y,CURRENT_FIX_DURATION\n0.2,0.25,300\n0.8,0.7,200\n0.5,0.5,10\n"
    (tmp_path / "s" / "labels" / "a.csv").write_text(text)
    store = prepare(tmp_path / "s", tmp_path / "out", settings(label_kind="gaze")).store
    assert store.gaze[:, 3].tolist() == [300, 200]  # a shorter one is no fixation
    expected = where_it_belongs(figure(60, 90))
    assert [expected[int(row), int(column)] for row, column in np.round(store.gaze[:, 1:3])] == [1, 2]
    np.testing.assert_allclose(store.gaze[0, 1:3], [0.25 * 32 + 8 - 0.5, 0.2 * 48 - 0.5], atol=1e-4)


def test_pictures_of_one_patient_stay_together(tmp_path):
    for number in range(8):
        write_png(tmp_path / "s" / "images" / f"frame{number}.png", photo(48, 60 + number))
    (tmp_path / "p.csv").write_text("CASE,PATIENT\n" + "".join(f"frame{n},video{n % 4}\n" for n in range(7)))
    config = settings(patients=read_patient_table(tmp_path / "p.csv"), validation_share=0.3, test_share=0.3)
    result = prepare(tmp_path / "s", tmp_path / "out", config)
    assert list(result.failed) == ["frame7"] and "has no row in the table of patients" in result.failed["frame7"]
    splits = {(case.patient, case.split) for case in result.store.cases}
    assert len(splits) == 4 and len({split for _, split in splits}) == 3


# Unusable files.


def test_two_hundred_damaged_pictures_give_a_line_each_or_a_picture(tmp_path):
    """Bytes are flipped, overwritten and cut out; nothing but a reason in one line may come of it."""
    rng = np.random.default_rng(0)
    source = picture_site(tmp_path / "s", sizes=[(30, 40), (40, 30)])
    contents = {}
    for kind, options in {"PNG": {}, "JPEG": {"quality": 90}, "TIFF": {"compression": "tiff_lzw"}}.items():
        file = io.BytesIO()
        Image.fromarray(photo(40, 36)).save(file, kind, **options)
        contents[kind] = file.getvalue()
    for number in range(200):
        kind = ("PNG", "JPEG", "TIFF")[number % 3]
        raw = bytearray(contents[kind])
        at = int(rng.integers(0, len(raw) if number % 2 else 200))
        if number % 4 == 0:
            raw[at : at + 4] = rng.integers(0, 256, 4, np.uint8).tobytes()
        elif number % 4 == 1:
            raw[at] ^= 1 << int(rng.integers(8))
        elif number % 4 == 2:
            raw[at : at + 4] = b"\x7f\xff\xff\xff"
        else:
            del raw[at : len(raw) if number % 8 == 3 else at + int(rng.integers(1, 40))]
        (source / "images" / f"bad{number:03d}.{kind.lower()}").write_bytes(raw)
    result = prepare(source, tmp_path / "out", settings(size=16, max_pixels=1_000_000), workers=2)
    used = {case.name for case in result.store.cases}
    assert {"a", "b"} <= used
    assert used | result.failed.keys() == {"a", "b", *(f"bad{n:03d}" for n in range(200))}
    assert not used & result.failed.keys() and len(result.failed) > 100
    assert all(reason.isprintable() and "images/bad" in reason for reason in result.failed.values())
    result.store.verify()


def test_damaged_masks_leave_out_their_picture_alone(tmp_path):
    source = picture_site(tmp_path / "s", sizes=[(60, 90)] * 5)
    write_png(source / "masks" / "b.png", figure(90, 60))
    (source / "masks" / "c.png").write_bytes((source / "masks" / "c.png").read_bytes()[:-30])
    write_png(source / "masks" / "d.png", figure(60, 90) * 50)
    write_png(source / "images" / "e.png", np.zeros((60, 91, 3), np.uint8))
    result = prepare(source, tmp_path / "out", settings())
    assert [case.name for case in result.store.cases] == ["a"]
    assert "masks/b.png: has 90 x 60 pixels, but its picture 60 x 90" in result.failed["b"]
    assert "masks/c.png" in result.failed["c"] and "has values such as 100" in result.failed["d"]
    assert "has 60 x 90 pixels, but its picture 60 x 91" in result.failed["e"]


def test_a_picture_that_is_too_large_or_without_contrast_is_named(tmp_path):
    write_png(tmp_path / "s" / "a.png", waves(40, 50)[..., 0])
    write_png(tmp_path / "s" / "b.png", waves(60, 70)[..., 0])
    write_png(tmp_path / "s" / "c.png", np.full((40, 50), 9, np.uint8))
    result = prepare(tmp_path / "s", tmp_path / "out", settings(max_pixels=2000))
    assert [case.name for case in result.store.cases] == ["a"]
    assert "its header claims 60 x 70 pixels; at most 2000 are read" in result.failed["b"]
    assert "c.png: all voxels have the same value" in result.failed["c"]


def test_a_store_of_before_is_refused_with_what_to_do(tmp_path):
    store = prepare(picture_site(tmp_path / "s"), tmp_path / "out", settings()).store
    index = store.path / "store.json"
    text = index.read_text(encoding="utf-8")
    index.write_text(re.sub(rf'"version": {FORMAT_VERSION}', '"version": 4', text), encoding="utf-8")
    for use in (lambda: SliceStore(tmp_path / "out"), lambda: prepare(tmp_path / "s", tmp_path / "out", settings())):
        with pytest.raises(StoreError, match=r"store version 4, this program reads 5; run `fedfactory prepare` again"):
            use()


@pytest.mark.parametrize(
    "shape", [(500, 500, 3), (500, 300, 3), (300, 256, 1), (64, 64, 1), (375, 500, 3)], ids=lambda shape: f"{shape}"
)
def test_a_slice_whose_edges_lie_between_pixels_is_resized_to_what_a_warp_gives(shape):
    rng, size, side = np.random.default_rng(0), 256, max(shape[:2])
    pixels = cv2.GaussianBlur(rng.integers(0, 256, shape, dtype=np.uint8), (0, 0), 1.2).reshape(shape)
    ratio = side / size
    start = [(ratio - 1) / 2 - (side - length) / 2 for length in (shape[1], shape[0])]
    found = _resized(pixels, start, ratio, (size, size))
    if (side - min(shape[:2])) % 2:
        assert found is None  # half a pixel of margin
        return
    inverse = np.array([[ratio, 0, start[0]], [0, ratio, start[1]]])
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    warped = cv2.warpAffine(
        pixels.astype(np.float32), inverse, (size, size), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )
    # Rounded to whole grey levels; and a warp rounds places to 1/32 of a pixel.
    assert np.abs(found.astype(np.float32) - np.clip(warped, 0, 255)).max() < 1
