"""Weights and their card in one safetensors file: no pickles, written atomically, loaded strictly."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import CheckpointError
from .files import atomic_file, require_weights, write_json
from .json_text import parse_json

CARD = "fedfactory"  # the metadata entry that holds the card


def write_weights(path: str | Path, tensors: dict[str, Tensor], card: Mapping[str, object]) -> None:
    """Write a state dict with a card inside the file, and a readable copy of the card beside it (`.json`).

    Args:
        path: the safetensors file.
        tensors: state dict: tensors of any shape and type by name.
        card: JSON-able description; "kind" names the kind of file. Versions and the SHA-256 of the tensors are added.

    Raises: OSError if the file cannot be written.
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
            raise OSError(f"{path}: cannot be written ({error}); check the disk") from None
    write_json(path.with_suffix(".json"), card)


# What PyTorch raises for numbers in a card of which no network can be made: too large, or of a type of their own.
IMPOSSIBLE = (ArithmeticError, MemoryError, RuntimeError, TypeError, ValueError)


def read_card(path: str | Path, *, kind: str | tuple[str, ...]) -> dict[str, Any]:
    """The card of a file that `write_weights` wrote, without its weights; see `read_weights`."""
    path, kinds = Path(path), (kind,) if isinstance(kind, str) else kind
    wanted = " or ".join(kinds)
    require_weights(path, *kinds)
    with _opened(path) as file:
        card = parse_json((file.metadata() or {}).get(CARD, "null"))
    if not isinstance(card, dict) or "kind" not in card:
        raise CheckpointError(f"{path}: has no card; give a {wanted} written by fedfactory")
    if card["kind"] not in kinds:
        raise CheckpointError(f"{path}: is a {card['kind']}, expected a {wanted}")
    return card


def read_weights(path: str | Path, *, kind: str | tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `write_weights` wrote.

    Args:
        path: the safetensors file.
        kind: kind of file that is expected, or several of which any will do.

    Returns: the state dict (tensors on the CPU by name) and the card.
    Raises: UsageError if there is no such file; CheckpointError if it is truncated, foreign or of another kind.
    """
    card = read_card(path, kind=kind)
    with _opened(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if fingerprint(tensors) != card.get("sha256"):
        raise CheckpointError(f"{path}: its weights are not those that its card was written for; copy it again")
    return tensors, card


@contextmanager
def _opened(path: str | Path) -> Iterator[Any]:
    """A safetensors file. Raises: CheckpointError for whatever goes wrong while it is read."""
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except Exception as error:  # safetensors' own error type is private; any of them means the same here
        raise CheckpointError(f"{path}: not a readable safetensors file ({str(error)[:120]}); copy it again") from None


def refuse_packed(path: str | Path) -> None:
    """Refuse an archive of PyTorch whose entries are packed, which PyTorch never does: they may become anything.

    Raises: CheckpointError. Files of other kinds, and damaged ones, are left to their reader.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError, LookupError, OverflowError, NotImplementedError):
        return
    if packed:
        raise CheckpointError(f"{path}: has packed entries, such as {packed[0][:80]}; save it again with PyTorch")


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """SHA-256, in hexadecimal, of a state dict: its names, types, shapes and values, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(memoryview(tensor.flatten().view(torch.uint8).numpy()))
    return digest.hexdigest()


def load_strictly(network: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict that must fit the network exactly.

    Args:
        network: what is loaded into.
        weights: state dict: tensors by name.
        path: the file it was read from, for messages.

    Raises: CheckpointError that names missing and unexpected entries, other shapes, and values that are not finite.
    """
    refuse_misfit(network, weights, path)
    bad = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise CheckpointError(f"{path}: NaN or infinite values in {bad[:3]}; train again, with a lower learning rate")
    network.load_state_dict(weights)


def refuse_misfit(network: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    """Raises: CheckpointError that names missing and unexpected entries, and other shapes, of a state dict.

    Args:
        network: that the weights must fit; a sketch of it will do, see `sketches.sketch`.
        weights: state dict: tensors by name.
        path: the file it was read from, for messages.
    """
    own = network.state_dict()
    missing, extra = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    wrong = [n for n in own.keys() & weights.keys() if own[n].shape != weights[n].shape]
    if missing or extra or wrong:
        raise CheckpointError(
            f"{path}: weights do not fit the card: lacks {missing[:3]}, adds {extra[:3]}, other shape {wrong[:3]}; "
            "use the file as it was written"
        )
