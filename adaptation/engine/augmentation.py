"""How random windows of slices look: position and shape, contrast, appearance; the presets of the engine."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .random_appearance import MILD, PRESETS, AppearanceVariation, random_appearance
from .random_contrast import random_contrast
from .random_windows import WindowVariation, draw_centres, random_windows
from .segmenter_config import ContrastMix, SegmenterConfig
from .training_plan import TrainingPlan


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What random windows look like.

    Attributes:
        windows: their position and shape.
        contrast: random contrast; None leaves the contrast as it is.
        appearance: colours, gamma, bias, blur, resolution and noise.
        colour: whether the channels are red, green and blue; otherwise each varies by itself.
    """

    windows: WindowVariation = field(default_factory=WindowVariation)
    contrast: ContrastMix | None = None
    appearance: AppearanceVariation = MILD
    colour: bool = False

    @classmethod
    def of(cls, config: SegmenterConfig, plan: TrainingPlan) -> Augmentation:
        """That of a segmenter's training."""
        windows = WindowVariation(rotation=plan.rotation, mirror=plan.mirror)
        return cls(windows=windows, contrast=config.contrast, appearance=PRESETS[config.appearance], colour=plan.colour)


def augmented_windows(
    images: Tensor,
    labels: Tensor,
    centres: Tensor,
    *,
    window: int,
    augmentation: Augmentation,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Random windows of slices, or of stacks of D slices, and their labels.

    Args:
        images: (B, C, S, S), or stacks (B, C, D, S, S), in [0, 1].
        labels: (B, L, S, S), or (B, L, D, S, S), integer, below 2^24.
        centres: (B, 2), row and column around which windows are drawn, pixels.
        window: pixels per side of the windows.
        augmentation: what they look like.
        rng: random generator on the CPU.

    Returns: images, about [0, 1], and labels int64, of the given shapes but for their sides, which are `window`.
    """
    variation = augmentation.windows
    places = draw_centres(centres, images.shape[-1], window=window, variation=variation, rng=rng)
    shown, found = random_windows(images, labels, places, window=window, variation=variation, rng=rng)
    if augmentation.contrast is not None:
        shown = random_contrast(shown, augmentation.contrast, rng=rng, colour=augmentation.colour)
    return random_appearance(shown, augmentation.appearance, rng=rng, colour=augmentation.colour), found


def augmented_slices(
    images: Tensor, labels: Tensor, augmentation: Augmentation, *, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Whole slices (B, C, S, S) in [-1, 1] and labels (B, L, S, S), varied; for networks that see whole slices.

    Returns: images (B, C, S, S), clipped to [-1, 1], and labels (B, L, S, S) int64.
    """
    size = images.shape[-1]
    middle = torch.full((len(images), 2), (size - 1) / 2)
    shown, found = augmented_windows((images + 1) / 2, labels, middle, window=size, augmentation=augmentation, rng=rng)
    return (2 * shown - 1).clamp(-1, 1), found


def restyled_slices(images: Tensor, augmentation: Augmentation, *, rng: torch.Generator) -> Tensor:
    """Whole slices (B, C, S, S) in [-1, 1] with another appearance at the same place, clipped to [-1, 1]."""
    shown = random_appearance((images + 1) / 2, augmentation.appearance, rng=rng, colour=augmentation.colour)
    return (2 * shown - 1).clamp(-1, 1)
