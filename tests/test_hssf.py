"""HSSF: its losses, what sites and researcher send, and what a round changes at both."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedfactory.adaptation.losses.hssf_losses import (
    assessment_loss,
    assessor_accuracy,
    distillation,
    foreground_confidence,
    grades,
    perturbation_loss,
    reliable_labels,
    segmentation_loss,
)
from fedfactory.adaptation.methods.interface.site_round import SiteContext, SiteUpdate
from fedfactory.adaptation.methods.public_exchange import (
    CONDENSATION,
    FUSION,
    exchanged_count,
    from_margins,
    to_margins,
)
from fedfactory.adaptation.methods.public_slice_method import PublicSliceMethod, Teacher
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.methods.strong_views import OPERATIONS, StrongView, equalise
from fedfactory.adaptation.network_names import ARCHITECTURES
from fedfactory.adaptation.networks.assessed_network import AssessedNetwork
from fedfactory.errors import ConfigError, FederationError, NodeDataError
from helpers import CONFIG, site, site_round_of

OPTIONS = {"public_slices": 12, "public_epochs": 1, "warmup": 0.0}


def hssf(name="hssf", **options):
    method = make_method(replace(CONFIG, method=name, options={**OPTIONS, **options}))
    method.public = site()
    return method


def logits_of(labels: torch.Tensor, classes: int = 3) -> torch.Tensor:
    return 8.0 * F.one_hot(labels, classes).movedim(-1, 1).float()


def test_the_segmentation_loss_equals_its_formula():
    rng = np.random.default_rng(0)
    z, y = rng.normal(size=(2, 2, 24, 24)), rng.integers(0, 2, (2, 24, 24))
    found = segmentation_loss(torch.from_numpy(z), torch.from_numpy(y))
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    total = 0.0
    for b in range(2):
        entropy = -np.mean([np.log(p[b, y[b, r, c], r, c]) for r in range(24) for c in range(24)])
        iou = 0.0
        for k in range(2):
            inter = union = 0.0
            for r in range(24):
                for c in range(24):
                    here = y[b, r, c] == k
                    around = (y[b, max(0, r - 1) : r + 2, max(0, c - 1) : c + 2] == k).mean()
                    weight = 1 + 5 * abs(around - here)
                    inter += p[b, k, r, c] * here * weight
                    union += (p[b, k, r, c] + here) * weight
            iou += (inter + 1) / (union - inter + 1) / 2
        total += entropy + 1 - iou
    assert float(found) == pytest.approx(total / 2, rel=1e-9)


def test_a_rejected_slice_adds_nothing_to_loss_or_gradient():
    logits = torch.randn(3, 2, 16, 16, dtype=torch.float64, requires_grad=True)
    truth = torch.randint(0, 2, (3, 16, 16))
    segmentation_loss(logits, truth, torch.tensor([1.0, 0.0, 1.0])).backward()
    assert logits.grad[1].abs().max() == 0 and logits.grad[0].abs().max() > 0
    assert float(segmentation_loss(logits, truth, torch.zeros(3))) == 0


def test_unlabelled_pixels_do_not_enter_the_loss():
    logits = torch.randn(1, 3, 16, 16, requires_grad=True)
    truth = torch.full((1, 16, 16), -1)
    truth[:, :8] = 1
    segmentation_loss(logits, truth).backward()
    assert logits.grad[:, :, 8:].abs().max() == 0 and logits.grad[:, :, :8].abs().max() > 0


def test_assessment_weighs_right_and_wrong_pixels_alike():
    zeros = torch.zeros(1, 8, 8)
    for right in (torch.ones(1, 8, 8).bool(), torch.zeros(1, 8, 8).bool()):
        assert float(assessment_loss(zeros, right)) == pytest.approx(math.log(2))
    right = torch.ones(1, 8, 8).bool()
    right[0, 0, 0] = False
    sure = torch.full((1, 8, 8), 4.0)
    expected = (F.softplus(torch.tensor(-4.0)) + F.softplus(torch.tensor(4.0))) / 2
    assert float(assessment_loss(sure, right)) == pytest.approx(float(expected), rel=1e-5)


def test_distillation_is_the_sum_over_all_slices_divided_by_the_number_of_elements():
    torch.manual_seed(0)
    teacher = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    student = torch.randn(2, 3, 5, 7, dtype=torch.float64, requires_grad=True)
    found = distillation(teacher, student, torch.tensor([1.0, 0.0]), temperature=2.0)
    q, p = (torch.softmax(z[0] / 2, 0) for z in (teacher, student))
    assert float(found.detach()) == pytest.approx(float((q * (q / p).log()).sum().detach()) / teacher.numel())
    found.backward()
    assert teacher.grad is None and student.grad[1].abs().max() == 0 and student.grad[0].abs().max() > 0


def test_a_shift_of_all_logits_costs_half_its_square():
    z = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    assert float(perturbation_loss(z, z + 0.5, torch.ones(2))) == pytest.approx(0.125)
    assert float(perturbation_loss(z, z + 0.5, torch.tensor([1.0, 0.0]))) == pytest.approx(0.0625)
    assert float(perturbation_loss(z, z, torch.ones(2))) == 0


def test_an_empty_prediction_has_grade_zero_where_there_is_a_structure():
    truth = torch.zeros(2, 16, 16).long()
    truth[0, 4:6, 4:6] = 1
    empty = logits_of(torch.zeros_like(truth))
    assert grades(empty, truth, "dice").tolist() == [0.0, 1.0]
    assert grades(empty, truth, "pixel_accuracy")[0] > 0.98
    assert grades(logits_of(truth), truth, "dice").tolist() == [1.0, 1.0]


def test_a_pixel_with_low_confidence_in_both_views_is_flipped_or_left_out():
    strong, weak = logits_of(torch.ones(1, 1, 1).long(), 2), logits_of(torch.zeros(1, 1, 1).long(), 2)
    for right_strong, right_weak, expected in [(0.25, 0.2, 0), (0.35, 0.2, 1), (0.2, 0.35, 0)]:
        views = (strong, torch.full((1, 1, 1), right_strong)), (weak, torch.full((1, 1, 1), right_weak))
        labels, confidence = reliable_labels(*views, 0.3)
        assert labels.item() == expected and confidence.item() == pytest.approx(max(right_strong, right_weak))
    three = logits_of(torch.ones(1, 1, 1).long(), 3)
    labels, _ = reliable_labels((three, torch.full((1, 1, 1), 0.1)), (three, torch.full((1, 1, 1), 0.2)), 0.3)
    assert labels.item() == -1


@pytest.mark.parametrize("trust, accepted", [(0.75, 0.0), (0.76, 1.0)])
def test_a_slice_is_trained_on_only_above_the_least_confidence_in_its_structures(trust, accepted):
    class Fixed(AssessedNetwork):
        def assess(self, x):
            logits, right, features = super().assess(x)
            logits = logits + logits_of(torch.zeros_like(right).long())
            logits[:, 1, :4, :4] += 16  # the only structure is a sixty-fourth of the slice
            right = torch.full_like(right, 9.0)  # nothing is as certain as the background
            right[:, :4, :4] = math.log(trust / (1 - trust))
            return logits, right, features

    method = hssf(min_slice_confidence=float(torch.sigmoid(torch.tensor(math.log(3.0)))))
    weak = torch.rand(2, 1, 32, 32)
    loss, share = method.pseudo_loss(Fixed("unet", 3, size=32), weak, weak)
    assert share == accepted and (float(loss.detach()) > 0) == bool(accepted)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_unsupervised_term_trains_what_it_is_meant_to(name):
    torch.manual_seed(0)
    network = AssessedNetwork(name, 3, size=32)
    weak = torch.rand(2, 1, 32, 32) * 2 - 1
    loss, share = hssf(min_slice_confidence=0.0, min_pixel_confidence=0.0, perturbation=False).pseudo_loss(
        network, weak, weak + 0.1
    )
    assert share == 1
    moved = {key for key, value in zip(*_gradients(network, loss), strict=True) if value}
    assert any(key.startswith("body") for key in moved) and any(key.startswith("classifier") for key in moved)
    assert not any(
        key.startswith("assessment") for key in moved
    )  # the confidence is not trained on its own pseudo-labels
    logits, _, features = network.assess(weak)
    moved = _gradients(network, perturbation_loss(logits, network.perturbed(features), torch.ones(2)))[1]
    assert any(moved)
    logits, right, _ = network.assess(weak)
    keys, moved = _gradients(network, assessment_loss(right, torch.rand(2, 32, 32) > 0.5))
    assert any(m for k, m in zip(keys, moved, strict=True) if k.startswith("body"))


def _gradients(network, loss):
    names, values = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, values, allow_unused=True)
    return names, [gradient is not None and bool(gradient.abs().max() > 0) for gradient in found]


def test_confidence_is_that_in_the_structures_of_either_view():
    weak = torch.zeros(3, 4, 4).long()
    strong = weak.clone()
    strong[0, 0, :2], weak[0, 0, 1:3], weak[1, 0, 0], weak[1, 1] = 1, 1, 1, 2
    confidence = torch.ones(3, 4, 4)
    strong[1] = weak[1]
    confidence[0, 0] = torch.tensor([0.3, 0.6, 0.9, 0.0])  # of which the views agree on the second and the last
    confidence[1, 0, 0], confidence[1, 1] = 0.2, 0.4  # a small structure counts as much as a large one
    found = foreground_confidence((logits_of(strong), logits_of(weak)), confidence)
    torch.testing.assert_close(found, torch.tensor([0.2, 0.3, 0.0]))


def test_the_assessor_is_as_good_as_it_knows_right_from_wrong_structures():
    truth = torch.zeros(1, 4, 4).long()
    truth[0, :2, :2] = 1
    found = truth.clone()
    found[0, 0, 0], found[0, 3, 3], found[0, 3, 2] = 0, 1, 2  # three of six pixels that matter are wrong
    trusting = torch.full((1, 4, 4), 3.0)
    assert assessor_accuracy(trusting, found, truth) == 0.5
    knowing = torch.where(found == truth, 1.0, -1.0)
    assert assessor_accuracy(knowing, found, truth) == 1.0
    knowing[0, 0, 0] = 1.0
    assert assessor_accuracy(knowing, found, truth) == pytest.approx((1 + 2 / 3) / 2)
    assert assessor_accuracy(trusting, truth, truth) == 1.0  # nothing is wrong
    assert assessor_accuracy(trusting, truth * 0, truth * 0) == 0.0  # nothing can be told


@pytest.mark.parametrize("colour, channels", [(False, 1), (False, 4), (True, 3)])
def test_a_strong_view_has_other_intensities_and_a_large_square_missing(colour, channels):
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(40, channels, 32, 32, generator=rng) * 2 - 1
    kept = images.clone()
    view = StrongView(operations=2, cutout=0.5, colour=colour)
    first, again = (view.of(images, rng=torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again) and torch.equal(images, kept) and first.abs().max() <= 1
    grey = (first == 0).all(1)
    sides = [int(rows.any(1).sum()) for rows in grey]
    assert all(8 <= side <= 16 for side in sides) and len(set(sides)) > 4
    assert all(int(rows.sum()) >= side**2 for rows, side in zip(grey, sides, strict=True))
    unchanged = StrongView(operations=0, cutout=0.0, colour=colour).of(images, rng=rng)
    far = [float((a - b).abs().median()) for a, b in zip(first, images, strict=True)]
    assert float((unchanged - images).abs().max()) <= 0.2 + 1e-6 and sum(distance > 0.2 for distance in far) >= 8


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_change_of_intensity_stays_finite_and_at_its_place(operation):
    rng = torch.Generator().manual_seed(0)
    shown = torch.rand(3, 2, 16, 16, generator=rng)
    shown[0] = 0.4  # without any contrast
    for strength in (0.0, 0.5, 1.0):
        found = operation(shown, torch.full((3, 1, 1, 1), strength))
        assert found.shape == shown.shape and torch.isfinite(found).all()
        flipped = operation(shown.flip(-1), torch.full((3, 1, 1, 1), strength))
        torch.testing.assert_close(found.flip(-1), flipped)


def test_equalised_slices_have_equally_many_pixels_at_every_grey_level():
    shown = (torch.arange(256.0).view(1, 1, 16, 16) / 255) ** 3
    found = equalise(shown, torch.zeros(1, 1, 1, 1)).flatten().sort().values
    assert found[0] == 0 and found[-1] == 1 and (found - torch.linspace(0, 1, 256)).abs().max() < 0.2


def test_both_ends_draw_the_same_views_and_every_round_others():
    here, there = (hssf().public_views(site()) for _ in range(2))
    assert (len(here), len(here.fitted), len(here.exchanged), here.batches(5)) == (12, 9, 3, 3)

    def views_of(public, number=3, phase=FUSION, epoch=0, batches=2):
        return [
            (batch.images, batch.truth, batch.index)
            for kind in (public.fitted_views, public.exchanged_views)
            for batch in kind(number, phase=phase, epoch=epoch, batches=batches)
        ]

    np.random.seed(5)
    first = views_of(here)
    np.random.seed(6)
    second = views_of(there)
    assert [len(images) for images, *_ in first] == [5, 4, 2, 1]
    for here_batch, there_batch in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here_batch, there_batch, strict=True))
    assert sorted(torch.cat([index for *_, index in first[:2]]).tolist()) == list(range(9))
    for changes in ({"number": 4}, {"phase": CONDENSATION}, {"epoch": 1}):
        for one, other in zip(first, views_of(here, **changes), strict=True):
            assert not torch.equal(one[0], other[0])
    # Graded in batches of another size than those that are distilled, the views are the same.
    whole = views_of(here, batches=1)[1]
    split = torch.cat([images for images, *_ in first[2:]])
    assert torch.equal(whole[0], split) and whole[2].tolist() == torch.cat([index for *_, index in first[2:]]).tolist()


@pytest.mark.parametrize(
    "count, share, exchanged", [(12, 0.25, 3), (12, 0.0, 12), (3, 0.01, 1), (3, 1.0, 2), (1, 0.5, 1)]
)
def test_some_slices_are_left_to_fit_and_some_to_compare(count, share, exchanged):
    assert exchanged_count(count, share) == exchanged
    public = hssf(held_out=share).public_views(site(count=12)) if count == 12 else None
    if public is not None:
        assert len(public) == 12 and len(public.exchanged) == exchanged
        assert np.array_equal(public.exchanged.images, site().images[-exchanged:])


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_share_of_the_fitted_slices_is_shown_in_strong_views(share):
    public = hssf(strong_share=share, public_slices=40).public_views(site(count=40))
    images = next(public.fitted_views(1, phase=FUSION, epoch=0, batches=1)).images
    cut = (images == 0).flatten(1).float().mean(1) > 1 / 20  # no picture has exactly this grey in so many pixels
    assert float(cut.float().mean()) == pytest.approx(share, abs=0.2 if 0 < share < 1 else 0)


def test_nothing_is_fitted_to_the_labels_of_slices_that_are_exchanged():
    method, public = hssf(), site()
    public.candidates[-3:] = 4  # other labels on the part that is held out
    given = method.public_views(public)
    found = [method.fresh_network("unet") for _ in range(2)]
    for network, data in zip(found, (given, method.public_views(site())), strict=True):
        method.train_on_public_slices(method.trainee_of(network), data, number=1, phase=FUSION, teacher=None)
    assert all(torch.equal(a, b) for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True))


@pytest.mark.parametrize("name", ["hssf", "lssl"])
def test_self_training_begins_when_the_assessor_is_good_enough_on_held_out_slices(name, monkeypatch):
    seen = []

    def accuracy(self, network, public, number):
        assert not self.warming_up(number) and len(public.exchanged) == 3
        seen.append(number)
        return 0.69 if number == 2 else 0.71

    monkeypatch.setattr(PublicSliceMethod, "assessor_accuracy", accuracy)
    alone = {"exchange": False} if name == "hssf" else {}
    method = hssf(name, warmup=0.25, min_assessor_accuracy=0.7, **alone)
    used = []
    monkeypatch.setattr(method, "pseudo_loss", lambda network, weak, strong: (used.append(1), (weak.sum() * 0, 1.0))[1])
    found = []
    for number in (1, 2, 3):
        used.clear()
        update = method.train_round(site_round_of(method, site("none"), number=number))
        found.append((len(used), update.numbers.get("assessor")))
    assert found == [(0, None), (0, 0.69), (CONFIG.updates, 0.71)] and seen == [2, 3]
    without = hssf(name, unlabelled=0.0)
    assert "assessor" not in without.train_round(site_round_of(without, site("none"), number=3)).numbers


def test_a_round_in_which_every_slice_is_rejected_leaves_the_network_as_the_public_slices_made_it():
    weights = []
    for options in ({"min_slice_confidence": 1.0, "min_assessor_accuracy": 0.0}, {"unlabelled": 0.0}):
        method = hssf("lssl", **options)
        site_round = site_round_of(method, site("none"), number=3)
        update = method.train_round(site_round)
        assert update.numbers["accepted"] == 0 and update.samples
        weights.append(site_round.model.state_dict())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_the_assessor_is_tested_on_strong_views_of_held_out_slices():
    method = hssf()
    public = method.public_views(site())
    network = method.fresh_network("unet")
    views = list(public.exchanged_views(3, phase=FUSION, epoch=0, batches=1))
    network.eval()
    with torch.no_grad():
        logits, right, _ = network.assess(views[0].images)
    expected = assessor_accuracy(right, logits.argmax(1), views[0].truth)
    network.train()
    assert method.assessor_accuracy(network, public, 3) == pytest.approx(expected) and network.training


def test_a_teachers_probabilities_follow_from_its_margins():
    logits = torch.randn(2, 3, 16, 16) * 2
    back = from_margins(to_margins(logits, 1), 16)
    for temperature in (1.0, 2.0):
        expected = torch.softmax(logits / temperature, 1)
        torch.testing.assert_close(torch.softmax(back / temperature, 1), expected, atol=2e-3, rtol=0)
    assert to_margins(logits, 2).shape == (2, 2, 8, 8) and to_margins(logits, 2).dtype == torch.float16
    # The bound hides how confident a network is on its training slices.
    assert to_margins(logits * 1000, 1).abs().max() <= 10


@pytest.mark.parametrize("source, label", [("weak", 1), ("both", 2)])
def test_pseudo_labels_are_those_of_the_weak_view_unless_told_otherwise(source, label, monkeypatch):
    class Fixed(AssessedNetwork):
        def assess(self, x):
            logits, right, features = super().assess(x)
            strong = x.mean() > 0  # the strong view finds another structure, and is more confident in it
            logits = logits + logits_of(torch.full_like(right, 2 if strong else 1).long())
            return logits, torch.full_like(right, 5.0 if strong else 1.0), features

    seen = []
    monkeypatch.setattr(
        "fedfactory.adaptation.methods.public_slice_method.segmentation_loss",
        lambda logits, truth, gate: (seen.append(truth), logits.sum() * 0)[1],
    )
    method = hssf(perturbation=False, pseudo_labels=source)
    method.pseudo_loss(Fixed("unet", 3, size=32), torch.full((2, 1, 32, 32), -0.5), torch.full((2, 1, 32, 32), 0.5))
    assert len(seen) == 2 and all(set(truth.unique().tolist()) == {label} for truth in seen)


def test_views_of_an_unlabelled_slice_show_the_same_pixels():
    method = hssf()
    site_round = site_round_of(method, site("none"))
    np.random.seed(0)
    weak, strong = method._two_views(site_round, np.arange(8))
    assert not torch.equal(weak, strong)
    same = hssf(operations=0, cutout=0.0)._two_views(site_round, np.arange(8))  # noise alone
    for weak_view, strong_view in zip(*(views[:, 0] for views in same), strict=True):
        assert np.corrcoef(weak_view.flatten() > -0.5, strong_view.flatten() > -0.5)[0, 1] > 0.8
    assert float((strong == 0).float().mean()) > 1 / 16  # the smallest square has a quarter of the side


def test_predictions_leave_the_site_and_the_network_does_not():
    method = hssf()
    model = method.build()
    names = set(model.state_dict())
    assert names == {"margins", "grades", "round"} and not list(model.parameters())
    site_round = site_round_of(method, site("none"), model=model)
    site_round.network = "segresnet"
    report = method.train_round(site_round)
    assert set(model.state_dict()) == names and model.margins.abs().max() > 0
    assert report.samples == 12 and math.isfinite(report.loss)
    own = method.segmenter(model, SiteContext(network="segresnet"), site_round.state)
    kept = {name: value.clone() for name, value in own.state_dict().items()}
    again = site_round_of(method, site("none"), model=model, state=site_round.state)
    again.network = "segresnet"
    assert all(torch.equal(kept[name], value) for name, value in method.trainee_at(again).network.state_dict().items())
    again.network = "unet"
    with pytest.raises(NodeDataError, match="network is unet; this site has trained a segresnet"):
        method.train_round(again)


def test_the_bytes_sent_do_not_depend_on_the_network():
    small = hssf().build().state_dict()
    assert sum(value.nbytes for value in small.values()) < 3 * 2 * 16 * 16 * 2 + 200  # of the held-out quarter


def test_the_best_site_is_the_teacher_and_a_tie_goes_to_the_first():
    method = hssf(stride=1, held_out=0.0)
    public = method.public_views(method.public)
    truth = torch.zeros(12, 32, 32).long()
    for batch in public.exchanged_views(1, phase=CONDENSATION, epoch=0, batches=3):
        truth[batch.index] = batch.truth
    perfect = to_margins(logits_of(truth), 1)[None]
    half = perfect.clone()
    half[:, :6] = -8.0  # all background
    sent = {0: {"margins": half}, 1: {"margins": perfect}, 2: {"margins": perfect}}
    best = method._best_teachers(list(sent), sent.__getitem__, public=public, number=1)
    assert best.site[0].tolist() == [1] * 6 + [0] * 6 and best.grade.tolist() == [[1.0] * 12]
    assert torch.equal(best.margins, perfect)


@pytest.mark.parametrize("mine, theirs, distilled", [(0.8, 0.86, 1.0), (0.9, 0.86, 0.0), (0.86, 0.86, 0.0)])
def test_only_a_better_teacher_is_distilled(mine, theirs, distilled, monkeypatch):
    method = hssf()
    batch = next(method.public_views(site()).exchanged_views(1, phase=FUSION, epoch=0, batches=1))
    monkeypatch.setattr("fedfactory.adaptation.methods.hssf.grades", lambda z, y, kind: torch.full((len(z),), mine))
    teacher = Teacher(logits_of(batch.truth), torch.full((3,), theirs))
    loss, share = method.distillation_loss(AssessedNetwork("unet", 3, size=32), batch, teacher)
    assert share == distilled and (float(loss.detach()) > 0) == bool(distilled)


def test_the_researcher_learns_from_sites_and_answers_for_the_next_round():
    method = hssf(min_teacher_grade=0.0)
    before = method.build().state_dict()
    site_rounds = [site_round_of(method, site("none", seed=n), index=n) for n in range(2)]
    site_updates = {n: method.train_round(site_round) for n, site_round in enumerate(site_rounds)}
    assert method.server is None
    after, shares = method.aggregate(site_updates, lambda n: site_rounds[n].model.state_dict(), before)
    assert int(after["round"]) == 2 and after["grades"].min() >= 0 and after["margins"].abs().max() > 0
    assert sum(shares.values()) == pytest.approx(1) and method.server is not None
    again = hssf(min_teacher_grade=0.0)
    repeated, _ = again.aggregate(site_updates, lambda n: site_rounds[n].model.state_dict(), before)
    assert all(torch.equal(after[name], repeated[name]) for name in after)
    same, shares = method.aggregate({0: SiteUpdate(0, math.nan)}, None, before)
    assert same == before and shares == {0: 0.0}
    broken = {**site_rounds[0].model.state_dict(), "margins": torch.full_like(before["margins"], torch.nan)}
    with pytest.raises(FederationError, match="site 1 sent NaN"):
        method.aggregate({0: site_updates[0]}, lambda n: broken, before)


def test_sites_without_labels_learn_together():
    options = {**OPTIONS, "public_epochs": 3}
    method = make_method(replace(CONFIG, method="hssf", rounds=3, updates=4, learning_rate=4e-3, options=options))
    method.public = site()
    state, models = method.build().state_dict(), [method.build() for _ in range(2)]
    states = [method.new_state() for _ in range(2)]
    data = [site("none", seed=5 + n) for n in range(2)]
    for number in range(1, 4):
        site_updates = {}
        for n, model in enumerate(models):
            model.load_state_dict(state)
            site_round = site_round_of(method, data[n], model=model, state=states[n], index=n, number=number)
            site_round.network = ("unet", "segresnet")[n]
            site_updates[n] = method.train_round(site_round)
        state, _ = method.aggregate(site_updates, lambda n: models[n].state_dict(), state)
    images, truth = site(seed=9).images, torch.from_numpy(np.log2(site(seed=9).candidates).astype(int))
    for n, name in enumerate(("unet", "segresnet")):
        network = method.segmenter(models[n], SiteContext(network=name), states[n]).eval()
        with torch.no_grad():
            assert grades(network(torch.from_numpy(images)), truth, "dice").mean() > 0.3  # without any label of its own


def test_lssl_averages_equal_networks():
    method = hssf("lssl")
    site_rounds = [site_round_of(method, site("none", seed=n), index=n) for n in range(2)]
    before = copy.deepcopy(site_rounds[0].model.state_dict())
    site_updates = {n: method.train_round(site_round) for n, site_round in enumerate(site_rounds)}
    after, shares = method.aggregate(site_updates, lambda n: site_rounds[n].model.state_dict(), before)
    assert shares == {0: 0.5, 1: 0.5} and method.has_average
    name = "classifier.2.weight"
    a, b = (site_round.model.state_dict()[name] for site_round in site_rounds)
    torch.testing.assert_close(after[name], (a + b) / 2)


def test_without_exchange_nothing_leaves_the_site():
    method = hssf(exchange=False)
    site_round = site_round_of(method, site("none"))
    method.train_round(site_round)
    assert method.local_parameters(site_round.model) == set(site_round.model.state_dict()) and not method.has_average
    assert site_round.model.margins.numel() == 0 and site_round.state.weights


def test_public_slices_that_do_not_fit_are_refused():
    method = hssf()
    site_round = site_round_of(method, site("none"))
    site_round.public = None
    with pytest.raises(NodeDataError, match="needs public slices"):
        method.train_round(site_round)
    site_round.public = site(count=5)
    with pytest.raises(NodeDataError, match="5 public slices; it must have the researcher's 12"):
        method.train_round(site_round)
    site_round.public = site("none")
    with pytest.raises(NodeDataError, match="dense labels"):
        method.train_round(site_round)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"network": "vgg"}, "network is 'vgg'"),
        ({"send": "weights"}, "must be settings of hssf"),  # a site that approved predictions sends no weights
        ({"grade": "iou"}, "grade is 'iou'; choose one of"),
        ({"stride": 3}, "stride is '3'; choose one of 1, 2, 4"),
        ({"min_pixel_confidence": 1.5}, "from 0 to 1"),
        ({"temperature": 0}, "temperature is 0; it must be positive"),
        ({"pseudo_labels": "strong"}, "pseudo_labels is 'strong'; choose one of weak, both"),
        ({"cutout": 1.1}, "cutout is 1.1; choose from 0 to 1"),
        ({"held_out": -0.1}, "held_out is -0.1; choose from 0 to 1"),
        ({"strong_share": 2}, "strong_share is 2"),
        ({"operations": -1}, "operations is -1; it must be at least 0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        hssf(**options)
