"""How weights travel from a site: as they are, or as the change a site made, in half precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads TRANSPORTS without PyTorch
    from torch import Tensor

TRANSPORTS = ("float32", "float16")
CHANGE = "change."  # prefix of tensors that are a change of the weights, not the weights


def pack(weights: Mapping[str, Tensor], before: Mapping[str, Tensor], transport: str) -> dict[str, Tensor]:
    """What a site sends.

    As float16 the *change* of a round travels, not the weights: changes are small, so the error is at most 2**-11 of a
    change's value (plus 2**-25), where half-precision weights would lose 2**-11 of their own.

    Args:
        weights, before: name to tensor, after and before the round.
        transport: one of TRANSPORTS.
    """
    if transport == "float32":
        return dict(weights)
    return {
        f"{CHANGE}{name}" if tensor.is_floating_point() else name: (
            (tensor - before[name]).half() if tensor.is_floating_point() else tensor
        )
        for name, tensor in weights.items()
    }


def restore(sent: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights a site means. Raises KeyError for a change of a tensor that does not exist."""
    return {
        name.removeprefix(CHANGE): before[name.removeprefix(CHANGE)]
        + tensor.to(before[name.removeprefix(CHANGE)].dtype)
        if name.startswith(CHANGE)
        else tensor
        for name, tensor in sent.items()
    }
