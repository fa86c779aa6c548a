"""The gated CRF energy: near pixels of similar intensity should have the same label."""

from __future__ import annotations

import torch
from torch import Tensor

RADIUS = 5  # pixels
SIGMA_PLACE = 6.0  # pixels
SIGMA_INTENSITY = 0.1  # intensities are in [0, 1]


def gated_crf(
    probabilities: Tensor,
    images: Tensor,
    *,
    radius: int = RADIUS,
    sigma_place: float = SIGMA_PLACE,
    sigma_intensity: float = SIGMA_INTENSITY,
) -> Tensor:
    """Potts energy within a window, with one Gaussian kernel over place and intensity (Obukhov et al. 2019; FedICRA).

    L = 1 / (B H W) sum_i sum_{j in window(i), j != i} k_ij (1 - sum_c p_ic p_jc), with neighbours inside the image
    only. Every pair is computed once and counted twice, because the kernel is symmetric. Autograd keeps the kernel of
    each offset, one value per pixel whatever the number of classes.

    Args:
        probabilities: (B, C, H, W), summing to one over C.
        images: (B, K, H, W) in [0, 1]; they receive no gradient. Squared differences are summed over the channels, as
            published.
        radius: of the square window, pixels.
        sigma_place: standard deviation of the kernel over place, pixels.
        sigma_intensity: standard deviation of the kernel over intensities.

    Returns: a scalar.
    """
    batch, _, height, width = probabilities.shape
    images, total = images.detach(), probabilities.new_zeros(())
    for down in range(min(radius, height - 1) + 1):
        for right in range(-min(radius, width - 1), min(radius, width - 1) + 1):
            if down == 0 and right <= 0:
                continue
            here, there = _overlap((down, right), height, width)
            place = (down**2 + right**2) / (2 * sigma_place**2)
            intensity = (images[here] - images[there]).square().sum(1) / (2 * sigma_intensity**2)
            kernel = torch.exp(-place - intensity)
            # Not by einsum, which copies both sides, and autograd would keep the copies of all offsets.
            same = (probabilities[here] * probabilities[there]).sum(1)
            total = total + (kernel * (1 - same)).sum()
    return 2 * total / (batch * height * width)


def _overlap(offset: tuple[int, int], height: int, width: int) -> tuple[tuple, tuple]:
    """Indices of the pixels that have a neighbour at the offset (rows down, columns right), and of these neighbours."""
    down, right = offset
    rows, rows_there = slice(0, height - down), slice(down, height)
    columns = slice(max(0, -right), width - max(0, right))
    columns_there = slice(max(0, right), width + min(0, right))
    return (..., rows, columns), (..., rows_there, columns_there)
