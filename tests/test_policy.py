"""A site's policy: what its file may say, what it refuses and admits, and what its administrator is told."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
from dataclasses import asdict, fields, is_dataclass, replace
from types import SimpleNamespace

import pytest
from connections import make_component
from fedfactory.adaptation.engine.segmenter_config import ContrastMix, SegmenterConfig
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.registry import METHODS, make_method
from fedfactory.adaptation.network_names import SITE_NETWORKS
from fedfactory.adaptation.networks.translator_network import EncoderConfig
from fedfactory.adaptation.training.translator_training import TranslatorConfig
from fedfactory.cli import main
from fedfactory.errors import ConfigError, UsageError
from fedfactory.generative.config import PRESETS, FactoryConfig
from fedfactory.node import sites
from fedfactory.node.connection.check import OK, PROBLEM, WARNING
from fedfactory.node.connection.component import NODE, read_component
from fedfactory.node.policy import default_arguments as defaults
from fedfactory.node.policy.approval import WANTED, refuse_without_approval, turn_approval_on
from fedfactory.node.policy.arguments import ArgumentTable, admits, is_wider
from fedfactory.node.policy.default_arguments import ANYTHING, TEXT, default_arguments
from fedfactory.node.policy.policy import EXPLAINED, EXPLANATIONS, Policy, default_text, policy_file
from fedfactory.node.policy.policy_check import check_policy
from fedfactory.node.policy.request import INACTIVE, RoundRequest, Usage, check_request
from fedfactory.node.policy.request_kind import ADAPTATION, FACTORY, SEGMENTATION
from fedfactory.node.policy.request_size import size_of
from fedfactory.node.site_adaptation import Adaptation
from helpers import CONFIG, SMALL, site_facts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

IDLE = Usage(rounds=0, scorings=0, states=0.0, free_disk=500.0)
TINY = FactoryConfig.preset("tiny", ("a", "b"))
FACTORY_ARGS = {"factory": TINY.to_dict(), "seed": 0, "transport": "float32"}
SETTINGS = [setting.name for setting in fields(Policy)]


def training_args(**given) -> dict:
    """As the framework completes what a researcher's experiment is made with."""
    from fedbiomed.common.training_args import TrainingArgs

    return TrainingArgs(given, only_required=False).dict()


def request(model_args: dict | None = None, **changes) -> RoundRequest:
    """A request that the default policy admits: a round of the tiny factory."""
    values = {
        "training": True,
        "model_args": FACTORY_ARGS if model_args is None else model_args,
        "training_args": training_args(loader_args={"batch_size": TINY.batch_size}, num_updates=10, random_seed=0),
        "aggregator_args": {}, "secure_aggregation": False, "patients": 5, "slices": 100, "approval_on": True,
        "default_plans_allowed": False,
    }  # fmt: skip
    return RoundRequest(**{**values, **changes})


def segmentation(train=True, args=None, **changes) -> RoundRequest:
    config = replace(CONFIG, **changes)
    own = {"loader_args": {"batch_size": config.batch_size}, "num_updates": config.updates, **(args or {})}
    return request({"config": config.to_dict(), "train": train}, training_args=training_args(**own))


def with_factory(**changes) -> RoundRequest:
    return request({**FACTORY_ARGS, "factory": {**TINY.to_dict(), **changes}})


def reasons(asked: RoundRequest, policy: Policy | None = None, **usage) -> list[str]:
    return check_request(policy or Policy(), asked, replace(IDLE, **usage))


def adapting(labelled, adaptation=None, **changes) -> RoundRequest:
    args = {"card": replace(labelled, localiser=None).to_dict(), "adaptation": (adaptation or Adaptation()).to_dict()}
    training = training_args(loader_args={"batch_size": 1}, num_updates=1, share_persistent_buffers=True)
    return request(args, **{"training_args": training, **changes})


# The requests that this package makes.


@pytest.fixture
def experiments(monkeypatch):
    """Arguments of each experiment that the researcher's code makes, without a federation."""
    from fedfactory.researcher import experiment, remote_adaptation, segmentation

    made = []

    def make(tag, **options):
        made.append(options)
        model = SimpleNamespace(load_state_dict=lambda state: None)
        return SimpleNamespace(training_plan=lambda: SimpleNamespace(model=lambda: model))

    for module in (experiment, segmentation, remote_adaptation):
        monkeypatch.setattr(module, "make_experiment", make)
    return made


def request_of(options: dict, aggregator_args: dict) -> RoundRequest:
    """What a node receives for an experiment: over the network, tuples become lists."""
    own = json.loads(json.dumps(options["model_args"]))
    return request(own, training_args=training_args(**options["training_args"]), aggregator_args=aggregator_args)


