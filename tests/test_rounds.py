"""A round at the researcher, without sockets: which nodes take part, which updates count, how they are averaged."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from fedfactory.errors import CheckpointError, ConfigError, FederationError, NodeDataError, UsageError
from fedfactory.generative import FactoryConfig, make_generator
from fedfactory.generative.factory import Factory
from fedfactory.generative.factory_facts import SharedAnatomy
from fedfactory.node.plans.eight_bits import num_scales
from fedfactory.node.plans.error_redaction import redact_errors
from fedfactory.node.plans.transport import CHANGE, LEVELS, SCALE, TRANSPORTS, pack, packed_shapes, restore
from fedfactory.node.policy.default_arguments import default_arguments
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_facts import INTRODUCTION, ModalityFacts, SiteFacts, description_of, read_facts, store_facts
from fedfactory.researcher.node_selection import Federation, NodeSelection
from fedfactory.researcher.round_records import QuorumChange, ReceivedUpdate, RoundEvent, SiteAnswers, answers_needed
from fedfactory.researcher.run_state import RunState, Stage
from helpers import DOMAINS
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture
def make_strategy():
    from fedfactory.researcher.strategy import FactoryStrategy

    return FactoryStrategy


@pytest.fixture
def average(config):
    from fedfactory.researcher.aggregator import FactoryAverage

    return FactoryAverage(config, updates_per_round=2)


def reply(norm=1.0, size=10, **changes):
    update = SimpleNamespace(norm=norm)
    return {"success": True, "sample_size": size, "params": update, "msg": "", **changes}


def report(**changes):
    return {"domain": "t1", "samples": 8, "loss": 0.5, "slices_dense": 10, "own_dice": float("nan"), **changes}


# which nodes take part


def test_all_connected_nodes_take_part_and_absent_nodes_are_recorded(make_strategy):
    strategy = make_strategy(min_nodes=1)
    strategy.connected = lambda: {"a", "c", "unregistered"}
    assert strategy.sample_nodes(["c", "b", "a"], 0) == ["a", "c"]
    assert strategy.events == [RoundEvent(round=1, node="b", kind="absent", reason="not connected")]


def test_a_random_subset_is_drawn_anew_each_round_and_again_with_the_same_seed(make_strategy):
    nodes = [f"n{k}" for k in range(6)]
    draws = [tuple(make_strategy(nodes_per_round=2, seed=3).sample_nodes(nodes, r)) for r in range(30)]
    again = [tuple(make_strategy(nodes_per_round=2, seed=3).sample_nodes(nodes, r)) for r in range(30)]
    assert draws == again
    assert all(len(set(draw)) == 2 for draw in draws)
    assert len(set(draws)) > 5
    assert {node for draw in draws for node in draw} == set(nodes)
    assert draws != [tuple(make_strategy(nodes_per_round=2, seed=4).sample_nodes(nodes, r)) for r in range(30)]


# which updates count


def test_a_round_goes_on_with_the_sites_that_answer_properly(make_strategy):
    strategy = make_strategy(min_nodes=2)
    strategy.sample_nodes(list("abcdef"), 4)
    replies = {
        "a": reply(size=30), "b": reply(size=10), "c": reply(norm=float("nan")), 
        "d": reply(success=False, msg="no\nwonder"), "e": reply(size=0),
    }  # fmt: skip
    params, shares, total, _ = strategy.refine(replies, 4)
    assert (set(params), shares, total) == ({"a", "b"}, {"a": 0.75, "b": 0.25}, 40)
    assert set(replies) == {"a", "b"}  # the framework saves the state of the remaining nodes
    kinds = {event.node: event.kind for event in strategy.events}
    assert kinds == {"c": "rejected", "d": "failed", "e": "failed", "f": "lost"}
    assert all(event.round == 5 and "\n" not in event.reason for event in strategy.events)


def test_uniform_weighting_counts_all_alike(make_strategy):
    strategy = make_strategy(weighting="uniform")
    strategy.sample_nodes(["a", "b"], 0)
    assert strategy.refine({"a": reply(size=30), "b": reply(size=10)}, 0)[1:3] == ({"a": 0.5, "b": 0.5}, 40)


def test_a_much_larger_change_than_in_recent_updates_is_rejected(make_strategy):
    strategy = make_strategy()
    for number in range(3):
        strategy.sample_nodes(["a", "b"], number)
        strategy.refine({"a": reply(1.0), "b": reply(1.3)}, number)
    strategy.sample_nodes(["a", "b"], 3)
    strategy.refine({"a": reply(9.0), "b": reply(30.0)}, 3)
    assert [(event.node, event.kind) for event in strategy.events] == [("b", "rejected")]
    strategy.forget_changes()
    strategy.sample_nodes(["a", "b"], 4)
    strategy.refine({"a": reply(30.0), "b": reply(30.0)}, 4)
    assert len(strategy.events) == 1


def test_sites_without_training_data_do_not_lower_the_median_of_recent_changes(make_strategy):
    strategy = make_strategy()
    for number in range(4):
        strategy.sample_nodes(["a", "b", "c"], number)
        strategy.refine({"a": reply(1.0), "b": reply(0.0), "c": reply(0.0)}, number)
    assert not strategy.events


@pytest.mark.parametrize(
    "changes",
    [
        {"size": 10**12},
        {"size": 11},
        {"size": -5},
        {"size": 2.5},
        {"size": True},
        {"size": "10"},
        {"size": float("nan")},
        {"optimizer_args": "all went well"},
        {"optimizer_args": report(samples=10**12)},
        {"optimizer_args": report(samples=-5)},
        {"optimizer_args": report(samples=float("inf"))},
        {"optimizer_args": report(samples=float("nan"))},
        {"optimizer_args": {"domain": "t1", "loss": 0.5}},
        {"optimizer_args": report(loss="low")},
        {"optimizer_args": report(loss=float("inf"))},
        {"optimizer_args": report(loss=[0.5])},
        {"optimizer_args": report(loss=10**400)},
        {"optimizer_args": report(slices_dense=11)},
        {"optimizer_args": report(domain="t2")},
        {"optimizer_args": report(domain=None)},
        {"optimizer_args": report(note="\x1b[2J")},
        {"optimizer_args": report(**{"a\nb": 1})},
        {"optimizer_args": {1: 2}},
        {"optimizer_args": report(**{f"number{n}": 1.0 for n in range(1000)})},
    ],
)
def test_a_report_that_cannot_be_true_is_rejected_and_the_others_count(make_strategy, changes):
    from fedfactory.researcher.reply_checks import Announced

    strategy = make_strategy(required=("domain", "samples", "loss"))
    strategy.announced = {"a": Announced("t1", 10), "b": Announced("t1", 10)}
    strategy.sample_nodes(["a", "b"], 0)
    replies = {"a": reply(optimizer_args=report()), "b": reply(**{"optimizer_args": report(), **changes})}
    assert strategy.refine(replies, 0)[1] == {"a": 1.0}
    (event,) = strategy.events
    assert (event.node, event.kind) == ("b", "rejected")
    assert event.reason.isprintable()
    assert len(event.reason) < 300


def test_what_a_site_announces_of_several_modalities_bounds_their_sum():
    from fedfactory.researcher.reply_checks import Announced

    part = ModalityFacts(slices=6, classes=2, label_kinds={})
    facts = SimpleNamespace(domain="t1", slices=6, modalities={"t1": part, "t2": part})
    assert Announced.by(facts) == Announced("t1", 12)


def test_too_few_answers_do_not_make_a_round(make_strategy):
    strategy = make_strategy(min_nodes=2)
    with pytest.raises(Exception, match="1 sites are connected, at least 2"):
        strategy.sample_nodes(["a"], 0)
    strategy.sample_nodes(["a", "b"], 0)
    with pytest.raises(Exception, match="1 sites answered properly, at least 2"):
        strategy.refine({"a": reply()}, 0)


def test_a_resumed_run_may_need_fewer_answers(make_strategy, tmp_path):
    """The number that a breakpoint keeps is replaced; that of an encrypted sum is never one."""
    strategy = make_strategy(min_nodes=2)
    strategy.require_answers(1)
    saved = json.loads(json.dumps(strategy.save_state_breakpoint()))
    loaded = make_strategy()
    loaded.load_state_breakpoint(saved)
    assert loaded.sample_nodes(["a"], 0) == ["a"] and loaded.refine({"a": reply()}, 0)[1] == {"a": 1.0}
    encrypted = make_strategy(min_nodes=3, complete=True)
    encrypted.require_answers(1)
    for one in (encrypted, make_strategy(min_nodes=1, complete=True)):
        with pytest.raises(Exception, match="1 sites are connected, at least 2"):
            one.sample_nodes(["a"], 0)


def test_an_encrypted_sum_needs_every_site_of_the_round(make_strategy):
    strategy = make_strategy(min_nodes=1, complete=True)
    strategy.sample_nodes(["a", "b", "c"], 0)
    with pytest.raises(Exception, match="2 sites answered properly, at least 3"):
        strategy.refine({"a": reply(), "b": reply()}, 0)
    strategy.connected = lambda: {"a", "b"}  # the round is repeated without the lost node
    assert strategy.sample_nodes(["a", "b", "c"], 0) == ["a", "b"]
    assert strategy.refine({"a": reply(), "b": reply()}, 0)[1] == {"a": 0.5, "b": 0.5}


# how updates are averaged


def updates(config, count):
    torch.manual_seed(0)
    before = {f"generator.{k}": v.clone() for k, v in make_generator(config).state_dict().items()}
    sites = {
        f"n{k}": {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in before.items()}
        for k in range(count)
    }
    return before, sites


class Counted:
    """Weights on a disk; counts how many sites' weights are in memory at once."""

    living = peak = 0

    def __init__(self, weights):
        self.weights = weights

    def load(self):
        class Loaded(dict):
            def __del__(self):
                Counted.living -= 1

        Counted.living += 1
        Counted.peak = max(Counted.peak, Counted.living)
        return Loaded(self.weights)


