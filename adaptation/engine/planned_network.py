"""The network of a training plan: MONAI's dynamic U-Net behind folded pixels."""

from __future__ import annotations

import torch.nn.functional as F
from monai.networks.nets import DynUNet
from torch import Tensor, nn

from .training_plan import TrainingPlan


class PlannedNetwork(nn.Module):
    """Windows (B, 1, W, W) to logits (B, classes, W, W), for any W that is a multiple of `plan.side_multiple`.

    Fold x fold pixels become channels first and logits are unfolded last, so that the finest level computes on a
    quarter of the pixels. Instance norm: a batch's statistics would not hold at another site.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__()
        self.fold = plan.fold
        levels = len(plan.widths)
        self.body = DynUNet(
            spatial_dims=2,
            in_channels=plan.fold**2,
            out_channels=plan.classes * plan.fold**2,
            kernel_size=[3] * levels,
            strides=[1] + [2] * (levels - 1),
            upsample_kernel_size=[2] * (levels - 1),
            filters=list(plan.widths),
            norm_name=("INSTANCE", {"affine": True}),
        )

    def forward(self, windows: Tensor) -> Tensor:
        """(B, 1, W, W), each window with mean 0 and deviation 1, to logits (B, classes, W, W)."""
        return F.pixel_shuffle(self.body(F.pixel_unshuffle(windows, self.fold)), self.fold)