@pytest.mark.parametrize("discriminator", ["local", "shared"])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_of_the_factory_is_admitted(preset, discriminator, experiments):
    from fedfactory.researcher.experiment import factory_experiment

    config = FactoryConfig.preset(preset, ("T1 1.5 T", "t2"), discriminator=discriminator)
    factory_experiment(config, tag="brains", rounds=3, seed=2**40, transport="float16")
    (options,) = experiments
    average = options["aggregator"]
    assert reasons(request_of(options, {})) == []
    average.sizes = {"n1": ("a", 10), "n2": ("b", 990)}
    encrypted = average.create_aggregator_args(node_ids=["n1", "n2"])["n1"]
    assert encrypted["row_factor"] == 100 and reasons(request_of(options, encrypted)) == []


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_admitted_in_rounds_and_in_the_scoring_of_the_last_average(name, experiments):
    from fedfactory.researcher.segmentation import method_experiment

    options = SMALL["cmc"] if name == "cmc" else {}
    method = make_method(MethodConfig(method=name, classes=4, size=256, sites=2, rounds=5, options=options))
    method_experiment(method, tag="hearts", facts={"n1": site_facts(), "n2": site_facts()})
    (made,) = experiments
    sent = made["aggregator"].create_aggregator_args(node_ids=["n1", "n2"])["n2"]
    asked = request_of(made, sent)
    assert asked.kind == SEGMENTATION and asked.sends_weights and not asked.scores_only
    assert reasons(asked) == []
    scoring = replace(asked, model_args={**asked.model_args, "train": False})
    assert scoring.scores_only and reasons(scoring) == []


@pytest.mark.parametrize("network", SITE_NETWORKS)
def test_every_network_depth_and_single_object_that_a_researcher_can_ask_for_is_admitted(network):
    own = {"method": "hssf", "size": 64, "options": {"network": network}}
    for depth in (None, 3, 5):
        assert reasons(segmentation(**own, depth=depth, single_objects=(0, 2))) == []
    (refused,) = reasons(segmentation(method="hssf", options={"network": "unet-huge"}))
    assert refused.startswith("model_args.config.options.network is 'unet-huge'; it must be")


@pytest.mark.parametrize("adaptation", [Adaptation(), Adaptation(engine="translator", volumes=5, keep=3)])
def test_an_adaptation_is_admitted_although_its_batch_is_one(adaptation, labelled, experiments):
    from fedfactory.researcher.remote_adaptation import adaptation_experiment

    adaptation_experiment(labelled, adaptation, tag="brains", nodes=["n1"])
    (options,) = experiments
    asked = request_of(options, {})
    assert asked.kind == ADAPTATION and not asked.sends_weights
    assert reasons(asked) == []
    assert reasons(asked, Policy(require_secure_aggregation=True, scores_leave=False)) == []  # no weights leave


def test_the_table_names_every_argument_of_every_plan_and_no_other():
    def names(kind) -> set[str]:
        return {setting.name for setting in fields(kind)}

    def plain(table) -> set[str]:
        return {name.removesuffix("[]") for name in table}

    options = set().union(*(names(method.Options) for method in METHODS.values()))
    assert plain(defaults.FACTORY) == names(FactoryConfig)
    assert plain(defaults.METHOD) == names(MethodConfig) - {"options"}
    assert plain(defaults.OPTIONS) == options
    contrast = {f"contrast.{name}" for name in names(ContrastMix)}
    assert plain(defaults.SEGMENTER) == names(SegmenterConfig) | contrast
    encoder = {f"encoder.{name}" for name in names(EncoderConfig)}
    assert plain(defaults.TRANSLATOR) == (names(TranslatorConfig) - {"encoder"}) | encoder
    assert {name.split(".")[0] for name in defaults.ADAPTATION} == names(Adaptation)
    assert set(defaults.METHOD["method"]) == set(METHODS)


def test_the_frameworks_own_training_arguments_are_all_known():
    from fedbiomed.common.training_args import TrainingArgs

    ours = {name.split(".")[1] for name in default_arguments() if name.startswith("training_args.")}
    scheme = TrainingArgs.default_scheme()
    assert scheme.keys() == INACTIVE.keys() | ours and not INACTIVE.keys() & ours
    assert {name: scheme[name]["default"] for name in INACTIVE} == INACTIVE


# Each limit at its edge.


