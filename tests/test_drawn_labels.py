"""A trained factory that draws labels: its file, its volumes, the first guess, and adaptation without a branch."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.adapt import draw_slices
from fedfactory.adaptation.generate_volumes import Drawing, generate_volumes
from fedfactory.adaptation.labelled_factory import DrawingFactory, LabelledFactory
from fedfactory.adaptation.training.label_branch_training import with_first_guess
from fedfactory.errors import CheckpointError, UsageError
from fedfactory.generative import TrainedFactory, load_factory, make_generator
from fedfactory.node.labelling import label_factory
from fedfactory.node.site_adaptation import Adaptation, _shared_with_labelled, adapt_site
from fedfactory.node.store.derived.pseudo_labels import PseudoLabelFacts, write_pseudo_labels
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import small_config, untrained_segmenter


@pytest.fixture(scope="module")
def drawing(config) -> TrainedFactory:
    """An untrained factory of three classes whose structures are as likely as background, so that it draws some."""
    torch.manual_seed(0)
    generator = make_generator(replace(config, classes=3)).eval()
    with torch.no_grad():
        generator.head.bias[-2 * generator.head.maps_each :] = 2.0
    return TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0)


@pytest.fixture
def drawing_file(drawing, tmp_path):
    drawing.save(tmp_path / "factory.safetensors")
    return tmp_path / "factory.safetensors"


def test_the_file_of_a_factory_keeps_its_classes(drawing_file, drawing):
    again = load_factory(drawing_file)
    assert again.config == drawing.config
    assert again.config.classes == 3
    assert json.loads(drawing_file.with_suffix(".json").read_text())["config"]["classes"] == 3


def test_volumes_are_drawn_without_a_label_branch_and_labels_are_the_soft_labels(drawing_file, drawing, tmp_path):
    generate_volumes(drawing_file, tmp_path / "out", Drawing(domain="dark", volumes=2, seed=4))
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["classes"] == 3
    assert all(len(volume["shares"]) == 3 for volume in manifest["volumes"])
    labelled = DrawingFactory.load(drawing_file)
    heights = torch.tensor([0.0, 1.5])
    z = torch.randn(1, drawing.config.latent_dim)
    images, labels = labelled.draw_volume("dark", heights, seed=1, z=z)
    generator, dark = drawing.generator, torch.ones(2, dtype=torch.long)
    with torch.no_grad():
        style = generator.style_at(z.expand(2, -1), heights, dark)
        made = generator.synthesise(style, generator.draw_noise(2, torch.Generator().manual_seed(2)))
    assert np.array_equal(labels, made.labels.argmax(1).numpy())
    assert set(np.unique(labels).tolist()) == {0, 1, 2}
    assert images.shape == (2, 1, 16, 16)
    _, bright = labelled.draw_volume("bright", heights, seed=1, z=z)
    assert np.array_equal(labels, bright)  # one latent is one anatomy


def test_an_exported_factory_is_sent_to_label_before_sites_adapt(drawing_file):
    with pytest.raises(CheckpointError, match="run `fedfactory label`"):
        LabelledFactory.load(drawing_file)


@pytest.mark.parametrize("pseudo_labels", [False, True])
def test_shared_anatomy_counts_where_a_site_showed_no_labels_of_its_own(
    pseudo_labels, config, copied_store, site, tmp_path
):
    dark = prepare(site, tmp_path / "dark.store", PrepareConfig(domain="dark", size=16, z_bins=4)).store
    generator = make_generator(replace(config, classes=3, pseudo_labels=pseudo_labels)).eval()
    factory = TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0)
    made = with_first_guess(factory, untrained_segmenter(), domain="bright", seed=0)
    # The labels were learnt at the labelled site, so shared anatomy says whether they fit here.
    assert 0 <= _shared_with_labelled(dark, made) <= 1
    facts = PseudoLabelFacts(
        made_by="test", images=dark.files["images"], segmenter="0" * 64, segmenter_domain="bright", classes=3,
        least_confidence=0.5, slices=1, known_share=1.0, structure_share=0.1, agreement=None, dice=None, dice_cases=0,
    )  # fmt: skip
    write_pseudo_labels(dark, np.zeros(dark.images[:, 0].shape, np.uint8), facts)
    assert (_shared_with_labelled(dark, made) is None) == pseudo_labels


def test_a_factory_of_images_alone_is_sent_to_label(trained, tmp_path):
    trained.save(tmp_path / "images.safetensors")
    with pytest.raises(UsageError, match="run `fedfactory label`"):
        DrawingFactory.load(tmp_path / "images.safetensors")


def test_a_labelled_site_adds_its_first_guess_and_sites_adapt(drawing_file, copied_store, tmp_path):
    out = tmp_path / "labelled.safetensors"
    made = label_factory(drawing_file, copied_store.path, out, config=small_config(updates=2))
    assert made.branches == []
    assert set(made.card.labels_from.values()) == {"own"}  # a slice's labels are those drawn with it
    assert 0 <= made.card.agreement <= 1 or math.isnan(made.card.agreement)
    again = LabelledFactory.load(out)
    drawn = draw_slices(again, "bright", volumes=1, seed=0)
    assert np.array_equal(drawn.labels, draw_slices(made, "bright", volumes=1, seed=0).labels)
    adaptation = Adaptation(segmenter=small_config(updates=2), volumes=2)
    segmenter = adapt_site(
        copied_store.path, tmp_path / "segmenter.safetensors", factory_file=out, adaptation=adaptation
    )
    assert segmenter.classes == 3
    assert segmenter.card.assessment is not None
    with pytest.raises(UsageError, match="choose the engine 'segmenter'"):
        adapt_site(
            copied_store.path,
            tmp_path / "other.safetensors",
            factory_file=out,
            adaptation=Adaptation(engine="translator"),
        )


def test_options_of_the_label_branch_are_refused(drawing_file, copied_store, tmp_path):
    with pytest.raises(UsageError, match="no label branch is trained"):
        label_factory(drawing_file, copied_store.path, tmp_path / "x.safetensors", labelling="inversion")


def test_labels_of_another_number_of_classes_are_refused(config, copied_store, tmp_path):
    generator = make_generator(replace(config, classes=4)).eval()
    TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0).save(
        tmp_path / "four.safetensors"
    )
    with pytest.raises(UsageError, match="draws labels of 4 classes"):
        label_factory(tmp_path / "four.safetensors", copied_store.path, tmp_path / "x.safetensors")


@pytest.mark.parametrize(("name", "value"), [("classes", 4), ("branches", 1)])
def test_a_card_that_contradicts_its_generator_is_refused(labelled, drawing, tmp_path, name, value):
    made = LabelledFactory(drawing, [], replace(labelled.card, classes=3), labelled.robust)
    made.save(tmp_path / "good.safetensors")
    LabelledFactory.load(tmp_path / "good.safetensors")
    content = made.to_dict() | {name: value}
    with pytest.raises((UsageError, CheckpointError), match=name):
        LabelledFactory.from_dict(content)


def test_a_preview_shows_each_domain_without_and_with_the_contours_of_its_labels(drawing, trained, tmp_path):
    from fedfactory.researcher.training import PREVIEW_COLUMNS, save_preview

    plain = save_preview(trained.generator, tmp_path / "plain.png", 0)
    assert plain.shape == (2 * 16, PREVIEW_COLUMNS * 16, 3)
    shown = save_preview(drawing.generator, tmp_path / "drawn.png", 0)
    side = shown.shape[0] // 4
    assert side % 16 == 0
    assert shown.shape == (4 * side, PREVIEW_COLUMNS * side, 3)
    assert shown.min() >= 0 <= 1 >= shown.max()
    images, contours = shown[:side], shown[side : 2 * side]
    assert (images[..., 0] == images[..., 2]).all()  # grey
    changed = (images != contours).any(axis=2)
    assert 0 < changed.mean() < 0.5
    assert (contours[changed][:, 0] != contours[changed][:, 2]).all()  # the colours of the classes
