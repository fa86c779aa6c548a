"""Frozen image encoders: the loading code of real weights, on small models made here."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fedfactory.cli import main
from fedfactory.errors import CheckpointError, FedFactoryError, StoreError, UsageError
from fedfactory.generative.image_encoder import load_image_encoder, read_embedding
from fedfactory.node.store.derived.embedding import embed_store, load_guide, site_embedding
from helpers import CLIP_WIDTH, write_clip
from safetensors.torch import save_file


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small randomly initialised CLIP model: its folder with a configuration, and the model."""
    folder = tmp_path_factory.mktemp("clip")
    model = write_clip(folder)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / "weights.pt")
    save_file({k[7:]: v for k, v in state.items() if k.startswith("visual.")}, folder / "tower.safetensors")
    return folder, model


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt", "tower.safetensors"])
def test_an_encoder_gives_the_models_own_unit_embeddings(clip, file):
    folder, model = clip
    encoder = load_image_encoder(f"local-dir:{folder}", folder / file)
    images = torch.rand(3, 1, 48, 48) * 2.4 - 1.2  # beyond [-1, 1]: nothing is clamped
    pixels = F.interpolate((images.repeat(1, 3, 1, 1) + 1) / 2, size=(32, 32), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    with torch.no_grad():
        expected = model.encode_image((pixels - mean) / std, normalize=True)
        embedded = encoder(images)
    torch.testing.assert_close(embedded, expected)
    assert encoder.width == CLIP_WIDTH
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_three_channels_are_colours_and_any_other_number_is_grey(clip):
    folder, _ = clip
    encoder = load_image_encoder(f"local-dir:{folder}", folder / "weights.pt")
    images = torch.rand(2, 4, 32, 32) * 2 - 1
    colours = images[:, :3]
    with torch.no_grad():
        grey = encoder(images.mean(dim=1, keepdim=True))
        torch.testing.assert_close(encoder(images), grey)
        torch.testing.assert_close(encoder(grey_as_colour := images.mean(dim=1, keepdim=True).repeat(1, 3, 1, 1)), grey)
        assert not torch.allclose(encoder(colours), encoder(colours.flip(1)), atol=1e-4)  # red and blue exchanged
        assert not torch.allclose(encoder(colours), encoder(grey_as_colour), atol=1e-4)


def test_gradients_reach_the_slices(clip):
    folder, _ = clip
    images = torch.zeros(1, 1, 32, 32, requires_grad=True)
    load_image_encoder(f"local-dir:{folder}", folder / "weights.pt")(images)[0, 0].backward()
    assert images.grad.abs().sum() > 0


def test_a_timm_network_is_an_encoder_too(tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet10t", pretrained=False, num_classes=5).eval()
    save_file(model.state_dict(), tmp_path / "r.safetensors")
    encoder = load_image_encoder("timm:resnet10t", tmp_path / "r.safetensors")
    assert encoder.width == model.num_features
    torch.testing.assert_close(encoder(torch.zeros(2, 1, 64, 64)).norm(dim=1), torch.ones(2))


def test_the_mean_embedding_does_not_depend_on_the_batches(clip):
    folder, _ = clip
    encoder = load_image_encoder(f"local-dir:{folder}", folder / "weights.pt")
    images = torch.randn(7, 1, 32, 32)
    with torch.no_grad():
        expected = encoder(images).mean(dim=0)
    torch.testing.assert_close(encoder.mean_embedding(images.split(3)), expected)
    assert expected.norm() < 1
    with pytest.raises(UsageError, match="batches hold 0 slices"):
        encoder.mean_embedding([])


class Runs:
    def __reduce__(self):
        return print, ("executed",)


def test_weights_that_do_not_fit_are_refused(clip, tmp_path, capsys):
    folder, model = clip
    name = f"local-dir:{folder}"
    state = {k: v.clone() for k, v in model.visual.state_dict().items()}
    save_file({**state, "proj": torch.zeros(64, 5)}, tmp_path / "shape.safetensors")
    save_file({k: v for k, v in state.items() if k != "proj"}, tmp_path / "lacks.safetensors")
    torch.save(Runs(), tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("weights")
    for file, message in (
        ("shape.safetensors", "other shape"),
        ("lacks.safetensors", "lacks"),
        ("evil.pt", "could execute code|not readable"),
        ("text.pt", "could execute code|not readable"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_image_encoder(name, tmp_path / file)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(UsageError, match="no such file"):
        load_image_encoder(name, tmp_path / "nothing.pt")
    for wrong in ("no-such-model", "hf-hub:someone/model", "timm:no_such_model", f"local-dir:{tmp_path}"):
        with pytest.raises(UsageError):
            load_image_encoder(wrong, folder / "weights.pt")


def test_a_site_embeds_its_store_once_and_finds_it_again(clip, store):
    folder, _ = clip
    words = ["embed", store.path, "--encoder", f"local-dir:{folder}", "--weights", folder / "weights.safetensors"]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in words])
    assert ended.value.code == 0
    encoder = load_image_encoder(f"local-dir:{folder}", folder / "weights.safetensors")
    images = torch.from_numpy(np.asarray(store.images, np.float32))
    mean = site_embedding(store, CLIP_WIDTH)
    torch.testing.assert_close(mean, encoder.mean_embedding([images]), atol=1e-5, rtol=0)
    guide = load_guide(store)
    torch.testing.assert_close(guide.mean, mean)
    torch.testing.assert_close(guide.embed(images[:2]), encoder(images[:2]))


def test_a_store_without_a_fitting_embedding_is_refused(clip, store, tmp_path):
    folder, model = clip
    with pytest.raises(StoreError, match="no mean embedding"):
        site_embedding(store, CLIP_WIDTH)
    with pytest.raises(StoreError, match="no usable image encoder"):
        load_guide(store)
    weights = tmp_path / "own.safetensors"
    save_file({k: v.clone() for k, v in model.visual.state_dict().items()}, weights)
    embed_store(store.path, encoder=f"local-dir:{folder}", weights=weights)
    with pytest.raises(StoreError, match="needs 768"):
        site_embedding(store, 768)
    save_file({k: v + 1 for k, v in model.visual.state_dict().items()}, weights)
    with pytest.raises(StoreError, match="has changed"):
        load_guide(store)


@pytest.mark.parametrize(
    "array", [np.zeros((2, 3)), np.zeros(3, dtype=int), np.array([np.nan]), np.array([{"a": 1}], dtype=object)]
)
def test_a_mean_embedding_file_is_one_row_of_finite_numbers(array, tmp_path):
    np.save(tmp_path / "m.npy", array, allow_pickle=True)
    with pytest.raises(FedFactoryError):
        read_embedding(tmp_path / "m.npy")
    np.save(tmp_path / "good.npy", np.ones((1, 3), np.float32))
    assert read_embedding(tmp_path / "good.npy").shape == (3,)
