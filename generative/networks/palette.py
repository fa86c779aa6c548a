"""The palette generator: every domain paints the same soft tissue maps with grey levels of its own.

If the domain enters everywhere, as in the published generator, the same outline may show different tissue in two
domains, and then labels do not carry over. Here the domain enters in this head alone, so a latent has the same anatomy
in every domain.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import FactoryConfig
from .generator import Edit, Generator, Style, Synthesis
from .layers import EqualisedLinear, ModulatedConv, activate, pixel_norm, upsample

LEVELS = (-1.0, 0.0, 1.0)  # dark, middle and bright on the [-1, 1] scale of slices
FACTORIAL_DOMAINS = 3  # up to here all combinations of levels are affordable: 3^3 + 1 = 28 maps
ROW_CORRELATION = 0.2


def palette_table(num_domains: int, generator: torch.Generator) -> Tensor:
    """Initial grey levels of the tissue maps; map 0 is background, -1 in every domain.

    Up to three domains get every combination of three levels, so that any pair of polarities exists from the start:
    two rows that are correlated at first keep the same polarity through training, and then labels do not carry over.
    For more domains, balanced random rows are drawn until no two have a correlation above 0.2.

    Args:
        num_domains: number of domains.
        generator: source of the random rows.

    Returns: (num_domains, maps) in [-1, 1].
    Raises: ConfigError if no such table was found.
    """
    if num_domains <= FACTORIAL_DOMAINS:
        table = torch.tensor(list(itertools.product(LEVELS, repeat=num_domains))).t()
    else:
        table = _uncorrelated_rows(num_domains, generator)
    return torch.cat([torch.full((num_domains, 1), -1.0), table], dim=1)


def _uncorrelated_rows(num_domains: int, generator: torch.Generator) -> Tensor:
    """Random grey levels (num_domains, maps) whose rows are nearly uncorrelated."""
    repeats = 3 * num_domains  # 9 maps a domain: wide enough for low correlations to exist
    balanced = torch.tensor(LEVELS).repeat(repeats)
    rows: list[Tensor] = []
    for _ in range(20_000):
        row = balanced[torch.randperm(len(balanced), generator=generator)]
        if all(abs(torch.corrcoef(torch.stack([row, other]))[0, 1]) <= ROW_CORRELATION for other in rows):
            rows.append(row)
        if len(rows) == num_domains:
            return torch.stack(rows)
    raise ConfigError(f"no palette found for {num_domains} domains; use fewer domains, or head 'image'")


class PaletteHead(nn.Module):
    """image = sum_k p_k (m[domain, k] + 0.1 lin_k(w)) + sigma[domain] noise,  p = softmax(2 logits + bias)."""

    def __init__(self, num_domains: int, latent_dim: int, generator: torch.Generator) -> None:
        super().__init__()
        table = palette_table(num_domains, generator)
        self.num_maps = table.shape[1]
        self.grey = nn.Parameter(table)  # (domains, maps)
        self.log_sigma = nn.Parameter(torch.full((num_domains,), -3.0))  # e^-3 = 0.05 on the [-1, 1] scale
        self.bias = nn.Parameter(torch.zeros(self.num_maps))
        self.shade = EqualisedLinear(latent_dim, self.num_maps)

    def anatomy(self, logits: Tensor) -> Tensor:
        """Logits (B, maps, H, W) to soft tissue maps of the same shape that sum to 1 over dimension 1."""
        return torch.softmax(2 * logits + self.bias[:, None, None], dim=1)

    def paint(self, anatomy: Tensor, w: Tensor, domain: Tensor, *, noise: Tensor) -> Tensor:
        """Slices of tissue maps.

        Args:
            anatomy: (B, maps, H, W), tissue maps that sum to 1.
            w: (B, latent_dim), the style.
            domain: (B,) integers, the domain indices.
            noise: (B, 1, H, W) or (1, 1, H, W), unit normal.

        Returns: (B, 1, H, W), about [-1, 1].
        """
        level = self.grey[domain] + 0.1 * self.shade(w)  # (B, maps)
        image = torch.einsum("bkhw,bk->bhw", anatomy, level)[:, None]
        return image + self.log_sigma[domain].exp()[:, None, None, None] * noise


class StyledLayer(nn.Module):
    """Modulated convolution and bias."""

    def __init__(self, c_in: int, c_out: int, kernel: int, *, style_dim: int, demodulate: bool = True) -> None:
        super().__init__()
        self.conv = ModulatedConv(c_in, c_out, kernel, style_dim=style_dim, demodulate=demodulate)
        self.bias = nn.Parameter(torch.zeros(c_out))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """x (B, c_in, H, W) and w (B, style_dim) to (B, c_out, H, W)."""
        return self.conv(x, w) + self.bias[:, None, None]


class PaletteGenerator(Generator):
    """A small StyleGAN2 synthesis network with one learned constant per height bin and a palette head."""

    grain = True

    def __init__(self, config: FactoryConfig) -> None:
        super().__init__()
        self.config = config
        d, widths = config.latent_dim, config.channels
        self.bin_embedding = nn.Parameter(torch.randn(config.z_bins, d))
        self.domain_embedding = None
        if config.domain_enters == "mapping":
            self.domain_embedding = nn.Parameter(torch.randn(len(config.domains), d))
        entering = 2 * d if self.domain_embedding is None else 3 * d
        self.mapping = nn.ModuleList(
            EqualisedLinear(entering if layer == 0 else d, d, lr_multiplier=config.mapping_lr_multiplier)
            for layer in range(config.mapping_layers)
        )
        self.constant = nn.Parameter(torch.randn(config.z_bins, widths[0], config.start_size, config.start_size))
        self.first = StyledLayer(widths[0], widths[0], 3, style_dim=d)
        pairs = list(itertools.pairwise(widths))
        self.grow = nn.ModuleList(StyledLayer(wide, narrow, 3, style_dim=d) for wide, narrow in pairs)
        self.refine = nn.ModuleList(StyledLayer(narrow, narrow, 3, style_dim=d) for _, narrow in pairs)
        # An own random generator: adding a layer above must not change the palette.
        self.head = PaletteHead(len(config.domains), d, torch.Generator().manual_seed(len(config.domains)))
        self.to_logits = nn.ModuleList(
            StyledLayer(width, self.head.num_maps, 1, style_dim=d, demodulate=False) for width in widths
        )
        self.texture = StyledLayer(widths[-1], 1, 1, style_dim=d, demodulate=False) if config.texture else None
        # Numbered as in the published network: a block's logits and the next block's first layer share a latent.
        self.n_latent = 2 * len(widths)
        self.num_maps = self.head.num_maps

    def style_of(self, z: Tensor, z_bin: Tensor, domain: Tensor, *, encoding: Tensor | None = None) -> Style:
        """See `Generator.style_of`; the encoding is not used, and z (B, latent_dim) alone gives the anatomy.

        The domain is used only if the configuration lets it enter the mapping network.
        """
        entering = [pixel_norm(z), pixel_norm(self.bin_embedding[z_bin])]
        if self.domain_embedding is not None:
            entering.append(pixel_norm(self.domain_embedding[domain]))
        w = torch.cat(entering, dim=1)
        for layer in self.mapping:
            w = activate(layer(w))
        return Style(w[:, None].expand(-1, self.n_latent, -1), self.constant[z_bin], domain)

    def synthesise(self, style: Style, noise: list[Tensor], edit: Edit | None = None) -> Synthesis:
        """See `Generator.synthesise`; noise is one map (B or 1, 1, S, S)."""
        w = style.w.unbind(dim=1)
        x = activate(self.first(style.constant, w[0]))
        features, logits = [x], self.to_logits[0](x, w[1])
        for block, (grow, refine, to_logits) in enumerate(zip(self.grow, self.refine, self.to_logits[1:], strict=True)):
            x = activate(grow(upsample(x if edit is None else edit(x)), w[2 * block + 1]))
            x = activate(refine(x, w[2 * block + 2]))
            features.append(x)
            logits = upsample(logits) + to_logits(x, w[2 * block + 3])
        anatomy = self.head.anatomy(logits)
        image = self.head.paint(anatomy, w[-1], style.domain, noise=noise[0])
        if self.texture is not None:  # bounded: it may shade a tissue, but not change it into another
            image = image + self.config.texture * torch.tanh(self.texture(x, w[-1]))
        return Synthesis(image, anatomy, features)

    @property
    def feature_channels(self) -> tuple[int, ...]:
        return self.config.channels

    @property
    def noise_sides(self) -> list[int]:
        return [self.config.image_size]

    def fixed_noise(self) -> list[Tensor]:
        """One map of zeros (1, 1, S, S)."""
        side = self.config.image_size
        return [torch.zeros(1, 1, side, side, device=self.constant.device)]
