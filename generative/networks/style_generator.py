"""The published generator (RobustMedSeg, after StyleGAN2): domain, height and embedding enter the mapping network.

Module names give the state-dict keys of the published files, so their weights fit without renaming.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ..config import FactoryConfig
from .generator import Edit, Generator, Style, Synthesis
from .layers import BiasActivation, EqualisedLinear, MixedPrecision, ModulatedConv, activate, pixel_norm
from .resampling import double

ENCODING_SHARE = 0.8  # weight of the embedding against domain and height, in the condition


class NoiseStrength(nn.Module):
    """One learned factor for the noise of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """x (B, c, r, r) plus noise (B or 1, 1, r, r) times the factor."""
        noise = (self.weight * noise).to(x.dtype)
        return x + noise if torch.is_grad_enabled() else x.add_(noise)


class StyledConv(nn.Module):
    """Modulated 3 x 3 convolution, noise, bias, activation."""

    def __init__(self, c_in: int, c_out: int, style_dim: int, *, upsample: bool = False) -> None:
        super().__init__()
        self.conv = ModulatedConv(c_in, c_out, 3, style_dim=style_dim, upsample=upsample)
        self.noise = NoiseStrength()
        self.activate = BiasActivation(c_out)

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        """x (B, c_in, r, r), w (B, style_dim), noise (B or 1, 1, R, R) to (B, c_out, R, R), R = r or 2 r."""
        return self.activate(self.noise(self.conv(x, w), noise))


class ImageBranch(nn.Module):
    """Features to the channels of the image, without demodulation."""

    def __init__(self, c_in: int, c_out: int, style_dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, c_out, 1, 1))
        self.conv = ModulatedConv(c_in, c_out, 1, style_dim=style_dim, demodulate=False)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, c_in, r, r) and w (B, style_dim) to (B, c_out, r, r)."""
        return self.conv(x, w) + self.bias


class LearntConstant(nn.Module):
    """The 4 x 4 map that every slice starts from."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, side, side))

    def forward(self, batch: int) -> Tensor:
        """(batch, c, s, s)."""
        return self.input.expand(batch, -1, -1, -1)


class StyleGenerator(MixedPrecision, Generator):
    """Mapping network, styled convolutions with layer noise, image skips; sides 8 to 1024."""

    def __init__(self, config: FactoryConfig) -> None:
        super().__init__()
        self.config = config
        d, widths, condition = config.latent_dim, config.channels, len(config.domains) + config.z_bins
        shown = config.image_channels
        self.label_embed = EqualisedLinear(condition, d)
        if config.encoding_dim:
            self.encoding_embed = nn.Sequential(
                EqualisedLinear(config.encoding_dim, condition), EqualisedLinear(condition, d)
            )
        self.style = nn.Sequential(
            *(
                EqualisedLinear(2 * d if layer == 0 else d, d, lr_multiplier=config.mapping_lr_multiplier)
                for layer in range(config.mapping_layers)
            )
        )
        self.input = LearntConstant(widths[0], config.start_size)
        self.conv1 = StyledConv(widths[0], widths[0], d)
        self.to_rgb1 = ImageBranch(widths[0], shown, d)
        self.convs, self.to_rgbs = nn.ModuleList(), nn.ModuleList()
        for wide, narrow in itertools.pairwise(widths):
            self.convs.append(StyledConv(wide, narrow, d, upsample=True))
            self.convs.append(StyledConv(narrow, narrow, d))
            self.to_rgbs.append(ImageBranch(narrow, shown, d))
        self.n_latent = 2 * len(widths)
        self.noises = nn.Module()
        for layer, side in enumerate(self.noise_sides):
            self.noises.register_buffer(f"noise_{layer}", torch.randn(1, 1, side, side))

    def mapping(self, z: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Tensor:
        """Styles w (B, latent_dim), the same for all layers; arguments as for `style_of`.

        An embedding that is zero in every row counts as absent, as in the published program.
        """
        domains, bins = len(self.config.domains), self.config.z_bins
        label = torch.cat([one_hot(domain, domains), one_hot(z_bin, bins)], dim=1).to(z.dtype)
        condition = label_embedding = pixel_norm(self.label_embed(label))
        if encoding is not None and bool(encoding.any()):
            embedding = pixel_norm(self.encoding_embed(encoding))
            condition = ENCODING_SHARE * embedding + (1 - ENCODING_SHARE) * label_embedding
        w = torch.cat([pixel_norm(z), condition.expand(len(z), -1)], dim=1)
        for layer in self.style:
            w = activate(layer(w))
        return w

    def style_of(self, z: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Style:
        """See `Generator.style_of`; w is (B, n_latent, latent_dim) with equal layers."""
        w = self.mapping(z, z_bin, domain, encoding=encoding)
        return Style(w[:, None].expand(-1, self.n_latent, -1), self.input(len(z)), domain)

    def synthesise(self, style: Style, noise: list[Tensor], edit: Edit | None = None) -> Synthesis:
        """See `Generator.synthesise`; noise is one map (B or 1, 1, r, r) per styled convolution."""
        w, largest = style.w.unbind(dim=1), self.config.image_size
        x = self.conv1(style.constant, w[0], noise[0])
        features, image = [style.constant, x], self.to_rgb1(x, w[1])
        for block, to_rgb in enumerate(self.to_rgbs):
            layer = 2 * block + 1
            with self.precision_at(noise[layer].shape[-1], largest, x.device):
                grown = self.convs[2 * block](x if edit is None else edit(x), w[layer], noise[layer])
                x = self.convs[2 * block + 1](grown, w[layer + 1], noise[layer + 1])
                addition = to_rgb(x, w[layer + 2])
            features += [grown, x]
            image = double(image) + addition.to(image.dtype)
        return Synthesis(image, image[:, :0], features)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        """The constant's and every styled convolution's: two of every resolution."""
        return tuple(width for width in self.config.channels for _ in range(2))

    @property
    def noise_sides(self) -> list[int]:
        return [side for side in self.config.resolutions for _ in range(2)][1:]

    def fixed_noise(self) -> list[Tensor]:
        """The stored maps, (1, 1, r, r) each."""
        return [getattr(self.noises, f"noise_{layer}") for layer in range(self.n_latent - 1)]
