"""Boxes as labels: certain cores, tightness and size, and that a site with boxes alone learns."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.labels.boxes import boxes_of, line_numbers
from fedfactory.adaptation.labels.candidate_labels import (
    SiteSlices,
    candidate_masks,
    candidates_from_boxes,
    candidates_from_labels,
)
from fedfactory.adaptation.labels.weak_labels import boxes
from fedfactory.adaptation.losses.box_losses import missing_size, tightness
from fedfactory.adaptation.losses.partial_losses import partial_loss, uncertain
from fedfactory.adaptation.losses.tree_energy import tree_energy
from fedfactory.adaptation.methods import fedicra
from fedfactory.adaptation.methods.interface.box_options import BoxOptions, box_loss
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.errors import ConfigError
from helpers import CONFIG, SMALL, site_round_of
from hypothesis import given, settings
from hypothesis import strategies as st


def heart(*, side=48, centre=(24, 20), inner=6.0, wall=4.0) -> np.ndarray:
    """A ring (2) around a disc (3), and a crescent (1) beside it, whose box overlaps theirs: labels (side, side)."""
    rows, columns = np.indices((side, side))
    distance = np.hypot(rows - centre[0], columns - centre[1])
    labels = np.zeros((side, side), np.uint8)
    labels[np.hypot(rows - centre[0] + 2, columns - centre[1] - inner - wall) < 9] = 1
    labels[distance < inner + wall] = 2
    labels[distance < inner] = 3
    return labels


def of_boxes(labels: np.ndarray, classes=4) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates (1, classes, S, S) of the boxes of labels (S, S), and the lines of their slice."""
    candidates = candidates_from_boxes(boxes(labels, np.random.default_rng(0)), classes).astype(np.int64)
    return candidate_masks(torch.from_numpy(candidates)[None], classes), line_numbers(len(labels))[None]


def logits_of(labels: np.ndarray, classes=4, certainty=12.0) -> torch.Tensor:
    """(1, classes, S, S) float64, of a prediction that is surely `labels` (S, S)."""
    truth = candidates_from_labels(labels, classes).astype(np.int64)
    return certainty * candidate_masks(torch.from_numpy(truth)[None], classes).double()


# Cores


@given(st.floats(4, 7), st.floats(3, 5), st.integers(20, 28), st.integers(18, 24))
@settings(max_examples=30, deadline=None)
def test_every_structure_of_nested_boxes_keeps_a_certain_core_that_is_right(inner, wall, row, column):
    labels = heart(centre=(row, column), inner=inner, wall=wall)
    candidates = candidates_from_boxes(boxes(labels, np.random.default_rng(0)), 4)
    for value in (2, 3):  # before, the disc's box left the ring without any certain pixel
        core = candidates == 1 << value
        assert core.any() and (labels[core] == value).mean() > 0.95
    assert ((candidates >> labels) & 1).mean() > 0.998


def test_a_structure_inside_another_one_beside_its_middle_makes_no_ring_of_it():
    labels = np.zeros((30, 30), np.uint8)
    labels[3:27, 3:27] = 1
    labels[5:9, 5:9] = 2
    core = np.argwhere(candidates_from_boxes(labels, 3) == 0b010)
    assert core.min() == 11 and core.max() == 18  # the middle third, and nothing else


def test_where_boxes_overlap_in_their_middle_only_background_is_excluded():
    labels = np.zeros((12, 16), np.uint8)
    labels[1:10, 1:10] = 1
    labels[2:12, 4:13] = 2  # hides a part of the first box
    candidates = candidates_from_boxes(labels, 3)
    assert candidates[5, 5] == 0b110 and candidates[2, 5] == 0b111 and candidates[1, 1] == 0b011
    assert boxes_of(labels, 3)[1] == (slice(1, 10), slice(1, 10))


# Uncertain pixels


def test_a_pixel_with_several_candidates_or_none_is_uncertain():
    allowed = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    assert uncertain(allowed.T[None, :, None])[0, 0].tolist() == [False, True, True, True, False]


def test_the_tree_energy_of_fedicra_covers_the_inside_of_boxes(monkeypatch):
    labels = heart()
    allowed, _ = of_boxes(labels)
    seen = {}

    def noted(probabilities, images, unknown, **options):
        seen["unknown"] = unknown
        return tree_energy(probabilities, images, unknown, **options)

    monkeypatch.setattr(fedicra, "tree_energy", noted)
    method = make_method(replace(CONFIG, method="fedicra", size=48, classes=4, options=SMALL["fedicra"]))
    method.loss(method.build(), torch.zeros(1, 1, 48, 48), allowed, site=0)
    assert torch.equal(seen["unknown"], allowed.sum(1) > 1)
    assert seen["unknown"].float().mean() > 0.1  # before, only where the boxes of all classes meet


