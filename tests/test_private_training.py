"""Differential privacy per patient: clipping, sampling, noise, what is spent and kept, and what a site reports."""

from __future__ import annotations

import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.labels.candidate_labels import candidate_masks
from fedfactory.adaptation.losses.partial_losses import candidate_cross_entropy, loss_per_slice
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.networks.site_network import SiteUNet
from fedfactory.adaptation.privacy import patient_gradients, private_updates
from fedfactory.adaptation.privacy.accounting import epsilon_spent, largest_delta, noise_multiplier
from fedfactory.adaptation.privacy.patient_gradients import clipped_sum
from fedfactory.adaptation.privacy.private_updates import (
    PatientSampling,
    PrivateUpdates,
    patients_of,
    private_gradient,
)
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.errors import ConfigError, NodeDataError, StoreError, UsageError
from fedfactory.node.plans.private_round import PRIVATE_EXPERIMENT, PrivateRound, secret_generator
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection import guarded_round
from fedfactory.node.protection.guarded_round import GuardedRound
from fedfactory.node.protection.privacy_budget import PrivacyBudget
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import method_of, site, site_facts, site_round_of

PRIVATE = {"dp_epsilon": 8.0}
CONFIG = MethodConfig(
    method="fedavg", classes=3, size=32, sites=1, rounds=2, updates=2, batch_size=2, width=4, **PRIVATE
)
CLIP = 0.01  # far below the gradients' norms, so that clipping shows


def rng(seed=0):
    return np.random.default_rng(seed)


def slices_of_patients(patients=4, each=3, kind="dense"):
    data = site(kind, count=patients * each)
    return replace(data, patients=np.repeat(np.arange(patients), each))


def small_network(dtype=torch.float64):
    torch.manual_seed(3)
    return SiteUNet(3, width=4, depth=5, norm="group").to(dtype).train()


def tiny_network(dtype=torch.float64):
    torch.manual_seed(3)
    layers = [torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.LeakyReLU(inplace=True)]
    return torch.nn.Sequential(*layers, torch.nn.Conv2d(4, 3, 1)).to(dtype)


def batch(data, chosen, dtype=torch.float64):
    candidates = torch.from_numpy(data.candidates[chosen].astype(np.int64))
    return torch.from_numpy(data.images[chosen]).to(dtype), candidate_masks(candidates, 3)


def norm_of(gradients):
    return math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients))


def reference_sum(model, batches, clip):
    """The same by plain autograd, one patient at a time."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for images, allowed in batches:
        losses = [loss_per_slice(model(images[n : n + 1]), allowed[n : n + 1]).sum() for n in range(len(images))]
        gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters)
        scale = min(1.0, clip / norm_of(gradients))
        total = [summed + scale * gradient for summed, gradient in zip(total, gradients, strict=True)]
    return total


@pytest.fixture
def guard():
    """A round of a site that limits single experiments alone."""
    with guarded_round.begin(GuardedRound(policy=Policy(most_epsilon=None), secret=b"s" * 32)) as round_:
        yield round_


# Gradients


@pytest.mark.parametrize("clip", [CLIP, 1e3])
def test_clipped_gradients_are_those_of_plain_autograd_patient_by_patient(clip, monkeypatch):
    """Of the real network: Opacus' own rule for convolutions fails here, where PyTorch orders memory channels last."""
    monkeypatch.setattr(patient_gradients, "SLICES_AT_ONCE", 4)  # two chunks
    data, model = slices_of_patients(patients=3, each=2), small_network()
    batches = [batch(data, indices) for indices in patients_of(data)]
    found, expected = clipped_sum(model, batches, clip), reference_sum(model, batches, clip)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


def test_one_patient_changes_the_sum_by_the_clipping_norm_and_no_more():
    """Slices of one patient that were clipped singly would change it by three times as much."""
    data, model = slices_of_patients(), tiny_network()
    batches = [batch(data, indices) for indices in patients_of(data)]
    everybody = clipped_sum(model, batches, CLIP)
    for left_out in range(len(batches)):
        others = clipped_sum(model, batches[:left_out] + batches[left_out + 1 :], CLIP)
        change = norm_of([a - b for a, b in zip(everybody, others, strict=True)])
        assert change == pytest.approx(CLIP, rel=1e-6)


