"""How well predicted classes fit a site's own images, without labels."""

from __future__ import annotations

import numpy as np
import torch

from .labelled_slices import with_channels
from .segmenter import Segmenter


def explained_intensity(images: np.ndarray, segmenter: Segmenter, volume: np.ndarray | None = None) -> float:
    """Share of the foreground's grey-level variance that the predicted classes explain, in [0, 1].

    Between-class over total variance of the pixels that are predicted as any class but background, both summed over the
    channels. Tissue differs in grey level, so classes laid across tissue explain little. What true labels reach depends
    on the contrast (about a quarter to a half for brains): compare two segmenters on the same images, not sites.

    Args:
        images: (N, C, S, S), or (N, S, S) of one channel, in [-1, 1].
        segmenter: predicts the classes.
        volume: (N,) which volume a slice belongs to, for 3-D networks.
    """
    shown = torch.from_numpy(with_channels(images).astype(np.float32))
    label = segmenter.probabilities(shown, volume).argmax(1)
    grey, found = shown.movedim(1, -1)[label > 0].double(), label[label > 0]  # (pixels, C) and (pixels,)
    total = float(((grey - grey.mean(0)) ** 2).sum()) if len(grey) else 0.0
    if total == 0:
        return 0.0
    classes = [grey[found == value] for value in found.unique()]
    return sum(len(values) * float(((values.mean(0) - grey.mean(0)) ** 2).sum()) for values in classes) / total
