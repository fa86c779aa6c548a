"""Rounds of a factory that draws labels with its images: what a node reads, refuses and sends."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedbiomed.common.dataset_types import DataReturnFormat
from fedbiomed.common.exceptions import FedbiomedError
from fedfactory.adaptation.labels.candidate_labels import UNKNOWN, candidates_from_boxes, only_candidate
from fedfactory.errors import ConfigError, NodeDataError
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.node.plans.factory_dataset import SliceDataset
from fedfactory.node.site_data.training_slices import known_labels
from fedfactory.researcher.agreement import disagreements
from helpers import guarded, site_facts
from simulated_node import node_round


@pytest.fixture(scope="module")
def paired(config):
    return replace(config, classes=3)


@pytest.fixture
def guard():
    with guarded() as running:
        yield running


def of_kind(store, kind):
    """The store as if all its labels were of a kind."""
    store.cases = [replace(case, label_kind=kind) for case in store.cases]
    store.label_kind = kind
    return store


def arguments(config):
    return {"factory": config.to_dict(), "seed": 0, "transport": "float32"}


def test_a_round_trains_on_labels_and_sends_what_a_factory_of_images_sends(copied_store, config, paired, guard):
    from fedfactory.researcher.plans.factory_plans import FactoryPlan, LabelledFactoryPlan

    labelled = node_round(LabelledFactoryPlan, arguments(paired), copied_store.path, share_persistent_buffers=False)
    assert guard.tensors == {name: tuple(tensor.shape) for name, tensor in labelled.params.items()}
    images = node_round(FactoryPlan, arguments(config), copied_store.path, share_persistent_buffers=False)
    assert set(labelled.params) == set(images.params)
    assert set(labelled.report) == set(images.report)
    assert not any("discriminator." in name for name in labelled.params)
    assert all(torch.isfinite(tensor).all() for tensor in labelled.params.values())


def test_labels_change_what_is_learnt(copied_store, paired, guard, monkeypatch):
    """Two updates with the site's labels and with none: the generator must differ, or labels are not used."""
    from fedfactory.researcher.plans.factory_plans import LabelledFactoryPlan

    first = node_round(LabelledFactoryPlan, arguments(paired), copied_store.path)
    again = node_round(LabelledFactoryPlan, arguments(paired), copied_store.path)
    monkeypatch.setattr(
        "fedfactory.node.plans.factory_dataset.known_labels",
        lambda store, classes, **options: np.full_like(known_labels(store, classes), UNLABELLED),
    )
    without = node_round(LabelledFactoryPlan, arguments(paired), copied_store.path)
    name = "generator.head.bias"
    assert torch.equal(first.params[name], again.params[name])
    assert not torch.equal(first.params[name], without.params[name])


def test_a_plan_approved_for_images_does_not_learn_labels(copied_store, paired, guard):
    from fedfactory.researcher.plans.factory_plans import FactoryPlan

    with pytest.raises(NodeDataError, match="use `LabelledFactoryPlan`"):
        node_round(FactoryPlan, arguments(paired), copied_store.path)


def test_a_store_of_another_number_of_classes_is_refused(copied_store, paired, guard):
    from fedfactory.researcher.plans.factory_plans import LabelledFactoryPlan

    with pytest.raises(FedbiomedError, match="have 3 classes, background included, and the factory draws 4"):
        node_round(LabelledFactoryPlan, arguments(replace(paired, classes=4)), copied_store.path)


def test_the_configuration_chooses_the_plan(config, paired):
    from fedfactory.researcher.experiment import _plan_for

    names = [_plan_for(each).__name__ for each in (config, paired, replace(config, discriminator="shared"))]
    assert names == ["FactoryPlan", "LabelledFactoryPlan", "SharedDiscriminatorPlan"]


@pytest.mark.parametrize(
    ("facts", "fits"),
    [
        ({"classes": 3}, True),
        ({"classes": 4}, False),
        ({"classes": 0, "label_kinds": {"none": 3}}, True),
        ({"classes": 4, "label_kinds": {"none": 3}}, True),  # labels of patients held out for testing
    ],
)
def test_labelled_sites_must_have_the_factorys_classes(paired, facts, fits):
    from fedfactory.node.site_facts import description_of

    site = site_facts(domain="bright", size=16, **facts)
    found = disagreements({"node": description_of(site)}, paired)
    assert ("node" not in found) == fits
    assert fits or "--classes 4" in found["node"]


@pytest.mark.parametrize("kind", ["dense", "scribble", "point", "block"])
def test_label_maps_are_known_as_they_are(copied_store, kind):
    chosen = copied_store.slices("train")
    assert np.array_equal(known_labels(of_kind(copied_store, kind), 3), copied_store.labels[chosen])
    with pytest.raises(NodeDataError, match="the largest label is 2"):
        known_labels(copied_store, 2)


def test_of_boxes_background_outside_and_the_core_are_known(copied_store):
    chosen = copied_store.slices("train")
    found = known_labels(of_kind(copied_store, "box"), 3)
    sets = np.stack([candidates_from_boxes(label, 3) for label in copied_store.labels[chosen]])
    assert ((found == 0) == (sets == 1)).all()
    assert ((found == UNLABELLED) == ((sets & (sets - 1)) != 0)).all()  # more than one class is possible
    assert {0, UNLABELLED} <= set(np.unique(found).tolist())


def test_of_image_level_labels_only_slices_without_any_structure_are_known(copied_store):
    presence = np.zeros((len(copied_store), 3), np.uint8)
    presence[:, 0] = 1
    presence[::2, 2] = 1
    copied_store.presence = presence
    found = known_labels(of_kind(copied_store, "image"), 3)
    empty = presence[copied_store.slices("train"), 2] == 0
    assert (found[empty] == 0).all()
    assert (found[~empty] == UNLABELLED).all()
    assert 0 < empty.sum() < len(empty)


def test_a_site_without_labels_knows_none(copied_store):
    found = known_labels(of_kind(copied_store, "none"), 3)
    assert len(found) == len(copied_store.slices("train"))
    assert (found == UNLABELLED).all()


def test_only_pixels_without_a_choice_have_a_class():
    assert only_candidate(np.array([[UNKNOWN, 1, 2, 3, 4, 6]]), 3).tolist() == [[255, 0, 1, 255, 2, 255]]


def test_a_dataset_gives_labels_only_to_a_factory_that_draws_them(copied_store, config, paired):
    for each, names in ((config, {"image", "z_bin"}), (paired, {"image", "z_bin", "labels"})):
        dataset = SliceDataset()
        dataset.config = each
        dataset.load(str(copied_store.path), DataReturnFormat.TORCH)
        assert set(dataset.get_item(1)) == names
    number = copied_store.slices("train")[1]
    assert np.array_equal(dataset.get_item(1)["labels"].numpy(), copied_store.labels[number])


def test_the_command_hands_the_number_of_classes_and_the_turns_on(config, tmp_path):
    from fedfactory.commands.researcher import _factory_config

    chosen = {"classes": 4, "turn": 0.5, "z_bins": None}
    made = _factory_config("a,b", "tiny", None, chosen)
    assert (made.classes, made.turn, made.z_bins) == (4, 0.5, 12)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    assert _factory_config("", "tiny", tmp_path / "config.json", {"classes": 3}).classes == 3
    with pytest.raises(ConfigError, match="discriminator is 'shared'"):
        (tmp_path / "config.json").write_text(json.dumps({**config.to_dict(), "discriminator": "shared"}))
        _factory_config("", "tiny", tmp_path / "config.json", {"classes": 3})
