"""Building blocks of StyleGAN2 (Karras et al. 2020): equalised weights, modulated convolution, pixel norm."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .resampling import blur

LOW_PRECISION_SIDES = 4  # the published practice: the four largest sides may be half precision, the rest may not
HALF_LIMIT = 256.0  # features are clamped to this in float16, whose largest number is 65504


class MixedPrecision:
    """For networks whose largest feature maps may be computed in half precision.

    Attributes:
        low_precision: torch.bfloat16, torch.float16 or None (float32 everywhere).
    """

    low_precision: torch.dtype | None = None

    def precision_at(self, side: int, largest: int, device: torch.device) -> torch.autocast:
        """Context for the layers of one side; weights stay float32."""
        low = self.low_precision is not None and side > largest >> LOW_PRECISION_SIDES
        return torch.autocast(device.type, dtype=self.low_precision or torch.bfloat16, enabled=low)


def activate(x: Tensor) -> Tensor:
    """sqrt(2) * leaky ReLU with slope 0.2, of any shape (...,): a unit normal input keeps a variance near 1."""
    return F.leaky_relu(x, 0.2) * math.sqrt(2)


class BiasActivation(nn.Module):
    """Adds one number per channel, then activates."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, H, W), same shape."""
        x = x + self.bias[:, None, None].to(x.dtype)
        # In place without gradients: new memory for a large map takes as long as the computation.
        x = activate(x) if torch.is_grad_enabled() else F.leaky_relu_(x, 0.2).mul_(math.sqrt(2))
        return x.clamp(-HALF_LIMIT, HALF_LIMIT) if x.dtype == torch.float16 else x


def pixel_norm(x: Tensor) -> Tensor:
    """x, (B, c) or (B, c, H, W), divided by its root mean square over dimension 1."""
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class EqualisedLinear(nn.Module):
    """y = (g / sqrt(n_in)) W x + g b, with g the learning-rate multiplier. (B, n_in) -> (B, n_out)."""

    def __init__(self, n_in: int, n_out: int, *, bias: float = 0.0, lr_multiplier: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, n_in) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((n_out,), bias))
        self.scale, self.lr_multiplier = lr_multiplier / math.sqrt(n_in), lr_multiplier

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in) to (B, n_out)."""
        return F.linear(x, self.weight * self.scale, self.bias * self.lr_multiplier)


class EqualisedConv(nn.Module):
    """k x k convolution with weights scaled by 1 / sqrt(c_in k^2) and same-size zero padding."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(c_out)) if bias else None
        self.scale, self.padding = 1 / math.sqrt(c_in * kernel**2), kernel // 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, c_in, H, W) to (B, c_out, H, W)."""
        return F.conv2d(x, self.weight * self.scale, self.bias, padding=self.padding)


class ModulatedConv(nn.Module):
    """Convolution whose input channels are scaled by a style and whose output variance is restored.

    Scaling the input by s and the output by the demodulation factor gives the same numbers as one kernel per
    sample, without the grouped convolution.

    Args:
        c_in: input channels.
        c_out: output channels.
        kernel: side of the kernel, odd.
        style_dim: length of the style vector.
        demodulate: divide by the expected standard deviation of the output.
        upsample: double the side, by a transposed convolution of stride 2 and a low-pass filter.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, style_dim: int, demodulate: bool = True, upsample: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(c_out, c_in, kernel, kernel))
        self.modulation = EqualisedLinear(style_dim, c_in, bias=1.0)
        self.scale, self.padding = 1 / math.sqrt(c_in * kernel**2), kernel // 2
        self.demodulate, self.upsample = demodulate, upsample

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, c_in, H, W) and w (B, style_dim) to (B, c_out, H, W), or twice the side; no bias."""
        style = self.modulation(w)  # (B, c_in)
        weight = self.weight * self.scale
        x = x * style[:, :, None, None].to(x.dtype)
        if self.upsample:
            y = blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), pad=1, gain=4)
        else:
            y = F.conv2d(x, weight, padding=self.padding)
        if self.demodulate:
            power = style.square() @ weight.square().sum(dim=(2, 3)).t()  # (B, c_out)
            factor = torch.rsqrt(power + 1e-8)[:, :, None, None].to(y.dtype)
            y = y * factor if torch.is_grad_enabled() else y.mul_(factor)
        return y


def upsample(x: Tensor) -> Tensor:
    """(B, c, H, W) to (B, c, 2 H, 2 W), bilinear: StyleGAN2's (1, 3, 3, 1) filter except at the border."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
