"""The training step and the averaging of sites."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from fedfactory.errors import ConfigError, FederationError, TrainingError
from fedfactory.generative import Factory, FactoryTrainer, load_factory
from fedfactory.generative.conditions import jitter
from fedfactory.generative.factory_facts import FactoryFacts, SharedAnatomy
from fedfactory.generative.trainer import make_optimizers
from fedfactory.researcher.aggregator import FactoryAverage
from helpers import with_head


def batch(size=4):
    return torch.rand(size, 1, 16, 16) * 2 - 1, torch.arange(size) % 4, torch.zeros(size, dtype=torch.long)


def make_trainer(config, seed=0):
    torch.manual_seed(seed)
    factory = Factory(config)
    return FactoryTrainer(factory, make_optimizers(factory), torch.Generator().manual_seed(seed))


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(config):
    runs = []
    for seed in (0, 0, 1):
        trainer = make_trainer(config)
        trainer.rng.manual_seed(seed)
        torch.manual_seed(5)
        for _ in range(3):
            trainer.train_step(*batch())
        runs.append(trainer.factory.generator.constant.detach().clone())
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_penalty_comes_on_every_second_update_and_keeps_its_rhythm_after_a_break(config):
    trainer = make_trainer(config)
    assert [trainer.train_step(*batch()).r1 is not None for _ in range(3)] == [True, False, True]
    later = FactoryTrainer(trainer.factory, trainer.optimizers, trainer.rng, state=trainer.state)
    assert later.train_step(*batch()).r1 is None  # a counter that restarts would penalise here


def test_a_generator_update_leaves_the_discriminator_as_it_is(config):
    trainer = make_trainer(config)
    before = {k: v.clone() for k, v in trainer.factory.discriminator.state_dict().items()}
    trainer.optimizers["discriminator"].param_groups[0]["lr"] = 0.0
    trainer.train_step(*batch())
    assert all(torch.equal(v, before[k]) for k, v in trainer.factory.discriminator.state_dict().items())
    assert all(p.requires_grad for p in trainer.factory.discriminator.parameters())


def test_a_loss_that_is_not_finite_stops_before_any_weight_moves(config):
    trainer = make_trainer(config)
    real, z_bin, domain = batch()
    before = {k: v.clone() for k, v in trainer.factory.state_dict().items()}
    with pytest.raises(TrainingError, match="logistic loss"):
        trainer.train_step(real * float("inf"), z_bin, domain)
    assert all(torch.equal(v, before[k]) for k, v in trainer.factory.state_dict().items())


def test_without_mirroring_real_slices_are_only_shifted(config):
    real = batch()[0]
    shifted = jitter(real, replace(config, mirror=False), torch.Generator().manual_seed(0))
    candidates = [torch.roll(real, (i, j), (2, 3)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    assert any(torch.equal(shifted, c) for c in candidates)


def test_the_facts_of_a_factory_survive_its_file_and_refuse_other_types():
    facts = FactoryFacts(
        rounds=3, stages=({"rounds": 3},), shared_anatomy=SharedAnatomy(2, {"a / b": 0.5}), alarms=("a: too dark",)
    )
    assert FactoryFacts.from_dict(json.loads(json.dumps(facts.to_dict()))) == facts
    with pytest.raises(ConfigError, match="alarms"):  # a text would be read letter by letter
        FactoryFacts.from_dict({"alarms": "a: too dark"})


def replies(**domains):
    return {node: {"optimizer_args": {"domain": domain}} for node, domain in domains.items()}


def test_sites_are_averaged_by_their_number_of_slices(config):
    params = {"a": {"generator.w": torch.tensor([0.0])}, "b": {"generator.w": torch.tensor([4.0])}}
    merged = FactoryAverage(config, 1).aggregate(
        params,
        {"a": 0.25, "b": 0.75},
        training_replies=replies(a="bright", b="dark"),
        global_model={"generator.w": torch.tensor([0.0])},
    )
    assert merged["generator.w"].item() == 3.0  # a plain mean gives 2.0, swapped weights give 1.0


def test_a_palette_row_comes_from_the_sites_of_its_domain_alone(config):
    name = "generator.head.grey"
    params = {n: {name: torch.full((2, 3), v)} for n, v in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    merged = FactoryAverage(config, 1).aggregate(
        params,
        {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
        training_replies=replies(a="bright", b="dark", c="dark"),
        global_model={name: torch.zeros(2, 3)},
    )
    assert merged[name].tolist() == [[1.0] * 3, [3.0] * 3]


def test_a_row_whose_site_did_not_answer_stays_as_it_was_whatever_others_send(config):
    name = "generator.head.grey"
    merged = FactoryAverage(config, 1).aggregate(
        {"a": {name: torch.tensor([[5.0], [7.0]])}},
        {"a": 1.0},
        training_replies=replies(a="bright"),
        global_model={name: torch.tensor([[3.0], [6.0]])},
    )
    assert merged[name].tolist() == [[5.0], [6.0]]  # only its owner may move a row


def test_columns_of_a_domain_are_averaged_over_its_sites_and_the_other_columns_over_all_sites(config):
    """The published mapping embeds domains and heights in the same matrix; the first columns are the domains'."""
    name = "generator.label_embed.weight"
    published = with_head(config, "image")
    options = {"training_replies": replies(a="bright", b="dark"), "global_model": {name: torch.zeros(2, 6)}}
    params = {"a": {name: torch.full((2, 6), 1.0)}, "b": {name: torch.full((2, 6), 3.0)}}
    merged = FactoryAverage(published, 1).aggregate(params, {"a": 0.5, "b": 0.5}, **options)
    assert merged[name].tolist() == [[1.0, 3.0, 2.0, 2.0, 2.0, 2.0]] * 2
    plain = replace(published, compatibility="published")
    merged = FactoryAverage(plain, 1).aggregate(params, {"a": 0.5, "b": 0.5}, **options)
    assert merged[name].tolist() == [[2.0] * 6] * 2


