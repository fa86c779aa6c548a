"""The published networks: golden vectors of the original program, plain twins, import of its files."""

from __future__ import annotations

import argparse
import pickle

import pytest
import torch
import torch.nn.functional as F
from fedfactory.cli import main
from fedfactory.errors import CheckpointError, ConfigError, UsageError
from fedfactory.generative import FactoryConfig, load_factory, make_discriminator, make_generator
from fedfactory.generative.adaptive_augmentation import warp
from fedfactory.generative.config import channel_widths
from fedfactory.generative.losses import path_lengths, r1_penalty
from fedfactory.generative.networks.generator import Style
from fedfactory.generative.networks.layers import ModulatedConv
from fedfactory.generative.networks.resampling import blur, double, halve, resample
from fedfactory.generative.original_checkpoint import import_checkpoint
from golden import FILTER, filled_states, golden_vectors, published_config
from helpers import kernels_of
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOLERANCE = {"atol": 1e-4, "rtol": 0}


@pytest.fixture(scope="module")
def golden():
    return golden_vectors()


@pytest.fixture(scope="module")
def states():
    return filled_states(published_config())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, states):
    """A file as the published program exports it."""
    path = tmp_path_factory.mktemp("original") / "final_global_model.pt"
    torch.save({"g": states[0], "d": states[1], "g_ema": states[0]}, path)
    return path


@pytest.fixture(scope="module")
def factory(exported, tmp_path_factory):
    """The same, imported by the command and read back."""
    out = tmp_path_factory.mktemp("imported") / "factory.safetensors"
    with pytest.raises(SystemExit) as ended:
        main(["import-checkpoint", str(exported), "--out", str(out), "--domains", "a,b,c"])
    assert ended.value.code == 0
    return load_factory(out)


@pytest.mark.parametrize("case", range(4))
def test_resampling_equals_the_golden_vectors(golden, case):
    sizes = golden[f"op_case{case}"].tolist()
    mine = resample(golden["op_x"], golden["op_k"], up=tuple(sizes[:2]), down=tuple(sizes[2:4]), pad=tuple(sizes[4:]))
    torch.testing.assert_close(mine, golden[f"op_y{case}"], **TOLERANCE)


def test_latents_equal_the_golden_vectors(golden, factory):
    generator, conditions = factory.generator, (golden["z"], golden["zbin"], golden["domain"])
    with torch.no_grad():
        plain, embedded = (
            generator.mapping(*conditions),
            generator.mapping(*conditions, encoding=golden["enc"].expand(2, -1)),
        )
        zero = generator.mapping(*conditions, encoding=torch.zeros(2, 768))
    torch.testing.assert_close(plain, golden["w_noenc"], **TOLERANCE)
    torch.testing.assert_close(embedded, golden["w_enc"], **TOLERANCE)
    torch.testing.assert_close(zero, golden["w_noenc"], **TOLERANCE)  # an all-zero embedding counts as absent


def test_slices_equal_the_golden_vectors(golden, factory):
    asked = {"z": golden["z"], "domain": golden["domain"], "z_bin": golden["zbin"], "randomize_noise": False}
    torch.testing.assert_close(factory.generate(**asked), golden["img_noenc"], **TOLERANCE)
    torch.testing.assert_close(factory.generate(**asked, encoding=golden["enc"]), golden["img_enc"], **TOLERANCE)


def test_every_layer_takes_its_own_latent(golden, factory):
    generator = factory.generator
    w = golden["w_noenc"][:, None] * (1 + 0.1 * torch.arange(generator.n_latent))[None, :, None]
    style = Style(w, generator.input(2), golden["domain"])
    with torch.no_grad():
        image = generator.synthesise(style, generator.fixed_noise()).image
    torch.testing.assert_close(image, golden["img_wplus"], **TOLERANCE)