@pytest.mark.parametrize(
    ("admitted", "refused", "words"),
    [
        (request(patients=2), request(patients=1), "training patients of the store are 1; they must be at least 2"),
        (request(slices=4), request(slices=3), "training slices of the store are 3; they must be at least 4"),
        (request(), request(approval_on=False), "approval of training plans is off"),
        (request(), request(default_plans_allowed=True), "example plans count as approved"),
        (request(), request(training=False), "training is off"),
        (segmentation(updates=2), segmentation(updates=1), "num_updates is 1; it must be a whole number from 2"),
        (segmentation(batch_size=2), segmentation(batch_size=1), "batch_size is 1; it must be a whole number from 2"),
        (segmentation(size=1024), segmentation(size=1040), "config.size is 1040; it must be from 16 to 1024"),
        (with_factory(z_bins=1000), with_factory(z_bins=1001), "z_bins is 1001; it must be from 1 to 1000"),
        (with_factory(shift=0), with_factory(shift=-1), "factory.shift is -1; it must be from 0 to 64"),
        (with_factory(head="palette"), with_factory(head="../x"), "factory.head is '../x'; it must be \"palette\" or"),
        (with_factory(mirror=True), with_factory(mirror=1), "factory.mirror is 1; it must be true or false"),
        (with_factory(z_bins=1), with_factory(z_bins=True), "z_bins is True; it must be from 1 to 1000"),
        (with_factory(texture=0), with_factory(texture=math.nan), "texture is nan"),
        (request(), with_factory(z_bins="12"), "z_bins is '12'"),
        (request(), with_factory(z_bins=[12]), "z_bins[] is 12; it must be left out"),
        (request(), with_factory(domains="ab"), "domains is 'ab'; it must be left out"),
        (request(), with_factory(path="/data"), "model_args.factory.path is '/data'; it must be left out"),
        (request(), with_factory(**{"a\u202e\x1b": 1}), "factory.a\\u202e\\x1b is 1; it must be left out"),
        (request(), request(aggregator_args={"site": -1}), "aggregator_args.site is -1"),
        (request(), request(aggregator_args={"lr": 1}), "aggregator_args.lr is 1; it must be left out"),
        (request(), request(training_args={**training_args(), "x": 1}), "training_args.x is 1; it must be left out"),
        (segmentation(True), segmentation(0), "train is 0; it must be true or false"),
        (segmentation(), segmentation(args={"num_updates": 9}), "are 9, 4; they must be equal"),
        (segmentation(), segmentation(args={"loader_args": {"batch_size": 9}}), "are 9, 4; they must be equal"),
        (segmentation(), segmentation(args={"loader_args": {}}), "loader_args.batch_size is None"),
        (segmentation(), segmentation(args={"num_updates": None}), "num_updates is None"),
        (
            segmentation(method="fedicra", options={"body_share": 0.5}),
            segmentation(method="fedicra", options={"body_share": 0.25}),
            "body_share is 0.25, 1 of 4 updates; they must be 0 or at least 2",
        ),
        (segmentation(), segmentation(method="fedprox", options={"temperature": 1}), "describe no network"),
        (segmentation(), segmentation(options={"gpu": 1}), "model_args.config.options.gpu is 1; it must be left out"),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)  # fmt: skip
def test_a_limit_admits_its_edge_and_refuses_what_is_beyond(admitted, refused, words):
    assert reasons(admitted) == []
    assert any(words in reason for reason in reasons(refused)), reasons(refused)
    assert all(reason.isprintable() and len(reason) < 400 for reason in reasons(refused))


def test_the_factorys_batch_and_updates_are_checked_in_both_places():
    one = training_args(loader_args={"batch_size": 1}, num_updates=10)
    found = reasons(replace(with_factory(batch_size=1), training_args=one))
    assert [reason.split(" is ")[0] for reason in found] == [
        "training_args.loader_args.batch_size", "model_args.factory.batch_size"
    ]  # fmt: skip
    assert "16, 8; they must be equal" in reasons(with_factory(batch_size=8))[0]


@pytest.mark.parametrize("name", INACTIVE)
def test_what_the_framework_would_do_by_itself_is_refused(name):
    active = {
        "optimizer_args": {"lr": 0.1}, "epochs": 1, "dry_run": True, "batch_maxnum": 1, "test_ratio": 0.1,
        "test_batch_size": 1, "test_on_local_updates": True, "test_on_global_updates": True,
        "shuffle_testing_dataset": True, "test_metric": "ACCURACY", "test_metric_args": {"a": 1}, "log_interval": 1,
        "fedprox_mu": 0.1, "dp_args": {"type": "local", "sigma": 0.1, "clip": 1.0},
    }[name]  # fmt: skip
    own = {"loader_args": {"batch_size": TINY.batch_size}, "num_updates": 10}
    found = reasons(request(training_args=training_args(**own, **{name: active})))
    assert len(found) == 1 and found[0].startswith(f"training_args.{name} is ")


@pytest.mark.parametrize(
    "model_args",
    [
        {},
        {"factory": TINY.to_dict(), "seed": 0, "transport": "float32", "train": False},
        {"factory": TINY.to_dict(), "card": {}, "adaptation": {}},
        {"config": CONFIG.to_dict(), "train": True, "adaptation": {}},
        {"seed": 0},
        [["factory", 1]],
        None,
    ],
)
def test_a_mixture_of_plans_is_refused(model_args):
    asked = request(model_args) if model_args is not None else replace(request(), model_args=None)
    assert asked.kind is None and asked.sends_weights
    assert any("it must have what one plan of fedfactory reads" in reason for reason in reasons(asked))


def test_rounds_and_scorings_of_a_day_are_counted_apart():
    policy = Policy(rounds_a_day=3, scorings_a_day=1)
    training, scoring = segmentation(), segmentation(train=False)
    assert reasons(training, policy, rounds=2, scorings=9) == reasons(scoring, policy, rounds=9, scorings=0) == []
    assert reasons(training, policy, rounds=3) == ["rounds in the last 24 hours are 3; another one must be within 3"]
    assert "scorings in the last 24 hours are 1" in reasons(scoring, policy, scorings=1)[0]
    assert "scores may not leave" in reasons(scoring, Policy(scores_leave=False))[0]
    assert reasons(training, Policy(scores_leave=False)) == []


def test_secure_aggregation_can_be_required():
    policy = Policy(require_secure_aggregation=True)
    assert reasons(request(), policy) == ["secure aggregation is off; it must be on"]
    assert reasons(request(secure_aggregation=True), policy) == []


def test_parameters_memory_and_disk_are_limited():
    asked = request()
    size = size_of(asked.kind, asked.model_args)
    from fedfactory.generative.factory import Factory

    assert size.parameters == sum(weight.numel() for weight in Factory(TINY).parameters())
    most = {"most_parameters": size.parameters, "most_memory": size.memory, "most_disk": 1 + size.state}
    policy, disk = Policy(**most), {"states": 1.0, "free_disk": 1 + size.state}
    assert reasons(asked, policy, **disk) == []
    assert "parameters are" in reasons(asked, replace(policy, most_parameters=size.parameters - 1), **disk)[0]
    assert "estimated memory is" in reasons(asked, replace(policy, most_memory=0.99 * size.memory), **disk)[0]
    assert "states would take" in reasons(asked, policy, states=1.01, free_disk=9)[0]
    assert "free disk is" in reasons(asked, policy, states=0.0, free_disk=1.0)[0]


def test_memory_grows_with_side_width_batch_and_adaptation(labelled):
    sizes = [size_of(FACTORY, {"factory": c.to_dict()}).memory for c in (TINY, replace(TINY, batch_size=32))]
    assert 1.5 < sizes[1] / sizes[0] < 2
    few, many = (size_of(FACTORY, {"factory": replace(TINY, classes=c).to_dict()}).memory for c in (4, 250))
    assert many > 1.5 * few  # hundreds of tissue maps
    one, four = (size_of(SEGMENTATION, {"config": replace(CONFIG, size=s).to_dict()}).memory for s in (256, 512))
    assert 3.5 < four / one <= 4
    args = adapting(labelled).model_args
    assert size_of(ADAPTATION, args).memory == pytest.approx(8, abs=0.1)  # GiB, of `Adaptation`
    assert size_of(ADAPTATION, args).state == 0


def test_a_network_that_stays_at_its_site_is_counted_too():
    asked = segmentation(method="hssf", options=SMALL["hssf"])
    assert "parameters are" in reasons(asked, Policy(most_parameters=1000))[0]


def test_counting_a_large_network_takes_no_memory_and_no_time():
    large = {"factory": FactoryConfig.preset("paper", ("a", "b")).to_dict()}
    assert size_of(FACTORY, large) is size_of(FACTORY, json.loads(json.dumps(large)))  # answered from memory
    assert 50e6 < size_of(FACTORY, large).parameters < 70e6


def test_a_card_may_not_name_what_no_plan_reads(labelled):
    asked = adapting(labelled)
    card = asked.model_args["card"]
    for name, changed, words in [
        ("path", {**card, "path": "x"}, "card.path is 'x'"),
        ("config", {**card, "config": {**card["config"], "z_bins": 10**6}}, "card.config.z_bins is 1000000"),
        ("translator", {**card, "robust": {**card["robust"], "translator": {"a": 1}}}, "robust.translator.a is 1"),
        ("localiser", {**card, "localiser": card["robust"]}, "card.localiser."),
    ]:
        found = reasons(replace(asked, model_args={**asked.model_args, "card": changed}))
        assert found and all(words in reason or "more reasons" in reason for reason in found), name


def test_a_first_guess_of_several_sites_has_the_limits_of_their_method(labelled):
    asked = adapting(labelled)
    federated = {"method": CONFIG.to_dict(), "context": {"site": 0, "network": "", "modality": ""}, "weights": "global"}
    card = asked.model_args["card"]
    card = {**card, "robust": {**card["robust"], "network": "federated", "plan": None, "federated": federated}}
    assert reasons(replace(asked, model_args={**asked.model_args, "card": card})) == []
    federated["method"]["width"] = 4096
    (reason,) = reasons(replace(asked, model_args={**asked.model_args, "card": card}))
    assert "robust.federated.method.width is 4096" in reason


def test_many_reasons_are_cut_and_endless_nesting_ends():
    wide = with_factory(**{f"x{number}": 1 for number in range(100)})
    assert len(reasons(wide)) == 21 and reasons(wide)[-1] == "there are 80 more reasons"
    assert "more than 5000 values" in reasons(with_factory(channels=[1] * 6000))[0]
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    assert "nested in more than" in reasons(with_factory(channels=deep))[0]
    while deep:  # Python takes such a list apart by recursion otherwise
        deep = deep[0]
    for number in (10**5000, -(10**5000)):
        assert "a very large number" in reasons(with_factory(z_bins=number))[0]


# Limits of arguments.


def test_two_numbers_are_a_range_and_other_lists_are_values():
    assert admits([1, 2], 1.5) and admits([[1, 2], None, "x"], 2) and admits([[1, 2], None], None)
    assert not admits([1, 2, 4], 1.5) and not admits([[1, 2], "x"], "y") and not admits([], None)
    assert admits([True], True) and not admits([True], 1) and not admits([1, 1], True)
    assert admits([TEXT], "x" * 1000) and not admits([TEXT], "x" * 1001) and not admits([TEXT], None)
    assert admits([ANYTHING], math.nan) and not admits([ANYTHING], 2**60) and not admits([ANYTHING], b"x")


@pytest.mark.parametrize(
    ("limit", "than", "wider"),
    [
        ([1, 5], [1, 5], False), ([1, 6], [1, 5], True), ([2, 4], [1, 5], False), ([2, 3, 4], [1, 5], False),
        ([[2, 3], None], [None, [1, 5]], False), ([None], [1, 5], True), ([TEXT], ["a"], True), (["a"], [TEXT], False),
        ([TEXT], [TEXT], False), ([1, 2], [ANYTHING], False), ([], [1, 5], False), ([ANYTHING], [TEXT], True),
    ],
)  # fmt: skip
def test_a_wider_limit_is_recognised(limit, than, wider):
    assert is_wider(limit, than) is wider


def test_names_with_stars_and_lists():
    table = ArgumentTable({"a.b[]": [1, 3], "a.c.*": ["x"], "a.d.**": [ANYTHING], "a.d.e": [1, 2], "a.**": [TEXT]})

    def refused(value):
        return len(list(table.refusals("a", value)))

    assert refused({"b": [1, 2, 3], "c": {"any": "x"}, "d": {"f": {"g": [1, None]}, "e": 1}, "z": "text"}) == 0
    assert refused({"b": [4]}) == refused({"b": 1}) == refused({"c": {"k": "y"}}) == refused({"d": {"e": 3}}) == 1
    assert refused({"d": {"e": {"f": 1}}}) == 1  # below a name of its own, `**` does not count
    assert refused({"c": {}}) == refused({"b": []}) == refused({}) == 0
    assert refused({"b": {"[]": 2}}) == refused({1: 2}) == 1


# The file.


@pytest.fixture
def node(tmp_path, monkeypatch):
    monkeypatch.setattr("fedfactory.node.site_check.running_nodes", list)
    for name in list(os.environ):
        if name.startswith("FBM_SECURITY"):
            monkeypatch.delenv(name)
    return make_component(tmp_path / "node", NODE, 1)


def write(node, **changes) -> None:
    policy_file(node).write_text(json.dumps({**json.loads(default_text()), **changes}))


def test_the_default_file_explains_every_setting_and_is_read_back(node):
    content = json.loads(default_text())
    assert set(content) == {EXPLAINED, *SETTINGS} and set(SETTINGS) <= set(content[EXPLAINED])
    assert set(EXPLANATIONS) == set(SETTINGS) and all(text.endswith(".") for text in content[EXPLAINED].values())
    Policy().save(node)
    assert stat.S_IMODE(policy_file(node).stat().st_mode) == 0o600
    assert Policy.load(node) == Policy() and Policy().unusual() == []
    changed = Policy(least_patients=9, most_epsilon=3.0, arguments={"model_args.seed": [None, [0, 5], "x"]})
    changed.save(node)
    assert Policy.load(node) == changed
    write(node, **{EXPLAINED: ["anything", 5]})
    assert Policy.load(node) == Policy()
    policy_file(node).write_text('{"least_batch": 4}')
    assert Policy.load(node) == Policy(least_batch=4)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("least_patients", 0, "least_patients is 0; it must be at least 1"),
        ("least_slices", -3, "least_slices is -3; it must be at least 1"),
        ("least_batch", 2.5, "least_batch is '2.5'; it must be of type int"),
        ("least_updates", True, "least_updates is 'True'; it must be of type int"),
        ("least_patients_scored", None, "least_patients_scored"),
        ("scores_leave", "yes", "scores_leave is 'yes'; it must be of type bool"),
        ("quality_leaves", 1, "quality_leaves"),
        ("rounds_a_day", -1, "rounds_a_day is -1; it must be at least 0"),
        ("scorings_a_day", "5", "scorings_a_day"),
        ("qualities_a_day", [], "qualities_a_day"),
        ("most_parameters", 0, "most_parameters is 0; it must be at least 1"),
        ("most_memory", math.nan, "most_memory is nan; it must be a positive number of GiB"),
        ("most_disk", math.inf, "most_disk is inf; it must be a positive number"),
        ("require_secure_aggregation", 0, "require_secure_aggregation"),
        ("allow_federated_analytics", "", "allow_federated_analytics"),
        ("allow_preprocessing", None, "allow_preprocessing"),
        ("most_epsilon", 0, "most_epsilon is 0.0; it must be a positive number, or null"),
        ("arguments", [], "arguments"),
        ("arguments", {"model_args.seed": 5}, "arguments: model_args.seed is 5; it must be a list"),
        ("arguments", {"model_args.seed": [[2, 1]]}, "has [2, 1]; a list within a list must be two numbers"),
        ("arguments", {"model_args.seed": [{}]}, "has {}; a value must be a number, a text"),
        ("leest_patients", 3, "'leest_patients' is no setting of a policy; choose from least_patients"),
    ],
)
def test_a_wrong_setting_is_named_with_its_file(name, value, words, node):
    write(node, **{name: value})
    with pytest.raises(ConfigError) as caught:
        Policy.load(node)
    assert str(caught.value).startswith(f"{policy_file(node)}: ") and words in str(caught.value)
    assert check_policy(node).state == PROBLEM


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must be a table of settings"),
        ('{"least_batch": 2, "least_batch": 1}', "'least_batch' stands there twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"least_batch": ' + "9" * 5000 + "}", "cannot be read as JSON"),
    ],
)
def test_a_file_that_is_no_policy_is_refused(text, words, node):
    policy_file(node).write_text(text)
    with pytest.raises(ConfigError, match=words):
        Policy.load(node)


