"""Structures that are one connected object: learnt at sites, agreed on, and kept by federated segmenters."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.methods.catalogue import describe
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.errors import ConfigError
from fedfactory.imaging.pictures.decoding import write_picture
from fedfactory.imaging.volume_files import write_volume
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_data.held_out_scores import held_out_scores
from fedfactory.node.site_data.single_objects import single_objects_of
from fedfactory.node.site_facts import SiteFacts, description_of, read_facts, store_facts
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from fedfactory.researcher.segmentation import agreed_config
from helpers import CONFIG, ball_volume, figure, guarded, site_facts
from simulated_node import node_round

BALLS = (0, 1, 2)  # a ball with a core: each structure, and both together, are one object


def ball_store(folder, cases=2, *, islands=(), **options) -> SliceStore:
    """A store of balls, of which those with the numbers `islands` have a second core, far from the first."""
    for number in range(cases):
        image, label = ball_volume(shape=(32, 32, 6), radius=9.0, seed=number)
        if number in islands:
            label.data[1:7, 1:7, 1:5] = 2
        write_volume(folder / "volumes" / f"case{number}" / "image" / "scan.nii.gz", image)
        write_volume(folder / "volumes" / f"case{number}" / "label" / "mask.nii.gz", label)
    config = PrepareConfig(**{"domain": "x", "size": 32, "z_bins": 4, "split": "train", **options})
    return prepare(folder / "volumes", folder / "store", config).store


def test_a_site_announces_the_structures_that_are_one_object_in_its_labels(tmp_path):
    store = ball_store(tmp_path)
    assert single_objects_of(store) == BALLS
    assert read_facts(description_of(store_facts(store, SiteChoices()))).single_objects == BALLS


def test_a_structure_with_an_island_is_no_single_object(tmp_path):
    assert single_objects_of(ball_store(tmp_path, islands=(0, 1))) == (1,)


@pytest.mark.parametrize("options", [{"cases": 1}, {"label_kind": "none"}, {"label_kind": "image"}])
def test_one_patient_and_labels_that_are_not_dense_tell_nothing(options, tmp_path):
    store = ball_store(tmp_path, **options)
    assert single_objects_of(store) is None
    assert read_facts(description_of(store_facts(store, SiteChoices()))).single_objects is None


def test_test_patients_tell_nothing(tmp_path):
    for split in ("train", "test"):
        exclude = ("case2", "case3") if split == "train" else ("case0", "case1")
        store = ball_store(tmp_path, cases=4, islands=(2, 3), split=split, exclude=exclude)
    assert len(store.slices("test")) and single_objects_of(store) == BALLS


def test_pictures_tell_nothing_though_each_shows_one_object_of_a_class(tmp_path):
    for letter in "abc":
        for kind, pixels in (("images", figure(40, 40) * 100), ("masks", figure(40, 40))):
            (tmp_path / "pictures" / kind).mkdir(parents=True, exist_ok=True)
            write_picture(tmp_path / "pictures" / kind / f"{letter}.png", pixels)
    config = PrepareConfig(domain="x", size=32, split="train")
    store = prepare(tmp_path / "pictures", tmp_path / "store", config).store
    assert store.format.pictures and store.label_kinds() == {"dense": 3}
    assert single_objects_of(store) is None


@pytest.mark.parametrize("value", [[-1], [255], ["1"], [1.0], [True], "12", 1, {"1": 2}])
def test_announced_objects_that_are_no_labels_are_refused(value):
    with pytest.raises(ConfigError, match=r"^single_objects is .*; it must be a list of labels from 0 to 254$"):
        SiteFacts.from_dict({**site_facts().to_dict(), "single_objects": value})


@pytest.mark.parametrize(
    ("announced", "agreed"),
    [
        ([BALLS, (0, 2), None], (0, 2)),  # a site without such labels has no say
        ([(2, 1), (1, 2)], (1, 2)),
        ([BALLS, ()], ()),
        ([None, None], ()),
    ],
)
def test_sites_agree_on_what_is_one_object_at_each_of_them(announced, agreed):
    sites = {f"n{number}": site_facts(single_objects=own) for number, own in enumerate(announced)}
    config = agreed_config(describe("fedavg"), sites, None, rounds=2)
    assert config.single_objects == agreed
    assert MethodConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_single_objects_that_are_no_classes_are_refused():
    with pytest.raises(ConfigError) as refused:
        replace(CONFIG, single_objects=(1, 3))
    assert str(refused.value) == "single_objects is (1, 3); choose labels below classes, 3"


def test_the_segmenters_of_a_site_keep_the_agreed_objects(patients):
    """By a node's own round, and in the file that the site keeps."""
    from fedfactory.researcher.plans.segmentation_plans import PLANS

    config = replace(CONFIG, sites=1, rounds=1, updates=2, single_objects=(0, 1))
    with guarded():
        node_round(PLANS["fedavg"], {"config": config.to_dict()}, patients)
    folder = patients.with_name(patients.name + ".segmenters")
    for which in ("own", "global"):
        assert Segmenter.load(folder / f"bright_fedavg_{which}.safetensors").card.single_objects == (0, 1)


class Known(torch.nn.Module):
    """A network that finds the labels of a store, and islands of the first structure in two corners."""

    def __init__(self, store: SliceStore, *, islands: bool) -> None:
        super().__init__()
        images = store.images[:].astype(np.float32)
        self.labels = {image.tobytes(): label.copy() for image, label in zip(images, store.labels, strict=True)}
        if islands:
            for label in self.labels.values():
                label[1:4, 1:4] = label[-4:-1, -4:-1] = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        truth = np.stack([self.labels[image.numpy().tobytes()] for image in x])
        return 50.0 * torch.nn.functional.one_hot(torch.from_numpy(truth).long(), 3).movedim(-1, 1).float()


def test_held_out_scores_are_those_of_tidied_label_maps(patients):
    store = SliceStore(patients)

    def score(*, islands: bool, objects: tuple[int, ...]) -> dict[str, float]:
        card = SegmenterCard(classes=3, network="federated", single_objects=objects)
        return held_out_scores(store, Segmenter(Known(store, islands=islands), store.format, card))

    clean = score(islands=False, objects=())
    untidied, tidied = (score(islands=True, objects=objects) for objects in ((), (0,)))
    assert tidied == pytest.approx(clean)
    assert untidied["dice_1"] < clean["dice_1"] - 0.02 and untidied["hd95_1"] > 2 * clean["hd95_1"]
    assert score(islands=True, objects=(1,)) == pytest.approx(clean)
    assert score(islands=True, objects=(2,)) == pytest.approx(untidied)  # the core has no island
