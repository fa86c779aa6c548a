"""Faster labels of drawn slices: the distilled branch, half precision, and which of them is used unasked."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation import labeller
from fedfactory.adaptation.generate_volumes import Drawing, generate_volumes
from fedfactory.adaptation.labelled_factory import DISTILLED, LabelledFactory
from fedfactory.adaptation.labelled_slices import LabelAgreement, label_agreement
from fedfactory.adaptation.labeller import choose_labeller
from fedfactory.adaptation.networks.label_branch import BranchEnsemble, LabelBranch
from fedfactory.adaptation.training.distillation import DistillationConfig, distil_branches
from fedfactory.adaptation.training.label_branch_training import LabelBranchConfig, train_label_branch
from fedfactory.cli import main
from fedfactory.common.weights_file import read_weights, write_weights
from fedfactory.errors import CheckpointError, ConfigError, UsageError
from fedfactory.generative import FactoryConfig, TrainedFactory, make_generator
from fedfactory.generative.synthesis import synthesise_slices
from fedfactory.imaging.volume_files import read_volume
from fedfactory.node import labelling
from fedfactory.node.labelling import label_factory
from helpers import small_config, untrained_segmenter
from test_label_branch import Threshold

NEAR = LabelAgreement(equal_pixels=0.99, dice=(0.97, 0.96), slices=256)


@pytest.fixture(scope="module")
def three_branches() -> LabelledFactory:
    """A factory with trained label branches, wide enough for bfloat16 to be worth while."""
    config = FactoryConfig(
        domains=("bright", "dark"), image_size=16, z_bins=4, channels=(8, 32), latent_dim=8, batch_size=4, r1_every=2
    )
    torch.manual_seed(0)
    generator = make_generator(config).eval()
    factory = TrainedFactory(generator=generator, latest=generator.state_dict(), spacing=6.0, height=100.0)
    return train_label_branch(
        factory, Threshold(), untrained_segmenter(), domain="bright", config=LabelBranchConfig(updates=80)
    )


@pytest.fixture(scope="module")
def distilled(three_branches) -> LabelledFactory:
    return distil_branches(three_branches, DistillationConfig(updates=60))


def slices(labelled, seed, count=64):
    rng = torch.Generator().manual_seed(seed)
    return synthesise_slices(labelled.factory.generator, torch.zeros(count, dtype=torch.long), rng=rng)


def run(words) -> None:
    """A command that succeeds."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert not ended.value.code


def with_agreement(labelled, agreement) -> LabelledFactory:
    return replace(labelled, card=replace(labelled.card, distilled=agreement))


def test_agreement_counts_pixels_and_scores_every_foreground_class():
    ours, theirs = torch.tensor([[[0, 1, 1, 2]]]), torch.tensor([[[0, 1, 2, 2]]])
    found = label_agreement(ours, theirs, 4)
    assert (found.equal_pixels, found.slices) == (0.75, 1)
    np.testing.assert_allclose(found.dice, [2 / 3, 2 / 3, np.nan])


@pytest.mark.parametrize("values", [{"equal_pixels": 1.5}, {"equal_pixels": float("nan")}, {"dice": (0.5, -0.1)}])
def test_an_impossible_agreement_is_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        LabelAgreement(**{"equal_pixels": 0.9, "dice": (), "slices": 1, **values})


def test_the_ensembles_probabilities_are_the_mean_of_the_branches(three_branches):
    made = slices(three_branches, 3, count=4)
    with torch.no_grad():
        mean = torch.stack([torch.softmax(branch(made), 1) for branch in three_branches.branches]).mean(0)
    torch.testing.assert_close(BranchEnsemble(three_branches.branches).probabilities(made), mean, atol=1e-5, rtol=1e-4)


def test_one_branch_learns_the_labels_of_all_and_its_card_says_how_well(distilled):
    made = slices(distilled, 77, count=256)
    ours, theirs = (BranchEnsemble(branches).labels(made) for branches in ([distilled.distilled], distilled.branches))
    found, stated = label_agreement(ours, theirs, 3), distilled.card.distilled
    assert stated.equal_pixels > 0.97
    assert stated.equal_pixels == pytest.approx(found.equal_pixels, abs=0.01)  # on slices of other latents
    assert stated.dice == pytest.approx(found.dice, abs=0.02)
    assert len(distilled.branches) == 3


def test_distilling_repeats_with_its_seed_and_leaves_the_branches_alone(three_branches):
    before = [{name: value.clone() for name, value in b.state_dict().items()} for b in three_branches.branches]
    states = [
        distil_branches(three_branches, DistillationConfig(updates=3, seed=seed)).distilled.state_dict()
        for seed in (1, 1, 2)
    ]
    equal = [all(torch.equal(states[0][name], other[name]) for name in other) for other in states[1:]]
    assert equal == [True, False]
    for branch, state in zip(three_branches.branches, before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in branch.state_dict().items())


