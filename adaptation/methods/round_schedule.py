"""Learning rates over a run, and parts of a round. It needs no PyTorch, so that policies can use it too."""

from __future__ import annotations

RATE_POWER = 0.9  # of the polynomial decay, as nnU-Net has it


def decayed_rate(first: float, *, done: int, total: int) -> float:
    """Learning rate after `done` of all `total` updates: first (1 - done / total)^0.9, and 0 after the last."""
    return first * max(0.0, 1 - done / total) ** RATE_POWER


def body_updates(updates: int, share: float) -> int:
    """Number of a round's updates, the last ones, in which FedICRA trains everything but the output layer.

    `share` is in [0, 1].
    """
    return round(updates * share)
