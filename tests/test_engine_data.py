"""Random windows of labelled slices: position and shape, contrast, appearance, which slices they show."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.augmentation import Augmentation, augmented_slices, restyled_slices
from fedfactory.adaptation.engine.labelled_volumes import data_facts, structure_centres
from fedfactory.adaptation.engine.random_appearance import (
    MILD,
    STRONG,
    UNCHANGED,
    blurred,
    random_appearance,
    standardised,
    with_gamma,
    with_resolution,
)
from fedfactory.adaptation.engine.random_contrast import (
    CURVE_POINTS,
    apply_curves,
    random_contrast,
    random_curves,
    random_network,
)
from fedfactory.adaptation.engine.random_windows import WindowVariation, draw_centres, random_windows
from fedfactory.adaptation.engine.segmenter_config import ContrastMix, SegmenterConfig
from fedfactory.adaptation.engine.training_plan import DataFacts, TrainingPlan
from fedfactory.adaptation.engine.window_inference import turn
from fedfactory.adaptation.engine.window_sampler import WindowSampler
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.errors import ConfigError, UsageError
from helpers import squares
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

STILL = WindowVariation(rotation=0.0, mirror=False, scale=(1.0, 1.0), elastic=0.0, shift_share=0.0, anywhere=0.0)
AS_IT_IS = Augmentation(windows=STILL, appearance=UNCHANGED)
PLAN = TrainingPlan(window=16, widths=(4, 8, 8), fold=1, classes=3, batch_size=4, updates=1)
STACKS = replace(PLAN, network="unet3d", slices=8)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# What a plan needs to know


def test_facts_of_data_are_those_of_the_labels():
    labels = np.zeros((4, 40, 40), np.uint8)
    labels[0, 5:15, 8:10] = 1  # the structures of a volume, over all its slices, are 10 x 22 pixels
    labels[1, 5:9, 20:30] = 2
    data = LabelledSlices(np.zeros(labels.shape, np.float32), labels, 3, np.array([0, 0, 1, 1]))
    assert data_facts([data], anisotropy=2.5) == DataFacts(size=40, extent=22, classes=3, anisotropy=2.5)
    single = LabelledSlices(data.images, labels, 3)
    assert data_facts([single]).extent == 10  # without known volumes, every slice is one
    larger = LabelledSlices(data.images, np.ones_like(labels), 3, data.volume)
    assert data_facts([data, larger]).extent == 40  # of all that is trained on together
    assert data_facts([LabelledSlices(data.images, np.zeros_like(labels), 3)]).extent is None
    centres = structure_centres(data)
    np.testing.assert_allclose(centres[2:], 19.5)  # nothing is labelled there: the middle
    places = np.nonzero(labels[:2].any(0))
    np.testing.assert_allclose(centres[:2], [[places[0].mean(), places[1].mean()]] * 2, rtol=1e-6)


# Windows


@pytest.mark.parametrize("depth", [1, 3])
def test_a_still_window_is_a_crop(depth):
    images = torch.rand(2, depth, 20, 20, generator=rng())
    labels = torch.randint(0, 4, (2, depth, 20, 20), generator=rng())
    centres = torch.tensor([[9.5, 9.5], [7.5, 11.5]])
    shown, found = random_windows(images, labels, centres, window=8, variation=STILL, rng=rng())
    for part, rows, columns in ((0, slice(6, 14), slice(6, 14)), (1, slice(4, 12), slice(8, 16))):
        torch.testing.assert_close(shown[part], images[part, :, rows, columns])
        assert torch.equal(found[part], labels[part, :, rows, columns])


def test_outside_of_a_slice_there_is_background():
    ones, corner = torch.ones(1, 1, 8, 8), torch.tensor([[0.0, 0.0]])
    for values in random_windows(ones, ones, corner, window=8, variation=STILL, rng=rng()):
        assert float(values[0, 0, 0, 0]) == 0 and float(values[0, 0, -1, -1]) == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_labels_move_with_their_images(seed):
    labels = torch.zeros(1, 2, 40, 40)
    labels[0, 0, 14:26, 17:30] = 1
    labels[0, 1, 18:30, 12:20] = 1
    variation, centre = WindowVariation(elastic=1.0), torch.tensor([[20.0, 23.0]])
    shown, found = random_windows(labels, labels, centre, window=32, variation=variation, rng=rng(seed))
    agree = (shown > 0.5) == (found > 0)
    assert float(agree.float().mean()) > 0.98  # they differ by interpolation at edges alone


def test_magnification_and_rotation_are_as_drawn():
    """Area grows with the square of the magnification, whatever the rotation."""
    labels = torch.zeros(64, 1, 64, 64)
    labels[..., 24:40, 24:40] = 1
    centres = torch.full((64, 2), 31.5)
    variation = replace(STILL, rotation=math.pi, scale=(1.5, 1.5), mirror=True)
    _, found = random_windows(labels, labels, centres, window=64, variation=variation, rng=rng())
    assert float(found.sum((1, 2, 3)).float().mean()) == pytest.approx((16 * 1.5) ** 2, rel=0.02)
    assert len({tuple(map(int, window.flatten())) for window in found}) > 32  # each has its own rotation


def test_a_random_mirroring_gives_the_mirrored_view_of_inference():
    images = torch.rand(1, 1, 16, 16, generator=rng()).repeat(32, 1, 1, 1)
    centres = torch.full((32, 2), 7.5)
    variation = replace(STILL, mirror=True)
    shown, _ = random_windows(images, images, centres, window=16, variation=variation, rng=rng())
    mirrored = [torch.allclose(window, image, atol=1e-5) for window, image in zip(shown, turn(images, 4), strict=True)]
    plain = [torch.allclose(window, image, atol=1e-5) for window, image in zip(shown, images, strict=True)]
    assert [not value for value in plain] == mirrored and 8 < sum(mirrored) < 24


def test_centres_are_near_the_structures_or_anywhere():
    known, variation = torch.full((4000, 2), 30.0), WindowVariation(shift_share=0.1, anywhere=0.25)
    drawn = draw_centres(known, 100, window=50, variation=variation, rng=rng())
    far = ((drawn - known).abs() > 5.0).any(1)
    assert 0.2 < float(far.float().mean()) < 0.27
    assert float(drawn.min()) >= 20 and float(drawn.max()) <= 80


@pytest.mark.parametrize(
    ("change", "message"), [({"elastic": 1.5}, "elastic is 1.5"), ({"scale": (1.4, 0.7)}, r"scale is \(1.4, 0.7\)")]
)
def test_an_impossible_variation_of_windows_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(STILL, **change)


# Contrast


def test_curves_are_rising_falling_or_bent():
    curves = random_curves(400, rng=rng())
    assert curves.shape == (400, CURVE_POINTS) and float(curves.min()) >= 0 and float(curves.max()) <= 1
    slopes = curves.diff(dim=1)
    rising, falling = (slopes >= -1e-6).all(1), (slopes <= 1e-6).all(1)
    for share, expected in ((rising, 0.3), (falling, 0.3), (~rising & ~falling, 0.4)):
        assert float(share.float().mean()) == pytest.approx(expected, abs=0.07)


def test_a_curve_is_applied_to_its_own_window():
    windows = torch.rand(2, 1, 6, 6, generator=rng())
    identity = torch.linspace(0, 1, CURVE_POINTS)
    found = apply_curves(windows, torch.stack([identity, 1 - identity]))
    torch.testing.assert_close(found[0], windows[0], atol=1 / CURVE_POINTS, rtol=0)
    torch.testing.assert_close(found[1], 1 - windows[1], atol=1 / CURVE_POINTS, rtol=0)


def test_a_random_network_keeps_the_energy_and_gives_each_window_its_own():
    windows = torch.rand(1, 1, 16, 16, generator=rng()).repeat(4, 1, 1, 1)
    found = random_network(windows, rng=rng())
    torch.testing.assert_close(found.flatten(1).norm(dim=1), windows.flatten(1).norm(dim=1))
    assert not torch.allclose(found[0], found[1], atol=1e-2)


def test_contrast_shares_are_kept():
    windows = torch.rand(2000, 1, 8, 8, generator=rng()) * 0.9 + 0.1
    found = random_contrast(windows, ContrastMix(unchanged=0.4, curves=0.6), rng=rng())
    same = torch.isclose(found, windows).flatten(1).all(1) | torch.isclose(found, 1.05 - windows).flatten(1).all(1)
    assert float(same.float().mean()) == pytest.approx(0.4, abs=0.04)


def test_contrast_is_the_same_in_all_slices_of_a_stack_and_air_stays_dark():
    windows = torch.rand(64, 1, 1, 8, 8, generator=rng()).repeat(1, 1, 3, 1, 1)
    found = random_contrast(windows, ContrastMix(), rng=rng())
    torch.testing.assert_close(found[:, :, :1].expand(-1, -1, 3, -1, -1), found)
    windows[..., :4, :] = 0
    inverted = random_contrast(windows, ContrastMix(unchanged=1.0, curves=0.0, inverted=1.0), rng=rng())
    assert not inverted[..., :4, :].any()
    bright = windows > 0.1
    torch.testing.assert_close(inverted[bright], 1.05 - windows[bright])


# Appearance


def test_a_blur_equals_scipys():
    windows = torch.rand(2, 1, 24, 24, generator=rng(), dtype=torch.float64)
    found = blurred(windows, torch.tensor([0.5, 1.0], dtype=torch.float64))
    for window, result, deviation in zip(windows[:, 0].numpy(), found[:, 0].numpy(), (0.5, 1.0), strict=True):
        expected = gaussian_filter(window, deviation, mode="nearest", truncate=4 / deviation)
        np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_gamma_leaves_the_ends_of_each_window():
    windows = torch.rand(3, 1, 12, 12, generator=rng()) * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1, 1) - 0.3
    found = with_gamma(windows, torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1, 1))
    for reduce in (torch.amin, torch.amax):
        torch.testing.assert_close(reduce(found, (1, 2, 3)), reduce(windows, (1, 2, 3)))
    torch.testing.assert_close(found[1], windows[1])
    assert (found[0] >= windows[0] - 1e-6).all() and (found[2] <= windows[2] + 1e-6).all()


def test_a_lower_resolution_leaves_the_mean_and_less_detail():
    windows = torch.rand(1, 1, 32, 32, generator=rng())
    coarse = with_resolution(windows, 0.5)
    assert coarse.shape == windows.shape and float(coarse.mean()) == pytest.approx(float(windows.mean()), abs=0.01)
    assert float(coarse.std()) < 0.6 * float(windows.std())


@pytest.mark.parametrize("variation", [MILD, STRONG])
def test_appearance_repeats_with_its_seed_and_stays_finite(variation):
    windows = torch.rand(16, 1, 16, 16, generator=rng())
    first, second, other = (random_appearance(windows.clone(), variation, rng=rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other) and first.isfinite().all()
    flat = standardised(first).flatten(1)
    torch.testing.assert_close(flat.mean(1), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(flat.std(1), torch.ones(16))


def test_rician_noise_brightens_air_as_much_as_its_distribution_says():
    still = {"noise_probability": 1.0, "noise": 0.1}
    air = torch.zeros(4000, 1, 8, 8)
    gaussian, rician = (
        random_appearance(air, replace(UNCHANGED, rician=share, **still), rng=rng()) for share in (0.0, 1.0)
    )
    # Without a signal it is Rayleigh's distribution; deviations are drawn uniformly from 0 to 0.1.
    assert float(gaussian.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(rician.min()) >= 0
    assert float(rician.mean()) == pytest.approx(0.05 * math.sqrt(math.pi / 2), rel=0.03)


def test_a_varied_slice_keeps_its_background_dark_and_its_labels_whole():
    images = torch.full((8, 1, 16, 16), -1.0)
    images[:, :, 4:12, 4:12] = torch.rand(8, 1, 8, 8, generator=rng()) * 1.5 - 0.5
    labels = (images > -1).long()
    shown, found = augmented_slices(images, labels, Augmentation(), rng=rng())
    assert set(found.unique().tolist()) == {0, 1}
    assert float(shown[found == 0].median()) < -0.9 and float(shown[found == 1].mean()) > -0.5
    assert not torch.allclose(shown, images, atol=0.1)
    restyled = restyled_slices(images, Augmentation(appearance=STRONG), rng=rng())
    for values in (shown, restyled):
        assert values.shape == images.shape and float(values.min()) >= -1 and float(values.max()) <= 1
    assert float(restyled[labels == 0].median()) < -0.85  # at the same place
    assert not torch.allclose(restyled, images, atol=0.1)


def test_the_variation_of_a_training_is_that_of_its_configuration_and_plan():
    config = SegmenterConfig(appearance="strong", contrast=ContrastMix())
    made = Augmentation.of(config, replace(PLAN, rotation=0.2, mirror=False))
    assert (made.windows.rotation, made.windows.mirror) == (0.2, False)
    assert (made.appearance, made.contrast) == (STRONG, ContrastMix())
    assert Augmentation.of(SegmenterConfig(), PLAN) == Augmentation(appearance=MILD, contrast=None)


# Which slices


def numbered(sizes: tuple[int, ...]) -> LabelledSlices:
    """Volumes of these numbers of slices of noise; the label of every pixel is the slice's number, from 1."""
    count = sum(sizes)
    images = np.random.default_rng(0).uniform(0, 1, (count, 16, 16)).astype(np.float32)
    labels = np.broadcast_to(np.arange(1, count + 1, dtype=np.uint8)[:, None, None], images.shape)
    return LabelledSlices(images, labels, count + 1, np.repeat(np.arange(len(sizes)), sizes))


