"""From fixations of the eye to what a slice's pixels may be (GazeMedSeg, arXiv 2407.07406).

Durations become a heatmap, the image sharpens it, and two thresholds cut it: what is above the higher one is the
target, what is below the lower one is background, between them it may be either. So gaze is one more kind of label set
(`fedfactory.adaptation.labels.candidate_labels`) that every method understands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit, logit

from ...errors import ConfigError
from ..choices import REFINEMENTS

FEWEST, SHORTEST = 3, 300.0  # fixations, and milliseconds in all, from which a slice counts as looked at
CAP = 95  # percentile: one long fixation must not hide the others
FLOOR = 1e-5  # of probabilities
ITERATIONS = 10
CHUNK = 4096  # pixels
BLURS = (0.02, 0.4)  # narrowest and widest that are tried
UNSURE = 0b11  # may be background or target
BACKGROUND_ONLY, TARGET_ONLY = 0b01, 0b10


@dataclass(frozen=True, kw_only=True)
class GazeConfig:
    """How a site reads its fixations. Trackers and annotators differ, so this is the site's own and never leaves it.

    Raises: ConfigError if a value is out of range.

    Attributes:
        sigma: of the blur, as a share of the longer side.
        refine: "crf": mean field with one bilateral kernel; "none".
        place, grey: widths of that kernel, a share of the longer side and grey levels on the [-1, 1] scale.
        strength: Potts weight. stride: of its landmarks, pixels; 1 is exact.
        tight, loose: thresholds of the map.
    """

    sigma: float = 0.08
    refine: str = "crf"
    place: float = 0.25
    grey: float = 0.06
    strength: float = 1.0
    stride: int = 4
    tight: float = 0.5
    loose: float = 0.3

    def __post_init__(self) -> None:
        if self.refine not in REFINEMENTS:
            raise ConfigError(f"refine is '{self.refine}'; choose one of {', '.join(REFINEMENTS)}")
        if min(self.sigma, self.place, self.grey) <= 0 or self.strength < 0 or self.stride < 1:
            raise ConfigError("sigma, place and grey must be positive, strength not negative, stride at least 1")
        if not 0 < self.loose <= self.tight < 1:
            raise ConfigError(f"thresholds are {self.loose} and {self.tight}; 0 < loose <= tight < 1 is needed")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def heatmap(fixations: np.ndarray, shape: tuple[int, int], sigma: float) -> np.ndarray | None:
    """Where somebody looked, (H, W) in [0, 1]; None if hardly anybody did.

    Args:
        fixations: (n, 3) row, column, milliseconds; places outside of the slice are brought to its rim.
        sigma: of the blur, as a share of the longer side.
    """
    if len(fixations) < FEWEST or fixations[:, 2].sum() < SHORTEST:
        return None
    canvas = np.zeros(shape)
    rows, columns = (
        np.clip(np.round(fixations[:, axis]), 0, shape[axis] - 1).astype(int) for axis in (0, 1)
    )  # fmt: skip
    np.add.at(canvas, (rows, columns), np.minimum(fixations[:, 2], np.percentile(fixations[:, 2], CAP)))
    blurred = gaussian_filter(canvas, sigma * max(shape), mode="reflect", truncate=4)
    low, high = blurred.min(), blurred.max()
    return (blurred - low) / (high - low) if high > low else None


def refined(heat: np.ndarray, image: np.ndarray, config: GazeConfig) -> np.ndarray:
    """The heatmap (H, W) drawn to the edges of the image (H, W) in [-1, 1].

    Mean field of a dense CRF of two labels with one bilateral kernel K (Kraehenbuehl and Koltun 2011), normalised by
    its row sums: q <- sigmoid(u + w K~ (2 q - 1)). Computed exactly between landmarks on a regular grid, each of which
    stands for its share of the pixels (Nystroem's way); the last update reaches every pixel.
    """
    u = logit(np.clip(heat, FLOOR, 1 - FLOOR)).ravel()
    scale = np.array([config.place * max(heat.shape)] * 2 + [config.grey])
    features = np.stack([*np.indices(heat.shape).reshape(2, -1), image.ravel()], axis=1) / scale
    grid = np.zeros(heat.shape, bool)
    first = min(config.stride // 2, min(heat.shape) - 1)
    grid[first :: config.stride, first :: config.stride] = True
    chosen = np.flatnonzero(grid)
    each = heat.size / len(chosen)  # pixels that a landmark stands for
    among = _kernel(features[chosen], features[chosen])
    norm = 1 / np.sqrt(each * among.sum(1))
    q = expit(u[chosen])
    for _ in range(ITERATIONS - 1):
        q = expit(u[chosen] + config.strength * norm * (among @ (each * norm * (2 * q - 1))))
    message, whole = each * norm * (2 * q - 1), np.empty(heat.size)
    for start in range(0, heat.size, CHUNK):
        part = slice(start, start + CHUNK)
        near = _kernel(features[part], features[chosen])
        own = 1 / np.sqrt(each * near.sum(1))
        whole[part] = expit(u[part] + config.strength * own * (near @ message))
    return whole.reshape(heat.shape)


def candidates_from_fixations(fixations: np.ndarray, image: np.ndarray, config: GazeConfig) -> np.ndarray:
    """Sets (H, W) uint8 of background and target of a slice; all unknown (0) where hardly anybody looked.

    Args:
        fixations: (n, 3) row, column, milliseconds. image: (H, W) in [-1, 1].
    """
    heat = heatmap(fixations, image.shape, config.sigma)
    if heat is None:
        return np.zeros(image.shape, np.uint8)
    q = refined(heat, image, config) if config.refine == "crf" else heat
    return np.where(q >= config.tight, TARGET_ONLY, np.where(q >= config.loose, UNSURE, BACKGROUND_ONLY)).astype(
        np.uint8
    )


def blur_for_share(looks: Sequence[tuple[np.ndarray, np.ndarray]], share: float, config: GazeConfig) -> GazeConfig:
    """`config` with the blur by which the target fills, on average, the share of the slice that the site knows it does.

    A wider blur makes larger targets, so bisection finds it; two dozen slices are enough.

    Args:
        looks: fixations (n, 3) and image (H, W) of slices, as for `candidates_from_fixations`. share: in (0, 1).

    Raises: ConfigError if no blur makes the target as large, or as small.
    """

    def filled(sigma: float) -> float:
        candidates = np.stack([candidates_from_fixations(*look, replace(config, sigma=sigma)) for look in looks])
        seen = candidates[(candidates > 0).any(axis=(1, 2))]
        return float((seen == TARGET_ONLY).mean()) if len(seen) else 0.0

    low, high = BLURS
    least, most = filled(low), filled(high)
    if not least < share < most:
        raise ConfigError(
            f"a target of {share:.1%} of a slice: blurs make it {least:.1%} to {most:.1%} of these slices"
        )
    while high - low > 0.005:
        middle = (low + high) / 2
        low, high = (middle, high) if filled(middle) < share else (low, middle)
    return replace(config, sigma=round((low + high) / 2, 4))


def simulate_fixations(
    mask: np.ndarray, rng: np.random.Generator, *, inside: float = 0.85, noise: float = 0.03
) -> np.ndarray:
    """Plausible fixations (n, 3) of somebody who looks for a target (H, W): row, column, milliseconds.

    15 to 60 fixations with log-normal durations (median 250 ms, at least 50), a share near `inside` of them in the
    target, the others anywhere; places with tracker noise. A slice without target is looked at everywhere.

    Args:
        inside: mean share in the target (0.3 for a poor tracker). noise: share of the longer side (0.2 for a poor one).
    """
    count = int(rng.integers(15, 61))
    target, anywhere = np.argwhere(mask), np.argwhere(np.ones(mask.shape, bool))
    share = rng.beta(20 * inside, 20 * (1 - inside)) if len(target) else 0.0
    seen = rng.random(count) < share
    places = np.where(
        seen[:, None],
        target[rng.integers(len(target), size=count)] if len(target) else 0,
        anywhere[rng.integers(len(anywhere), size=count)],
    ).astype(float)
    places += rng.normal(0, noise * max(mask.shape), places.shape)
    return np.column_stack([places, np.maximum(50.0, rng.lognormal(np.log(250), 0.5, count))])


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-|a_i - b_j|^2 / 2)."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.exp(-np.maximum(squares, 0) / 2)