def test_the_average_weights_sites_and_reads_them_in_turn(average, config):
    before, sites = updates(config, 5)
    domains = dict(zip(sites, ["bright", "dark", "dark", "bright", "dark"], strict=True))
    shares = dict(zip(sites, [0.1, 0.2, 0.3, 0.15, 0.25], strict=True))
    replies = {node: {"optimizer_args": {"domain": domain}} for node, domain in domains.items()}
    stored = {node: Counted(weights) for node, weights in sites.items()}
    merged = average.aggregate(stored, shares, training_replies=replies, global_model=before)
    assert Counted.peak <= 2  # the last site's weights may still be in memory when the next are read
    for name in before:
        expected = sum(shares[n] * sites[n][name].double() for n in sites)
        if name in ("generator.head.grey", "generator.head.log_sigma"):
            for row, domain in enumerate(config.domains):
                owners = [n for n in sites if domains[n] == domain]
                total = sum(shares[n] for n in owners)
                expected[row] = sum(shares[n] / total * sites[n][name][row].double() for n in owners)
        torch.testing.assert_close(merged[name].double(), expected, atol=1e-6, rtol=1e-6)


def test_the_row_of_a_domain_without_an_answer_stays_as_it_was(average, config):
    before, sites = updates(config, 2)
    replies = {node: {"optimizer_args": {"domain": "bright"}} for node in sites}
    merged = average.aggregate(sites, {"n0": 0.5, "n1": 0.5}, training_replies=replies, global_model=before)
    name = "generator.head.grey"
    assert torch.equal(merged[name][1], before[name][1])
    assert not torch.equal(merged[name][0], before[name][0])


