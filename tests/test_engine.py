"""The segmentation engine: its plans, random windows, contrast and appearance, training, and inference by windows."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.random_appearance import (
    MILD,
    STRONG,
    blurred,
    random_appearance,
    standardised,
    with_gamma,
    with_resolution,
)
from fedfactory.adaptation.engine.random_contrast import (
    CURVE_POINTS,
    ContrastMix,
    apply_curves,
    random_contrast,
    random_curves,
    random_network,
)
from fedfactory.adaptation.engine.random_windows import WindowVariation, draw_centres, random_windows
from fedfactory.adaptation.engine.training_loop import LoopConfig, train
from fedfactory.adaptation.engine.training_plan import DataFacts, TrainingPlan, plan_training
from fedfactory.adaptation.engine.window_inference import averaged_views, volume_probabilities
from fedfactory.adaptation.engine.window_training import (
    Augmentation,
    WindowTrainer,
    data_facts,
    structure_centres,
)
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.errors import ConfigError
from helpers import squares
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torch import nn

STILL = WindowVariation(rotation=0.0, mirror=False, scale=(1.0, 1.0), elastic=0.0, shift_pixels=0.0, anywhere=0.0)
SMALL_PLAN = TrainingPlan(
    window=32, widths=(8, 16, 16), fold=1, classes=3, batch_size=8, updates=60, learning_rate=1e-2
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def volumes(count: int = 12, seed: int = 0) -> LabelledSlices:
    images, labels = squares(count, seed)
    return LabelledSlices(images, labels, 3, np.repeat(np.arange(count // 3), 3))


# Plans


@settings(deadline=None)
@given(size=st.integers(8, 640), extent=st.none() | st.integers(1, 640), name=st.sampled_from(["small", "large"]))
def test_a_plan_fits_its_data(size, extent, name):
    plan = plan_training(DataFacts(size=size, extent=extent, classes=4), network_size=name)
    assert plan.window % plan.side_multiple == 0
    assert plan.window < size + plan.side_multiple
    if extent is not None and 1.5 * extent <= size:
        assert plan.window >= 1.5 * extent
    assert list(plan.widths) == sorted(plan.widths) and max(plan.widths) <= 320
    assert 2 <= plan.batch_size <= 32
    assert plan.window // plan.side_multiple >= 2  # the deepest level still is a map


def test_the_network_grows_with_its_window():
    heart = plan_training(DataFacts(size=144, extent=53, classes=4))
    assert (heart.window, heart.widths, heart.fold) == (80, (24, 48, 96, 96), 2)
    paper = plan_training(DataFacts(size=512, extent=None, classes=4))
    assert (paper.window, len(paper.widths), paper.batch_size) == (512, 6, 2)
    assert max(paper.widths) == 320
    tiny = plan_training(DataFacts(size=32, extent=None, classes=3))
    assert (tiny.window, tiny.fold) == (32, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 33}, "window is 33"),
        ({"widths": (8,)}, "widths has 1"),
        ({"fold": 3}, "fold is 3"),
        ({"updates": 0}, "updates is 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"precision": "float16"}, "precision is 'float16'"),
    ],
)
def test_an_impossible_plan_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        replace(SMALL_PLAN, **change)


@pytest.mark.parametrize("fold", [1, 2])
def test_a_planned_network_gives_logits_of_its_windows(fold):
    plan = replace(SMALL_PLAN, fold=fold)
    assert PlannedNetwork(plan)(torch.zeros(2, 1, 48, 48)).shape == (2, 3, 48, 48)


def test_facts_of_data_are_those_of_the_labels():
    labels = np.zeros((4, 40, 40), np.uint8)
    labels[0, 5:15, 8:10] = 1  # the structures of a volume, over all its slices, are 10 x 22 pixels
    labels[1, 5:9, 20:30] = 2
    data = LabelledSlices(np.zeros(labels.shape, np.float32), labels, 3, np.array([0, 0, 1, 1]))
    assert data_facts(data) == DataFacts(size=40, extent=22, classes=3)
    centres = structure_centres(data)
    np.testing.assert_allclose(centres[2:], 19.5)  # nothing is labelled there: the middle
    places = np.nonzero(labels[:2].any(0))
    np.testing.assert_allclose(centres[0], [places[0].mean(), places[1].mean()], rtol=1e-6)


# Windows


def test_a_still_window_is_a_crop():
    images = torch.rand(2, 1, 20, 20, generator=rng())
    labels = torch.randint(0, 4, (2, 20, 20), generator=rng())
    centres = torch.tensor([[9.5, 9.5], [7.5, 11.5]])
    shown, found = random_windows(images, labels, centres, window=8, variation=STILL, rng=rng())
    torch.testing.assert_close(shown[0, 0], images[0, 0, 6:14, 6:14])
    torch.testing.assert_close(shown[1, 0], images[1, 0, 4:12, 8:16])
    assert torch.equal(found[0], labels[0, 6:14, 6:14]) and torch.equal(found[1], labels[1, 4:12, 8:16])


def test_outside_of_a_slice_there_is_background():
    shown, found = random_windows(
        torch.ones(1, 1, 8, 8), torch.ones(1, 8, 8), torch.tensor([[0.0, 0.0]]), window=8, variation=STILL, rng=rng()
    )
    assert float(shown[0, 0, 0, 0]) == 0 and int(found[0, 0, 0]) == 0
    assert float(shown[0, 0, -1, -1]) == 1 and int(found[0, -1, -1]) == 1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_labels_move_with_their_images(seed):
    labels = torch.zeros(1, 40, 40)
    labels[0, 14:26, 17:30] = 1
    variation = WindowVariation(elastic=1.0)
    shown, found = random_windows(
        labels[:, None], labels, torch.tensor([[20.0, 23.0]]), window=32, variation=variation, rng=rng(seed)
    )
    agree = (shown[:, 0] > 0.5) == (found > 0)
    assert float(agree.float().mean()) > 0.98  # they differ by interpolation at edges alone


def test_magnification_and_rotation_are_as_drawn():
    """Area grows with the square of the magnification, whatever the rotation."""
    labels = torch.zeros(64, 64, 64)
    labels[:, 24:40, 24:40] = 1
    centres = torch.full((64, 2), 31.5)
    variation = replace(STILL, rotation=math.pi, scale=(1.5, 1.5), mirror=True)
    _, found = random_windows(labels[:, None], labels, centres, window=64, variation=variation, rng=rng())
    area = found.sum((1, 2)).float()
    assert float(area.mean()) == pytest.approx((16 * 1.5) ** 2, rel=0.02)
    assert len({tuple(map(int, window.flatten())) for window in found}) > 32  # each has its own rotation


def test_centres_are_near_the_structures_or_anywhere():
    known = torch.full((4000, 2), 30.0)
    drawn = draw_centres(known, 100, WindowVariation(shift_pixels=5.0, anywhere=0.25), rng=rng())
    far = ((drawn - known).abs() > 5.0).any(1)
    assert 0.2 < float(far.float().mean()) < 0.27
    assert float(drawn.min()) >= 20 and float(drawn.max()) <= 80


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
    with pytest.raises(ConfigError, match="sum must be at most 1"):
        ContrastMix(unchanged=0.6, curves=0.6)


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


# Training


def test_a_segmenter_learns_and_repeats_with_its_seed():
    states = []
    for _ in range(2):
        trainer = WindowTrainer(volumes(), SMALL_PLAN, Augmentation(), validation=volumes(seed=7))
        (best,) = train(trainer, SMALL_PLAN.updates, LoopConfig(evaluations=1), title="squares", seed=0)
        states.append(best)
    assert states[0].score > 0.8
    assert all(torch.equal(states[0].weights[name], states[1].weights[name]) for name in states[0].weights)


def test_an_interrupted_training_ends_where_an_undisturbed_one_does(tmp_path):
    def trainer() -> WindowTrainer:
        return WindowTrainer(volumes(), replace(SMALL_PLAN, updates=8), Augmentation(contrast=ContrastMix()))

    (whole,) = train(trainer(), 8, LoopConfig(evaluations=2), title="whole", seed=0)
    broken = trainer()
    original, broken.update = broken.update, lambda number: _stop() if number == 5 else original(number)
    with pytest.raises(KeyboardInterrupt):
        train(broken, 8, LoopConfig(evaluations=2, folder=tmp_path), title="broken", seed=0)
    (resumed,) = train(trainer(), 8, LoopConfig(evaluations=2, folder=tmp_path), title="resumed", seed=0)
    for name, weights in whole.weights.items():
        torch.testing.assert_close(resumed.weights[name], weights)


def _stop() -> dict[str, float]:
    raise KeyboardInterrupt


def test_rare_classes_are_drawn_as_often_as_others():
    images, labels = squares(40)
    labels[labels == 2] = 1
    labels[0, 10:14, 10:14] = 2
    trainer = WindowTrainer(
        LabelledSlices(images, labels, 3), replace(SMALL_PLAN, batch_size=12), Augmentation(windows=STILL)
    )
    with_rare = [(trainer.batch(number)[1] == 2).any((1, 2)).sum() for number in range(30)]
    assert float(torch.stack(with_rare).float().mean()) > 1.5  # uniform draws would give .3 of 12


# Inference


class BrightIsOne(nn.Module):
    """Class 1 where a window is brighter than its mean by a deviation."""

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros_like(windows), 20 * (windows - 1)], 1)


def test_the_second_window_is_centred_on_what_the_first_found():
    images = torch.zeros(2, 1, 60, 60)
    images[:, 0, 34:46, 20:30] = 1  # half of it lies outside of a window of 24 in the middle
    found = volume_probabilities(BrightIsOne(), images, window=24)
    assert found.shape == (2, 2, 60, 60)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 60, 60))
    assert torch.equal(found.argmax(1) == 1, images[:, 0] == 1)


def test_slices_smaller_than_the_window_are_padded_and_cut_again():
    images = torch.zeros(1, 1, 17, 17)
    images[:, 0, 3:8, 9:14] = 1
    found = volume_probabilities(BrightIsOne(), images, window=24, views=8)
    assert torch.equal(found.argmax(1) == 1, images[:, 0] == 1)


def test_an_empty_volume_is_background():
    found = volume_probabilities(BrightIsOne(), torch.zeros(2, 1, 20, 20), window=16)
    assert int(found.argmax(1).sum()) == 0


def test_views_are_turned_back():
    torch.manual_seed(0)
    network = PlannedNetwork(replace(SMALL_PLAN, widths=(4, 8, 8))).eval()
    windows = torch.rand(1, 1, 16, 16, generator=rng())
    turned = averaged_views(network, torch.rot90(windows, 1, (2, 3)), views=8)
    torch.testing.assert_close(
        torch.rot90(turned, -1, (2, 3)), averaged_views(network, windows, views=8), atol=1e-5, rtol=0
    )
