"""Learning rates over all rounds, and how many updates a round has."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from fedfactory.adaptation.methods.federated_averaging import WeightAveragingMethod
from fedfactory.adaptation.methods.registry import METHODS, make_method
from fedfactory.adaptation.methods.round_schedule import body_updates, decayed_rate
from fedfactory.adaptation.privacy.private_updates import PrivateUpdates
from helpers import CONFIG, SMALL, method_of, site, site_round_of

ROUNDS, UPDATES = 10, 3
AVERAGING = [name for name, method in METHODS.items() if issubclass(method, WeightAveragingMethod)]


def rates_of(method, number, *, private=None, data=None) -> list[float]:
    """Learning rates of the optimizer steps of a round, in the order of the steps."""
    found = []

    def recorded(optimizer, *_):
        (rate,) = {group["lr"] for group in optimizer.param_groups}
        found.append(rate)

    site_round = site_round_of(method, site(count=6) if data is None else data, number=number)
    site_round.private = private
    for optimizer in site_round.optimizers.values():
        optimizer.register_step_pre_hook(recorded)
    method.train_round(site_round)
    return found


def test_the_rate_falls_from_the_first_to_zero_as_a_power_of_what_is_left():
    rates = [decayed_rate(0.2, done=done, total=40) for done in range(41)]
    assert rates[0] == 0.2 and rates[40] == 0.0 and all(a > b for a, b in pairwise(rates))
    for done in (1, 10, 39):
        assert rates[done] == pytest.approx(0.2 * math.exp(0.9 * math.log((40 - done) / 40)))
    assert rates[20] == pytest.approx(0.2 * 0.5358867)
    assert decayed_rate(0.2, done=41, total=40) == 0.0  # a round more than planned moves nothing


def test_all_methods_that_average_weights_have_the_schedule():
    assert AVERAGING == ["local", "fedavg", "fedprox", "fedbn", "fedicra", "fedmix", "gaze", "cmc"]


@pytest.mark.parametrize("name", AVERAGING)
def test_every_method_begins_at_its_learning_rate_and_ends_near_zero(name):
    method = method_of(name, rounds=ROUNDS, updates=UPDATES)
    first, last = (rates_of(method, number) for number in (1, ROUNDS))
    assert len(first) == len(last) == UPDATES
    assert first[0] == method.rate == method.default_rate
    assert last[-1] == pytest.approx(method.rate * (1 / (ROUNDS * UPDATES)) ** 0.9) and last[-1] < 0.05 * method.rate
    for number, rates in ((1, first), (ROUNDS, last)):
        done = [(number - 1) * UPDATES + update for update in range(UPDATES)]
        expected = [decayed_rate(method.rate, done=count, total=ROUNDS * UPDATES) for count in done]
        assert rates == pytest.approx(expected)


def test_the_learning_rate_that_is_asked_for_is_that_of_the_first_update():
    assert rates_of(method_of("fedavg", rounds=ROUNDS, updates=UPDATES, learning_rate=0.07), 1)[0] == 0.07


def test_private_updates_have_the_same_schedule():
    method = method_of("fedavg", rounds=ROUNDS, updates=UPDATES, dp_epsilon=8.0)
    data = replace(site(count=6), patients=np.repeat(np.arange(3), 2))
    rates = [
        rates_of(method, number, data=data, private=PrivateUpdates(noise=0.5, rng=np.random.default_rng(0)))
        for number in (1, ROUNDS)
    ]
    assert rates[0][0] == method.rate and rates[1] == pytest.approx(
        [decayed_rate(method.rate, done=27 + update, total=30) for update in range(UPDATES)]
    )


def test_a_state_of_the_optimizer_from_the_round_before_does_not_keep_its_rate():
    """A node gives back the state of the optimizers, learning rate included."""
    method = method_of("fedavg", rounds=ROUNDS, updates=UPDATES)
    before = site_round_of(method, site(count=6))
    method.train_round(before)
    again = site_round_of(method, site(count=6), model=before.model, number=2)
    again.optimizers["all"].load_state_dict(before.optimizers["all"].state_dict())
    used = []
    again.optimizers["all"].register_step_pre_hook(lambda optimizer, *_: used.append(optimizer.param_groups[0]["lr"]))
    method.train_round(again)
    assert used[0] == pytest.approx(decayed_rate(method.rate, done=UPDATES, total=ROUNDS * UPDATES))


@pytest.mark.parametrize(
    ("updates", "share", "body"), [(10, 0.3, 3), (20, 0.8, 16), (4, 0.8, 3), (7, 1.0, 7), (7, 0.0, 0), (1, 0.8, 1)]
)
def test_the_share_of_a_round_that_trains_the_body(updates, share, body):
    assert body_updates(updates, share) == body


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_fedicra_trains_the_body_in_the_last_updates(share):
    method = make_method(replace(CONFIG, method="fedicra", options={**SMALL["fedicra"], "body_share": share}))
    site_round, order = site_round_of(method, site(count=6)), []
    for name, optimizer in site_round.optimizers.items():
        optimizer.register_step_pre_hook(lambda *_, name=name: order.append(name))
    method.train_round(site_round)
    assert order == ["output"] * round(4 * (1 - share)) + ["body"] * round(4 * share)


@pytest.mark.parametrize("count", [2, 12, 40])
def test_fedmix_makes_as_many_updates_as_the_others_however_many_slices_are_accepted(count, monkeypatch):
    method = method_of("fedmix", updates=5, batch_size=4)
    site_round, drawn, steps = site_round_of(method, site(count=count)), [], []
    batch = method._training_batch

    def recorded(site_round, chosen, **rest):
        drawn.append(chosen)
        return batch(site_round, chosen, **rest)

    monkeypatch.setattr(method, "_training_batch", recorded)
    site_round.optimizers["all"].register_step_pre_hook(lambda *_: steps.append(1))
    assert method.train_round(site_round).samples == count
    assert len(steps) == len(drawn) == 5 and all(len(chosen) == 4 for chosen in drawn)
    assert len(set(np.concatenate(drawn))) == min(count, 20)  # none twice before all were drawn


def test_fedmix_with_pseudo_labels_makes_as_many_updates():
    method = make_method(replace(CONFIG, method="fedmix", updates=5, options={"agreement": 0.0, "empty": "accept"}))
    assert len(rates_of(method, 1, data=site("none", count=3))) == 5


def test_methods_of_public_slices_keep_half_a_cosine():
    method = method_of("hssf", rounds=4)
    trainee = method.trainee_of(method.fresh_network("unet"))
    rates = []
    for number in range(1, 5):
        method.set_rate(trainee, number)
        rates.append(trainee.optimizer.param_groups[0]["lr"])
    assert rates[0] == method.rate and all(a > b for a, b in pairwise(rates))
