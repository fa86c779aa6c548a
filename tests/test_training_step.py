"""The step of the published networks: schedules, penalties, augmentation, guidance, precision."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from fedfactory.errors import ConfigError, TrainingError
from fedfactory.generative import Factory, FactoryTrainer
from fedfactory.generative.adaptive_augmentation import (
    AugmentationStrength,
    augment,
    draw_intensity,
    draw_inverse_matrices,
    warp,
)
from fedfactory.generative.conditions import Conditions, Guide
from fedfactory.generative.losses import path_lengths, path_penalty, squared_angle
from fedfactory.generative.trainer import make_optimizers
from fedfactory.generative.trainer_state import TrainerState
from helpers import with_head


@pytest.fixture(scope="module")
def published(config):
    """The small factory with the published networks and all terms on."""
    return replace(with_head(config, "image"), encoding_dim=6, path_weight=2.0, style_mixing=0.9, mirror=False, shift=0)


def batch(size=4):
    rng = torch.Generator().manual_seed(3)
    real = torch.rand(size, 1, 16, 16, generator=rng) * 2 - 1
    return real, torch.arange(size) % 4, torch.zeros(size, dtype=torch.long)


def make_trainer(config, *, precision="float32", seed=0, **options):
    torch.manual_seed(seed)
    factory = Factory(config, precision=precision)
    return FactoryTrainer(factory, make_optimizers(factory), torch.Generator().manual_seed(seed), **options)


def weights(network):
    return torch.cat([p.detach().flatten() for p in network.parameters()])


def test_the_joint_step_updates_both_networks_and_adds_lazy_penalties(published):
    trainer = make_trainer(replace(published, r1_every=2, path_every=3))
    seen = []
    for _ in range(4):
        before = [weights(n).clone() for n in (trainer.factory.generator, trainer.factory.discriminator)]
        losses = trainer.train_step(*batch())
        assert losses.discriminator is not None
        assert losses.generator is not None
        seen.append((losses.r1 is not None, losses.path is not None))
        after = [weights(n) for n in (trainer.factory.generator, trainer.factory.discriminator)]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert seen == [(True, True), (False, False), (True, False), (False, True)]


def test_the_published_step_is_one_of_four_and_moves_one_network(published):
    trainer = make_trainer(replace(published, compatibility="published", r1_every=4, path_every=2))
    seen = []
    for _ in range(12):
        before = [weights(n).clone() for n in (trainer.factory.discriminator, trainer.factory.generator)]
        losses = trainer.train_step(*batch())
        after = [weights(n) for n in (trainer.factory.discriminator, trainer.factory.generator)]
        moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        (term,) = [name for name in ("discriminator", "generator", "r1", "path") if getattr(losses, name) is not None]
        seen.append(term)
        assert moved == ([True, False] if term in ("discriminator", "r1") else [False, True])
    pairs = [("r1", "path"), ("discriminator", "generator"), ("discriminator", "path"), ("discriminator", "generator")]
    assert seen == [term for pair in [*pairs, *pairs[:2]] for term in pair]


def test_published_adam_is_corrected_for_the_replaced_updates(published):
    config = replace(published, compatibility="published", learning_rate=0.002, r1_every=16, path_every=4)
    made = make_optimizers(Factory(config))
    generator, discriminator = (made[n].param_groups[0] for n in ("generator", "discriminator"))
    assert generator["lr"] == pytest.approx(0.0016)
    assert generator["betas"] == (0.0, pytest.approx(0.991992, abs=1e-6))
    assert discriminator["lr"] == pytest.approx(0.00188235, abs=1e-8)
    assert discriminator["betas"] == (0.0, pytest.approx(0.990585, abs=1e-6))


@pytest.mark.parametrize("compatibility", ["none", "published"])
def test_the_average_follows_after_the_step_and_before_it_as_published(published, compatibility):
    trainer = make_trainer(replace(published, compatibility=compatibility, ema_decay=0.75))
    trainer.ema = copy.deepcopy(trainer.factory.generator)
    trainer.state.updates_done = 1  # published: a generator update
    before = weights(trainer.factory.generator).clone()
    trainer.train_step(*batch())
    followed = weights(trainer.factory.generator) if compatibility == "none" else before
    torch.testing.assert_close(weights(trainer.ema), 0.75 * before + 0.25 * followed)


def test_noise_buffers_are_not_averaged(published):
    trainer = make_trainer(published)
    trainer.ema = copy.deepcopy(trainer.factory.generator)
    kept = trainer.ema.noises.noise_0.clone()
    trainer.factory.generator.noises.noise_0.add_(1)
    trainer.train_step(*batch())
    assert torch.equal(trainer.ema.noises.noise_0, kept)


def test_path_penalty_of_a_linear_generator_has_a_closed_form():
    torch.manual_seed(0)
    matrix = torch.randn(12, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 1, 5, dtype=torch.float64, requires_grad=True)
    noise = torch.randn(3, 1, 3, 4, dtype=torch.float64)
    image = (w[:, 0] @ matrix.t()).reshape(3, 1, 3, 4)
    lengths = path_lengths(image, w, noise)
    expected = (noise.reshape(3, 12) / math.sqrt(12) @ matrix).norm(dim=1)
    torch.testing.assert_close(lengths, expected)
    penalty, mean = path_penalty(lengths, torch.tensor(0.5, dtype=torch.float64))
    moved = 0.5 + 0.01 * (expected.mean() - 0.5)
    assert mean.item() == pytest.approx(moved.item())
    torch.testing.assert_close(penalty, (expected - moved).square().mean())
    (slope,) = torch.autograd.grad(penalty, matrix)
    (reference,) = torch.autograd.grad((expected - moved).square().mean(), matrix)
    torch.testing.assert_close(slope, reference)


def test_the_path_mean_is_carried_from_step_to_step(published):
    trainer = make_trainer(replace(published, path_every=1))
    means = []
    for _ in range(3):
        trainer.train_step(*batch())
        means.append(trainer.state.path_mean)
    assert 0 < means[0] < means[1] < means[2]  # a mean that restarts at 0 would not grow


def test_the_squared_angle_has_bounded_slopes_everywhere():
    u = torch.nn.functional.normalize(torch.randn(768, generator=torch.Generator().manual_seed(0)), dim=0)
    for other, expected in ((u, 0.0), (-u, math.pi**2)):
        moving = u.clone().requires_grad_(True)
        value = squared_angle(moving[None], other)
        assert value.item() == pytest.approx(expected, abs=0.02)
        value.sum().backward()
        assert torch.isfinite(moving.grad).all()
    u, v = torch.tensor([1.0, 0, 0]).double(), torch.tensor([0.6, 0.8, 0]).double()
    assert squared_angle(u[None], v).item() == pytest.approx(math.acos(0.6) ** 2)
    fixed = torch.nn.functional.normalize(torch.randn(2, 7).double(), dim=1)
    assert torch.autograd.gradcheck(lambda v: squared_angle(v, fixed), fixed.flip(0).requires_grad_(True))


def encoder(images):
    """A frozen encoder of width 6: means over stripes."""
    stripes = images[:, 0, :12].reshape(len(images), 6, 2, 16).mean(dim=(2, 3))
    return torch.nn.functional.normalize(stripes + 0.1, dim=1)


def test_guidance_moves_slices_towards_the_sites_embedding(published):
    mean = torch.nn.functional.normalize(torch.tensor([1.0, 0, 0, 0, 0, -1.0]), dim=0)
    config = replace(published, clip_weight=50.0, encoding_dim=0, path_weight=0.0)
    trainer = make_trainer(config, guide=Guide(encoder, mean))
    angles = [trainer.train_step(*batch()).guidance for _ in range(40)]
    assert sum(angles[-5:]) < 0.5 * sum(angles[:5])


def test_updates_without_the_embedding_have_no_guidance(published):
    trainer = make_trainer(
        replace(published, clip_weight=1.0), encoding=torch.randn(6), guide=Guide(encoder, torch.ones(6))
    )
    guided = [trainer.train_step(*batch()).guidance is not None for _ in range(24)]
    assert 4 <= sum(guided) <= 20  # a coin for each update


@pytest.mark.parametrize(
    ("options", "changes", "message"),
    [
        ({"encoding": torch.zeros(5)}, {}, r"expected \(6,\)"),
        ({}, {"clip_weight": 1.0}, "no image encoder"),
        ({"accumulate": 3}, {}, "accumulate is 3; it must divide"),
    ],
)
def test_a_trainer_that_does_not_fit_its_factory_is_refused(published, options, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_trainer(replace(published, **changes), **options)


def test_half_precision_is_refused_for_the_palette_network(config):
    with pytest.raises(ConfigError, match="head 'palette' choose from float32"):
        Factory(config, precision="bfloat16")


def test_slices_of_another_size_are_refused(published):
    with pytest.raises(TrainingError, match=r"\(1, 16, 16\)"):
        make_trainer(published).train_step(torch.zeros(4, 1, 8, 8), *batch()[1:])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda trainer: trainer.factory.discriminator.final_linear[1].bias.data.fill_(float("nan")), "logistic loss"),
        (lambda trainer: setattr(trainer.state, "path_mean", float("inf")), "path length penalty"),
        (
            lambda trainer: setattr(trainer, "guide", Guide(lambda x: encoder(x) * float("nan"), torch.ones(6))),
            "guidance",
        ),
    ],
)
def test_a_term_that_is_not_finite_is_named_before_its_network_changes(published, spoil, message):
    config = replace(published, clip_weight=1.0, encoding_dim=0)
    trainer = make_trainer(config, guide=Guide(encoder, torch.ones(6)))
    spoil(trainer)
    before = weights(trainer.factory.generator).clone()
    with pytest.raises(TrainingError, match=message):
        trainer.train_step(*batch())
    assert torch.equal(weights(trainer.factory.generator), before)


def test_a_gradient_that_is_not_finite_is_named_before_the_optimizer_moves(published):
    trainer = make_trainer(published)
    before = weights(trainer.factory.discriminator).clone()
    trainer.factory.discriminator.final_linear[1].weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(TrainingError, match="gradient of the logistic loss"):
        trainer.train_step(*batch())
    assert torch.equal(weights(trainer.factory.discriminator), before)


def test_parts_of_a_batch_add_up_to_its_gradient(published):
    """Each part is a group of the minibatch statistic, so that only drawn latents could differ, and R1 draws none."""
    config = replace(published, batch_size=8, path_weight=0.0)
    slopes = []
    for parts in (1, 2):
        trainer = make_trainer(config, accumulate=parts)
        real, z_bin, domain = batch(8)
        cut = trainer._parts(torch.cat([real[:4], real[:4]]), Conditions(z_bin % 4, domain, None))
        for part, wanted in cut:
            trainer._backward_r1(part, wanted, share=1 / len(cut))
        slopes.append(trainer.factory.discriminator.convs[0][0].weight.grad.clone())
    torch.testing.assert_close(slopes[0], slopes[1])


def test_the_state_survives_a_round_trip(published):
    trainer = make_trainer(replace(published, augment=True))
    for _ in range(3):
        trainer.train_step(*batch())
    assert TrainerState.from_dict(trainer.state.to_dict()) == trainer.state
    assert trainer.state.augmentation.count == 12


@pytest.mark.parametrize("compatibility", ["none", "published"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_term_together_stays_finite(published, compatibility, precision):
    config = replace(published, augment=True, augment_p=0.5, clip_weight=0.2, compatibility=compatibility)
    guide = Guide(encoder, torch.ones(6) / 6**0.5)
    trainer = make_trainer(config, precision=precision, encoding=torch.randn(6), guide=guide)
    for _ in range(9):
        trainer.train_step(*batch())
    assert torch.isfinite(weights(trainer.factory)).all()


def test_half_precision_gives_nearly_the_same_slices(published):
    torch.manual_seed(0)
    full = Factory(published)
    torch.manual_seed(0)
    half = Factory(published, precision="bfloat16")
    z, noise = torch.randn(4, 8), full.generator.fixed_noise()
    with torch.no_grad():
        in_float32, in_bfloat16 = (f.generator(z, batch()[1], batch()[2], noise=noise) for f in (full, half))
    assert in_bfloat16.dtype == torch.float32
    difference = (in_float32 - in_bfloat16).square().mean().sqrt() / in_float32.std()
    assert 0 < difference < 0.02


def test_without_strength_augmentation_changes_nothing():
    image = torch.randn(3, 1, 24, 32, generator=torch.Generator().manual_seed(1))
    rng = torch.Generator().manual_seed(0)
    torch.testing.assert_close(augment(image, 0.0, rng), image, atol=2e-5, rtol=0)
    torch.testing.assert_close(augment(image, 0.0, rng, published=True), image / 3, atol=2e-5, rtol=0)


def test_turns_and_flips_move_a_smooth_slice_as_they_should():
    x, y = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="xy")
    image = torch.exp(-((x - 11) ** 2 + (y - 19) ** 2 / 2) / 40)[None, None]
    turn = torch.tensor([[[0.0, -1, 0], [1, 0, 0], [0, 0, 1]]])
    flip = torch.diag(torch.tensor([-1.0, 1, 1]))[None]
    shift = torch.tensor([[[1.0, 0, 3], [0, 1, 0], [0, 0, 1]]])  # output x shows input x + 3
    for matrix, expected in ((turn, image.rot90(1, (2, 3))), (flip, image.flip(3)), (shift, image.roll(-3, 3))):
        assert (warp(image, matrix) - expected)[..., 4:-4, 4:-4].abs().max() < 0.03
        assert (image - expected).abs().max() > 0.3


def test_all_four_quarter_turns_are_drawn_and_two_as_published():
    for turns, expected in (((0, 1, 2, 3), 4), ((0, 3), 2)):
        rng = torch.Generator().manual_seed(0)
        seen = set()
        for _ in range(40):
            drawn = draw_inverse_matrices(50, 16, 16, p=0.05, rng=rng, quarter_turns=turns)
            whole = drawn[(drawn[:, :2] - drawn[:, :2].round()).abs().amax(dim=(1, 2)) < 1e-4]
            still = whole[(whole[:, :2, 2] == 0).all(dim=1) & (whole[:, 0, 0] * whole[:, 1, 1] >= 0)]
            upright = still[torch.linalg.det(still) > 0]
            seen |= {tuple(m[:2, :2].round().int().flatten().tolist()) for m in upright}
        assert len(seen) == expected


def test_intensity_draws_follow_their_distributions():
    gain, shift = draw_intensity(200_000, 1.0, torch.Generator().manual_seed(0))
    assert shift.std().item() == pytest.approx(0.2, abs=0.002)
    assert gain.abs().log().std().item() == pytest.approx(0.5 * math.log(2), abs=0.003)
    assert (gain < 0).float().mean().item() == pytest.approx(0.5, abs=0.005)
    gain, shift = draw_intensity(200_000, 0.25, torch.Generator().manual_seed(0))
    assert (shift == 0).float().mean().item() == pytest.approx(0.75, abs=0.005)


def test_augmentation_can_be_differentiated_twice():
    matrices = draw_inverse_matrices(1, 6, 6, p=1.0, rng=torch.Generator().manual_seed(2), quarter_turns=(0, 1, 2, 3))
    image = torch.randn(1, 1, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: warp(x, matrices.double()).pow(3), image, atol=1e-4)


def test_the_strength_follows_the_signs_of_the_real_scores():
    strength = AugmentationStrength()
    for _ in range(8):
        strength.observe(torch.ones(16, 1), target=0.6, length=500_000)
    assert strength.p == pytest.approx(128 / 500_000)  # a single change of 2.56e-4 after eight batches
    for _ in range(8):
        strength.observe(torch.tensor([[1.0]] * 11 + [[-1.0]] * 5), target=0.6, length=500_000)  # mean sign .375
    assert strength.p == 0.0
    for _ in range(8):
        strength.observe(-torch.ones(16, 1), target=0.6, length=100)
    assert strength.p == 0.0  # never below 0


def test_a_fixed_strength_is_not_adapted(published):
    trainer = make_trainer(replace(published, augment=True, augment_p=0.3))
    trainer.train_step(*batch())
    assert trainer.state.augmentation == AugmentationStrength()
