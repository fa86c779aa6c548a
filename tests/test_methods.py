"""Methods of federated segmentation without a federation: what a round changes, what stays local, weights of sites."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.labels.candidate_labels import UNKNOWN, SiteSlices, candidate_masks, candidates_from_labels
from fedfactory.adaptation.methods.catalogue import METHOD_CATALOGUE, describe
from fedfactory.adaptation.methods.fedmix import PseudoLabels, agreement, site_weights, soft_dice_loss
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteContext, SiteRound, SiteUpdate
from fedfactory.adaptation.methods.registry import METHODS, make_method
from fedfactory.adaptation.networks.site_network import Encoded, SiteUNet
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import FederatedDesign, SegmenterCard
from fedfactory.errors import ConfigError, NodeDataError, TrainingError, UsageError
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.slice_format import SliceFormat
from helpers import CONFIG, SMALL, method_of, site, site_round_of, squares, with_channels

CONTEXT = SiteContext(site=2, network="dynunet", modality="mri")


def test_the_catalogue_describes_every_method_without_importing_pytorch():
    code = (
        "import sys; import fedfactory.adaptation.methods.catalogue; "
        "print([name for name in ('torch', 'numpy', 'monai') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert list(METHODS) == list(METHOD_CATALOGUE)
    assert all(method.description is METHOD_CATALOGUE[name] for name, method in METHODS.items())
    with pytest.raises(UsageError, match="method is 'magic'; choose one of local, fedavg"):
        describe("magic")


@pytest.mark.parametrize("name", METHODS)
def test_a_round_learns_and_repeats_with_its_seed(name):
    method = method_of(name, updates=8)
    states = []
    for _ in range(2):
        site_round = site_round_of(method, site())
        report = method.train_round(site_round)
        states.append(site_round.model.state_dict())
    assert report.samples == 12 and math.isfinite(report.loss)
    start = method.build().state_dict()
    assert any(not torch.equal(states[0][key], start[key]) for key in start)
    assert all(torch.equal(states[0][key], states[1][key]) for key in start)


@pytest.mark.parametrize("name", ["local", "fedavg", "fedprox", "fedbn", "fedicra"])
def test_a_site_without_any_label_changes_nothing_and_does_not_count(name):
    method = method_of(name)
    site_round = site_round_of(method, site("none"))
    before = copy.deepcopy(site_round.model.state_dict())
    report = method.train_round(site_round)
    assert report.samples == 0
    assert all(torch.equal(before[key], value) for key, value in site_round.model.state_dict().items())
    assert method.shares([report, SiteUpdate(10, 0.5), SiteUpdate(30, 0.5)]) == [0.0, 0.25, 0.75]
    assert method.shares([report, report]) == [0.0, 0.0]


@pytest.mark.parametrize("name", METHODS)
def test_a_segmenter_of_any_method_survives_its_file(name, tmp_path):
    method = method_of(name)
    model = method.build()
    fmt = SliceFormat(size=32, spacing=1.0, window=(-1.0, 1.0), z_bins=4)
    design = FederatedDesign(method=method.config, context=CONTEXT)
    card = SegmenterCard(classes=3, network="federated", federated=design)
    made = Segmenter(method.segmenter(model, CONTEXT), fmt, card)
    made.save(tmp_path / "m.safetensors")
    images = torch.from_numpy(squares(3)[0])[:, None]
    found = Segmenter.load(tmp_path / "m.safetensors").probabilities(images)
    torch.testing.assert_close(found, made.probabilities(images))
    assert found.shape == (3, 3, 32, 32)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_from_colour_pictures(name):
    method = method_of(name, channels=3, colour=True, updates=2, rounds=1, first_guess=True)
    data = with_channels(site("none" if describe(name).needs_public else "dense"), 3)
    site_round = site_round_of(method, data)
    site_round.public = with_channels(site(), 3)
    site_round.modalities = {"ct": data, "mri": with_channels(site(seed=1), 3)}
    report = method.train_round(site_round)
    assert report.samples > 0 and math.isfinite(report.loss)
    segmenter = method.segmenter(
        site_round.model, CONTEXT if name != "hssf" else SiteContext(), site_round.state
    ).eval()
    images = torch.from_numpy(data.images[:2])
    found = segmenter(images)
    assert found.shape == (2, 3, 32, 32)
    for channel in range(3):  # none is ignored
        changed = images.clone()
        changed[:, channel] = changed[:, channel].flip(-1)
        assert not torch.allclose(segmenter(changed), found, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_slices_of_another_number_of_channels_are_refused(name):
    method = method_of(name, channels=3)
    site_round = site_round_of(method, site())
    for public in (site(), with_channels(site(), 3)):
        site_round.public = public
        with pytest.raises(NodeDataError, match=r"^channels is 1 in these slices; it must be 3, as in"):
            method.train_round(site_round)


def test_slices_without_a_channel_axis_have_one_channel():
    images, labels = squares(2)
    data = SiteSlices(images, candidates_from_labels(labels, 3), np.array(["dense"] * 2), 3)
    assert data.images.shape == (2, 1, 32, 32) and data.candidates.shape == (2, 32, 32)
    assert replace(data, images=data.images.repeat(4, 1)).images.shape == (2, 4, 32, 32)


def test_a_configuration_from_before_channels_has_one_channel():
    old = {name: value for name, value in CONFIG.to_dict().items() if name not in ("channels", "colour")}
    assert MethodConfig.from_dict(old) == CONFIG and CONFIG.channels == 1 and not CONFIG.colour
    card = SegmenterCard(classes=3, network="federated", federated=FederatedDesign(method=CONFIG, context=CONTEXT))
    entries = card.to_dict()
    entries["federated"]["method"] = old
    assert SegmenterCard.from_dict(entries) == card


def test_fedavg_weights_equal_sites_alike():
    method, data = method_of("fedavg"), site()
    alone = site_round_of(method, data)
    method.train_round(alone)
    assert method.shares([SiteUpdate(12, 1.0)] * 3) == pytest.approx([1 / 3] * 3)


def test_the_proximal_term_is_zero_at_the_average_and_grows_with_the_distance():
    method = method_of("fedprox")
    method = make_method(replace(method.config, options={"proximal": 4.0}))
    model = method.build()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    assert float(method.proximal_term(model, before)) == 0
    with torch.no_grad():
        model.final_conv.bias.add_(1.0)
    assert float(method.proximal_term(model, before).detach()) == pytest.approx(2.0 * 3)


def test_the_local_parameters_of_fedbn_are_those_of_normalisation_alone():
    grouped = method_of("fedbn")
    kept = grouped.local_parameters(grouped.build())
    assert kept and all(name.endswith((".adn.N.weight", ".adn.N.bias")) for name in kept)
    method = method_of("fedbn", norm="batch")
    model = method.build()
    kept = method.local_parameters(model)
    assert any(name.endswith("running_mean") for name in kept)
    assert any(name.endswith("num_batches_tracked") for name in kept)
    assert all(".adn.N." in name for name in kept)
    assert len(kept) == 5 * sum(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    assert (
        method_of("local").local_parameters(model) == set(model.state_dict())
        and method_of("fedavg").local_parameters(model) == set()
    )


# FedICRA


def test_every_site_has_its_own_channel_selection():
    torch.manual_seed(0)
    model = SiteUNet(3, width=4, depth=5, sites=3).eval()
    x = torch.randn(2, 1, 32, 32)
    selections = [model.encode(x, index)[1] for index in range(3)]
    assert selections[0].shape == (2, 64, 1, 1)
    assert all(float(selection.min()) > 0 and float(selection.max()) < 1 for selection in selections)
    assert not torch.allclose(selections[0], selections[1]) and not torch.allclose(selections[1], selections[2])
    model.site = 1
    torch.testing.assert_close(model.encode(x)[1], selections[1])


def test_the_contrast_of_sites_with_equal_selections_is_zero_whatever_dropout_draws():
    method = method_of("fedicra")
    model = method.build().train()
    with torch.no_grad():
        model.selections["3"].site[0].weight[:, 1:] = model.selections["3"].site[0].weight[:, :1]  # all sites alike
    encoded = model.encode(torch.rand(4, 1, 32, 32), 0)
    assert float(method.contrast(model, encoded, site=0).detach()) == 0
    # And it is minus the mean squared distance of the heatmaps where they differ, without dropout.
    torch.manual_seed(1)
    model = method.build().eval()
    x = torch.rand(4, 1, 32, 32)
    mine, *theirs = (model.encode(x, index).heatmap for index in (1, 0, 2))
    expected = -sum(float((mine - other).square().mean().detach()) for other in theirs) / 2
    assert float(method.contrast(model, model.encode(x, 1), site=1).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_sites_loss_takes_one_forward_pass(monkeypatch):
    method = method_of("fedicra")
    model, calls = method.build(), []
    model.conv_0.register_forward_hook(lambda *_: calls.append(1))
    allowed = candidate_masks(torch.from_numpy(site().candidates[:2].astype(np.int64)), 3)
    method.loss(model, torch.from_numpy(site().images[:2]), allowed, site=0)
    assert len(calls) == 1


def test_channel_selections_and_heads_are_trained_and_sent():
    method = method_of("fedicra")
    site_round = site_round_of(method, site())
    before = copy.deepcopy(site_round.model.state_dict())
    method.train_round(site_round)
    after = site_round.model.state_dict()
    for part in ("selections.3.site.0.weight", "selections.3.choose.2.weight"):
        assert not torch.equal(before[part], after[part])
    assert method.local_parameters(site_round.model) == set()


def test_every_term_of_fedicra_reaches_what_it_is_meant_to_change():
    images, labels = squares(4)
    labels[:, ::2] = UNLABELLED
    allowed = candidate_masks(torch.from_numpy(candidates_from_labels(labels, 3).astype(np.int64)), 3)
    x = torch.from_numpy(images)[:, None]
    reached = {}
    for term in ("tree_weight", "crf_weight", "contrast_weight"):
        weights = {"tree_weight": 0.0, "crf_weight": 0.0, "contrast_weight": 0.0, term: 1.0}
        method = make_method(replace(CONFIG, method="fedicra", options={**SMALL["fedicra"], **weights}))
        model = method.build()
        loss = method.loss(model, x, torch.zeros_like(allowed) if term == "contrast_weight" else allowed, site=0)
        loss.backward()
        reached[term] = {
            name for name, value in model.named_parameters() if value.grad is not None and value.grad.any()
        }
    assert any(name.startswith("heads.0") for name in reached["tree_weight"])
    assert "final_conv.weight" in reached["crf_weight"]
    assert any(name.startswith("selections") for name in reached["contrast_weight"])
    assert not any(name.startswith(("upcat", "final_conv")) for name in reached["contrast_weight"])


def test_by_default_the_tree_energy_prefers_a_whole_structure_to_a_part_of_it():
    """With the published scale, trees make nearly one colour of a slice this small: the less is found, the better."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    distance = torch.hypot(rows - 32.0, columns - 32.0)
    noise = 0.05 * torch.randn(4, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    images = 0.5 * torch.sigmoid(12 - distance) + noise  # a disc whose border is as smooth as in a scan
    method = make_method(
        replace(CONFIG, method="fedicra", classes=2, size=64, options={"crf_weight": 0, "contrast_weight": 0})
    )
    nothing_known = torch.zeros(4, 2, 64, 64, dtype=torch.bool)

    def energy_of(radius: float) -> float:
        logits = torch.stack([distance - radius, radius - distance]).expand(4, -1, -1, -1)
        model = SimpleNamespace(
            encode=lambda images, site: Encoded([], None, None),
            decode=lambda features: [logits],
            logits=lambda features: features,
            embeddings=lambda decoded: [],
        )
        return float(method.loss(model, images, nothing_known, site=0))

    assert energy_of(12) < energy_of(6)


@pytest.mark.parametrize("share", [0.5, None])
def test_an_update_of_fedicra_trains_one_part_or_all_layers_together(share):
    """With a share, the output layer comes first and everything else afterwards."""
    options = {**SMALL["fedicra"], "body_share": share}
    method = make_method(replace(method_of("fedicra", updates=2).config, options=options))
    site_round, moved = site_round_of(method, site()), []
    before = copy.deepcopy(site_round.model.state_dict())

    def step(*arguments, **options):
        loss = type(method).step(method, *arguments, **options)
        after = site_round.model.state_dict()
        changed = {name for name, value in site_round.model.named_parameters() if not torch.equal(before[name], value)}
        moved.append({name.startswith("final_conv") for name in changed})
        before.update(copy.deepcopy(after))
        return loss

    method.step = step
    method.train_round(site_round)
    assert moved == ([{True, False}] * 2 if share is None else [{True}, {False}])
    assert all(value.requires_grad for value in site_round.model.parameters())


def test_adaptive_aggregation_starts_at_the_average_descends_and_persists():
    method, data = method_of("fedicra"), site()
    state = method.new_state()
    site_round = site_round_of(method, data, state=state)
    method.train_round(site_round)
    own = dict(state.own)
    assert set(own) == set(site_round.model.higher_layers()) and not state.mix
    state = type(state).from_dict(state.to_dict())  # as a node stores it
    average = method_of("fedicra", seed=9).build()  # the aggregated model that the site receives
    average.load_state_dict(
        {**site_round.model.state_dict(), **{k: v for k, v in average.state_dict().items() if k in own}}
    )
    sent = {name: value.detach().clone() for name, value in average.higher_layers().items()}
    again = site_round_of(method, data, model=average, state=state, number=2)
    with method.seeded_round(again):
        numbers = method.adaptive_aggregation(again, data.labelled_indices)
    mixes = state.mix
    layers = ["upcat_3", "upcat_2", "upcat_1", "final_conv"]
    assert set(numbers) == {"adopted", *(f"mix_{layer}" for layer in layers)}
    expected = torch.cat([mixes["final_conv.weight"].flatten(), mixes["final_conv.bias"].flatten()]).mean()
    assert numbers["mix_final_conv"] == pytest.approx(float(expected))
    assert 0 < numbers["adopted"] < 1 and all(
        0 <= float(value.min()) <= float(value.max()) <= 1 for value in mixes.values()
    )
    for name, value in again.model.higher_layers().items():
        torch.testing.assert_close(value.detach(), own[name] + (sent[name] - own[name]) * mixes[name])
    assert any(not torch.equal(mixes[name], torch.ones_like(mixes[name])) for name in mixes)
    later = method.train_round(site_round_of(method, data, model=average, state=state, number=2))
    assert set(later.numbers) == set(numbers)  # every round reports them


# FedMix

N, LOSS = (100, 50, 130), (0.05, 0.04, 0.20)


@pytest.mark.parametrize(
    ("loss_weight", "loss_power", "expected"),
    [
        (10, 1.5, (0.126038, 0.083188, 0.790774)),
        (2, 3, (0.129224, 0.064734, 0.806042)),
        (0, 1.5, (0.357143, 0.178571, 0.464286)),
    ],
)
def test_weights_of_sites_are_the_published_ones(loss_weight, loss_power, expected):
    found = site_weights(N, LOSS, loss_weight=loss_weight, loss_power=loss_power)
    assert found == pytest.approx(expected, abs=1e-6) and sum(found) == pytest.approx(1)


def test_weights_of_odd_rounds():
    options = {"loss_weight": 10, "loss_power": 1.5}
    assert site_weights(N, (0.1,) * 3, **options) == pytest.approx((0.335498, 0.319264, 0.345238), abs=1e-6)
    assert site_weights((0, 50, 50), (math.nan, 0.1, 0.1), **options) == pytest.approx([0, 0.5, 0.5])
    assert site_weights((0, 0), (math.nan, math.nan), **options) == [0, 0]
    assert sum(site_weights(N, (0.0,) * 3, **options)) == pytest.approx(1)
    capped = site_weights(N, LOSS, **options, largest=0.5)
    assert max(capped) == pytest.approx(0.5) and sum(capped) == pytest.approx(1)
    for bad in (math.nan, math.inf, -1.0):
        with pytest.raises(TrainingError, match="loss"):
            site_weights(N, (0.1, bad, 0.1), **options)


def test_soft_dice_is_one_over_all_structures_together():
    p, y = torch.rand(2, 3, 4, 4, dtype=torch.float64), (torch.rand(2, 3, 4, 4) > 0.5).double()
    expected = np.mean(
        [float((2 * (a * b).sum() + 1e-4) / (a.sum() + b.sum() + 1e-4)) for a, b in zip(p, y, strict=True)]
    )
    assert float(soft_dice_loss(p, y)) == pytest.approx(1 - expected)


def test_two_empty_masks_agree_and_the_worst_class_can_decide():
    first = torch.zeros(2, 2, 8, 8, dtype=torch.bool)
    second = first.clone()
    first[1, 0], second[1, 0] = True, True
    first[1, 1, 0, 0] = True
    assert agreement(first, second, per_class=False).tolist() == pytest.approx([1.0, 2 * 64 / 129], abs=1e-4)
    assert float(agreement(first, second, per_class=True)[1]) == pytest.approx(0, abs=1e-3)


class Scripted(torch.nn.Module):
    """A network with a fixed prediction."""

    def __init__(self, masks):
        super().__init__()
        self.register_buffer("masks", torch.where(masks, 9.0, -9.0))

    def forward(self, x):
        return self.masks[: len(x)]


def fedmix(**options):
    return make_method(replace(CONFIG, method="fedmix", options=options))


def test_weak_labels_correct_the_networks_predictions_if_asked():
    method = fedmix(refine=True)
    masks = torch.ones(1, 2, 32, 32, dtype=torch.bool)
    box = torch.zeros(1, 3, 32, 32, dtype=torch.bool)
    box[:, 0] = True
    box[:, 1, 4:20, 4:20] = True  # a box of the first structure
    refined = method.refined(masks, box)
    assert refined[0, 0].sum() == 16 * 16 and not refined[0, 1].any()
    presence = torch.ones(1, 3, 32, 32, dtype=torch.bool)
    presence[:, 2] = False
    assert method.refined(masks, presence)[0, 0].all() and not method.refined(masks, presence)[0, 1].any()
    nothing = torch.zeros(1, 3, 32, 32, dtype=torch.bool)
    assert method.refined(masks, nothing).all()
    assert fedmix(refine=False).refined(masks, box).all()


@pytest.mark.parametrize(("overlap", "accepted"), [(0.8999, False), (0.9, True)])
def test_a_slice_is_accepted_from_the_agreement_threshold_on(overlap, accepted):
    pixels = 10_000
    first, second = (torch.zeros(1, 1, 200, 100, dtype=torch.bool) for _ in range(2))
    shared = round(overlap * pixels)
    first.view(-1)[:pixels] = True
    second.view(-1)[pixels - shared : 2 * pixels - shared] = True
    method = make_method(replace(CONFIG, method="fedmix", classes=2, options={}))
    nothing = torch.zeros(1, 2, 200, 100, dtype=torch.bool)
    assert method.accepted(first, second, allowed=nothing, kinds=np.array(["none"])).tolist() == [accepted]


def test_each_kind_of_label_has_its_rule_for_accepting_a_slice():
    empty, full = (torch.full((1, 2, 32, 32), value, dtype=torch.bool) for value in (False, True))
    small = empty.clone()
    small[:, :, :4, :4] = True
    nothing = torch.zeros(1, 3, 32, 32, dtype=torch.bool)
    there = torch.ones(1, 3, 32, 32, dtype=torch.bool)
    absent = nothing.clone()
    absent[:, 0] = True
    none, image, box = (np.array([kind]) for kind in ("none", "image", "box"))
    assert not fedmix().accepted(
        empty, empty, allowed=nothing, kinds=none
    )  # a collapse to background must not be trained on
    assert fedmix(empty="accept").accepted(empty, empty, allowed=nothing, kinds=none)
    assert fedmix().accepted(empty, empty, allowed=absent, kinds=image)
    assert not fedmix().accepted(empty, empty, allowed=there, kinds=image)
    assert fedmix(image_rule="reference").accepted(empty, empty, allowed=there, kinds=image)
    assert fedmix().accepted(full, full, allowed=there, kinds=box) and not fedmix().accepted(
        small, small, allowed=there, kinds=box
    )


def test_the_networks_pseudo_labels_are_exchanged_as_predicted():
    method, data = fedmix(agreement=0.0, empty="accept"), site("none", count=4)
    first, second = torch.zeros(2, 4, 2, 32, 32, dtype=torch.bool)
    first[:, 0, :16], second[:, 0, 16:] = True, True
    model = torch.nn.Module()
    model.first, model.second = Scripted(first), Scripted(second)
    model.anchor = torch.nn.Parameter(torch.zeros(()))
    site_round = SiteRound(model=model, optimizers={}, data=data, site=0, number=1, state=method.new_state())
    with method.seeded_round(site_round):
        pseudo, numbers = method.pseudo_labels(site_round, np.arange(4))
    assert numbers == {"accepted": 4.0, "accepted_empty": 0.0}
    assert isinstance(pseudo, PseudoLabels)
    batch = method._training_batch(site_round, np.arange(4), dense=np.arange(0), pseudo=pseudo)
    for found in (pseudo, batch):
        assert torch.equal(found.first, first.float()) and torch.equal(found.second, second.float())


def test_a_weak_site_that_accepts_no_slice_changes_nothing():
    method = fedmix(agreement=1.0)
    for kind in ("box", "image", "none"):
        images, labels = squares()
        data = SiteSlices(images, candidates_from_labels(labels, 3) * 0 + UNKNOWN, np.array([kind] * 12), 3)
        site_round = site_round_of(method, data)
        before = copy.deepcopy(site_round.model.state_dict())
        report = method.train_round(site_round)
        assert report.samples == 0 and math.isnan(report.loss)
        assert all(torch.equal(before[key], value) for key, value in site_round.model.state_dict().items())


def test_the_pseudo_label_pass_leaves_the_networks_as_they_were():
    method = fedmix(agreement=0.0, empty="accept")
    site_round = site_round_of(method, site("none"))
    site_round.model.train()
    before = copy.deepcopy(site_round.model.state_dict())
    method.pseudo_labels(site_round, np.arange(12))
    assert site_round.model.training
    assert all(torch.equal(before[key], value) for key, value in site_round.model.state_dict().items())


def test_a_pixel_is_background_where_no_structure_has_a_probability_above_one_half():
    method = fedmix()
    logits = method.segmenter(method.build().eval(), SiteContext())(torch.zeros(1, 1, 32, 32))
    assert logits.shape == (1, 3, 32, 32) and (logits[:, 0] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 1}, "classes is 1"),
        ({"size": 20}, "multiple of 16"),
        ({"channels": 0}, "channels is 0; choose a whole number from 1 to 8"),
        ({"channels": 9}, "channels is 9; choose a whole number from 1 to 8"),
        ({"channels": 2.5}, "channels is 2.5"),
        ({"colour": True}, "channels is 1; it must be 3, red, green and blue, with colour"),
        ({"width": 6}, "multiple of 4"),
        ({"norm": "odd"}, "norm is 'odd'"),
        ({"rounds": 0}, "rounds is 0"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"method": "fedprox", "options": {"proximal": -1.0}}, "proximal"),
        ({"method": "fedprox", "options": {"mu": 1.0}}, "must be settings of fedprox"),
        ({"method": "fedicra", "options": {"tree_weight": -1.0}}, "tree_weight is -1.0"),
        ({"method": "fedicra", "options": {"tree_sigma": 0}}, "tree_sigma is 0; it must be positive"),
        ({"method": "fedicra", "options": {"selections": 0}}, "channel selections"),
        (
            {"method": "fedicra", "options": {"body_share": 1.0}},
            "body_share is 1.0; choose a share above 0",
        ),
        ({"method": "fedicra", "options": {"body_share": 0}}, "body_share is 0; choose a share above 0"),
        ({"method": "fedmix", "options": {"agreement": 2.0}}, "agreement is 2.0; choose from 0 to 1"),
        ({"method": "fedmix", "options": {"image_rule": "odd"}}, "image_rule"),
    ],
)
def test_wrong_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_method(replace(CONFIG, **changes))


def test_unknown_methods_and_settings_are_refused():
    with pytest.raises(UsageError, match="local, fedavg"):
        make_method(replace(CONFIG, method="magic"))
    with pytest.raises(ConfigError, match="not usable"):
        MethodConfig.from_dict({**CONFIG.to_dict(), "out": "/etc/passwd"})
    assert MethodConfig.from_dict(CONFIG.to_dict()) == CONFIG


def test_a_loss_that_is_no_number_ends_the_round_before_anything_moves():
    method, data = method_of("fedavg"), site()
    data.images[:] = np.nan
    site_round = site_round_of(method, data)
    before = copy.deepcopy(dict(site_round.model.named_parameters()))
    with pytest.raises(TrainingError, match="nan in round 1"):
        method.train_round(site_round)
    assert all(torch.equal(before[name], value) for name, value in site_round.model.named_parameters())
