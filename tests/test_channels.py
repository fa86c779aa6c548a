"""Images of four channels at one site, from an nnU-Net data set to label maps and scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.summary import class_means
from fedfactory.adaptation.inference import segment
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.cli import app
from fedfactory.errors import UsageError
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.labelling import train_on_store
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from helpers import ball_volume, small_config
from typer.testing import CliRunner

CONFIG = PrepareConfig(domain="x", size=16, z_bins=4)
CHANNELS = 4
SHELL, CORE = 1, 3  # the channels that alone show class 1 and class 2


def sequences(number: int) -> tuple[list[Volume], Volume]:
    """Four images of one body, and its label map: a shell in one channel, its core in another, noise in all."""
    _, label = ball_volume(seed=number)
    rng, body = np.random.default_rng(number), np.zeros(label.data.shape, np.float32)
    body[1:-1, 1:-1] = 40.0
    images = [body + rng.normal(0, 2, body.shape) for _ in range(CHANNELS)]
    images[SHELL][label.data == 1] += 60.0
    images[CORE][label.data == 2] += 60.0
    return [Volume(image.astype(np.float32), label.affine) for image in images], label


def write_data_set(folder: Path, cases=3) -> Path:
    """An nnU-Net raw data set."""
    for number in range(cases):
        images, label = sequences(number)
        for channel, image in enumerate(images):
            write_volume(channel_file(folder, number, channel), image)
        write_volume(folder / "labelsTr" / f"case{number}.nii.gz", label)
    described = {"channel_names": {"0": "t1", "1": "t1c", "2": "t2", "3": "flair"}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


def channel_file(folder: Path, number: int, channel: int) -> Path:
    return folder / "imagesTr" / f"case{number}_{channel:04d}.nii.gz"


@pytest.fixture
def data_set(tmp_path):
    return write_data_set(tmp_path / "nnunet")


def call(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_case_without_one_of_the_channels_is_named_in_one_line_and_left_out(data_set, tmp_path):
    channel_file(data_set, 1, 2).unlink()
    words = ["prepare", data_set, "--out", tmp_path / "s", "--domain", "x", "--size", 16, "--z-bins", 4]
    result = call(*words)
    assert result.exit_code == 3
    (line,) = [text for text in result.output.splitlines() if "not used" in text]
    assert "imagesTr/case1: has no channel 2; add the files, or fill them with background (--missing-channels" in line
    store = SliceStore(tmp_path / "s")
    assert [case.name for case in store.cases] == ["case0", "case2"]
    assert store.images.shape[1] == CHANNELS


def test_a_missing_channel_can_be_filled_and_leaves_the_others_as_they_are(data_set, tmp_path):
    whole = prepare(data_set, tmp_path / "whole", CONFIG).store
    channel_file(data_set, 1, 2).unlink()
    config = PrepareConfig(domain="x", size=16, z_bins=4, fill_missing=True, window=whole.format.window)
    filled = prepare(data_set, tmp_path / "filled", config).store
    assert [case.name for case in filled.cases] == ["case0", "case1", "case2"]
    span = filled.cases[1].span
    assert np.ptp(filled.images[span, 2]) == 0 and np.ptp(whole.images[span, 2]) > 0.5
    for channel in (0, 1, 3):
        np.testing.assert_array_equal(filled.images[span, channel], whole.images[span, channel])


def test_channels_keep_their_order_in_the_store(data_set, tmp_path):
    """Each channel has its own window; only the channel that shows a class is brighter in it."""
    store = prepare(data_set, tmp_path / "s", CONFIG).store
    assert store.format.channels == CHANNELS and not store.format.colour
    images = np.moveaxis(store.images[:].astype(np.float32), 1, 0)
    for value, channel in ((1, SHELL), (2, CORE)):
        rise = [image[store.labels == value].mean() - image[store.labels == 0].mean() for image in images]
        assert np.argmax(rise) == channel


def test_a_site_trains_on_four_channels_and_segments_files_and_data_sets(tmp_path):
    source = write_data_set(tmp_path / "nnunet", cases=4)
    config = PrepareConfig(domain="x", size=16, z_bins=4, split="train", exclude=("case3",))
    store = prepare(source, tmp_path / "s", config).store
    model = tmp_path / "m.safetensors"
    train_on_store(store, small_config(updates=60, batch_size=8)).save(model)
    assert Segmenter.load(model).card.plan.channels == CHANNELS

    files = [channel_file(source, 3, channel) for channel in range(CHANNELS)]
    (found,) = segment(files, [model], tmp_path / "maps")
    assert found.name == "case3.nii.gz"
    assert read_volume(found, integer=True).data.shape == read_volume(files[0]).data.shape
    scores = class_means(evaluate(tmp_path / "maps", source / "labelsTr").scores, "dice")
    assert min(scores.values()) > 0.5

    every = segment([source], [model], tmp_path / "all")
    assert len(every) == 4
    assert read_volume(every[3]).data.tolist() == read_volume(found).data.tolist()

    write_volume(files[SHELL], sequences(3)[0][CORE])
    write_volume(files[CORE], sequences(3)[0][SHELL])
    segment(files, [model], tmp_path / "exchanged")
    exchanged = class_means(evaluate(tmp_path / "exchanged", source / "labelsTr").scores, "dice")
    assert exchanged[2] < 0.1  # what looks like a core lies in the shell

    with pytest.raises(UsageError, match="case3 has no file case3_0002"):
        segment([files[0], files[1], files[3]], [model], tmp_path / "incomplete")
    assert not (tmp_path / "incomplete").exists()
