"""Strong views of slices for self-training: random changes of intensity as in RandAugment, noise and a cut-out.

HSSF takes two operations of random magnitude, each with probability 1/2 (Cubuk et al. 2020), and one grey square. The
operations are those of the publication, with the gamma and the blur of medical images added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.colours import with_colours
from ..engine.random_appearance import blurred, with_gamma

BINS = 256  # grey levels of a histogram
GREY = 0.0  # of the missing square, between black, -1, and white, 1
NOISE, MAX_NOISE = 0.1, 0.2  # standard deviation and bound, for slices in [-1, 1]
SMALLEST_CUTOUT = 0.5  # side of the smallest missing square, as a share of the largest


@dataclass(frozen=True, kw_only=True)
class StrongView:
    """How strong a strong view is.

    Attributes:
        operations: changes of intensity that are drawn for every slice; each takes place with probability 1/2.
        cutout: side of the largest missing square as a share of the slice's side; the smallest has half of it.
        colour: whether slices of three channels are red, green and blue.
    """

    operations: int = 2
    cutout: float = 0.5
    colour: bool = False

    def of(self, images: Tensor, *, rng: torch.Generator) -> Tensor:
        """Slices (B, C, S, S) in [-1, 1] at the same place with other intensities, noise and a missing square.

        Returns: (B, C, S, S) in [-1, 1], on the device of `images`, which is not changed. The random numbers come from
        `rng`, a generator on the CPU.
        """
        shown = (images.cpu() + 1) / 2
        choices = (*OPERATIONS, _saturation) if self.colour and shown.shape[1] == 3 else OPERATIONS
        for _ in range(self.operations):
            drawn = torch.randint(len(choices), (len(shown),), generator=rng)
            drawn = torch.where(torch.rand(len(shown), generator=rng) < 0.5, drawn, -1)
            magnitude = torch.rand(len(shown), 1, 1, 1, generator=rng)
            changed = shown.clone()
            for number, operation in enumerate(choices):
                if (taken := drawn == number).any():
                    changed[taken] = operation(shown[taken], magnitude[taken]).clamp(0, 1)
            shown = changed
        noise = (NOISE * torch.randn(shown.shape, generator=rng)).clamp(-MAX_NOISE, MAX_NOISE)
        return self._cut((2 * shown - 1 + noise).clamp(-1, 1), rng=rng).to(images)

    def _cut(self, images: Tensor, *, rng: torch.Generator) -> Tensor:
        """The slices (B, C, S, S), changed in place, with a grey square at a random place of each."""
        size = images.shape[-1]
        for image in images:
            share = self.cutout * (SMALLEST_CUTOUT + (1 - SMALLEST_CUTOUT) * float(torch.rand((), generator=rng)))
            side = round(size * share)
            row, column = torch.randint(0, size - side + 1, (2,), generator=rng).tolist()
            image[:, row : row + side, column : column + side] = GREY
        return images


# Operations take slices (B, C, S, S) in [0, 1] and magnitudes (B, 1, 1, 1) in [0, 1] and return slices of that shape.


def auto_contrast(shown: Tensor, magnitude: Tensor) -> Tensor:
    """Each channel from black to white."""
    low, high = shown.amin((2, 3), keepdim=True), shown.amax((2, 3), keepdim=True)
    return (shown - low) / (high - low).clamp(min=1 / BINS)


def brightness(shown: Tensor, magnitude: Tensor) -> Tensor:
    return shown * _factor(magnitude)


def contrast(shown: Tensor, magnitude: Tensor) -> Tensor:
    middle = shown.mean((1, 2, 3), keepdim=True)
    return middle + (shown - middle) * _factor(magnitude)


def equalise(shown: Tensor, magnitude: Tensor) -> Tensor:
    """Each channel with equally many pixels at every grey level, as far as that is possible; its darkest is black."""
    level = (shown.clamp(0, 1) * (BINS - 1)).round().long().flatten(2)
    counts = torch.zeros(*level.shape[:2], BINS).scatter_add_(2, level, torch.ones(level.shape))
    below = counts.cumsum(2)
    darkest = counts.gather(2, level.amin(2, keepdim=True))
    table = (below - darkest) / (below[..., -1:] - darkest).clamp(min=1)
    return table.gather(2, level).view(shown.shape)


def posterise(shown: Tensor, magnitude: Tensor) -> Tensor:
    """With 2 to 64 grey levels."""
    levels = 2.0 ** (1 + (5 * magnitude).round())
    return ((shown * levels).floor() / (levels - 1)).clamp(0, 1)


def sharpness(shown: Tensor, magnitude: Tensor) -> Tensor:
    smooth = F.avg_pool2d(shown, 3, 1, 1, count_include_pad=False)
    return smooth + (shown - smooth) * _factor(magnitude)


def solarise(shown: Tensor, magnitude: Tensor) -> Tensor:
    """With the grey levels from a threshold on inverted."""
    return torch.where(shown >= magnitude, 1 - shown, shown)


def gamma(shown: Tensor, magnitude: Tensor) -> Tensor:
    return with_gamma(shown, 4.0 ** (2 * magnitude - 1))


def blur(shown: Tensor, magnitude: Tensor) -> Tensor:
    return blurred(shown, 0.3 + 1.5 * magnitude.flatten())


def identity(shown: Tensor, magnitude: Tensor) -> Tensor:
    return shown


def _saturation(shown: Tensor, magnitude: Tensor) -> Tensor:
    """From grey to twice the saturation; for pictures of three colours."""
    return with_colours(shown, torch.zeros(len(shown)), 2 * magnitude.flatten())


def _factor(magnitude: Tensor) -> Tensor:
    """From .1 to 1.9."""
    return 0.1 + 1.8 * magnitude


OPERATIONS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
    auto_contrast, brightness, contrast, equalise, gamma, identity, posterise, sharpness, solarise, blur,
)  # fmt: skip