def test_the_order_of_replies_does_not_matter(average, config):
    before, sites = updates(config, 3)
    replies = {n: {"optimizer_args": {"domain": d}} for n, d in zip(sites, ["dark", "bright", "dark"], strict=True)}
    shares = {"n0": 0.5, "n1": 0.2, "n2": 0.3}
    first = average.aggregate(sites, shares, training_replies=replies, global_model=before)
    turned = dict(reversed(sites.items()))
    second = average.aggregate(turned, shares, training_replies=replies, global_model=before)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("what", ["nan", "other", "stranger"])
def test_replies_that_cannot_be_averaged_are_refused(average, config, what):
    before, sites = updates(config, 2)
    replies = {node: {"optimizer_args": {"domain": "bright"}} for node in sites}
    if what == "nan":
        sites["n1"]["generator.head.grey"][0, 0] = float("nan")
    elif what == "other":
        del sites["n1"]["generator.head.grey"]
    else:
        replies["n1"]["optimizer_args"]["domain"] = "grey"
    with pytest.raises(FederationError):
        average.aggregate(sites, {"n0": 0.5, "n1": 0.5}, training_replies=replies, global_model=before)


def test_a_breakpoint_keeps_the_moving_average(average, config, tmp_path):
    from fedfactory.researcher.aggregator import FactoryAverage

    before, sites = updates(config, 2)
    replies = {n: {"optimizer_args": {"domain": d}, "sample_size": 5} for n, d in zip(sites, DOMAINS, strict=True)}
    average.aggregate(sites, {"n0": 0.5, "n1": 0.5}, training_replies=replies, global_model=before)
    average.receive_replies(replies)
    state = json.loads(json.dumps(average.save_state_breakpoint(str(tmp_path))))
    loaded = FactoryAverage()
    loaded.load_state_breakpoint(state)
    assert all(torch.equal(loaded.ema[name], tensor) for name, tensor in average.ema.items())
    assert (loaded.config, loaded.updates_per_round, loaded.sizes) == (config, 2, average.sizes)
    assert loaded.create_aggregator_args(None, ["n0", "n1"])["n0"]["row_factor"] == 2.0


