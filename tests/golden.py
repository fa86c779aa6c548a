"""Networks filled by the rule of the golden vectors, and files as the published program writes them."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from fedfactory.generative import FactoryConfig, make_discriminator, make_generator
from fedfactory.generative.config import channel_widths
from torch import Tensor

FILTER = torch.outer(*[torch.tensor([1.0, 3.0, 3.0, 1.0])] * 2) / 64


def golden_vectors() -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "golden_factory.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


def published_config(size: int = 8, **changes) -> FactoryConfig:
    return FactoryConfig.preset("paper", ("a", "b", "c"), image_size=size, channels=channel_widths(size), **changes)


def filled_states(config: FactoryConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Generator and discriminator state in the published format: filters included, modulated weights with a 1."""
    generator, discriminator = make_generator(config), make_discriminator(config)
    state = {name: tensor for name, tensor in generator.state_dict().items()}
    for name, module in generator.named_modules():
        if type(module).__name__ == "ModulatedConv":
            state[f"{name}.weight"] = state[f"{name}.weight"][None]
            if module.upsample:
                state[f"{name}.blur.kernel"] = 4 * FILTER
    for block in range(len(generator.to_rgbs)):
        state[f"to_rgbs.{block}.upsample.kernel"] = 4 * FILTER
    scores = {name: tensor for name, tensor in discriminator.state_dict().items()}
    for block in range(1, len(discriminator.convs)):
        scores[f"convs.{block}.conv2.0.kernel"] = scores[f"convs.{block}.skip.0.kernel"] = FILTER
    return {k: fill("g." + k, v) for k, v in state.items()}, {k: fill("d." + k, v) for k, v in scores.items()}


def fill(key: str, tensor: Tensor) -> Tensor:
    first, last = key.split(".")[1], key.split(".")[-1]
    if last == "kernel":
        return tensor
    alpha, beta = 0.0, 1.0
    if first == "style":
        beta = 100.0 if last == "weight" else 10.0
    elif key.endswith("modulation.bias"):
        alpha, beta = 1.0, 0.1
    elif last == "bias" or key.endswith("noise.weight"):
        beta = 0.1
    drawn = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(tensor.numel()).astype(np.float32)
    return torch.from_numpy(np.float32(alpha) + np.float32(beta) * drawn).reshape(tensor.shape)
