"""Networks of the federated methods: as deep as their slices need, of the sizes that sites name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fedfactory.adaptation.engine.training_plan import halvable_levels
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteContext
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.network_names import ARCHITECTURES, NETWORK_SIZES, SITE_NETWORKS, parts_of_site_network
from fedfactory.adaptation.networks.assessed_network import AssessedNetwork
from fedfactory.adaptation.networks.site_network import NORMS, SiteUNet
from fedfactory.errors import ConfigError
from helpers import CONFIG, SMALL, method_of
from monai.networks.nets import BasicUNet


def weights_of(network) -> int:
    return sum(value.numel() for value in network.parameters())


@pytest.mark.parametrize("norm", NORMS)
def test_with_five_levels_the_network_is_monais(norm):
    torch.manual_seed(0)
    ours = SiteUNet(3, channels=2, width=4, depth=5, norm=norm, dropout=0.1).eval()
    torch.manual_seed(0)
    widths = (4, 8, 16, 32, 64, 4)
    theirs = BasicUNet(2, 2, 3, widths, norm=NORMS[norm], dropout=0.1, upsample="nontrainable").eval()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
    x = torch.randn(2, 2, 32, 32)
    assert torch.equal(ours(x), theirs(x))


def test_a_folded_network_is_one_whose_pixels_became_channels():
    torch.manual_seed(0)
    folded = SiteUNet(3, channels=2, width=4, depth=3, fold=2, norm="instance", embedding=4).eval()
    plain = SiteUNet(12, channels=8, width=4, depth=3, norm="instance").eval()
    plain.load_state_dict({n: v for n, v in folded.state_dict().items() if n in plain.state_dict()})
    x = torch.randn(2, 2, 32, 32)
    assert torch.equal(folded(x), F.pixel_shuffle(plain(F.pixel_unshuffle(x, 2)), 2))
    assert all(e.shape == (2, 3, 32, 32) for e in folded.embeddings(folded.decode(folded.encode(x).features)))


def test_settings_of_an_earlier_version_describe_its_networks():
    now = replace(CONFIG, size=64)
    assert (now.pixel_fold, now.levels) == (2, 4)
    assert MethodConfig.from_dict(now.to_dict()) == now
    before = {name: value for name, value in now.to_dict().items() if name != "fold"}
    assert (MethodConfig.from_dict(before).pixel_fold, MethodConfig.from_dict(before).levels) == (1, 5)


def test_normalisation_layers_of_every_kind_stay_at_a_site_with_fedbn():
    for norm in NORMS:
        method = method_of("fedbn", norm=norm)
        names = method.local_parameters(method.build())
        assert "conv_0.conv_0.adn.N.weight" in names and "final_conv.weight" not in names


@pytest.mark.parametrize("depth", [3, 4, 6])
def test_other_depths_have_as_many_levels_and_no_level_is_wider_than_sixteen_times_the_first(depth):
    network = SiteUNet(3, width=4, depth=depth, norm="group", embedding=4).eval()
    features = network.encode(torch.randn(1, 1, 64, 64)).features
    assert [tuple(level.shape[1:]) for level in features] == [
        (min(4 * 2**n, 64), 64 // 2**n, 64 // 2**n) for n in range(depth)
    ]
    decoded = network.decode(features)
    assert [level.shape[-1] for level in decoded] == [16, 32, 64]
    assert all(output.shape == (1, 3, 64, 64) for output in network.embeddings(decoded))
    assert network.final_conv(decoded[-1]).shape == (1, 3, 64, 64)


@pytest.mark.parametrize(("size", "levels"), [(32, 4), (48, 4), (64, 4), (96, 4), (112, 4), (128, 5), (512, 6)])
def test_networks_are_as_deep_as_the_slices_can_be_halved_to_four_pixels(size, levels):
    config = replace(CONFIG, size=size)
    folded = size // config.pixel_fold
    assert halvable_levels(folded) == levels == config.levels and folded == (size // 2 if size >= 64 else size)
    side = folded // 2 ** (levels - 1)
    assert folded % 2 ** (levels - 1) == 0
    assert side < 8 or levels == 6  # one level more would have fewer than four pixels, or be the seventh
    assert replace(CONFIG, size=size, depth=3).levels == 3


@pytest.mark.parametrize("size", [32, 96, 112, 128])
@pytest.mark.parametrize("name", ["fedavg", "fedicra", "fedmix", "gaze", "lssl", "cmc"])
def test_every_methods_network_runs_at_the_size_of_its_slices(name, size):
    method = method_of(name, size=size)
    segmenter = method.segmenter(method.build(), SiteContext(modality="ct")).eval()
    with torch.no_grad():
        logits = segmenter(torch.rand(1, 1, size, size))
    assert logits.shape == (1, 3, size, size) and bool(logits.isfinite().all())


def test_the_depth_that_is_asked_for_reaches_every_network():
    for name in ("local", "fedavg", "fedprox", "fedbn", "fedicra"):
        assert method_of(name, depth=3).build().depth == 3 and method_of(name).build().depth == 4
    assert [network.depth for network in method_of("gaze", depth=3).build().networks()] == [3, 3]
    pair = method_of("fedmix", depth=3).build()
    assert (pair.first.depth, pair.second.depth) == (3, 3)
    assert len(method_of("cmc", depth=3).build().down) == 3 and len(method_of("cmc").build().down) == 4
    for name in ("hssf", "lssl"):
        for depth in (3, 4):
            assert len(method_of(name, size=64, depth=depth).fresh_network("unet").body.body.channels) == depth


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 48, "depth": 6}, "depth is 6; slices of 48 px cannot be halved so often"),
        ({"size": 112, "depth": 6}, "depth is 6; slices of 112 px as squares of 2 px cannot be halved so often"),
        ({"size": 64, "depth": 6}, "depth is 6; slices of 64 px as squares of 2 px cannot be halved so often"),
        ({"fold": 0}, "fold is 0; it must be at least 1"),
        ({"size": 48, "fold": 5}, "fold is 5; choose a divisor of 48, the pixels per side"),
        ({"depth": 2}, "depth is 2; it must be at least 3"),
        ({"method": "fedicra", "depth": 3, "options": {"selections": 4}}, "selections is 4; the network has 3 levels"),
        ({"method": "fedicra", "options": {"selections": 7}}, "selections is 7; the network has 4 levels"),
    ],
)
def test_a_depth_that_the_slices_cannot_have_is_refused(settings, message):
    with pytest.raises(ConfigError) as refused:
        make_method(replace(CONFIG, **settings))
    assert str(refused.value) == message


def test_a_depth_that_folded_slices_cannot_have_is_refused_by_networks_of_the_engine():
    method = make_method(MethodConfig(**{**CONFIG.to_dict(), "method": "hssf", "size": 96, "depth": 6}))
    with pytest.raises(ConfigError) as refused:  # pixels of 96 px are folded by two first
        method.fresh_network("unet")
    assert str(refused.value) == "depth is 6; slices of 96 px cannot be halved so often in unet"


# Networks that a site chooses


def test_a_networks_name_has_an_architecture_and_perhaps_a_size():
    assert [parts_of_site_network(name) for name in ("unet", "segresnet-large")] == [
        ("unet", None),
        ("segresnet", "large"),
    ]
    assert len(SITE_NETWORKS) == len(set(SITE_NETWORKS)) == len(ARCHITECTURES) * (1 + len(NETWORK_SIZES))
    for wrong in ("resnet", "unet-", "unet-huge", "large", "-large", "unet-large-large", ""):
        with pytest.raises(ConfigError) as refused:
            parts_of_site_network(wrong)
        message = str(refused.value)
        assert message.startswith(f"network is '{wrong}'; choose one of unet, dynunet, segresnet, or one of them with")
        assert "small, standard, large" in message and "\n" not in message


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_networks_grow_with_the_size_in_their_names(architecture):
    sizes = [weights_of(AssessedNetwork(f"{architecture}-{size}", 3, size=32)) for size in NETWORK_SIZES]
    assert sizes[0] < sizes[1] < sizes[2] and sizes[2] > 3 * sizes[0]


def test_the_width_that_is_asked_for_reaches_networks_without_a_size_alone():
    narrow, wide = (method_of("hssf", width=width) for width in (8, 16))

    def first_width(method, architecture: str) -> int:
        """Channels that the first convolution gives out."""
        layers = method.fresh_network(architecture).body.modules()
        return next(layer.out_channels for layer in layers if isinstance(layer, torch.nn.Conv2d))

    for architecture in ARCHITECTURES:
        assert (first_width(narrow, architecture), first_width(wide, architecture)) == (8, 16)
        named = [weights_of(method.fresh_network(f"{architecture}-large")) for method in (narrow, wide)]
        assert named[0] == named[1] > weights_of(wide.fresh_network(architecture))
    # SegResNet normalises groups of eight channels.
    assert first_width(method_of("hssf", width=4), "segresnet") == 8


def test_the_researchers_network_may_have_a_size():
    for name in ("dynunet", "dynunet-small", "segresnet-large"):
        method = make_method(replace(CONFIG, method="hssf", options={**SMALL["hssf"], "network": name}))
        expected = weights_of(AssessedNetwork(name, 3, size=32, width=CONFIG.width))
        assert weights_of(method.fresh_network("")) == expected
