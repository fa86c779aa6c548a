"""Builds the segmentation networks of MONAI by name."""

from __future__ import annotations

from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import nn

from .network_names import dimensions

WIDTHS = (16, 32, 64)  # channels of the three resolution levels


def build_network(name: str, classes: int) -> nn.Module:
    """A network from slices (B, 1, S, S) to logits (B, classes, S, S), or for 3-D names from stacks of slices
    (B, 1, D, S, S) to logits (B, classes, D, S, S).

    S is a multiple of 8, D of 4.

    Args:
        name: one of NETWORKS.
        classes: channels of the logits.

    Raises: UsageError for an unknown name.
    """
    dims = dimensions(name)
    # Slices are further apart than pixels, so the first downsampling keeps the number of slices.
    strides = (2, 2) if dims == 2 else ((1, 2, 2), (2, 2, 2))
    # Instance norm: the statistics of a batch of synthetic slices would not hold at another site.
    if name.startswith("unet"):
        return UNet(dims, 1, classes, channels=WIDTHS, strides=strides, num_res_units=1, norm="instance")
    if name.startswith("dynunet"):
        kernels, steps = [3] * len(WIDTHS), [1, *strides]
        return DynUNet(
            dims, 1, classes, kernels, steps, upsample_kernel_size=list(strides), filters=WIDTHS, norm_name="instance"
        )
    options = {"init_filters": 16, "in_channels": 1, "out_channels": classes}
    return SegResNet(dims, blocks_down=(1, 2, 2), blocks_up=(1, 1), **options)
