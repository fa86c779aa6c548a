"""Resampling with finite impulse responses (StyleGAN2's "upfirdn"), out of standard PyTorch operators.

`resample` is the general operator; the others are the cases that the networks use, each in the cheapest form that gives
the same numbers. All can be differentiated twice.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TAPS = (1.0, 3.0, 3.0, 1.0)  # binomial filter of every resampling in the networks, used after division by its sum


def resample(
    x: Tensor,
    kernel: Tensor,
    *,
    up: tuple[int, int] = (1, 1),
    down: tuple[int, int] = (1, 1),
    pad: tuple[int, int, int, int] = (0, 0, 0, 0),
) -> Tensor:
    """Insert zeros, pad, convolve, keep every n-th sample.

    Args:
        x: (B, C, H, W).
        kernel: (kh, kw); a true convolution, that is, correlation with the kernel turned by half a turn.
        up: factors for x and y; up - 1 zeros follow every sample, the last one too.
        down: factors for x and y; the first sample is kept.
        pad: zeros to add (x before, x after, y before, y after) after the insertion; negative numbers crop.

    Returns: (B, C, H', W') with H' = (H * up_y + pads - kh) // down_y + 1, W' likewise.
    """
    (batch, channels, height, width), (up_x, up_y) = x.shape, up
    if up != (1, 1):
        x = F.pad(x[:, :, :, None, :, None], (0, up_x - 1, 0, 0, 0, up_y - 1))
        x = x.reshape(batch, channels, height * up_y, width * up_x)
    x = F.pad(x, pad)
    x = x.reshape(batch * channels, 1, *x.shape[2:])
    x = F.conv2d(x, kernel.flip(0, 1)[None, None].to(x), stride=(down[1], down[0]))
    return x.reshape(batch, channels, *x.shape[2:])


def blur(x: Tensor, *, pad: int, gain: float = 1.0) -> Tensor:
    """The (1, 3, 3, 1) filter.

    Args:
        x: (B, C, H, W).
        pad: zeros added on all sides.
        gain: sum of the filter; 1 preserves the mean, 4 compensates for inserted zeros.

    Returns: (B, C, H + 2 pad - 3, W + 2 pad - 3).
    """
    return _depthwise(x, gain, pad=pad, stride=1)


def halve(x: Tensor) -> Tensor:
    """Filtered with (1, 3, 3, 1), every second sample: (B, C, H, W) to (B, C, H/2, W/2)."""
    return _depthwise(x, 1.0, pad=1, stride=2)


def double(x: Tensor) -> Tensor:
    """Zeros inserted and filtered with gain 4: (B, C, H, W) to (B, C, 2 H, 2 W).

    Within the border this is bilinear enlargement; at the border zeros come in.
    """
    enlarged = F.interpolate(F.pad(x, (1, 1, 1, 1)), scale_factor=2, mode="bilinear", align_corners=False)
    return enlarged[:, :, 2:-2, 2:-2]


def _depthwise(x: Tensor, gain: float, *, pad: int, stride: int) -> Tensor:
    """One 4 x 4 convolution per channel of (B, C, H, W); on CPUs this is faster than rows, then columns."""
    taps = torch.tensor(TAPS, dtype=x.dtype, device=x.device) / sum(TAPS)
    kernel = torch.outer(taps, taps) * gain
    channels = x.shape[1]
    return F.conv2d(x, kernel.expand(channels, 1, 4, 4), stride=stride, padding=pad, groups=channels)