# what travels


@settings(max_examples=50, deadline=None)
@given(scale=st.floats(1e-6, 10), seed=st.integers(0, 99))
def test_half_precision_changes_keep_their_error_bound(scale, seed):
    rng = torch.Generator().manual_seed(seed)
    before = {"w": torch.randn(64, generator=rng) * 3, "count": torch.tensor([5])}
    after = {"w": before["w"] + scale * torch.randn(64, generator=rng), "count": torch.tensor([9])}
    sent, _ = pack(after, before, "float16")
    assert sent[f"{CHANGE}w"].dtype == torch.float16
    back = restore(sent, before)
    change = (after["w"] - before["w"]).double()
    rounding = 2**-23 * (before["w"].abs() + change.abs())  # of the sums themselves, in float32
    error = (back["w"].double() - after["w"].double()).abs()
    assert (error <= 2**-11 * change.abs() + 2**-25 + rounding).all()
    assert torch.equal(back["count"], after["count"])


def test_the_default_policy_allows_every_transport():
    assert default_arguments()["model_args.transport"] == list(TRANSPORTS)


def test_full_precision_travels_as_it_is():
    weights = {"w": torch.randn(3)}
    assert torch.equal(restore(pack(weights, weights, "float32")[0], weights)["w"], weights["w"])


