"""The mathematics of the factory against plain twins in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fedfactory.errors import ConfigError
from fedfactory.generative.losses import discriminator_logistic, generator_non_saturating, r1_penalty
from fedfactory.generative.networks.build import make_discriminator, make_generator
from fedfactory.generative.networks.discriminator import minibatch_statistic
from fedfactory.generative.networks.layers import EqualisedLinear, ModulatedConv, activate, pixel_norm, upsample
from fedfactory.generative.networks.palette import PaletteHead, palette_table
from helpers import kernels_of, with_head


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_convolution_equals_one_kernel_per_sample(demodulate):
    torch.manual_seed(0)
    layer = ModulatedConv(3, 5, 3, style_dim=4, demodulate=demodulate).double()
    x, w = torch.randn(2, 3, 6, 7).double(), torch.randn(2, 4).double()
    for sample, kernel in enumerate(kernels_of(layer, w)):
        expected = F.conv2d(x[sample : sample + 1], kernel, padding=1)[0]
        torch.testing.assert_close(layer(x, w)[sample], expected)


def test_equalised_linear_starts_with_unit_variance_whatever_its_learning_rate_multiplier():
    torch.manual_seed(0)
    x = torch.randn(4096, 256)
    for multiplier in (1.0, 0.01):
        assert EqualisedLinear(256, 64, lr_multiplier=multiplier)(x).std().item() == pytest.approx(1, abs=0.05)


def test_activation_and_pixel_norm_follow_their_formulas():
    x = torch.tensor([[-2.0, 1.0]])
    torch.testing.assert_close(activate(x), torch.tensor([[-0.4, 1.0]]) * math.sqrt(2))
    torch.testing.assert_close(pixel_norm(x), x / math.sqrt(2.5), atol=1e-6, rtol=0)


def test_upsampling_is_the_1331_filter_away_from_the_border():
    x = torch.randn(1, 1, 6, 6).double()
    zeros = torch.zeros(1, 1, 12, 12).double()
    zeros[:, :, ::2, ::2] = x
    tap = torch.tensor([1.0, 3.0, 3.0, 1.0]).double() / 4
    expected = F.conv2d(F.pad(zeros, (2, 1, 2, 1)), torch.outer(tap, tap)[None, None])
    torch.testing.assert_close(upsample(x)[..., 2:-2, 2:-2], expected[..., 2:-2, 2:-2])


def test_minibatch_statistic_groups_samples_by_their_number_modulo_the_group_count():
    x = torch.zeros(8, 1, 2, 2)
    x[[1, 3, 5, 7]] = torch.tensor([0.0, 0.0, 2.0, 2.0])[:, None, None, None]
    spread = minibatch_statistic(x)[:, 1, 0, 0]
    # neighbours in one group, as a reshape the other way round would have it, give 0, 1, 0, 1 differently
    torch.testing.assert_close(spread, torch.tensor([1e-4, 1.0] * 4), atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 5, 6, 7])
def test_minibatch_statistic_takes_any_batch_size(batch):
    assert minibatch_statistic(torch.randn(batch, 3, 4, 4)).shape == (batch, 4, 4, 4)


def test_adversarial_losses_equal_their_closed_forms():
    real, fake = torch.tensor([0.5, -1.0]).double(), torch.tensor([2.0, 0.0]).double()
    expected = sum(math.log(1 + math.exp(-r)) for r in (0.5, -1.0)) / 2
    expected += sum(math.log(1 + math.exp(f)) for f in (2.0, 0.0)) / 2
    assert discriminator_logistic(real, fake).item() == pytest.approx(expected)
    assert generator_non_saturating(fake).item() == pytest.approx(
        sum(math.log(1 + math.exp(-f)) for f in (2.0, 0.0)) / 2
    )


def test_r1_penalty_and_its_own_gradient_are_right_for_a_quadratic_score():
    a = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    real = torch.randn(2, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    penalty = r1_penalty(a * real.square().sum(dim=(1, 2, 3)), real)
    torch.testing.assert_close(penalty, (2 * 3 * real).square().sum(dim=(1, 2, 3)))
    (slope,) = torch.autograd.grad(penalty.sum(), a)
    torch.testing.assert_close(slope, 8 * 3 * real.square().sum())


def test_r1_penalty_passes_a_numerical_second_derivative_check(config):
    torch.manual_seed(0)
    network = make_discriminator(config).double()
    z_bin, domain = torch.tensor([0, 3]), torch.tensor([0, 1])
    real = torch.rand(2, 1, 16, 16, dtype=torch.float64, requires_grad=True)
    weight = network.blocks[0].conv1.weight
    r1_penalty(network(real, z_bin, domain), real).sum().backward()
    slope, step = weight.grad[0, 0, 1, 1].item(), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight[0, 0, 1, 1] += sign * step
        values.append(r1_penalty(network(real, z_bin, domain), real).sum().item())
        with torch.no_grad():
            weight[0, 0, 1, 1] -= sign * step
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4)


@pytest.mark.parametrize("domains", [1, 2, 3, 4, 6])
def test_palette_rows_of_different_domains_start_uncorrelated(domains):
    table = palette_table(domains, torch.Generator().manual_seed(0))
    assert (table[:, 0] == -1).all()
    if domains > 1:
        off_diagonal = torch.corrcoef(table[:, 1:]) - torch.eye(domains)
        assert off_diagonal.abs().max() <= 0.2 + 1e-6


def test_palette_of_three_domains_holds_every_combination_of_levels():
    table = palette_table(3, torch.Generator())
    assert table.shape == (3, 28)
    assert len({tuple(column.tolist()) for column in table[:, 1:].t()}) == 27


def test_painting_mixes_grey_levels_by_the_tissue_maps():
    head = PaletteHead(2, 4, torch.Generator())
    anatomy = head.anatomy(torch.randn(3, head.num_maps, 5, 5))
    torch.testing.assert_close(anatomy.sum(dim=1), torch.ones(3, 5, 5))
    w, domain = torch.randn(3, 4), torch.tensor([0, 1, 1])
    image = head.paint(anatomy, w, domain, noise=torch.zeros(3, 1, 5, 5))
    level = head.grey[domain] + 0.1 * head.shade(w)
    expected = sum(anatomy[:, k] * level[:, k, None, None] for k in range(head.num_maps))
    torch.testing.assert_close(image[:, 0], expected)


def test_one_latent_has_the_same_anatomy_in_every_domain(config):
    generator = make_generator(config)
    z, bins, noise = torch.randn(2, 8), torch.tensor([1, 2]), generator.fixed_noise()
    first, second = (generator.synthesise(generator.style_of(z, bins, torch.full((2,), d)), noise) for d in (0, 1))
    torch.testing.assert_close(first.anatomy, second.anatomy)
    assert not torch.allclose(first.image, second.image)


def test_a_domain_in_the_mapping_network_has_an_anatomy_of_its_own(config):
    """For domains of other organs: the published conditioning, also before a palette."""
    torch.manual_seed(0)
    generator = make_generator(replace(config, conditioning="mapping"))
    z, bins, noise = torch.randn(2, 8), torch.tensor([1, 2]), generator.fixed_noise()
    first, second = (generator.synthesise(generator.style_of(z, bins, torch.full((2,), d)), noise) for d in (0, 1))
    assert not torch.allclose(first.anatomy, second.anatomy)
    with pytest.raises(ConfigError, match="only the palette"):
        replace(with_head(config, "image"), conditioning="head")


def test_texture_is_bounded_whatever_the_weights(config):
    torch.manual_seed(0)
    generator = make_generator(replace(config, texture=0.1))
    with torch.no_grad():
        generator.texture.bias.fill_(50.0)
    style = generator.style_of(torch.randn(3, 8), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.long))
    shown = generator.synthesise(style, generator.fixed_noise())
    painted = generator.head.paint(shown.anatomy, style.w[:, -1], style.domain, noise=generator.fixed_noise()[0])
    torch.testing.assert_close(shown.image - painted, torch.full_like(painted, 0.1))


@pytest.mark.parametrize("head", ["palette", "image"])
def test_a_fractional_height_lies_between_its_bins(config, head):
    generator = make_generator(with_head(config, head))
    z, domain = torch.randn(3, 8), torch.tensor([0, 1, 1])
    at = generator.style_at(z, torch.tensor([0.0, 1.25, 3.0]), domain)
    low, high = (generator.style_of(z, torch.tensor(bins), domain) for bins in ([0, 1, 3], [0, 2, 3]))
    for name in ("w", "constant"):
        mine, below, above = getattr(at, name), getattr(low, name), getattr(high, name)
        torch.testing.assert_close(mine, torch.stack([below[0], 0.75 * below[1] + 0.25 * above[1], below[2]]))