def test_one_patient_changes_the_sum_no_more_when_slices_are_drawn_and_augmented():
    """The others' slices, their augmentation and their presence are the same with and without a patient."""
    method = method_of("fedavg", **PRIVATE)
    data, model = slices_of_patients(patients=5), tiny_network(torch.float32)
    round_ = site_round_of(method, data, model=model)
    sampling = PatientSampling(patients=5, rate=0.7, slices=2)
    changed = replace(data, images=data.images.copy())
    changed.images[3:6] = 1 - changed.images[3:6]  # patient 1 has other images

    def total(slices, seed):
        private = PrivateUpdates(noise=1e-300, rng=rng(seed))
        patients = patients_of(slices)
        round_.data = slices
        gradients = private_gradient(
            model, patients, sampling, private, clip=CLIP, batch_of=lambda chosen: method.batch(round_, chosen)
        )
        return [gradient * sampling.expected for gradient in gradients]

    changes = [norm_of([a - b for a, b in zip(total(data, s), total(changed, s), strict=True)]) for s in range(6)]
    assert max(changes) <= 2 * CLIP * (1 + 1e-4)  # one removed, one added
    assert max(changes) > 0 and min(changes) == 0  # a patient who was not drawn changes nothing


def test_a_patient_whose_gradient_is_not_finite_counts_as_nothing():
    data, model = slices_of_patients(patients=2), tiny_network()
    images, allowed = batch(data, np.arange(3))
    whole = clipped_sum(model, [(images, allowed)], CLIP)
    both = clipped_sum(model, [(images, allowed), (images * math.nan, allowed)], CLIP)
    assert norm_of(both) == pytest.approx(CLIP)
    assert all(torch.allclose(a, b) for a, b in zip(whole, both, strict=True))


def test_the_model_is_as_before_after_its_gradients_were_taken():
    data, model = slices_of_patients(), tiny_network()
    before = [getattr(module, "inplace", None) for module in model.modules()]
    clipped_sum(model, [batch(data, np.arange(3))], CLIP)
    assert before == [getattr(module, "inplace", None) for module in model.modules()] and True in before
    assert not any(hasattr(value, "grad_sample") or value.grad is not None for value in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_the_loss_of_a_slice_depends_on_no_other_slice_and_is_cross_entropy_plus_dice():
    torch.manual_seed(0)
    _, allowed = batch(slices_of_patients(), np.arange(4))
    allowed[0, :, :8] = False  # nobody annotated these
    logits = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    losses = loss_per_slice(logits, allowed)
    for number in range(4):
        alone = loss_per_slice(logits[number : number + 1], allowed[number : number + 1])
        torch.testing.assert_close(losses[number : number + 1], alone)
        found, truth = torch.softmax(logits[number], 0), allowed[number].double()
        found = found * truth.sum(0)
        dice = 2 * (found * truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2)))
        expected = candidate_cross_entropy(logits[number : number + 1], allowed[number : number + 1]) + 1 - dice.mean()
        assert float(losses[number]) == pytest.approx(float(expected))
    logits.requires_grad_()
    loss_per_slice(logits, allowed).sum().backward()
    assert logits.grad.isfinite().all()


# Sampling and noise


def test_updates_have_as_many_slices_as_the_batch_size_on_average():
    for patients, batch_size in [(40, 12), (40, 40), (10, 40), (3, 10), (1, 1000)]:
        sampling = PatientSampling.of(patients, batch_size)
        assert 0 < sampling.rate <= 1
        slices = sampling.expected * sampling.slices
        assert slices == pytest.approx(min(batch_size, 16 * patients), abs=patients)
    assert PatientSampling.of(40, 12) == PatientSampling(patients=40, rate=0.3, slices=1)