@pytest.mark.parametrize(
    ("expected", "images", "embedded"),
    [
        ("d_noenc", ["img_noenc"], False),
        ("d_enc", ["img_enc"], True),
        ("d_noenc_on_img_enc", ["img_enc"], False),
        ("d_batch8", ["img_noenc", "img_enc", "-img_noenc", "-img_enc"], False),
    ],
)
def test_scores_equal_the_golden_vectors(golden, factory, expected, images, embedded):
    signs = [-1 if name.startswith("-") else 1 for name in images]
    shown = torch.cat([sign * golden[name.lstrip("-")] for sign, name in zip(signs, images, strict=True)])
    domain, z_bin = golden["domain"].repeat(len(images)), golden["zbin"].repeat(len(images))
    scores = factory.discriminate(shown, domain=domain, z_bin=z_bin, encoding=golden["enc"] if embedded else None)
    torch.testing.assert_close(scores, golden[expected], **TOLERANCE)


def test_penalties_equal_the_golden_vectors(golden, factory):
    real = golden["img_noenc"].clone().requires_grad_(True)
    score = factory.discriminator(real, golden["zbin"], golden["domain"])
    torch.testing.assert_close(r1_penalty(score, real).mean(), golden["r1_noenc"], **TOLERANCE)
    generator = factory.generator
    w = golden["w_noenc"][:, None].repeat(1, generator.n_latent, 1).requires_grad_(True)
    image = generator.synthesise(Style(w, generator.input(2), golden["domain"]), generator.fixed_noise()).image
    torch.testing.assert_close(path_lengths(image, w, golden["path_noise"]), golden["path_lengths_noenc"], **TOLERANCE)


def test_augmentation_equals_the_golden_vectors(golden):
    moved = warp(golden["aug_x"], golden["aug_Ginv"])
    torch.testing.assert_close(moved, golden["aug_affine"], **TOLERANCE)
    colour = golden["aug_C"]
    gain, shift = colour[:, :3, :3].mean(dim=(1, 2)), colour[:, :3, 3].mean(dim=1)  # the published average
    full = moved * gain[:, None, None, None] + shift[:, None, None, None]
    torch.testing.assert_close(full, golden["aug_full"], **TOLERANCE)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 3), st.integers(4, 9), st.integers(4, 9))
