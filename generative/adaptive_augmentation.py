"""Adaptive discriminator augmentation (Karras et al. 2020, "Training GANs with limited data").

Real and synthetic slices are rotated, shifted, scaled and changed in intensity at random before the discriminator sees
them; the strength is adapted to how well it distinguishes them. All channels of a slice change alike. Hue and
saturation stay: MRI sequences have none, and in pictures of tissue they distinguish the domains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .networks.resampling import resample

# Orthonormal wavelet low-pass of 12 taps (symlet 6); the sum is sqrt(2).
LOW_PASS = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
MARGIN = len(LOW_PASS) // 2
PUBLISHED_GAIN = 1 / 3  # the published program takes a mean instead of a sum, which darkens all slices by this factor
INTERVAL = 8  # discriminator updates from one change of the strength to the next


@dataclass
class AugmentationStrength:
    """The strength of the augmentation and the counts that adapt it; stored between rounds.

    Attributes:
        p: probability of each transform, in [0, 1].
        sign_sum: sum of the signs of the scores since the last change.
        count: number of these scores.
        calls: number of discriminator updates.
    """

    p: float = 0.0
    sign_sum: float = 0.0
    count: int = 0
    calls: int = 0

    def observe(self, real_score: Tensor, *, target: float, length: int) -> None:
        """Count the scores of one discriminator update, and adapt p after every eighth.

        p changes by the number of counted slices over `length`: up if the mean sign of the scores is above `target`,
        otherwise down.

        Args:
            real_score: (B, 1), scores of the augmented real slices.
            target: mean sign, in [-1, 1].
            length: number of slices in which p may go from 0 to 1.
        """
        self.sign_sum += float(real_score.detach().sign().sum())
        self.count += real_score.numel()
        self.calls += 1
        if self.calls % INTERVAL == 0:
            direction = 1 if self.sign_sum / self.count > target else -1
            self.p = min(max(self.p + direction * self.count / length, 0.0), 1.0)
            self.sign_sum, self.count = 0.0, 0


def augment(
    image: Tensor, p: float, rng: torch.Generator, *, published: bool = False, label_channels: int = 0
) -> Tensor:
    """Augment slices, each by its own random transforms; differentiable twice with respect to the slices.

    Args:
        image: (B, C, H, W), about [-1, 1].
        p: probability of each transform, in [0, 1].
        rng: random generator on the slices' device.
        published: quarter turns by 0 and 270 degrees only, and a third of the intensity, as in the published program.
        label_channels: number of the last channels that hold labels: they move with the image, and keep their values.

    Returns: (B, C, H, W).
    """
    batch, _, height, width = image.shape
    turns = (0, 3) if published else (0, 1, 2, 3)
    inverse = draw_inverse_matrices(batch, height, width, p=p, rng=rng, quarter_turns=turns)
    gain, shift = draw_intensity(batch, p, rng)
    image = warp(image, inverse.to(image.dtype))
    gain, shift = gain.to(image.dtype)[:, None, None, None], shift.to(image.dtype)[:, None, None, None]
    image, labels = image[:, : image.shape[1] - label_channels], image[:, image.shape[1] - label_channels :]
    image = image * (gain * PUBLISHED_GAIN if published else gain) + gain * shift
    return torch.cat([image, labels], dim=1) if label_channels else image


def draw_inverse_matrices(
    batch: int, height: int, width: int, *, p: float, rng: torch.Generator, quarter_turns: tuple[int, ...]
) -> Tensor:
    """Random geometric transforms.

    Args:
        batch: number of transforms B.
        height: pixels.
        width: pixels.
        p: probability of each part of a transform, in [0, 1].
        rng: random generator on the device of the result.
        quarter_turns: the numbers of quarter turns to choose from.

    Returns: (B, 3, 3), matrices from output to input positions (x, y, 1), in pixels around the image's centre.
    """
    device = rng.device

    def uniform(low: float, high: float) -> Tensor:
        """(B,) numbers."""
        return torch.rand(batch, generator=rng, device=device) * (high - low) + low

    def normal(deviation: float) -> Tensor:
        """(B,) numbers."""
        return torch.randn(batch, generator=rng, device=device) * deviation

    def choice(values: tuple[int, ...]) -> Tensor:
        """(B,) of the values."""
        drawn = torch.randint(len(values), (batch,), generator=rng, device=device)
        return torch.tensor(values, dtype=torch.float32, device=device)[drawn]

    matrix = torch.eye(3, device=device).repeat(batch, 1, 1)

    def apply(inverse: Tensor, probability: float) -> None:
        """Multiply by (B, 3, 3): the forward matrix from the left, so its inverse from the right."""
        nonlocal matrix
        chosen = torch.rand(batch, generator=rng, device=device) < probability
        matrix = torch.where(chosen[:, None, None], matrix @ inverse, matrix)

    turn_probability = 1 - math.sqrt(1 - p)
    apply(_scale(1 - 2 * choice((0, 1)), torch.ones(batch, device=device)), p)
    apply(_rotate(math.pi / 2 * choice(quarter_turns)), p)
    apply(_shift(-(uniform(-0.125, 0.125) * width).round(), -(uniform(-0.125, 0.125) * height).round()), p)
    isotropic = (-normal(0.2 * math.log(2))).exp()
    apply(_scale(isotropic, isotropic), p)
    apply(_rotate(uniform(-math.pi, math.pi)), turn_probability)
    anisotropic = (-normal(0.2 * math.log(2))).exp()
    apply(_scale(anisotropic, 1 / anisotropic), p)
    apply(_rotate(uniform(-math.pi, math.pi)), turn_probability)
    apply(_shift(-normal(0.125) * width, -normal(0.125) * height), p)
    return matrix


def draw_intensity(batch: int, p: float, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """For each slice a gain (contrast, sometimes negated) and a brightness shift, both (B,): out = gain (x + shift)."""
    device = rng.device

    def chosen() -> Tensor:
        """(B,) bool."""
        return torch.rand(batch, generator=rng, device=device) < p

    def normal(deviation: float) -> Tensor:
        """(B,) numbers."""
        return torch.randn(batch, generator=rng, device=device) * deviation

    shift = torch.where(chosen(), normal(0.2), 0.0)
    gain = torch.where(chosen(), normal(0.5 * math.log(2)).exp(), 1.0)
    negated = chosen() & (torch.rand(batch, generator=rng, device=device) < 0.5)
    return torch.where(negated, -gain, gain), shift


def warp(image: Tensor, inverse: Tensor) -> Tensor:
    """Resample slices without aliasing and with mirrored borders.

    Reflection padding, twice the resolution, bilinear sampling, half the resolution.

    Args:
        image: (B, C, H, W).
        inverse: (B, 3, 3), see `draw_inverse_matrices`.

    Returns: (B, C, H, W).
    """
    (batch, channels, height, width), inverse = image.shape, inverse.clone()
    left, top, right, bottom = _padding(inverse, height, width)
    image = F.pad(image, (left, right, top, bottom), mode="reflect")
    device = image.device
    inverse = _shift(*_pair((left - right) / 2, (top - bottom) / 2, like=inverse)) @ inverse

    taps = torch.tensor(LOW_PASS, dtype=image.dtype, device=device)
    around = (MARGIN, MARGIN - 1)
    image = resample(image, taps[None, :], up=(2, 1), pad=(*around, 0, 0))
    image = resample(image, taps[:, None], up=(1, 2), pad=(0, 0, *around))

    def scaled(x: float, y: float) -> Tensor:
        """(1, 3, 3)."""
        return _scale(*_pair(x, y, like=inverse))

    def shifted(x: float, y: float) -> Tensor:
        """(1, 3, 3)."""
        return _shift(*_pair(x, y, like=inverse))

    inverse = scaled(2, 2) @ inverse @ scaled(0.5, 0.5)
    inverse = shifted(-0.5, -0.5) @ inverse @ shifted(0.5, 0.5)
    canvas_height, canvas_width = 2 * (height + MARGIN), 2 * (width + MARGIN)
    inverse = scaled(2 / image.shape[3], 2 / image.shape[2]) @ inverse @ scaled(canvas_width / 2, canvas_height / 2)
    grid = F.affine_grid(inverse[:, :2], [batch, channels, canvas_height, canvas_width], align_corners=False)
    image = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    image = resample(image, taps.flip(0)[None, :], down=(2, 1), pad=(-1, -1, 0, 0))
    return resample(image, taps.flip(0)[:, None], down=(1, 2), pad=(0, 0, -1, -1))


def _padding(inverse: Tensor, height: int, width: int) -> list[int]:
    """Padding at left, top, right and bottom: how far the corners of any slice reach beyond it after (B, 3, 3)."""
    half_x, half_y = (width - 1) / 2, (height - 1) / 2
    corners = torch.tensor(
        [[-half_x, -half_y, 1], [half_x, -half_y, 1], [half_x, half_y, 1], [-half_x, half_y, 1]],
        dtype=inverse.dtype,
        device=inverse.device,
    ).t()
    reached = (inverse @ corners)[:, :2].transpose(0, 1).flatten(1)  # (2, B * 4)
    reach = torch.cat([-reached, reached]).amax(dim=1).tolist()
    limits = (width - 1, height - 1) * 2
    beyond = [r + MARGIN - h for r, h in zip(reach, (half_x, half_y) * 2, strict=True)]
    return [math.ceil(min(max(b, 0), limit)) for b, limit in zip(beyond, limits, strict=True)]


def _pair(x: float, y: float, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of shape (1,), on the device and of the type of `like`."""
    return torch.tensor([x], device=like.device, dtype=like.dtype), torch.tensor(
        [y], device=like.device, dtype=like.dtype
    )


def _matrices(rows: list[list[Tensor]]) -> Tensor:
    """Three rows of three entries (B,) as (B, 3, 3)."""
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    """Factors (B,) as matrices (B, 3, 3)."""
    zero, unit = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([[x, zero, zero], [zero, y, zero], [zero, zero, unit]])


def _shift(x: Tensor, y: Tensor) -> Tensor:
    """Shifts (B,) in pixels as matrices (B, 3, 3)."""
    zero, unit = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([[unit, zero, x], [zero, unit, y], [zero, zero, unit]])


def _rotate(angle: Tensor) -> Tensor:
    """Angles (B,) in radians as matrices (B, 3, 3)."""
    zero, unit = torch.zeros_like(angle), torch.ones_like(angle)
    return _matrices([[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero], [zero, zero, unit]])