def test_every_patient_comes_into_an_update_with_the_rate_independently_of_the_others(monkeypatch):
    drawn = []
    monkeypatch.setattr(private_updates, "clipped_sum", lambda *_: [])
    data, sampling = slices_of_patients(patients=6), PatientSampling(patients=6, rate=0.3, slices=1)
    numbers = rng()

    def batch_of(chosen):
        present[data.patients[chosen[0]]] = 1

    for _ in range(200):
        present = np.zeros(6)
        private_gradient(None, patients_of(data), sampling, PrivateUpdates(noise=1.0, rng=numbers), clip=1.0,
                         batch_of=batch_of)  # fmt: skip
        drawn.append(present)
    counts = np.array(drawn)
    deviation = math.sqrt(0.3 * 0.7 / 200)
    assert np.abs(counts.mean(0) - 0.3).max() < 4 * deviation
    assert counts.sum(1).var() == pytest.approx(6 * 0.3 * 0.7, rel=0.5)  # of a fixed number of patients it is 0
    correlation = np.corrcoef(counts.T) - np.eye(6)
    assert np.abs(correlation).max() < 4.5 / math.sqrt(200)


def test_an_update_without_patients_is_noise_of_the_stated_deviation():
    data, sampling = slices_of_patients(), PatientSampling(patients=4, rate=1e-9, slices=1)
    private = PrivateUpdates(noise=1.7, rng=rng())
    gradients = private_gradient(small_network(), patients_of(data), sampling, private, clip=0.5, batch_of=None)
    noise = torch.cat([gradient.flatten() for gradient in gradients]) * sampling.expected
    assert len(noise) > 100_000
    assert float(noise.std()) == pytest.approx(1.7 * 0.5, rel=0.01)
    assert abs(float(noise.mean())) < 4 * 1.7 * 0.5 / math.sqrt(len(noise))
    kurtosis = float((noise / noise.std()).pow(4).mean())
    assert kurtosis == pytest.approx(3, abs=0.1)


def test_noise_never_repeats_though_secret_and_settings_do():
    first, second = (secret_generator(b"s" * 32).standard_normal(4) for _ in range(2))
    assert not np.intersect1d(first, second).size
    # Why it is not PyTorch's generator: seeds that differ by 2^32 give the same numbers, so all could be tried.
    one, other = (torch.randn(3, generator=torch.Generator().manual_seed(7 + n * 2**32)) for n in (0, 1))
    assert torch.equal(one, other)


# Rounds of the methods


def private_round_of(method, data, **given):
    round_ = site_round_of(method, data, **given)
    round_.private = PrivateUpdates(noise=0.5, rng=rng())
    return round_


@pytest.mark.parametrize("name", ["fedavg", "fedprox", "fedbn"])
def test_a_private_round_trains_all_weights_and_reports_no_loss(name):
    method = method_of(name, **PRIVATE)
    round_ = private_round_of(method, slices_of_patients())
    before = {key: value.clone() for key, value in round_.model.state_dict().items()}
    update = method.train_round(round_)
    assert update.samples == 12 and math.isnan(update.loss)
    assert all(not torch.equal(before[key], value) for key, value in round_.model.state_dict().items())


def test_the_proximal_term_is_added_without_clipping_and_noise():
    data, rate = slices_of_patients(), 1e-6
    ends = {}
    for mu in (0.0, 1 / rate):
        method = method_of("fedprox", **PRIVATE, updates=2, learning_rate=rate)
        method.options = replace(method.options, proximal=mu)
        round_ = private_round_of(method, data)
        round_.optimizers = {"all": torch.optim.SGD(round_.model.parameters(), rate)}
        before = {key: value.clone() for key, value in round_.model.named_parameters()}
        method.train_round(round_)
        ends[mu] = norm_of([value.detach() - before[key] for key, value in round_.model.named_parameters()])
    assert ends[1 / rate] < 0.9 * ends[0.0]  # a clipped term would hardly pull


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": "batch"}, "norm is batch"),
        ({"method": "fedmix"}, "method is 'fedmix'"),
        ({"method": "local"}, "needs one of fedavg, fedprox, fedbn"),
        ({"dp_epsilon": 0.0}, "dp_epsilon is 0.0"),
        ({"dp_epsilon": math.inf}, "dp_epsilon is inf"),
        ({"dp_epsilon": "8"}, "dp_epsilon is '8'"),
        ({"dp_clip": -1.0}, "dp_clip is -1.0"),
        ({"dp_delta": 1.0}, "dp_delta is 1.0"),
        ({"dp_epsilon": None, "dp_delta": 0.1}, "without dp_epsilon"),
    ],
)
def test_settings_that_would_void_the_guarantee_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(CONFIG, **changes)