def test_fast_resampling_equals_the_general_operator(channels, height, width):
    x = torch.randn(2, channels, height, 2 * width, dtype=torch.float64)
    kernel = FILTER.double()
    torch.testing.assert_close(blur(x, pad=2), resample(x, kernel, pad=(2,) * 4))
    torch.testing.assert_close(blur(x, pad=1, gain=4), resample(x, 4 * kernel, pad=(1,) * 4))
    torch.testing.assert_close(double(x), resample(x, 4 * kernel, up=(2, 2), pad=(2, 1, 2, 1)))
    even = x[:, :, : height // 2 * 2]
    torch.testing.assert_close(halve(even), resample(even, kernel, down=(2, 2), pad=(1,) * 4))


def test_resampling_equals_a_sum_written_out():
    x, kernel = torch.randn(1, 1, 3, 4).double(), torch.randn(2, 3).double()
    mine = resample(x, kernel, up=(2, 3), down=(2, 1), pad=(1, 2, 0, 1))
    spread = torch.zeros(3 * 3 + 0 + 1, 4 * 2 + 1 + 2).double()
    for row in range(3):
        for column in range(4):
            spread[3 * row, 2 * column + 1] = x[0, 0, row, column]
    for row in range(mine.shape[2]):
        for column in range(mine.shape[3]):
            total = sum(
                spread[row + i, 2 * column + j] * kernel[1 - i, 2 - j] for i in range(2) for j in range(3)
            )  # the kernel turned by half a turn
            assert mine[0, 0, row, column].item() == pytest.approx(total.item())


@pytest.mark.parametrize("demodulate", [True, False])
def test_modulated_upsampling_equals_one_transposed_kernel_per_sample(demodulate):
    layer = ModulatedConv(3, 5, 3, style_dim=4, demodulate=demodulate, upsample=True).double()
    x, w = torch.randn(2, 3, 6, 7).double(), torch.randn(2, 4).double()
    for sample, kernel in enumerate(kernels_of(layer, w)):
        wide = F.conv_transpose2d(x[sample : sample + 1], kernel.transpose(0, 1), stride=2)
        torch.testing.assert_close(layer(x, w)[sample], resample(wide, 4 * FILTER.double(), pad=(1,) * 4)[0])


@pytest.mark.parametrize(
    ("size", "multiplier", "generator", "discriminator"),
    [(8, 2, 10_823_717, 12_215_296), (256, 2, 30_348_980, 29_536_640), (512, 1, 25_176_407, 24_703_456)],
)
def test_published_sizes_have_the_published_number_of_parameters(size, multiplier, generator, discriminator):
    config = published_config(size=size)
    config = FactoryConfig.from_dict({**config.to_dict(), "channels": channel_widths(size, multiplier=multiplier)})
    with torch.device("meta"):
        networks = make_generator(config), make_discriminator(config)
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [generator, discriminator]


@pytest.mark.parametrize("size", [8, 16, 64, 1024])
def test_networks_of_any_size_fit_each_other(size):
    config = FactoryConfig.preset(
        "paper", tuple("abcde"), image_size=size, channels=channel_widths(size, limit=4), z_bins=7, latent_dim=6,
        encoding_dim=5, mapping_layers=2,
    )  # fmt: skip
    generator, discriminator = make_generator(config), make_discriminator(config)
    z_bin, domain, encoding = torch.tensor([0, 6, 3]), torch.tensor([4, 0, 2]), torch.randn(3, 5)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        noise = generator.draw_noise(3, rng)
        image = generator(torch.randn(3, 6), z_bin, domain, noise=noise, encoding=encoding)
        assert image.shape == (3, 1, size, size)
        assert discriminator(image, z_bin, domain, encoding=encoding).shape == (3, 1)


def test_style_mixing_takes_coarse_layers_from_the_first_latent(golden, factory):
    generator = factory.generator
    with torch.no_grad():
        first, second = (
            generator.style_of(z, golden["zbin"], golden["domain"]) for z in (golden["z"], golden["z"].flip(0))
        )
    mixed = first.mixed_with(second, 2)
    assert torch.equal(mixed.w[:, :2], first.w[:, :2])
    assert torch.equal(mixed.w[:, 2:], second.w[:, 2:])


def save(folder, content):
    torch.save(content, folder / "file.pt")
    return folder / "file.pt"


def test_federated_and_phase_two_files_are_recognised(states, exported, tmp_path):
    g, d = states
    federated = {f"generator.{k}": v for k, v in g.items()} | {f"discriminator.{k}": v for k, v in d.items()}
    federated |= {f"g_ema.{k}": v for k, v in g.items()}
    made = import_checkpoint(save(tmp_path, federated))
    assert made.facts.imported == "federated model"
    assert made.discriminator is not None
    container = {"state_dict": {f"module.decoder.{k}": v for k, v in g.items()} | {"module.encoder.x": torch.ones(1)}}
    branch = import_checkpoint(save(tmp_path, container))
    assert branch.facts.imported == "generator of a phase-two checkpoint"
    assert branch.discriminator is None
    with pytest.raises(UsageError, match="discriminator is None"):
        branch.discriminate(torch.zeros(1, 1, 8, 8), 0, 0)
    whole = import_checkpoint(exported)
    for made_state in (made.generator.state_dict(), branch.generator.state_dict()):
        assert all(torch.equal(v, made_state[k]) for k, v in whole.generator.state_dict().items())


def test_the_older_variant_without_embeddings_is_recognised(tmp_path):
    config = FactoryConfig.from_dict({**published_config(encoding_dim=0).to_dict(), "domains": ("a", "b")})
    g, d = filled_states(config)
    extras = {"g_optim": {"state": {}}, "d_optim": {"state": {}}, "args": argparse.Namespace(size=8), "ada_aug_p": 0.1}
    made = import_checkpoint(save(tmp_path, {"g": g, "d": d, "g_ema": g, **extras}))
    assert made.facts.imported == "older factory without image embeddings"
    assert made.config.encoding_dim == 0
    assert made.config.domains == ("domain0", "domain1")
    with pytest.raises(UsageError, match="encoding_dim is 0"):
        made.generate(torch.zeros(1, 512), 0, 0, encoding=torch.zeros(1, 768))


class Runs:
    """Would execute a command when unpickled without care."""

    def __reduce__(self):
        return print, ("executed",)


def test_a_file_that_would_execute_code_is_refused(tmp_path, capsys):
    torch.save({"g_ema": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(CheckpointError, match="could execute code"):
        import_checkpoint(tmp_path / "evil.pt")
    (tmp_path / "old.pt").write_bytes(pickle.dumps({"g_ema": Runs()}, protocol=2))
    with pytest.raises(CheckpointError):
        import_checkpoint(tmp_path / "old.pt")
    assert "executed" not in capsys.readouterr().out


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda g: without(g, "input.input"), "lacks the generator's 'input.input'"),
        (lambda g: without(g, "conv1.conv.weight"), "conv1.conv.weight"),
        (lambda g: {**g, "surplus": torch.ones(1)}, "surplus"),
        (lambda g: {**g, "to_rgb1.bias": torch.full((1, 1, 1, 1), float("nan"))}, "NaN"),
        (lambda g: {**g, "to_rgbs.0.upsample.kernel": torch.ones(4, 4)}, "is not the resampling filter"),
        (lambda g: {}, "lacks"),
    ],
)
def test_the_error_for_a_checkpoint_that_does_not_fit_names_the_tensor(states, tmp_path, change, message):
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(save(tmp_path, {"g_ema": change(states[0])}))