# Tightness and size


def plain_terms(logits, allowed, lines, share):
    """Both terms by loops over boxes, lines and pixels."""
    p = torch.softmax(logits, 1).numpy()
    size, bags, sizes = logits.shape[-1], [], []
    for n in range(len(p)):
        for c in range(1, p.shape[1]):
            box = [(i, j) for i in range(size) for j in range(size) if allowed[n, c, i, j] and lines[n, 0, i, j] > 0]
            edge = {(i, j) for i, j in box if i in (0, size - 1) or j in (0, size - 1)}
            for axis in (0, 1):
                for line in sorted({int(lines[n, axis, i, j]) for i, j in box}):
                    bag = [(i, j) for i, j in box if int(lines[n, axis, i, j]) == line]
                    if not edge & set(bag):
                        bags.append(-math.log(max(p[n, c, i, j] for i, j in bag)))
            if box and not edge:
                sizes.append(max(0.0, 1 - sum(p[n, c, i, j] for i, j in box) / len(box) / share))
    return sum(bags) / max(len(bags), 1), sum(sizes) / max(len(sizes), 1)


@pytest.mark.parametrize("moved", [False, True])
def test_both_terms_equal_loops_over_lines_and_pixels(moved):
    rng = np.random.default_rng(3)
    labels = [heart(side=16, centre=(7, 5), inner=2.0, wall=2.0), heart(side=16, centre=(2, 8), inner=2.0, wall=1.5)]
    allowed = torch.cat([of_boxes(label)[0] for label in labels])
    lines = line_numbers(16).repeat(2, 1, 1, 1)
    if moved:  # as after a rotation, with a part of the window outside of the slice; and a slice without boxes
        lines = lines.transpose(2, 3).roll(3, 2)
        lines[:, :, :3], lines[1] = 0, 0
    logits = torch.from_numpy(rng.normal(size=(2, 4, 16, 16)))
    bags, sizes = plain_terms(logits, allowed, lines, 0.4)
    assert float(tightness(logits, allowed, lines)) == pytest.approx(bags, abs=1e-12)
    assert float(missing_size(logits, allowed, lines, share=0.4)) == pytest.approx(sizes, abs=1e-12)
    assert bags > 0 and sizes > 0


def test_both_terms_have_the_right_gradients():
    labels = np.zeros((7, 7), np.uint8)
    labels[1:5, 1:4], labels[3:6, 2:6] = 1, 2
    allowed, lines = of_boxes(labels, 3)
    logits = torch.from_numpy(np.random.default_rng(0).normal(size=(1, 3, 7, 7))).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: tightness(z, allowed, lines), logits)
    assert torch.autograd.gradcheck(lambda z: missing_size(z, allowed, lines, share=0.5), logits)


def test_background_everywhere_but_in_the_cores_loses_against_the_truth():
    """By the candidates alone it is as good: this is what made sites with boxes learn background."""
    labels = heart()
    allowed, lines = of_boxes(labels)
    least = np.where((allowed.sum(1) == 1)[0].numpy(), labels, 0).astype(np.uint8)
    multiple = (~allowed[0, 0] & (allowed[0].sum(0) > 1)).numpy()
    least[multiple] = labels[multiple]
    background, truth = logits_of(least), logits_of(labels)
    assert float(partial_loss(background, allowed)) < float(partial_loss(truth, allowed)) + 1e-3
    options = BoxOptions()
    right = partial_loss(truth, allowed) + box_loss(truth, allowed, lines, options)
    wrong = partial_loss(background, allowed) + box_loss(background, allowed, lines, options)
    assert float(wrong) > float(right) + 0.5
    empty = logits_of(np.zeros_like(labels))
    assert float(tightness(truth, allowed, lines)) < 1e-3 < 5 < float(tightness(empty, allowed, lines))
    assert float(missing_size(truth, allowed, lines, share=0.25)) == 0
    assert float(missing_size(empty, allowed, lines, share=0.25)) == pytest.approx(1, abs=1e-3)