SHAPES = st.sampled_from([(), (1,), (7,), (3, 2), (4, 64), (5, 3, 5, 5), (1, 200), (0, 4)])


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, rounds=st.integers(1, 6), scale=st.floats(1e-30, 1e4), seed=st.integers(0, 99))
def test_all_changes_in_eight_bits_sum_to_the_changes_made_up_to_the_last_residual(shape, rounds, scale, seed):
    rng = torch.Generator().manual_seed(seed)
    made, arrived, residual = torch.zeros(shape).double(), torch.zeros(shape).double(), {}
    largest = 0.0
    for _ in range(rounds):
        before = {"w": torch.randn(shape, generator=rng)}
        after = {"w": before["w"] + scale * torch.randn(shape, generator=rng)}
        sent, residual = pack(after, before, "int8", residual)
        change = (after["w"] - before["w"]).double()
        made += change
        arrived += restore(sent, {"w": torch.zeros(shape)})["w"].double()
        largest = max(largest, float(change.abs().max()) if change.numel() else 0.0)
    assert torch.allclose(arrived + residual["w"].double(), made, rtol=0, atol=1e-6 * rounds * largest)
    # A residual is at most half a level of changes that include the residual before: 1/254 + 1/254^2 + ...
    assert (residual["w"].abs() <= largest / 252 + 1e-37).all()


def test_without_the_residual_small_changes_would_never_arrive():
    """A weight that moves by a fifth of a level in every round, beside one that moves by 127 levels."""
    before, after = {"w": torch.zeros(2)}, {"w": torch.tensor([127.0, 0.2])}
    kept, arrived, forgetful = {}, 0.0, 0.0
    for _ in range(10):
        sent, kept = pack(after, before, "int8", kept)
        arrived += float(restore(sent, before)["w"][1])
        forgetful += float(restore(pack(after, before, "int8")[0], before)["w"][1])
    assert forgetful == 0 and arrived == pytest.approx(2, abs=0.51)


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_eight_bits_have_a_scale_for_each_row_and_are_declared_by_name_and_shape(shape, seed):
    rng = torch.Generator().manual_seed(seed)
    before = {"w": torch.zeros(shape), "count": torch.tensor([5])}
    rows = 10.0 ** torch.arange(num_scales(shape)).double()  # of very different size, as layers' channels are
    factor = (rows.reshape(-1, *[1] * (len(shape) - 1)) if len(rows) > 1 else rows[0]).float()
    change = torch.randn(shape, generator=rng) * factor
    sent, residual = pack({"w": change, "count": torch.tensor([9])}, before, "int8")
    expected = {k: v for name, t in before.items() for k, v in packed_shapes(name, t, "int8").items()}
    assert {name: tuple(tensor.shape) for name, tensor in sent.items()} == expected
    assert sent[LEVELS + "w"].dtype == torch.int8 and sent[SCALE + "w"].dtype == torch.float32
    back = restore(sent, before)
    assert torch.equal(back["count"], torch.tensor([9])) and "count" not in residual
    for row, was in zip(back["w"].reshape(len(rows), -1), change.reshape(len(rows), -1), strict=True):
        if row.numel():
            assert float((row - was).abs().max()) <= float(was.abs().max()) * (1 / 254 + 1e-6)


def test_eight_bits_are_a_quarter_of_the_weights_and_less_than_an_eighth_of_what_was_published():
    factory = Factory(FactoryConfig.preset("tiny", ("a", "b")))
    generator = {name: p for name, p in factory.named_parameters() if name.startswith("generator.")}
    sent, _ = pack(generator, generator, "int8")
    size, full = (sum(t.nbytes for t in tensors.values()) for tensors in (sent, generator))
    published = 2 * full + sum(p.nbytes for p in factory.discriminator.parameters())  # and the moving average
    assert size < 0.27 * full and size < published / 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_change_that_is_not_finite_is_not_sent_in_eight_bits(value):
    with pytest.raises(ValueError, match="NaN or infinite"):
        pack({"w": torch.tensor([0.0, value])}, {"w": torch.zeros(2)}, "int8")