def test_a_node_without_a_policy_is_told_how_to_get_one(node):
    with pytest.raises(UsageError, match=r"policy.json: this node has no policy.*fedfactory site policy"):
        Policy.load(node)


def test_what_allows_more_than_the_default_is_named():
    weaker = {"least_batch": 1, "rounds_a_day": 9999, "allow_preprocessing": True, "most_epsilon": None}
    table = default_arguments()
    table |= {"model_args.config.size": [16, 4096], "model_args.path": [TEXT], "model_args.config.width": [4, 64]}
    del table["model_args.seed"]
    found = Policy(**weaker, arguments=table).unusual()
    assert [sentence.split(" ")[0] for sentence in found] == [
        "least_batch", "rounds_a_day", "most_epsilon", "allow_preprocessing", "arguments:", "arguments:", "arguments:"
    ]  # fmt: skip
    assert "config.size" in found[4] and "model_args.path" in found[5] and "model_args.seed are not there" in found[6]
    assert Policy(most_epsilon=12).unusual() == ["most_epsilon is 12; the default, 10, allows less"]
    stricter = Policy(
        least_batch=8, rounds_a_day=5, scores_leave=False, require_secure_aggregation=True, most_epsilon=3
    )
    assert stricter.unusual() == []


# What the administrator types.


