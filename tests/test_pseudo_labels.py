"""Pseudo-labels of a site's own slices: which pixels have one, who may use them, and what becomes of them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedbiomed.common.dataset_types import DataReturnFormat
from fedfactory.adaptation.averaged_segmenter import AVERAGE, load_segmenter
from fedfactory.adaptation.labels.candidate_labels import candidates_from_boxes
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import FederatedDesign, SegmenterCard
from fedfactory.cli import main
from fedfactory.common.weights_file import write_weights
from fedfactory.errors import CheckpointError, ConfigError, FederationError, NodeDataError, StoreError, UsageError
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.node.plans.factory_dataset import SliceDataset
from fedfactory.node.pseudo_labelling import make_pseudo_labels
from fedfactory.node.site_choices import SiteChoices
from fedfactory.node.site_data.training_slices import known_labels, left_open, site_slices
from fedfactory.node.site_facts import description_of, read_facts, store_facts
from fedfactory.node.store.derived.pseudo_labels import CARD, pseudo_label_facts, pseudo_labels
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from fedfactory.researcher.agreement import agreeing_nodes
from helpers import folder_bytes, guarded, method_of, site_facts, untrained_segmenter, write_site
from simulated_node import node_round

BRIGHT, MIDDLE = 0.0, -0.6  # grey levels from which a pixel is of class 1, and perhaps of class 2


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the stores of a site without labels and of one with dense labels in some of its cases."""
    folder = tmp_path_factory.mktemp("pseudo")
    write_site(folder / "site", cases=5)
    config = PrepareConfig(domain="dark", size=16, z_bins=4, label_kind="none", test_share=0.2, validation_share=0.2)
    prepare(folder / "site", folder / "none.store", config)
    (folder / "some").mkdir()
    for number in (0, 1):
        shutil.copytree(folder / "site" / f"case{number}", folder / "some" / f"case{number}")
    prepare(folder / "site", folder / "mixed.store", replace(config, split="train", exclude=("case0", "case1")))
    for case, split in (("case0", "train"), ("case1", "validation")):
        others = tuple({"case0", "case1"} - {case})
        prepare(
            folder / "some", folder / "mixed.store",
            replace(config, label_kind="dense", split=split, exclude=others),
        )  # fmt: skip
    return folder


@pytest.fixture
def unlabelled(prepared, tmp_path):
    return SliceStore(shutil.copytree(prepared / "none.store", tmp_path / "none.store"))


@pytest.fixture
def mixed(prepared, tmp_path):
    return SliceStore(shutil.copytree(prepared / "mixed.store", tmp_path / "mixed.store"))


def typed(*words) -> None:
    """A command that must succeed."""
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code in (None, 0)


