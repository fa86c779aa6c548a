"""From slices to label maps: windows, views, volumes, and structures that are one object."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.object_rule import FOREGROUND, keep_single_objects, learn_single_objects
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.training_plan import TrainingPlan
from fedfactory.adaptation.engine.window_inference import (
    averaged_views,
    turn,
    turn_back,
    view_agreement,
    window_probabilities,
)
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.errors import UsageError
from helpers import untrained_segmenter
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage
from torch import nn

PLAN = TrainingPlan(window=24, widths=(4, 8, 8), fold=1, classes=2, batch_size=4, updates=1)
STACKS = replace(PLAN, network="unet3d", slices=8, slice_strides=(1, 2, 2))


class BrightIsOne(nn.Module):
    """Class 1 where a window is brighter than its mean by a deviation."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(windows), 20 * (windows - 1)], 1)


class Recorder(BrightIsOne):
    """Keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        self.seen.append(windows)
        return super().forward(windows)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def untrained(plan: TrainingPlan) -> PlannedNetwork:
    torch.manual_seed(0)
    return PlannedNetwork(plan).eval()


# Windows


@pytest.mark.parametrize("plan", [PLAN, STACKS], ids=["2-D", "3-D"])
def test_the_second_window_is_centred_on_what_the_first_found(plan):
    images = torch.zeros(9, 1, 60, 60)
    images[:, 0, 34:46, 20:30] = 1  # half of it lies outside of a window of 24 in the middle
    network = Recorder()
    found = window_probabilities(network, images, plan)
    assert found.shape == (9, 2, 60, 60)
    torch.testing.assert_close(found.sum(1), torch.ones(9, 60, 60))
    assert torch.equal(found.argmax(1) == 1, images[:, 0] == 1)
    bright = network.seen[-1].flatten(0, -3)[0] > 0
    rows, columns = (places.float() for places in torch.nonzero(bright).T)
    # The first window showed rows 34 to 41, and columns 20 to 29; it is centred on these.
    assert float(rows.mean()) == pytest.approx(11.5 + 2, abs=0.6) and float(columns.mean()) == pytest.approx(
        11.5, abs=1
    )


def test_slices_smaller_than_the_window_are_padded_and_cut_again():
    images = torch.zeros(1, 1, 17, 17)
    images[:, 0, 3:8, 9:14] = 1
    found = window_probabilities(BrightIsOne(), images, PLAN, views=tuple(range(8)))
    assert torch.equal(found.argmax(1) == 1, images[:, 0] == 1)


@pytest.mark.parametrize("plan", [PLAN, STACKS], ids=["2-D", "3-D"])
def test_an_empty_volume_is_background(plan):
    found = window_probabilities(BrightIsOne(), torch.zeros(2, 1, 30, 30), plan)
    assert not found.argmax(1).any()


def test_a_three_dimensional_network_sees_stacks_as_in_training():
    """A stack has mean 0 and deviation 1 as a whole, and beyond the volume's ends there is air."""
    network, images = Recorder(), 0.2 + 0.6 * noise(3, 1, 24, 24)
    images[1] = images[1] / 2  # a darker slice stays darker
    window_probabilities(network, images, STACKS)
    (seen,) = network.seen
    assert seen.shape == (1, 1, 8, 24, 24)
    assert float(seen.mean()) == pytest.approx(0, abs=1e-5) and float(seen.std()) == pytest.approx(1, abs=1e-4)
    means = seen.mean((0, 1, 3, 4))
    empty = seen[0, 0].flatten(1).std(1) < 1e-6
    assert int(empty.sum()) == 5 and float(means[empty].max()) == pytest.approx(float(seen.min()))
    first, dark, last = means[~empty].tolist()
    assert dark < first - 0.3 and dark < last - 0.3


@pytest.mark.parametrize("plan", [PLAN, STACKS], ids=["2-D", "3-D"])
def test_several_volumes_are_segmented_as_one_after_the_other(plan):
    network, images, volume = untrained(plan), noise(14, 1, 40, 40), np.repeat([3, 0, 7], [5, 1, 8])
    together = window_probabilities(network, images, plan, volume=volume, views=(0, 4))
    apart = [window_probabilities(network, part, plan, views=(0, 4)) for part in images.split([5, 1, 8])]
    torch.testing.assert_close(together, torch.cat(apart), atol=1e-6, rtol=1e-5)


# Views


@pytest.mark.parametrize("view", range(12))
def test_a_turned_view_is_turned_back(view):
    images = noise(2, 3, 9, 9)
    assert torch.equal(turn_back(turn(images, view), view), images)
    assert torch.equal(turn(turn_back(images, view), view), images)


def test_all_views_differ_and_the_fourth_mirrors_left_to_right():
    images = noise(2, 1, 9, 9)
    views = [turn(images, view) for view in range(12)]
    assert not any(torch.equal(views[first], views[second]) for first in range(12) for second in range(first))
    assert torch.equal(views[8][:, :, 3:], images[:, :, :-3]) and torch.equal(views[11][..., :-3], images[..., 3:])
    assert torch.equal(views[0], images) and torch.equal(views[4], images.flip(2))