def run(*words) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code or 0


def test_the_command_writes_a_policy_once_and_shows_it(node, capsys):
    assert run("site", "policy", node) == 0
    assert str(policy_file(node)) in capsys.readouterr().out and policy_file(node).read_text() == default_text()
    write(node, least_patients=7, least_batch=1)
    before = policy_file(node).read_bytes()
    assert run("site", "policy", node) == 0 and policy_file(node).read_bytes() == before
    capsys.readouterr()
    assert run("site", "policy", node, "--show") == 0
    shown = capsys.readouterr().out
    assert "least_patients" in shown and "fewer training" in shown and "model_args.config.classes" in shown
    assert run("site", "policy", node, "--check") == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "least_batch is 1; the default, 2, allows less" and "1 unusual" in shown[-1]
    write(node, least_patients=0)
    for words in (["--check"], ["--show"], []):
        assert run("site", "policy", node, *words) == 2
        error = capsys.readouterr().err
        assert "policy.json: least_patients is 0" in error and len(error.strip().splitlines()) == 1
    assert run("site", "policy", node, "--check", "--show") == 2


def test_a_folder_that_is_no_node_gets_no_policy(tmp_path, capsys):
    assert run("site", "policy", tmp_path) == 2
    assert "no Fed-BioMed node here" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_the_check_of_a_site_looks_at_its_policy(node):
    assert check_policy(node).state == PROBLEM
    Policy().save(node)
    assert check_policy(node).state == OK
    Policy(least_patients=1).save(node)
    check = check_policy(node)
    assert check.state == WARNING and "least_patients is 1" in check.found and "policy.json" in check.remedy


