"""Colours of pictures as a grey level and what remains: brightness, hue and saturation are changed apart.

The grey level is the mean of red, green and blue, the intensity of the HSI model (Gonzalez and Woods, Digital Image
Processing). What remains lies in the plane at right angles to it: its angle is the hue, its length the saturation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def grey_level(windows: Tensor) -> Tensor:
    """Mean (B, 1, ...) of red, green and blue of windows (B, 3, ...)."""
    return windows.mean(1, keepdim=True)


def with_grey_level(windows: Tensor, grey: Tensor) -> Tensor:
    """Colour windows at another brightness; hues are kept, and saturation where it is possible at that brightness.

    Args:
        windows: (B, 3, ...) in [0, 1].
        grey: (B, 1, ...), the new grey levels; those outside of [0, 1] become black and white.

    Returns: (B, 3, ...) in [0, 1].
    """
    return _within_range(grey.clamp(0, 1), windows - grey_level(windows))


def with_colours(windows: Tensor, turn: Tensor, saturation: Tensor) -> Tensor:
    """Colour windows with other hues and saturation; the grey level is kept.

    Args:
        windows: (B, 3, ...) in [0, 1].
        turn: (B,) by how much of a whole turn hues move, from red towards green.
        saturation: (B,) factors, at least 0.

    Returns: (B, 3, ...) in [0, 1].
    """
    grey = grey_level(windows)
    angle = 2 * math.pi * turn
    along, across = angle.cos() * saturation, angle.sin() * saturation / math.sqrt(3)
    # A rotation about the axis of greys. The part along that axis is zero here, which leaves two of its three terms.
    identity = torch.eye(3, dtype=windows.dtype)
    cross = torch.tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]], dtype=windows.dtype)
    matrix = along[:, None, None] * identity + across[:, None, None] * cross
    turned = torch.bmm(matrix, (windows - grey).flatten(2)).view(windows.shape)
    return _within_range(grey.clamp(0, 1), turned)


def random_colours(
    count: int, hue: float, saturation: tuple[float, float], *, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Turns (count,) up to `hue` either way, and factors (count,) between those of `saturation`, for `with_colours`."""
    turns, factors = torch.rand(2, count, generator=rng)
    return hue * (2 * turns - 1), saturation[0] + (saturation[1] - saturation[0]) * factors


def _within_range(grey: Tensor, rest: Tensor) -> Tensor:
    """(B, 3, ...) in [0, 1], from grey levels (B, 1, ...) in [0, 1] and what remains (B, 3, ...), which is shortened
    where a channel would leave the range: clipping that channel alone would change the hue."""
    above, below = rest.amax(1, keepdim=True), -rest.amin(1, keepdim=True)
    share = torch.minimum((1 - grey) / above.clamp(min=1e-6), grey / below.clamp(min=1e-6)).clamp(max=1)
    return grey + share * rest
