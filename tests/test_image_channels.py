"""The data factory for colour pictures and for several channels; with one channel it is what it was."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from fedfactory.common.weights_file import read_weights, write_weights
from fedfactory.errors import ConfigError, TrainingError, UsageError
from fedfactory.generative import (
    Factory,
    FactoryConfig,
    FactoryTrainer,
    TrainedFactory,
    load_factory,
    make_discriminator,
    make_generator,
)
from fedfactory.generative.adaptive_augmentation import augment
from fedfactory.generative.conditions import jitter
from fedfactory.generative.metrics.alarm import alarms
from fedfactory.generative.metrics.quality import layout_agreement, random_features, site_quality
from fedfactory.generative.metrics.shared_anatomy import shared_anatomy
from fedfactory.generative.networks.palette import PaletteHead, palette_table
from fedfactory.generative.synthesis import slice_heights, subject_heights, synthesise_volume
from fedfactory.generative.trainer import make_optimizers
from helpers import with_head

HEADS = pytest.mark.parametrize("head", ["palette", "image"])
CHANNELS = pytest.mark.parametrize("channels", [3, 4])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def slices(channels, count=4, seed=0):
    return torch.rand(count, channels, 16, 16, generator=rng(seed)) * 2 - 1


def conditions(config, count=4):
    return torch.arange(count) % config.z_bins, torch.arange(count) % len(config.domains)


@pytest.mark.parametrize("channels", [0, 9, "3", 1.0])
def test_an_image_has_one_to_eight_channels(channels):
    with pytest.raises(ConfigError, match="image_channels"):
        FactoryConfig(domains=("a",), image_channels=channels)


def test_the_published_program_knows_one_channel():
    with pytest.raises(ConfigError, match="one channel"):
        FactoryConfig(domains=("a",), image_channels=3, compatibility="published")


def test_a_configuration_of_before_has_one_channel(config):
    old = {name: value for name, value in config.to_dict().items() if name != "image_channels"}
    assert FactoryConfig.from_dict(old).image_channels == 1


@HEADS
@CHANNELS
def test_networks_have_the_channels_of_the_image(config, head, channels):
    torch.manual_seed(0)
    several = replace(with_head(config, head), image_channels=channels, texture=0.1 if head == "palette" else 0.0)
    generator, (z_bin, domain) = make_generator(several), conditions(several)
    noise = generator.draw_noise(4, rng())
    image = generator(torch.randn(4, 8), z_bin, domain, noise=noise)
    assert image.shape == (4, channels, 16, 16)
    assert not torch.allclose(image[:, 0], image[:, 1])
    assert make_discriminator(several)(image, z_bin, domain).shape == (4, 1)


@CHANNELS
def test_every_map_is_painted_in_the_colour_of_its_domain(channels):
    torch.manual_seed(0)
    head = PaletteHead(2, 5, rng(), channels=channels).double()
    with torch.no_grad():
        head.grey.add_(0.1 * torch.randn_like(head.grey))
        head.log_sigma.add_(torch.randn_like(head.log_sigma))
    anatomy = head.anatomy(torch.randn(3, head.num_maps, 6, 7).double())
    w, domain, noise = torch.randn(3, 5).double(), torch.tensor([0, 1, 1]), torch.randn(3, channels, 6, 7).double()
    shade = head.shade(w).reshape(3, channels, head.num_maps)
    expected = torch.einsum("bkhw,bck->bchw", anatomy, head.grey[domain] + 0.1 * shade)
    expected = expected + torch.einsum("bc,bchw->bchw", head.log_sigma[domain].exp(), noise)
    torch.testing.assert_close(head.paint(anatomy, w, domain, noise=noise), expected)


def test_the_grain_differs_from_channel_to_channel(config):
    generator = make_generator(replace(config, image_channels=3))
    (noise,) = generator.draw_noise(2, rng())
    assert noise.shape == (2, 3, 16, 16)
    assert not torch.equal(noise[:, 0], noise[:, 1])


@pytest.mark.parametrize(("domains", "channels"), [(1, 3), (1, 8), (2, 3), (3, 4), (6, 8), (12, 3)])
def test_rows_of_a_palette_start_uncorrelated_also_between_channels(domains, channels):
    table = palette_table(domains, rng(domains), channels=channels)
    assert table.shape[0] == domains * channels
    assert table.shape[1] <= 1 + max(28, 9 * max(domains, channels + 2))
    assert (table[:, 0] == -1).all()
    assert (torch.corrcoef(table[:, 1:]) - torch.eye(len(table))).abs().max() <= 0.2 + 1e-6


def test_one_latent_has_the_same_anatomy_in_the_colours_of_every_domain(config):
    generator = make_generator(replace(config, image_channels=3))
    z, bins, noise = torch.randn(2, 8), torch.tensor([1, 2]), generator.fixed_noise()
    first, second = (generator.synthesise(generator.style_of(z, bins, torch.full((2,), d)), noise) for d in (0, 1))
    torch.testing.assert_close(first.anatomy, second.anatomy)
    assert all(not torch.allclose(first.image[:, c], second.image[:, c]) for c in range(3))


@HEADS
@pytest.mark.parametrize(("channels", "z_bins"), [(3, 1), (4, 4), (1, 1)])
def test_training_moves_both_networks_and_keeps_every_loss_finite(config, head, channels, z_bins):
    torch.manual_seed(0)
    several = replace(
        with_head(config, head), image_channels=channels, z_bins=z_bins, path_weight=1.0, path_every=1, augment=True,
        augment_p=0.5, style_mixing=0.5,
    )  # fmt: skip
    factory = Factory(several)
    trainer = FactoryTrainer(factory, make_optimizers(factory), rng(), ema=copy.deepcopy(factory.generator))
    before = {name: value.clone() for name, value in factory.named_parameters()}
    for number in range(3):
        losses = trainer.train_step(slices(channels, seed=number), *conditions(several))
        values = [v for v in (losses.discriminator, losses.generator, losses.r1, losses.path) if v is not None]
        assert all(map(math.isfinite, values))
    moved = {name for name, value in factory.named_parameters() if not torch.equal(value, before[name])}
    shown = {"palette": "generator.head.grey", "image": "generator.to_rgb1.bias"}[head]
    stem = {"palette": "discriminator.stem.weight", "image": "discriminator.convs.0.0.weight"}[head]
    assert {shown, stem} <= moved
    difference = factory.get_parameter(shown) - before[shown]  # no channel is left behind
    assert (difference.movedim(1, 0).flatten(1).abs().amax(dim=1) > 0).all()


def test_slices_with_other_channels_are_refused_before_they_are_used(config):
    factory = Factory(replace(config, image_channels=3))
    trainer = FactoryTrainer(factory, make_optimizers(factory), rng())
    with pytest.raises(TrainingError, match=r"\(1, 16, 16\), expected \(3, 16, 16\)"):
        trainer.train_step(slices(1), *conditions(config))


def test_augmentation_treats_all_channels_of_a_slice_alike():
    one = slices(1)
    several = augment(one.expand(-1, 3, -1, -1), 0.9, rng())
    for channel in range(3):
        torch.testing.assert_close(several[:, channel], augment(one, 0.9, rng())[:, 0])


def test_pictures_are_mirrored_from_left_to_right_along_their_columns(config):
    real = slices(3, count=40)
    mirrored = jitter(real, replace(config, shift=0, z_bins=1, image_channels=3), rng())
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(2)) for a, b in zip(mirrored, real, strict=True))
    assert not torch.equal(mirrored, real)
    of_volumes = jitter(real, replace(config, shift=0), rng())  # slices of volumes run from left to right along rows
    assert all(torch.equal(a, b) or torch.equal(a, b.flip(1)) for a, b in zip(of_volumes, real, strict=True))


@pytest.fixture(params=["palette", "image"])
def coloured(config, request) -> TrainedFactory:
    torch.manual_seed(0)
    pictures = replace(with_head(config, request.param), image_channels=3, z_bins=1)
    generator = make_generator(pictures).eval()
    return TrainedFactory(
        generator=generator,
        latest=generator.state_dict(),
        spacing=6.0,
        height=0.0,
        discriminator=make_discriminator(pictures).eval(),
    )


def test_a_factory_of_colour_pictures_comes_back_equal(coloured, tmp_path):
    coloured.save(tmp_path / "f.safetensors")
    loaded = load_factory(tmp_path / "f.safetensors")
    assert loaded.config == coloured.config
    z = torch.randn(5, 8)
    shown = coloured.generate(z, "dark", 0, seed=1)
    assert shown.shape == (5, 3, 16, 16)
    assert torch.equal(loaded.generate(z, "dark", 0, seed=1), shown)
    assert torch.equal(loaded.discriminate(shown, "dark", 0), coloured.discriminate(shown, "dark", 0))
    with pytest.raises(UsageError, match=r"expected \(B, 3, 16, 16\)"):
        loaded.discriminate(shown[:, :1], "dark", 0)


def test_a_picture_is_a_volume_of_one_slice(coloured):
    heights = subject_heights(coloured.config, 10)
    assert heights.tolist() == [0.0]
    (made,) = synthesise_volume(coloured.generator, heights, domain=1, rng=rng(), truncation=0.7)
    assert made.image.shape == (1, 3, 16, 16)
    volumes = replace(coloured.config, z_bins=4)
    assert torch.equal(subject_heights(volumes, 10), slice_heights(4, 10))


def test_the_metrics_take_colour_pictures(coloured):
    real, z_bin = slices(3, count=30), torch.zeros(30, dtype=torch.long)
    quality = site_quality(coloured.generator, real, z_bin, domain=1)
    assert math.isfinite(quality.distance)
    assert quality.contrast > 0
    assert math.isnan(quality.layout)  # noise: nothing lies in the same place in two pictures
    assert not any("elsewhere" in alarm for alarm in alarms("dark", quality, None))
    same = slices(3, count=1).expand(30, -1, -1, -1)
    assert math.isfinite(site_quality(coloured.generator, same, z_bin, domain=1).layout)
    (score,) = shared_anatomy(coloured.generator).values()
    assert score <= 1


def test_features_and_layout_see_a_change_of_one_channel():
    images, z_bin = slices(3, count=12), torch.arange(12) % 4
    turned = torch.cat([images[:, :2], -images[:, 2:]], dim=1)
    assert layout_agreement(images, z_bin, synthetic=turned, synthetic_bin=z_bin) == pytest.approx(1 / 3)
    assert not torch.allclose(random_features(images), random_features(turned))
    assert random_features(images).shape == (12, 352)


def test_different_means_of_the_channels_are_no_agreement():
    """A reddish and another reddish picture; over all channels together the correlation is about 1."""
    means, z_bin = torch.tensor([0.8, -0.2, -0.7])[:, None, None], torch.zeros(8, dtype=torch.long)
    first, second = (0.1 * slices(3, count=8, seed=seed) + means for seed in (0, 1))
    assert abs(layout_agreement(first, z_bin, synthetic=second, synthetic_bin=z_bin)) < 0.3


def test_one_channel_has_the_names_shapes_and_random_numbers_of_before(config):
    """The numbers were computed before images had channels."""
    torch.manual_seed(0)
    factory = Factory(config)
    shapes = {name: tuple(value.shape) for name, value in factory.state_dict().items()}
    expected = {
        "generator.head.grey": (2, 10),
        "generator.head.log_sigma": (2,),
        "generator.head.shade.weight": (10, 8),
        "discriminator.stem.weight": (8, 1, 1, 1),
    }
    assert expected.items() <= shapes.items()
    assert len(shapes) == 51
    z_bin, domain = conditions(config)
    noise = factory.generator.draw_noise(4, rng(3))
    z = torch.randn(4, 8, generator=rng(4))
    image = factory.generator(z, z_bin, domain, noise=noise)
    torch.testing.assert_close(
        image[:, 0, 7, 7], torch.tensor([-0.2414, 0.58709, -0.32286, 0.13953]), atol=1e-4, rtol=0
    )
    score = factory.discriminator(image, z_bin, domain)
    torch.testing.assert_close(score[:, 0], torch.tensor([0.1979, 0.04664, -0.20151, -0.05352]), atol=1e-3, rtol=0)
    published = make_generator(with_head(config, "image"))
    assert published.to_rgb1.bias.shape == (1, 1, 1, 1)
    assert published.to_rgb1.conv.weight.shape == (1, 8, 1, 1)


def test_a_file_of_before_loads_without_the_setting(trained, tmp_path):
    trained.save(tmp_path / "new.safetensors")
    tensors, card = read_weights(tmp_path / "new.safetensors", kind="factory")
    assert card["config"].pop("image_channels") == 1
    write_weights(tmp_path / "old.safetensors", tensors, json.loads(json.dumps(card)))
    assert load_factory(tmp_path / "old.safetensors").config == trained.config
