"""Weighted means of the tensors that sites send."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ....errors import FederationError


def weighted_mean(
    sent: Callable[[int], Mapping[str, Tensor]], shares: Mapping[int, float], before: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Mean of the sites' tensors by name, with one site in memory at a time; `before` where no site has a share.

    Args:
        sent: returns the tensors of a site by name. Whole numbers, such as counters of batches, are rounded.
        shares: by site, adding up to one, or all 0.
        before: tensors by name that the sites had received for this round.

    Raises: FederationError for NaN or infinite weights of a site with a share.
    """
    return mean_by_name(sent, {site: dict.fromkeys(before, share) for site, share in shares.items()}, before)


def mean_by_name(
    sent: Callable[[int], Mapping[str, Tensor]],
    shares: Mapping[int, Mapping[str, float]],
    before: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """As `weighted_mean`, with shares by site and by name of a tensor.

    Raises: FederationError for NaN or infinite weights of a site with a share.
    """
    sums: dict[str, Tensor] = {}
    for site, own in shares.items():
        if not any(own.values()):
            continue
        for name, tensor in sent(site).items():
            if not own[name]:
                continue
            if not torch.isfinite(tensor).all():
                raise FederationError(f"site {site + 1} sent NaN or infinite weights; choose a lower learning_rate")
            sums[name] = sums.get(name, 0) + own[name] * tensor.double()
    merged = dict(before)
    for name, tensor in sums.items():
        kind = before[name].dtype
        merged[name] = tensor.to(kind) if kind.is_floating_point else tensor.round().to(kind)
    return merged
