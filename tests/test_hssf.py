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
    distillation,
    grades,
    perturbation_loss,
    reliable_labels,
    segmentation_loss,
)
from fedfactory.adaptation.methods.interface.site_round import SiteContext, SiteUpdate
from fedfactory.adaptation.methods.public_exchange import CONDENSATION, FUSION, from_margins, to_margins
from fedfactory.adaptation.methods.public_slice_method import Teacher
from fedfactory.adaptation.methods.registry import make_method
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
    assert float(perturbation_loss(z, z + 0.5)) == pytest.approx(0.125)
    assert float(perturbation_loss(z, z)) == 0


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
def test_a_slice_is_trained_on_only_above_the_least_confidence(trust, accepted):
    class Fixed(AssessedNetwork):
        def assess(self, x):
            logits, right, features = super().assess(x)
            return logits, torch.full_like(right, math.log(trust / (1 - trust))), features

    method = hssf(perturbation=False, min_slice_confidence=float(torch.sigmoid(torch.tensor(math.log(3.0)))))
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
    moved = _gradients(network, perturbation_loss(logits, network.perturbed(features)))[1]
    assert any(moved)
    logits, right, _ = network.assess(weak)
    keys, moved = _gradients(network, assessment_loss(right, torch.rand(2, 32, 32) > 0.5))
    assert any(m for k, m in zip(keys, moved, strict=True) if k.startswith("body"))


def _gradients(network, loss):
    names, values = zip(*network.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, values, allow_unused=True)
    return names, [gradient is not None and bool(gradient.abs().max() > 0) for gradient in found]


def test_both_ends_draw_the_same_views_and_every_round_others():
    here, there = (hssf().public_views(site()) for _ in range(2))
    np.random.seed(5)
    first = [(b.images, b.truth, b.index) for b in here.views(3, phase=FUSION, epoch=0, batch_size=5)]
    np.random.seed(6)
    second = [(b.images, b.truth, b.index) for b in there.views(3, phase=FUSION, epoch=0, batch_size=5)]
    assert [len(images) for images, *_ in first] == [5, 5, 2]
    for here_batch, there_batch in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here_batch, there_batch, strict=True))
    assert sorted(torch.cat([index for *_, index in first]).tolist()) == list(range(12))
    for number, phase, epoch in [(4, FUSION, 0), (3, CONDENSATION, 0), (3, FUSION, 1)]:
        other = next(here.views(number, phase=phase, epoch=epoch, batch_size=5))
        assert not torch.equal(other.images, first[0][0])


def test_a_teachers_probabilities_follow_from_its_margins():
    logits = torch.randn(2, 3, 16, 16) * 2
    back = from_margins(to_margins(logits, 1), 16)
    for temperature in (1.0, 2.0):
        expected = torch.softmax(logits / temperature, 1)
        torch.testing.assert_close(torch.softmax(back / temperature, 1), expected, atol=2e-3, rtol=0)
    assert to_margins(logits, 2).shape == (2, 2, 8, 8) and to_margins(logits, 2).dtype == torch.float16
    # The bound hides how confident a network is on its training slices.
    assert to_margins(logits * 1000, 1).abs().max() <= 10


def test_views_of_an_unlabelled_slice_show_the_same_pixels():
    method = hssf()
    site_round = site_round_of(method, site("none"))
    np.random.seed(0)
    weak, strong = method._two_views(site_round, np.arange(8))
    assert not torch.equal(weak, strong)
    for weak_view, strong_view in zip(weak[:, 0], strong[:, 0], strict=True):
        assert np.corrcoef(weak_view.flatten() > -0.5, strong_view.flatten() > -0.5)[0, 1] > 0.8


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
    assert sum(value.nbytes for value in small.values()) < 12 * 2 * 16 * 16 * 2 + 200


def test_the_best_site_is_the_teacher_and_a_tie_goes_to_the_first():
    method = hssf(stride=1)
    public = method.public_views(method.public)
    truth = torch.zeros(12, 32, 32).long()
    for batch in public.views(1, phase=CONDENSATION, epoch=0, batch_size=CONFIG.batch_size):
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
    batch = next(method.public_views(site()).views(1, phase=FUSION, epoch=0, batch_size=4))
    monkeypatch.setattr("fedfactory.adaptation.methods.hssf.grades", lambda z, y, kind: torch.full((len(z),), mine))
    teacher = Teacher(logits_of(batch.truth), torch.full((4,), theirs))
    _, share = method.public_loss(AssessedNetwork("unet", 3, size=32), batch, teacher)
    assert share == distilled


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
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        hssf(**options)