def test_labels_that_are_not_dense_and_slices_of_unknown_patients_are_refused():
    method = method_of("fedavg", **PRIVATE)
    with pytest.raises(NodeDataError, match="box labels; differential privacy needs dense"):
        method.train_round(private_round_of(method, slices_of_patients(kind="box")))
    with pytest.raises(NodeDataError, match="patients of the slices are not known"):
        method.train_round(private_round_of(method, site()))
    with pytest.raises(NodeDataError, match="no noise"):
        method.train_round(site_round_of(method, slices_of_patients()))


# What is spent


def test_epsilon_is_that_of_opacus_for_rounds_of_different_kinds():
    from opacus.accountants import RDPAccountant

    history = [(1.1, 0.2, 10), (1.1, 0.2, 10), (2.5, 1.0, 4), (0.8, 0.05, 30)]
    accountant = RDPAccountant()
    for noise, rate, updates in history:
        for _ in range(updates):
            accountant.step(noise_multiplier=noise, sample_rate=rate)
    assert epsilon_spent(history, 1e-3) == pytest.approx(accountant.get_epsilon(1e-3), rel=1e-2)
    assert epsilon_spent(history, 1e-3) > epsilon_spent(history[:-1], 1e-3)
    assert epsilon_spent([], 1e-3) == 0


def test_epsilon_of_full_batches_is_that_of_one_gaussian_with_less_noise():
    """Without sampling, n updates are one Gaussian mechanism of noise / sqrt(n), whose exact epsilon is known."""
    from scipy.optimize import brentq
    from scipy.stats import norm

    noise, delta = 8.0 / math.sqrt(16), 1e-4

    def exact_delta(epsilon):  # Balle and Wang 2018
        return norm.cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * norm.cdf(-0.5 / noise - epsilon * noise)

    exact = brentq(lambda epsilon: exact_delta(epsilon) - delta, 0.01, 50)
    assert exact <= epsilon_spent([(8.0, 1.0, 16)], delta) < 1.2 * exact  # RDP is an upper bound


@pytest.mark.parametrize(("epsilon", "rate"), [(8.0, 0.3), (3.0, 1.0)])
def test_noise_spends_the_epsilon_that_was_asked_for(epsilon, rate):
    noise = noise_multiplier(epsilon, 1e-3, rate=rate, updates=40)
    assert 0.98 * epsilon <= epsilon_spent([(noise, rate, 40)], 1e-3) <= epsilon
    with pytest.raises(ConfigError, match="no noise is large enough"):
        noise_multiplier(1e-9, 1e-3, rate=1.0, updates=40)


def test_what_is_spent_composes_over_experiments_and_over_a_restart_of_the_process(tmp_path):
    from opacus.accountants import RDPAccountant

    store, costs = tmp_path / "s.store", {"first": (2.0, 0.5, 10), "second": (3.0, 0.25, 20)}
    common = {"delta": 1e-3, "patients": 100, "limit": 50.0, "most": None}
    PrivacyBudget(store).spend("first", costs["first"], **common)
    child = os.fork()
    if not child:
        try:
            PrivacyBudget(store).spend("second", costs["second"], **common)
        finally:
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    spent = PrivacyBudget(store).spent("first", delta=1e-3, patients=100)

    def opacus(*history):
        accountant = RDPAccountant()
        accountant.history = list(history)
        return accountant.get_epsilon(1e-3)

    assert spent.epsilon == pytest.approx(opacus(costs["first"]), rel=1e-2)
    assert spent.epsilon_store == pytest.approx(opacus(*costs.values()), rel=1e-2)
    assert PrivacyBudget(store).path.stat().st_mode & 0o777 == 0o600


