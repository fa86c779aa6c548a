"""Images of several channels in the engine: colour pictures, and several sequences of MRI."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.augmentation import Augmentation, augmented_slices, restyled_slices
from fedfactory.adaptation.engine.colours import grey_level, random_colours, with_colours, with_grey_level
from fedfactory.adaptation.engine.labelled_volumes import data_facts
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.random_appearance import MILD, STRONG, UNCHANGED, random_appearance, standardised
from fedfactory.adaptation.engine.random_contrast import HUE, SATURATION, random_contrast
from fedfactory.adaptation.engine.random_windows import WindowVariation
from fedfactory.adaptation.engine.segmenter_config import ContrastMix, SegmenterConfig, first_guess_config
from fedfactory.adaptation.engine.training_plan import TrainingPlan, plan_training
from fedfactory.adaptation.engine.window_inference import window_probabilities
from fedfactory.adaptation.engine.window_sampler import WindowSampler
from fedfactory.adaptation.explained_intensity import explained_intensity
from fedfactory.adaptation.labelled_slices import LabelledSlices, foreground_dice
from fedfactory.adaptation.network_names import NETWORKS
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.segmenter_training import SegmenterData, plan_segmenter, train_segmenters
from fedfactory.errors import ConfigError, UsageError
from fedfactory.imaging.slice_format import SliceFormat
from helpers import small_config, squares, untrained_segmenter
from torch import nn

PLAN = TrainingPlan(window=16, widths=(8, 8, 8), fold=1, classes=3, batch_size=4, updates=1)
STACKS = replace(PLAN, network="unet3d", slices=8, slice_strides=(1, 2, 2))
STILL = WindowVariation(rotation=0.0, mirror=False, scale=(1.0, 1.0), elastic=0.0, shift_share=0.0, anywhere=0.0)
COLOUR = SliceFormat(
    size=16, spacing=1.0, window=((-1.0, 1.0),) * 3, z_bins=1, plane="stored", crop="none", content="pictures",
    colour=True,
)  # fmt: skip
FOUR = SliceFormat(size=32, spacing=1.0, window=((-1.0, 1.0),) * 4, z_bins=4)
SHADES = np.array([[0.3, 0.3, 0.3], [0.8, 0.5, 0.5], [0.5, 0.8, 0.5]])  # the second and third are equally bright


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=rng(seed))


def hue(windows: torch.Tensor) -> torch.Tensor:
    """Angle in the plane of colours, radians, of windows (B, 3, ...)."""
    red, green, blue = windows.unbind(1)
    return torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)


def saturation(windows: torch.Tensor) -> torch.Tensor:
    """Distance (B, 1, ...) from the grey of equal brightness."""
    return (windows - grey_level(windows)).norm(dim=1, keepdim=True)


def coloured_squares(count: int, seed: int = 0) -> LabelledSlices:
    """Pictures of 16 px with two squares, which differ in hue and not in brightness."""
    random = np.random.default_rng(seed)
    labels = np.zeros((count, 16, 16), np.uint8)
    for label in labels:
        for value in random.permutation([1, 2]):
            row, column = random.integers(1, 10, 2)
            label[row : row + 6, column : column + 6] = value
    pictures = np.moveaxis(SHADES[labels], 3, 1) * random.uniform(0.8, 1.2, (count, 1, 1, 1))
    pictures = (pictures + random.normal(0, 0.03, pictures.shape)).clip(0, 1)
    return LabelledSlices((2 * pictures - 1).astype(np.float32), labels, 3)


def four_sequences(count: int = 12, seed: int = 0) -> LabelledSlices:
    """Volumes of four slices, in which the squares of `squares` are seen in the last channel alone."""
    images, labels = squares(count, seed)
    others = np.random.default_rng(seed).uniform(-1, 1, (count, 3, 32, 32)).astype(np.float32)
    return LabelledSlices(np.concatenate([others, images[:, None]], 1), labels, 3, np.repeat(np.arange(count // 4), 4))


# Colours


def test_another_grey_level_keeps_hues_and_the_range():
    windows, grey = noise(4, 3, 12, 12), noise(4, 1, 12, 12, seed=1) * 1.4 - 0.2
    found = with_grey_level(windows, grey)
    torch.testing.assert_close(grey_level(found), grey.clamp(0, 1), atol=1e-6, rtol=0)
    assert float(found.min()) >= -1e-6 and float(found.max()) <= 1 + 1e-6
    coloured = (saturation(found) > 0.05)[:, 0]
    difference = torch.remainder(hue(found) - hue(windows) + math.pi, 2 * math.pi) - math.pi
    assert float(difference[coloured].abs().max()) < 1e-2
    torch.testing.assert_close(with_grey_level(windows, grey_level(windows)), windows)


def test_a_third_of_a_turn_makes_red_green_and_saturation_is_a_factor():
    red = torch.tensor([0.8, 0.5, 0.5]).view(1, 3, 1, 1)
    found = with_colours(red, torch.tensor([1 / 3]), torch.tensor([1.0]))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.5, 0.8, 0.5]))  # turned the other way: blue
    half = with_colours(red, torch.zeros(1), torch.tensor([0.5]))
    torch.testing.assert_close(half.flatten(), torch.tensor([0.7, 0.55, 0.55]))
    vivid = with_colours(red, torch.zeros(1), torch.tensor([10.0]))
    assert float(vivid.max()) == pytest.approx(1, abs=1e-6) and float(hue(vivid)) == pytest.approx(0, abs=1e-3)


def test_drawn_colours_fill_their_ranges():
    turn, factor = random_colours(2000, 0.1, (0.6, 1.4), rng=rng())
    assert float(turn.min()) < -0.09 and float(turn.max()) > 0.09 and float(turn.abs().max()) <= 0.1
    assert float(factor.min()) < 0.62 and float(factor.max()) > 1.38


# Contrast


MIXES = [ContrastMix(unchanged=0.0, curves=1.0, inverted=0.0), ContrastMix(unchanged=0.0, curves=0.0, inverted=0.0)]


@pytest.mark.parametrize("mix", MIXES, ids=["curves", "networks"])
def test_random_contrast_turns_the_hues_of_a_picture_by_one_angle_each(mix):
    windows = noise(24, 3, 16, 16)
    found = random_contrast(windows, mix, rng=rng(1), colour=True)
    difference = torch.remainder(hue(found) - hue(windows) + math.pi, 2 * math.pi) - math.pi
    turns = []
    for window, change in zip(found, difference, strict=True):
        seen = change[saturation(window[None])[0, 0] > 0.05]
        if len(seen):
            assert float(seen.max() - seen.min()) < 0.02
            turns.append(float(seen.mean()) / (2 * math.pi))
    assert len(turns) > 12 and max(map(abs, turns)) <= HUE + 0.01 and np.std(turns) > HUE / 4
    assert float(found.min()) >= -1e-5 and float(found.max()) <= 1 + 1e-5


def test_curves_of_pictures_rise_and_the_mix_alone_exchanges_dark_and_bright():
    windows = (torch.linspace(0, 0.99, 64).view(1, 1, 8, 8) + torch.tensor([0.01, 0, 0]).view(1, 3, 1, 1)).repeat(
        64, 1, 1, 1
    )
    mix = ContrastMix(unchanged=0.0, curves=1.0, inverted=0.0)
    grey = grey_level(random_contrast(windows, mix, rng=rng(), colour=True)).flatten(1)
    assert (grey.diff(dim=1) >= -1e-5).all()
    made = random_contrast(windows, ContrastMix(unchanged=1.0, curves=0.0, inverted=1.0), rng=rng(), colour=True)
    seen = grey_level(windows) > 0.1
    torch.testing.assert_close(grey_level(made)[seen], (1.05 - grey_level(windows))[seen], atol=1e-5, rtol=0)
    still = random_contrast(windows, ContrastMix(unchanged=1.0, curves=0.0, inverted=0.0), rng=rng(), colour=True)
    torch.testing.assert_close(still, windows, atol=1e-6, rtol=0)


def test_every_sequence_has_a_contrast_of_its_own():
    windows = noise(200, 1, 8, 8).expand(-1, 4, -1, -1)
    mix = ContrastMix(unchanged=0.5, curves=0.5, inverted=0.0)
    found = random_contrast(windows, mix, rng=rng())
    same = torch.isclose(found, windows).flatten(2).all(2)
    assert float(same.float().mean()) == pytest.approx(0.5, abs=0.06)
    assert 0.02 < float(same.all(1).float().mean()) < 0.12  # one draw for all four gives 0.5
    changed = ~same[:, 0] & ~same[:, 1]
    assert not torch.isclose(found[changed, 0], found[changed, 1], atol=1e-3).flatten(1).all(1).any()


# Appearance


@pytest.mark.parametrize("preset", [MILD, STRONG], ids=["mild", "strong"])
def test_the_colours_of_pictures_vary_within_the_presets_range(preset):
    red = torch.tensor([0.7, 0.4, 0.4]).view(1, 3, 1, 1).expand(600, 3, 4, 4)
    names = ("colour_probability", "hue", "saturation")
    only = replace(UNCHANGED, **{name: getattr(preset, name) for name in names})
    found = random_appearance(red.clone(), only, rng=rng(), colour=True)
    turned = hue(found)[:, 0, 0].abs() / (2 * math.pi)
    changed = ~torch.isclose(found, red).flatten(1).all(1)
    assert float(changed.float().mean()) == pytest.approx(preset.colour_probability, abs=0.07)
    assert 0.8 * preset.hue < float(turned.max()) <= preset.hue + 1e-4
    factor = (saturation(found) / saturation(red))[:, 0, 0, 0]
    assert preset.saturation[0] - 1e-4 <= float(factor.min()) < 1 < float(factor.max()) <= preset.saturation[1] + 1e-4
    assert torch.equal(random_appearance(red.clone(), only, rng=rng()), red)  # sequences of MRI have no hue


def test_strong_appearance_and_random_contrast_have_the_same_colours():
    assert (STRONG.hue, STRONG.saturation) == (HUE, SATURATION)


def test_a_bias_field_and_a_gamma_belong_to_a_sequence_or_to_a_whole_picture():
    windows = 0.3 + 0.4 * noise(16, 1, 12, 12).repeat(1, 3, 1, 1)
    for change in ({"bias_probability": 1.0, "bias": 0.5}, {"gamma_probability": 1.0, "gamma": (0.5, 2.0)}):
        variation = replace(UNCHANGED, **change)
        together = random_appearance(windows.clone(), variation, rng=rng(), colour=True)
        torch.testing.assert_close(together[:, :1].expand(-1, 3, -1, -1), together)
        apart = random_appearance(windows.clone(), variation, rng=rng())
        assert float((apart[:, 0] - apart[:, 1]).abs().amax((1, 2)).min()) > 1e-3


def test_blur_and_resolution_are_shared_and_noise_is_not():
    windows = noise(16, 1, 16, 16).repeat(1, 3, 1, 1)
    for change in (
        {"blur_probability": 1.0, "blur": (0.3, 1.3)},
        {"resolution_probability": 1.0, "resolution": (0.4, 0.9)},
    ):
        found = random_appearance(windows.clone(), replace(UNCHANGED, **change), rng=rng())
        assert not torch.allclose(found, windows, atol=1e-2)
        torch.testing.assert_close(found[:, :1].expand(-1, 3, -1, -1), found)
    still = replace(UNCHANGED, noise_probability=1.0, noise=0.1, rician=1.0)
    noisy = random_appearance(windows.clone(), still, rng=rng(), colour=True) - windows
    for window in noisy:
        assert abs(float(torch.corrcoef(window.flatten(1))[0, 1])) < 0.3
    assert abs(float(noisy.mean())) < 1e-3  # no Rician noise, which would brighten, in pictures


@pytest.mark.parametrize(("channels", "colour"), [(4, False), (3, True)])
def test_windows_are_standardised_by_channel_or_as_a_whole_picture(channels, colour):
    scales = torch.arange(1.0, channels + 1).view(1, -1, 1, 1, 1)
    windows = noise(5, channels, 2, 8, 8) * scales + scales
    found = standardised(windows, colour=colour)
    if colour:
        expected = torch.stack([(window - window.mean()) / window.std() for window in windows])
        torch.testing.assert_close(found, expected)
        assert (found[:, 2].mean((1, 2, 3)) > found[:, 0].mean((1, 2, 3)) + 0.5).all()
    else:
        torch.testing.assert_close(found.mean((2, 3, 4)), torch.zeros(5, channels), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.flatten(2).std(2), torch.ones(5, channels))


@pytest.mark.parametrize(("channels", "colour"), [(4, False), (3, True)])
def test_whole_slices_vary_in_all_channels_with_their_labels(channels, colour):
    images = torch.full((6, channels, 16, 16), -1.0)
    images[:, :, 4:12, 4:12] = noise(6, channels, 8, 8) * 1.5 - 0.5
    labels = (images[:, :1] > -1).long()
    augmentation = Augmentation(appearance=STRONG, contrast=ContrastMix(), colour=colour)
    shown, found = augmented_slices(images, labels, augmentation, rng=rng())
    assert shown.shape == images.shape and found.shape == labels.shape
    restyled = restyled_slices(images, augmentation, rng=rng())
    assert restyled.shape == images.shape and restyled.isfinite().all()
    assert not torch.allclose(restyled, images, atol=0.1)
    plain, _ = augmented_slices(images, labels, Augmentation(appearance=UNCHANGED), rng=rng(4))
    alone, _ = augmented_slices(images[:, 2:3], labels, Augmentation(appearance=UNCHANGED), rng=rng(4))
    torch.testing.assert_close(plain[:, 2:3], alone)  # every channel is moved alike


# Plans and networks


def test_plans_have_the_channels_of_the_data_and_old_plans_one():
    facts = data_facts([four_sequences()])
    assert (facts.channels, facts.colour) == (4, False)
    plan = plan_training(replace(facts, channels=3, colour=True), SegmenterConfig())
    assert (plan.channels, plan.colour) == (3, True)
    assert TrainingPlan.from_dict(plan.to_dict()) == plan
    old = {name: value for name, value in PLAN.to_dict().items() if name not in ("channels", "colour")}
    assert TrainingPlan.from_dict(old) == PLAN
    assert Augmentation.of(SegmenterConfig(), plan).colour and not Augmentation.of(SegmenterConfig(), PLAN).colour


@pytest.mark.parametrize(
    ("change", "message"),
    [({"channels": 0}, "channels is 0; it must be from 1 to 8"), ({"channels": 9}, "channels is 9"),
     ({"channels": 4, "colour": True}, "colour is True and channels is 4")],
)  # fmt: skip
def test_an_impossible_number_of_channels_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(PLAN, **change)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_takes_several_channels(network):
    deep = network.endswith("3d")
    halved = network == "segresnet3d"
    strides = {"slices": 8, "slice_strides": (1, 2, 2) if halved else (1, 1, 2)} if deep else {}
    plan = TrainingPlan(
        network=network,
        window=16,
        widths=(8, 16, 32),
        fold=2,
        classes=3,
        batch_size=1,
        updates=1,
        channels=4,
        **strides,
    )
    made = PlannedNetwork(plan).eval()
    windows = noise(2, 4, *([8] if deep else []), 16, 16)
    with torch.no_grad():
        found = made(windows)
        assert found.shape == (2, 3, *windows.shape[2:])
        for channel in range(4):
            changed = windows.clone()
            changed[:, channel] += noise(*changed[:, channel].shape, seed=1)
            assert not torch.allclose(made(changed), found, atol=1e-5)


# Windows


def test_stacks_hold_the_same_neighbouring_slices_in_every_channel():
    images = np.random.default_rng(0).uniform(0, 1, (20, 1, 16, 16)).astype(np.float32)
    both = np.concatenate([images, -images], 1)
    labels = np.broadcast_to(np.arange(1, 21, dtype=np.uint8)[:, None, None], (20, 16, 16))
    data = LabelledSlices(both, labels, 21, np.zeros(20))
    plan = replace(STACKS, channels=2, classes=21)
    windows, found = WindowSampler(data, plan, Augmentation(windows=STILL, appearance=UNCHANGED)).batch(6, rng=rng())
    assert windows.shape == (6, 2, 8, 16, 16) and found.shape == (6, 1, 8, 16, 16)
    inside = found[:, 0] > 0
    for window, mask in zip(windows, inside, strict=True):
        first, second = (channel[mask] for channel in window)
        assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) < -0.99


class LastIsBright(nn.Module):
    """Class 1 where the last of several channels is brighter than its mean by a deviation."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        last = windows[:, -1:]
        return torch.cat([torch.zeros_like(last), 20 * (last - 1)], 1)


