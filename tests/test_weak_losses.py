"""Candidate labels and the losses for incomplete labels, against slow plain versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedfactory.adaptation.labels.candidate_labels import (
    UNKNOWN,
    candidate_masks,
    candidates_from_boxes,
    candidates_from_labels,
    candidates_from_presence,
)
from fedfactory.adaptation.losses.gated_crf import gated_crf
from fedfactory.adaptation.losses.partial_losses import candidate_cross_entropy, partial_dice, partial_loss
from fedfactory.adaptation.losses.spanning_trees import forest_by_scipy, forest_by_whole_tensors, spanning_forest
from fedfactory.adaptation.losses.tree_energy import tree_energy, tree_filter
from fedfactory.errors import ConfigError, NodeDataError
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.node.policy.method_memory import kept_bytes
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.csgraph import minimum_spanning_tree

RNG = np.random.default_rng(0)


def masks(labels, classes=3):
    return candidate_masks(torch.from_numpy(candidates_from_labels(labels, classes).astype(np.int64)), classes)


def test_dense_labels_allow_one_class_and_unlabelled_pixels_none():
    labels = np.array([[[0, 2], [1, UNLABELLED]]], np.uint8)
    allowed = masks(labels)
    assert allowed.shape == (1, 3, 2, 2)
    assert allowed[0, :, 0, 1].tolist() == [False, False, True]
    assert not allowed[0, :, 1, 1].any()


@pytest.mark.parametrize("classes", [9, 24])
def test_candidate_labels_of_many_classes_do_not_overflow(classes):
    labels = np.full((1, 2, 2), classes - 1, np.uint8)
    assert masks(labels, classes)[0, :, 0, 0].tolist() == [False] * (classes - 1) + [True]
    assert float(np.float32(candidates_from_labels(labels, classes)[0, 0, 0])) == 2 ** (classes - 1)


def test_labels_out_of_range_are_refused():
    with pytest.raises(NodeDataError, match="largest label is 3; it must be below 3"):
        candidates_from_labels(np.array([[3]], np.uint8), 3)
    with pytest.raises(NodeDataError, match="4 classes"):
        candidates_from_presence(np.ones((2, 4)), 2, 3)
    with pytest.raises(ConfigError, match="25"):
        candidates_from_labels(np.zeros((1, 1), np.uint8), 25)


def test_a_box_allows_its_class_or_background_and_its_middle_the_class_alone():
    labels = np.zeros((12, 12), np.uint8)
    labels[0:9, 0:9] = 1  # a ring around class 2
    labels[3:6, 3:6] = 2
    labels[9:12, 9:12] = 0
    candidates = candidates_from_boxes(labels, 3)
    assert candidates[11, 11] == 0b001 and candidates[0, 0] == 0b011
    assert candidates[2, 3] == 0b011 and candidates[7, 7] == 0b011
    assert candidates[3, 3] == 0b110  # border of the inner box, in the middle of the outer box: one of the structures
    assert candidates[4, 4] == 0b100  # the middle of the inner box has the class of the inner box
    labels[7:12, 4:12] = 2  # now the boxes overlap, and both classes are possible in their middles
    assert candidates_from_boxes(labels, 3)[6, 5] == 0b111
    alone = np.zeros((12, 12), np.uint8)
    alone[0:9, 0:9] = 2
    assert candidates_from_boxes(alone, 3)[4, 4] == 0b100
    assert candidates_from_boxes(alone, 3)[1, 1] == 0b101


def test_a_box_map_with_unlabelled_pixels_is_read_as_it_is():
    labels = np.full((4, 4), UNLABELLED, np.uint8)
    labels[0], labels[2, 2] = 0, 1
    candidates = candidates_from_boxes(labels, 2)
    assert (candidates[0] == 1).all() and candidates[2, 2] == 2 and candidates[1, 1] == UNKNOWN


def test_image_labels_allow_the_classes_present():
    candidates = candidates_from_presence(np.array([[1, 0, 1], [0, 0, 0]]), 2, 3)
    assert (candidates[0] == 0b101).all() and (candidates[1] == 0b001).all()


def test_with_complete_labels_the_loss_is_cross_entropy():
    labels = RNG.integers(0, 3, (2, 8, 8)).astype(np.uint8)
    logits = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    expected = F.cross_entropy(logits, torch.from_numpy(labels).long())
    torch.testing.assert_close(candidate_cross_entropy(logits, masks(labels)), expected)


def test_the_loss_uses_the_total_probability_of_the_candidate_labels_and_no_unlabelled_pixels():
    logits = torch.randn(1, 3, 1, 3, dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[[[1, 0, 1]], [[1, 0, 1]], [[0, 0, 1]]]], dtype=torch.bool)
    p = torch.softmax(logits, 1)[0, :, 0]
    loss = candidate_cross_entropy(logits, allowed)
    torch.testing.assert_close(loss, -torch.log(p[0, 0] + p[1, 0]))
    loss.backward()
    assert (logits.grad[0, :, 0, 0] != 0).all() and (logits.grad[0, :, 0, 1:] == 0).all()


def test_without_any_label_losses_are_zero_and_so_are_their_gradients():
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = partial_loss(logits, torch.zeros(2, 3, 4, 4, dtype=torch.bool))
    loss.backward()
    assert float(loss) == 0 and (logits.grad == 0).all()


def test_partial_dice_uses_only_pixels_with_a_single_candidate_label():
    labels = RNG.integers(0, 3, (2, 8, 8)).astype(np.uint8)
    logits = 20.0 * F.one_hot(torch.from_numpy(labels).long(), 3).movedim(-1, 1)
    allowed = masks(labels)
    assert float(partial_dice(logits, allowed)) < 0.01
    labels[0, :4] = UNLABELLED
    wrong = logits.clone()
    wrong[0, :, :4] = 0
    assert float(partial_dice(wrong, masks(labels))) < 0.01
    assert float(partial_dice(wrong, allowed)) > 0.05


def plain_crf(p, image, radius, spatial_width, intensity_width):
    _, height, width = p.shape
    total = 0.0
    for i in range(height):
        for j in range(width):
            for k in range(max(0, i - radius), min(height, i + radius + 1)):
                for n in range(max(0, j - radius), min(width, j + radius + 1)):
                    if (i, j) != (k, n):
                        distance = ((i - k) ** 2 + (j - n) ** 2) / (2 * spatial_width**2)
                        distance += sum(float(v) ** 2 for v in image[:, i, j] - image[:, k, n]) / (
                            2 * intensity_width**2
                        )
                        total += math.exp(-distance) * (1 - float(p[:, i, j] @ p[:, k, n]))
    return total / (height * width)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width", "radius"), [(6, 7, 2), (5, 3, 5), (1, 4, 2)])
def test_the_gated_crf_equals_the_sum_over_all_pairs(height, width, radius, channels):
    p = torch.softmax(torch.randn(2, 3, height, width, dtype=torch.float64), 1)
    image = 0.3 * torch.rand(2, channels, height, width, dtype=torch.float64)
    expected = np.mean([plain_crf(p[n], image[n], radius, 6.0, 0.1) for n in range(2)])
    assert float(gated_crf(p, image, radius=radius)) == pytest.approx(expected, abs=1e-12)


def test_autograd_keeps_a_value_per_pixel_of_each_offset_of_the_gated_crf():
    """Copies of the probabilities of both sides, as einsum makes them, would be 12 offsets of 32 values."""
    p, image = torch.softmax(torch.randn(1, 16, 12, 12, requires_grad=True), 1), torch.rand(1, 1, 12, 12)
    kept = kept_bytes(torch.nn.Identity(), lambda: gated_crf(p, image, radius=2)) / (4 * 12 * 12)
    assert kept <= 16 + 12 + 1  # the probabilities, the kernels, some numbers


def test_the_gated_crf_has_the_right_gradient():
    image = torch.rand(1, 1, 4, 4, dtype=torch.float64)
    logits = torch.randn(1, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: gated_crf(torch.softmax(z, 1), image, radius=2), logits)


def plain_filter(values, guide, sigma):
    """Tree filter by brute force over all pairs of pixels, along the paths of a spanning tree from SciPy."""
    classes, height, width = values.shape
    flat = guide.reshape(len(guide), -1).numpy()
    n = height * width
    weights, distance = np.zeros((n, n)), np.full((n, n), np.inf)
    for i in range(n):
        for j in ((i + 1) if (i + 1) % width else None, i + width if i + width < n else None):
            if j is not None:
                weights[i, j] = ((flat[:, i] - flat[:, j]) ** 2).sum() + 1
    tree = minimum_spanning_tree(weights).toarray()
    np.fill_diagonal(distance, 0)
    for i, j in zip(*np.nonzero(tree), strict=True):
        distance[i, j] = distance[j, i] = (tree[i, j] - 1) / sigma
    for k in range(n):
        distance = np.minimum(distance, distance[:, k : k + 1] + distance[k])
    share = torch.from_numpy(np.exp(-distance))
    flat_values = values.reshape(classes, -1).T
    return (share @ flat_values / share.sum(1, keepdim=True)).T.reshape(values.shape)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sigma", [0.02, 1.0])
def test_the_tree_filter_equals_brute_force(sigma, channels):
    values = torch.rand(2, 4, 8, 8, dtype=torch.float64)
    guide = torch.rand(2, channels, 8, 8, dtype=torch.float64)
    found = tree_filter(values, guide, spanning_forest(guide), sigma=sigma)
    for filtered, value, features in zip(found, values, guide, strict=True):
        torch.testing.assert_close(filtered, plain_filter(value, features, sigma), atol=1e-6, rtol=0)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
@settings(max_examples=25, deadline=None)
def test_the_tree_filter_does_not_change_constant_maps_and_stays_in_range(height, width, seed):
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(1, 2, height, width, generator=rng, dtype=torch.float64)
    values[:, 1] = 0.25
    guide = 5 * torch.rand(1, 3, height, width, generator=rng, dtype=torch.float64)
    found = tree_filter(values, guide, spanning_forest(guide))
    torch.testing.assert_close(found[:, 1], values[:, 1])
    assert found[:, 0].min() >= values[:, 0].min() - 1e-9 and found[:, 0].max() <= values[:, 0].max() + 1e-9


@pytest.mark.parametrize("shape", [(1, 1, 1, 6), (3, 2, 7, 1), (2, 3, 6, 5), (4, 2, 32, 32)])
def test_both_ways_to_trees_find_the_same_trees(shape):
    """Weights that are all different have one minimum spanning tree."""
    guide = torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, scipys = forest_by_whole_tensors(guide), forest_by_scipy(guide)
    assert torch.equal(ours.parent, scipys.parent) and ours.depth == scipys.depth


def test_equal_edges_give_a_spanning_tree_too():
    guide = torch.randint(0, 2, (2, 1, 9, 11), generator=torch.Generator().manual_seed(0))
    forest = forest_by_whole_tensors(guide)
    number = torch.arange(2 * 9 * 11)
    row, column = number % 99 // 11, number % 11
    steps = (row - row[forest.parent]).abs() + (column - column[forest.parent]).abs()
    assert torch.equal(steps == 0, number % 99 == 0) and steps.max() == 1  # only roots are their own parents
    assert torch.equal(number // 99, forest.parent // 99)  # each image has its tree
    lightest = forest_by_scipy(guide)
    weights = [(guide.flatten()[found.parent] != guide.flatten()).sum() for found in (forest, lightest)]
    assert weights[0] == weights[1]
    assert forest_by_whole_tensors(torch.zeros(2, 1, 1, 1)).parent.tolist() == [0, 1]


def test_the_tree_filter_has_the_right_gradients():
    guide = torch.rand(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    values = torch.rand(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    forest = spanning_forest(guide)
    assert torch.autograd.gradcheck(lambda v, g: tree_filter(v, g, forest), (values, guide))


def test_tree_energy_counts_unlabelled_pixels_and_trains_the_embeddings():
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    images, guide = torch.rand(2, 1, 8, 8), torch.rand(2, 4, 8, 8, requires_grad=True)
    unlabelled = torch.zeros(2, 8, 8, dtype=torch.bool)
    assert float(tree_energy(torch.softmax(logits, 1), images, unlabelled, embeddings=[guide])) == 0
    unlabelled[0, :4] = True
    p = torch.softmax(logits, 1)
    loss = tree_energy(p, images, unlabelled, embeddings=[guide])
    first = tree_filter(p, images, spanning_forest(images), sigma=0.02 / 3)  # grey: published for three channels
    second = tree_filter(first, guide, spanning_forest(guide))
    torch.testing.assert_close(loss, (p - second)[0, :, :4].abs().sum() / 32)
    loss.backward()
    assert guide.grad.abs().sum() > 0 and logits.grad.abs().sum() > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_tree_energy_equals_brute_force_over_all_channels(channels):
    p = torch.softmax(torch.randn(2, 3, 6, 7, dtype=torch.float64), 1)
    images = 0.3 * torch.rand(2, channels, 6, 7, dtype=torch.float64)
    guide, unknown = torch.rand(2, 4, 6, 7, dtype=torch.float64), torch.rand(2, 6, 7) > 0.5
    total = 0.0
    for n in range(2):
        filtered = plain_filter(plain_filter(p[n], images[n], 0.02 * channels / 3), guide[n], 1.0)
        total += float((p[n] - filtered).abs().sum(0)[unknown[n]].sum())
    found = tree_energy(p, images, unknown, embeddings=[guide])
    assert float(found) == pytest.approx(total / int(unknown.sum()), abs=1e-9)


def test_a_grey_image_has_the_tree_energy_of_its_copy_in_colour():
    """The published program repeats grey images in three channels, to which its scale belongs."""
    p, grey = torch.softmax(torch.randn(2, 3, 8, 8), 1), torch.rand(2, 1, 8, 8)
    unknown = torch.ones(2, 8, 8, dtype=torch.bool)
    energies = [tree_energy(p, images, unknown, embeddings=[]) for images in (grey, grey.expand(-1, 3, -1, -1))]
    torch.testing.assert_close(*energies)


def test_an_edge_that_only_one_channel_shows_stops_both_energies():
    """With the first channel alone, or with the mean of all, the halves would be one."""
    image = torch.zeros(1, 3, 6, 6)
    image[:, 1, :, 3:], image[:, 2, :, 3:] = 1.0, -1.0
    values = torch.zeros(1, 2, 6, 6)
    values[:, 0, :, :3], values[:, 1, :, 3:] = 1.0, 1.0
    torch.testing.assert_close(tree_filter(values, image, spanning_forest(image), sigma=0.02), values)
    assert float(gated_crf(values, image)) < 1e-6 < float(gated_crf(values, image[:, :1]))


def test_a_uniform_image_spreads_a_label_everywhere_and_an_edge_stops_it():
    values = torch.zeros(1, 1, 6, 6)
    values[0, 0, 0, 0] = 1
    flat = torch.zeros(1, 1, 6, 6)
    torch.testing.assert_close(tree_filter(values, flat, spanning_forest(flat)), torch.full_like(values, 1 / 36))
    halves = flat.clone()
    halves[..., 3:] = 10
    found = tree_filter(values, halves, spanning_forest(halves))
    assert float(found[0, 0, :, 3:].max()) < 1e-6
    torch.testing.assert_close(found[0, 0, :, :3], torch.full((6, 3), 1 / 18))