def test_a_round_beyond_a_limit_is_refused_before_it_is_noted(tmp_path):
    budget, cost = PrivacyBudget(tmp_path / "s.store"), (2.0, 0.5, 10)
    one = epsilon_spent([cost], 1e-3)
    common = {"delta": 1e-3, "patients": 100}
    budget.spend("a", cost, **common, limit=one, most=None)
    with pytest.raises(NodeDataError, match="trains no more rounds of this experiment"):
        budget.spend("a", cost, **common, limit=one, most=None)
    with pytest.raises(NodeDataError, match="privacy budget of this site's store"):
        budget.spend("b", cost, **common, limit=one, most=1.2 * one)
    assert len(budget.rounds()) == 1
    budget.spend("b", cost, **common, limit=one, most=2 * one)
    assert len(budget.rounds()) == 2


def test_what_a_round_costs_is_on_the_disk_before_it_trains(tmp_path, synced):
    """A power cut must not give the budget back: first the content of the file, then its name."""
    budget = PrivacyBudget(tmp_path / "s.store")
    budget.spend("a", (2.0, 0.5, 10), delta=1e-3, patients=100, limit=50.0, most=None)
    assert synced == [budget.path.stat().st_ino, tmp_path.stat().st_ino]


@pytest.mark.parametrize("text", ["", "[]", '{"rounds": [{}]}', '{"rounds": [{"experiment": "a", "noise": -1.0, '
                                  '"rate": 0.5, "updates": 3}]}', '{"rounds": 3}'])  # fmt: skip
def test_a_damaged_record_is_no_empty_record(tmp_path, text):
    budget = PrivacyBudget(tmp_path / "s.store")
    budget.path.write_text(text)
    with pytest.raises(StoreError, match="damaged"):
        budget.rounds()


def test_delta_is_a_tenth_of_one_over_the_patients_and_a_larger_one_is_refused(tmp_path, guard):
    assert largest_delta(50) == pytest.approx(0.002) and largest_delta(50) < 50**-1.1
    data = slices_of_patients(patients=4)
    assert PrivateRound(CONFIG, tmp_path / "s", data, {}).delta == pytest.approx(1 / 40)
    assert PrivateRound(replace(CONFIG, dp_delta=0.001), tmp_path / "s", data, {}).delta == 0.001
    with pytest.raises(NodeDataError, match=r"dp_delta is 0.1; it must be at most 0.025"):
        PrivateRound(replace(CONFIG, dp_delta=0.1), tmp_path / "s", data, {})


def test_all_planned_rounds_fit_the_budget_exactly_and_one_more_does_not(tmp_path, guard):
    kept: dict = {}
    for _ in range(CONFIG.rounds):
        round_ = PrivateRound(CONFIG, tmp_path / "s", slices_of_patients(), kept)
        round_.begin()
    assert 0.95 * 8 <= guard.private["epsilon"] <= 8 * (1 + 1e-6)
    with pytest.raises(NodeDataError, match="dp_epsilon is 8"):
        PrivateRound(CONFIG, tmp_path / "s", slices_of_patients(), kept).begin()
    # Another experiment of the same store starts from 0, and the store's sum goes on.
    PrivateRound(CONFIG, tmp_path / "s", slices_of_patients(), {}).begin()
    assert guard.private["epsilon"] < 8 < guard.private["epsilon_store"]


def test_a_store_budget_of_the_policy_holds_over_experiments(tmp_path):
    with guarded_round.begin(GuardedRound(policy=Policy(most_epsilon=6.0), secret=b"s" * 32)) as guard:
        PrivateRound(CONFIG, tmp_path / "s", slices_of_patients(), {}).begin()
        assert guard.private["epsilon_store"] <= 6
        with pytest.raises(NodeDataError, match="privacy budget of this site's store"):
            for _ in range(5):
                PrivateRound(CONFIG, tmp_path / "s", slices_of_patients(), {}).begin()


def test_the_default_policy_gives_a_store_one_usual_run_and_no_second_one_however_often_it_is_begun(tmp_path):
    config, kept, budget = replace(CONFIG, rounds=10), {}, PrivacyBudget(tmp_path / "s")
    with guarded_round.begin(GuardedRound(policy=Policy(), secret=b"s" * 32)) as guard:
        for _ in range(config.rounds):
            PrivateRound(config, tmp_path / "s", slices_of_patients(), kept).begin()
        with pytest.raises(NodeDataError, match="privacy budget of this site's store"):
            for _ in range(config.rounds):
                PrivateRound(config, tmp_path / "s", slices_of_patients(), {}).begin()
    assert config.rounds < len(budget.rounds()) < 1.5 * config.rounds
    assert guard.private["epsilon_store"] <= Policy().most_epsilon


