"""The translator: an encoder to a frozen factory's latents and feature maps, and one label branch for each role.

After "Multi-Domain Brain Vessel Segmentation Through Feature Disentanglement", as RobustMedSeg reuses it. A *role* is
the domain in which an image is decoded: 0 the labelled domain (source), 1 the site's domain (target). Decoding an
image in its own role is a reconstruction, decoding it in the other role a translation; both give labels as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ConfigError
from ...generative.config import FactoryConfig
from ...generative.networks.generator import Generator, Style, Synthesis
from ...generative.networks.layers import EqualisedLinear, pixel_norm
from .label_branch import LabelBranch

SOURCE, TARGET = 0, 1
STAGE_WIDTHS = (1, 1, 2, 4, 8)  # of stem and stages, in units of the encoder's width
POOLED_SIDE = 3  # side of the pooled feature maps from which latents are computed
MEAN_DRAWS = 10_000  # latents drawn per height bin; a role's codes are offsets from their mean
INTER_WEIGHT = 0.6  # of the probabilities decoded in the source role, the rest in the target role (published)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Size of the encoder; the published one is width 64, blocks (3, 4, 14, 3), shrink 2.

    Raises: ConfigError if a value is out of range.

    Attributes:
        width: channels of the stem.
        blocks: residual blocks of each of the four stages.
        shrink: factor by which slices are downsampled before the encoder, 1 or 2. With 2, its finest content has a
            quarter of the side of a slice: enough at 512 px, too coarse for small factories.
    """

    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 14, 3)
    shrink: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.width < 1:
            raise ConfigError(f"width is {self.width}; it must be at least 1")
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ConfigError(f"blocks is {self.blocks}; choose four numbers of at least 1")
        if self.shrink not in (1, 2):
            raise ConfigError(f"shrink is {self.shrink}; choose 1 or 2")

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self) | {"blocks": list(self.blocks)}


class RoleNorm(nn.Module):
    """Instance norm with a gain and an offset for each role.

    The published norm uses the statistics of the batch, also at inference, so that the labels of a slice depend on the
    other slices of the batch; statistics of each slice avoid that.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, channels))
        self.bias = nn.Parameter(torch.zeros(2, channels))

    def forward(self, x: Tensor, role: Tensor) -> Tensor:
        """(B, C, H, W) and roles (B,) integers to (B, C, H, W)."""
        x = F.instance_norm(x)
        return x * self.weight[role][:, :, None, None] + self.bias[role][:, :, None, None]

    @torch.no_grad()
    def copy_source_to_target(self) -> None:
        """Give the target role the gain and the offset of the source role."""
        for parameter in (self.weight, self.bias):
            parameter[TARGET] = parameter[SOURCE]


def _conv(c_in: int, c_out: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    """Padded convolution without bias, with weights from N(0, 0.1^2)."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=0.1)
    return conv


class ResidualBlock(nn.Module):
    """Norm, convolution, norm, PReLU, strided convolution, norm, plus the shortcut ("improved ResNet" of ArcFace)."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RoleNorm(count) for count in (c_in, c_out, c_out))
        self.conv1, self.prelu, self.conv2 = _conv(c_in, c_out), nn.PReLU(c_out), _conv(c_out, c_out, stride=stride)
        self.shortcut = _conv(c_in, c_out, kernel=1, stride=stride) if stride > 1 else None
        self.shortcut_norm = RoleNorm(c_out) if stride > 1 else None

    def forward(self, x: Tensor, role: Tensor) -> Tensor:
        """(B, c_in, H, W) and roles (B,) integers to (B, c_out, H / stride, W / stride)."""
        first, second, third = self.norms
        y = self.prelu(second(self.conv1(first(x, role)), role))
        y = third(self.conv2(y), role)
        return y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x), role))


class ContentLayer(nn.Module):
    """Turns a stage's feature map into content with as many channels as the generator has at that side."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RoleNorm(count) for count in (c_in, c_out, c_out))
        self.conv1, self.prelu, self.conv2 = _conv(c_in, c_out), nn.PReLU(c_out), _conv(c_out, c_out)

    def forward(self, x: Tensor, role: Tensor) -> Tensor:
        """(B, c_in, r, r) and roles (B,) integers to content (B, c_out, r, r)."""
        first, second, third = self.norms
        y = self.prelu(second(self.conv1(first(x, role)), role))
        return third(self.conv2(y), role)


