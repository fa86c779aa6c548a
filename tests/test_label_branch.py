"""The label branch: what it learns, which of its states are kept, and which domain's features label a slice."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.labelled_slices import LabelledSlices, foreground_dice
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.adaptation.training.label_branch_training import (
    BinnedSlices,
    LabelBranchConfig,
    choose_views,
    train_label_branch,
)
from fedfactory.adaptation.training.latent_inversion import invert
from fedfactory.errors import UsageError
from fedfactory.generative import TrainedFactory, make_generator
from fedfactory.node.labelling import label_factory
from helpers import small_config, untrained_segmenter, with_head


class Threshold:
    """A teacher that gives bright pixels label 2 and grey pixels label 1, which a branch can learn."""

    classes = 3

    def probabilities(self, images, volume=None):
        label = (images[:, 0] > -0.2).long() + (images[:, 0] > 0.2)
        return F.one_hot(label, 3).permute(0, 3, 1, 2).float()


def factory_of(config) -> TrainedFactory:
    torch.manual_seed(0)
    generator = make_generator(config).eval()
    return TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0)


def draw(generator, count, domain=0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 8, generator=rng)
    style = generator.style_of(z, torch.arange(count) % 4, torch.full((count,), domain))
    return style, generator.synthesise(style, generator.fixed_noise())


@pytest.mark.parametrize("head", ["palette", "image"])
def test_the_classifier_is_that_of_the_enlarged_maps_written_out(config, head):
    generator = factory_of(with_head(config, head)).generator
    torch.manual_seed(1)
    branch = LabelBranch.for_generator(generator, 3).eval()
    _, made = draw(generator, 2)
    maps = [*made.features, *([made.anatomy] if made.anatomy.shape[1] else [])]
    if head == "palette":  # two sides: enlarging once is what the published order does
        enlarged = [F.interpolate(map_, size=(16, 16), mode="bilinear", align_corners=True) for map_ in maps]
        total = sum(project(map_) for project, map_ in zip(branch.project, enlarged, strict=True))
        torch.testing.assert_close(branch(made), branch.classify(total), atol=1e-5, rtol=1e-4)
    assert branch(made).shape == (2, 3, 16, 16)


def test_a_branch_learns_its_teachers_labels_and_its_best_states_are_kept(config):
    labelled = train_label_branch(
        factory_of(config), Threshold(), untrained_segmenter(), domain="bright", config=LabelBranchConfig(updates=120)
    )
    assert labelled.card.agreement > 0.8
    assert labelled.card.validated_on == "fresh synthetic slices"
    assert len(labelled.branches) == 3
    _, made = draw(labelled.factory.generator, 64, seed=9)
    truth = Threshold().probabilities(made.image).argmax(1)
    scores = [foreground_dice(branch(made).argmax(1), truth, 3) for branch in labelled.branches]
    assert foreground_dice(labelled.labels(made), truth, 3) > min(scores) - 0.01


def test_the_label_of_several_branches_is_that_of_their_mean_probability(labelled):
    torch.manual_seed(5)
    other = LabelBranch.for_generator(labelled.factory.generator, 3).eval()
    both = replace(labelled, branches=[*labelled.branches, other])
    _, made = draw(labelled.factory.generator, 3)
    for branch in both.branches:  # running statistics as after training
        for norm in (branch.classify[1], branch.classify[4]):
            norm.running_mean.uniform_(0, 1)
            norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        mean = torch.stack([torch.softmax(branch(made), 1) for branch in both.branches]).mean(0)
    best = mean.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > 1e-5  # where two classes are equally likely, rounding decides
    assert clear.float().mean() > 0.99
    assert torch.equal(both.labels(made).long()[clear], mean.argmax(1)[clear])


def test_a_labelled_factory_survives_its_file(labelled, tmp_path):
    torch.manual_seed(5)
    labelled.branches.append(LabelBranch.for_generator(labelled.factory.generator, 3).eval())
    labelled.save(tmp_path / "l.safetensors")
    again = LabelledFactory.load(tmp_path / "l.safetensors")
    assert again.card == labelled.card
    _, made = draw(labelled.factory.generator, 3)
    assert torch.equal(again.labels(made), labelled.labels(made))


@pytest.mark.parametrize(
    ("entry", "value", "message"),
    [
        ("classes", "3", "classes is '3'; it must be of type int"),
        ("classes", 256, "classes is 256"),
        ("branches", 10_000, "branches is 10000"),
        ("branches", True, "branches is 'True'"),
        ("labels_from", {"bright": "guess", "dark": "own"}, "domain 'bright' is 'guess'"),
        ("labels_from", {"bright": "own"}, "no entry for domain 'dark'"),
        ("labels_from", ["own"], "labels_from is"),
        ("labelled_domain", "elsewhere", "elsewhere"),
        ("agreement", None, "agreement is 'None'"),
        ("config", 3, "config is of type int"),
        ("robust", {}, "lacks the entry 'classes'"),
    ],
)
def test_an_unusable_card_of_a_labelled_factory_is_refused_by_name(entry, value, message, labelled):
    with pytest.raises(UsageError, match=message):
        LabelledFactory.from_dict({**labelled.to_dict(), entry: value})


def test_a_card_that_lacks_an_entry_is_refused_by_name(labelled):
    may_lack = {"kind", "localiser", "distilled"}  # of the last two, a factory without the entry has none
    for entry in labelled.to_dict().keys() - may_lack:
        lacking = {name: value for name, value in labelled.to_dict().items() if name != entry}
        with pytest.raises(UsageError, match=entry):
            LabelledFactory.from_dict(lacking)


def test_inversion_finds_latents_whose_slices_resemble_the_given_slices(config):
    generator = factory_of(config).generator
    _, made = draw(generator, 6)
    z_bin = torch.arange(6) % 4
    start, found = (invert(generator, made.image.detach(), z_bin, domain=0, steps=steps) for steps in (0, 150))
    error = [
        float((generator.synthesise(style, generator.fixed_noise()).image - made.image).abs().mean())
        for style in (start, found)
    ]
    assert error[1] < 0.4 * error[0]
    assert not found.w.requires_grad


def test_a_branch_learns_from_inverted_slices_and_is_validated_on_other_patients(config):
    factory = factory_of(config)
    data = []
    for seed in (1, 2):
        _, made = draw(factory.generator, 24, seed=seed)
        labels = Threshold().probabilities(made.image).argmax(1).numpy().astype(np.uint8)
        slices = LabelledSlices(made.image[:, 0].detach().numpy(), labels, 3)
        data.append(BinnedSlices(slices=slices, z_bin=np.arange(24) % 4))
    options = {"domain": "bright", "config": LabelBranchConfig(updates=60), "real": data[0]}
    validation = train_label_branch(factory, Threshold(), untrained_segmenter(), held_out=data[1], **options)
    assert validation.card.validated_on == "validation cases"
    assert validation.card.agreement > 0.5
    alone = train_label_branch(factory, Threshold(), untrained_segmenter(), **options)
    assert alone.card.validated_on == "its own training slices"
    assert len(alone.branches) == 1  # no validation slices to choose the best states by


def test_domains_of_their_own_anatomy_are_labelled_by_their_own_features(config):
    """Untrained published networks: domains share no anatomy, and labels from other domains are at chance."""
    labelled = train_label_branch(
        factory_of(with_head(config, "image")),
        Threshold(),
        untrained_segmenter(),
        domain="bright",
        config=LabelBranchConfig(updates=2),
    )
    assert set(labelled.card.labels_from.values()) <= {"view", "own"}
    assert choose_views(labelled, seed=3)["bright"] == "view"


@pytest.mark.parametrize("choice", ["view", "own"])
def test_labels_come_from_the_chosen_view_of_the_same_latent(config, choice):
    labelled = train_label_branch(
        factory_of(with_head(config, "image")),
        Threshold(),
        untrained_segmenter(),
        domain="bright",
        config=LabelBranchConfig(updates=20),
    )
    labelled.card = replace(labelled.card, labels_from={**labelled.card.labels_from, "dark": choice})
    heights = torch.linspace(0, 3, 6)
    home, own = (labelled.draw_volume(domain, heights, seed=4)[1] for domain in ("bright", "dark"))
    assert np.array_equal(home, own) == (choice == "view")


def test_labelling_by_inversion_works_from_files(trained, store, tmp_path):
    trained.save(tmp_path / "f.safetensors")
    options = {"config": small_config(), "labelling": "inversion"}
    made = label_factory(tmp_path / "f.safetensors", store.path, tmp_path / "l.safetensors", **options)
    assert LabelledFactory.load(tmp_path / "l.safetensors").card == made.card
    with pytest.raises(UsageError, match="synthesis, inversion"):
        label_factory(tmp_path / "f.safetensors", store.path, tmp_path / "m.safetensors", labelling="guess")