def test_no_private_round_runs_on_a_node_that_nothing_guards(tmp_path):
    with pytest.raises(NodeDataError, match="not guarded"):
        PrivateRound(CONFIG, tmp_path / "s", slices_of_patients(), {}).begin()


# A round as a node runs it


@pytest.fixture
def private_store(site, tmp_path):
    config = PrepareConfig(domain="bright", size=32, z_bins=4, validation_share=0, test_share=0.34)
    return prepare(site, tmp_path / "private.store", config).store


@pytest.fixture
def run_plan(private_store):
    """Runs a round of a training plan on the store; returns the plan, whose kept state may be given to the next."""
    from fedbiomed.common.dataset_types import DataReturnFormat
    from fedbiomed.common.training_args import TrainingArgs
    from fedfactory.researcher.plans.segmentation_plans import PLANS

    def run(config, kept=None, *, train=True):
        plan = PLANS[config.method]()
        arguments = {"loader_args": {"batch_size": 2}, "num_updates": 2, "random_seed": 0}
        model_args = {"config": config.to_dict(), "train": train}
        plan.post_init(model_args, TrainingArgs(arguments, only_required=False), {}, node_id="node")
        plan.optimizers().extra |= kept or {}
        plan.training_data()
        plan.dataset.load(str(private_store.path), DataReturnFormat.TORCH)
        plan.training_routine(None, {"gpu": False, "gpu_num": None, "gpu_only": False})
        return plan

    return run


def test_a_private_round_sends_counts_and_epsilon_alone_and_keeps_them_at_the_site(run_plan, private_store, guard):
    plan = run_plan(CONFIG)
    report = plan.optimizer_args()
    names = {"domain", "samples", "slices_dense", "epsilon", "epsilon_store", "delta", "patients"}
    assert {name for name in report if name not in super(type(plan).__mro__[2], plan).optimizer_args()} == names
    assert report["patients"] == 2 and report["samples"] == report["slices_dense"] == 16
    assert report["delta"] == pytest.approx(1 / 20) and 0 < report["epsilon"] < 8
    assert {name: report[name] for name in guard.private} == guard.private
    assert all(math.isfinite(value) for value in report.values() if isinstance(value, float))
    folder = private_store.path.with_name(private_store.path.name + ".segmenters")
    card = Segmenter.load(folder / "bright_fedavg_own.safetensors").card
    assert (card.training.epsilon, card.training.delta) == (report["epsilon"], report["delta"])
    # Two rounds are what was planned; the next one is refused, and the average is still written without a number.
    plan = run_plan(CONFIG, plan.optimizers().extra)
    kept = plan.optimizers().extra
    with pytest.raises(NodeDataError, match="trains no more rounds"):
        run_plan(CONFIG, kept)
    scoring = run_plan(CONFIG, kept, train=False).optimizer_args()
    assert scoring["epsilon"] == plan.optimizer_args()["epsilon"] and not any("dice" in name for name in scoring)


def test_an_experiment_is_private_from_its_first_round_or_never(run_plan, guard):
    for first in (CONFIG, replace(CONFIG, dp_epsilon=None)):
        kept = run_plan(first).optimizers().extra
        second = replace(CONFIG, dp_epsilon=None) if first.private else CONFIG
        with pytest.raises(NodeDataError, match="dp_epsilon has changed"):
            run_plan(second, kept)
        assert (PRIVATE_EXPERIMENT in kept) == first.private


def test_a_round_that_fails_after_it_was_noted_stays_noted(run_plan, private_store, guard, monkeypatch):
    from fedfactory.adaptation.methods.federated_averaging import FederatedAveraging

    def fail(*_):
        raise NodeDataError("no")

    monkeypatch.setattr(FederatedAveraging, "_train_privately", fail)
    with pytest.raises(NodeDataError):
        run_plan(CONFIG)
    assert len(PrivacyBudget(private_store.path).rounds()) == 1


