"""How synthetic slices cover real ones, and whether they copy them; on features or pixels, without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 3  # of the manifold estimate (Kynkaanniemi et al. 2019)
RESAMPLES = 1000
LEVEL = 0.95  # of confidence intervals


@dataclass(frozen=True)
class Estimate:
    """A number with its confidence interval."""

    value: float
    low: float
    high: float


def frechet_distance(real: Tensor, synthetic: Tensor) -> float:
    """Squared Frechet distance of two normal distributions with the means and covariances of (N, d) and (M, d)
    (Heusel et al. 2017, whose features were a trained network's)."""
    x, y = real.double(), synthetic.double()
    means = (x.mean(0) - y.mean(0)).square().sum()
    a, b = torch.cov(x.t()), torch.cov(y.t())
    # The trace of the root of a b is the sum of the roots of the eigenvalues of the symmetric root(a) b root(a).
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return float(means + a.trace() + b.trace() - 2 * cross)


def precision_and_recall(real: Tensor, synthetic: Tensor) -> tuple[float, float]:
    """Share of synthetic features within the real ones' manifold, and of real ones within the synthetic (k = 3)."""
    return _share_within(synthetic, real), _share_within(real, synthetic)


def _share_within(points: Tensor, manifold: Tensor) -> float:
    own = torch.cdist(manifold.double(), manifold.double())
    radius = own.kthvalue(min(NEIGHBOURS + 1, len(own)), dim=1).values  # the nearest is the point itself
    return float((torch.cdist(points.double(), manifold.double()) <= radius).any(dim=1).double().mean())


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and number of the nearest of (M, d) for each of (N, d)."""
    found = [torch.cdist(part.double(), others.double()).min(dim=1) for part in points.split(256)]
    return torch.cat([one.values for one in found]), torch.cat([one.indices for one in found])


def copying_ratio(to_trained: Tensor, to_held_out: Tensor, group: Tensor, *, seed: int = 0) -> Estimate:
    """Mean distance of synthetic slices to their nearest trained slice over that to their nearest held-out slice.

    1 if they are no nearer to what the generator has seen than to what it has not; near 0 for copies. The interval is
    a bootstrap over groups (synthetic subjects), whose slices are alike.

    Args:
        to_trained, to_held_out: (N,) distances; both sets should hold equally many slices, see `audit`.
        group: (N,) integers.
    """

    def ratio(chosen: Tensor) -> float:
        return float(to_trained[chosen].mean() / to_held_out[chosen].mean().clamp(min=1e-12))

    return _bootstrap(ratio, [group], seed)


def attack_auc(
    members: Tensor, others: Tensor, member_group: Tensor, other_group: Tensor, *, seed: int = 0
) -> Estimate:
    """How well "it has a near synthetic neighbour" tells patients that trained from others: area under the curve.

    1/2 is guessing. Slices are summarised by patient (mean distance), because a patient is what must not be told; the
    interval is a bootstrap over patients.

    Args:
        members, others: (N,) and (M,) distances of real slices to their nearest synthetic one.
        member_group, other_group: patients, integers.
    """
    inside, outside = (_by_group(values, group) for values, group in ((members, member_group), (others, other_group)))

    def area(first: Tensor, second: Tensor) -> float:
        nearer = (inside[first][:, None] < outside[second][None]).double()
        equal = (inside[first][:, None] == outside[second][None]).double()
        return float((nearer + equal / 2).mean())

    return _bootstrap(area, [torch.arange(len(inside)), torch.arange(len(outside))], seed)


def _by_group(values: Tensor, group: Tensor) -> Tensor:
    return torch.stack([values[group == one].mean() for one in group.unique()])


def _bootstrap(statistic: Callable[..., Tensor], groups: list[Tensor], seed: int) -> Estimate:
    """The statistic of all, and its interval when whole groups are drawn with replacement."""
    rng = torch.Generator().manual_seed(seed)
    places = [[torch.nonzero(group == one)[:, 0] for one in group.unique()] for group in groups]
    values = []
    for _ in range(RESAMPLES):
        chosen = []
        for members in places:
            drawn = torch.randint(len(members), (len(members),), generator=rng).tolist()
            chosen.append(torch.cat([members[k] for k in drawn]))
        values.append(statistic(*chosen))
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(tails).tolist()
    return Estimate(statistic(*(torch.arange(len(group)) for group in groups)), low, high)