class SkipGate(nn.Module):
    """Decides per channel and pixel how much of the content enters the generator."""

    def __init__(self, coarse: int, channels: int) -> None:
        super().__init__()
        options = {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}
        self.candidate = nn.Conv2d(coarse, channels, **options)
        self.reset, self.mask, self.update = (nn.Conv2d(2 * channels, channels, **options) for _ in range(3))

    def forward(self, hidden: Tensor, content: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One step from a coarse side to the next finer one.

        Args:
            hidden: state of the coarser side (B, coarse, r / 2, r / 2).
            content: of this side (B, channels, r, r).

        Returns: the state of this side, the gated content, and the mask in [0, 1), each (B, channels, r, r).
        """
        state = F.leaky_relu(self.candidate(F.interpolate(hidden, scale_factor=2.0)), 0.2)
        both = torch.cat([state, content], dim=1)
        hidden = torch.sigmoid(self.reset(both)) * state
        mask = torch.tanh(torch.relu(self.mask(both)))
        return hidden, mask * self.update(torch.cat([hidden, content], dim=1)), mask


@dataclass(frozen=True)
class Encoding:
    """Output of the encoder for a batch of slices.

    Attributes:
        codes: (B, n_latent, latent_dim), offsets of the latents from the role's mean latent.
        content: by side r, the maps to insert and the share of the generator's own maps to keep, both (B, c, r, r).
    """

    codes: Tensor
    content: dict[int, tuple[Tensor, Tensor]]


class Encoder(nn.Module):
    """Encodes downsampled slices to latents and content maps for the role in which they will be decoded.

    Args:
        config: size of the encoder.
        factory: configuration of the generator that decodes.
        n_latent: number of latents per slice, one for each styled layer of the generator.
    """

    def __init__(self, config: EncoderConfig, factory: FactoryConfig, n_latent: int) -> None:
        super().__init__()
        widths = [config.width * factor for factor in STAGE_WIDTHS]
        self.stem = _conv(factory.image_channels, widths[0])
        self.stem_norm, self.stem_prelu = RoleNorm(widths[0]), nn.PReLU(widths[0])
        # A map of one pixel has no statistics of its own: stages end at side 2.
        sides = [side for k in range(1, 5) if (side := factory.image_size // config.shrink >> k) >= 2]
        self.stages = nn.ModuleList()
        for c_in, c_out, count in zip(widths, widths[1:], config.blocks, strict=False):
            if len(self.stages) < len(sides):
                blocks = [ResidualBlock(c_in if n == 0 else c_out, c_out, 2 if n == 0 else 1) for n in range(count)]
                self.stages.append(nn.ModuleList(blocks))
        self.n_latent, self.latent_dim = n_latent, factory.latent_dim
        pooled = sum(widths[1 : len(sides) + 1]) * POOLED_SIDE**2
        self.codes = nn.Linear(pooled, n_latent * factory.latent_dim)  # the published n layers as one
        self.role_embedding = EqualisedLinear(2, n_latent // 2 * factory.latent_dim)
        channels = dict(zip(factory.resolutions, factory.channels, strict=True))
        self.content_sides = [side for side in sides if side in channels]  # fine to coarse
        self.content = nn.ModuleList(
            ContentLayer(width, channels[side]) for width, side in zip(widths[1:], self.content_sides, strict=False)
        )
        coarse_to_fine = [channels[side] for side in reversed(self.content_sides)]
        self.gates = nn.ModuleList(SkipGate(*pair) for pair in itertools.pairwise(coarse_to_fine))

    def forward(self, x: Tensor, role: Tensor) -> Encoding:
        """Slices (B, C, s, s) in [-1, 1], s the factory's side divided by `shrink`, and roles (B,) integers to an
        encoding."""
        x = self.stem_prelu(self.stem_norm(self.stem(x), role))
        maps = []
        for stage in self.stages:
            for block in stage:
                x = block(x, role)
            maps.append(x)
        pooled = torch.cat([F.adaptive_avg_pool2d(features, POOLED_SIDE) for features in maps], dim=1).flatten(1)
        codes = self.codes(pooled).view(len(x), self.n_latent, self.latent_dim)
        one_hot = F.one_hot(role, 2).to(x.dtype)
        scales = pixel_norm(self.role_embedding(one_hot)).view(len(x), self.n_latent // 2, self.latent_dim)
        return Encoding(codes * scales.repeat_interleave(2, dim=1), self._content(maps, role))

    def _content(self, maps: list[Tensor], role: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
        """Feature maps of the stages, each (B, c, r, r), and roles (B,) to the `content` of an encoding.

        From coarse to fine: the coarsest content replaces the generator's map, the others are gated.
        """
        contents = [layer(features, role) for layer, features in zip(self.content, maps, strict=False)][::-1]
        sides = self.content_sides[::-1]
        gated_contents: dict[int, tuple[Tensor, Tensor]] = {}
        if contents:
            hidden = contents[0]
            gated_contents[sides[0]] = (hidden, torch.ones_like(hidden))
        for side, gate, content in zip(sides[1:], self.gates, contents[1:], strict=True):
            hidden, gated, mask = gate(hidden, content)
            gated_contents[side] = (gated, 1 - mask)
        return gated_contents


class Translator(nn.Module):
    """Encoder, frozen generator and a label branch for each role.

    Args:
        generator: the factory's generator; it is frozen.
        classes: of the label branches, background included.
        domains: the factory's index of the source and of the target domain.
        config: size of the encoder.

    Attributes:
        heads: label branches of the two roles.
        phi: share of the generator's own maps that the encoder's content has replaced, 0 to 1.
        mean_codes: (2, latent_dim), mean latent of each role.
        constant: (1, c, r, r), mean input map of the generator.
    """

    def __init__(self, generator: Generator, classes: int, domains: Sequence[int], *, config: EncoderConfig) -> None:
        super().__init__()
        self.config, self.domains, self.classes = config, tuple(domains), classes
        self.generator = generator.requires_grad_(False).eval()
        self.encoder = Encoder(config, generator.config, generator.n_latent)
        self.heads = nn.ModuleList(LabelBranch.for_generator(generator, classes) for _ in range(2))
        self.register_buffer("phi", torch.zeros(()))
        self.register_buffer("mean_codes", torch.zeros(2, generator.config.latent_dim))
        constant = torch.zeros(1, generator.config.channels[0], *[generator.config.start_size] * 2)
        self.register_buffer("constant", constant)

    @torch.no_grad()
    def compute_mean_codes(self, seed: int = 0) -> None:
        """Set `mean_codes` and `constant` to the means over random latents at the middle heights.

        Both are part of the state, so that a loaded translator has them.
        """
        config, rng = self.generator.config, torch.Generator().manual_seed(seed)
        middle = config.z_bins // 2
        bins = range(max(0, middle - 1), min(config.z_bins, middle + 2))
        device, constants = self.constant.device, []
        for role, domain in enumerate(self.domains):
            means = []
            for z_bin in bins:
                z = torch.randn(MEAN_DRAWS, config.latent_dim, generator=rng).to(device)
                for part in z.split(1000):
                    bin_of_each, domain_of_each = (
                        torch.full((len(part),), value, device=device) for value in (z_bin, domain)
                    )
                    style = self.generator.style_of(part, bin_of_each, domain_of_each)
                    means.append(style.w.mean(dim=(0, 1)))
                constants.append(style.constant[:1])
            self.mean_codes[role] = torch.stack(means).mean(0)
        self.constant.copy_(torch.cat(constants).mean(0, keepdim=True))

    def downsampled(self, images: Tensor) -> Tensor:
        """Slices (B, C, S, S) to the encoder's input (B, C, S / shrink, S / shrink), both in [-1, 1]."""
        return F.avg_pool2d(images, self.config.shrink)

    def decode(self, x: Tensor, role: Tensor, noise: list[Tensor] | None = None) -> Synthesis:
        """Encode slices and generate them again, each in its role.

        Args:
            x: output of `downsampled`, (B, C, s, s) in [-1, 1].
            role: (B,) integers.
            noise: one map (B or 1, 1, r, r) per layer of the generator; None takes its fixed maps, for equal results.

        Returns: slices (B, C, S, S) with the feature maps of the generator.
        """
        encoding = self.encoder(x, role)
        domains = torch.tensor(self.domains, device=x.device)[role]
        style = Style(
            encoding.codes + self.mean_codes[role][:, None], self.constant.expand(len(x), -1, -1, -1), domains
        )

        def insert(features: Tensor) -> Tensor:
            """Maps (B, c, r, r) of the generator to maps of the same shape with the content inserted."""
            if features.shape[-1] not in encoding.content:
                return features
            content, keep = encoding.content[features.shape[-1]]
            return (1 - self.phi) * features * keep + self.phi * content

        return self.generator.synthesise(style, noise or self.generator.fixed_noise(), insert)

    def train(self, mode: bool = True) -> Translator:
        """Switch the training mode, except of the generator and of frozen heads, which must not update statistics."""
        super().train(mode)
        self.generator.eval()
        for head in self.heads:
            if not any(parameter.requires_grad for parameter in head.parameters()):
                head.eval()
        return self

    def probabilities(self, images: Tensor, role: int) -> Tensor:
        """Class probabilities (B, classes, S, S) of slices (B, C, S, S) in [-1, 1], decoded in one role."""
        roles = torch.full((len(images),), role, device=images.device)
        return torch.softmax(self.heads[role](self.decode(self.downsampled(images), roles)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Target slices (B, C, S, S) to log-probabilities (B, classes, S, S), the weighted mean over both roles."""
        inter, intra = self.probabilities(images, SOURCE), self.probabilities(images, TARGET)
        return (INTER_WEIGHT * inter + (1 - INTER_WEIGHT) * intra).clamp(min=1e-8).log()
