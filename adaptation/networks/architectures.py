"""Segmentation networks by name, all from MONAI."""

from __future__ import annotations

from monai.networks.nets import DynUNet, SegResNet, UNet
from torch import nn

from ...errors import UsageError
from ..choices import NETWORKS

WIDTHS = (16, 32, 64)


def dimensions(name: str) -> int:
    """2 or 3, of a network by name. Raises: UsageError for an unknown name."""
    if name not in NETWORKS:
        raise UsageError(f"unknown network '{name}': choose from {', '.join(NETWORKS)}")
    return 3 if name.endswith("3d") else 2


def build_network(name: str, classes: int) -> nn.Module:
    """Slices (B, 1, S, S), or for 3-D names stacks of slices (B, 1, D, S, S), to logits of the same sides.

    S is a multiple of 8, D of 4. Raises: UsageError for an unknown name.
    """
    dims = dimensions(name)
    # Slices lie further apart than pixels: the first halving leaves their number alone.
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
