"""Image and label as one picture of several channels: what the discriminator of a site with labels is shown.

Li et al. 2021 ("Semantic segmentation with generative models", CVPR) train a discriminator on pairs of image and label.
Here every site has one, whatever it knows: of real and drawn labels alike, only those pixels are shown of which the
site knows the label, and all others are blank. A site without labels thus compares images alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import TrainingError
from ..imaging.slice_choices import UNLABELLED

BLUR = (0.1065, 0.7870, 0.1065)  # Gaussian of half a pixel: real labels get borders as soft as drawn ones
NOISE = 0.2  # deviation, on the [-1, 1] scale; covers what is left of the difference in softness


def as_channels(soft_labels: Tensor) -> Tensor:
    """Soft labels (B, classes, S, S) as channels (B, classes - 1, S, S) in [-1, 1], without that of background."""
    return 2 * soft_labels[:, 1:] - 1


def label_channels(labels: Tensor | None, *, classes: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Real labels as the channels that drawn labels have.

    Args:
        labels: (B, S, S) integers below `classes`, 255 where nothing is known; None where nothing is known at all.
        classes: number of label values, background included.
        like: (B, C, S, S), the images: their device and type are taken.

    Returns: softened labels (B, classes - 1, S, S) in [-1, 1], 0 where they are unknown, and which pixels are known
        (B, 1, S, S), 0 or 1.
    Raises: TrainingError for labels of another shape or value.
    """
    batch, _, height, width = like.shape
    if labels is None:
        return like.new_zeros(batch, classes - 1, height, width), like.new_zeros(batch, 1, height, width)
    if labels.shape != (batch, height, width):
        raise TrainingError(f"labels have shape {tuple(labels.shape)}, expected {(batch, height, width)}")
    labels = labels.long()
    known = labels != UNLABELLED
    if not bool(((labels >= 0) & (labels < classes) | ~known).all()):
        raise TrainingError(f"labels go up to {int(labels[known].max())}; they must be from 0 to {classes - 1}, or 255")
    mask = known[:, None].to(like.dtype)
    hard = F.one_hot(labels.where(known, 0), classes).movedim(-1, 1)[:, 1:].to(like.dtype) * mask
    # Blurred over known pixels alone, so that the labels of a scribble are not thinned by what is unknown around it.
    soft = _blurred(hard) / _blurred(mask).clamp_min(1e-6)
    return (2 * soft - 1) * mask, mask


def shown_labels(channels: Tensor, known: Tensor, rng: torch.Generator) -> Tensor:
    """Labels as a discriminator is shown them: with noise where they are known, blank elsewhere.

    Args:
        channels: (B, classes - 1, S, S) in [-1, 1], of real or drawn labels.
        known: (B, 1, S, S), 1 where the site knows the label of the real slice, else 0.
        rng: source of the noise, on the labels' device.

    Returns: (B, classes - 1, S, S), 0 where they are unknown; no gradient reaches those.
    """
    noise = torch.randn(channels.shape, generator=rng, device=channels.device, dtype=channels.dtype)
    return (channels + NOISE * noise) * known


def _blurred(x: Tensor) -> Tensor:
    """(B, c, H, W) under a Gaussian of half a pixel; what lies outside counts as 0."""
    taps = x.new_tensor(BLUR)
    weight = torch.outer(taps, taps).expand(x.shape[1], 1, 3, 3)
    return F.conv2d(x, weight, padding=1, groups=x.shape[1])