@pytest.mark.parametrize(
    "sent",
    [
        {"levels.w": torch.zeros(4, dtype=torch.int8)},
        {"scale.w": torch.zeros(1)},
        {"w": torch.zeros(4), "scale.w": torch.zeros(1)},
        {"levels.w": torch.zeros(4), "scale.w": torch.zeros(1)},
        {"levels.w": torch.zeros(1, dtype=torch.int8), "scale.w": torch.zeros(1)},
        {"levels.w": torch.zeros(4, dtype=torch.int8), "scale.w": torch.zeros(4)},
        {"levels.w": torch.zeros(4, dtype=torch.int8), "scale.w": torch.zeros(1, dtype=torch.float64)},
        {"levels.w": torch.zeros(4, dtype=torch.int8), "scale.w": torch.tensor([float("nan")])},
        {"levels.w": torch.zeros(4, dtype=torch.int8), "scale.w": torch.tensor([float("inf")])},
        {"levels.w": torch.zeros(4, dtype=torch.int8), "scale.w": torch.tensor([-1.0])},
        {"levels.w": torch.zeros(4, dtype=torch.int8), "scale.w": torch.zeros(1), "w": torch.zeros(4)},
        {"change.w": torch.zeros(4).half(), "w": torch.zeros(4)},
        {"change.w": torch.zeros(1).half()},  # would be spread over all
        {"levels.w": "text", "scale.w": torch.zeros(1)},
    ],
)
def test_changes_that_nobody_can_have_packed_are_refused(sent):
    with pytest.raises((ValueError, AttributeError)):
        restore(sent, {"w": torch.zeros(4)})


def test_the_collector_keeps_weights_on_disk_and_measures_the_change(tmp_path):
    from fedbiomed.common.message import TrainReply
    from fedfactory.researcher.fedbiomed_hooks import RoundCollector

    before = {"w": torch.zeros(4)}
    collector = RoundCollector(None, before, tmp_path, number=7)
    fields = {name: None for name in TrainReply.__dataclass_fields__ if name not in ("params", "success", "encrypted")}
    message = SimpleNamespace(success=True, encrypted=False, params={"w": torch.tensor([3.0, 4, 0, 0])}, **fields)
    collector.take("n", message)
    assert message.params.norm == pytest.approx(5)
    assert message.params.num_bytes == 16
    assert torch.equal(message.params.load()["w"], torch.tensor([3.0, 4, 0, 0]))
    assert [path.name for path in tmp_path.iterdir()] == ["params_round7_n.mpk"]
    message.params = {"w": torch.tensor([float("inf"), 0, 0, 0])}
    collector.take("n", message)
    assert message.params.norm == float("inf")
    for foreign in ({}, {"w": torch.zeros(5)}, {"x": torch.zeros(4)}, {"w": "text"}, {"change.y": torch.zeros(4)}):
        message.params = foreign
        collector.take("n", message)
        assert "no valid weights of this model" in message.params.problem


# what an error may reveal


def test_an_exception_of_a_site_reveals_its_kind_and_not_its_text():
    @redact_errors
    def read():
        raise ValueError("cannot read /data/DOE^JANE/scan.nii")

    with pytest.raises(NodeDataError) as caught:
        read()
    assert "ValueError" in repr(caught.value)
    assert "DOE" not in repr(caught.value)
    assert caught.value.__cause__ is None

    @redact_errors
    def ours():
        raise NodeDataError("3 of 4 slices misshapen")

    with pytest.raises(NodeDataError, match="3 of 4"):
        ours()


# do sites agree


def test_a_stores_description_contains_what_sites_must_agree_on_and_nothing_else(store):
    facts = store_facts(store, SiteChoices())
    text = description_of(facts)
    assert read_facts(text) == facts
    assert facts.to_dict() == json.loads(text.removeprefix("fedfactory slice store "))
    assert str(store.path) not in text
    assert "case" not in text
    assert read_facts("slice store, 16 px") is None
    assert read_facts("[]") is None