# The researcher


def test_the_researcher_needs_epsilon_in_place_of_losses_and_shows_it():
    from fedfactory.researcher.private_runs import privacy_of, require_dense_labels, required_entries
    from fedfactory.researcher.reply_checks import problem_of_reply
    from fedfactory.researcher.round_records import ReceivedUpdate
    from fedfactory.researcher.segmentation import SegmentationResult, score_headings, score_table

    report = {"domain": "x", "samples": 3, "slices_dense": 3, "epsilon": 2.0, "epsilon_store": 9.0, "delta": 0.01,
              "patients": 10}  # fmt: skip
    reply = {"sample_size": 3, "optimizer_args": report}
    assert problem_of_reply(reply, required=required_entries(CONFIG)) is None
    assert "loss" in problem_of_reply(reply, required=required_entries(replace(CONFIG, dp_epsilon=None)))
    del report["epsilon"]
    assert "epsilon" in problem_of_reply(reply, required=required_entries(CONFIG))
    numbers = {"slices_dense": 3, "epsilon": 7.99, "epsilon_store": 9.0, "delta": 0.01, "patients": 10}
    result = SegmentationResult(CONFIG, {"n": ReceivedUpdate(node_name="alpha", numbers=numbers)})
    assert score_headings(result) == ["site", "labels", "epsilon", "delta"]
    assert score_table(result) == [["alpha", "dense", "7.99", "0.01"]]
    assert privacy_of(result.sites)["n"] == {"epsilon": 7.99, "epsilon_store": 9.0, "delta": 0.01, "patients": 10}
    require_dense_labels({"n": site_facts(label_kinds={"dense": 1, "none": 3})})
    for kinds in ({"dense": 1, "box": 1}, {"none": 2}):
        with pytest.raises(UsageError, match="dense labels at all sites"):
            require_dense_labels({"n": site_facts(label_kinds=kinds)})


def test_averaging_needs_no_loss():
    from fedfactory.researcher.method_aggregator import MethodAverage

    average = MethodAverage(method_of("fedavg", **PRIVATE), ["n"], {"n": {"dense": 1}})
    merged = average.aggregate(
        {"n": SimpleNamespace(load=lambda: {"w": torch.ones(2)})}, {},
        training_replies={"n": {"optimizer_args": {"samples": 3, "epsilon": 1.0}}}, global_model={"w": torch.zeros(2)},
    )  # fmt: skip
    assert merged["w"].tolist() == [1.0, 1.0] and average.shares == {"n": 1.0}


def test_status_shows_the_privacy_that_a_run_spent(tmp_path, capsys):
    from fedfactory.cli import main
    from fedfactory.researcher.round_records import ReceivedUpdate
    from fedfactory.researcher.segmentation import RESULTS, SegmentationResult

    update = ReceivedUpdate(node_name="alpha", numbers={"slices_dense": 3, "epsilon": 7.25, "delta": 0.01})
    result = SegmentationResult(CONFIG, {"n": update}, [{"n": update}], 3.0)
    (tmp_path / RESULTS).write_text(json.dumps(result.to_dict()))
    assert SegmentationResult.load(tmp_path) == result
    with pytest.raises(SystemExit, match="0"):
        main(["status", str(tmp_path)])
    assert "7.25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--dp-epsilon", "8", "--norm", "batch"], "norm is batch"),
        (["--dp-epsilon", "8", "--method", "gaze"], "method is 'gaze'"),
        (["--dp-epsilon", "-1"], "--dp-epsilon is -1"),
        (["--dp-epsilon", "8", "--dp-delta", "small"], "--dp-delta is 'small'"),
        (["--dp-clip", "2"], "--dp-clip without --dp-epsilon"),
    ],
)
def test_the_command_refuses_at_once_what_differential_privacy_cannot_have(tmp_path, capsys, words, message):
    from fedfactory.cli import main

    command = ["train-segmenter", "--method", "fedavg", "--researcher", "x", "--tag", "abc", "--out", tmp_path / "y"]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, command), *words])
    assert ended.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())
