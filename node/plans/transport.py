"""How weights are sent from a site: as they are, or as their change in the round, in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads TRANSPORTS without PyTorch
    from torch import Tensor

TRANSPORTS = ("float32", "float16")
CHANGE = "change."  # prefix of the names of tensors that are changes of weights


def pack(weights: Mapping[str, Tensor], before: Mapping[str, Tensor], transport: str) -> dict[str, Tensor]:
    """What a site sends.

    With "float16", the *changes* of the round are sent instead of the weights. Changes are small: their error is at
    most 2**-11 of a change (plus 2**-25), while half-precision weights would lose 2**-11 of the weight itself.

    Args:
        weights: name to tensor of any shape, after the round.
        before: the same before the round.
        transport: one of TRANSPORTS.

    Returns: name to tensor of the same shape; with "float16", names of changes begin with CHANGE.
    """
    if transport == "float32":
        return dict(weights)
    packed = {}
    for name, tensor in weights.items():
        sent = packed_name(name, tensor, transport)
        packed[sent] = tensor if sent == name else (tensor - before[name]).half()
    return packed


def packed_name(name: str, tensor: Tensor, transport: str) -> str:
    """The name under which `pack` sends a tensor of any shape."""
    return f"{CHANGE}{name}" if transport != "float32" and tensor.is_floating_point() else name


def restore(sent: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The site's weights: the inverse of `pack`.

    Args:
        sent: name to tensor of any shape, from `pack`.
        before: name to tensor before the round.

    Returns: name to tensor of the same shape.
    Raises: KeyError for a change of a tensor that does not exist.
    """
    weights = {}
    for name, tensor in sent.items():
        if name.startswith(CHANGE):
            original = name.removeprefix(CHANGE)
            weights[original] = before[original] + tensor.to(before[original].dtype)
        else:
            weights[name] = tensor
    return weights