@pytest.mark.parametrize("plan", [PLAN, STACKS], ids=["2-D", "3-D"])
def test_windows_are_placed_by_what_any_channel_shows(plan):
    plan = replace(plan, channels=4, classes=2)
    images = noise(9, 4, 40, 40)
    images[:, 3] = 0
    images[:, 3, 22:32, 10:18] = 1
    found = window_probabilities(LastIsBright(), images, plan)
    assert found.shape == (9, 2, 40, 40)
    assert torch.equal(found.argmax(1) == 1, images[:, 3] == 1)


# Segmenters


def test_slices_with_other_channels_than_the_segmenters_are_refused(tmp_path):
    made = untrained_segmenter(channels=4)
    assert made.probabilities(torch.zeros(2, 4, 16, 16)).shape == (2, 3, 16, 16)
    for shape in ((2, 3, 16, 16), (2, 1, 16, 16), (4, 16, 16)):
        for call in (made.probabilities, made.agreement):
            with pytest.raises(UsageError, match=r"images has shape .*; it must be \(slices, 4, rows, columns\)"):
                call(torch.zeros(*shape))
    made.save(tmp_path / "m.safetensors")
    assert Segmenter.load(tmp_path / "m.safetensors").card.channels == 4
    values = made.to_dict()
    values["format"] = {**values["format"], "window": [[-1.0, 2.0]]}
    with pytest.raises(ConfigError, match="channels is 4, but 1 in the slice format"):
        Segmenter.from_dict(values)


