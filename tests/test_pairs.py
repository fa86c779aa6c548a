"""Labels that are drawn with the image: soft labels, what the discriminator is shown of them, and the training."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from fedfactory.errors import ConfigError, TrainingError
from fedfactory.generative import Factory, FactoryConfig, FactoryTrainer, make_discriminator, make_generator
from fedfactory.generative.adaptive_augmentation import augment
from fedfactory.generative.conditions import Conditions, jitter
from fedfactory.generative.losses import discriminator_logistic, generator_non_saturating, r1_penalty
from fedfactory.generative.networks.palette import grouped_by_class, palette_table
from fedfactory.generative.pairs import as_channels, label_channels, shown_labels
from fedfactory.generative.trainer import make_optimizers
from fedfactory.generative.turning import turned
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def paired(config) -> FactoryConfig:
    """The small factory that draws three classes."""
    return replace(config, classes=3)


def batch(size=4, classes=3, side=16):
    rng = torch.Generator().manual_seed(3)
    real = torch.rand(size, 1, side, side, generator=rng) * 2 - 1
    labels = torch.randint(classes, (size, side, side), generator=rng)
    return real, torch.arange(size) % 4, torch.zeros(size, dtype=torch.long), labels


def make_trainer(config, seed=0):
    torch.manual_seed(seed)
    factory = Factory(config)
    return FactoryTrainer(factory, make_optimizers(factory), torch.Generator().manual_seed(seed))


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


@pytest.mark.parametrize(
    "changes",
    [
        {"classes": 1},
        {"classes": 256},
        {"classes": 3, "discriminator": "shared"},
        {"classes": 3, "head": "image", "start_size": 4, "channels": (8, 8, 8)},
    ],
)
def test_impossible_numbers_of_classes_are_refused_with_the_reason(config, changes):
    with pytest.raises(ConfigError, match=r"classes is \d+"):
        replace(config, **changes)


def test_without_classes_a_step_is_the_published_algorithm_and_nothing_else(config):
    """Every draw and every update written out: labels must not have changed a factory of images alone."""
    trainer = make_trainer(config)
    factory = copy.deepcopy(trainer.factory)
    optimizers = make_optimizers(factory)
    rng = torch.Generator().manual_seed(0)
    real, z_bin, domain, _ = batch()
    for number in range(3):
        trainer.train_step(real, z_bin, domain)
        moved = jitter(real, config, rng)
        z = torch.randn(4, config.latent_dim, generator=rng)
        fake = factory.generator(z, z_bin, domain, noise=factory.generator.draw_noise(4, rng))
        optimizers["discriminator"].zero_grad()
        scores = [factory.discriminator(images, z_bin, domain) for images in (moved, fake.detach())]
        discriminator_logistic(*scores).backward()
        if number % config.r1_every == 0:
            at = moved.clone().requires_grad_(True)
            slope = r1_penalty(factory.discriminator(at, z_bin, domain), at).mean()
            (config.r1_gamma / 2 * config.r1_every * slope).backward()
        optimizers["discriminator"].step()
        optimizers["generator"].zero_grad()
        generator_non_saturating(factory.discriminator(fake, z_bin, domain)).backward()
        optimizers["generator"].step()
    torch.testing.assert_close(weights(trainer.factory.generator), weights(factory.generator))
    torch.testing.assert_close(weights(trainer.factory.discriminator), weights(factory.discriminator))
    assert torch.equal(trainer.rng.get_state(), rng.get_state())


@pytest.mark.parametrize(("domains", "classes"), [(1, 4), (2, 3), (3, 4), (3, 20), (5, 6)])
def test_every_class_has_maps_and_background_most_of_them(domains, classes):
    table = palette_table(domains, torch.Generator().manual_seed(0))
    grouped, each = grouped_by_class(table, classes)
    background = grouped.shape[1] - each * (classes - 1)
    assert each >= 1
    assert background > each * (classes - 1)
    assert torch.equal(grouped[:, 0], table[:, 0])  # the map of air
    expected = torch.cat([table[:, :1], table[:, 1:].repeat(1, (grouped.shape[1] - 1) // (table.shape[1] - 1))], dim=1)
    assert sorted(map(tuple, grouped.t().tolist())) == sorted(map(tuple, expected.t().tolist()))  # none lost


def test_three_domains_and_structures_begin_with_all_grey_levels_in_the_first_structure():
    grouped, each = grouped_by_class(palette_table(3, torch.Generator()), 4)
    assert each == 3
    assert all(set(row.tolist()) == {-1.0, 0.0, 1.0} for row in grouped[:, -9:-6])


def test_soft_labels_sum_to_one_and_are_the_sums_of_their_maps(paired):
    torch.manual_seed(0)
    generator = make_generator(paired)
    z, z_bin = torch.randn(2, paired.latent_dim), torch.tensor([0, 3])
    made = generator.synthesise(generator.style_of(z, z_bin, torch.zeros(2, dtype=torch.long)), generator.fixed_noise())
    assert made.labels.shape == (2, 3, 16, 16)
    torch.testing.assert_close(made.labels.sum(dim=1), torch.ones(2, 16, 16))
    each = generator.head.maps_each
    torch.testing.assert_close(made.labels[:, 2], made.anatomy[:, -each:].sum(dim=1))
    torch.testing.assert_close(made.labels[:, 1], made.anatomy[:, -2 * each : -each].sum(dim=1))
    assert made.labels[:, 0].mean() > 0.5  # structures are small at first
    assert torch.equal(made.first(1).labels, made.labels[:1])


def test_labels_of_one_latent_are_equal_in_all_domains(paired):
    torch.manual_seed(0)
    generator = make_generator(paired)
    z, z_bin = torch.randn(2, paired.latent_dim), torch.tensor([1, 2])
    drawn = [
        generator.synthesise(generator.style_of(z, z_bin, torch.full((2,), domain)), generator.fixed_noise())
        for domain in range(2)
    ]
    assert torch.equal(drawn[0].labels, drawn[1].labels)
    assert not torch.allclose(drawn[0].image, drawn[1].image)


def test_real_labels_are_softened_over_known_pixels_alone():
    labels = torch.full((1, 7, 7), 255)
    labels[0, 3, 1:6] = 1  # a scribble: its labels are certain, however thin it is
    channels, known = label_channels(labels, classes=3, like=torch.zeros(1, 1, 7, 7))
    assert known.sum() == 5
    assert channels[0, :, 3, 1:6].tolist() == [[1.0] * 5, [-1.0] * 5]
    assert channels[:, :, known[0, 0] == 0].abs().max() == 0
    dense = torch.zeros(1, 7, 7, dtype=torch.long)
    dense[..., 4:] = 2
    channels, known = label_channels(dense, classes=3, like=torch.zeros(1, 1, 7, 7))
    edge = 2 * torch.tensor([0.0, 0.1065, 0.8935, 1.0]) - 1  # a step under a Gaussian of half a pixel
    torch.testing.assert_close(channels[0, 1, 3, 2:6], edge, atol=1e-4, rtol=0)
    gaussian = torch.exp(-2 * torch.arange(-1.0, 2) ** 2)
    assert (gaussian / gaussian.sum())[0].item() == pytest.approx(0.1065, abs=2e-4)


def test_labels_of_another_shape_or_value_are_refused():
    like = torch.zeros(1, 1, 4, 4)
    with pytest.raises(TrainingError, match="shape"):
        label_channels(torch.zeros(1, 5, 4), classes=3, like=like)
    with pytest.raises(TrainingError, match="go up to 3"):
        label_channels(torch.full((1, 4, 4), 3), classes=3, like=like)


def test_a_factory_of_images_alone_refuses_labels(config):
    with pytest.raises(TrainingError, match="classes is 0"):
        make_trainer(config).train_step(*batch())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_no_gradient_and_no_information_comes_from_unknown_pixels(seed, share):
    rng = torch.Generator().manual_seed(seed)
    known = (torch.rand(2, 1, 8, 8, generator=rng) < share).float()
    drawn = torch.randn(2, 2, 8, 8, generator=rng, requires_grad=True)
    shown = shown_labels(drawn, known, rng)
    (slope,) = torch.autograd.grad(shown.pow(2).sum(), drawn)
    unknown = (known == 0).expand_as(drawn)
    assert (shown[unknown] == 0).all()
    assert (slope[unknown] == 0).all()
    assert (slope[~unknown] != 0).all()


def test_a_site_without_labels_gives_the_drawn_labels_no_gradient(paired):
    trainer = make_trainer(paired)
    real, z_bin, domain, labels = batch()
    for shown, moves in ((None, False), (torch.full_like(labels, 255), False), (labels, True)):
        pair, known = trainer._jittered(real, shown)
        conditions = Conditions(z_bin, domain, None, known)
        fake = trainer.generate(conditions)
        fake.retain_grad()
        trainer._backward_adversarial(fake, conditions, share=1.0)
        assert pair.shape == fake.shape == (4, 3, 16, 16)
        assert (fake.grad[:, 1:] != 0).any() == moves
        assert (fake.grad[:, 0] != 0).any()


def test_image_and_labels_move_together():
    """A label-shaped image: whatever is drawn, both must stay equal."""
    shape = torch.zeros(64, 1, 32, 32)
    shape[:, :, 8:20, 10:14] = 1
    both = shape.expand(-1, 2, -1, -1).contiguous()
    config = FactoryConfig(domains=("a",), shift=3)
    rng = torch.Generator().manual_seed(0)
    for moved in (jitter(both, config, rng), turned(both, 0.9, rng)):
        assert torch.equal(moved[:, 0], moved[:, 1])
        assert not torch.equal(moved, both)
    image, labels = augment(both, 0.8, rng, label_channels=1).unbind(dim=1)
    turned_alike = [
        torch.corrcoef(torch.stack([i.flatten(), k.flatten()]))[0, 1].abs() for i, k in zip(image, labels, strict=True)
    ]
    assert min(turned_alike) > 0.999  # intensities change in the image alone, by one gain and one shift
    assert not torch.allclose(image, labels)
    assert -0.5 < labels.min() < labels.max() < 1.5  # overshoot of the filter; an intensity of the image may be negated


def test_turns_have_the_share_and_the_size_that_they_state():
    x, y = torch.meshgrid(torch.linspace(-1, 1, 33), torch.linspace(-1, 1, 33), indexing="xy")
    disc = ((x - 0.4) ** 2 + y**2 < 0.15**2).float()[None, None].expand(2000, 1, 33, 33)
    moved = turned(disc, 0.75, torch.Generator().manual_seed(0))
    still = (moved - disc).abs().amax(dim=(1, 2, 3)) < 1e-4
    assert still.float().mean().item() == pytest.approx(0.25, abs=0.03)
    mass = moved[~still, 0]
    centre = torch.stack([(mass * axis).sum(dim=(1, 2)) / mass.sum(dim=(1, 2)) for axis in (x, y)])
    angle = torch.atan2(centre[1], centre[0])
    assert (angle.abs() < math.pi / 2).float().mean().item() == pytest.approx(0.5, abs=0.05)  # all angles
    assert centre.norm(dim=0).max() < 1.15 * (0.4 + math.hypot(0.16, 0.16)) + 0.02
    size = mass.sum(dim=(1, 2)) / disc[0].sum()
    assert size.min() > 1 / 1.15**2 - 0.1
    assert size.max() < 1.15**2 + 0.1


def test_the_penalty_is_the_slope_at_what_is_shown(paired):
    """With one step and a fixed state, R1 of the trainer equals R1 at the noisy, blanked, turned pair."""
    trainer = make_trainer(replace(paired, turn=0.9))
    real, z_bin, domain, labels = batch()
    labels[:, :8] = 255
    pair, known = trainer._jittered(real, labels)
    conditions = Conditions(z_bin, domain, None, known)
    state = trainer.rng.get_state()
    found = trainer._backward_r1(pair, conditions, share=1.0)
    trainer.rng.set_state(state)
    shown = trainer._shown(pair, conditions).detach().requires_grad_(True)
    expected = r1_penalty(trainer._score(shown, conditions), shown).mean()
    assert found == pytest.approx(expected.item())


def test_parts_of_a_batch_keep_their_own_labels(paired):
    trainer = make_trainer(paired)
    real, z_bin, domain, labels = batch()
    labels[:2] = 255
    _, known = trainer._jittered(real, labels)
    first, second = Conditions(z_bin, domain, None, known).split(2)
    assert first.known.sum() == 0
    assert second.known.mean() == 1
    trainer = FactoryTrainer(trainer.factory, trainer.optimizers, trainer.rng, accumulate=2)
    assert trainer.train_step(*batch()).discriminator > 0


def test_the_discriminator_has_channels_for_the_labels(paired, config):
    torch.manual_seed(0)
    discriminator = make_discriminator(paired)
    assert discriminator.stem.weight.shape[1] == 3
    assert make_discriminator(config).stem.weight.shape[1] == 1


def test_drawn_labels_come_to_agree_with_the_drawn_image():
    """Discs that are bright at a labelled site and dark at another without labels; one factory for both."""
    config = FactoryConfig(
        domains=("bright", "dark"), classes=2, image_size=16, z_bins=1, channels=(16, 8), latent_dim=8, batch_size=8,
        r1_every=8, r1_gamma=0.1,
    )  # fmt: skip
    trainer = make_trainer(config)
    rng = torch.Generator().manual_seed(1)
    x, y = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="xy")
    for _ in range(150):
        centre = torch.rand(8, 2, 1, 1, generator=rng) * 4 + 6
        inside = (x - centre[:, 0]) ** 2 + (y - centre[:, 1]) ** 2 < 9
        zeros = torch.zeros(8, dtype=torch.long)
        domain = zeros + int(torch.randint(2, (), generator=rng))
        level = torch.where(domain == 0, 0.7, -0.7)[:, None, None]
        image = torch.where(inside, level, -level) + 0.1 * torch.randn(8, 16, 16, generator=rng)
        labels = torch.where(domain[:, None, None] == 0, inside.long(), 255)
        trainer.train_step(image[:, None], zeros, domain, labels)
    with torch.no_grad():
        z, zeros = torch.randn(32, 8, generator=rng), torch.zeros(32, dtype=torch.long)
        for domain, sign in ((0, 1), (1, -1)):
            generator = trainer.factory.generator
            style = generator.style_of(z, zeros, zeros + domain)
            made = generator.synthesise(style, generator.fixed_noise())
            drawn, seen = made.labels.argmax(dim=1) == 1, sign * made.image[:, 0] > 0
            dice = 2 * (drawn & seen).sum() / (drawn.sum() + seen.sum())
            assert dice > (0.5 if domain == 0 else 0.25)  # about .1 by chance
            assert 0.05 < drawn.float().mean() < 0.25  # a disc has 28 of 256 pixels


def test_label_channels_are_the_soft_labels_without_background():
    soft = torch.tensor([0.5, 0.25, 0.25]).view(1, 3, 1, 1)
    assert as_channels(soft).flatten().tolist() == [-0.5, -0.5]
