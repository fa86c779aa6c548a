"""The network of a training plan: one of MONAI's segmentation networks behind folded pixels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import Tensor, nn

from .training_plan import TrainingPlan


class PlannedNetwork(nn.Module):
    """Windows to logits, for any side that is a multiple of `plan.side_multiple`.

    Fold x fold pixels become channels first and logits are unfolded last, so that the finest level computes on a
    quarter of the pixels. Instance norm, or SegResNet's group norm: a batch's statistics would not hold at another
    site.
    """

    def __init__(self, plan: TrainingPlan) -> None:
        super().__init__()
        self.fold, self.dimensions = plan.fold, plan.dimensions
        self.body = _body(plan)

    def forward(self, windows: Tensor) -> Tensor:
        """(B, C, W, W), each window with mean 0 and deviation 1, to logits (B, classes, W, W).

        A 3-D network takes (B, C, D, W, W) and gives (B, classes, D, W, W), D a multiple of the slice strides' product.
        """
        if self.dimensions == 2:
            return F.pixel_shuffle(self.body(F.pixel_unshuffle(windows, self.fold)), self.fold)
        folded = F.pixel_unshuffle(windows.movedim(1, 2), self.fold).movedim(1, 2)
        return F.pixel_shuffle(self.body(folded).movedim(1, 2), self.fold).movedim(1, 2)


def _body(plan: TrainingPlan) -> nn.Module:
    """From folded windows to folded logits."""
    dims, levels = plan.dimensions, len(plan.widths)
    channels = {"in_channels": plan.channels * plan.fold**2, "out_channels": plan.classes * plan.fold**2}
    steps = [stride if dims == 2 else (slices, stride, stride) for slices, stride in _strides(plan)]
    if plan.network.startswith("dynunet"):
        return DynUNet(
            spatial_dims=dims,
            **channels,
            kernel_size=[3] * levels,
            strides=[1, *steps],
            upsample_kernel_size=steps,
            filters=list(plan.widths),
            norm_name=("INSTANCE", {"affine": True}),
        )
    if plan.network.startswith("unet"):
        norm = ("instance", {"affine": True})
        return UNet(dims, **channels, channels=plan.widths, strides=steps, num_res_units=1, norm=norm)
    # SegResNet halves all sides at every level and doubles its channels.
    blocks = [1, *[2] * (levels - 2), 2]
    return SegResNet(dims, init_filters=plan.widths[0], **channels, blocks_down=blocks, blocks_up=[1] * (levels - 1))


def _strides(plan: TrainingPlan) -> list[tuple[int, int]]:
    """For every level below the first, by how much slices and pixels are reduced."""
    return [(slices, 2) for slices in plan.slice_strides[1:]]


def fast_bfloat16(device: torch.device, *, dimensions: int = 2) -> bool:
    """Whether bfloat16 is faster than float32 on this device, for a network of 2 or 3 dimensions, and repeats.

    CPUs need instructions for it: without them, an update of the standard network took eight times as long as in
    float32; with them, it took half to four fifths of the time. But there, 3-D networks do not repeat with their seed.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and dimensions == 2:
        # PyTorch has no public question for this; a version without this one is treated as slow.
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(supported is not None and supported())
    return False