def test_stacks_are_neighbouring_slices_of_one_volume_and_empty_beyond_its_ends():
    data = numbered((20, 3))
    sampler = WindowSampler(data, STACKS, AS_IT_IS)
    seen: set[int] = set()
    for seed in range(12):
        windows, labels = sampler.batch(6, rng=rng(seed))
        assert windows.shape == labels.shape == (6, 1, 8, 16, 16)
        torch.testing.assert_close(windows.mean((1, 2, 3, 4)), torch.zeros(6), atol=1e-5, rtol=0)
        for window, numbers in zip(windows[:, 0], labels[:, 0, :, 0, 0], strict=True):
            real = numbers[numbers > 0]
            assert set(real.diff().tolist()) == {1}
            assert (real <= 20).all() if len(real) == 8 else real.tolist() == [21, 22, 23]
            assert (window[len(real) :] == window.min()).all()  # air, as slices have none darker
            assert window[: len(real)].std((1, 2)).min() > 0.1
            seen |= set(real.tolist())
    assert seen == set(range(1, 24))


def test_stacks_need_to_know_which_slices_form_a_volume():
    data = numbered((20,))
    with pytest.raises(UsageError, match="volume is None for these slices; a 3-D network needs their volumes"):
        WindowSampler(LabelledSlices(data.images, data.labels, data.classes), STACKS, AS_IT_IS)