def test_slices_that_do_not_fit_to_their_format_are_not_trained_on():
    with pytest.raises(UsageError, match=r"slices have 4 channel\(s\); they must have 3"):
        plan_segmenter(SegmenterData(labelled=four_sequences()), COLOUR, small_config())


@pytest.mark.parametrize("network", ["dynunet", "unet3d"])
def test_a_segmenter_of_four_sequences_is_trained_and_goes_on_from_one_of_equal_channels(network):
    data = four_sequences()
    config = small_config(network=network, updates=2, batch_size=2)
    (made,) = train_segmenters(SegmenterData(labelled=data), FOUR, config, title="four")
    assert made.card.plan.channels == 4 and not made.card.plan.colour
    found = made.probabilities(torch.from_numpy(data.images), data.volume, views=2)
    torch.testing.assert_close(found.sum(1), torch.ones(12, 32, 32))
    further = plan_segmenter(SegmenterData(labelled=data, start=made), FOUR, config)
    assert further.learning_rate < made.card.plan.learning_rate
    grey = SegmenterData(labelled=LabelledSlices(data.images[:, 3], data.labels, 3, data.volume), start=made)
    fresh = plan_segmenter(grey, replace(FOUR, window=(-1.0, 1.0)), config)
    assert fresh.channels == 1 and fresh.learning_rate == made.card.plan.learning_rate


