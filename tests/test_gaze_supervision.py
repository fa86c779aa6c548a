"""Gaze supervision: candidate labels from fixations, against a slow plain mean field; the loss terms; a site's data."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedfactory.adaptation.labels.candidate_labels import SiteSlices, candidates_of_all_structures
from fedfactory.adaptation.labels.fixations import (
    GazeConfig,
    candidates_from_fixations,
    config_for_target_share,
    graded_labels,
    heatmap,
    refine_heatmap,
    simulate_fixations,
)
from fedfactory.adaptation.methods.gaze_supervision import LevelEnsemble, level_masks, masked_entropy, propagate
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.cli import main
from fedfactory.errors import ConfigError, NodeDataError, StoreError, UsageError
from fedfactory.node.site_data.training_slices import site_slices
from fedfactory.node.store.derived.gaze_maps import gaze_candidates, read_gaze
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import fixate, site_round_of, write_site
from hypothesis import given, settings
from hypothesis import strategies as st

CONFIG = MethodConfig(method="gaze", classes=2, size=32, sites=2, rounds=10, updates=2, batch_size=4, width=4)


def disc(side=32, at=(14, 18), radius=6) -> np.ndarray:
    return np.hypot(*(axis - centre for axis, centre in zip(np.indices((side, side)), at, strict=True))) < radius


def test_a_heatmap_peaks_at_the_longest_fixation():
    fixations = np.array([[5, 6, 400], [20, 25, 200], [21, 26, 100.0]])
    heat = heatmap(fixations, (32, 40), 0.05)
    assert heat.shape == (32, 40) and heat.min() == 0 and heat.max() == 1
    assert np.unravel_index(heat.argmax(), heat.shape) == (5, 6)
    outside = heatmap(np.array([[-9, -9, 400], [99, 99, 300], [5, 5, 100.0]]), (32, 40), 0.05)
    assert outside[0, 0] > 0.5 and outside[-1, -1] > 0.3  # moved to the nearest border, not to the other side


def test_one_endless_fixation_does_not_hide_the_others():
    fixations = np.array([[5, 5, 250.0]] * 10 + [[25, 25, 60_000]])
    assert heatmap(fixations, (32, 32), 0.05)[5, 5] > 0.05


@pytest.mark.parametrize("fixations", [[], [[5, 5, 900]] * 2, [[5, 5, 60]] * 4])
def test_too_few_or_too_short_fixations_give_no_heatmap_and_no_labels(fixations):
    rows = np.array(fixations, float).reshape(-1, 3)
    assert heatmap(rows, (16, 16), 0.1) is None
    assert not candidates_from_fixations(rows, np.zeros((16, 16)), GazeConfig()).any()


def plain_mean_field(heat, image, config, steps=10):
    """Mean field over all pairs of pixels, as the formula is written."""
    h = np.clip(heat, 1e-5, 1 - 1e-5).ravel()
    u = np.log(h) - np.log(1 - h)
    position = np.indices(heat.shape).reshape(2, -1).T / (config.spatial_width * max(heat.shape))
    distance = ((position[:, None] - position[None]) ** 2).sum(2)
    channels = image.reshape(-1, heat.size) / config.intensity_width
    distance = distance + np.mean([(grey[:, None] - grey[None]) ** 2 for grey in channels], axis=0)
    kernel = np.exp(-distance / 2)
    norm = 1 / np.sqrt(kernel.sum(1))
    kernel = norm[:, None] * kernel * norm[None]
    q = 1 / (1 + np.exp(-u))
    for _ in range(steps):
        q = 1 / (1 + np.exp(-(u + config.potts_weight * kernel @ (2 * q - 1))))
    return q.reshape(heat.shape)


def test_refinement_equals_mean_field_over_all_pairs_and_landmarks_come_near():
    rng = np.random.default_rng(0)
    mask = disc()
    image = np.where(mask, 0.6, -0.4) + rng.normal(0, 0.02, mask.shape)
    heat = heatmap(simulate_fixations(mask, rng), mask.shape, 0.1)
    exact = GazeConfig(stride=1)
    expected = plain_mean_field(heat, image, exact)
    np.testing.assert_allclose(refine_heatmap(heat, image, exact), expected, atol=1e-9)
    near = refine_heatmap(heat, image, GazeConfig(stride=2))
    assert np.abs(near - expected).mean() < 0.01


def test_refinement_uses_every_channel_and_three_equal_ones_as_one():
    rng = np.random.default_rng(0)
    mask = disc()
    grey = np.where(mask, 0.6, -0.4) + rng.normal(0, 0.02, mask.shape)
    colour = np.stack([rng.normal(0, 0.02, mask.shape), grey, -grey])  # the first channel and the mean show nothing
    fixations = simulate_fixations(mask, rng)
    heat, exact = heatmap(fixations, mask.shape, 0.1), GazeConfig(stride=1)
    np.testing.assert_allclose(refine_heatmap(heat, colour, exact), plain_mean_field(heat, colour, exact), atol=1e-9)
    alone = refine_heatmap(heat, grey, exact)
    np.testing.assert_allclose(refine_heatmap(heat, np.stack([grey] * 3), exact), alone, atol=1e-9)
    np.testing.assert_array_equal(refine_heatmap(heat, grey[None], exact), alone)
    assert candidates_from_fixations(fixations, colour, GazeConfig()).shape == mask.shape
    assert not candidates_from_fixations(fixations[:0], colour, GazeConfig()).any()


def test_refinement_without_strength_changes_nothing():
    heat = np.random.default_rng(0).random((12, 12))
    np.testing.assert_allclose(
        refine_heatmap(heat, heat, GazeConfig(potts_weight=0.0)), np.clip(heat, 1e-5, 1 - 1e-5), atol=1e-9
    )


@given(seed=st.integers(0, 500), refine=st.sampled_from(["crf", "none"]))
@settings(max_examples=15, deadline=None)
def test_certain_target_pixels_lie_within_the_possible_target_pixels(seed, refine):
    rng = np.random.default_rng(seed)
    mask = disc(at=rng.integers(8, 24, 2))
    fixations = simulate_fixations(mask, rng)
    assert 15 <= len(fixations) <= 60 and fixations[:, 2].min() >= 50
    candidates = candidates_from_fixations(fixations, np.where(mask, 0.5, -0.5), GazeConfig(refine=refine))
    assert set(np.unique(candidates)) <= {1, 2, 3}
    tighter = candidates_from_fixations(fixations, np.where(mask, 0.5, -0.5), GazeConfig(refine=refine, tight=0.7))
    assert ((tighter == 2) <= (candidates == 2)).all() and ((tighter == 1) == (candidates == 1)).all()


def test_a_good_tracker_finds_the_target_and_a_poor_one_finds_less():
    rng, mask = np.random.default_rng(0), disc()
    image = np.where(mask, 0.5, -0.5)

    def dice(**options):
        scores = []
        for _ in range(10):
            found = candidates_from_fixations(simulate_fixations(mask, rng, **options), image, GazeConfig()) == 2
            scores.append(2 * (found & mask).sum() / (found.sum() + mask.sum()))
        return np.mean(scores)

    assert dice() > 0.6 > dice(inside=0.3, noise=0.2)


def test_candidate_labels_of_a_target_allow_every_structure():
    assert candidates_of_all_structures(np.array([0, 1, 2, 3]), 2).tolist() == [0, 1, 2, 3]
    assert candidates_of_all_structures(np.array([0, 1, 2, 3]), 4).tolist() == [0, 1, 14, 15]


def plain_propagation(features, window, dilation, temperature):
    """Propagation pixel by pixel."""
    _, height, width = features.shape
    result, reach = torch.zeros_like(features), window // 2
    for i in range(height):
        for j in range(width):
            near = [
                (i + a * dilation, j + b * dilation)
                for a in range(-reach, reach + 1)
                for b in range(-reach, reach + 1)
                if 0 <= i + a * dilation < height and 0 <= j + b * dilation < width
            ]
            stack = torch.stack([features[:, a, b] for a, b in near])
            similar = F.cosine_similarity(stack, features[:, i, j][None])
            result[:, i, j] = torch.softmax(similar / temperature, 0) @ stack
    return result


def test_propagation_equals_its_plain_version_and_keeps_a_constant():
    features = torch.randn(2, 5, 7, 6, dtype=torch.float64)
    found = propagate(features, 3, 2, temperature=0.1)
    for propagated, maps in zip(found, features, strict=True):
        torch.testing.assert_close(propagated, plain_propagation(maps, 3, 2, 0.1))
    constant = torch.ones(1, 3, 6, 6) * torch.tensor([1.0, -2.0, 3.0])[None, :, None, None]
    torch.testing.assert_close(propagate(constant, 5, 2, temperature=0.1), constant)


def test_every_term_trains_the_network_it_is_meant_for():
    method = make_method(CONFIG)
    model = method.build()
    images = torch.randn(4, 1, 32, 32)
    allowed = torch.zeros(4, 2, 32, 32, dtype=torch.bool)
    allowed[:, 0], allowed[:, 1, :8] = True, True  # a border region that may be target; no pixel is certain
    allowed[:, 0, :4] = False  # but the upper half of the region is certainly target

    def moved(loss):
        model.zero_grad()
        loss.backward()
        return {part for part in ("tight", "loose") if getattr(model, part).final_conv.weight.grad.abs().sum() > 0}

    assert moved(method.loss(model, images, allowed)) == {"tight", "loose"}
    unlabelled = torch.zeros_like(allowed)
    assert moved(method.loss(model, images, unlabelled)) == {"tight", "loose"}  # by consistency alone
    still = make_method(MethodConfig(**{**CONFIG.to_dict(), "options": {"consistency": 0.0}}))
    assert float(still.loss(model, images, unlabelled).detach()) == 0
    confident = LevelEnsemble(1, CONFIG)
    torch.nn.init.constant_(confident.tight.final_conv.bias, 20.0)
    assert moved(still.loss(model, images, unlabelled, frozen=confident.requires_grad_(False))) == {"tight", "loose"}


def test_certainty_grades_the_pixels_between_the_thresholds():
    rng, mask = np.random.default_rng(0), disc()
    fixations, image = simulate_fixations(mask, rng), np.where(mask, 0.5, -0.5)
    config = GazeConfig(refine="none")
    candidates, certainty = graded_labels(fixations, image, config)
    np.testing.assert_array_equal(candidates, candidates_from_fixations(fixations, image, config))
    q = heatmap(fixations, mask.shape, config.sigma)
    for share in (0.25, 0.5, 0.75):  # as if this threshold had been given
        threshold = config.loose + share * (config.tight - config.loose)
        assert np.mean((certainty >= 255 * share) == (q >= threshold)) > 0.995
    assert (certainty[candidates == 2] == 255).all() and (certainty[candidates == 1] == 0).all()
    assert not graded_labels(fixations[:0], image, config)[1].any()


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_every_level_has_its_own_threshold(levels):
    allowed = torch.ones(1, 2, 1, 6, dtype=torch.bool)
    allowed[0, :, 0, 0], allowed[0, :, 0, 5] = torch.tensor([False, True]), torch.tensor([True, False])
    certainty = torch.tensor([255, 200, 130, 80, 0, 0]).view(1, 1, 1, 6)
    found = [mask.int().flatten().tolist() for mask in level_masks(allowed, certainty, levels)]
    tight, loose = [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]
    between = {3: [[1, 1, 1, 0, 0, 0]], 5: [[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0]]}
    assert found == [tight, *between.get(levels, []), loose][:levels]
    halfway = level_masks(allowed, None, 5)  # other labels are no more certain than that
    assert [int(mask.sum()) for mask in halfway] == [1, 1, 1, 5, 5]


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
def test_any_number_of_levels_trains_a_network_each(levels):
    method = make_method(MethodConfig(**{**CONFIG.to_dict(), "options": {"levels": levels}}))
    data = gazed_slices()
    site_round = site_round_of(method, data)
    names = site_round.model.names
    assert len(names) == len(set(names)) == levels and names[0] == "tight"
    before = {name: value.clone() for name, value in site_round.model.state_dict().items()}
    assert np.isfinite(method.train_round(site_round).loss)
    for name in names:
        key = f"{name}.final_conv.weight"
        assert not torch.equal(before[key], site_round.model.state_dict()[key])
    images, _, _ = method.graded_batch(site_round, np.arange(2))
    logits = torch.stack([network(images) for network in site_round.model.networks()])
    torch.testing.assert_close(site_round.model(images), logits.mean(0))


def test_the_loss_of_two_levels_is_that_of_a_pair():
    method = make_method(CONFIG)
    model = method.build().eval()
    assert {name.split(".")[0] for name in model.state_dict()} == {"tight", "loose"}
    images = torch.randn(2, 1, 32, 32)
    allowed = torch.rand(2, 2, 32, 32) > 0.3
    known, single = allowed.any(1, keepdim=True), allowed.sum(1, keepdim=True) == 1
    plain, spread = [], []
    for network in (model.tight, model.loose):
        features = network.decode(network.encode(images).features)[-1]
        plain.append(network.final_conv(features))
        spread.append(torch.sigmoid(network.final_conv(propagate(features, 5, 2, temperature=0.1))))
    expected = masked_entropy(plain[0], allowed[:, 1:] & single, known) + masked_entropy(
        plain[1], allowed[:, 1:], known
    )
    for own, peer in ((spread[0], torch.sigmoid(plain[1])), (spread[1], torch.sigmoid(plain[0]))):
        expected = expected + 3.0 * (1 - (own * peer + (1 - own) * (1 - peer)).mean())
    torch.testing.assert_close(method.loss(model, images, allowed), expected)


@pytest.mark.parametrize("viewed, copies", [(12, 0), (11, 1)])
def test_the_ensemble_is_copied_only_for_slices_without_fixations(viewed, copies, monkeypatch):
    method, data, made = make_method(CONFIG), gazed_slices(), []
    data.candidates[viewed:] = 0
    original = copy.deepcopy
    monkeypatch.setattr(
        "fedfactory.adaptation.methods.gaze_supervision.copy.deepcopy", lambda x: (made.append(1), original(x))[1]
    )
    update = method.train_round(site_round_of(method, data, number=5))
    assert len(made) == copies and update.samples == 12


def test_labels_and_certainty_are_moved_together():
    method, data = make_method(CONFIG), gazed_slices()
    site_round = site_round_of(method, data)
    torch.manual_seed(3)
    images, allowed, certainty = method.graded_batch(site_round, np.arange(12))
    torch.manual_seed(3)
    same, expected = method.batch(site_round, np.arange(12))
    assert torch.equal(images, same) and torch.equal(allowed, expected)
    assert set(certainty.unique().tolist()) == {0, 170, 255}
    assert ((certainty == 255) == (allowed[:, 1:] & ~allowed[:, :1])).all()
    assert ((certainty == 170) == (allowed[:, 1:] & allowed[:, :1])).all()
    without = method.graded_batch(site_round_of(method, replace(data, certainty=None)), np.arange(2))[2]
    assert set(without.unique().tolist()) <= {0, 127}


def gazed_slices() -> SiteSlices:
    """A dozen slices with a target and a border that may be target."""
    rng, masks = np.random.default_rng(0), [disc(), disc(at=(20, 12), radius=8)] * 6
    borders = [disc(radius=9), disc(at=(20, 12), radius=11)] * 6
    images = np.stack([np.where(mask, 0.5, -0.5) + rng.normal(0, 0.1, mask.shape) for mask in masks])
    candidates = np.stack([np.where(m, 2, np.where(b, 3, 1)) for m, b in zip(masks, borders, strict=True)])
    certainty = np.choose(candidates, [0, 0, 255, 170]).astype(np.uint8)
    return SiteSlices(
        images.astype(np.float32), candidates.astype(np.uint8), np.array(["gaze"] * 12), 2, certainty=certainty
    )


def test_levels_learn_their_own_masks():
    logits = torch.zeros(1, 1, 2, 2, requires_grad=True)
    loss = masked_entropy(logits, torch.ones(1, 1, 2, 2), torch.tensor([[[[True, False], [False, False]]]]))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(np.log(2)) and logits.grad.nonzero().tolist() == [[0, 0, 0, 0]]
    assert float(masked_entropy(logits, logits.detach(), torch.zeros(1, 1, 2, 2, dtype=torch.bool)).detach()) == 0


def test_the_blur_follows_from_the_known_size_of_the_target():
    rng = np.random.default_rng(0)
    masks = [disc(32, (15 + shift, 17 - shift), 9) for shift in (-2, 0, 2)] * 4
    images = [np.where(mask, 0.5, -0.5) + rng.normal(0, 0.3, mask.shape) for mask in masks]
    views = [(simulate_fixations(mask, rng), image) for mask, image in zip(masks, images, strict=True)]
    share = float(np.mean(masks))
    chosen = config_for_target_share(views, share, GazeConfig(stride=2))

    def dice(config) -> float:
        found = np.stack([candidates_from_fixations(*view, config) == 2 for view in views])
        return 2 * (found & masks).sum() / (found.sum() + np.sum(masks))

    found = np.mean([candidates_from_fixations(*view, chosen) == 2 for view in views])
    assert found == pytest.approx(share, rel=0.1)
    assert dice(chosen) > dice(GazeConfig(stride=2, sigma=0.05)) + 0.1
    with pytest.raises(ConfigError, match=r"it must be between .* and "):
        config_for_target_share(views, 0.99, GazeConfig(stride=2))


@pytest.fixture
def gazed(site, tmp_path):
    """A store of simulated fixations on the balls."""
    fixate(site)
    config = PrepareConfig(domain="x", size=32, z_bins=4, label_kind="gaze", split="train")
    return prepare(site, tmp_path / "gazed", config).store


def test_a_site_reads_its_fixations_once_and_trains_with_them(gazed, capsys):
    with pytest.raises(NodeDataError, match="fedfactory gaze STORE"):
        site_slices(gazed, 2)
    with pytest.raises(SystemExit):
        main(["gaze", str(gazed.path)])
    assert "slices were viewed long enough" in capsys.readouterr().out
    data = site_slices(gazed, 2)
    assert set(data.kinds) == {"gaze"} and len(data.labelled_indices) > 0
    assert set(np.unique(data.candidates)) == {0, 1, 2, 3} or set(np.unique(data.candidates)) == {1, 2, 3}
    candidates, certainty = gaze_candidates(gazed)
    np.testing.assert_array_equal(data.candidates, candidates)
    np.testing.assert_array_equal(data.certainty, certainty)
    (gazed.path / "gaze_certainty.npy").unlink()  # read by a version that did not keep it
    with pytest.raises(StoreError, match="fedfactory gaze"):
        gaze_candidates(gazed)


def test_maps_of_other_fixations_are_refused(gazed, tmp_path):
    read_gaze(gazed.path)
    card = gazed.path / "gaze_candidates.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "gaze": "gaze-000000000000.npy"}))
    with pytest.raises(StoreError, match="have changed"):
        gaze_candidates(gazed)
    with pytest.raises(UsageError, match="no fixations"):
        write_site(tmp_path / "dense")
        read_gaze(prepare(tmp_path / "dense", tmp_path / "s", PrepareConfig(domain="x", size=16, z_bins=4)).store.path)


@pytest.mark.parametrize(
    "changes",
    [{"tight": 0.2}, {"loose": 0.0}, {"sigma": 0.0}, {"refine": "odd"}, {"stride": 0}, {"potts_weight": -1.0}],
)
def test_wrong_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        GazeConfig(**changes)
