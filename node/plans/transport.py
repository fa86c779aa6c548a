"""How weights are sent from a site: as they are, or as their change in the round, in half precision or eight bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line reads TRANSPORTS without PyTorch
    from torch import Tensor

TRANSPORTS = ("float32", "float16", "int8")
CHANGE = "change."  # prefix of the names of tensors that are changes of weights
LEVELS, SCALE = "levels.", "scale."  # prefixes of the two tensors of a change in eight bits


def pack(
    weights: Mapping[str, Tensor],
    before: Mapping[str, Tensor],
    transport: str,
    residual: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a site sends, and what it keeps for its next round.

    With "float16" and "int8", the *changes* of the round are sent instead of the weights. Changes are small: in half
    precision their error is at most 2**-11 of a change (plus 2**-25), while half-precision weights would lose 2**-11 of
    the weight itself.

    In eight bits the error is larger, up to 1/254 of the largest change in a row. It is not lost: the site keeps it and
    adds it to the change of the next round (error feedback; Seide et al. 2014, Karimireddy et al. 2019). So the sum of
    all changes that were sent differs from the sum of all changes that were made by the newest residual alone.

    Args:
        weights: name to tensor of any shape, after the round.
        before: the same before the round.
        transport: one of TRANSPORTS.
        residual: with "int8", what the round before left over: name to float32 tensor; nothing before the first round.

    Returns: name to tensor of the same shape, names of changes beginning with CHANGE; or with "int8" two tensors for
        each change, see `eight_bits.quantise`, whose names begin with LEVELS and SCALE. And the residual, name to
        float32 tensor, which is empty with other transports.
    Raises: ValueError for changes in eight bits that are NaN or infinite.
    """
    from .eight_bits import dequantise, quantise

    if transport == "float32":
        return dict(weights), {}
    packed, left = {}, {}
    for name, tensor in weights.items():
        if not tensor.is_floating_point():
            packed[name] = tensor
        elif transport == "float16":
            packed[CHANGE + name] = (tensor - before[name]).half()
        else:
            change = (tensor - before[name]).detach().float()
            if residual and name in residual:
                change += residual[name]
            levels, scale = quantise(change)
            packed[LEVELS + name], packed[SCALE + name] = levels, scale
            left[name] = change - dequantise(levels, scale, tuple(change.shape))
    return packed, left


def packed_shapes(name: str, tensor: Tensor, transport: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what `pack` makes of a tensor of any shape."""
    from .eight_bits import num_scales

    shape = tuple(tensor.shape)
    if transport == "float32" or not tensor.is_floating_point():
        return {name: shape}
    if transport == "float16":
        return {CHANGE + name: shape}
    return {LEVELS + name: shape, SCALE + name: (num_scales(shape),)}


def restore(sent: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The site's weights: the inverse of `pack`, for tensors that somebody else sent.

    Args:
        sent: name to tensor of any shape, from `pack`.
        before: name to tensor before the round.

    Returns: name to tensor of the same shape.
    Raises: KeyError for a change of a tensor that does not exist, ValueError for a change of another shape or type, for
        levels without their scale and the other way round, and for a tensor that was sent twice.
    """
    from .eight_bits import dequantise

    weights: dict[str, Tensor] = {}
    for name, tensor in sent.items():
        if name.startswith(SCALE):
            if LEVELS + name.removeprefix(SCALE) not in sent:
                raise ValueError(f"{name} has no levels")
            continue
        prefix = next((prefix for prefix in (CHANGE, LEVELS) if name.startswith(prefix)), "")
        original = name.removeprefix(prefix)
        if original in weights:
            raise ValueError(f"{original} was sent twice")
        if not prefix:
            weights[original] = tensor
            continue
        start = before[original]
        if prefix == LEVELS:
            if SCALE + original not in sent:
                raise ValueError(f"{name} has no scale")
            change = dequantise(tensor, sent[SCALE + original], tuple(start.shape))
        else:
            change = tensor
        if change.shape != start.shape:
            raise ValueError(f"{name} is {tuple(change.shape)}; expected {tuple(start.shape)}")
        weights[original] = start + change.to(start.dtype)
    return weights
