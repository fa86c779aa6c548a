"""The translator: an encoder to a frozen factory's latents and feature maps, and one label branch for each role.

After "Multi-Domain Brain Vessel Segmentation Through Feature Disentanglement", as RobustMedSeg reuses it. A *role* is
what an image is to be shown as: 0 the labelled domain (source), 1 the site's own (target). The same image can be
decoded in either role: in its own that is a reconstruction, in the other a translation; labels come along with both.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
POOLED = 3  # side of what the latents are computed from
MEAN_DRAWS = 10_000  # latents per height bin whose mean a role's codes start from
INTER_WEIGHT = 0.6  # of the labels read in the source role, against those in the target role (published)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Size of the encoder; the published one is width 64, blocks (3, 4, 14, 3), shrink 2.

    Raises: ConfigError if a value is out of range.

    Attributes:
        width: channels of the stem. blocks: of each of the four stages.
        shrink: how many times smaller than the factory's slices its input is, 1 or 2. With 2, its finest content is a
            quarter of the side: enough at 512 px, too coarse for small factories.
    """

    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 14, 3)
    shrink: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.width < 1 or len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ConfigError("the encoder's width must be positive, and its blocks four positive numbers")
        if self.shrink not in (1, 2):
            raise ConfigError(f"shrink is {self.shrink}; choose 1 or 2")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"blocks": list(self.blocks)}


class RoleNorm(nn.Module):
    """Instance norm with a gain and an offset of their own for each role.

    The published norm takes the statistics of whatever is in the batch, also at inference, so that a slice's labels
    depend on its neighbours; a slice's own statistics do not.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, channels))
        self.bias = nn.Parameter(torch.zeros(2, channels))

    def forward(self, x: Tensor, role: Tensor) -> Tensor:
        x = F.instance_norm(x)
        return x * self.weight[role][:, :, None, None] + self.bias[role][:, :, None, None]

    @torch.no_grad()
    def copy_source_to_target(self) -> None:
        for parameter in (self.weight, self.bias):
            parameter[TARGET] = parameter[SOURCE]


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, padding=kernel // 2, bias=False)
    nn.init.normal_(conv.weight, std=0.1)
    return conv


class ResidualBlock(nn.Module):
    """Norm, conv, PReLU, conv with the stride, norm; plus the shortcut. ("Improved ResNet" of face recognition.)"""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RoleNorm(count) for count in (c_in, c_out, c_out))
        self.conv1, self.prelu, self.conv2 = _conv(c_in, c_out), nn.PReLU(c_out), _conv(c_out, c_out, 3, stride)
        self.shortcut = _conv(c_in, c_out, 1, stride) if stride > 1 else None
        self.shortcut_norm = RoleNorm(c_out) if stride > 1 else None

    def forward(self, x: Tensor, role: Tensor) -> Tensor:
        first, second, third = self.norms
        y = self.prelu(second(self.conv1(first(x, role)), role))
        y = third(self.conv2(y), role)
        return y + (x if self.shortcut is None else self.shortcut_norm(self.shortcut(x), role))


class ContentLayer(nn.Module):
    """A stage's map to as many channels as the generator has at that side."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RoleNorm(count) for count in (c_in, c_out, c_out))
        self.conv1, self.prelu, self.conv2 = _conv(c_in, c_out), nn.PReLU(c_out), _conv(c_out, c_out)

    def forward(self, x: Tensor, role: Tensor) -> Tensor:
        first, second, third = self.norms
        y = self.prelu(second(self.conv1(first(x, role)), role))
        return third(self.conv2(y), role)


