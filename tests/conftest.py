"""Small factories and stores that many tests use."""

from __future__ import annotations

import pytest
import torch
from fedfactory.generative import FactoryConfig, TrainedFactory, make_generator
from helpers import DOMAINS, write_site


@pytest.fixture(scope="session")
def config() -> FactoryConfig:
    return FactoryConfig(
        domains=DOMAINS, image_size=16, z_bins=4, channels=(8, 8), latent_dim=8, batch_size=4, r1_every=2
    )


@pytest.fixture
def trained(config) -> TrainedFactory:
    torch.manual_seed(0)
    generator = make_generator(config).eval()
    history = {domain: [{"round": 1, "loss_generator": 0.5, "loss_discriminator": 1.0}] for domain in DOMAINS}
    return TrainedFactory(generator, generator.state_dict(), 6.0, 100.0, history, {"rounds": 1, "seed": 0})


@pytest.fixture
def site(tmp_path):
    """A folder of three labelled cases."""
    write_site(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def store(site, tmp_path):
    """Its slice store for `config`."""
    from fedfactory.node.prepare import prepare
    from fedfactory.node.prepare_config import PrepareConfig

    return prepare(site, tmp_path / "store", PrepareConfig(domain="bright", size=16, z_bins=4)).store
