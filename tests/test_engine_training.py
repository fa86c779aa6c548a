"""Training of planned segmenters, what they go on from, and how long they are trained."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.augmentation import Augmentation
from fedfactory.adaptation.engine.training_loop import LoopConfig, train
from fedfactory.adaptation.engine.training_plan import TrainingPlan
from fedfactory.adaptation.engine.window_training import Stream, WindowTrainer
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.adaptation.network_names import NETWORKS, dimensions
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training import segmenter_training
from fedfactory.adaptation.training.segmenter_training import (
    FURTHER_RATE,
    SegmenterData,
    plan_segmenter,
    train_segmenters,
)
from fedfactory.errors import ConfigError
from fedfactory.imaging.slice_format import SliceFormat
from helpers import small_config, squares

FORMAT = SliceFormat(size=32, spacing=1.0, window=(-1.0, 1.0), z_bins=4)
PLAN = TrainingPlan(window=32, widths=(8, 16, 16), fold=1, classes=3, batch_size=8, updates=70, learning_rate=1e-2)


def volumes(count: int = 12, seed: int = 0) -> LabelledSlices:
    """Volumes of four slices of 32 px."""
    images, labels = squares(count, seed)
    return LabelledSlices(images, labels, 3, np.repeat(np.arange(count // 4), 4))


def trained(data: SegmenterData, config, **options) -> Segmenter:
    return train_segmenters(data, FORMAT, config, title="squares", **options)[0]


def equal_weights(first: Segmenter, second: Segmenter) -> bool:
    ours, theirs = (made.network.state_dict() for made in (first, second))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_segmenter_learns():
    stream = Stream(slices=volumes(24), augmentation=Augmentation.of(small_config(), PLAN))
    trainer = WindowTrainer([stream], PLAN, validation=volumes(seed=7))
    untrained = trainer.score()
    (best,) = train(trainer, PLAN.updates, LoopConfig(evaluations=1), title="squares", seed=0)
    assert best.score > max(0.7, untrained + 0.3)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_is_trained_saved_and_loaded_and_repeats_with_its_seed(network, tmp_path):
    data = SegmenterData(labelled=volumes())
    config = small_config(network=network, updates=3, batch_size=2)
    made, again = trained(data, config), trained(data, config)
    assert equal_weights(made, again)
    assert not equal_weights(made, trained(data, replace(config, seed=1)))
    made.save(tmp_path / "m.safetensors")
    loaded = Segmenter.load(tmp_path / "m.safetensors")
    assert loaded.card == made.card and loaded.card.plan.dimensions == dimensions(network)
    images = torch.from_numpy(data.labelled.images)
    found = [model.probabilities(images, data.labelled.volume, views=2) for model in (made, again, loaded)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    torch.testing.assert_close(found[0].sum(1), torch.ones(12, 32, 32))


def test_a_batch_does_not_depend_on_earlier_ones():
    first, second = (WindowTrainer([Stream(slices=volumes(), augmentation=Augmentation())], PLAN) for _ in range(2))
    first.batch(0)
    for ours, theirs in zip(first.batch(3), second.batch(3), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(first.batch(3)[0], first.batch(4)[0])


def test_half_precision_trains_with_losses_in_float32():
    stream = Stream(slices=volumes(), augmentation=Augmentation())
    found = [
        WindowTrainer([stream], replace(PLAN, precision=name)).update(0)["labels"] for name in ("float32", "bfloat16")
    ]
    assert found[0] == pytest.approx(found[1], rel=0.02) and found[0] != found[1]


def test_a_segmenter_without_foreground_on_the_validation_slices_has_the_worst_score():
    empty = LabelledSlices(np.zeros((4, 32, 32), np.float32), np.zeros((4, 32, 32), np.uint8), 3)
    trainer = WindowTrainer([Stream(slices=volumes(), augmentation=Augmentation())], PLAN, validation=empty)
    trainer.network.eval()
    for parameter in trainer.network.parameters():
        parameter.zero_()  # background is the first of equal classes
    assert trainer.score() == 0.0


# What is trained on


def constant(label: int) -> LabelledSlices:
    """Slices that have this label everywhere."""
    images = np.random.default_rng(label).uniform(-1, 1, (6, 32, 32)).astype(np.float32)
    return LabelledSlices(images, np.full(images.shape, label, np.uint8), 4)


@pytest.mark.parametrize(
    ("shares", "counts"), [((), (8, 0, 0)), ((0.5,), (4, 4, 0)), ((0.25, 0.5), (2, 2, 4)), ((0.01,), (7, 1, 0))]
)
def test_further_slices_have_their_share_of_every_batch(shares, counts):
    further = tuple((constant(label), share) for label, share in enumerate(shares, start=2))
    streams = SegmenterData(labelled=constant(1), further=further).streams(small_config(), PLAN)
    trainer = WindowTrainer(streams, replace(PLAN, classes=4))
    for number in range(3):
        _, labels = trainer.batch(number)
        assert tuple(int((labels == label).any((1, 2, 3)).sum()) for label in (1, 2, 3)) == counts


@pytest.mark.parametrize("shares", [(0.0,), (0.5, 0.5), (1.2,), (-0.1,)])
def test_impossible_shares_are_refused(shares):
    with pytest.raises(ConfigError, match="must be positive and sum to less than 1"):
        SegmenterData(labelled=constant(1), further=tuple((constant(2), share) for share in shares))


def test_a_segmenter_that_exists_is_trained_further_where_an_equal_network_is_asked_for():
    config = small_config(updates=2)
    start = trained(SegmenterData(labelled=volumes()), config)
    start.card = replace(start.card, single_objects=(2,))
    data = SegmenterData(labelled=volumes(8, seed=3), start=start)
    still = replace(config, updates=1, learning_rate=1e-12)
    same = trained(data, still)
    for name, tensor in start.network.state_dict().items():
        torch.testing.assert_close(same.network.state_dict()[name], tensor, atol=1e-6, rtol=0)
    assert same.card.single_objects == (2,)  # learnt from true labels, which this site may not have
    assert same.card.plan == replace(start.card.plan, updates=1, learning_rate=1e-12)
    assert plan_segmenter(data, FORMAT, config).learning_rate == FURTHER_RATE * start.card.plan.learning_rate
    for change in ({"width": 12}, {"network": "unet"}, {"network_size": "large"}, {"depth": 4}):
        anew = trained(data, replace(still, **change))
        without = trained(replace(data, start=None), replace(still, **change))
        assert equal_weights(anew, without) and not anew.card.training.continued
    assert same.card.training.continued and not start.card.training.continued
    turned = plan_segmenter(data, FORMAT, replace(config, rotation=0.5, mirror=False))
    assert (turned.rotation, turned.mirror) == (0.5, False)
    kept = plan_segmenter(data, FORMAT, replace(config, rotation=None, mirror=None))
    assert (kept.rotation, kept.mirror) == (start.card.plan.rotation, start.card.plan.mirror)


def test_a_training_that_goes_on_takes_the_batch_and_memory_that_the_site_gives():
    start = trained(SegmenterData(labelled=volumes()), small_config(updates=1))
    data = SegmenterData(labelled=volumes(), start=start)
    assert plan_segmenter(data, FORMAT, small_config(batch_size=2)).batch_size == 2
    assert plan_segmenter(data, FORMAT, small_config(batch_size=None)).batch_size == start.card.plan.batch_size
    least = replace(start.card.plan, batch_size=1)
    small = plan_segmenter(data, FORMAT, small_config(memory=1.01 * least.memory / 2**30))
    assert (small.batch_size, small.window) == (1, start.card.plan.window)


def test_windows_follow_from_all_slices_that_are_trained_on():
    labels = np.zeros((4, 32, 32), np.uint8)
    labels[:, 10:14, 10:14] = 1
    small = LabelledSlices(np.zeros(labels.shape, np.float32), labels, 3)
    assert plan_segmenter(SegmenterData(labelled=small), FORMAT, small_config()).window == 8
    both = SegmenterData(labelled=small, further=((volumes(), 0.5),))
    assert plan_segmenter(both, FORMAT, small_config()).window > 16
    thick = replace(FORMAT, slice_spacing=8.0)
    strides = [
        plan_segmenter(SegmenterData(labelled=volumes()), fmt, small_config(network="unet3d")).slice_strides
        for fmt in (FORMAT, thick)
    ]
    assert strides[0] != strides[1]  # slices that are far apart are halved later


# How long


def test_minutes_become_the_number_of_updates_that_fits(monkeypatch):
    measured = []
    real = segmenter_training.seconds_per_update

    def timed(*args, **options):
        measured.append(real(*args, **options))
        return measured[-1]

    monkeypatch.setattr(segmenter_training, "seconds_per_update", timed)
    data = SegmenterData(labelled=volumes())
    plan = plan_segmenter(data, FORMAT, small_config(updates=None, minutes=0.5))
    assert measured[0] > 0 and plan.updates == max(1, round(30 / measured[0]))  # however busy the machine is
    monkeypatch.setattr(segmenter_training, "seconds_per_update", lambda *args, **options: 0.25)
    assert plan_segmenter(data, FORMAT, small_config(updates=None, minutes=2)).updates == 480
    assert plan_segmenter(data, FORMAT, small_config(updates=None, minutes=1e-6)).updates == 1
    monkeypatch.setattr(segmenter_training, "seconds_per_update", None)  # nothing is timed without need
    assert plan_segmenter(data, FORMAT, small_config(updates=7)).updates == 7


def test_timing_leaves_the_training_as_it_is(monkeypatch):
    data = SegmenterData(labelled=volumes())
    untimed = trained(data, small_config(updates=2))
    real = segmenter_training.seconds_per_update
    monkeypatch.setattr(
        segmenter_training, "seconds_per_update", lambda *args, **options: 0 * real(*args, **options) + 30.0
    )
    made = trained(data, small_config(updates=None, minutes=1))
    assert made.card.plan == untimed.card.plan and equal_weights(made, untimed)