# Approval, without which a policy is worth nothing.


def set_line(node, name, value) -> None:
    file = node / "etc" / "config.ini"
    file.write_text(file.read_text().replace(f"{name} = {WANTED[name]}", f"{name} = {value}"))


@pytest.fixture
def registered(monkeypatch):
    """Stores that would be registered with the framework."""
    made = []
    table = SimpleNamespace(search_by_tags=lambda tags: [])
    manager = SimpleNamespace(add_database=lambda **facts: made.append(facts["tags"]), dataset_table=table)
    opened = SimpleNamespace(dataset_manager=manager)
    monkeypatch.setattr(sites, "open_node", lambda root: opened)
    return made


def test_a_store_is_registered_with_a_policy_and_never_without_approval(node, store, registered):
    sites.add_store(node, store.path, "balls")
    assert registered == [["balls"]] and Policy.load(node) == Policy()
    write(node, least_patients=5)
    sites.add_store(node, store.path, "balls")
    assert Policy.load(node).least_patients == 5  # the administrator's own policy stays
    for name, value in (("training_plan_approval", "False"), ("allow_default_training_plans", "True")):
        set_line(node, name, value)
        assert sites.add_store(node, store.path, "balls")  # it says that the node must be restarted
        refuse_without_approval(node)
        assert not sites.add_store(node, store.path, "balls")


