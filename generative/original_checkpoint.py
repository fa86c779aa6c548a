"""Reading checkpoints of the published program (RobustMedSeg) without executing anything in them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from ..common.weights_file import load_strictly
from ..errors import CheckpointError, ConfigError, UsageError
from .config import PRESETS, FactoryConfig
from .factory_file import TrainedFactory
from .networks.build import make_discriminator, make_generator
from .networks.resampling import TAPS

PUBLISHED_Z_BINS = 29
DECODER = "module.decoder."  # where phase two keeps its generator
FEDERATED = {"g": "generator.", "d": "discriminator.", "g_ema": "g_ema."}


@dataclass(frozen=True)
class OriginalCheckpoint:
    """Weights of a published file, by network; `d` is empty where the file holds no discriminator.

    Attributes:
        variant: what kind of file it was, for people.
    """

    variant: str
    g: dict[str, Tensor]
    d: dict[str, Tensor]
    g_ema: dict[str, Tensor]


def import_checkpoint(
    path: str | Path,
    *,
    domains: tuple[str, ...] = (),
    z_bins: int = PUBLISHED_Z_BINS,
    spacing: float = 1.0,
    height: float = 145.0,
) -> TrainedFactory:
    """A published file as a factory.

    Args:
        path: an exported {"g", "d", "g_ema"}, a federated model, a phase-two checkpoint or the older two-domain file.
        domains: names by index; default domain0, domain1, ...
        z_bins: height bins; the published program always had 29.
        spacing, height: millimetres per pixel and from lowest to highest bin, which the published files do not know.

    Returns: the factory, set up to be continued as the published program trains (compatibility "published").

    Raises: UsageError if there is no such file or the number of domains does not fit, CheckpointError if it is
        damaged, would execute code, or is not such a checkpoint.
    """
    path = Path(path)
    original = _recognise(_read(path), path)
    config = _describe(original.g_ema, domains, z_bins, path)
    generator = make_generator(config)
    load_strictly(make_generator(config), latest := _ours(original.g, 4.0, path), path)
    load_strictly(generator, _ours(original.g_ema, 4.0, path), path)
    discriminator = None
    if original.d:
        discriminator = make_discriminator(config).eval()
        load_strictly(discriminator, _ours(original.d, 1.0, path), path)
    facts = {"imported": original.variant, "geometry": "spacing and height were given at import"}
    return TrainedFactory(generator.eval(), latest, spacing, height, {}, facts, discriminator)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        # The older variant stores its command line in a Namespace, which only holds attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" (it asks for {found.group(1)})" if found else ""
        raise CheckpointError(f"{path}: refused, it holds more than weights{what} and could execute code") from None
    except Exception as error:  # a damaged archive raises many types
        raise CheckpointError(f"{path}: not a readable PyTorch file ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    return content


def _recognise(content: dict[str, Any], path: Path) -> OriginalCheckpoint:
    if "g_ema" in content and isinstance(content["g_ema"], dict):
        ema = _tensors(content["g_ema"])
        g, d = _tensors(content.get("g", ema)), _tensors(content.get("d", {}))
        embeds = any(name.startswith("encoding_embed.") for name in ema)
        variant = "exported factory" if embeds else "older factory without image embeddings"
        return OriginalCheckpoint(variant, g, d, ema)
    if isinstance(content.get("state_dict"), dict):
        decoder = _with_prefix(content["state_dict"], DECODER)
        if decoder:
            return OriginalCheckpoint("generator of a phase-two checkpoint", decoder, {}, decoder)
    federated = {name: _with_prefix(content, prefix) for name, prefix in FEDERATED.items()}
    if federated["g_ema"]:
        return OriginalCheckpoint(
            "federated model", federated["g"] or federated["g_ema"], federated["d"], federated["g_ema"]
        )
    known = "g_ema, state_dict with module.decoder., or generator., discriminator. and g_ema. prefixes"
    raise CheckpointError(f"{path}: not a RobustMedSeg checkpoint; found {sorted(map(str, content))[:3]}, know {known}")


def _tensors(state: Any) -> dict[str, Tensor]:
    return (
        {name: value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    )


def _with_prefix(state: dict[str, Any], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in _tensors(state).items() if name.startswith(prefix)}


def _describe(state: dict[str, Tensor], domains: tuple[str, ...], z_bins: int, path: Path) -> FactoryConfig:
    """Everything about the networks is in the shapes of their tensors, but how conditions divide into two."""
    try:
        blocks = sum(bool(re.fullmatch(r"to_rgbs\.\d+\.bias", name)) for name in state)
        channels = [state["input.input"].shape[1]]
        channels += [state[f"convs.{2 * block}.conv.weight"].shape[1] for block in range(blocks)]
        known = state["label_embed.weight"].shape[1] - z_bins
        embedding = state.get("encoding_embed.0.weight")
        settings = {
            "image_size": state["input.input"].shape[-1] << blocks,
            "start_size": state["input.input"].shape[-1],
            "channels": tuple(channels),
            "latent_dim": state["style.0.weight"].shape[0],
            "mapping_layers": sum(bool(re.fullmatch(r"style\.\d+\.weight", name)) for name in state),
            "encoding_dim": 0 if embedding is None else embedding.shape[1],
        }
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"{path}: lacks the generator's {error}") from None
    if known < 1:
        raise UsageError(f"{path}: has {known + z_bins} conditions, fewer than {z_bins} height bins and a domain")
    domains = domains or tuple(f"domain{number}" for number in range(known))
    if len(domains) != known:
        raise UsageError(f"{path}: was trained with {known} domains and {z_bins} height bins; {len(domains)} named")
    try:
        return FactoryConfig.from_dict(
            {**PRESETS["paper"], **settings, "domains": domains, "z_bins": z_bins, "compatibility": "published"}
        )
    except ConfigError as error:
        raise CheckpointError(f"{path}: not networks of this kind ({error})") from None


def _ours(state: dict[str, Tensor], gain: float, path: Path) -> dict[str, Tensor]:
    """Without the constant filters, which are checked, and the leading 1 of modulated weights."""
    taps = torch.tensor(TAPS)
    filter_ = torch.outer(taps, taps) * (gain / taps.sum() ** 2)
    weights = {}
    for name, tensor in state.items():
        if name.endswith(".kernel"):
            if tensor.shape != filter_.shape or not torch.allclose(tensor.float(), filter_, atol=1e-5):
                raise CheckpointError(f"{path}: {name} is another resampling filter than (1, 3, 3, 1)")
            continue
        modulated = tensor.ndim == 5 and tensor.shape[0] == 1
        weights[name] = (tensor[0] if modulated else tensor).to(torch.float32)
    return weights
