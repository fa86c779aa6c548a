"""Segmentation networks by name, all from MONAI."""

from __future__ import annotations

from monai.networks.nets import SegResNet, UNet
from torch import nn

from ..errors import UsageError

NETWORKS = ("unet", "segresnet")


def build_network(name: str, classes: int) -> nn.Module:
    """A 2-D network, slices (B, 1, S, S) to logits (B, classes, S, S); S a multiple of 8.

    Raises: UsageError for an unknown name.
    """
    if name == "unet":
        # Instance norm: the statistics of a batch of synthetic slices would not hold at another site.
        return UNet(2, 1, classes, channels=(16, 32, 64), strides=(2, 2), num_res_units=1, norm="instance")
    if name == "segresnet":
        return SegResNet(
            2, init_filters=16, in_channels=1, out_channels=classes, blocks_down=(1, 2, 2), blocks_up=(1, 1)
        )
    raise UsageError(f"unknown network '{name}': choose from {', '.join(NETWORKS)}")