REGISTER_TWICE = """
import json, sys
from types import SimpleNamespace
from fedbiomed.node.dataset_manager import DatasetManager
from fedfactory.node.fedbiomed_hooks import register_dataset
database, first, other = sys.argv[1:]
manager = DatasetManager(database)
def register(**facts):
    register_dataset(SimpleNamespace(dataset_manager=manager), **facts)
    return manager.list_my_datasets(verbose=False)
(before,) = register(name="a", tag="balls", description="one", path=first)
(after,) = register(name="b", tag="balls", description="two", path=first)
try:
    register(name="c", tag="balls", description="three", path=other)
    refused = False
except Exception as error:
    refused = "conflicting" in str(error)
both = register(name="c", tag="cubes", description="three", path=first)
print("FOUND", json.dumps([before, after, refused, len(both)]))
"""


def test_data_that_are_registered_again_keep_their_id_and_have_their_description_replaced(tmp_path):
    """The framework refuses a second entry with the same tag: without this, no site could announce what has changed.
    In a process of its own, because the framework opens one database in each."""
    folders = [tmp_path / name for name in ("first", "other")]
    for folder in folders:
        folder.mkdir()
    words = [sys.executable, "-c", REGISTER_TWICE, tmp_path / "db.json", *folders]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    before, after, refused, count = json.loads(done.stdout.rpartition("FOUND ")[2])
    assert after == {**before, "name": "b", "description": "two"}
    assert (before["description"], refused, count) == ("one", True, 2)


@pytest.mark.parametrize("name", WANTED)
def test_no_store_is_registered_where_the_environment_turns_approval_off(name, node, store, registered, monkeypatch):
    monkeypatch.setenv(f"FBM_SECURITY_{name.upper()}", "True" if WANTED[name] == "False" else "False")
    with pytest.raises(UsageError) as caught:
        sites.add_store(node, store.path, "balls")
    text = str(caught.value)
    assert all(f"`{line} = {wanted}`" in text for line, wanted in WANTED.items()) and "config.ini" in text
    assert registered == []


def test_a_node_with_a_wrong_policy_gets_no_store(node, store, registered):
    write(node, least_patients=0)
    with pytest.raises(ConfigError, match="least_patients is 0"):
        sites.add_store(node, store.path, "balls")
    assert registered == []


