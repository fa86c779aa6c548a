"""How close synthetic slices are to real ones, without any trained network."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..networks.generator import Generator
from .site_quality import SiteQuality

WIDTHS = (16, 32, 64, 64)  # random filters of every level; each level halves the side
FEATURE_SEED = 20_240_706  # the features are the same in every run and for every site
MAX_SLICES, MAX_SIDE = 192, 64  # so many synthetic slices up to this side, fewer above to limit the time
MIN_SLICES = 32
MIN_COMMON_LAYOUT = 0.5  # agreement of two halves of real pictures, below which they have no layout to compare with
AIR_LEVEL = -0.9  # on the [-1, 1] scale of slices; brighter pixels show tissue


@torch.no_grad()
def site_quality(
    generator: Generator,
    real: Tensor,
    z_bin: Tensor,
    *,
    domain: int,
    encoding: Tensor | None = None,
    batch_size: int = 32,
) -> SiteQuality:
    """Compare synthetic slices of a domain with a site's real ones, at the same heights.

    Args:
        generator: in evaluation mode.
        real: (N, C, S, S) slices in [-1, 1].
        z_bin: (N,) integers, their height bins.
        domain: index of the site's domain.
        encoding: (encoding_dim,), the site's mean embedding, or None.
        batch_size: slices that are generated at once.
    """
    device, rng = next(generator.parameters()).device, torch.Generator().manual_seed(FEATURE_SEED)
    slices = max(MIN_SLICES, round(MAX_SLICES * min(1.0, MAX_SIDE / real.shape[-1])))
    chosen = torch.randint(len(real), (slices,), generator=rng)
    bins = z_bin[chosen]
    z = torch.randn(slices, generator.config.latent_dim, generator=rng)
    drawn = []
    for start in range(0, slices, batch_size):
        part = slice(start, start + batch_size)
        wanted = bins[part].to(device)
        noise = [layer.to(device) for layer in generator.draw_noise(len(wanted), rng)]
        given = None if encoding is None else encoding.to(device).expand(len(wanted), -1)
        domains = torch.full_like(wanted, domain)
        drawn.append(generator(z[part].to(device), wanted, domains, noise=noise, encoding=given).cpu())
    synthetic = torch.cat(drawn).clamp(-1, 1)
    spread = [float(images.flatten(2).std(dim=2).mean()) for images in (synthetic, real[chosen])]
    layout = layout_agreement(real, z_bin, synthetic=synthetic, synthetic_bin=bins)
    if generator.config.pictures and _own_agreement(real, z_bin) < MIN_COMMON_LAYOUT:
        layout = math.nan
    return SiteQuality(
        distance=kernel_distance(random_features(real[chosen]), random_features(synthetic)),
        layout=layout,
        contrast=spread[0] / max(spread[1], 1e-6),
    )


def layout_agreement(real: Tensor, real_bin: Tensor, *, synthetic: Tensor, synthetic_bin: Tensor) -> float:
    """Correlation of the mean slices of every height bin, over pixels where real slices show tissue.

    If the generator draws tissue bright that the site's scanner shows dark, the correlation is low or negative, however
    good edges and textures are. Bins without real or without synthetic slices are left out. Of several channels it is
    the mean correlation: over all channels together, different means of the channels alone would give a high one.

    Args:
        real: (N, C, S, S) slices in [-1, 1].
        real_bin: (N,) integers, their height bins.
        synthetic: (M, C, S, S) slices in [-1, 1].
        synthetic_bin: (M,) integers, their height bins.

    Returns: in [-1, 1]; 0 if there is nothing to compare.
    """
    common = sorted(set(real_bin.tolist()) & set(synthetic_bin.tolist()))
    if not common:
        return 0.0
    ours, theirs = (
        torch.stack([images[z_bin == value].mean(dim=0) for value in common], dim=1)  # (C, bins, S, S)
        for images, z_bin in ((real, real_bin), (synthetic, synthetic_bin))
    )
    shown = ours > AIR_LEVEL
    channels = range(len(ours))
    return sum(_correlation(ours[c][shown[c]], theirs[c][shown[c]]) for c in channels) / len(channels)


def _own_agreement(real: Tensor, z_bin: Tensor) -> float:
    """`layout_agreement` of every second of real slices (N, C, S, S) with the others, of height bins (N,)."""
    return layout_agreement(real[::2], z_bin[::2], synthetic=real[1::2], synthetic_bin=z_bin[1::2])


def _correlation(first: Tensor, second: Tensor) -> float:
    """Correlation of two sets of pixels (n,); 0 if there is nothing to compare."""
    pixels = torch.stack([first, second])
    if pixels.shape[1] < 2 or pixels.std(dim=1).min() < 1e-6:
        return 0.0
    return float(torch.corrcoef(pixels.double())[0, 1])


@torch.no_grad()
def random_features(images: Tensor, *, batch_size: int = 64) -> Tensor:
    """Means and standard deviations of random convolutional filters at four scales.

    Random filters distinguish textures and layouts well enough to follow a training run; they are no substitute for
    trained features when two good generators are to be ranked.

    Args:
        images: (N, C, S, S) slices in [-1, 1].
        batch_size: slices that are filtered at once.

    Returns: (N, 352) features, unbounded.
    """
    filters = list(_filters(images.shape[1], images.device))
    return torch.cat([_describe(part, filters) for part in images.float().split(batch_size)])


def kernel_distance(real: Tensor, synthetic: Tensor) -> float:
    """Kernel inception distance (Binkowski et al. 2018); unbiased, so it may be negative.

    Squared maximum mean discrepancy with the kernel (x y / d + 1)^3, features standardised by the real ones.

    Args:
        real: (N, d) features.
        synthetic: (M, d) features.
    """
    mean, deviation = real.double().mean(dim=0), real.double().std(dim=0) + 1e-6
    x, y = (real.double() - mean) / deviation, (synthetic.double() - mean) / deviation

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        """(N, d) and (M, d) to (N, M)."""
        return (a @ b.t() / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        """Mean kernel of different rows of (N, d), a scalar."""
        gram = kernel(a, a)
        return (gram.sum() - gram.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def _filters(channels: int, device: torch.device) -> Iterator[Tensor]:
    """Random filters of unit length times sqrt(2), (width, c_in, 3, 3) for each level, of slices of these channels."""
    rng, c_in = torch.Generator().manual_seed(FEATURE_SEED), channels
    for width in WIDTHS:
        weight = torch.randn(width, c_in, 3, 3, generator=rng)
        yield (weight / weight.flatten(1).norm(dim=1)[:, None, None, None] * 2**0.5).to(device)
        c_in = width


def _describe(x: Tensor, filters: list[Tensor]) -> Tensor:
    """Slices (B, C, S, S) to the mean and deviation of every channel at every level, (B, 352)."""
    described = []
    for weight in filters:
        x = F.leaky_relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight), 0.2)
        described += [x.mean(dim=(2, 3)), x.std(dim=(2, 3))]
        x = F.avg_pool2d(x, 2)
    return torch.cat(described, dim=1)
