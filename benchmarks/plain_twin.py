"""The published networks in textbook form, for comparison: equal weights and equal results, without optimizations.

Every sample has its own modulated kernels in a grouped convolution. Every resampling inserts its zeros, filters the
whole map with the 4 x 4 kernel and discards the values that are not needed. Tensors have the default memory format.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from fedfactory.generative import Factory, FactoryConfig
from fedfactory.generative.networks.discriminator import minibatch_statistic
from fedfactory.generative.networks.generator import Edit, Style, Synthesis
from fedfactory.generative.networks.layers import ModulatedConv, activate
from fedfactory.generative.networks.style_discriminator import DownBlock, StyleDiscriminator
from fedfactory.generative.networks.style_generator import StyleGenerator
from torch import Tensor, nn

TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0])
KERNEL = torch.outer(TAPS, TAPS) / 64


def plain_resample(x: Tensor, kernel: Tensor, *, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Insert zeros, pad, correlate each channel with the flipped kernel, and decimate.

    x is (B, C, H, W), the kernel (4, 4), the result (B, C, H', W').
    """
    batch, channels, height, width = x.shape
    x = x.reshape(batch * channels, 1, height, 1, width, 1)
    x = F.pad(x, (0, up - 1, 0, 0, 0, up - 1)).reshape(batch * channels, 1, height * up, width * up)
    x = F.conv2d(F.pad(x, pad * 2), kernel.to(x).flip(0, 1)[None, None])
    return x.reshape(batch, channels, *x.shape[2:])[:, :, ::down, ::down]


class PlainModulatedConv(ModulatedConv):
    """A modulated convolution with a kernel and a group for each sample."""

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        batch, c_in, height, width = x.shape
        c_out, side = self.weight.shape[0], self.weight.shape[-1]
        weight = self.weight[None] * self.scale * self.modulation(w)[:, None, :, None, None]
        if self.demodulate:
            weight = weight * torch.rsqrt(weight.square().sum(dim=(2, 3, 4), keepdim=True) + 1e-8)
        x = x.reshape(1, batch * c_in, height, width)
        if self.upsample:
            weight = weight.transpose(1, 2).reshape(batch * c_in, c_out, side, side)
            y = F.conv_transpose2d(x, weight, stride=2, groups=batch)
            return plain_resample(y.reshape(batch, c_out, *y.shape[2:]), 4 * KERNEL, pad=(1, 1))
        weight = weight.reshape(batch * c_out, c_in, side, side)
        return F.conv2d(x, weight, padding=self.padding, groups=batch).reshape(batch, c_out, height, width)


class PlainGenerator(StyleGenerator):
    """The published generator with plain resampling."""

    def synthesise(self, style: Style, noise: list[Tensor], edit: Edit | None = None) -> Synthesis:
        w = style.w.unbind(dim=1)
        x = self.conv1(style.constant, w[0], noise[0])
        features, image = [style.constant, x], self.to_rgb1(x, w[1])
        for block, to_rgb in enumerate(self.to_rgbs):
            layer = 2 * block + 1
            grown = self.convs[2 * block](x if edit is None else edit(x), w[layer], noise[layer])
            x = self.convs[2 * block + 1](grown, w[layer + 1], noise[layer + 1])
            features += [grown, x]
            image = plain_resample(image, 4 * KERNEL, up=2, pad=(2, 1)) + to_rgb(x, w[layer + 2])
        return Synthesis(image, image[:, :0], features)


class PlainDownBlock(DownBlock):
    """The published residual block with plain resampling."""

    def forward(self, x: Tensor) -> Tensor:
        u = self.conv1(x)
        u = plain_resample(u, KERNEL, pad=(2, 2))
        u = self.conv2[2](self.conv2[1](u))
        shortcut = self.skip[1]
        v = F.conv2d(plain_resample(x, KERNEL, pad=(1, 1)), shortcut.weight * shortcut.scale, stride=2)
        return (u + v) / math.sqrt(2)


class PlainDiscriminator(StyleDiscriminator):
    """The published discriminator, its projection written out with one-hot vectors."""

    def forward(self, image: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Tensor:
        x = self.final_conv(minibatch_statistic(self.convs(image)))
        x = self.final_linear[1](activate(self.final_linear[0](x.flatten(1))))
        domains, bins = len(self.config.domains), self.config.z_bins
        label = self.label_embed(torch.cat([F.one_hot(domain, domains), F.one_hot(z_bin, bins)], dim=1).to(x.dtype))
        product = x * label / (label.square().mean(dim=1, keepdim=True) + 1e-8).sqrt()
        if encoding is not None:
            product = product * self.encoding_embed(encoding)
        return product.sum(dim=1, keepdim=True) / math.sqrt(x.shape[1])


def make_plain(factory: Factory) -> Factory:
    """A textbook copy of a factory with the published networks: same weights, default memory order."""
    config: FactoryConfig = factory.config
    twin = Factory.__new__(Factory)
    nn.Module.__init__(twin)
    twin.config, twin.precision = config, factory.precision
    twin.generator, twin.discriminator = PlainGenerator(config), PlainDiscriminator(config)
    for module in twin.modules():
        if type(module) is ModulatedConv:
            module.__class__ = PlainModulatedConv
        elif type(module) is DownBlock:
            module.__class__ = PlainDownBlock
    twin.load_state_dict(factory.state_dict())
    return twin.to(memory_format=torch.contiguous_format).to(next(factory.parameters()).device)