def test_foreign_and_damaged_files_are_refused(exported, tmp_path):
    with pytest.raises(CheckpointError, match="not a RobustMedSeg checkpoint"):
        import_checkpoint(save(tmp_path, {"weights": torch.ones(2)}))
    with pytest.raises(CheckpointError, match="holds a list"):
        import_checkpoint(save(tmp_path, [torch.ones(2)]))
    (tmp_path / "cut.pt").write_bytes(exported.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a readable"):
        import_checkpoint(tmp_path / "cut.pt")
    with pytest.raises(UsageError, match="no such file"):
        import_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(UsageError, match="3 domains"):
        import_checkpoint(exported, domains=("a", "b"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"z": torch.zeros(2, 5)}, "expected"),
        ({"domain": "x"}, "unknown domain"),
        ({"domain": 3}, "choose from 0 to 2"),
        ({"domain": [0, 1, 2]}, "2 of them"),
        ({"z_bin": 29}, "choose from 0 to 28"),
        ({"z_bin": 0.5}, "whole number"),
        ({"encoding": torch.zeros(1, 5)}, "768"),
        ({"encoding": torch.zeros(3, 768)}, "3 rows"),
    ],
)
def test_a_wrong_request_is_refused_with_the_valid_choices(factory, asked, message):
    request = {"z": torch.zeros(2, 512), "domain": "a", "z_bin": 0, **asked}
    with pytest.raises((UsageError, ConfigError), match=message):
        factory.generate(**request)


def test_domains_can_be_chosen_by_name(factory):
    z = torch.randn(2, 512)
    by_name = factory.generate(z, ["c", "a"], 5, randomize_noise=False)
    torch.testing.assert_close(by_name, factory.generate(z, [2, 0], 5, randomize_noise=False))
    assert torch.equal(factory.generate(z, "a", 5, seed=1), factory.generate(z, "a", 5, seed=1))
    assert not torch.equal(factory.generate(z, "a", 5, seed=1), factory.generate(z, "a", 5, seed=2))


def test_a_factory_whose_weights_were_exchanged_is_refused(factory, tmp_path):
    factory.save(tmp_path / "f.safetensors")
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "f.safetensors")
    tensors["g_ema.input.input"] += 1
    save_file(tensors, tmp_path / "g.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match="not those that its card"):
        load_factory(tmp_path / "g.safetensors")