@pytest.mark.parametrize("name", WANTED)
def test_variables_that_override_the_file_count(name, node, monkeypatch):
    variable = f"FBM_SECURITY_{name.upper()}"
    monkeypatch.setenv(variable, "True" if WANTED[name] == "False" else "False")
    with pytest.raises(UsageError, match=f"unset {variable}, which override"):
        refuse_without_approval(node)
    monkeypatch.setenv(variable, WANTED[name])
    set_line(node, name, "odd")
    refuse_without_approval(node)
    with pytest.raises(UsageError, match="training_plan_approval = True"):
        refuse_without_approval(node, {"FBM_SECURITY_TRAINING_PLAN_APPROVAL": "0"})  # of the process that runs it


def test_turning_approval_on_keeps_all_other_lines(node):
    file = node / "etc" / "config.ini"
    ours = "# ours\nTraining_Plan_Approval: no\nminimum_samples = 3\n"
    file.write_text(file.read_text().replace("training_plan_approval = True\n", ours))
    before = file.read_text().splitlines()
    turn_approval_on(node)
    after = file.read_text().splitlines()
    assert {line for line in before if line not in after} == {"Training_Plan_Approval: no"}
    refuse_without_approval(node)
    file.write_text("\n".join(line for line in after if "security" not in line and "ing_plan" not in line))
    turn_approval_on(node)
    refuse_without_approval(node)
    assert read_component(node, NODE).options["security.training_plan_approval"] == "True"


def test_the_framework_reads_what_was_turned_on(tmp_path, monkeypatch):
    from fedbiomed.node.config import NodeConfig, node_component

    for name in list(os.environ):
        if name.startswith("FBM_SECURITY"):
            monkeypatch.delenv(name)
    root = tmp_path / "node"
    node_component.initiate(root=str(root), alias="hospital-b")
    with pytest.raises(UsageError, match="approval of training plans is off"):
        refuse_without_approval(root)
    turn_approval_on(root)
    config = NodeConfig(root=str(root))
    assert config.getbool("security", "training_plan_approval")
    assert not config.getbool("security", "allow_default_training_plans")


# Anything at all.

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.binary(max_size=4),
    st.builds(lambda: 10**5000),
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
QUICKLY = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))


@QUICKLY
@given(st.dictionaries(st.sampled_from([*SETTINGS, EXPLAINED]) | st.text(max_size=5), JSON, max_size=4) | JSON)
def test_any_json_is_a_policy_or_named_as_none(content):
    try:
        policy = Policy.from_dict(content)
    except ConfigError as error:
        assert str(error)
    else:
        assert Policy.from_dict(json.loads(policy.text())) == policy
        assert isinstance(policy.unusual(), list)


def put(values: dict, path: list[str], part: object) -> dict:
    """A copy with something else at a place."""
    if len(path) == 1 or not isinstance(values.get(path[0]), dict):
        return {**values, path[0]: part}
    return {**values, path[0]: put(values[path[0]], path[1:], part)}


PATHS = [name.replace("[]", "").split(".")[1:] for name in default_arguments() if name.startswith("model_args.")]


@QUICKLY
@given(
    kind=st.sampled_from([FACTORY, SEGMENTATION]),
    path=st.sampled_from(PATHS),
    part=VALUES,
    name=st.sampled_from([*training_args()]),
    other=VALUES,
)
def test_any_argument_gives_reasons_and_never_a_traceback(kind, path, part, name, other):
    good = request() if kind == FACTORY else segmentation()
    for asked in (
        replace(good, model_args=put(dict(good.model_args), path, part)),
        replace(good, training_args={**good.training_args, name: other}),
        replace(good, model_args=part),
        replace(good, training_args=part),
        replace(good, aggregator_args=part),
    ):
        found = reasons(asked)
        assert all(isinstance(reason, str) and reason.isprintable() for reason in found)


@QUICKLY
@given(path=st.sampled_from([path for path in PATHS if path[0] in ("card", "adaptation")]), part=VALUES, data=st.data())
def test_any_card_gives_reasons_and_never_a_traceback(labelled, path, part, data):
    asked = adapting(labelled)
    robust = asked.model_args["card"]["robust"]
    if path[:2] == ["card", "robust"]:
        path = ["card", "robust", data.draw(st.sampled_from([*robust]))]
        if isinstance(robust[path[2]], dict) and robust[path[2]]:
            path.append(data.draw(st.sampled_from([*robust[path[2]]])))
    found = reasons(replace(asked, model_args=put(asked.model_args, path, part)))
    assert all(isinstance(reason, str) and reason.isprintable() for reason in found)


def test_requests_and_usage_are_plain_records():
    assert is_dataclass(RoundRequest) and set(asdict(IDLE)) == {"rounds", "scorings", "states", "free_disk"}
