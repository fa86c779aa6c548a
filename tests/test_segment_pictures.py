"""Segmenting pictures and images of several channels, and weak labels of pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.training_plan import TrainingPlan
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.inference import CONTOURS, Outputs, segment
from fedfactory.adaptation.labels.weak_labels import weaken_folder
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.cli import main
from fedfactory.errors import UsageError, VolumeError
from fedfactory.imaging.overlays import COLOURS
from fedfactory.imaging.pictures.decoding import read_picture, write_picture
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.store_format import picture_format
from helpers import SHADES, ball_volume, figure
from PIL import Image

SIDE = 64


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_picture(path, pixels)


def saved(path: Path, fmt: SliceFormat, *, classes: int = 3) -> Path:
    """A segmenter file for slices of a format, with random weights."""
    plan = TrainingPlan(
        network="dynunet", window=16, widths=(8, 8, 8), fold=1, classes=classes, batch_size=4, updates=1,
        channels=fmt.channels, colour=fmt.colour,
    )  # fmt: skip
    card = SegmenterCard(classes=classes, network="dynunet", plan=plan)
    Segmenter(PlannedNetwork(plan), fmt, card).save(path)
    return path


@pytest.fixture
def model(tmp_path, monkeypatch) -> Path:
    """A segmenter of colour pictures that is an oracle: every pixel has the class whose shade is the nearest."""

    def nearest(self, images, volume=None, *, views=1):
        shades = torch.from_numpy(SHADES.astype(np.float32)) / 127.5 - 1
        distance = (images[:, None] - shades[None, :, :, None, None]).square().sum(2)  # (N, classes, S, S)
        return torch.nn.functional.one_hot(distance.argmin(1), 3).movedim(-1, 1).float()

    monkeypatch.setattr(Segmenter, "probabilities", nearest)
    return saved(tmp_path / "m.safetensors", picture_format(SIDE, colour=True))


def dice(found: np.ndarray, expected: np.ndarray) -> float:
    return float(2 * (found & expected).sum() / (found.sum() + expected.sum()))


def turned_jpeg(path: Path, rows: int, columns: int) -> None:
    """The figure as a camera held sideways stores it."""
    exif = Image.Exif()
    exif[274] = 6
    stored = np.ascontiguousarray(np.rot90(SHADES[figure(rows, columns)]))
    Image.fromarray(stored).save(path, quality=97, subsampling=0, exif=exif)


def test_label_pictures_and_contours_lie_on_the_pixels_of_the_picture(model, tmp_path):
    sizes = {"wide": (90, 151), "high": (300, 187), "turned": (120, 180), "tiny": (20, 31)}
    (tmp_path / "p").mkdir()
    for name, size in sizes.items():
        if name == "turned":
            turned_jpeg(tmp_path / "p" / "turned.jpg", *size)
        else:
            write_png(tmp_path / "p" / f"{name}.png", SHADES[figure(*size)])
    images = sorted((tmp_path / "p").iterdir())
    paths = segment(images, [model], tmp_path / "out", outputs=Outputs(pictures=True))
    assert [path.name for path in paths] == ["high.png", "tiny.png", "turned.png", "wide.png"]
    for name, size in sizes.items():
        found, expected = read_picture(tmp_path / "out" / f"{name}.png")[..., 0], figure(*size)
        assert found.shape == size and found.dtype == np.uint8
        # An edge lies up to one pixel beside its place, which is much of a tiny figure.
        assert min(dice(found == value, expected == value) for value in (1, 2)) > (0.9 if name == "tiny" else 0.95)
        shown = read_picture(tmp_path / "out" / CONTOURS / f"{name}.png").astype(int)
        assert shown.shape == (*size, 3)
        for value in (1, 2):
            drawn = (abs(shown - np.round(COLOURS[value - 1] * 255)) <= 1).all(-1)
            assert drawn.any() and (found[drawn] == value).mean() > 0.6  # on the structure's own border
            assert not drawn[found == 3 - value].any()
        untouched = (abs(shown - SHADES[expected]) < 12).all(-1)
        assert untouched.mean() > 0.7


def test_label_pictures_are_scored_and_contours_are_none(model, tmp_path):
    for name, size in {"a": (90, 151), "b": (151, 90)}.items():
        write_png(tmp_path / "s" / "images" / f"{name}.png", SHADES[figure(*size)])
        write_png(tmp_path / "s" / "masks" / f"{name}.png", figure(*size))
    paths = segment([tmp_path / "s"], [model], tmp_path / "out", outputs=Outputs(pictures=True))
    assert [path.stem for path in paths] == ["a", "b"]
    scores = evaluate(tmp_path / "out", tmp_path / "s" / "masks", tmp_path / "scores.csv").scores
    assert len(scores) == 4 and min(score.dice for score in scores) > 0.95


def test_what_pictures_do_not_have_is_refused(model, tmp_path):
    write_png(tmp_path / "a.png", SHADES[figure(40, 50)])
    for outputs, name in ((Outputs(probabilities=True), "probabilities"), (Outputs(dicom_seg=True), "dicom_seg")):
        with pytest.raises(UsageError, match=f"{name} is True, but the model is for pictures"):
            segment([tmp_path / "a.png"], [model], tmp_path / "out", outputs=outputs)
    assert not (tmp_path / "out").exists()


def test_volumes_and_pictures_have_their_own_models(model, tmp_path):
    volume = ball_volume()[0]
    write_volume(tmp_path / "v.nii.gz", volume)
    write_png(tmp_path / "a.png", SHADES[figure(40, 50)])
    other = saved(tmp_path / "o.safetensors", SliceFormat(size=16, spacing=4.5, window=(-1.0, 2.0), z_bins=4))
    for image, made, message in (
        ("v.nii.gz", model, "is a volume; it must be one of the pictures"),
        ("a.png", other, "is a picture; it must be one of the volumes"),
    ):
        with pytest.raises(VolumeError, match=rf"{image}: {message}") as caught:
            segment([tmp_path / image], [made], tmp_path / "out")
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_files_of_channels_are_grouped_and_a_missing_one_is_named(tmp_path, monkeypatch):
    """The oracle looks at the second channel alone."""

    def bright(self, images, volume=None, *, views=1):
        assert images.shape[1] == 2
        return torch.nn.functional.one_hot((images[:, 1] > 0).long(), 2).movedim(-1, 1).float()

    monkeypatch.setattr(Segmenter, "probabilities", bright)
    fmt = SliceFormat(size=24, spacing=3.0, window=((-1.0, 2.0),) * 2, z_bins=4, crop="none")
    made = saved(tmp_path / "m.safetensors", fmt, classes=2)
    for number in range(2):
        image, label = ball_volume(seed=number)
        noise = Volume(np.random.default_rng(number).normal(size=image.data.shape).astype(np.float32), image.affine)
        write_volume(tmp_path / "s" / f"case{number}_0000.nii.gz", noise)
        write_volume(tmp_path / "s" / f"case{number}_0001.nii.gz", image)
    paths = segment([tmp_path / "s"], [made], tmp_path / "out", outputs=Outputs(pictures=True, probabilities=True))
    assert [path.name for path in paths] == ["case0.nii.gz", "case1.nii.gz"]
    found = read_volume(paths[1], integer=True)
    assert dice(found.data == 1, label.data > 0) > 0.9
    (tmp_path / "s" / "case0_0001.nii.gz").unlink()
    with pytest.raises(UsageError, match="case0 has no file case0_0001; an image has 2 channels here"):
        segment([tmp_path / "s"], [made], tmp_path / "other")
    with pytest.raises(UsageError, match="case1 has no file case1_0001"):
        segment([tmp_path / "s" / "case1_0000.nii.gz"], [made], tmp_path / "other")
    assert not (tmp_path / "other").exists()


# Weak labels of pictures.


@pytest.mark.parametrize("kind", ["point", "scribble", "block", "box"])
def test_a_weakened_copy_of_pictures_can_be_prepared(kind, tmp_path):
    source = tmp_path / "s"
    for part, size in (("training", (60, 90)), ("test", (90, 60))):  # equal names, so cases are called training/a
        write_png(source / part / "images" / "a.png", SHADES[figure(*size)])
        write_png(source / part / "masks" / "a.png", figure(*size))
    (source / "training" / "images" / "t").mkdir()
    turned_jpeg(source / "training" / "images" / "turned.JPG", 60, 90)
    write_png(source / "training" / "masks" / "turned.png", figure(60, 90))
    assert weaken_folder(source, tmp_path / "weak", kind) == 3
    options = {"size": SIDE, "validation_share": 0.0, "test_share": 0.0, "domain": "x"}
    sparse = {} if kind == "box" else {"unlabelled_value": UNLABELLED}
    result = prepare(tmp_path / "weak", tmp_path / "out", PrepareConfig(**options, label_kind=kind, **sparse))
    dense = prepare(source, tmp_path / "dense", PrepareConfig(**options)).store
    assert not result.failed and not result.remarks
    store = result.store
    names = {case.name: case for case in store.cases}
    assert sorted(names) == ["test_a", "training_a", "training_turned"]
    for case in dense.cases:
        copy = names[case.name.replace("/", "_")] if "/" in case.name else names[f"training_{case.name}"]
        np.testing.assert_array_equal(store.images[copy.first], dense.images[case.first])
        weak, full = store.labels[copy.first], dense.labels[case.first]
        if kind == "box":
            assert min(dice(weak == value, full == value) for value in (1, 2)) > 0.9  # the figure is made of boxes
        else:
            known = weak != UNLABELLED
            # Of the squares some may lie in one structure only.
            assert 0.001 < known.mean() < 0.4 and (kind == "block" or {1, 2} <= set(np.unique(weak[known])))
            assert (weak[known] == full[known]).mean() > 0.9


def test_the_command_weakens_masks_of_colours(tmp_path, capsys):
    write_png(tmp_path / "s" / "images" / "a.png", SHADES[figure(60, 90)])
    write_png(
        tmp_path / "s" / "masks" / "a.png", np.array([[0, 0, 0], [0, 0, 255], [255, 255, 0]], np.uint8)[figure(60, 90)]
    )
    (tmp_path / "t.csv").write_text("R,G,B,CLASS,NAME\n0,0,0,0,background\n0,0,255,1,wall\n255,255,0,2,lumen\n")
    words = ["weaken-labels", tmp_path / "s", "--out", tmp_path / "weak", "--kind", "box"]
    with pytest.raises(SystemExit) as refused:
        main([str(word) for word in words])
    assert refused.value.code == 1 and "--mask-colours" in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in [*words, "--mask-colours", tmp_path / "t.csv"]])
    assert ended.value.code == 0
    found = read_picture(tmp_path / "weak" / "a" / "label" / "box.png")[..., 0]
    np.testing.assert_array_equal(found, figure(60, 90))
    store = [tmp_path / "s", "--out", tmp_path / "out", "--domain", "x", "--size", "32"]
    store += ["--mask-colours", tmp_path / "t.csv", "--max-pixels", "6000", "--workers", "1"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in ["prepare", *store]])
    assert ended.value.code == 0 and "1 cases, 1 labelled, 1 slices of 32 px" in capsys.readouterr().out
