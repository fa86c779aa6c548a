"""Federated segmentation without a network in between: agreements, refusals, averages, scores."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedbiomed.common.dataset_types import DataReturnFormat
from fedbiomed.common.exceptions import FedbiomedError
from fedfactory.adaptation.evaluation.evaluate import evaluate
from fedfactory.adaptation.evaluation.summary import class_means, mean_over_classes
from fedfactory.adaptation.inference import segment
from fedfactory.adaptation.methods.catalogue import describe
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteUpdate
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.cli import main
from fedfactory.commands.federated_segmentation import _options
from fedfactory.errors import ConfigError, FederationError, NodeDataError, UsageError
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.node.labelling import train_on_store
from fedfactory.node.plans.segmentation_plan import SegmentationDataset
from fedfactory.node.plans.site_settings import SiteSettings
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_data.held_out_scores import held_out_scores
from fedfactory.node.site_data.training_slices import site_slices
from fedfactory.node.site_facts import ModalityFacts, description_of, read_facts, store_facts
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import site_facts, small_config

CONFIG = MethodConfig(method="fedavg", classes=3, size=32, sites=2, rounds=2, width=4)


@pytest.fixture
def large(site, tmp_path):
    """A store of three cases at 32 px; the split of a single case is test."""
    config = PrepareConfig(domain="bright", size=32, z_bins=4, validation_share=0, test_share=0.34)
    return prepare(site, tmp_path / "large", config).store


def opened(store, config=CONFIG, **site_settings):
    dataset = SegmentationDataset()
    dataset.config, dataset.site_settings = config, SiteSettings(**site_settings)
    dataset.load(str(store.path), DataReturnFormat.TORCH)
    return dataset


def test_a_site_is_held_to_the_labels_it_announced(large):
    assert large.label_kinds() == {"dense": 16}
    assert len(opened(large, label_kinds={"dense": 16})) == 16
    with pytest.raises(
        FedbiomedError, match="announced 16 slices with box labels and holds 16 slices with dense labels"
    ):
        opened(large, label_kinds={"box": 16})


def test_a_store_that_does_not_fit_the_method_is_refused_without_its_path(large, store):
    for bad, config, message in [
        (store, CONFIG, "have 16 px, the method 32"),
        (large, MethodConfig(**{**CONFIG.to_dict(), "classes": 2}), "3 label values, the method 2"),
    ]:
        with pytest.raises(FedbiomedError, match=message) as caught:
            opened(bad, config)
        assert str(bad.path) not in str(caught.value)


def test_a_site_that_kept_all_its_cases_for_testing_cannot_train(site, tmp_path):
    store = prepare(site, tmp_path / "s", PrepareConfig(domain="x", size=32, z_bins=4, split="validation")).store
    with pytest.raises(NodeDataError, match="no training slices"):
        site_slices(store, 3)


def test_labels_of_every_kind_become_candidate_labels(site, tmp_path):
    names = [f"case{number}" for number in range(3)]
    for number, kind in enumerate(("dense", "image", "none")):
        exclude = tuple(name for name in names if name != names[number])
        config = PrepareConfig(domain="x", size=32, z_bins=4, split="train", label_kind=kind, exclude=exclude)
        store = prepare(site, tmp_path / "mixed", config).store
    data = site_slices(store, 3)
    assert data.kinds.tolist() == ["dense"] * 8 + ["image"] * 8 + ["none"] * 8
    np.testing.assert_array_equal(data.candidates[:8], 1 << store.labels[:8].astype(int))
    assert data.candidates[8:16].any() and not data.candidates[16:].any()
    assert (data.labelled_indices < 16).all() and set(range(8)) <= set(data.labelled_indices)


def test_scores_of_a_perfect_and_of_a_constant_segmenter(large):
    class Oracle(torch.nn.Module):
        def forward(self, x):
            grey = x[:, 0]
            truth = torch.from_numpy(np.stack([by_image[image.numpy().tobytes()] for image in grey])).long()
            return 50.0 * torch.nn.functional.one_hot(truth, 3).movedim(-1, 1).float()

    images = large.images[:].astype(np.float32)
    by_image = {image.tobytes(): label for image, label in zip(images, large.labels, strict=True)}
    card = SegmenterCard(classes=3, network="federated")
    found = held_out_scores(large, Segmenter(Oracle(), large.format, card))
    assert found["test_cases"] == 1
    assert found["dice"] > 0.98 and found["hd95"] < 3.0  # of the volume itself, from which the slices were resampled
    by_image = {key: np.zeros_like(label) for key, label in by_image.items()}
    found = held_out_scores(large, Segmenter(Oracle(), large.format, card))
    assert found["dice"] == 0 and math.isnan(found["hd95"])
    assert (found["dice_undefined"], found["hd95_undefined"]) == (0, 2)


def test_a_site_scores_on_the_images_grid_as_segment_and_evaluate_do(site, tmp_path):
    """Pixels of 9 mm cannot show a ball of 3 mm voxels: on the grid of the slices the numbers would be others."""
    names = ("case0", "case1", "case2")
    config = PrepareConfig(domain="x", size=16, spacing=9.0, z_bins=4)
    prepare(site, tmp_path / "s", replace(config, split="train", exclude=names[1:]))
    store = prepare(site, tmp_path / "s", replace(config, split="test", exclude=names[:1])).store
    made = train_on_store(store, small_config(updates=40, batch_size=8))
    found = held_out_scores(store, made)
    made.save(tmp_path / "m.safetensors")
    for name in names[1:]:
        write_volume(tmp_path / "images" / f"{name}.nii.gz", read_volume(site / name / "image" / "scan.nii.gz"))
    segment([tmp_path / "images"], [tmp_path / "m.safetensors"], tmp_path / "out")
    scores = evaluate(tmp_path / "out", site).scores
    for measure in ("dice", "hd95"):
        expected = mean_over_classes(scores, measure)
        assert found[measure] == pytest.approx(expected, rel=0.02)  # slices in the store are float16
        for label, value in class_means(scores, measure).items():
            assert found[f"{measure}_{label}"] == pytest.approx(value, rel=0.05)
    assert found["test_cases"] == 2 and found["dice"] < 1


def test_the_researcher_sees_which_labels_a_site_has_and_no_more(large):
    text = description_of(store_facts(large, SiteChoices()))
    facts = read_facts(text)
    assert facts.label_kinds == {"dense": 16} and facts.classes == 3
    assert "case" not in text


def test_sites_must_agree_on_the_size_and_be_registered_with_their_kinds():
    from fedfactory.researcher.segmentation import agreed_facts

    good = description_of(site_facts())
    without_label_kinds = json.dumps({k: v for k, v in site_facts().to_dict().items() if k != "label_kinds"})
    assert set(agreed_facts({"n1": good, "n2": good})) == {"n1", "n2"}
    for other, message in [
        (description_of(site_facts(size=64)), r"size differs \(n1: 32, n2: 64\)"),
        (without_label_kinds, "n2: not registered by this version"),
        (description_of(site_facts(plane="coronal")), r"plane differs \(n1: axial, n2: coronal\)"),
        (description_of(site_facts(version="0.0")), r"version differs \(n1: .*, n2: 0.0\), unlike the others: n2;"),
        ("something else", "n2: not registered by this version"),
    ]:
        with pytest.raises(FederationError, match=message):
            agreed_facts({"n1": good, "n2": other})


def test_a_method_does_not_start_without_the_labels_it_needs():
    from fedfactory.researcher.segmentation import require_labels

    def facts(**kinds):
        return {node: site_facts(label_kinds={kind: 1}) for node, kind in kinds.items()}

    require_labels(describe("fedmix"), facts(a="dense", b="none"))
    require_labels(describe("fedavg"), facts(a="box"))
    require_labels(describe("hssf"), facts(a="none"))
    mri = ModalityFacts(slices=1, classes=3, label_kinds={"dense": 1})
    require_labels(describe("cmc"), {"a": site_facts(label_kinds={"none": 1}, modalities={"mri": mri})})
    with pytest.raises(UsageError, match="0 of 2 sites have labels"):
        require_labels(describe("fedavg"), facts(a="none", b="none"))
    with pytest.raises(UsageError, match="dense labels"):
        require_labels(describe("fedmix"), facts(a="box"))


def test_a_plan_runs_no_other_method_than_the_approved_one():
    from fedfactory.node.plans.segmentation_plan import SegmentationTrainingPlan

    class Approved(SegmentationTrainingPlan):
        method_name = "local"

    config = CONFIG.to_dict()
    with pytest.raises(NodeDataError, match="method is 'fedavg'; this plan was approved for 'local' only"):
        Approved().init_model({"config": config})
    with pytest.raises(NodeDataError, match="at most"):
        Approved().init_model({"config": {**config, "method": "local", "updates": 10**6}})
    with pytest.raises(ConfigError, match="not usable"):
        Approved().init_model({"config": {**config, "out": "/etc/passwd"}})


def test_the_average_weights_sites_by_the_methods_rule():
    from fedfactory.researcher.method_aggregator import MethodAverage

    average = MethodAverage(make_method(CONFIG), ["n1", "n2"], {"n1": {"dense": 1}, "n2": {"none": 1}})
    assert average.create_aggregator_args({}, ["n2"])["n2"]["site"] == 1
    before = {"w": torch.zeros(2), "n": torch.tensor(3)}
    sent = {"n2": {"w": torch.full((2,), 4.0), "n": torch.tensor(7)}, "n1": {"w": torch.zeros(2), "n": torch.tensor(4)}}

    def merged(first, second):
        replies = {
            node: {"optimizer_args": SiteUpdate(count, 0.1).to_dict()}
            for node, count in (("n1", first), ("n2", second))
        }
        updates = {node: SimpleNamespace(load=lambda node=node: sent[node]) for node in sent}
        return average.aggregate(updates, {}, training_replies=replies, global_model=before)

    found = merged(10, 30)
    assert found["w"].tolist() == [3.0, 3.0] and found["n"].item() == 6 and found["n"].dtype == torch.int64
    assert average.shares == {"n1": 0.25, "n2": 0.75}
    assert merged(0, 0)["w"] is before["w"]
    sent["n1"]["w"][0] = torch.nan
    assert merged(0, 5)["w"].tolist() == [4.0, 4.0]  # a site with weight 0 may have sent NaN
    with pytest.raises(FederationError, match="NaN"):
        merged(1, 5)


def test_settings_of_a_method_on_the_command_line(capsys):
    assert _options(["a=1", "b=0.5", "c=true", "d=reject"]) == {"a": 1, "b": 0.5, "c": True, "d": "reject"}
    with pytest.raises(UsageError, match="NAME=VALUE"):
        _options(["alone"])
    with pytest.raises(SystemExit) as ended:
        main(["methods"])
    assert not ended.value.code
    assert "fedicra" in capsys.readouterr().out


def test_the_table_leaves_out_scores_that_no_site_measured():
    from fedfactory.researcher.round_records import ReceivedUpdate
    from fedfactory.researcher.segmentation import SegmentationResult, score_table

    numbers = {"slices_dense": 3, "own_dice": 0.5, "global_dice": 0.25, "own_hd95": math.nan}
    sites = {
        "n1": ReceivedUpdate(node_name="alpha", numbers=numbers),
        "n2": ReceivedUpdate(node_name="n2", numbers={"slices_none": 3}),
    }
    table = score_table(SegmentationResult(CONFIG, sites))
    assert table == [
        ["alpha", "dense", "0.500", "", "0.250", ""],
        ["n2", "none", "", "", "", ""],
        ["mean", "", "0.500", "", "0.250", ""],
    ]


def test_a_score_that_became_undefined_is_not_that_of_an_earlier_round():
    from fedfactory.researcher.round_records import ReceivedUpdate
    from fedfactory.researcher.segmentation import SegmentationResult

    def update(**numbers):
        return {"n": ReceivedUpdate(node_name="alpha", numbers=numbers)}

    result = SegmentationResult(CONFIG, update())
    result.add_round(update(loss=0.5, own_dice=0.2, own_hd95=8.0, own_hd95_1=8.0, global_hd95=9.0), trained=True)
    result.add_round(update(loss=math.nan, own_dice=0.0, own_hd95=math.nan, global_hd95=7.0), trained=True)
    assert result.sites["n"].numbers == {"loss": 0.5, "own_dice": 0.0, "global_hd95": 7.0}
    result.add_round(update(global_dice=0.0, global_hd95=math.nan), trained=False)
    assert result.sites["n"].numbers == {"loss": 0.5, "own_dice": 0.0, "global_dice": 0.0}
