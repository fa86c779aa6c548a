"""What a user chooses of a segmenter, the plan that follows from the data, and the network that it describes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.segmenter_config import (
    FIRST_GUESS_UPDATES,
    UPDATES,
    ContrastMix,
    SegmenterConfig,
    first_guess_config,
)
from fedfactory.adaptation.engine.training_plan import MAX_WIDTH, DataFacts, TrainingPlan, plan_training
from fedfactory.adaptation.network_names import NETWORKS, dimensions
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.errors import ConfigError, UsageError
from fedfactory.generative import FactoryConfig
from hypothesis import given, settings
from hypothesis import strategies as st

PLAN = TrainingPlan(window=32, widths=(8, 16, 16), fold=1, classes=3, batch_size=8, updates=60)
STACKS = replace(PLAN, network="unet3d", slices=8, slice_strides=(1, 2, 2))
HEART = DataFacts(size=144, extent=53, classes=4)


def planned(facts=HEART, *, fast_bfloat16=False, **choices) -> TrainingPlan:
    return plan_training(facts, SegmenterConfig(**choices), fast_bfloat16=fast_bfloat16)


# What is chosen


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"network": "resnet"}, "network is 'resnet'; choose one of unet"),
        ({"network_size": "huge"}, "network_size is 'huge'; choose one of small, standard, large"),
        ({"appearance": "wild"}, "appearance is 'wild'; choose one of mild, strong"),
        ({"precision": "float16"}, "precision is 'float16'; choose one of auto"),
        ({"updates": 0}, "updates is 0; it must be at least 1"),
        ({"width": 3}, "width is 3; it must be at least 4"),
        ({"depth": 2}, "depth is 2; it must be at least 3"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"minutes": 0.0}, "minutes is 0.0; it must be a positive number"),
        ({"minutes": math.inf}, "minutes is inf"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"memory": -1.0}, "memory is -1.0"),
        ({"updates": 5, "minutes": 1.0}, "updates is 5 and `minutes` is 1.0; give one of them"),
        ({"rotation": -0.1}, "rotation is -0.1; it must be at least 0"),
        ({"rotation": math.nan}, "rotation is nan"),
    ],
)
def test_an_impossible_choice_is_refused_by_name(choice, message):
    with pytest.raises(UsageError, match=message):
        SegmenterConfig(**choice)


@pytest.mark.parametrize(
    ("shares", "message"),
    [({"inverted": 1.5}, "inverted is 1.5"), ({"unchanged": 0.6, "curves": 0.6}, "sum must be at most 1")],
)
def test_impossible_shares_of_contrast_are_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        ContrastMix(**shares)


@pytest.mark.parametrize("contrast", [None, ContrastMix(unchanged=0.2, inverted=0.5)])
def test_choices_survive_json(contrast):
    config = SegmenterConfig(network="unet3d", minutes=2.5, width=12, contrast=contrast, rotation=0.15, seed=4)
    assert SegmenterConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"colour": 1}, "unknown entries"),
        ({"width": "wide"}, "width"),
        ({"contrast": {"curves": 2.0}}, "curves is 2.0"),
    ],
)
def test_choices_of_unknown_origin_are_checked(entry, message):
    with pytest.raises(ConfigError, match=message):
        SegmenterConfig.from_dict({**SegmenterConfig().to_dict(), **entry})


def test_a_first_guess_is_trained_longer_under_random_contrast():
    config = SegmenterConfig(width=8, seed=3)
    guess = first_guess_config(config)
    assert guess == replace(config, contrast=ContrastMix())
    assert (config.wanted_updates, guess.wanted_updates) == (UPDATES, FIRST_GUESS_UPDATES)
    assert first_guess_config(replace(config, updates=7)).wanted_updates == 7
    chosen = replace(config, contrast=ContrastMix(curves=0.45))
    assert first_guess_config(chosen) == chosen


@pytest.mark.parametrize(
    ("rotation", "mirror", "views"),
    [
        (math.radians(180), True, (0, 1, 2, 3, 4, 5, 6, 7)),
        (math.pi, False, (0, 1, 2, 3)),
        (0.15, True, (0, 4, 8, 9, 10, 11)),
        (0.15, False, (0, 8, 9, 10, 11)),
    ],
)
def test_a_segmenter_knows_the_views_in_which_it_was_trained(rotation, mirror, views):
    plan = replace(PLAN, rotation=rotation, mirror=mirror)
    assert SegmenterCard(classes=3, network="dynunet", plan=plan).views == views


@pytest.mark.parametrize(
    ("spread", "chosen", "expected"),
    [
        (None, {}, (180, True)),  # nobody knows how patients lie
        ((38, 39), {}, (180, True)),  # each in its own way
        ((7, 81), {}, (21, False)),  # all alike, the mirror image is another orientation
        ((3, 3), {}, (15, True)),  # a symmetric organ
        ((7, 81), {"rotation": math.pi}, (180, True)),
        ((7, 81), {"mirror": True}, (21, True)),
        (None, {"rotation": 0.0, "mirror": False}, (0, False)),
    ],
)
def test_windows_are_turned_as_much_as_patients_lie_differently(spread, chosen, expected):
    given = None if spread is None else tuple(math.radians(degrees) for degrees in spread)
    plan = plan_training(replace(HEART, orientation_spread=given), SegmenterConfig(**chosen))
    assert (math.degrees(plan.rotation), plan.mirror) == (pytest.approx(expected[0]), expected[1])


def test_a_card_whose_network_or_classes_are_not_those_of_its_plan_is_refused():
    for change, message in [
        ({"network": "unet"}, "network is 'unet'; it must be that of the plan"),
        ({"network": "federated"}, "network is 'federated'"),
        ({"plan": None}, "network is 'dynunet'"),
        ({"classes": 4}, "classes is 4, but 3 in the plan"),
    ]:
        with pytest.raises(ConfigError, match=message):
            SegmenterCard(**{"classes": 3, "network": "dynunet", "plan": PLAN, **change})


# Plans


@settings(deadline=None)
@given(
    size=st.integers(8, 640),
    extent=st.none() | st.integers(1, 640),
    network=st.sampled_from(NETWORKS),
    network_size=st.sampled_from(["small", "standard", "large"]),
    anisotropy=st.floats(0.2, 20.0),
)
def test_a_plan_fits_its_data(size, extent, network, network_size, anisotropy):
    facts = DataFacts(size=size, extent=extent, classes=4, anisotropy=anisotropy)
    plan = planned(facts, network=network, network_size=network_size)
    wanted = size if extent is None else min(size, 1.5 * extent)
    assert plan.window % plan.side_multiple == 0
    assert plan.window >= max(min(size, extent or 0), wanted - plan.side_multiple / 2)
    assert plan.window < size + plan.side_multiple
    assert plan.window // plan.side_multiple >= 2  # the deepest level still is a map
    assert plan.slices == (1 if dimensions(network) == 2 else 8)
    assert list(plan.widths) == sorted(plan.widths)
    assert plan.batch_size >= 1 and plan.memory <= 8 * 2**30
    assert TrainingPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_the_network_grows_with_its_window():
    heart = planned()
    assert (heart.window, heart.widths, heart.fold) == (80, (24, 48, 96, 96), 2)
    tiny = planned(DataFacts(size=32, extent=None, classes=3))
    assert (tiny.window, tiny.fold, len(tiny.widths)) == (32, 1, 4)
    assert planned(network="segresnet").widths == (24, 48, 96, 192)  # it always doubles its channels
    assert planned(width=8, depth=3, batch_size=5, updates=9, learning_rate=1e-3) == replace(
        heart, widths=(8, 16, 16), slice_strides=(1,) * 3, batch_size=5, updates=9, learning_rate=1e-3
    )
    with pytest.raises(ConfigError, match="size is 7; slices must have at least 8 pixels"):
        planned(DataFacts(size=7, extent=None, classes=3))


@pytest.mark.parametrize("network", NETWORKS)
def test_slices_of_the_papers_size_get_a_network_that_can_be_trained(network):
    size = FactoryConfig.preset("paper", ("a", "b", "c")).image_size
    plan = planned(DataFacts(size=size, extent=None, classes=5, anisotropy=3.0), network=network)
    assert (size, plan.window, plan.fold) == (512, 512, 2)  # whole slices where no label tells how large structures are
    assert len(plan.widths) == (4 if network == "segresnet3d" else 6)
    if not network.startswith("segresnet"):
        assert max(plan.widths) == MAX_WIDTH
    with torch.device("meta"):
        made = PlannedNetwork(plan)
    assert 1e6 < sum(values.numel() for values in made.parameters()) < 60e6
    assert 0.25 * 2**30 < plan.memory < 8 * 2**30 and plan.batch_size == 2


def test_estimated_memory_grows_with_window_batch_and_width():
    for larger in ({"window": 64}, {"batch_size": 16}, {"widths": (16, 32, 32)}):
        assert replace(PLAN, **larger).memory > 1.9 * PLAN.memory
    assert replace(STACKS, slices=16).memory > 1.9 * STACKS.memory


def test_where_memory_is_small_the_batch_becomes_smaller_and_then_the_window():
    facts = DataFacts(size=512, extent=None, classes=4)
    whole = planned(facts)
    gib = whole.memory / 2**30
    half = planned(facts, memory=0.7 * gib)
    assert half == replace(whole, batch_size=1) and half.memory <= 0.7 * whole.memory
    part = planned(facts, memory=0.55 * gib)
    assert part.batch_size == 1 and part.window < 512 and part.memory <= 0.55 * whole.memory
    assert part == replace(half, window=part.window)
    assert replace(part, window=part.window + part.side_multiple).memory > 0.55 * whole.memory
    assert planned(facts, memory=1e-6).window == 2 * whole.side_multiple  # no smaller network is tried


def test_half_precision_is_chosen_where_it_is_faster():
    assert planned().precision == "float32"
    assert planned(fast_bfloat16=True).precision == "bfloat16"
    assert planned(fast_bfloat16=True, network="segresnet").precision == "float32"  # its norm is slow in bfloat16
    for precision in ("float32", "bfloat16"):
        assert {planned(precision=precision, fast_bfloat16=fast).precision for fast in (True, False)} == {precision}


@pytest.mark.parametrize(
    ("anisotropy", "strides"), [(1.0, (1, 2, 2, 1)), (8.0, (1, 1, 2, 2)), (16.0, (1, 1, 1, 2)), (100.0, (1,) * 4)]
)
def test_slices_are_halved_once_pixels_are_about_as_large_as_slices_are_apart(anisotropy, strides):
    facts = replace(HEART, anisotropy=anisotropy)
    for network in ("unet3d", "dynunet3d"):
        plan = planned(facts, network=network)
        assert (plan.slices, plan.slice_strides) == (8, strides)
    assert planned(facts).slice_strides == (1,) * 4


def test_segresnet_halves_slices_at_every_level():
    for anisotropy in (1.0, 100.0):
        plan = planned(replace(HEART, size=512, extent=None, anisotropy=anisotropy), network="segresnet3d", depth=6)
        assert plan.slice_strides == (1, 2, 2, 2)  # 8 slices are 1 in the fourth level


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": "resnet"}, "network is 'resnet'; choose one of unet"),
        ({"window": 33}, "window is 33; it must be a multiple of 4"),
        ({"window": 0}, "window is 0"),
        ({"widths": (8,)}, "widths has 1"),
        ({"widths": (8, 0, 8), "slice_strides": ()}, "every level needs at least 1 channel"),
        ({"slice_strides": (1, 2)}, r"slice_strides is \(1, 2\)"),
        ({"fold": 3}, "fold is 3"),
        ({"slices": 8}, "slices is 8; it must be 1 for dynunet"),
        ({"network": "unet3d", "slices": 6, "slice_strides": (1, 2, 2)}, "slices is 6; it must be a multiple of 4"),
        ({"network": "segresnet", "widths": (12, 24, 48)}, "begins with 12; segresnet needs a multiple of 8"),
        ({"classes": 1}, "classes is 1"),
        ({"updates": 0}, "updates is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"precision": "float16"}, "precision is 'float16'"),
    ],
)
def test_an_impossible_plan_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **change)


# Networks


@pytest.mark.parametrize("fold", [1, 2])
@pytest.mark.parametrize("network", NETWORKS)
def test_a_planned_network_gives_logits_of_its_windows(network, fold):
    if dimensions(network) == 2:
        plan, shape = replace(PLAN, network=network, fold=fold), (24, 24)
    else:
        plan, shape = replace(STACKS, network=network, fold=fold), (8, 16, 16)
    found = PlannedNetwork(plan)(torch.randn(2, 1, *shape))
    assert found.shape == (2, 3, *shape)
    assert found.isfinite().all() and found.std() > 0


@pytest.mark.parametrize("network", ["dynunet", "dynunet3d"])
def test_a_folded_pixel_keeps_its_place(network):
    """A network of two by two folded pixels that copies them gives each pixel its own logits."""
    plan = replace(PLAN if network == "dynunet" else STACKS, network=network, fold=2, classes=2)
    made = PlannedNetwork(plan)
    made.body = Copies()
    shape = (8, 8) if network == "dynunet" else (4, 8, 8)
    windows = torch.randn(2, 1, *shape)
    torch.testing.assert_close(made(windows), torch.cat([windows, -windows], 1))


class Copies(torch.nn.Module):
    """Two classes from folded pixels: their intensities, and the negative ones."""

    def forward(self, folded: torch.Tensor) -> torch.Tensor:
        return torch.cat([folded, -folded], 1)