def test_a_single_branch_cannot_be_distilled(labelled, trained, store, tmp_path):
    with pytest.raises(UsageError, match="1 label branch"):
        distil_branches(labelled)
    trained.save(tmp_path / "f.safetensors")
    with pytest.raises(UsageError, match="keep is 1"):
        label_factory(tmp_path / "f.safetensors", store.path, tmp_path / "l.safetensors", keep=1, distil=True)


def test_a_distilled_branch_survives_its_file_and_files_without_it_load_as_before(distilled, three_branches, tmp_path):
    distilled.save(tmp_path / "with.safetensors")
    again = LabelledFactory.load(tmp_path / "with.safetensors")
    assert again.card == distilled.card
    for name, value in again.distilled.state_dict().items():
        assert torch.equal(value, distilled.distilled.state_dict()[name])
    tensors, card = read_weights(tmp_path / "with.safetensors", kind="labelled factory")
    old = {name: value for name, value in tensors.items() if not name.startswith(DISTILLED)}
    write_weights(tmp_path / "old.safetensors", old, {key: card[key] for key in card.keys() - {"distilled"}})
    loaded = LabelledFactory.load(tmp_path / "old.safetensors")
    assert loaded.distilled is None
    assert loaded.card == three_branches.card


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"equal_pixels": 1, "dice": [0.9], "slices": 4}, "has 1 scores; it must have 2"),
        ({"equal_pixels": 2, "dice": [0.9, 0.9], "slices": 4}, "equal_pixels is 2"),
        ({"equal_pixels": 1, "dice": [0.9, 0.9], "slices": 4, "code": "x"}, "code"),
        ("yes", "distilled is"),
    ],
)
def test_a_false_card_of_a_distilled_branch_is_refused(entry, message, distilled, tmp_path):
    distilled.save(tmp_path / "l.safetensors")
    tensors, card = read_weights(tmp_path / "l.safetensors", kind="labelled factory")
    write_weights(tmp_path / "bad.safetensors", tensors, {**card, "distilled": entry})
    with pytest.raises(CheckpointError, match=message):
        LabelledFactory.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("change", ["missing", "misshapen"])
def test_a_distilled_branch_whose_weights_do_not_fit_is_refused(change, distilled, tmp_path):
    distilled.save(tmp_path / "l.safetensors")
    tensors, card = read_weights(tmp_path / "l.safetensors", kind="labelled factory")
    name = f"{DISTILLED}project.0.weight"
    changed = {key: value for key, value in tensors.items() if key != name}
    if change == "misshapen":
        changed[name] = torch.zeros(3)
    write_weights(tmp_path / "bad.safetensors", changed, card)
    with pytest.raises(CheckpointError, match=r"project\.0\.weight"):
        LabelledFactory.load(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("dice", "used"),
    [((0.97, 0.96), "distilled"), ((0.97, 0.90), "ensemble"), ((0.97, float("nan")), "ensemble")],
)
def test_the_distilled_branch_is_used_unasked_where_every_class_agrees(dice, used, distilled):
    labelled = with_agreement(distilled, replace(NEAR, dice=dice))
    chosen = choose_labeller(labelled, "bright", precision="float32")
    assert chosen.label_with == used
    branches = [labelled.distilled] if used == "distilled" else labelled.branches
    made = slices(labelled, 5, count=8)
    assert torch.equal(chosen.labels_of(made), BranchEnsemble(branches).labels(made))
    assert chosen.facts()["distilled_agreement"] == (None if used == "ensemble" else {
        "equal_pixels": 0.99, "dice": list(dice), "slices": 256
    })  # fmt: skip
    for asked in ("ensemble", "distilled"):
        assert choose_labeller(labelled, "bright", label_with=asked, precision="float32").label_with == asked


def test_labels_of_half_precision_are_those_of_float32_in_nearly_all_pixels(distilled):
    for asked in ("ensemble", "distilled"):
        chosen = choose_labeller(distilled, "dark", label_with=asked, precision="bfloat16")
        plain = choose_labeller(distilled, "dark", label_with=asked, precision="float32")
        made = slices(distilled, 11)
        equal = (chosen.labels_of(made) == plain.labels_of(made)).float().mean()
        assert 0.999 <= equal < 1  # an equal label everywhere would mean that nothing was computed in bfloat16
        assert chosen.precision == "bfloat16"
        assert chosen.equal_pixels >= 0.999
        assert plain.equal_pixels is None


@pytest.mark.parametrize(
    ("fast", "least", "width", "used"),
    [
        (True, 0.999, 32, "bfloat16"),
        (False, 0.999, 32, "float32"),
        (True, 1.1, 32, "float32"),  # as if too many labels changed
        (True, 0.999, 64, "float32"),  # as if the maps were too narrow
    ],
)
def test_half_precision_is_used_unasked_where_it_is_fast_and_changes_few_labels(
    fast, least, width, used, three_branches, monkeypatch
):
    monkeypatch.setattr(labeller, "fast_bfloat16", lambda device: fast)
    monkeypatch.setattr(labeller, "LEAST_EQUAL_PIXELS", least)
    monkeypatch.setattr(labeller, "LEAST_WIDTH", width)
    assert choose_labeller(three_branches, "bright").precision == used
    assert choose_labeller(three_branches, "bright", precision="bfloat16").precision == "bfloat16"


