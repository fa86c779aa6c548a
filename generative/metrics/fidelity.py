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
    """A number with its confidence interval.

    Attributes:
        value: the number computed from all groups.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
    """

    value: float
    low: float
    high: float


def frechet_distance(real: Tensor, synthetic: Tensor) -> float:
    """Squared Frechet distance of two normal distributions with the means and covariances of the features.

    Heusel et al. 2017 define it on the features of a trained network.

    Args:
        real: (N, d) features.
        synthetic: (M, d) features.
    """
    x, y = real.double(), synthetic.double()
    means = (x.mean(0) - y.mean(0)).square().sum()
    a, b = torch.cov(x.t()), torch.cov(y.t())
    # The trace of the root of a b is the sum of the roots of the eigenvalues of the symmetric root(a) b root(a).
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.t()
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return float(means + a.trace() + b.trace() - 2 * cross)


def precision_and_recall(real: Tensor, synthetic: Tensor) -> tuple[float, float]:
    """Precision and recall with k = 3 nearest neighbours (Kynkaanniemi et al. 2019).

    Args:
        real: (N, d) features.
        synthetic: (M, d) features.

    Returns: the share of synthetic features within the manifold of the real ones, and the reverse, in [0, 1].
    """
    return _share_within(synthetic, real), _share_within(real, synthetic)


def _share_within(points: Tensor, manifold: Tensor) -> float:
    """Share of points (N, d) that lie within the k-nearest-neighbour ball of any of (M, d)."""
    own = torch.cdist(manifold.double(), manifold.double())
    radius = own.kthvalue(min(NEIGHBOURS + 1, len(own)), dim=1).values  # the nearest is the point itself
    return float((torch.cdist(points.double(), manifold.double()) <= radius).any(dim=1).double().mean())


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of others (M, d) for each of points (N, d): its distance (N,) and its index (N,)."""
    found = [torch.cdist(part.double(), others.double()).min(dim=1) for part in points.split(256)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def copying_ratio(to_trained: Tensor, to_held_out: Tensor, group: Tensor, *, seed: int = 0) -> Estimate:
    """Mean distance of synthetic slices to the nearest training slice over that to the nearest held-out slice.

    About 1 if they are no nearer to the training slices than to the held-out ones; near 0 for copies. The interval is
    a bootstrap over groups (synthetic subjects), because slices of one subject resemble each other.

    Args:
        to_trained: (N,) distances to the nearest slice that the generator was trained on.
        to_held_out: (N,) distances to the nearest held-out slice; both sets should hold equally many slices.
        group: (N,) integers, the subject of each synthetic slice.
        seed: seed of the bootstrap.
    """

    def ratio(chosen: Tensor) -> float:
        """Of the slices with these indices, (K,)."""
        return float(to_trained[chosen].mean() / to_held_out[chosen].mean().clamp(min=1e-12))

    return _bootstrap(ratio, [group], seed)


def attack_auc(
    members: Tensor, others: Tensor, *, member_group: Tensor, other_group: Tensor, seed: int = 0
) -> Estimate:
    """Area under the ROC curve of an attacker who takes patients with a near synthetic slice for training patients.

    1/2 is guessing. Slices are summarised by patient (mean distance), because membership is a property of the patient;
    the interval is a bootstrap over patients.

    Args:
        members: (N,) distances of training slices to the nearest synthetic slice.
        others: (M,) distances of held-out slices to the nearest synthetic slice.
        member_group: (N,) integers, the patient of each training slice.
        other_group: (M,) integers, the patient of each held-out slice.
        seed: seed of the bootstrap.
    """
    inside, outside = (_by_group(values, group) for values, group in ((members, member_group), (others, other_group)))

    def area(first: Tensor, second: Tensor) -> float:
        """Of training patients with indices (K,) and held-out ones with indices (L,)."""
        nearer = (inside[first][:, None] < outside[second][None]).double()
        equal = (inside[first][:, None] == outside[second][None]).double()
        return float((nearer + equal / 2).mean())

    return _bootstrap(area, [torch.arange(len(inside)), torch.arange(len(outside))], seed)


def _by_group(values: Tensor, group: Tensor) -> Tensor:
    """Mean of values (N,) in each group, (groups,)."""
    return torch.stack([values[group == number].mean() for number in group.unique()])


def _bootstrap(statistic: Callable[..., Tensor], groups: list[Tensor], seed: int) -> Estimate:
    """The statistic of all values, and its interval when whole groups are drawn with replacement.

    Args:
        statistic: a function of one index tensor (K,) per entry of `groups`.
        groups: group numbers (N,) of each set of values.
        seed: seed of the draws.
    """
    rng = torch.Generator().manual_seed(seed)
    places = [[torch.nonzero(group == number)[:, 0] for number in group.unique()] for group in groups]
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
