"""Shared anatomy: how much of the anatomy a latent shares between domains, and alarms where it shares little."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.generative import FactoryConfig, make_generator
from fedfactory.generative.metrics.alarm import alarms
from fedfactory.generative.metrics.quality import layout_agreement, site_quality
from fedfactory.generative.metrics.shared_anatomy import GREY_LEVELS, grey_levels, mutual_information, shared_anatomy
from fedfactory.generative.metrics.site_quality import SiteQuality
from helpers import with_head

GOOD = SiteQuality(distance=1.0, layout=0.9, contrast=1.0)


class Drawn:
    """Stands for a trained generator: discs whose position depends on the latent, painted by a table of grey levels."""

    def __init__(self, config: FactoryConfig, *, own_anatomy: bool = False, levels=((0.8, 0.2), (-0.2, 0.8))) -> None:
        self.config, self.own_anatomy, self.levels = config, own_anatomy, torch.tensor(levels)

    def parameters(self):
        yield torch.zeros(1)

    def fixed_noise(self):
        return []

    def draw_noise(self, batch, rng):
        return []

    def __call__(self, z, z_bin, domain, *, noise, encoding=None):
        side = self.config.image_size
        centre = torch.tanh(z.roll(int(domain[0]), dims=1) if self.own_anatomy else z)[:, :2] * 0.4
        grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij"))
        inner = ((grid - centre[:, :, None, None]) ** 2).sum(1) < 0.1
        outer = (grid**2).sum(0) < 0.8
        image = torch.full((len(z), side, side), -1.0)
        image = torch.where(outer, self.levels[domain, 0][:, None, None], image)
        return torch.where(inner, self.levels[domain, 1][:, None, None], image)[:, None]


@pytest.fixture
def wide(config):
    return replace(config, image_size=32, channels=(8, 8, 8))


def real_slices(config, count=120, domain=0):
    rng = torch.Generator().manual_seed(3)
    z_bin = torch.arange(count) % config.z_bins
    z = torch.randn(count, config.latent_dim, generator=rng)
    return Drawn(config)(z, z_bin, torch.full((count,), domain), noise=[]), z_bin


def test_mutual_information_is_that_of_the_joint_histogram_written_out():
    rng = np.random.default_rng(0)
    first = rng.integers(0, GREY_LEVELS, (3, 9, 9))
    second = (first + rng.integers(0, 3, first.shape)) % GREY_LEVELS
    found, most = mutual_information(torch.from_numpy(first), torch.from_numpy(second))
    for a, b, ours, bound in zip(first, second, found, most, strict=True):
        joint = np.zeros((GREY_LEVELS, GREY_LEVELS))
        np.add.at(joint, (a.ravel(), b.ravel()), 1 / a.size)
        rows, columns = joint.sum(1), joint.sum(0)
        used = joint > 0
        expected = (joint[used] * np.log2(joint[used] / np.outer(rows, columns)[used])).sum()
        entropies = [-(p[p > 0] * np.log2(p[p > 0])).sum() for p in (rows, columns)]
        assert float(ours) == pytest.approx(expected, abs=1e-12)
        assert float(bound) == pytest.approx(min(entropies), abs=1e-12)


def test_an_anatomy_in_two_contrasts_is_shared_and_two_anatomies_are_at_chance(wide):
    """Also with the same polarity and the same outline, which fool measures of edges and of quality."""
    pair = wide.domains
    assert shared_anatomy(Drawn(wide))[pair] > 0.95
    for levels in (((0.8, 0.2), (-0.2, 0.8)), ((0.8, 0.2), (0.8, 0.2))):
        assert abs(shared_anatomy(Drawn(wide, own_anatomy=True, levels=levels))[pair]) < 0.05


@pytest.mark.parametrize("head", ["palette", "image"])
def test_the_measure_takes_real_generators_and_gives_the_same_number_again(config, head):
    torch.manual_seed(0)
    generator = make_generator(with_head(config, head))
    first = shared_anatomy(generator)
    assert first == shared_anatomy(generator, batch_size=5)
    assert set(first) == {config.domains}


def test_a_domain_without_contrast_shares_nothing(wide):
    assert shared_anatomy(Drawn(wide, levels=((0.8, 0.2), (-1.0, -1.0))))[wide.domains] == 0.0


def test_grey_levels_cover_the_range_and_hold_what_lies_outside():
    values = torch.tensor([-3.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    assert grey_levels(values).tolist() == [0, 0, GREY_LEVELS // 2, *[GREY_LEVELS - 1] * 3]


def test_measures_separate_a_good_generator_from_planted_failures(wide):
    """Swapped grey levels preserve edges, outline and anatomy; the layout alone reveals them."""
    real, z_bin = real_slices(wide)
    good = site_quality(Drawn(wide), real, z_bin, domain=0)
    swapped = site_quality(Drawn(wide, levels=((0.2, 0.8), (0.0, 0.0))), real, z_bin, domain=0)
    flat = site_quality(Drawn(wide, levels=((-0.9, -0.95), (0.0, 0.0))), real, z_bin, domain=0)
    assert good.layout > 0.8
    assert good.contrast == pytest.approx(1, abs=0.05)
    assert abs(good.distance) < 1
    assert swapped.layout < 0
    assert flat.contrast < 0.2
    assert flat.distance > 10 * abs(good.distance)
    assert not alarms("bright", good, 0.9)
    assert "elsewhere" in " ".join(alarms("bright", swapped, 0.9))
    assert "contrast" in " ".join(alarms("bright", flat, 0.9))


def test_layout_agreement_is_1_for_equal_slices_and_0_without_common_heights():
    rng = torch.Generator().manual_seed(0)
    images, z_bin = torch.rand(20, 1, 8, 8, generator=rng), torch.arange(20) % 4
    assert layout_agreement(images, z_bin, synthetic=images, synthetic_bin=z_bin) == pytest.approx(1)
    assert layout_agreement(images, z_bin, synthetic=-images, synthetic_bin=z_bin) == pytest.approx(-1)
    assert layout_agreement(images, z_bin, synthetic=images, synthetic_bin=z_bin + 4) == 0.0
    assert layout_agreement(torch.ones_like(images), z_bin, synthetic=images, synthetic_bin=z_bin) == 0.0


def test_the_alarm_is_silent_for_a_good_domain_and_names_each_fault():
    assert alarms("t2", GOOD, 0.8) == []
    assert alarms("t2", None, None) == []
    assert "shares little" in alarms("t2", GOOD, 0.2)[0]
    assert "far from real" in alarms("t2", replace(GOOD, distance=1e4), 0.8)[0]
    assert len(alarms("t2", SiteQuality(1e5, -0.5, 0.01), 0.0)) == 4


def test_the_published_setting_sends_less_than_half_of_the_published_bytes():
    """Published: 352 MiB per direction, node and round at 512 px with three domains."""
    from fedbiomed.common.serializer import Serializer

    generator = make_generator(FactoryConfig.preset("paper", ("a", "b", "c")))
    message = Serializer.dumps({name: tensor.detach() for name, tensor in generator.named_parameters()})
    assert 100 < len(message) / 2**20 < 352 / 2
