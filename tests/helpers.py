"""Volumes, sites and networks for the tests, made on the spot."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.generative import FactoryConfig
from fedfactory.slicing import SliceFormat
from fedfactory.volumes import Volume, write_volume
from safetensors.torch import save_file

DOMAINS = ("bright", "dark")


def ball_volume(shape=(20, 24, 8), radius=7.0, spacing=(3.0, 3.0, 5.0), seed=0) -> tuple[Volume, Volume]:
    """A bright ball (label 1) with a brighter core (label 2) in noise; image and label map."""
    rng = np.random.default_rng(seed)
    centre = (np.array(shape) - 1) / 2 + rng.uniform(-1, 1, 3)
    places = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm((places - centre) * [1, 1, 1.5], axis=-1)
    label = (distance < radius).astype(np.uint8) + (distance < radius / 2)
    image = np.array([10.0, 60.0, 100.0], np.float32)[label] + rng.normal(0, 2, shape).astype(np.float32)
    return Volume(image, np.diag([*spacing, 1.0])), Volume(label.astype(np.uint8), np.diag([*spacing, 1.0]))


def untrained_segmenter() -> Segmenter:
    """A segmenter of three classes for slices of 16 px, with random weights."""
    fmt = SliceFormat(size=16, spacing=4.5, window=(-1.0, 2.0), z_bins=4)
    return Segmenter.from_card({"classes": 3, "config": {"network": "unet"}, "format": fmt.to_dict()})


def write_site(folder, cases=3, **options) -> None:
    """Cases in the medical-folder layout."""
    for number in range(cases):
        image, label = ball_volume(seed=number, **options)
        write_volume(folder / f"case{number}" / "image" / "scan.nii.gz", image)
        write_volume(folder / f"case{number}" / "label" / "mask.nii.gz", label)


def with_head(config: FactoryConfig, head: str) -> FactoryConfig:
    """The same small factory with the published networks, which start at 4 x 4."""
    if head == config.head:
        return config
    return replace(config, head=head, start_size=4, channels=(config.channels[0], *config.channels))


CLIP_WIDTH = 12


def write_clip(folder: Path):
    """A small randomly initialised CLIP model in a folder, with its configuration, as open_clip reads it."""
    import open_clip

    config = {
        "embed_dim": CLIP_WIDTH,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    return model
