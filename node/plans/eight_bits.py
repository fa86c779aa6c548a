"""Tensors in eight bits: whole numbers from -127 to 127, and a scale for the tensor or for each of its rows."""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 127  # on either side of zero; -128 is not used, so that the scale is symmetric
LEAST_ROW = 64  # numbers; shorter rows share one scale, whose four bytes would otherwise count


def num_scales(shape: tuple[int, ...]) -> int:
    """How many scales a tensor of this shape has: one for each entry of its first axis, or one."""
    numbers = torch.Size(shape).numel()
    return shape[0] if len(shape) > 1 and numbers >= LEAST_ROW * shape[0] > 0 else 1


def quantise(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Round a tensor to the nearest of its levels, ties to the even one; nothing is drawn at random.

    Args:
        tensor: float32 of any shape, finite.

    Returns: int8 of the same shape in [-127, 127], and float32 scales (`num_scales`,), at least 0. Their product is off
        by at most half a scale, the largest absolute value of the row over 254.
    Raises: ValueError for NaN and infinite values, which have no level.
    """
    rows = tensor.detach().float().reshape(num_scales(tuple(tensor.shape)), -1)
    if not torch.isfinite(rows).all():
        raise ValueError("holds NaN or infinite values")
    largest = rows.abs().amax(dim=1) if rows.numel() else rows.new_zeros(len(rows))
    scale = largest / LEVELS
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))  # also where the smallest numbers have become 0
    levels = (rows / divisor[:, None]).round().clamp(-LEVELS, LEVELS)
    return levels.to(torch.int8).reshape(tensor.shape), scale


def dequantise(levels: Tensor, scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `quantise`, for tensors that somebody else sent.

    Args:
        levels: should be int8 of `shape`.
        scale: should be float32 (`num_scales`,), finite and at least 0.
        shape: that is expected.

    Returns: float32 of `shape`.
    Raises: ValueError for anything else than was described.
    """
    if levels.dtype != torch.int8 or tuple(levels.shape) != tuple(shape):
        raise ValueError(f"levels are {levels.dtype} of shape {tuple(levels.shape)}; expected int8 of {tuple(shape)}")
    if scale.dtype != torch.float32 or tuple(scale.shape) != (num_scales(tuple(shape)),):
        raise ValueError(f"scales are {scale.dtype} of shape {tuple(scale.shape)}")
    if not (torch.isfinite(scale).all() and (scale >= 0).all()):
        raise ValueError("scales are negative, NaN or infinite")
    return (levels.float().reshape(len(scale), -1) * scale[:, None]).reshape(shape)
