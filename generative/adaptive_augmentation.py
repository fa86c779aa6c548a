"""Adaptive discriminator augmentation for grey slices (Karras et al. 2020, "Training GANs with limited data").

Whatever the discriminator sees is turned, moved, scaled and rescaled in intensity at random, reals and fakes alike;
the strength follows how well it tells reals from the rest. Hue and saturation do not exist in one channel.
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
PUBLISHED_GAIN = 1 / 3  # the published program averages where a sum is meant, so that all it shows D is this dark
INTERVAL = 8  # discriminator steps from one change of the strength to the next


@dataclass
class AugmentationStrength:
    """The strength and what it is adapted from; kept between rounds.

    Attributes:
        p: probability of each transform, in [0, 1].
    """

    p: float = 0.0
    sign_sum: float = 0.0
    count: int = 0
    calls: int = 0

    def observe(self, real_score: Tensor, *, target: float, length: int) -> None:
        """After every discriminator step: scores (B, 1) of the augmented reals.

        Every eighth call p moves by the number of slices seen over `length`: up if more than `target` of the scores
        (as mean of their signs) are positive, else down.
        """
        self.sign_sum += float(real_score.detach().sign().sum())
        self.count += real_score.numel()
        self.calls += 1
        if self.calls % INTERVAL == 0:
            direction = 1 if self.sign_sum / self.count > target else -1
            self.p = min(max(self.p + direction * self.count / length, 0.0), 1.0)
            self.sign_sum, self.count = 0.0, 0


def augment(image: Tensor, p: float, rng: torch.Generator, *, published: bool = False) -> Tensor:
    """Slices (B, 1, H, W), each changed by its own draw; differentiable twice with respect to the slices.

    Args:
        p: probability of each transform.
        rng: on the slices' device.
        published: quarter turns by 0 and 270 degrees only, and a third of the intensity, as the published program.
    """
    batch, _, height, width = image.shape
    inverse = draw_inverse_matrices(batch, height, width, p, rng, quarter_turns=(0, 3) if published else (0, 1, 2, 3))
    gain, shift = draw_intensity(batch, p, rng)
    image = warp(image, inverse.to(image.dtype))
    gain, shift = gain.to(image.dtype)[:, None, None, None], shift.to(image.dtype)[:, None, None, None]
    return image * (gain * PUBLISHED_GAIN if published else gain) + gain * shift


def draw_inverse_matrices(
    batch: int, height: int, width: int, p: float, rng: torch.Generator, *, quarter_turns: tuple[int, ...]
) -> Tensor:
    """(B, 3, 3): output to input positions (x, y, 1), in pixels around the image's centre."""
    device = rng.device

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(batch, generator=rng, device=device) * (high - low) + low

    def normal(deviation: float) -> Tensor:
        return torch.randn(batch, generator=rng, device=device) * deviation

    def choice(values: tuple[int, ...]) -> Tensor:
        drawn = torch.randint(len(values), (batch,), generator=rng, device=device)
        return torch.tensor(values, dtype=torch.float32, device=device)[drawn]

    matrix = torch.eye(3, device=device).repeat(batch, 1, 1)

    def apply(inverse: Tensor, probability: float) -> None:
        """The forward matrix is multiplied from the left, so its inverse from the right."""
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
    """Per sample a gain (contrast, sometimes negated) and a brightness shift, both (B,): out = gain (x + shift)."""
    device = rng.device

    def chosen() -> Tensor:
        return torch.rand(batch, generator=rng, device=device) < p

    def normal(deviation: float) -> Tensor:
        return torch.randn(batch, generator=rng, device=device) * deviation

    shift = torch.where(chosen(), normal(0.2), 0.0)
    gain = torch.where(chosen(), normal(0.5 * math.log(2)).exp(), 1.0)
    negated = chosen() & (torch.rand(batch, generator=rng, device=device) < 0.5)
    return torch.where(negated, -gain, gain), shift


def warp(image: Tensor, inverse: Tensor) -> Tensor:
    """Slices (B, 1, H, W) resampled at inverse (B, 3, 3), without aliasing and with mirrored borders.

    Reflection padding, twice the resolution, bilinear sampling, half the resolution.
    """
    (batch, channels, height, width), inverse = image.shape, inverse.clone()
    left, top, right, bottom = _padding(inverse, height, width)
    image = F.pad(image, (left, right, top, bottom), mode="reflect")
    device = image.device
    inverse = _shift(*_pair((left - right) / 2, (top - bottom) / 2, device, inverse.dtype)) @ inverse

    taps = torch.tensor(LOW_PASS, dtype=image.dtype, device=device)
    around = (MARGIN, MARGIN - 1)
    image = resample(image, taps[None, :], up=(2, 1), pad=(*around, 0, 0))
    image = resample(image, taps[:, None], up=(1, 2), pad=(0, 0, *around))

    def scaled(x: float, y: float) -> Tensor:
        return _scale(*_pair(x, y, device, inverse.dtype))

    def shifted(x: float, y: float) -> Tensor:
        return _shift(*_pair(x, y, device, inverse.dtype))

    inverse = scaled(2, 2) @ inverse @ scaled(0.5, 0.5)
    inverse = shifted(-0.5, -0.5) @ inverse @ shifted(0.5, 0.5)
    canvas_height, canvas_width = 2 * (height + MARGIN), 2 * (width + MARGIN)
    inverse = scaled(2 / image.shape[3], 2 / image.shape[2]) @ inverse @ scaled(canvas_width / 2, canvas_height / 2)
    grid = F.affine_grid(inverse[:, :2], [batch, channels, canvas_height, canvas_width], align_corners=False)
    image = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

    image = resample(image, taps.flip(0)[None, :], down=(2, 1), pad=(-1, -1, 0, 0))
    return resample(image, taps.flip(0)[:, None], down=(1, 2), pad=(0, 0, -1, -1))


def _padding(inverse: Tensor, height: int, width: int) -> list[int]:
    """Left, top, right, bottom: as much as the farthest corner of any sample reaches beyond the image."""
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


def _pair(x: float, y: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.tensor([x], device=device, dtype=dtype), torch.tensor([y], device=device, dtype=dtype)


def _matrices(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _shift(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrices([[one, zero, x], [zero, one, y], [zero, zero, one]])


def _rotate(angle: Tensor) -> Tensor:
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    return _matrices([[angle.cos(), -angle.sin(), zero], [angle.sin(), angle.cos(), zero], [zero, zero, one]])
