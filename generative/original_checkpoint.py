"""Reading checkpoints of the published program (RobustMedSeg) without executing anything in them."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor

from ..common.files import require_file
from ..common.weights_file import load_strictly, refuse_packed
from ..errors import CheckpointError, ConfigError, UsageError
from .config import PRESETS, FactoryConfig
from .factory_facts import FactoryFacts
from .factory_file import TrainedFactory
from .networks.build import make_discriminator, make_generator
from .networks.resampling import TAPS

PUBLISHED_Z_BINS = 29
DECODER = "module.decoder."  # where phase two keeps its generator
FEDERATED = {"g": "generator.", "d": "discriminator.", "g_ema": "g_ema."}


@dataclass(frozen=True, kw_only=True)
class OriginalCheckpoint:
    """State dicts of the networks in a published file.

    Attributes:
        variant: kind of file, in words.
        g: the generator.
        d: the discriminator; empty if the file holds none.
        g_ema: the generator's moving average.
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
    """A factory from a file of the published program.

    Args:
        path: an exported {"g", "d", "g_ema"}, a federated model, a phase-two checkpoint or the older two-domain
            file.
        domains: names by index; default domain0, domain1, ...
        z_bins: number of height bins; the published program always had 29.
        spacing: millimetres per pixel, which the published files do not hold.
        height: millimetres from the lowest to the highest bin, which the published files do not hold.

    Returns: the factory; its configuration continues training as the published program does (compatibility
        "published").
    Raises: UsageError if there is no such file or the number of domains does not fit, CheckpointError if it is
        damaged, would execute code, or is not such a checkpoint.
    """
    path = Path(path)
    original = _recognise(_read(path), path)
    config = _config_of(original.g_ema, domains, path=path, z_bins=z_bins)
    generator = make_generator(config)
    load_strictly(make_generator(config), latest := _renamed(original.g, 4.0, path), path)
    load_strictly(generator, _renamed(original.g_ema, 4.0, path), path)
    discriminator = None
    if original.d:
        discriminator = make_discriminator(config).eval()
        load_strictly(discriminator, _renamed(original.d, 1.0, path), path)
    return TrainedFactory(
        generator=generator.eval(),
        latest=latest,
        spacing=spacing,
        height=height,
        facts=FactoryFacts(imported=original.variant, geometry="spacing and height were given at import"),
        discriminator=discriminator,
    )


def _read(path: Path) -> dict[str, object]:
    """Content of a PyTorch file of plain containers and tensors."""
    require_file(path, "give a checkpoint of the published program")
    refuse_packed(path)
    try:
        # The older variant stores its command line in a Namespace, which only holds attributes.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({found.group(1)})" if found else ""
        raise CheckpointError(
            f"{path}: refused, because it holds more than weights{what} and could execute code; "
            "save its state dicts alone"
        ) from None
    except Exception as error:  # a damaged archive raises many types
        raise CheckpointError(
            f"{path}: not a readable PyTorch file ({str(error).splitlines()[0][:120]}); copy it again"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights")
    return content


def _recognise(content: dict[str, object], path: Path) -> OriginalCheckpoint:
    """The networks of a file, by the names of its entries. Raises CheckpointError for any other content."""
    if "g_ema" in content and isinstance(content["g_ema"], dict):
        ema = _tensors(content["g_ema"])
        g, d = _tensors(content.get("g", ema)), _tensors(content.get("d", {}))
        embeds = any(name.startswith("encoding_embed.") for name in ema)
        variant = "exported factory" if embeds else "older factory without image embeddings"
        return OriginalCheckpoint(variant=variant, g=g, d=d, g_ema=ema)
    if isinstance(content.get("state_dict"), dict):
        decoder = _with_prefix(content["state_dict"], DECODER)
        if decoder:
            return OriginalCheckpoint(variant="generator of a phase-two checkpoint", g=decoder, d={}, g_ema=decoder)
    federated = {name: _with_prefix(content, prefix) for name, prefix in FEDERATED.items()}
    if federated["g_ema"]:
        return OriginalCheckpoint(
            variant="federated model",
            g=federated["g"] or federated["g_ema"],
            d=federated["d"],
            g_ema=federated["g_ema"],
        )
    raise CheckpointError(
        f"{path}: not a RobustMedSeg checkpoint; found {sorted(map(str, content))[:3]}, expected g_ema, state_dict "
        "with module.decoder., or generator., discriminator. and g_ema. prefixes"
    )


def _tensors(state: object) -> dict[str, Tensor]:
    """The tensors of a state dict, by name; empty for anything else."""
    return (
        {name: value for name, value in state.items() if isinstance(value, Tensor)} if isinstance(state, dict) else {}
    )


def _with_prefix(state: dict[str, object], prefix: str) -> dict[str, Tensor]:
    """The tensors of a state dict whose names start with `prefix`, named without it."""
    return {name[len(prefix) :]: value for name, value in _tensors(state).items() if name.startswith(prefix)}


def _config_of(state: dict[str, Tensor], domains: tuple[str, ...], *, path: Path, z_bins: int) -> FactoryConfig:
    """The configuration of a generator, read from the shapes in its state dict.

    Only how many of the conditions are height bins and how many are domains is not in the shapes.
    """
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
        raise CheckpointError(f"{path}: lacks the generator's {error}; give the whole checkpoint") from None
    if known < 1:
        raise UsageError(f"{path}: has {known + z_bins} conditions; z_bins is {z_bins} and must be smaller")
    domains = domains or tuple(f"domain{number}" for number in range(known))
    if len(domains) != known:
        raise UsageError(
            f"{path}: was trained with {known} domains and {z_bins} height bins; {len(domains)} are named, name all"
        )
    try:
        return FactoryConfig.from_dict(
            {**PRESETS["paper"], **settings, "domains": domains, "z_bins": z_bins, "compatibility": "published"}
        )
    except ConfigError as error:
        raise CheckpointError(
            f"{path}: its networks are not supported ({error}); expected those of RobustMedSeg"
        ) from None


def _renamed(state: dict[str, Tensor], gain: float, path: Path) -> dict[str, Tensor]:
    """The state dict for the networks of this package, as float32.

    The constant resampling filters are checked and left out; modulated weights lose their leading axis of length 1.
    """
    taps = torch.tensor(TAPS)
    filter_ = torch.outer(taps, taps) * (gain / taps.sum() ** 2)
    weights = {}
    for name, tensor in state.items():
        if name.endswith(".kernel"):
            if tensor.shape != filter_.shape or not torch.allclose(tensor.float(), filter_, atol=1e-5):
                raise CheckpointError(
                    f"{path}: {name} is not the resampling filter (1, 3, 3, 1); only that filter can be used"
                )
            continue
        modulated = tensor.ndim == 5 and tensor.shape[0] == 1
        weights[name] = (tensor[0] if modulated else tensor).to(torch.float32)
    return weights
