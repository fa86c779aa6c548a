"""CMC: consistency between modalities that are not aligned, and sites that lack a modality."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedfactory.adaptation.losses.cmc_losses import (
    DESCRIPTORS,
    channel_consistency,
    class_agreement,
    contrast,
    prototype_agreement,
)
from fedfactory.adaptation.methods.cmc import CMCOptions, described_features
from fedfactory.adaptation.methods.interface.site_round import SiteContext, SiteUpdate
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.networks.modality_network import SHARINGS, ChannelAttention, ModalityUNet, modality_of
from fedfactory.errors import ConfigError, NodeDataError
from helpers import CONFIG, site, site_round_of, with_channels

BOTH = ("ct", "mri")


def cmc(**options):
    return make_method(replace(CONFIG, method="cmc", options={"modalities": list(BOTH), **options}))


def network(seed=0):
    torch.manual_seed(seed)
    return ModalityUNet(3, BOTH, 4, depth=4)


def slices(count=2, seed=0):
    return torch.from_numpy(site(count=count, seed=seed).images)


def test_the_contrast_equals_the_sum_over_all_pairs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(5, 7)), rng.normal(size=(5, 7))
    rows = np.concatenate([a, b])
    rows -= rows.mean(1, keepdims=True)
    cosine = rows @ rows.T / np.outer(np.linalg.norm(rows, axis=1), np.linalg.norm(rows, axis=1))
    total = 0.0
    for i in range(10):
        others = sum(math.exp(cosine[i, k] / 0.5) for k in range(10) if k != i)
        total -= math.log(math.exp(cosine[i, (i + 5) % 10] / 0.5) / others)
    found = contrast(torch.from_numpy(a), torch.from_numpy(b))
    assert float(found) == pytest.approx(total / 10 / math.log(9), rel=1e-10)


def test_unrelated_channels_are_at_chance():
    torch.manual_seed(0)
    a, b = torch.randn(64, 4096), torch.randn(64, 4096)
    assert float(contrast(a, b)) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("descriptor", DESCRIPTORS)
def test_equal_channels_are_consistent_and_shuffled_channels_are_not(descriptor):
    torch.manual_seed(0)
    features = torch.relu(torch.randn(2, 16, 8, 8))
    shuffled = features[:, torch.randperm(16)]
    assert (
        channel_consistency(features, features, descriptor) < channel_consistency(features, shuffled, descriptor) - 0.1
    )


def test_the_channels_correlations_need_no_alignment():
    torch.manual_seed(0)
    features = torch.relu(torch.randn(1, 16, 8, 8))
    moved = features.flatten(2)[..., torch.randperm(64)].view_as(features)
    equal = float(channel_consistency(features, features, "gram"))
    assert float(channel_consistency(features, moved, "gram")) == pytest.approx(equal, abs=1e-5)
    assert (
        float(channel_consistency(features, moved, "pooled"))
        > float(channel_consistency(features, features, "pooled")) + 0.1
    )


def test_agreement_on_one_grid_is_one_minus_dice():
    labels = torch.zeros(1, 16, 16).long()
    labels[:, 4:8, 4:8] = 1
    logits = 50.0 * F.one_hot(labels, 3).movedim(-1, 1).float()
    assert float(class_agreement(logits, logits)) == pytest.approx(0, abs=1e-5)
    elsewhere = logits.roll(8, -1)
    assert float(class_agreement(logits, elsewhere)) == pytest.approx(1, abs=1e-5)
    nothing = 50.0 * F.one_hot(torch.zeros_like(labels), 3).movedim(-1, 1).float()
    assert float(class_agreement(nothing, nothing)) == 0


def test_the_prototype_loss_is_low_where_each_class_has_equal_features_in_both_modalities():
    torch.manual_seed(0)
    labels = torch.arange(3).repeat_interleave(12).view(1, 6, 6)
    logits = 50.0 * F.one_hot(labels, 3).movedim(-1, 1).float()
    directions = torch.randn(3, 8)
    features = directions[labels].movedim(-1, 1)
    moved = torch.flip(labels, (1, 2))
    same = (50.0 * F.one_hot(moved, 3).movedim(-1, 1).float(), directions[moved].movedim(-1, 1))
    mixed = (same[0], directions[(moved + 1) % 3].movedim(-1, 1))
    assert prototype_agreement((logits, features), same) < prototype_agreement((logits, features), mixed) - 0.3
    alone = 50.0 * F.one_hot(torch.zeros_like(labels), 3).movedim(-1, 1).float()
    assert float(prototype_agreement((alone, features), same)) == 0  # a single class in common gives no loss


@pytest.mark.parametrize(
    "options",
    [{"agreement": "off"}, {"channel_weight": 0.0}, {"channel_weight": 0.0, "agreement": "voxel"}],
    ids=["channels", "prototype", "voxel"],
)
def test_every_unsupervised_term_trains_the_encoder_and_the_layers_it_reads(options):
    model = network()
    images = {"ct": slices(seed=1), "mri": slices(seed=2)}
    loss = cmc(**options).consistency(model, images, progress=1.0)
    loss.backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().max() > 0}
    assert any(name.startswith("down.0.") for name in moved) and {modality_of(name) for name in moved} >= set(BOTH)
    decoder = any(name.startswith("up.") for name in moved)
    assert decoder == ("channel_weight" in options)


def test_two_views_of_one_modality_train_its_network():
    model = network()
    np.random.seed(0)
    loss = cmc().consistency(model, {"ct": slices()}, progress=1.0)
    loss.backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().max() > 0}
    assert any(name.startswith("up.") for name in moved) and "mri" not in {modality_of(name) for name in moved}


def test_views_may_agree_at_sites_with_two_modalities_too():
    quiet = {"channel_weight": 0.0, "agreement": "off"}
    model, images = network(), {"ct": slices(seed=1), "mri": slices(seed=2)}
    assert cmc(**quiet).consistency(model, images, progress=1.0) == 0
    cmc(**quiet, views="all").consistency(model, images, progress=1.0).backward()
    moved = {name for name, value in model.named_parameters() if value.grad is not None and value.grad.abs().max() > 0}
    assert {modality_of(name) for name in moved} >= set(BOTH) and any(name.startswith("up.") for name in moved)


def test_weights_of_the_terms_follow_the_progress():
    model, images = network(), {"ct": slices(seed=1), "mri": slices(seed=2)}

    def term(progress, **options):
        return float(cmc(**options).consistency(model, images, progress).detach())

    only = {"channel_weight": 0.0}
    assert term(1.0, agreement="off") == pytest.approx(math.exp(5 * 0.09) * term(0.7, agreement="off"), rel=1e-4)
    assert term(1.0, **only) > term(0.7, **only) > 0
    assert term(1.0, **only, agreement_ramp="down") == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("start", [0.0, 0.5])
def test_the_weights_rise_from_almost_nothing_over_the_rest_of_the_run(start):
    model, images = network(), {"ct": slices(seed=1), "mri": slices(seed=2)}
    method = cmc(start=start, agreement="off")
    terms = [float(method.consistency(model, images, progress).detach()) for progress in (start, 0.5 + start / 2, 1.0)]
    assert terms[0] == pytest.approx(math.exp(-5) * terms[2], rel=1e-4) and terms[0] > 0
    assert terms[1] == pytest.approx(math.exp(-5 / 4) * terms[2], rel=1e-4)
    assert CMCOptions(modalities=BOTH).start == 0  # so that the ramp is that of the whole run


@pytest.mark.parametrize("side, width, level", [(32, 4, 2), (32, 8, 2), (128, 16, 3), (32, 32, 1), (64, 8, 2)])
def test_channels_are_described_where_there_are_more_positions_than_channels(side, width, level):
    levels = [torch.zeros(1, width * 2**n, side // 2**n, side // 2**n) for n in range(4)]
    found = described_features(levels)
    assert found is levels[level] and found[0, 0].numel() > found.shape[1]
    assert described_features([torch.zeros(1, 8, 2, 2), torch.zeros(1, 16, 1, 1)]).shape[1] == 8


def test_the_term_of_channels_reads_features_whose_correlations_can_have_full_rank():
    model = ModalityUNet(3, BOTH, 8, depth=4)
    found = cmc().outputs(model, {"ct": slices(seed=1), "mri": slices(seed=2)})
    for _, _, features in found.values():
        assert features.shape == (2, 32, 8, 8)  # the deepest have 64 channels at 16 positions
        rows = features[0].flatten(1)
        assert int(torch.linalg.matrix_rank(rows @ rows.mT)) > 16


@pytest.mark.parametrize("encoder", SHARINGS)
@pytest.mark.parametrize("decoder", SHARINGS)
def test_modalities_share_what_they_are_told_to(encoder, decoder):
    method = cmc(encoder_sharing=encoder, decoder_sharing=decoder, start=1.0)
    site_round = site_round_of(method, site())
    site_round.modalities = {"ct": site()}
    before = copy.deepcopy(site_round.model.state_dict())
    method.train_round(site_round)
    after = site_round.model.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    for parts, sharing in ((("down",), encoder), (("up", "widen", "head"), decoder)):
        names = {name for name in after if name.startswith(parts)}
        own = {name for name in names if modality_of(name)}
        assert {modality_of(name) for name in moved & names} - {None} == ({"ct"} if own else set())
        kinds = {"shared": 0, "norm_specific": sum(".norms." in name for name in names), "separate": len(names)}
        assert len(own) == kinds[sharing]
    assert len([name for name in after if name.startswith("fusion")]) and not any(map(modality_of, (
        name for name in after if name.startswith(("fusion", "conversion", "attention")))))  # fmt: skip


def test_separate_encoders_take_unequal_channels_without_mixtures():
    options = {"modalities": BOTH, "modality_channels": [1, 4], "encoder_sharing": "separate"}
    model = make_method(replace(CONFIG, method="cmc", options=options)).build()
    assert not any(name.startswith("mixtures") for name in model.state_dict())
    for name, channels in zip(BOTH, (1, 4), strict=True):
        assert model(torch.rand(2, channels, 32, 32), name).shape == (2, 3, 32, 32)


def test_the_networks_of_modalities_are_averaged_apart_where_they_are_separate():
    method = cmc(encoder_sharing="separate", decoder_sharing="separate")
    before = method.build().state_dict()
    sent = {n: {name: torch.full_like(value, float(n + 1)) for name, value in before.items()} for n in range(2)}
    site_updates = {
        0: SiteUpdate(10, 1.0, {"modality_slices_ct": 10.0}),
        1: SiteUpdate(30, 1.0, {"modality_slices_mri": 30.0}),
    }
    after, _ = method.aggregate(site_updates, sent.__getitem__, before)
    for name in ("down.0.first.conv.{}.weight", "widen.0.{}.weight", "up.1.second.conv.{}.weight", "head.{}.bias"):
        assert [float(after[name.format(modality)].flatten()[0]) for modality in BOTH] == [1.0, 2.0]
    assert float(after["fusion.0.weight"].flatten()[0]) == 0.25 * 1 + 0.75 * 2


def test_fused_features_are_added_or_mixed():
    torch.manual_seed(0)
    added, mixed = (ModalityUNet(3, BOTH, 4, depth=4, fusion_mode=mode) for mode in ("add", "concat"))
    own, other = torch.randn(2, 32, 4, 4), torch.randn(2, 32, 4, 4)
    fusion = added.fusion(torch.cat([own, other], 1))
    torch.testing.assert_close(added.fused(own, own, other), own + fusion)
    assert {name.split(".")[0] for name in mixed.state_dict()} - {
        name.split(".")[0] for name in added.state_dict()
    } == {"conversion"}


def test_attention_changes_nothing_at_first_and_weighs_channels_later():
    attention, x = ChannelAttention(), torch.randn(2, 4, 3, 3, dtype=torch.float32)
    assert torch.equal(attention(x), x)
    with torch.no_grad():
        attention.gamma.fill_(0.5)
    rows = x.flatten(2).double()
    energy = rows @ rows.mT / 9
    weights = torch.softmax(energy.amax(-1, keepdim=True) - energy, -1)
    expected = (x.flatten(2).double() + 0.5 * weights @ rows).view_as(x)
    torch.testing.assert_close(attention(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_a_prediction_does_not_depend_on_the_slices_beside_it():
    model = network().eval()
    images = slices(4)
    torch.testing.assert_close(model(images, "ct")[:1], model(images[:1], "ct"))
    assert not torch.allclose(model(images, "ct"), model(images, "mri")) or all(
        torch.equal(a, b) for a, b in zip(model.down[0].first.norms["ct"].parameters(),
                                          model.down[0].first.norms["mri"].parameters(), strict=True)
    )  # fmt: skip


def test_one_modality_is_fused_with_itself():
    model, images = network(), slices()
    method = cmc()
    alone = method.outputs(model, {"ct": images})["ct"][0]
    torch.testing.assert_close(alone, model(images, "ct"))
    torch.testing.assert_close(method.segmenter(model, SiteContext(modality="ct"))(images), alone)
    both = method.outputs(model, {"ct": images, "mri": slices(seed=5)})["ct"][0]
    assert not torch.allclose(both, alone)
    with pytest.raises(ValueError, match="must be equal to be fused"):
        method.outputs(model, {"ct": images, "mri": slices(3)})


@pytest.mark.parametrize("held", [("ct",), ("mri",), BOTH])
def test_a_site_trains_with_what_it_has_and_leaves_the_rest_alone(held):
    method = cmc(start=0.0)
    site_round = site_round_of(method, site())
    site_round.modalities = {name: site(seed=n) for n, name in enumerate(held)}
    before = copy.deepcopy(site_round.model.state_dict())
    report = method.train_round(site_round)
    assert report.samples == 12 * len(held) and math.isfinite(report.loss)
    assert report.numbers == {f"modality_slices_{name}": 12.0 for name in held}
    moved = {name for name, value in site_round.model.state_dict().items() if not torch.equal(before[name], value)}
    assert {modality_of(name) for name in moved} - {None} == set(held)


@pytest.mark.parametrize("held", [("ct",), ("mri",), BOTH])
def test_modalities_of_unequal_numbers_of_channels_train_together(held):
    method = make_method(
        replace(CONFIG, method="cmc", options={"modalities": BOTH, "modality_channels": [1, 4], "start": 0.0})
    )
    data = {"ct": site(), "mri": with_channels(site(seed=1), 4)}
    site_round = site_round_of(method, site())
    site_round.modalities = {name: data[name] for name in held}
    before = copy.deepcopy(site_round.model.state_dict())
    report = method.train_round(site_round)
    assert report.samples == 12 * len(held) and math.isfinite(report.loss)
    moved = {name for name, value in site_round.model.state_dict().items() if not torch.equal(before[name], value)}
    assert {modality_of(name) for name in moved} - {None} == set(held)
    assert {name for name in moved if name.startswith("mixtures")} == {f"mixtures.{name}.weight" for name in held}
    for name in held:
        segmenter = method.segmenter(site_round.model, SiteContext(modality=name)).eval()
        assert segmenter(torch.from_numpy(data[name].images[:2])).shape == (2, 3, 32, 32)
    site_round.modalities = {"mri": site()}
    with pytest.raises(NodeDataError, match="channels is 1 in these slices; it must be 4"):
        method.train_round(site_round)


def test_grey_slices_beside_colour_pictures_are_varied_as_grey_ones():
    options = {"modalities": BOTH, "modality_channels": [1, 3], "start": 0.0}
    method = make_method(replace(CONFIG, method="cmc", channels=3, colour=True, first_guess=True, options=options))
    assert not method.augmentation_of(torch.zeros(2, 1, 32, 32)).colour
    assert method.augmentation_of(torch.zeros(2, 3, 32, 32)).colour
    site_round = site_round_of(method, site())
    for modalities in ({"ct": site(), "mri": with_channels(site(), 3)}, {"ct": site()}):
        site_round.modalities = modalities
        assert math.isfinite(method.train_round(site_round).loss)


def test_modalities_of_equal_numbers_of_channels_share_all_convolutions():
    model = make_method(replace(CONFIG, method="cmc", channels=4, options={"modalities": BOTH})).build()
    assert {name.split(".")[-3] for name in model.state_dict() if modality_of(name)} == {"norms"}
    assert model(torch.rand(2, 4, 32, 32), "mri").shape == (2, 3, 32, 32)


def test_unlabelled_slices_are_used_from_the_configured_start_on():
    method = cmc(start=0.5)
    site_round = site_round_of(method, site("none"))
    assert method.train_round(site_round).samples == 0
    site_round.number = 3
    assert method.train_round(site_round).samples == 12


def test_each_modality_is_averaged_over_the_sites_that_have_it():
    method = cmc()
    before = method.build().state_dict()
    sent = {n: {name: torch.full_like(value, float(n + 1)) for name, value in before.items()} for n in range(3)}
    site_updates = {
        0: SiteUpdate(20, 1.0, {"modality_slices_ct": 10.0, "modality_slices_mri": 10.0}),
        1: SiteUpdate(30, 1.0, {"modality_slices_ct": 30.0}),
        2: SiteUpdate(0, math.nan),
    }
    after, shares = method.aggregate(site_updates, sent.__getitem__, before)
    assert shares == {0: 0.4, 1: 0.6, 2: 0.0}
    assert float(after["head.bias"][0]) == pytest.approx(0.4 * 1 + 0.6 * 2)
    assert float(after["down.0.first.norms.ct.weight"][0]) == pytest.approx(0.25 * 1 + 0.75 * 2)
    assert float(after["down.0.first.norms.mri.weight"][0]) == pytest.approx(1.0)
    without = {1: site_updates[1], 2: site_updates[2]}
    after, _ = method.aggregate(without, sent.__getitem__, before)
    name = "down.0.first.norms.mri.weight"
    assert torch.equal(after[name], before[name])  # no site has this modality: its parameters stay as they were


def test_fusion_learns_both_with_and_without_the_other_modality():
    method, model = cmc(unfused_share=0.5), network()
    images = {"ct": slices(seed=1), "mri": slices(seed=2)}
    np.random.seed(0)
    alone = method.outputs(model, {"ct": images["ct"]})["ct"][0]
    found = [torch.allclose(method.outputs(model, images, mix=True)["ct"][0], alone) for _ in range(40)]
    assert 8 < sum(found) < 32


def test_modalities_that_do_not_fit_are_refused():
    site_round = site_round_of(cmc(), site())
    for modalities in ({}, {"pet": site()}, {"ct": site(), "pet": site()}):
        site_round.modalities = modalities
        with pytest.raises(NodeDataError, match="modalities"):
            cmc().train_round(site_round)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"modalities": []}, "modalities is empty; name one or two"),
        ({"modalities": ["a", "b", "c"]}, "one or two different ones"),
        ({"modalities": ["a", "a"]}, "one or two different ones"),
        ({"modalities": ["a/b"]}, "use letters"),
        ({"modality_channels": [1, 9]}, "modality_channels is 9; choose a whole number from 1 to 8"),
        ({"modality_channels": [3]}, "modality_channels has 1 numbers; it must have 2, one for each"),
        ({"descriptor": "cosine"}, "descriptor is 'cosine'; choose one of"),
        ({"agreement": "always"}, "agreement is 'always'; choose one of"),
        ({"start": 2.0}, "from 0 to 1"),
        ({"encoder_sharing": "some"}, "encoder_sharing is 'some'; choose one of shared, norm_specific, separate"),
        ({"decoder_sharing": "some"}, "decoder_sharing is 'some'; choose one of"),
        ({"fusion_mode": "mean"}, "fusion_mode is 'mean'; choose one of concat, add"),
        ({"channel_weight": -1.0}, "channel_weight is -1.0"),
    ],
)
def test_impossible_settings_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        cmc(**options)