@pytest.mark.parametrize(
    "change",
    [
        {"size": "16"}, {"size": 0}, {"size": True}, {"z_bins": 2**40}, {"slices": -1}, {"domain": ""}, {"crop": None},
        {"plane": "x" * 10**6}, {"label_kinds": [1]}, {"label_kinds": {"dense": -1}}, {"label_kinds": {"other": 1}},
        {"network": "resnet"}, {"network": 3}, {"public_digest": "0" * 63}, {"modalities": {"a.b": {}}},
        {"modalities": {"ct": 1}}, {"modalities": {"ct": {"slices": 1, "classes": "3", "label_kinds": {}}}},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_impossible_facts_are_not_read(store, change):
    values = store_facts(store, SiteChoices()).to_dict()
    assert read_facts(INTRODUCTION + json.dumps({**values, "new": 1})) is not None  # another version may announce more
    with pytest.raises(ConfigError):
        SiteFacts.from_dict({**values, **change})
    assert read_facts(INTRODUCTION + json.dumps({**values, **change})) is None


@pytest.mark.parametrize("text", ["[" * 10**5, "3", "null", "{}", "fedfactory slice store {", None])
def test_descriptions_of_something_else_are_not_read(text):
    assert read_facts(text) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [({"size": 32}, "--size 16"), ({"z_bins": 5}, "--z-bins 4"), ({"domain": "grey"}, "has domain 'grey'"),
     ({"version": "9.9"}, "runs fedfactory 9.9"), ({"plane": "coronal"}, "plane is coronal, elsewhere axial"),
     ({"crop": "none"}, "crop is none")],
)  # fmt: skip
def test_a_site_that_does_not_agree_is_named(store, config, change, message):
    from fedfactory.researcher.agreement import agreeing_nodes

    facts = store_facts(store, SiteChoices())
    good = description_of(facts)
    texts = {"a": good, "b": good, "c": description_of(replace(facts, **change))}
    with pytest.raises(FederationError, match=f"c: .*{message}"):
        agreeing_nodes(texts, config, leave_out=False)
    assert agreeing_nodes(texts, config, leave_out=True) == ["a", "b"]
    with pytest.raises(FederationError):
        agreeing_nodes({"c": "foreign"}, config, leave_out=True)


# the plan of a run


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (NodeSelection, {"tag": ""}, "tag is ''; choose"),
        (NodeSelection, {"tag": "brains", "min_nodes": 0}, "min_nodes is 0; choose 1 or more"),
        (NodeSelection, {"tag": "brains", "round_timeout": -1.0}, "round_timeout is -1.0; choose 0 or more"),
        (Federation, {"tag": "brains", "nodes_per_round": 0}, "nodes_per_round is 0; choose 1 or more"),
        (Federation, {"tag": "brains", "node_timeout": -5}, "node_timeout is -5; choose 0 or more"),
    ],
)
def test_a_node_selection_that_makes_no_sense_is_refused_where_it_is_made(kind, settings, message):
    with pytest.raises(UsageError, match=message):
        kind(**settings)


def test_stages_follow_each_other(config):
    state = RunState(
        config=config,
        federation=Federation(tag="tag"),
        stages=(Stage(3, 10), Stage(2, 200, 50.0)),
        seed=1,
        save_every=10,
    )
    assert state.rounds == 5
    assert [state.stage_at(n).updates_per_round for n in range(1, 6)] == [10, 10, 10, 200, 200]
    assert [state.stage_begins(n) for n in range(1, 6)] == [True, False, False, True, False]
    assert [state.config_at(n).clip_weight for n in (3, 4)] == [config.clip_weight, 50.0]
    with pytest.raises(UsageError):
        Stage(0)