def test_shared_discriminators_are_averaged_and_have_no_moving_average(config):
    average = FactoryAverage(config, 1)
    params = {
        n: {"generator.w": torch.tensor([v]), "discriminator.w": torch.tensor([v])} for n, v in (("a", 0.0), ("b", 4.0))
    }
    before = {"generator.w": torch.zeros(1), "discriminator.w": torch.zeros(1)}
    merged = average.aggregate(
        params, {"a": 0.5, "b": 0.5}, training_replies=replies(a="bright", b="dark"), global_model=before
    )
    assert merged["discriminator.w"].item() == 2.0
    assert set(average.ema) == {"generator.w"}


def test_the_average_does_not_depend_on_the_order_of_the_replies(config):
    torch.manual_seed(0)
    params = {n: {"generator.w": torch.randn(1000)} for n in "abc"}
    options = {
        "training_replies": replies(a="bright", b="dark", c="dark"),
        "global_model": {"generator.w": torch.zeros(1000)},
    }
    weights = {"a": 0.2, "b": 0.3, "c": 0.5}
    first = FactoryAverage(config, 1).aggregate(params, weights, **options)
    turned = dict(reversed(params.items()))
    assert torch.equal(
        first["generator.w"], FactoryAverage(config, 1).aggregate(turned, weights, **options)["generator.w"]
    )


def test_the_moving_average_decays_once_per_update_of_every_site(config):
    average = FactoryAverage(config, updates_per_round=10)
    average.aggregate(
        {"a": {"generator.w": torch.ones(1)}, "b": {"generator.w": torch.ones(1)}},
        {"a": 0.5, "b": 0.5},
        training_replies=replies(a="bright", b="dark"),
        global_model={"generator.w": torch.zeros(1)},
    )
    assert average.ema["generator.w"].item() == pytest.approx(1 - 0.995**20)


@pytest.mark.parametrize(
    ("value", "domain", "message"),
    [(float("nan"), "bright", "NaN"), (1.0, "other", "domain 'other'; it must be one of bright, dark")],
)
def test_a_broken_reply_is_refused_with_its_reason(config, value, domain, message):
    with pytest.raises(FederationError, match=message):
        FactoryAverage(config, 1).aggregate(
            {"a": {"generator.w": torch.tensor([value])}},
            {"a": 1.0},
            training_replies=replies(a=domain),
            global_model={"generator.w": torch.zeros(1)},
        )


def test_a_saved_factory_comes_back_equal(trained, tmp_path):
    trained.save(tmp_path / "f.safetensors")
    loaded = load_factory(tmp_path / "f.safetensors")
    assert loaded.config == trained.config
    assert loaded.history == trained.history
    own = trained.generator.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in loaded.generator.state_dict().items())
    assert (tmp_path / "f.json").is_file()
