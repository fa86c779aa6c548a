"""What a site measures of the synthetic slices of its domain: a record of numbers, importable without PyTorch."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class SiteQuality:
    """How the generator's slices of one domain compare with a site's real ones; numbers that may leave the site.

    Attributes:
        distance: see `quality.kernel_distance`, with random features; 0 for equal distributions.
        layout: see `quality.layout_agreement`; 1 if tissue is bright and dark where it is in the site's patients. NaN
            for pictures that do not even agree among themselves, because what they show may lie anywhere.
        contrast: spread within the channels of a slice, synthetic over real; near 0 if the domain has collapsed.
    """

    distance: float
    layout: float
    contrast: float

    def to_dict(self) -> dict[str, float]:
        """The three numbers by name."""
        return asdict(self)