def test_volumes_say_how_they_were_labelled(distilled, tmp_path):
    with_agreement(distilled, NEAR).save(tmp_path / "l.safetensors")
    words = ["generate-volumes", "--factory", str(tmp_path / "l.safetensors"), "--domain", "dark", "--seed", "3"]
    choices = {
        "fast": ["--precision", "bfloat16"],
        "plain": ["--label-with", "ensemble", "--precision", "float32"],
    }
    manifests, volumes = {}, {}
    for name, chosen in choices.items():
        run([*words, "--out", str(tmp_path / name), *chosen])
        manifests[name] = json.loads((tmp_path / name / "manifest.json").read_text())
        volumes[name] = [
            read_volume(tmp_path / name / "synthetic_0000" / part / "synthetic_0000.nii.gz").data
            for part in ("image", "label")
        ]
    assert {key: manifests["plain"][key] for key in ("label_with", "precision", "distilled_agreement")} == {
        "label_with": "ensemble", "precision": "float32", "distilled_agreement": None
    }  # fmt: skip
    assert (manifests["fast"]["label_with"], manifests["fast"]["precision"]) == ("distilled", "bfloat16")
    assert manifests["fast"]["distilled_agreement"]["equal_pixels"] == 0.99
    assert manifests["fast"]["equal_pixels"] >= 0.999
    assert np.array_equal(volumes["fast"][0], volumes["plain"][0])  # images do not depend on either
    assert (volumes["fast"][1] == volumes["plain"][1]).mean() > 0.97


def test_drawn_volumes_equal_those_of_the_branches_written_out(three_branches, tmp_path):
    """Memory order and the labeller change nothing but the last bits of images, and labels at ties."""
    three_branches.save(tmp_path / "l.safetensors")
    drawing = Drawing(domain="dark", precision="float32", seed=4)
    generate_volumes(tmp_path / "l.safetensors", tmp_path / "out", drawing)
    folder, found = tmp_path / "out" / "synthetic_0000", {}
    for part in ("image", "label"):
        found[part] = np.moveaxis(read_volume(folder / part / "synthetic_0000.nii.gz").data, 2, 0)
    from fedfactory.adaptation.generate_volumes import NOISE, _Latents
    from fedfactory.common.seeding import seed_of
    from fedfactory.generative.synthesis import slice_heights

    images, labels = three_branches.draw_volume(
        "dark", slice_heights(4, 2), seed=seed_of(4, 0, 0, NOISE), z=_Latents(drawing, 8).of(0, 0)
    )
    np.testing.assert_allclose(found["image"], images[:, 0], atol=1e-5)
    assert (found["label"] == labels).mean() > 0.999


def test_choices_that_do_not_suit_a_factory_are_refused(labelled, three_branches):
    with pytest.raises(UsageError, match="no distilled branch"):
        choose_labeller(labelled, "bright", label_with="distilled")
    drawing = replace(three_branches, branches=[])
    assert choose_labeller(drawing, "bright").label_with == "generator"
    for choice in ({"label_with": "ensemble"}, {"precision": "bfloat16"}):
        with pytest.raises(UsageError, match="draws labels with its images"):
            choose_labeller(drawing, "bright", **choice)
    for choice in ({"label_with": "best"}, {"precision": "float16"}):
        with pytest.raises(UsageError, match="choose one of auto"):
            Drawing(domain="bright", **choice)


def test_label_trains_a_distilled_branch_and_states_its_agreement(trained, store, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(labelling, "LabelBranchConfig", lambda **given: LabelBranchConfig(**{**given, "updates": 5}))
    monkeypatch.setattr(labelling, "DistillationConfig", lambda **given: DistillationConfig(**given, updates=5))
    trained.save(tmp_path / "f.safetensors")
    segmenter = untrained_segmenter()
    segmenter.save(tmp_path / "s.safetensors")
    words = ["label", "--factory", str(tmp_path / "f.safetensors"), "--store", str(store.path), "--distil"]
    words += ["--segmenter", str(tmp_path / "s.safetensors"), "--first-guess", str(tmp_path / "s.safetensors")]
    run([*words, "--out", str(tmp_path / "l.safetensors")])
    made = LabelledFactory.load(tmp_path / "l.safetensors")
    assert f"distilled branch: {made.card.distilled.equal_pixels:.2%} of pixels" in " ".join(
        capsys.readouterr().out.split()
    )
    assert isinstance(made.distilled, LabelBranch)


def test_a_factory_that_draws_labels_has_nothing_to_distil(trained, store, tmp_path):
    config = replace(trained.config, classes=3, head="palette")
    torch.manual_seed(0)
    generator = make_generator(config).eval()
    replace(trained, generator=generator, latest=generator.state_dict()).save(tmp_path / "f.safetensors")
    with pytest.raises(UsageError, match="leave out distil"):
        label_factory(
            tmp_path / "f.safetensors", store.path, tmp_path / "l.safetensors", distil=True, config=small_config()
        )