class SkipGate(nn.Module):
    """How much of the content enters the generator, channel by channel and pixel by pixel."""

    def __init__(self, coarse: int, channels: int) -> None:
        super().__init__()
        options = {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}
        self.candidate = nn.Conv2d(coarse, channels, **options)
        self.reset, self.mask, self.update = (nn.Conv2d(2 * channels, channels, **options) for _ in range(3))

    def forward(self, hidden: Tensor, content: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden state (B, coarse, r/2, r/2) and content (B, c, r, r) to the next state, gated content and mask."""
        state = F.leaky_relu(self.candidate(F.interpolate(hidden, scale_factor=2.0)), 0.2)
        both = torch.cat([state, content], dim=1)
        hidden = torch.sigmoid(self.reset(both)) * state
        mask = torch.tanh(torch.relu(self.mask(both)))
        return hidden, mask * self.update(torch.cat([hidden, content], dim=1)), mask


@dataclass(frozen=True)
class Encoding:
    """What the encoder says of slices.

    Attributes:
        codes: (B, n_latent, latent_dim), where from the role's mean latents the slices lie.
        content: by side: the maps (B, c, r, r) to insert and how much of the generator's own to keep.
    """

    codes: Tensor
    content: dict[int, tuple[Tensor, Tensor]]


class Encoder(nn.Module):
    """Slices, smaller than the factory's by `shrink`, and the role to show them in, to latents and content maps."""

    def __init__(self, config: EncoderConfig, factory: FactoryConfig, n_latent: int) -> None:
        super().__init__()
        widths = [config.width * factor for factor in STAGE_WIDTHS]
        self.stem, self.stem_norm, self.stem_prelu = _conv(1, widths[0]), RoleNorm(widths[0]), nn.PReLU(widths[0])
        # A map of one pixel has no statistics of its own: stages end at side 2.
        sides = [side for k in range(1, 5) if (side := factory.image_size // config.shrink >> k) >= 2]
        self.stages = nn.ModuleList()
        for c_in, c_out, count in zip(widths, widths[1:], config.blocks, strict=False):
            if len(self.stages) < len(sides):
                blocks = [ResidualBlock(c_in if n == 0 else c_out, c_out, 2 if n == 0 else 1) for n in range(count)]
                self.stages.append(nn.ModuleList(blocks))
        self.n_latent, self.latent_dim = n_latent, factory.latent_dim
        pooled = sum(widths[1 : len(sides) + 1]) * POOLED**2
        self.codes = nn.Linear(pooled, n_latent * factory.latent_dim)  # n published layers side by side
        self.role_embedding = EqualisedLinear(2, n_latent // 2 * factory.latent_dim)
        channels = dict(zip(factory.resolutions, factory.channels, strict=True))
        self.served = [side for side in sides if side in channels]  # fine to coarse
        self.content = nn.ModuleList(
            ContentLayer(width, channels[side]) for width, side in zip(widths[1:], self.served, strict=False)
        )
        coarse_to_fine = [channels[side] for side in reversed(self.served)]
        self.gates = nn.ModuleList(SkipGate(*pair) for pair in itertools.pairwise(coarse_to_fine))

    def forward(self, x: Tensor, role: Tensor) -> Encoding:
        """x: (B, 1, s, s) in [-1, 1], s the factory's side by `shrink`; role: (B,) integers."""
        x = self.stem_prelu(self.stem_norm(self.stem(x), role))
        maps = []
        for stage in self.stages:
            for block in stage:
                x = block(x, role)
            maps.append(x)
        pooled = torch.cat([F.adaptive_avg_pool2d(one, POOLED) for one in maps], dim=1).flatten(1)
        codes = self.codes(pooled).view(len(x), self.n_latent, self.latent_dim)
        shown = F.one_hot(role, 2).to(x.dtype)
        rows = pixel_norm(self.role_embedding(shown)).view(len(x), self.n_latent // 2, self.latent_dim)
        codes = codes * rows.repeat_interleave(2, dim=1)
        # Coarse to fine; the coarsest replaces the generator's map, the others are gated.
        found = [layer(one, role) for layer, one in zip(self.content, maps, strict=False)][::-1]
        sides = self.served[::-1]
        content: dict[int, tuple[Tensor, Tensor]] = {}
        if found:
            hidden = found[0]
            content[sides[0]] = (hidden, torch.ones_like(hidden))
        for side, gate, one in zip(sides[1:], self.gates, found[1:], strict=True):
            hidden, gated, mask = gate(hidden, one)
            content[side] = (gated, 1 - mask)
        return Encoding(codes, content)


class Translator(nn.Module):
    """Encoder, frozen generator and a label branch for each role.

    Attributes:
        generator: the factory's; never trained here.
        domains: the factory's index of the source and of the target domain.
        heads: label branches of the roles.
        phi: how far the encoder's content has taken the place of the generator's own maps, 0 to 1.
    """

    def __init__(self, generator: Generator, classes: int, domains: Sequence[int], config: EncoderConfig) -> None:
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
    def find_centre(self, seed: int = 0) -> None:
        """Mean latent of each role over the middle heights, and the mean smallest map: where every slice starts from.

        Part of the state, so that a loaded translator need not repeat it.
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
                    style = self.generator.style_of(
                        part,
                        torch.full((len(part),), z_bin, device=device),
                        torch.full((len(part),), domain, device=device),
                    )
                    means.append(style.w.mean(dim=(0, 1)))
                constants.append(style.constant[:1])
            self.mean_codes[role] = torch.stack(means).mean(0)
        self.constant.copy_(torch.cat(constants).mean(0, keepdim=True))

    def shrunk(self, images: Tensor) -> Tensor:
        """Slices (B, 1, S, S) as the encoder takes them."""
        return F.avg_pool2d(images, self.config.shrink)

    def decode(self, x: Tensor, role: Tensor, noise: list[Tensor] | None = None) -> Synthesis:
        """Slices x (B, 1, s, s), as `shrunk` gives them, as `role` (B,) shows them, with the generator's features.

        Args:
            noise: of the generator; None takes its fixed maps, so that results repeat.
        """
        encoding = self.encoder(x, role)
        domains = torch.tensor(self.domains, device=x.device)[role]
        style = Style(
            encoding.codes + self.mean_codes[role][:, None], self.constant.expand(len(x), -1, -1, -1), domains
        )

        def insert(own: Tensor) -> Tensor:
            if own.shape[-1] not in encoding.content:
                return own
            content, keep = encoding.content[own.shape[-1]]
            return (1 - self.phi) * own * keep + self.phi * content

        return self.generator.synthesise(style, noise or self.generator.fixed_noise(), insert)

    def train(self, mode: bool = True) -> Translator:
        """The generator stays as it is, and so does a frozen head: neither may gather statistics."""
        super().train(mode)
        self.generator.eval()
        for head in self.heads:
            if not any(parameter.requires_grad for parameter in head.parameters()):
                head.eval()
        return self

    def probabilities(self, images: Tensor, role: int) -> Tensor:
        """Class probabilities (B, classes, S, S) of target slices (B, 1, S, S), read in one role."""
        roles = torch.full((len(images),), role, device=images.device)
        return torch.softmax(self.heads[role](self.decode(self.shrunk(images), roles)), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities of target slices (B, 1, S, S): the weighted mean of both roles' readings."""
        inter, intra = self.probabilities(images, SOURCE), self.probabilities(images, TARGET)
        return (INTER_WEIGHT * inter + (1 - INTER_WEIGHT) * intra).clamp(min=1e-8).log()