def test_lines_move_with_the_slice_so_that_the_truth_stays_free_of_loss():
    """With rows and columns of the rotated slice, many lines that cross the box miss its structure."""
    labels = np.stack([heart()] * 40)
    weak = candidates_from_boxes(boxes(labels[0], np.random.default_rng(0)), 4)
    data = SiteSlices(labels.astype(np.float32) / 2 - 1, np.stack([weak] * 40), np.array(["box"] * 40), 4)
    method = make_method(replace(CONFIG, method="fedavg", classes=4, size=48, options={}))
    chosen, again = np.arange(40), replace(data, candidates=candidates_from_labels(labels, 4))
    site_round = site_round_of(method, data)
    with method.seeded_round(site_round):
        _, allowed, lines = method.batch_with_lines(site_round, chosen)
    with method.seeded_round(site_round):  # the same windows, with the dense labels
        _, truth = method.augmented(again, chosen, torch.device("cpu"))
    logits = 12.0 * truth.double()
    assert float(tightness(logits, allowed, lines)) < 0.25
    still = line_numbers(48).expand_as(lines) * (lines > 0)
    assert float(tightness(logits, allowed, still)) > 4 * float(tightness(logits, allowed, lines))
    assert float(missing_size(logits, allowed, lines, share=0.25)) == 0


def test_slices_without_boxes_have_no_lines_and_no_box_loss():
    labels = np.stack([heart()] * 2)
    data = SiteSlices(labels / 2.0 - 1, candidates_from_labels(labels, 4), np.array(["dense", "dense"]), 4)
    method = make_method(replace(CONFIG, method="fedavg", classes=4, size=48, options={}))
    _, allowed, lines = method.batch_with_lines(site_round_of(method, data), np.arange(2))
    assert lines.shape == (2, 2, 48, 48) and not lines.any()
    logits = torch.randn(2, 4, 48, 48)
    assert float(tightness(logits, allowed, lines)) == 0 == box_loss(logits, allowed, lines, BoxOptions())
    mixed = replace(data, kinds=np.array(["dense", "box"]))
    lines = method.batch_with_lines(site_round_of(method, mixed), np.arange(2))[2]
    assert not lines[0].any() and lines[1].any()


@pytest.mark.parametrize("name", ["local", "fedavg", "fedprox", "fedbn", "fedicra", "fedmix"])
def test_the_terms_take_part_in_the_training_of_every_method_with_boxes(name):
    labels = np.stack([heart(side=32, centre=(15, 13), inner=4.0, wall=3.0)] * 4)
    weak = candidates_from_boxes(boxes(labels[0], np.random.default_rng(0)), 4)
    data = SiteSlices(labels / 2.0 - 1, np.stack([weak] * 4), np.array(["box"] * 4), 4)
    accept = {"agreement": 0.0, "box_cover": 0.0} if name == "fedmix" else {}
    models = []
    for weights in ({}, {"tightness_weight": 0.0, "size_weight": 0.0}):
        options = {**SMALL.get(name, {}), **accept, **weights}
        method = make_method(replace(CONFIG, method=name, classes=4, updates=1, options=options))
        site_round = site_round_of(method, data)
        assert method.train_round(site_round).samples == 4
        models.append(torch.cat([value.flatten() for value in site_round.model.state_dict().values()]))
    assert not torch.equal(*models)


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedicra", "fedmix"])
@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("tightness_weight", -1.0, "tightness_weight is -1.0; it must be at least 0"),
        ("size_weight", math.nan, "size_weight is nan"),
        ("least_share", 0.0, "least_share is 0.0; choose above 0"),
        ("least_share", 1.5, "least_share is 1.5; choose above 0 and at most 1"),
    ],
)
def test_impossible_settings_for_boxes_are_refused(name, option, value, message):
    with pytest.raises(ConfigError, match=message):
        make_method(replace(CONFIG, method=name, options={option: value}))


def test_a_site_with_boxes_alone_learns_at_least_half_of_what_dense_labels_teach():
    rng = np.random.default_rng(0)
    shape = {"side": 32, "wall": 3.0}
    labels = np.stack(
        [heart(centre=tuple(rng.integers(12, 18, 2)), inner=rng.uniform(3, 5), **shape) for _ in range(16)]
    )
    images = np.choose(labels, [-0.6, 0.6, -0.1, 0.8]) + rng.normal(0, 0.05, labels.shape)
    dice = {}
    for kind in ("dense", "box"):
        candidates = (
            candidates_from_labels(labels, 4)
            if kind == "dense"
            else np.stack([candidates_from_boxes(boxes(label, rng), 4) for label in labels])
        )
        data = SiteSlices(images.astype(np.float32), candidates, np.array([kind] * 16), 4)
        config = replace(CONFIG, method="local", classes=4, updates=30, batch_size=5, learning_rate=4e-3, options={})
        method = make_method(config)
        site_round = site_round_of(method, data)
        method.train_round(site_round)
        with torch.no_grad():
            found = site_round.model.eval()(torch.from_numpy(data.images)).argmax(1).numpy()
        parts = [(found == value, labels == value) for value in (1, 2, 3)]
        dice[kind] = np.mean([2 * (ours & theirs).sum() / (ours.sum() + theirs.sum()) for ours, theirs in parts])
    assert dice["box"] >= dice["dense"] / 2 > 0.2, dice