@pytest.mark.parametrize("contrast", ["own", "random"])
def test_a_class_that_only_its_hue_tells_is_learnt(contrast):
    config = SegmenterConfig(width=8, network_size="small", updates=60, batch_size=8, learning_rate=1e-2, depth=3)
    config = replace(config, whole_slices=True)
    if contrast == "random":
        config = first_guess_config(config, colour=True)
        assert config.contrast.inverted == 0 < first_guess_config(SegmenterConfig()).contrast.inverted
    (made,) = train_segmenters(SegmenterData(labelled=coloured_squares(48)), COLOUR, config, title="colours")
    assert made.card.plan.colour
    shown = coloured_squares(16, seed=1)
    truth = torch.from_numpy(shown.labels.astype(np.int64))
    found = made.probabilities(torch.from_numpy(shown.images), np.arange(16)).argmax(1)
    assert foreground_dice(found, truth, 3) > 0.8
    grey = shown.images.mean(1, keepdims=True).repeat(3, 1)
    blind = made.probabilities(torch.from_numpy(grey), np.arange(16)).argmax(1)
    assert foreground_dice(blind, truth, 3) < 0.6


def test_explained_variance_is_that_of_all_channels():
    """Squares that one of two channels shows are explained half, if the other is noise of equal variance."""

    class FirstIsBright(nn.Module):
        def forward(self, windows: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.full_like(windows[:, 0], -9), -20 * windows[:, 0], 20 * windows[:, 0]], 1)

    made = untrained_segmenter(channels=2)
    made.network = FirstIsBright()
    signs = torch.where(noise(4, 1, 16, 16) < 0.5, -0.5, 0.5)
    other = torch.where(noise(4, 1, 16, 16, seed=1) < 0.5, -0.5, 0.5)
    share = explained_intensity(torch.cat([signs, other], 1).numpy(), made)
    assert share == pytest.approx(0.5, abs=0.02)
    assert explained_intensity(torch.cat([signs, signs], 1).numpy(), made) == pytest.approx(1.0)
