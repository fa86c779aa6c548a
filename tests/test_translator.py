"""The translator: shapes and parameter counts of the publication, and which parts each loss trains."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.adaptation.networks.translator_network import SOURCE, TARGET, EncoderConfig, Translator
from fedfactory.adaptation.training.translator_training import Batch, TranslatorConfig, TranslatorLosses
from fedfactory.errors import ConfigError
from fedfactory.generative import FactoryConfig, make_generator
from fedfactory.generative.networks.generator import Synthesis
from monai.losses import SSIMLoss

SMALL = EncoderConfig(width=4, blocks=(1, 1, 1, 1))


def published(**changes) -> FactoryConfig:
    return FactoryConfig.preset("paper", ("a", "b", "c"), **changes)


def translator(head="image", size=32, seed=0, channels=1) -> Translator:
    start = 4 if head == "image" else 8
    config = FactoryConfig(
        domains=("a", "b", "c"),
        image_size=size,
        image_channels=channels,
        z_bins=4,
        head=head,
        start_size=start,
        channels=(8,) * (size.bit_length() - start.bit_length() + 1),
        latent_dim=8,
    )
    torch.manual_seed(seed)
    made = Translator(make_generator(config), 3, (0, 1), config=SMALL)
    made.compute_mean_codes()
    made.phi.fill_(0.5)
    return made


def count(*modules) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_at_the_published_size_every_part_has_the_published_number_of_parameters():
    with torch.device("meta"):
        made = Translator(make_generator(published()), 3, (0, 1), config=EncoderConfig())
    encoder = made.encoder
    assert count(encoder.stem, encoder.stem_norm, encoder.stem_prelu, encoder.stages) == 30_778_176
    assert count(encoder.content) == 11_963_904
    assert count(encoder.codes) == 70_787_072
    assert count(encoder.role_embedding) == 12_288
    assert count(encoder.gates) == 37_753_856
    assert count(encoder) == 151_295_296
    assert count(made.heads[SOURCE]) == count(made.heads[TARGET]) == 776_643
    assert count(made.generator) == 30_591_095
    assert encoder.content_sides == [128, 64, 32, 16]


def test_the_published_branch_reads_the_constant_and_every_styled_layer():
    with torch.device("meta"):
        widths = make_generator(published()).feature_channels
    assert widths == (512,) * 10 + (256, 256, 128, 128, 64, 64)


@pytest.mark.parametrize(
    ("size", "shrink", "served"),
    [(128, 2, [32, 16, 8, 4]), (64, 2, [16, 8, 4]), (32, 2, [8, 4]), (64, 1, [32, 16, 8, 4]), (32, 1, [16, 8, 4])],
)
def test_smaller_factories_get_content_at_the_resolutions_they_have(size, shrink, served):
    channels = (8,) * (size.bit_length() - 2)
    config = published(image_size=size, channels=channels, latent_dim=8, encoding_dim=0)
    encoder = EncoderConfig(width=4, blocks=(1, 1, 1, 1), shrink=shrink)
    made = Translator(make_generator(config), 3, (0, 1), config=encoder).eval()
    assert made.encoder.content_sides == served
    assert made(torch.zeros(2, 1, size, size)).shape == (2, 3, size, size)


def test_without_content_and_masks_it_is_the_plain_synthesis_of_the_codes():
    made = translator().eval()
    made.phi.zero_()
    for gate in made.encoder.gates:  # no gate lets anything through
        torch.nn.init.zeros_(gate.mask.weight)
        torch.nn.init.constant_(gate.mask.bias, -1.0)
    x, role = torch.randn(3, 1, 16, 16), torch.tensor([0, 1, 0])
    codes = made.encoder(x, role).codes + made.mean_codes[role][:, None]
    from fedfactory.generative.networks.generator import Style

    style = Style(codes, made.constant.expand(3, -1, -1, -1), role)
    expected = made.generator.synthesise(style, made.generator.fixed_noise()).image
    torch.testing.assert_close(made.decode(x, role).image, expected)


def test_an_insertion_changes_no_map_of_its_own_or_a_coarser_resolution():
    made = translator().eval()
    x, role = torch.randn(2, 1, 16, 16), torch.tensor([0, 1])
    before = made.decode(x, role)
    made.phi.fill_(1.0)
    after = made.decode(x, role)
    lowest = min(made.encoder.content_sides)
    for features, changed in zip(before.features, after.features, strict=True):
        assert torch.equal(features, changed) == (features.shape[-1] <= lowest)


def test_a_slice_is_read_alike_in_any_batch_and_any_order():
    made = translator().eval()
    images = torch.randn(4, 1, 32, 32)
    together = made(images)
    torch.testing.assert_close(together[2:3], made(images[2:3]), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(together.flip(0), made(images.flip(0)), atol=1e-4, rtol=1e-4)


def test_the_published_mean_latent_is_that_of_the_middle_heights_in_each_domain():
    made = translator()
    generator, rng = made.generator, torch.Generator().manual_seed(5)
    z = torch.randn(20_000, 8, generator=rng)
    for role, domain in enumerate(made.domains):
        ws = [generator.style_of(z, torch.full((len(z),), b), torch.full((len(z),), domain)).w[:, 0] for b in (1, 2, 3)]
        torch.testing.assert_close(made.mean_codes[role], torch.stack(ws).mean((0, 1)), atol=0.03, rtol=0)
    assert not torch.allclose(made.mean_codes[0], made.mean_codes[1])


def routes(made, loss) -> set[str]:
    """Names of the parts that a loss would change."""
    parts = {"encoder": made.encoder, "source head": made.heads[SOURCE], "target head": made.heads[TARGET]}
    parameters = {name: [p for p in part.parameters() if p.requires_grad] for name, part in parts.items()}
    found = set()
    for name, own in parameters.items():
        gradients = torch.autograd.grad(loss, own, allow_unused=True, retain_graph=True) if own else ()
        if any(g is not None and bool(g.abs().max() > 0) for g in gradients):
            found.add(name)
    return found


@pytest.mark.parametrize("head", ["image", "palette"])
def test_every_loss_trains_the_parts_that_the_publication_names(head):
    """Table 4.2 of the method: G and the source head are frozen, the target head must not bend the encoder."""
    made = translator(head).train()
    made.heads[SOURCE].requires_grad_(False)
    losses = TranslatorLosses(made, TranslatorConfig(encoder=SMALL))
    images = torch.rand(6, 1, 32, 32) * 2 - 1

    def step(kind, labelled):
        batch = Batch(
            images=images, labels=torch.randint(0, 3, (3 + labelled, 1, 32, 32)).float(), sources=3, labelled=labelled
        )
        return {name: routes(made, loss) for name, loss in getattr(losses, kind)(batch).items()}

    unsupervised = {"reconstruction": {"encoder"}, "source labels": {"encoder"}}
    assert step("intra", 0) == unsupervised
    assert step("intra", 2) == {**unsupervised, "target labels": {"target head"}}
    translated = {
        "translated labels": {"target head"},
        "cycle": {"encoder"},
        "labels after the cycle": {"encoder"},
    }
    assert step("inter", 0) == translated
    assert step("inter", 2) == {
        **translated,
        "target labels in the source role": {"encoder"},
        "target labels after the cycle": {"encoder", "target head"},
    }
    assert not any(parameter.requires_grad for parameter in made.generator.parameters())


def test_pretraining_trains_the_source_head_too():
    made = translator().train()
    losses = TranslatorLosses(made, TranslatorConfig(encoder=SMALL))
    batch = Batch(
        images=torch.rand(2, 1, 32, 32), labels=torch.randint(0, 3, (2, 1, 32, 32)).float(), sources=2, labelled=0
    )
    assert routes(made, losses.intra(batch)["source labels"]) == {"encoder", "source head"}


def test_image_and_mask_loss_equal_their_formulas():
    made = translator().eval()
    config = TranslatorConfig(encoder=SMALL, l2_weight=2.0, ssim_weight=0.0, mask_weight=1 / 3)
    losses = TranslatorLosses(made, config)
    images = torch.rand(2, 1, 32, 32)
    labels = torch.randint(0, 3, (2, 1, 32, 32))
    torch.manual_seed(3)
    got = losses.intra(Batch(images=images, labels=labels.float(), sources=2, labelled=0))
    torch.manual_seed(3)
    shown = made.decode(F.avg_pool2d(images, 2), torch.zeros(2, dtype=torch.long), losses._noise(2))
    expected = 2 * (F.avg_pool2d(shown.image, 2) - F.avg_pool2d(images, 2)).square().mean()
    torch.testing.assert_close(got["reconstruction"], expected)
    # The published numbers: cross entropy and Dice, each divided by the number of classes.
    p = torch.softmax(made.heads[SOURCE](shown).double(), 1)
    y = F.one_hot(labels[:, 0], 3).permute(0, 3, 1, 2).double()
    entropy = -(y * p.log()).sum(1).mean()
    both, total = (p * y).sum((0, 2, 3)), (p + y).sum((0, 2, 3))
    dice = ((2 * both + 1e-5) / (total + 1e-5)).mean()
    torch.testing.assert_close(got["source labels"].double(), (entropy + 1 - dice) / 3, atol=1e-5, rtol=1e-5)


def test_training_leaves_a_frozen_head_and_the_generator_as_they_are():
    made = translator()
    made.heads[SOURCE].requires_grad_(False)
    kept = {name: tensor.clone() for name, tensor in made.state_dict().items() if name.startswith(("gen", "heads.0"))}
    made.train()
    made.heads[SOURCE](made.decode(torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.long)))
    assert all(torch.equal(made.state_dict()[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize(
    "make",
    [
        lambda: EncoderConfig(width=0),
        lambda: EncoderConfig(blocks=(1, 2)),
        lambda: EncoderConfig(shrink=4),
        lambda: TranslatorConfig(updates=1),
        lambda: TranslatorConfig(ramp=0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(ConfigError):
        make()


def test_branches_have_the_published_layout():
    branch = LabelBranch((4, 4), 3)
    assert [tuple(layer.weight.shape[:2]) for layer in branch.project] == [(128, 4), (128, 4)]
    assert np.prod(branch.classify[-1].weight.shape) == 32 * 3


@pytest.mark.parametrize(("channels", "side"), [(1, 16), (3, 16), (4, 8)])
def test_the_structural_similarity_equals_monais(channels, side):
    """With MONAI's defaults: a Gaussian window of deviation 1.5, 11 pixels or fewer in small images, numbers 0 to 1."""
    made = translator(size=2 * side, channels=channels)
    losses = TranslatorLosses(made, TranslatorConfig(encoder=SMALL, l2_weight=0.0))
    images = torch.rand(2, channels, side, side)
    shown = Synthesis(torch.rand(2, channels, 2 * side, 2 * side), torch.zeros(2, 0, 1, 1), [])
    expected = SSIMLoss(spatial_dims=2, data_range=1.0, win_size=min(11, side - 1))
    decoded = F.avg_pool2d(shown.image, 2)
    torch.testing.assert_close(
        losses._image_loss(images, shown), expected((decoded + 1) / 2, (images + 1) / 2), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("head", ["image", "palette"])
def test_pictures_in_colour_are_translated_too(head):
    made = translator(head, channels=3).train()
    losses = TranslatorLosses(made, TranslatorConfig(encoder=SMALL))
    batch = Batch(
        images=torch.rand(4, 3, 32, 32) * 2 - 1,
        labels=torch.randint(0, 3, (3, 1, 32, 32)).float(),
        sources=2,
        labelled=1,
    )
    for found in (losses.intra(batch), losses.inter(batch)):
        assert all(bool(value.isfinite()) for value in found.values())
    made.eval()
    with torch.no_grad():
        assert made(batch.images).shape == (4, 3, 32, 32)
        assert made.decode(made.downsampled(batch.images), batch.roles).image.shape == (4, 3, 32, 32)