def test_rare_classes_are_drawn_as_often_as_others():
    images, labels = squares(40)
    labels[labels == 2] = 1
    labels[0, 10:14, 10:14] = 2
    sampler = WindowSampler(LabelledSlices(images, labels, 3), replace(PLAN, window=32), AS_IT_IS)
    drawn = [sampler.draw_slices(12, rng=rng(seed)) for seed in range(50)]
    with_rare = torch.stack([(chosen == 0).sum() for chosen in drawn]).float().mean()
    assert 1.8 < float(with_rare) < 2.7  # half of the first third, and .2 of the other eight; .3 of 12 without the rule
    unlabelled = WindowSampler(LabelledSlices(images, np.zeros_like(labels), 3), PLAN, AS_IT_IS)
    assert len(set(torch.cat([unlabelled.draw_slices(12, rng=rng(seed)) for seed in range(50)]).tolist())) == 40


def test_windows_show_structures_in_their_middle_and_whole_slices_as_they_are():
    labels = np.zeros((2, 32, 32), np.uint8)
    labels[:, 4:10, 18:26] = 1
    images = (2 * labels - 1).astype(np.float32)
    data = LabelledSlices(images, labels, 2, np.zeros(2))
    _, found = WindowSampler(data, PLAN, AS_IT_IS).batch(4, rng=rng())
    assert (found[:, 0, 5:11, 4:12] == 1).all() and int(found.sum()) == 4 * 6 * 8
    windows, found = WindowSampler(data, replace(PLAN, window=32), AS_IT_IS).batch(4, rng=rng())
    assert torch.equal(found, torch.from_numpy(labels[[0] * 4, None].astype(np.int64)))
    torch.testing.assert_close(windows, standardised(torch.from_numpy(images[[0] * 4, None])), atol=1e-4, rtol=1e-4)
