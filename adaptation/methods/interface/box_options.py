"""The settings with which methods learn from boxes, and the loss that they weigh."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ....errors import ConfigError
from ...losses.box_losses import missing_size, tightness
from .option_checks import check_at_least


@dataclass(frozen=True, kw_only=True)
class BoxOptions:
    """How a method learns from boxes; a weight of 0 leaves a term out. Raises: ConfigError if a value is out of range.

    Attributes:
        tightness_weight: weight of the term by which a structure reaches every row and column of its box.
        size_weight: weight of the term by which a structure fills a least share of its box.
        least_share: that share, above 0 and at most 1.
    """

    tightness_weight: float = 0.5
    size_weight: float = 0.5
    least_share: float = 0.25

    def __post_init__(self) -> None:
        check_at_least("tightness_weight", self.tightness_weight, 0)
        check_at_least("size_weight", self.size_weight, 0)
        if not 0 < self.least_share <= 1:
            raise ConfigError(f"least_share is {self.least_share}; choose above 0 and at most 1")


def box_loss(logits: Tensor, allowed: Tensor, lines: Tensor, options: BoxOptions) -> Tensor | float:
    """Weighted `tightness` and `missing_size`, a scalar; 0 if no slice has boxes.

    Args:
        logits: (B, C, S, S).
        allowed: (B, C, S, S) bool, candidates.
        lines: (B, 2, S, S), see `tightness`.
        options: the weights.
    """
    loss: Tensor | float = 0.0
    if not lines.any():
        return loss
    if options.tightness_weight:
        loss = loss + options.tightness_weight * tightness(logits, allowed, lines)
    if options.size_weight:
        loss = loss + options.size_weight * missing_size(logits, allowed, lines, share=options.least_share)
    return loss