def test_the_mean_of_all_views_turns_with_the_image():
    network, windows = untrained(PLAN), noise(2, 1, 16, 16)
    (plain,) = averaged_views(network, [windows], PLAN, views=tuple(range(8)))
    for view in range(1, 8):
        (found,) = averaged_views(network, [turn(windows, view)], PLAN, views=tuple(range(8)))
        torch.testing.assert_close(turn_back(found, view), plain, atol=1e-5, rtol=0)
    (single,) = averaged_views(network, [windows], PLAN, views=(0,))
    assert not torch.allclose(single, plain, atol=1e-3)


def test_agreement_of_views_is_their_mean_dice_with_the_mean():
    mean = torch.zeros(1, 4, 4, dtype=torch.long)
    mean[0, :2] = 1
    half, other = mean.clone(), mean.clone()
    half[0, 1] = 0  # 4 of 8 pixels: Dice 2/3
    other[0, 2, 0] = 2  # a class that the mean does not have: Dice 0 for it
    assert view_agreement([mean, mean], mean, 3) == 1
    assert view_agreement([mean, half], mean, 3) == pytest.approx((1 + 2 / 3) / 2)
    assert view_agreement([other], mean, 3) == pytest.approx(0.5)
    assert math.isnan(view_agreement([torch.zeros_like(mean)], torch.zeros_like(mean), 3))


def test_a_segmenter_uses_no_view_that_it_was_not_trained_in():
    made, images = untrained_segmenter(mirror=False, rotation=0.15), noise(3, 1, 16, 16) * 2 - 1
    with pytest.raises(UsageError, match="views is 6; choose from 1 to 5"):
        made.probabilities(images, views=6)
    made.card = replace(made.card, plan=replace(made.card.plan, mirror=True))
    both = [made.probabilities(images), turn_back(made.probabilities(turn(images, 4)), 4)]
    torch.testing.assert_close(made.probabilities(images, views=2), torch.stack(both).mean(0))
    assert 0 < made.agreement(images) < 1
    with pytest.raises(UsageError, match="views is 7; choose from 1 to 6"):
        made.probabilities(images, views=7)


# Structures that are one object


def blocks(kind: str) -> np.ndarray:
    """A volume (4, 16, 16) with two structures: "together" touch, "apart" do not, in "pieces" the second has two."""
    labels = np.zeros((4, 16, 16), np.uint8)
    labels[:, 2:8, 2:8] = 1
    labels[:, 8:12, 2:8] = 2
    if kind == "apart":
        labels[:, 8, 2:8] = 0
    if kind == "pieces":
        labels[:, 2:8, 8:11] = 2
        labels[:, 8, 7] = 0
    return labels


def volumes(*kinds: str) -> LabelledSlices:
    labels = np.concatenate([blocks(kind) for kind in kinds])
    return LabelledSlices(labels.astype(np.float32), labels, 3, np.repeat(np.arange(len(kinds)), 4))


@pytest.mark.parametrize(
    ("kinds", "rule"),
    [
        (["together"], (FOREGROUND, 1, 2)),
        (["apart"], (1, 2)),
        (["pieces"], (FOREGROUND, 1)),
        (["together"] * 19 + ["apart"], (FOREGROUND, 1, 2)),  # true of nearly all volumes
        (["together"] * 18 + ["apart"] * 2, (1, 2)),
    ],
)
def test_what_is_one_object_is_learnt_from_labels(kinds, rule):
    assert learn_single_objects(volumes(*kinds)) == rule


def test_nothing_is_learnt_from_single_slices_or_of_absent_structures():
    data = volumes("together")
    assert learn_single_objects(LabelledSlices(data.images, data.labels, 3)) == ()
    assert learn_single_objects(LabelledSlices(data.images, data.labels, 5, data.volume)) == (FOREGROUND, 1, 2)


def test_islands_of_what_is_one_object_go():
    right = blocks("together")
    found = right.copy()
    found[1, 13:15, 13:15] = 1  # an island
    found[2, 4, 4] = 2  # a voxel of the other structure inside
    np.testing.assert_array_equal(keep_single_objects(found, ()), found)
    kept = keep_single_objects(found, (FOREGROUND,))
    assert not kept[1, 13:15, 13:15].any() and kept[2, 4, 4] == 2
    kept = keep_single_objects(found, (FOREGROUND, 1, 2))
    assert kept[2, 4, 4] == 0 and (kept != right).sum() == 1
    assert not keep_single_objects(np.zeros_like(right), (FOREGROUND, 1)).any()


@settings(deadline=None)
@given(
    labels=arrays(np.uint8, (3, 4, 4), elements=st.integers(0, 2)),
    rule=st.sets(st.integers(FOREGROUND, 2)).map(tuple),
)
def test_the_rule_only_removes_and_has_nothing_left_to_remove(labels, rule):
    kept = keep_single_objects(labels, rule)
    assert ((kept == labels) | (kept == 0)).all()
    np.testing.assert_array_equal(keep_single_objects(kept, rule), kept)
    for label in rule:
        _, count = ndimage.label(kept > 0 if label == FOREGROUND else kept == label)
        assert count <= 1
    if not rule:
        np.testing.assert_array_equal(kept, labels)
