"""The palette generator: every domain paints the same soft tissue maps with grey levels or colours of its own.

If the domain enters everywhere, as in the published generator, the same outline may show different tissue in two
domains, and then labels do not carry over. Here the domain enters in this head alone, so a latent has the same anatomy
in every domain.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..config import FactoryConfig
from .generator import Edit, Generator, Style, Synthesis
from .layers import EqualisedLinear, ModulatedConv, activate, pixel_norm, upsample

LEVELS = (-1.0, 0.0, 1.0)  # dark, middle and bright on the [-1, 1] scale of slices
FACTORIAL_ROWS = 3  # up to here all combinations of levels are affordable: 3^3 + 1 = 28 maps
ROW_CORRELATION = 0.2
MAPS_PER_STRUCTURE = 3  # at most; background has at least half of all maps
STRUCTURE_BIAS = -1.0  # of the maps of structures at first: structures are small


def palette_table(num_domains: int, generator: torch.Generator, *, channels: int = 1) -> Tensor:
    """Initial grey levels of the tissue maps in every channel; map 0 is background, -1 everywhere.

    A row is one channel of one domain. Up to three rows get every combination of three levels, so that any pair of
    polarities exists from the start: two rows that are correlated at first keep the same polarity through training,
    and then labels do not carry over. For more, balanced random rows are drawn until no two have a correlation above
    0.2.

    Args:
        num_domains: number of domains.
        generator: source of the random rows.
        channels: channels of the image, such as the three of a colour.

    Returns: (num_domains * channels, maps) in [-1, 1]; the channels of a domain follow each other.
    Raises: ConfigError if no such table was found.
    """
    rows = num_domains * channels
    if rows <= FACTORIAL_ROWS:
        table = torch.tensor(list(itertools.product(LEVELS, repeat=rows))).t()
    else:
        # 9 maps a domain, and more than 27 for several channels: wide enough for low correlations to exist.
        table = _uncorrelated_rows(rows, 9 * max(num_domains, channels + 2), generator)
    return torch.cat([torch.full((rows, 1), -1.0), table], dim=1)


def _uncorrelated_rows(count: int, maps: int, generator: torch.Generator) -> Tensor:
    """Random grey levels (count, maps) whose rows are nearly uncorrelated; maps is a multiple of the levels."""
    balanced = torch.tensor(LEVELS).repeat(maps // len(LEVELS))
    rows = torch.zeros(0, maps)
    if rows.is_meta:  # a network without values, of which only the shapes are asked for
        return rows.new_empty(count, maps)
    for _ in range(20_000):
        row = balanced[torch.randperm(len(balanced), generator=generator)]
        # Balanced rows have a mean of zero and equal lengths.
        if ((rows @ row).abs() <= ROW_CORRELATION * row.square().sum()).all():
            rows = torch.cat([rows, row[None]])
        if len(rows) == count:
            return rows
    raise ConfigError(f"no palette found for {count} domains times channels; use fewer domains, or head 'image'")


def grouped_by_class(table: Tensor, classes: int) -> tuple[Tensor, int]:
    """The maps of a palette in the order of their classes: those of background first, then as many for every structure.

    The maps of a structure are dealt out of the whole table in large steps, so that they differ in every row and any
    domain can begin with dark, middle or bright structures. A table with too few maps for this many structures is
    repeated.

    Args:
        table: (rows, maps), see `palette_table`; map 0 stays the first of background.
        classes: number of label values, background included; at least 2.

    Returns: (rows, at least maps), and the number of maps of each structure.
    """
    background, tissues, structures = table[:, :1], table[:, 1:], classes - 1
    tissues = tissues.repeat(1, -(-2 * structures // tissues.shape[1]))
    count = tissues.shape[1]
    each = min(MAPS_PER_STRUCTURE, count // (2 * structures))
    step = next(s for s in range(max(1, count // 2), 0, -1) if math.gcd(s, count) == 1)
    order = [(number * step) % count for number in range(count)]
    dealt, left = order[: each * structures], sorted(order[each * structures :])
    return torch.cat([background, tissues[:, left], tissues[:, dealt]], dim=1), each


class PaletteHead(nn.Module):
    """image_c = sum_k p_k (m[domain, c, k] + 0.1 lin_ck(w)) + sigma[domain, c] noise_c,  p = softmax(2 logits + bias).

    With classes, the last maps belong to structures, equally many to each: the soft label of a structure is the sum of
    its maps, that of background the sum of all others. Image and label are thus drawn by the same weights (as in
    Li et al. 2021, "Semantic segmentation with generative models", but without a label network).

    Args:
        num_domains: number of domains.
        latent_dim: length of the style.
        generator: source of the initial palette.
        channels: channels of the image.
        classes: number of label values, background included; 0 draws no labels.
    """

    def __init__(
        self, num_domains: int, latent_dim: int, generator: torch.Generator, *, channels: int = 1, classes: int = 0
    ) -> None:
        super().__init__()
        table = palette_table(num_domains, generator, channels=channels)
        self.structures, self.maps_each = max(0, classes - 1), 0
        if classes:
            table, self.maps_each = grouped_by_class(table, classes)
        table = table.reshape(num_domains, channels, -1)
        self.channels, self.num_maps = channels, table.shape[2]
        # Of one channel, (domains, maps) and (domains,): so they are in files from before images had channels.
        self.grey = nn.Parameter(table.squeeze(1))  # (domains, channels, maps)
        sigma = torch.full((num_domains, channels), -3.0)  # e^-3 = 0.05 on the [-1, 1] scale
        self.log_sigma = nn.Parameter(sigma.squeeze(1))  # (domains, channels)
        bias = torch.zeros(self.num_maps)
        bias[self.num_maps - self.structures * self.maps_each :] = STRUCTURE_BIAS
        self.bias = nn.Parameter(bias)
        self.shade = EqualisedLinear(latent_dim, channels * self.num_maps)

    def anatomy(self, logits: Tensor) -> Tensor:
        """Logits (B, maps, H, W) to soft tissue maps of the same shape that sum to 1 over dimension 1."""
        return torch.softmax(2 * logits + self.bias[:, None, None], dim=1)

    def soft_labels(self, anatomy: Tensor) -> Tensor:
        """Soft tissue maps (B, maps, H, W) to soft labels (B, classes, H, W) that sum to 1 over dimension 1."""
        first = self.num_maps - self.structures * self.maps_each
        background, of_structures = anatomy[:, :first], anatomy[:, first:]
        groups = of_structures.unflatten(1, (self.structures, self.maps_each)).sum(dim=2)
        return torch.cat([background.sum(dim=1, keepdim=True), groups], dim=1)

    def paint(self, anatomy: Tensor, w: Tensor, domain: Tensor, *, noise: Tensor) -> Tensor:
        """Slices of tissue maps.

        Args:
            anatomy: (B, maps, H, W), tissue maps that sum to 1.
            w: (B, latent_dim), the style.
            domain: (B,) integers, the domain indices.
            noise: (B or 1, C or 1, H, W), unit normal.

        Returns: (B, C, H, W), about [-1, 1].
        """
        batch, shape = len(w), (len(w), self.channels, self.num_maps)
        level = self.grey[domain].view(shape) + 0.1 * self.shade(w).view(shape)
        # Channel by channel: one sum over all channels would round that of a single channel otherwise than before.
        image = torch.stack([torch.einsum("bkhw,bk->bhw", anatomy, each) for each in level.unbind(dim=1)], dim=1)
        return image + self.log_sigma[domain].exp().view(batch, self.channels, 1, 1) * noise


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
        rng = torch.Generator().manual_seed(len(config.domains))
        self.head = PaletteHead(len(config.domains), d, rng, channels=config.image_channels, classes=config.classes)
        self.to_logits = nn.ModuleList(
            StyledLayer(width, self.head.num_maps, 1, style_dim=d, demodulate=False) for width in widths
        )
        self.texture = None
        if config.texture:
            self.texture = StyledLayer(widths[-1], config.image_channels, 1, style_dim=d, demodulate=False)
        # Numbered as in the published network: a block's logits and the next block's first layer share a latent.
        self.n_latent = 2 * len(widths)
        self.num_maps, self.noise_channels = self.head.num_maps, config.image_channels

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
        """See `Generator.synthesise`; noise is one map (B or 1, C or 1, S, S)."""
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
        labels = self.head.soft_labels(anatomy) if self.config.classes else None
        return Synthesis(image, anatomy, features, labels)

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
