"""Phase two at a site: both engines, few labels, best states, interruptions."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.adapt import SYNTHETIC_SHARE, adapt, pseudo_label, training_set
from fedfactory.adaptation.engine.augmentation import Augmentation
from fedfactory.adaptation.engine.segmenter_config import ContrastMix, SegmenterConfig
from fedfactory.adaptation.engine.training_loop import STATE_FILE, LoopConfig, Trainer, train
from fedfactory.adaptation.engine.training_plan import TrainingPlan
from fedfactory.adaptation.engine.window_training import Stream, WindowTrainer
from fedfactory.adaptation.labelled_slices import LabelledSlices
from fedfactory.adaptation.network_names import NETWORKS, dimensions
from fedfactory.adaptation.networks.translator_network import EncoderConfig
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import TrainingFacts
from fedfactory.adaptation.training.segmenter_training import SegmenterData, train_segmenters
from fedfactory.adaptation.training.translator_training import TranslatorConfig, TranslatorTrainer
from fedfactory.errors import CheckpointError, ConfigError, StoreError, TrainingError, UsageError
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.node.site_adaptation import Adaptation, adapt_site, assess
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import small_config, untrained_segmenter

FORMAT = SliceFormat(size=16, spacing=1.0, window=(-1.0, 1.0), z_bins=4)
TRANSLATOR = TranslatorConfig(updates=4, pretraining=2, batch_size=4, encoder=EncoderConfig(width=4, blocks=(1,) * 4))


def volumes_of(sizes, classes=3, seed=0) -> LabelledSlices:
    """Volumes of noise with a bright square of class 1 and a dark square of class 2 in every slice."""
    rng, count = np.random.default_rng(seed), sum(sizes)
    labels = np.zeros((count, 16, 16), np.uint8)
    for label in labels:
        row, column = rng.integers(0, 6, 2)
        label[row : row + 5, column : column + 5] = 1
        label[row : row + 5, column + 6 : column + 11] = 2
    images = np.choose(labels, [-1.0, 0.8, 0.0]) + rng.normal(0, 0.05, labels.shape)
    return LabelledSlices(images.astype(np.float32), labels, classes, np.repeat(np.arange(len(sizes)), sizes))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_network_learns_squares_and_gives_probabilities(name):
    data = volumes_of([10, 6, 9])
    config = small_config(network=name, updates=20, learning_rate=1e-2)
    (made,) = train_segmenters(SegmenterData(labelled=data), FORMAT, config, title="t")
    found = made.probabilities(torch.from_numpy(data.images[:10]))
    assert found.shape == (10, 3, 16, 16)
    torch.testing.assert_close(found.sum(1), torch.ones(10, 16, 16))
    inside = found[:, 0][torch.from_numpy(data.labels[:10]) > 0].mean()
    outside = found[:, 0][torch.from_numpy(data.labels[:10]) == 0].mean()
    assert outside > inside + 0.05


def test_a_three_dimensional_network_segments_a_single_slice():
    made = untrained_segmenter("unet3d")
    assert made.probabilities(torch.zeros(1, 1, 16, 16)).shape == (1, 3, 16, 16)


def test_a_three_dimensional_network_never_mixes_volumes():
    made = untrained_segmenter("unet3d")
    images = torch.randn(14, 1, 16, 16)
    together = made.probabilities(images, np.repeat([3, 0, 7], [5, 1, 8]))
    apart = torch.cat([made.probabilities(part) for part in images.split([5, 1, 8])])
    torch.testing.assert_close(together, apart)


def test_a_three_dimensional_teacher_labels_volume_by_volume():
    made = untrained_segmenter("unet3d")
    data = volumes_of([5, 9])
    together = pseudo_label(data.images, made, data.volume).labels
    apart = [pseudo_label(data.images[part], made).labels for part in (slice(0, 5), slice(5, 14))]
    np.testing.assert_array_equal(together, np.concatenate(apart))


class Interrupted(Exception):
    pass


def trainer(updates, stop_at=None, **changes):
    plan = TrainingPlan(window=16, widths=(4, 8, 8), fold=1, classes=3, batch_size=4, updates=updates, **changes)
    drawn = Stream(slices=volumes_of([8, 8]), augmentation=Augmentation(contrast=ContrastMix()))
    own = Stream(slices=volumes_of([6], seed=2), augmentation=Augmentation(), share=0.5)
    made = WindowTrainer([drawn, own], plan, validation=volumes_of([6], seed=1))
    if stop_at is not None:
        update = made.update

        def failing(number):
            if number == stop_at:
                raise Interrupted
            return update(number)

        made.update = failing
    return made


def test_an_interrupted_training_ends_where_an_undisturbed_training_does(tmp_path):
    loop = LoopConfig(evaluations=5, keep=2)
    expected = train(trainer(10), 10, loop, title="t", seed=0)
    loop = LoopConfig(evaluations=5, keep=2, folder=tmp_path)
    with pytest.raises(Interrupted):
        train(trainer(10, stop_at=7), 10, loop, title="t", seed=0)
    assert (tmp_path / STATE_FILE).is_file()
    with pytest.raises(CheckpointError, match="other data or settings"):
        train(trainer(10, learning_rate=1e-3), 10, loop, title="t", seed=0)
    found = train(trainer(10), 10, loop, title="t", seed=0)
    assert [(state.update, state.score) for state in found] == [(state.update, state.score) for state in expected]
    for state, undisturbed in zip(found, expected, strict=True):
        for name, tensor in state.weights.items():
            torch.testing.assert_close(tensor, undisturbed.weights[name], atol=1e-6, rtol=1e-6)
    assert not (tmp_path / STATE_FILE).exists()
    assert list((tmp_path / "curves").iterdir())


class Scripted(Trainer):
    """A trainer with given scores."""

    def __init__(self, scores, loss=0.0):
        self.network, self.optimizers, self.settings = torch.nn.Linear(1, 1), [], {}
        self.scores, self.loss, self.updates = iter(scores), loss, 0

    def update(self, number):
        torch.nn.init.constant_(self.network.bias, number)
        self.updates += 1
        return {"loss": self.loss}

    def score(self):
        return next(self.scores)


def test_the_best_states_are_kept_in_their_order():
    kept = train(Scripted([1, 5, 3, 4, 2]), 5, LoopConfig(evaluations=5, keep=3), title="t", seed=0)
    assert [(state.update, state.score) for state in kept] == [(2, 5), (4, 4), (3, 3)]
    assert [float(state.weights["bias"]) for state in kept] == [1, 3, 2]


def test_training_stops_when_nothing_gets_better():
    made = Scripted([1, 5, 3, 4, 9])
    kept = train(made, 5, LoopConfig(evaluations=5, patience=2), title="t", seed=0)
    assert (made.updates, kept[0].score) == (4, 5)


def test_a_loss_that_is_not_finite_ends_training_and_is_named():
    with pytest.raises(TrainingError, match=r"loss.*update 0"):
        train(Scripted([1], loss=float("nan")), 5, LoopConfig(evaluations=1), title="t", seed=0)


@pytest.mark.parametrize("engine", ["segmenter", "translator"])
def test_an_engine_makes_a_segmenter_file_that_needs_nothing_else(engine, labelled_file, store, tmp_path):
    adaptation = Adaptation(
        engine=engine, volumes=2, keep=2, segmenter=small_config(updates=6), translator=TRANSLATOR,
        one_target_slice=True,
    )  # fmt: skip
    out = tmp_path / "m.safetensors"
    made = adapt_site(store.path, out, factory_file=labelled_file, adaptation=adaptation)
    assert made.card.training.labelled_slices == 3  # of three labelled cases
    assert made.card.training.chosen_by.startswith("synthetic slices")
    for path in (out, tmp_path / "m_2.safetensors"):
        loaded = Segmenter.load(path)
        assert loaded.card.training.domain == "bright"
        if engine == "translator":  # states of the pretraining, which precedes the site's slices, are not kept
            assert loaded.card.chosen.update > TRANSLATOR.pretraining
    images = torch.from_numpy(store.images[:5].astype(np.float32))
    first, again = made.probabilities(images), Segmenter.load(out).probabilities(images)
    torch.testing.assert_close(first, again)
    torch.testing.assert_close(first.sum(1), torch.ones(5, 16, 16))
    assert not (tmp_path / "m_3.safetensors").exists()


def test_the_same_seed_trains_the_same_translator(labelled_file, store, tmp_path):
    adaptation = Adaptation(engine="translator", volumes=1, translator=TRANSLATOR)
    made = [
        adapt_site(store.path, tmp_path / f"{n}.safetensors", factory_file=labelled_file, adaptation=adaptation)
        for n in range(2)
    ]
    first, second = (model.network.state_dict() for model in made)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_site_trains_on_what_first_guess_and_factory_agree_on_or_on_the_one_to_be_believed():
    data, own = volumes_of([20, 20]), volumes_of([10], seed=5)
    config = small_config(updates=60, batch_size=8, learning_rate=1e-2)
    (good,) = train_segmenters(SegmenterData(labelled=data), FORMAT, config, title="t")
    shifted = LabelledSlices(data.images, np.roll(data.labels, 8, axis=2), 3, data.volume)
    for drawn, agrees in ((data, True), (shifted, False)):
        made = training_set(own.images, drawn, good, volume=own.volume, labels_carry_over=False)
        assert made.further == (((drawn, SYNTHETIC_SHARE),) if agrees else ())
        assert made.start is good and made.validation is None
        np.testing.assert_array_equal(made.labelled.labels, pseudo_label(own.images, good, own.volume).labels)
    made = training_set(own.images, shifted, good, volume=own.volume)  # the factory's labels carry over
    assert made == SegmenterData(labelled=shifted)
    made = training_set(own.images, data, good, volume=own.volume)
    right = (made.labelled.labels == own.labels)[own.labels > 0].mean()
    assert right > 0.8  # the labels that the site's own slices get are good ones
    with pytest.raises(StoreError, match="synthetic slices are 16 px; they must be 8 px"):
        training_set(own.images[..., :8, :8], data, good)


@pytest.mark.parametrize(("read_in", "expected"), [("view", True), ("own", False)])
def test_little_shared_anatomy_is_an_alarm_only_where_labels_cross_domains(read_in, expected, labelled, site, tmp_path):
    store = prepare(site, tmp_path / "dark", PrepareConfig(domain="dark", size=16, z_bins=4)).store
    labelled.card = replace(labelled.card, labels_from={"bright": "view", "dark": read_in})
    adaptation = Adaptation(volumes=1, segmenter=small_config(updates=2))
    made = adapt_site(store.path, tmp_path / "m.safetensors", factory_file=labelled, adaptation=adaptation)
    shown = any("shares little" in text for text in made.card.assessment.alarms)
    assert shown == expected  # an untrained factory shares nothing


def test_the_card_counts_all_slices_that_have_labels_but_not_from_the_site():
    own_labelled = volumes_of([2])
    data = SegmenterData(labelled=volumes_of([3]), further=((volumes_of([4]), 0.5), (own_labelled, 0.25)))
    facts = TrainingFacts(labelled_slices=len(own_labelled.images))
    (made,) = adapt(FORMAT, "dark", data, config=small_config(updates=1), facts=facts)
    assert (made.card.training.slices, made.card.training.labelled_slices) == (7, 2)


def test_a_first_guess_that_finds_nothing_is_an_alarm(labelled, store):
    class Background(torch.nn.Module):
        def forward(self, windows):
            return torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1).expand(len(windows), 3, *windows.shape[2:])

    alarms = assess(store, labelled, untrained_segmenter()).alarms
    assert not any("finds no structure" in text for text in alarms)
    labelled.robust.network = Background()
    alarms = assess(store, labelled, untrained_segmenter()).alarms
    assert any("finds no structure" in text for text in alarms)


@pytest.mark.parametrize("mirror", [True, False])
def test_an_organ_with_a_left_and_a_right_is_not_mirrored(mirror, labelled, store, tmp_path):
    generator = labelled.factory.generator
    generator.config = replace(generator.config, mirror=mirror)
    adaptation = Adaptation(volumes=1, segmenter=small_config(updates=1))
    made = adapt_site(store.path, tmp_path / "m.safetensors", factory_file=labelled, adaptation=adaptation)
    assert made.card.settings["mirror"] == mirror and (4 in made.card.views) == mirror


def test_an_interrupted_translator_ends_where_an_undisturbed_translator_does(
    labelled_file, store, tmp_path, monkeypatch
):
    adaptation = Adaptation(engine="translator", volumes=1, translator=TRANSLATOR)
    options = {"factory_file": labelled_file, "adaptation": adaptation}
    expected = adapt_site(store.path, tmp_path / "a.safetensors", **options)
    update = TranslatorTrainer.update

    def failing(self, number):
        if number == 4:
            raise Interrupted
        return update(self, number)

    monkeypatch.setattr(TranslatorTrainer, "update", failing)
    out, work = tmp_path / "b.safetensors", tmp_path / "work"
    with pytest.raises(Interrupted):
        adapt_site(store.path, out, work=work, **options)
    assert not out.exists()
    seen = []
    monkeypatch.setattr(TranslatorTrainer, "update", lambda self, number: seen.append(number) or update(self, number))
    found = adapt_site(store.path, out, work=work, **options)
    assert seen == [4, 5]  # of six
    for name, tensor in expected.network.state_dict().items():
        torch.testing.assert_close(found.network.state_dict()[name], tensor, atol=1e-6, rtol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("engine", ["segmenter", "translator"])
def test_an_engine_trains_on_a_gpu_and_leaves_a_file_for_any_machine(engine, labelled_file, store, tmp_path):
    config = small_config(updates=6)
    adaptation = Adaptation(engine=engine, volumes=1, segmenter=config, translator=TRANSLATOR)
    out = tmp_path / "m.safetensors"
    adapt_site(store.path, out, factory_file=labelled_file, adaptation=adaptation, device="cuda")
    assert {tensor.device.type for tensor in Segmenter.load(out).network.state_dict().values()} == {"cpu"}


def test_a_three_dimensional_network_adapts_to_volumes_like_the_sites(labelled_file, store, tmp_path):
    config = small_config(network="unet3d", updates=2)
    adaptation = Adaptation(volumes=2, segmenter=config)
    made = adapt_site(store.path, tmp_path / "m.safetensors", factory_file=labelled_file, adaptation=adaptation)
    assert made.card.plan.dimensions == 3


def test_wrong_requests_are_refused_and_write_nothing(labelled_file, store, site, tmp_path):
    out = tmp_path / "m.safetensors"
    bare = prepare(site, tmp_path / "bare", PrepareConfig(domain="bright", size=16, z_bins=4, label_kind="none")).store
    index = json.loads((store.path / "store.json").read_text())
    for case in index["cases"]:
        case["split"] = "test"
    for call, error, message in [
        (
            lambda: adapt_site(
                bare.path, out, factory_file=labelled_file, adaptation=Adaptation(one_target_slice=True)
            ),
            StoreError,
            "no case|no training case",
        ),
        (
            lambda: adapt_site(store.path, out, synthetic=tmp_path, adaptation=Adaptation(engine="translator")),
            UsageError,
            "factory itself",
        ),
        (
            lambda: adapt_site(
                store.path,
                out,
                factory_file=labelled_file,
                work=tmp_path,
                adaptation=Adaptation(segmenter=SegmenterConfig(minutes=1)),
            ),
            UsageError,
            "minutes is 1",
        ),
        (lambda: Adaptation(engine="magic"), ConfigError, "segmenter, translator"),
        (lambda: Adaptation(keep=9), ConfigError, "keep"),
        (lambda: SegmenterConfig(network="resnet"), UsageError, "choose one of unet"),
        (lambda: SegmenterConfig(precision="int8"), ConfigError, "precision"),
        (lambda: LoopConfig(evaluations=2, keep=3), ConfigError, "keep"),
    ]:
        with pytest.raises(error, match=message):
            call()
        assert not out.exists()
    (store.path / "store.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="no training slices"):
        adapt_site(store.path, out, factory_file=labelled_file)


def test_labels_with_other_classes_than_the_factorys_are_refused(labelled_file, store, site, tmp_path):
    index = json.loads((store.path / "store.json").read_text())
    index["classes"] = 5
    (store.path / "store.json").write_text(json.dumps(index))
    with pytest.raises(StoreError, match="5 values"):
        adapt_site(store.path, tmp_path / "m", factory_file=labelled_file, adaptation=Adaptation(one_target_slice=True))


def test_dimensions_follow_from_the_name():
    assert [dimensions(name) for name in NETWORKS] == [2, 2, 2, 3, 3, 3]