def graded(images: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, 3, S, S): bright pixels are surely of class 1, middle ones more likely than not of none."""
    grey = images[:, :1]
    sure, unsure = grey > BRIGHT, (grey > MIDDLE) & (grey <= BRIGHT)
    background = torch.where(sure, 0.05, torch.where(unsure, 0.35, 0.9))
    second = torch.where(sure, 0.05, torch.where(unsure, 0.45, 0.05))
    return torch.cat([background, 1 - background - second, second], dim=1)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    """The file of a segmenter whose probabilities are those of `graded` in every view."""
    untrained_segmenter(mirror=False).save(tmp_path / "teacher.safetensors")
    monkeypatch.setattr(Segmenter, "_mean_of_views", lambda self, images, volume, views: graded(images))
    return tmp_path / "teacher.safetensors"


def test_pixels_of_little_confidence_stay_unlabelled(unlabelled, teacher):
    facts = make_pseudo_labels(unlabelled.path, teacher)
    found = pseudo_labels(unlabelled)
    chosen = unlabelled.slices("train")
    grey = unlabelled.images[chosen][:, 0].astype(np.float32)
    expected = np.where(grey > BRIGHT, 1, np.where(grey > MIDDLE, UNLABELLED, 0))
    assert np.array_equal(found[chosen], expected)
    assert set(np.unique(expected).tolist()) == {0, 1, UNLABELLED}
    assert facts.known_share == pytest.approx((expected != UNLABELLED).mean())
    assert facts.structure_share == pytest.approx((expected == 1).mean())
    assert facts.slices == len(chosen)
    make_pseudo_labels(unlabelled.path, teacher, least_confidence=0.4)
    assert np.array_equal(pseudo_labels(unlabelled)[chosen] == 2, (grey > MIDDLE) & (grey <= BRIGHT))


def test_only_training_slices_without_dense_labels_get_any(mixed, unlabelled, teacher):
    for store in (mixed, unlabelled):
        make_pseudo_labels(store.path, teacher)
        found = pseudo_labels(store)
        for case in store.cases:
            has_some = bool((found[case.span] != UNLABELLED).any())
            assert has_some == (case.split == "train" and case.label_kind == "none"), case.name
    assert {(case.split, case.label_kind) for case in mixed.cases} == {
        ("train", "none"), ("train", "dense"), ("validation", "dense")
    }  # fmt: skip
    assert {case.split for case in unlabelled.cases} == {"train", "validation", "test"}


def test_annotations_methods_and_scores_know_nothing_of_them(mixed, teacher):
    untouched = {name: content for name, content in folder_bytes(mixed.path).items() if name != "quality.html"}
    data, known = site_slices(mixed, 3), known_labels(mixed, 3)
    make_pseudo_labels(mixed.path, teacher)
    after = folder_bytes(mixed.path)
    assert {name: after[name] for name in untouched} == untouched
    assert after.keys() - untouched.keys() == {"quality.html", "pseudo_labels.npy", CARD}
    again = SliceStore(mixed.path)
    again.verify()
    assert again.label_kinds() == mixed.label_kinds() == {"dense": 8, "none": 24}
    same = site_slices(again, 3)
    assert np.array_equal(same.candidates, data.candidates) and np.array_equal(same.kinds, data.kinds)
    assert np.array_equal(known_labels(again, 3), known)


@pytest.mark.parametrize("kind", ["scribble", "box", "image"])
def test_what_an_annotation_says_or_rules_out_gets_no_pseudo_label(copied_store, kind):
    store, case = copied_store, copied_store.cases[0]
    case = replace(case, label_kind=kind)
    guess = np.random.default_rng(0).integers(0, 3, (case.count, 16, 16)).astype(np.uint8)
    if kind == "scribble":
        store.labels = np.where(np.random.default_rng(1).random(store.labels.shape) < 0.3, store.labels, UNLABELLED)
        possible = np.repeat((store.labels[case.span] == UNLABELLED)[..., None], 3, axis=-1)
    elif kind == "box":
        sets = np.stack([candidates_from_boxes(label, 3) for label in store.labels[case.span]])
        possible = np.stack([(sets >> value) % 2 == 1 for value in range(3)], axis=-1)
        possible[possible.sum(-1) == 1] = False  # annotated
    else:
        store.presence = np.ones((len(store), 3), np.uint8)
        store.presence[::2, 1] = 0
        possible = np.broadcast_to(store.presence[case.span, None, None].astype(bool), (case.count, 16, 16, 3))
    found = left_open(store, case, guess, 3)
    allowed = np.take_along_axis(possible, guess[..., None].astype(int), axis=-1)[..., 0]
    assert np.array_equal(found, np.where(allowed, guess, UNLABELLED))
    assert 0 < allowed.mean() < 1


def test_open_pixels_take_them_and_annotated_ones_stay(mixed, unlabelled, teacher):
    plain = known_labels(mixed, 3)
    assert np.array_equal(known_labels(mixed, 3, with_pseudo_labels=True), plain)  # there are none yet
    make_pseudo_labels(mixed.path, teacher)
    both = known_labels(mixed, 3, with_pseudo_labels=True)
    guess = pseudo_labels(mixed)[mixed.slices("train")]
    annotated = plain != UNLABELLED
    assert np.array_equal(both[annotated], plain[annotated])
    assert np.array_equal(both[~annotated], guess[~annotated])
    assert 0 < annotated.mean() < 1
    make_pseudo_labels(unlabelled.path, teacher)
    with pytest.raises(NodeDataError, match="the largest label is 1; it must be below 1"):
        known_labels(unlabelled, 1, with_pseudo_labels=True)


def test_dice_is_that_with_the_annotated_cases_and_test_cases_do_not_count(mixed, teacher):
    facts = make_pseudo_labels(mixed.path, teacher)
    cases = [case for case in mixed.cases if case.label_kind == "dense"]
    theirs = np.concatenate([mixed.labels[case.span] for case in cases])
    grey = np.concatenate([mixed.images[case.span] for case in cases])[:, 0].astype(np.float32)
    ours = np.where(grey > BRIGHT, 1, np.where(grey > MIDDLE, 2, 0))
    ours[theirs == UNLABELLED] = 0
    expected = [
        2 * ((ours == value) & (theirs == value)).sum() / ((ours == value).sum() + (theirs == value).sum())
        for value in (1, 2)
    ]
    assert facts.dice == pytest.approx(np.mean(expected))
    assert facts.dice_cases == 2


def test_agreement_is_that_of_the_segmenters_views(unlabelled, tmp_path):
    torch.manual_seed(0)
    segmenter = untrained_segmenter(rotation=math.pi)
    segmenter.save(tmp_path / "s.safetensors")
    facts = make_pseudo_labels(unlabelled.path, tmp_path / "s.safetensors", least_confidence=0)
    chosen = unlabelled.slices("train")
    images = torch.from_numpy(unlabelled.images[chosen].astype(np.float32))
    assert facts.agreement == pytest.approx(segmenter.agreement(images, unlabelled.volume_of_slices()[chosen]))
    assert facts.agreement < 0.8 and "get other labels" in facts.doubts[0]


def test_where_nothing_is_found_earlier_ones_stay(unlabelled, teacher, monkeypatch):
    make_pseudo_labels(unlabelled.path, teacher)
    before = folder_bytes(unlabelled.path)
    nothing = torch.tensor([0.9, 0.05, 0.05]).view(1, 3, 1, 1)
    monkeypatch.setattr(
        Segmenter, "_mean_of_views", lambda self, images, volume, views: nothing.expand(len(images), 3, 16, 16)
    )
    with pytest.raises(UsageError, match="finds no structure"):
        make_pseudo_labels(unlabelled.path, teacher)
    assert folder_bytes(unlabelled.path) == before


def test_a_segmenter_for_other_slices_or_labels_is_refused(unlabelled, mixed, copied_store, tmp_path):
    four = untrained_segmenter(classes=4)
    four.save(tmp_path / "four.safetensors")
    with pytest.raises(UsageError, match="classes is 4; it must be 3"):
        make_pseudo_labels(mixed.path, tmp_path / "four.safetensors")
    large = untrained_segmenter()
    large.format = replace(large.format, size=32)
    large.save(tmp_path / "large.safetensors")
    with pytest.raises(UsageError, match="size is 32; it must be 16"):
        make_pseudo_labels(unlabelled.path, tmp_path / "large.safetensors")
    named = untrained_segmenter()
    named.card = replace(named.card, class_names={"1": "liver"})
    named.save(tmp_path / "named.safetensors")
    index = json.loads((unlabelled.path / "store.json").read_text())
    (unlabelled.path / "store.json").write_text(json.dumps({**index, "class_names": {"1": "spleen"}}))
    with pytest.raises(UsageError, match="label 1 is 'liver', and 'spleen' in"):
        make_pseudo_labels(unlabelled.path, tmp_path / "named.safetensors")
    with pytest.raises(UsageError, match="nothing to label"):
        make_pseudo_labels(copied_store.path, tmp_path / "named.safetensors")
    with pytest.raises(ConfigError, match="least_confidence is 2"):
        make_pseudo_labels(unlabelled.path, tmp_path / "named.safetensors", least_confidence=2)


def test_preparing_again_keeps_them_with_the_same_slices_and_says_that_others_lost_them(
    prepared, unlabelled, teacher, capsys, tmp_path
):
    make_pseudo_labels(unlabelled.path, teacher)
    words = ["--out", unlabelled.path, "--domain", "dark", "--size", 16, "--z-bins", 4, "--label-kind", "none"]
    typed("prepare", prepared / "site", *words)
    assert "removed" not in capsys.readouterr().out
    assert pseudo_label_facts(SliceStore(unlabelled.path)) is not None
    assert "Pseudo-labels" in (unlabelled.path / "quality.html").read_text()
    write_site(tmp_path / "more", cases=6)
    typed("prepare", tmp_path / "more", *words)
    assert "removed: what `fedfactory pseudo-label` made of the slices before; run it again" in " ".join(
        capsys.readouterr().out.split()
    )
    assert pseudo_labels(SliceStore(unlabelled.path)) is None
    assert not list(unlabelled.path.glob("pseudo_labels*"))
    assert "Pseudo-labels" not in (unlabelled.path / "quality.html").read_text()


@pytest.mark.parametrize("what", ["other slices", "cut card", "shape", "type", "missing"])
def test_unusable_ones_are_refused_and_no_name_of_the_site_leaves(unlabelled, teacher, config, what):
    make_pseudo_labels(unlabelled.path, teacher)
    card, array = unlabelled.path / CARD, unlabelled.path / "pseudo_labels.npy"
    if what == "other slices":
        card.write_text(json.dumps({**json.loads(card.read_text()), "images": "images-000000000000.npy"}))
    elif what == "cut card":
        card.write_text(card.read_text()[:40])
    elif what == "missing":
        array.unlink()
    else:
        np.save(array, np.load(array)[:-1] if what == "shape" else np.load(array).astype(np.int64))
    with pytest.raises(StoreError, match="run `fedfactory pseudo-label` again"):
        pseudo_labels(unlabelled)
    with pytest.raises(Exception, match="pseudo-labels of this site cannot be used") as caught:
        dataset_of(replace(config, classes=3, pseudo_labels=True), unlabelled)
    assert str(unlabelled.path) not in str(caught.value)
    assert len(dataset_of(replace(config, classes=3), unlabelled))  # who does not ask for them is not disturbed


def dataset_of(config, store):
    dataset = SliceDataset()
    dataset.config = config
    dataset.load(str(store.path), DataReturnFormat.TORCH)
    return dataset


def test_a_node_shows_them_to_its_discriminator_only_if_asked(unlabelled, teacher, config):
    make_pseudo_labels(unlabelled.path, teacher)
    guess = pseudo_labels(unlabelled)[unlabelled.slices("train")]
    for asked, expected in ((False, np.full_like(guess, UNLABELLED)), (True, guess)):
        dataset = dataset_of(replace(config, classes=3, pseudo_labels=asked), unlabelled)
        assert np.array_equal(dataset.labels, expected)
    with pytest.raises(Exception, match="have 3 classes, background included, and the factory draws 4"):
        dataset_of(replace(config, classes=4, pseudo_labels=True), unlabelled)


def test_they_change_what_is_learnt_and_nothing_else_leaves(unlabelled, teacher, config, tmp_path):
    from fedfactory.researcher.plans.factory_plans import LabelledFactoryPlan

    make_pseudo_labels(unlabelled.path, teacher)
    rounds = []
    with guarded():
        for asked in (False, True):
            settings = replace(config, classes=3, pseudo_labels=asked).to_dict()
            arguments = {"factory": settings, "seed": 0, "transport": "float32"}
            store = shutil.copytree(unlabelled.path, tmp_path / f"{asked}.store")
            rounds.append(node_round(LabelledFactoryPlan, arguments, store))
    without, with_them = rounds
    assert set(without.params) == set(with_them.params) and set(without.report) == set(with_them.report)
    assert not torch.equal(without.params["generator.head.bias"], with_them.params["generator.head.bias"])


def test_a_factory_of_images_alone_cannot_ask_for_them(config):
    with pytest.raises(ConfigError, match="pseudo_labels is True and classes is 0"):
        replace(config, pseudo_labels=True)


def test_they_are_announced_as_what_they_are_and_a_run_needs_a_site_with_some(unlabelled, teacher, config):
    from fedfactory.commands.sites import described

    wanted = replace(config, classes=3, pseudo_labels=True)
    before = store_facts(unlabelled, SiteChoices())
    with pytest.raises(FederationError, match="0 of 1 sites have announced pseudo-labels"):
        agreeing_nodes({"n": description_of(before)}, wanted, leave_out=False)
    make_pseudo_labels(unlabelled.path, teacher)
    facts = read_facts(description_of(store_facts(unlabelled, SiteChoices())))
    assert facts.pseudo_labels == len(unlabelled.slices("train"))
    assert facts == replace(before, pseudo_labels=facts.pseudo_labels)  # kinds of labels and classes are as before
    assert described(facts)["labels"] == "24 none"
    assert described(facts)["pseudo-labels"] == "24 slices, by a segmenter: no annotations"
    assert agreeing_nodes({"n": description_of(facts)}, wanted, leave_out=False) == ["n"]
    assert read_facts(description_of(site_facts())).pseudo_labels == 0
    assert read_facts(description_of(facts).replace('"pseudo_labels": 24', '"pseudo_labels": -1')) is None


def test_the_command_prints_what_is_known_and_the_page_shows_them(mixed, teacher, capsys):
    typed("pseudo-label", mixed.path, "--segmenter", teacher)
    shown = " ".join(capsys.readouterr().out.split())
    facts = pseudo_label_facts(mixed)
    for text in ("no annotations", f"{facts.dice:.3f} in 2 cases", f"{facts.known_share:.1%}", "fedfactory site add"):
        assert text in shown
    page = (mixed.path / "quality.html").read_text()
    assert "These are no annotations" in page and facts.segmenter in page and "slices with pseudo-labels" in page


# The average of several sites as a segmenter


def average_file(path, method):
    """The file that `train-segmenter` writes at the researcher; returns the network."""
    torch.manual_seed(0)
    model = method.build()
    local = method.local_parameters(model)
    sent = {name: tensor for name, tensor in model.state_dict().items() if name not in local}
    write_weights(path, sent, {"kind": AVERAGE, "config": method.config.to_dict(), "facts": {}})
    return model.eval()


@pytest.mark.parametrize("name", ["fedavg", "fedprox"])
def test_an_average_is_a_segmenter_for_slices_of_any_window(name, patients, tmp_path):
    method = method_of(name, rotation=0.1, first_guess=True, single_objects=(1,))
    model = average_file(tmp_path / "average.safetensors", method)
    store = SliceStore(patients)
    fmt = store.format
    found = load_segmenter(tmp_path / "average.safetensors", fmt)
    images = torch.from_numpy(store.images[:4].astype(np.float32))
    with torch.no_grad():
        torch.testing.assert_close(found.probabilities(images), model(images).softmax(1))
    assert (found.format, found.classes, found.card.single_objects) == (fmt, 3, (1,))
    found.save(tmp_path / "again.safetensors")
    assert load_segmenter(tmp_path / "again.safetensors", replace(fmt, window=((0.0, 5.0),))).format == fmt


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    [
        ("fedbn", {}, UsageError, "only that of fedavg or fedprox is a segmenter by itself"),
        ("fedavg", {"size": 48}, UsageError, "size is 48; the slices have 32"),
        ("fedavg", {"channels": 2}, UsageError, "channels is 2; the slices have 1"),
    ],
)
def test_another_average_is_refused(name, changes, error, message, patients, tmp_path):
    average_file(tmp_path / "average.safetensors", method_of(name, **changes))
    with pytest.raises(error, match=message):
        load_segmenter(tmp_path / "average.safetensors", SliceStore(patients).format)


def test_an_average_whose_card_lies_is_refused(patients, tmp_path):
    method = method_of("fedavg")
    weights = method.build().state_dict()
    for number, changes in enumerate([{"width": 8}, {"width": "wide"}, {"speed": 1}]):
        card = {"kind": AVERAGE, "config": {**method.config.to_dict(), **changes}}
        write_weights(tmp_path / f"{number}.safetensors", weights, card)
        with pytest.raises(CheckpointError):
            load_segmenter(tmp_path / f"{number}.safetensors", SliceStore(patients).format)
    write_weights(tmp_path / "none.safetensors", weights, {"kind": AVERAGE})
    with pytest.raises(CheckpointError, match="its card is not usable"):
        load_segmenter(tmp_path / "none.safetensors", SliceStore(patients).format)


@pytest.mark.parametrize(
    ("rotation", "mirror", "views"),
    [
        (0.15, True, (0, 4, 8, 9, 10, 11)), (0.15, False, (0, 8, 9, 10, 11)), (math.pi, False, (0, 1, 2, 3)),
        (math.radians(180), True, tuple(range(8))),
    ],
)  # fmt: skip
def test_a_federated_segmenter_knows_the_views_it_was_trained_in(rotation, mirror, views):
    config = method_of("fedavg", rotation=rotation, mirror=mirror).config
    card = SegmenterCard(classes=3, network="federated", federated=FederatedDesign(method=config, context=None))
    assert card.views == views
