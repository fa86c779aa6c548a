"""How close synthetic slices are to real ones, without any trained network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (16, 32, 64, 64)  # random filters of every level; each level halves the side
FEATURE_SEED = 20_240_706  # the features are the same in every run and for every site


@torch.no_grad()
def random_features(images: Tensor, *, batch_size: int = 64) -> Tensor:
    """Means and deviations of random convolutional filters at four scales: (N, 1, S, S) to (N, 352).

    Random filters tell textures and layouts apart well enough to follow a training run; they are no substitute
    for trained features when two good generators are to be ranked.
    """
    filters = list(_filters(images.device))
    return torch.cat([_describe(part, filters) for part in images.float().split(batch_size)])


def kernel_distance(real: Tensor, synthetic: Tensor) -> float:
    """Kernel inception distance (Binkowski et al. 2018) of features (N, d) and (M, d): unbiased, so it may be < 0.

    Squared maximum mean discrepancy with the kernel (x y / d + 1)^3, features standardised by the real ones.
    """
    mean, deviation = real.double().mean(dim=0), real.double().std(dim=0) + 1e-6
    x, y = (real.double() - mean) / deviation, (synthetic.double() - mean) / deviation

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.t() / a.shape[1] + 1) ** 3

    def within(a: Tensor) -> Tensor:
        gram = kernel(a, a)
        return (gram.sum() - gram.diagonal().sum()) / (len(a) * (len(a) - 1))

    return float(within(x) + within(y) - 2 * kernel(x, y).mean())


def _filters(device: torch.device) -> Iterator[Tensor]:
    rng, c_in = torch.Generator().manual_seed(FEATURE_SEED), 1
    for width in WIDTHS:
        weight = torch.randn(width, c_in, 3, 3, generator=rng)
        yield (weight / weight.flatten(1).norm(dim=1)[:, None, None, None] * 2**0.5).to(device)
        c_in = width


def _describe(x: Tensor, filters: list[Tensor]) -> Tensor:
    described = []
    for weight in filters:
        x = F.leaky_relu(F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), weight), 0.2)
        described += [x.mean(dim=(2, 3)), x.std(dim=(2, 3))]
        x = F.avg_pool2d(x, 2)
    return torch.cat(described, dim=1)
