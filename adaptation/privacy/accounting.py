"""Differential privacy in numbers, by Opacus' RDP accountant: noise for an epsilon, and epsilon of what was done."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable

import numpy as np

from ...errors import ConfigError

# (noise, rate, updates): standard deviation of the noise over the clipping norm, probability of a patient in an update,
# number of updates.
Mechanism = tuple[float, float, int]
TOLERANCE = 1e-3  # share of the wanted epsilon that the noise may leave unused


def largest_delta(patients: int) -> float:
    """The largest delta that a site of this many training patients accepts: 1 / (10 patients).

    A site that published one patient of n at random would fulfil delta = 1/n with epsilon 0, so delta must be far below
    1/n. 1 / n^1.1, which is often used, is larger for every n below 10^10.
    """
    return 1 / (10 * patients)


@functools.lru_cache(maxsize=256)
def noise_multiplier(epsilon: float, delta: float, *, rate: float, updates: int) -> float:
    """The noise with which `updates` updates spend `epsilon`, over the clipping norm (Opacus' `get_noise_multiplier`).

    Args:
        epsilon: above 0; about a hundredth of it is left unused.
        delta: in (0, 1).
        rate: probability with which a patient is in an update, in (0, 1].
        updates: number of updates of all rounds together, from 1.

    Raises: ConfigError if no noise is large enough.
    """
    from opacus.accountants import RDPAccountant  # only now: slow to import
    from opacus.accountants.utils import get_noise_multiplier

    # Fewer of the accountant's 150 orders take a tenth of the time and leave about a hundredth of epsilon unused; a
    # bound by fewer orders holds for all of them.
    orders = [order for order in RDPAccountant.DEFAULT_ALPHAS if order % 0.5 == 0]
    try:
        return get_noise_multiplier(
            target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=updates, accountant="rdp",
            epsilon_tolerance=TOLERANCE * epsilon, alphas=orders,
        )  # fmt: skip
    except ValueError:
        raise ConfigError(
            f"dp_epsilon is {epsilon:g}; it must be larger for {updates} updates: no noise is large enough"
        ) from None


def epsilon_spent(history: Iterable[Mechanism], delta: float) -> float:
    """Epsilon of everything in the history together, for this delta; 0 for an empty history.

    It equals `opacus.accountants.RDPAccountant.get_epsilon`. That computes every entry anew; here the costs of one
    update are remembered, since a store's history grows with every round.
    """
    from opacus.accountants import RDPAccountant  # only now: slow to import
    from opacus.accountants.analysis.rdp import get_privacy_spent

    updates: Counter[tuple[float, float]] = Counter()
    for noise, rate, count in history:
        updates[noise, rate] += count
    if not updates:
        return 0.0
    spent = sum(count * _cost_of_update(noise, rate) for (noise, rate), count in updates.items())
    return float(get_privacy_spent(orders=RDPAccountant.DEFAULT_ALPHAS, rdp=spent, delta=delta)[0])


@functools.lru_cache(maxsize=1024)
def _cost_of_update(noise: float, rate: float) -> np.ndarray:
    """Renyi differential privacy of one update, at the accountant's orders."""
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    return np.asarray(compute_rdp(q=rate, noise_multiplier=noise, steps=1, orders=RDPAccountant.DEFAULT_ALPHAS))
