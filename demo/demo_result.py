"""The measurements of a demonstration, from which the report is made."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..adaptation.evaluation.scores import Score

METHODS = ("no_adaptation", "augmentation_only", "adapted", "oracle")


@dataclass(kw_only=True)
class DemoResult:
    """The measurements of a demonstration.

    Attributes:
        dice: site to method to mean foreground Dice on held-out subjects, in [0, 1].
        scores: site to method to one score per held-out subject and class.
        seconds: duration of the whole run.
        seed: seed of the run.
        versions: package to version.
        files: what a file contains to its path.
    """

    dice: dict[str, dict[str, float]]
    scores: dict[str, dict[str, list[Score]]]
    seconds: float
    seed: int
    versions: dict[str, str]
    files: dict[str, Path] = field(default_factory=dict)
