"""Cards that claim networks of any size: compared with their file before memory is allocated."""

from __future__ import annotations

import json
import resource
import struct
from pathlib import Path

import pytest
import torch
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.localiser import load_localiser
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteContext
from fedfactory.adaptation.methods.registry import METHODS, make_method
from fedfactory.adaptation.network_names import NETWORKS
from fedfactory.adaptation.networks.translator_network import EncoderConfig, Translator
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import FEDERATED, FederatedDesign, SegmenterCard
from fedfactory.common.sketches import parameters_of, sketch
from fedfactory.common.weights_file import CARD
from fedfactory.errors import CheckpointError, ConfigError, FedFactoryError
from fedfactory.generative.config import FactoryConfig
from fedfactory.generative.factory_file import load_factory
from fedfactory.generative.networks.build import make_discriminator, make_generator
from fedfactory.imaging.slice_format import SliceFormat
from helpers import untrained_segmenter, with_head
from torch import nn

OPTIONS = {"cmc": {"modalities": ["a", "b"]}}
LOADERS = {"factory": load_factory, "segmenter": Segmenter.load, "labelled": LabelledFactory.load}


def shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: values.shape for name, values in network.state_dict().items()}


def assert_sketch_fits(make) -> None:
    made = make()
    sketched = sketch(make, tensors=len(made.state_dict()))
    assert shapes(sketched) == shapes(made)
    assert parameters_of(sketched) == parameters_of(made) > 0
    assert {values.device.type for values in sketched.state_dict().values()} == {"meta"}


@pytest.mark.parametrize("head", ["palette", "image"])
def test_a_sketch_of_a_factory_has_its_shapes(config, head):
    config = with_head(config, head)
    assert_sketch_fits(lambda: make_generator(config))
    assert_sketch_fits(lambda: make_discriminator(config))
    assert_sketch_fits(lambda: Translator(make_generator(config), 3, (0, 1), config=EncoderConfig()))


@pytest.mark.parametrize("network", NETWORKS)
def test_a_sketch_of_a_planned_network_has_its_shapes(network):
    values = untrained_segmenter(network).to_dict()
    assert_sketch_fits(lambda: Segmenter.from_dict(values).network)


@pytest.mark.parametrize("method", METHODS)
def test_a_sketch_of_a_method_has_its_shapes(method):
    config = MethodConfig(
        method=method, classes=3, size=32, sites=3, rounds=2, width=8, options=OPTIONS.get(method, {})
    )
    assert_sketch_fits(make_method(config).build)
    context = SiteContext(modality="a" if method == "cmc" else "", network="unet" if method == "hssf" else "")
    design = FederatedDesign(method=config, context=context)
    card = SegmenterCard(classes=3, network=FEDERATED, federated=design)
    fmt = SliceFormat(size=32, spacing=1.0, window=((-1.0, 1.0),), z_bins=4)
    values = {"format": fmt.to_dict(), **card.to_dict()}
    assert_sketch_fits(lambda: Segmenter.from_dict(values).network)


def test_a_network_that_counts_layers_without_an_end_is_stopped():
    with pytest.raises(ConfigError, match="more than 220 tensors"):
        sketch(lambda: nn.Sequential(*(nn.Linear(1, 1) for _ in range(10**9))), tensors=10)
    nn.Sequential(*(nn.Linear(1, 1) for _ in range(200)))  # afterwards nothing is counted
    assert nn.Linear(1, 1).weight.device.type == "cpu"


def claim(path: Path, change) -> None:
    """Change the card in a file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    card = json.loads(header["__metadata__"][CARD])
    change(card)
    header["__metadata__"][CARD] = json.dumps(card)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def wide(card: dict) -> dict:
    return {**card, "plan": {**card["plan"], "widths": [80_000] * 3}}


CLAIMS = {
    "wide factory": ("factory", lambda card: card["config"].update(channels=[300_000, 300_000])),
    "long latents": ("factory", lambda card: card["config"].update(latent_dim=10**6)),
    "deep mapping": ("factory", lambda card: card["config"].update(mapping_layers=10**9, latent_dim=1)),
    "many bins": ("factory", lambda card: card["config"].update(z_bins=10**11)),
    "wide segmenter": ("segmenter", lambda card: card["plan"].update(widths=[80_000, 80_000, 80_000])),
    "wide label branch": ("labelled", lambda card: card["config"].update(channels=[300_000, 300_000])),
    "wide first guess": ("labelled", lambda card: card["robust"]["plan"].update(widths=[80_000] * 3)),
    "wide localiser": ("labelled", lambda card: card.update(localiser=wide(card["robust"]))),
}  # fmt: skip


@pytest.fixture
def claims(trained, labelled, tmp_path) -> Path:
    """A folder of files whose cards claim terabytes."""
    for name, (kind, change) in CLAIMS.items():
        path = tmp_path / f"{name}.{kind}.safetensors"
        {"factory": trained, "labelled": labelled, "segmenter": untrained_segmenter()}[kind].save(path)
        path.with_suffix(".json").unlink()
        claim(path, change)
    return tmp_path


@pytest.mark.parametrize("name", CLAIMS)
def test_a_card_that_claims_a_huge_network_is_refused(name, claims):
    kind = CLAIMS[name][0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match=r"do not fit the card|not usable|more than"):
        LOADERS[kind](claims / f"{name}.{kind}.safetensors")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB


def test_a_localiser_that_claims_a_huge_network_is_refused(claims):
    with pytest.raises(CheckpointError):
        load_localiser(claims / "wide localiser.labelled.safetensors")
    with pytest.raises(CheckpointError):
        load_localiser(claims / "wide segmenter.segmenter.safetensors")


def test_tensors_that_are_larger_than_their_file_are_refused(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    for change in ({}, {"data_offsets": [0, 4]}, {"shape": [1 << 62, 1 << 62]}):
        header["a"] |= change
        text = json.dumps({**header, "__metadata__": {CARD: '{"kind": "factory"}'}}).encode()
        (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
        with pytest.raises(FedFactoryError, match="not a readable safetensors file"):
            load_factory(tmp_path / "a.safetensors")


@pytest.mark.parametrize("domains", [1, 3, 4, 6])
@pytest.mark.parametrize("channels", [1, 3])
def test_factories_of_any_number_of_domains_and_channels_can_be_sketched(domains, channels):
    """Palettes of more than three rows are drawn at random, which needs values."""
    config = FactoryConfig(
        domains=tuple("abcdef"[:domains]), image_size=16, image_channels=channels, z_bins=4, channels=(8, 8),
        latent_dim=8,
    )  # fmt: skip
    made, sketched = make_generator(config), sketch(lambda: make_generator(config), tensors=100)
    shapes = [
        {name: tuple(value.shape) for name, value in network.state_dict().items()} for network in (made, sketched)
    ]
    assert shapes[0] == shapes[1]
