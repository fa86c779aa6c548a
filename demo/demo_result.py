"""What a demonstration measured, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..adaptation.evaluation import Score

METHODS = ("no_adaptation", "augmentation_only", "adapted", "oracle")


@dataclass
class DemoResult:
    """What the run measured, and where everything lies."""

    dice: dict[str, dict[str, float]]
    scores: dict[str, dict[str, list[Score]]]  # site -> method -> scores
    seconds: float
    seed: int
    versions: dict[str, str]
    files: dict[str, Path] = field(default_factory=dict)