def test_a_runs_state_is_read_as_it_was_written(config, tmp_path):
    stages = (Stage(3, 10), Stage(2, 200, 50.0))
    state = RunState(
        config=config, federation=Federation(tag="tag", min_nodes=2), stages=stages, seed=1, save_every=10,
        seconds=[1.0, 3.0], round_done=2, events=[RoundEvent(round=2, node="b", kind="lost", reason="no reply")],
        shared_anatomy=[SharedAnatomy(round=2, pairs={"bright / dark": 0.5})],
        answers={"a": SiteAnswers(node_name="alpha", domain="dark", rounds=(1, 2), num_bytes=16)},
        site_updates={"a": ReceivedUpdate(node_name="alpha", domain="dark", num_bytes=8, numbers={"loss": 0.5})},
    )  # fmt: skip
    state.save(tmp_path)
    assert RunState.load(tmp_path) == state
    assert state.seconds_left() == pytest.approx(6)
    (tmp_path / "experiment.json").write_text('{"made_by": "x", "config": 3}')
    with pytest.raises(CheckpointError, match="not readable"):
        RunState.load(tmp_path)
    with pytest.raises(UsageError, match="choose a folder that a training run wrote"):
        RunState.load(tmp_path / "nowhere")


def test_another_number_of_answers_is_kept_with_the_round_from_which_it_holds(config, tmp_path):
    federation = Federation(tag="tag", nodes_per_round=3)
    state = RunState(
        config=config, federation=federation, stages=(Stage(9),), seed=1, save_every=10, round_done=4
    )  # fmt: skip
    state.require_answers(2)  # as by default
    assert state.quorum_changes == []
    state.require_answers(1)
    assert (state.min_answers, state.quorum_changes) == (1, [QuorumChange(round=5, before=2)])
    state.save(tmp_path)
    assert RunState.load(tmp_path) == state
    assert answers_needed(state.min_answers, state.quorum_changes) == "1 (2 before round 5)"
    with pytest.raises(UsageError, match="min_nodes is 4; choose at most nodes_per_round"):
        state.require_answers(4)
    state.federation = replace(state.federation, secagg=True)
    with pytest.raises(UsageError, match="min_nodes is 1; with secagg it must be 2 or more"):
        state.require_answers(1)
    assert state.min_answers == 1 and len(state.quorum_changes) == 1
    content = json.loads((tmp_path / "experiment.json").read_text())
    del content["quorum_changes"]
    (tmp_path / "experiment.json").write_text(json.dumps(content))
    assert RunState.load(tmp_path).quorum_changes == []  # of a version in which it could not change


def test_a_site_that_reports_part_of_the_quality_or_more_does_not_end_the_run(config):
    state = RunState(config=config, federation=Federation(tag="tag"), stages=(Stage(3),), seed=1, save_every=10)
    whole = {"quality_distance": 20.0, "quality_layout": 0.9, "quality_contrast": 0.9}
    state.history["bright"] = [
        {"round": 1, **whole, "quality_other": 1.0},
        {"round": 2, "quality_layout": 0.1},
        {"round": 3, "quality_other": 1.0},
    ]
    assert state.quality("bright") == {"distance": 20.0, "layout": 0.9, "contrast": 0.9}
    assert state.quality("dark") == {} and len(state.alarms()) == 1


@pytest.mark.parametrize("pseudo_labels", [False, True])
def test_little_shared_anatomy_is_no_alarm_where_sites_show_pseudo_labels(pseudo_labels, config):
    drawing = replace(config, classes=3, pseudo_labels=pseudo_labels)
    state = RunState(config=drawing, federation=Federation(tag="tag"), stages=(Stage(3),), seed=1, save_every=10)
    state.shared_anatomy = [SharedAnatomy(round=1, pairs={"bright / dark": 0.1})]
    assert len(state.alarms()) == (0 if pseudo_labels else 2)


def test_the_plan_that_is_approved_does_not_depend_on_hyper_parameters(config):
    """What is hashed is the source that travels; settings go beside it, in the model's and training arguments."""
    import inspect

    from fedfactory.researcher.plans.factory_plans import FactoryPlan

    source = inspect.getsource(FactoryPlan)
    lines = FactoryPlan.init_dependencies(None)
    for value in (config.learning_rate, config.r1_gamma, config.batch_size, *config.domains):
        assert f"{value!r}" not in source + "".join(lines)
    assert "transport" not in source
