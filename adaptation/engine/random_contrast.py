"""Random contrast: what makes a segmenter find structures by their shape, at sites whose images look different.

Intensity curves (Bezier as in Models Genesis, Zhou et al. 2021, and with several bends) and global intensity non-linear
augmentation (GIN, Ouyang et al., IEEE TMI 2022, doi 10.1109/TMI.2022.3224067).

Of colour pictures they change the brightness alone: curves through red, green and blue would tear colours apart. Hues
and saturation vary besides, see `HUE`. Curves rise there: no camera exchanges dark and bright.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .colours import grey_level, random_colours, with_colours, with_grey_level
from .segmenter_config import ContrastMix

CURVE_POINTS = 256  # of a curve's table
BENT_SHARE = 0.4  # of the curves: piecewise linear through random values, neither rising nor falling
KNOTS = (4, 7)  # fewest and most points of such a curve, both ends included
GIN_WIDTHS = (1, 2, 2, 2, 1)  # channels before, between and after the random convolutions
GIN_KERNELS = (1, 3)
LEAK = 0.01  # slope of the leaky ReLU between them
AIR = 0.05  # intensities up to it are air
# Largest change of colour pictures: hues by a tenth of a turn, the range that Tellez et al. (Medical Image Analysis
# 2019, doi 10.1016/j.media.2019.101544) call light; saturation by four tenths, as in the colour jitter of contrastive
# learning at half strength (Chen et al., ICML 2020).
HUE = 0.1
SATURATION = (0.6, 1.4)


def random_contrast(windows: Tensor, mix: ContrastMix, *, rng: torch.Generator, colour: bool = False) -> Tensor:
    """Windows with random contrast, which is the same in all slices of a window.

    Every channel has a contrast of its own, as sequences of MRI do; the channels of a colour picture have one, and its
    hues and saturation vary in the windows whose contrast changes.

    Args:
        windows: (B, C, W, W), or stacks of D slices (B, C, D, W, W), in [0, 1].
        mix: what happens to which share of the windows.
        rng: random generator.
        colour: whether the channels are red, green and blue.

    Returns: windows of the same shape, which may leave [0, 1] a little.
    """
    if not colour:
        folded = windows.reshape(windows.shape[0] * windows.shape[1], -1, *windows.shape[-2:])
        return _varied(folded, mix, rng=rng)[0].view(windows.shape)
    grey = grey_level(windows)
    made, changed = _varied(grey.reshape(len(grey), -1, *grey.shape[-2:]), mix, rng=rng, rising=True)
    turn, saturation = random_colours(len(windows), HUE, SATURATION, rng=rng)
    turn, saturation = (torch.where(changed, drawn, still) for drawn, still in ((turn, 0.0), (saturation, 1.0)))
    return with_colours(with_grey_level(windows, made.view(grey.shape)), turn, saturation)


def _varied(windows: Tensor, mix: ContrastMix, *, rng: torch.Generator, rising: bool = False) -> tuple[Tensor, Tensor]:
    """Windows (B, D, W, W) of one channel with random contrast, and whether it is changed, (B,) bool.

    Args:
        rising: whether curves keep the order of grey levels.
    """
    drawn = torch.rand(len(windows), generator=rng)
    curved = (drawn >= mix.unchanged) & (drawn < mix.unchanged + mix.curves)
    networked = drawn >= mix.unchanged + mix.curves
    result = windows.clone()
    curves = random_curves(int(curved.sum()), rng=rng)
    if rising:
        curves = curves.sort(1).values
    result[curved] = apply_curves(windows[curved], curves)
    result[networked] = random_network(windows[networked], rng=rng)
    inverted = torch.rand(len(windows), 1, 1, 1, generator=rng) < mix.inverted
    return torch.where(inverted & (result > AIR), 1 + AIR - result, result), curved | networked


def random_curves(count: int, *, rng: torch.Generator) -> Tensor:
    """(count, CURVE_POINTS) values in [0, 1] of random curves, for intensities from 0 to 1.

    Bezier curves from (0, 0) to (1, 1) with two control points in the unit square rise, which those with their order
    reversed turn round; curves through random values bend several times.
    """
    tables = torch.empty(count, CURVE_POINTS)
    grid, t = np.linspace(0, 1, CURVE_POINTS), np.linspace(0, 1, 64)
    for table in tables:
        if float(torch.rand((), generator=rng)) < BENT_SHARE:
            knots = int(torch.randint(KNOTS[0], KNOTS[1] + 1, (), generator=rng))
            x, y = np.linspace(0, 1, knots), torch.rand(knots, generator=rng).numpy()
        else:
            first, second = torch.rand(2, 2, generator=rng).numpy()
            x, y = (3 * (1 - t) ** 2 * t * first[k] + 3 * (1 - t) * t**2 * second[k] + t**3 for k in (0, 1))
        values = np.interp(grid, x, y)
        if float(torch.rand((), generator=rng)) < 0.5:
            values = values[::-1]
        table.copy_(torch.from_numpy(values.copy()))
    return tables


def apply_curves(windows: Tensor, curves: Tensor) -> Tensor:
    """Windows (B, D, W, W) in [0, 1] through their curves (B, CURVE_POINTS), by the nearest point; (B, D, W, W)."""
    points = curves.shape[1]
    index = (windows.clamp(0, 1) * (points - 1)).round().long().flatten(1)
    return curves.gather(1, index).view(windows.shape).to(windows.dtype)


def random_network(windows: Tensor, *, rng: torch.Generator) -> Tensor:
    """GIN: windows (B, D, W, W) mixed with what a random shallow network makes of them, with their energy kept.

    Every window has its own network of four convolutions with normal weights. The mixture's Frobenius norm is set to
    that of the window. Returns: (B, D, W, W).
    """
    count = len(windows)
    if not count:
        return windows
    features = windows.transpose(0, 1)  # (D, B, W, W): one group of channels for each window
    for layer, (before, after) in enumerate(pairwise(GIN_WIDTHS)):
        kernel = GIN_KERNELS[int(torch.randint(len(GIN_KERNELS), (), generator=rng))]
        weight = torch.randn(count * after, before, kernel, kernel, generator=rng)
        bias = torch.randn(count * after, generator=rng)
        features = F.conv2d(features, weight, bias, padding=kernel // 2, groups=count)
        if layer < len(GIN_WIDTHS) - 2:
            features = F.leaky_relu(features, LEAK)
    share = torch.rand(count, 1, 1, 1, generator=rng)
    mixed = share * features.transpose(0, 1) + (1 - share) * windows
    energy, made = (values.flatten(1).norm(dim=1).view(-1, 1, 1, 1) for values in (windows, mixed))
    return mixed * energy / made.clamp(min=1e-6)
