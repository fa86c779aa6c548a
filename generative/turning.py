"""Random turns of what a discriminator is shown, for organs that lie differently in every scan.

Unlike adaptive augmentation, whose strength follows the discriminator, a fixed share of the slices is turned, by any
angle: the generator may draw an organ in one position while the patients' lie in many.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SHIFT = 0.08  # largest, as a share of the side
SCALE = 0.15  # largest change of size, either way


def turned(slices: Tensor, share: float, rng: torch.Generator) -> Tensor:
    """A share of the slices turned by any angle, moved and scaled, all channels of a slice alike.

    Args:
        slices: (B, C, S, S), of any range; what a turn brings in from outside is mirrored at the border.
        share: probability that a slice is turned, in [0, 1].
        rng: random generator on the slices' device.

    Returns: (B, C, S, S).
    """

    def uniform(limit: float) -> Tensor:
        """(B,) numbers from -limit to limit."""
        return (2 * torch.rand(len(slices), generator=rng, device=rng.device) - 1) * limit

    chosen = torch.rand(len(slices), generator=rng, device=rng.device) < share
    angle, scale = uniform(math.pi), (uniform(math.log(1 + SCALE))).exp()
    across, down = uniform(2 * SHIFT), uniform(2 * SHIFT)  # a side has the length 2 in the sampler's coordinates
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([torch.stack([cos, -sin, across], 1), torch.stack([sin, cos, down], 1)], dim=1)
    still = torch.eye(2, 3, device=rng.device)
    matrix = torch.where(chosen[:, None, None], matrix, still).to(slices.dtype)
    grid = F.affine_grid(matrix, list(slices.shape), align_corners=False)
    return F.grid_sample(slices, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
