"""Weights and their card in one safetensors file: no pickles, written atomically, loaded strictly."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import CheckpointError, UsageError
from .files import atomic_file, write_json

CARD = "fedfactory"  # the metadata entry that holds the card


def write_weights(path: str | Path, tensors: dict[str, Tensor], card: dict[str, Any]) -> None:
    """Write tensors with `card` inside the file, and a readable copy of the card beside it (`.json`).

    Args:
        tensors: name to tensor. card: JSON-able, with "kind" naming what the file is; versions and the tensors'
            SHA-256 are added.
    """
    from safetensors import SafetensorError  # the networks must import without it
    from safetensors.torch import save_file

    path = Path(path)
    card = {**card, "made_by": f"fedfactory {__version__}", "torch": torch.__version__}
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    card["sha256"] = fingerprint(plain)
    with atomic_file(path) as temporary:
        try:
            save_file(plain, temporary, metadata={CARD: json.dumps(card)})
        except SafetensorError as error:  # a full disk, for instance
            raise OSError(f"{path}: {error}") from None
    write_json(path.with_suffix(".json"), card)


def read_weights(path: str | Path, *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and card of a file of the given kind.

    Raises: UsageError if there is no such file; CheckpointError if it is truncated, foreign or of another kind.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            card = json.loads((file.metadata() or {}).get(CARD, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors' own error type is private; any of them means the same here
        raise CheckpointError(f"{path}: not a readable safetensors file ({str(error)[:120]})") from None
    if not isinstance(card, dict) or "kind" not in card:
        raise CheckpointError(f"{path}: was not written by fedfactory (it has no card)")
    if card["kind"] != kind:
        raise CheckpointError(f"{path}: is a {card['kind']}, expected a {kind}")
    if fingerprint(tensors) != card.get("sha256"):
        raise CheckpointError(f"{path}: its weights are not those that its card was written for")
    return tensors, card


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values, whatever the order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def load_strictly(network: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Raises: CheckpointError that names what is missing, unexpected or misshapen."""
    own = network.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if missing or extra or wrong:
        raise CheckpointError(
            f"{path}: weights do not fit the card: lacks {missing[:3]}, adds {extra[:3]}, other shape {wrong[:3]}"
        )
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(f"{path}: NaN or infinite values in {bad[:3]}")
    network.load_state_dict(weights)
