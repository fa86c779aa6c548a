"""Candidate labels from eye fixations (GazeMedSeg, arXiv 2407.07406).

Fixation durations become a heatmap, the image refines it, and two thresholds divide it: pixels above the higher one
are the target, pixels below the lower one are background, pixels between them may be either. Thus gaze is one more
kind of candidate labels (`fedfactory.adaptation.labels.candidate_labels`), which every method can use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.special import expit, logit

from ...errors import ConfigError
from ..choices import REFINEMENTS
from .candidate_labels import MAX_CERTAINTY

MIN_FIXATIONS = 3  # of a viewed slice
MIN_DURATION = 300.0  # of all fixations of a viewed slice together, milliseconds
DURATION_PERCENTILE = 95  # durations are cut there: one long fixation must not hide the others
MIN_PROBABILITY = 1e-5
MEAN_FIELD_ITERATIONS = 10
CHUNK = 4096  # pixels that are refined at once
SIGMA_RANGE = (0.02, 0.4)  # of the search for a blur
SIGMA_TOLERANCE = 0.005  # of the search for a blur
BACKGROUND_ONLY, TARGET_ONLY = 0b01, 0b10
UNCERTAIN = 0b11  # may be background or target


@dataclass(frozen=True, kw_only=True)
class GazeConfig:
    """How a site turns fixations into candidate labels. Trackers and annotators differ, so each site has its own.

    Raises: ConfigError if a value is out of range.

    Attributes:
        sigma: standard deviation of the blur, as a share of the longer side.
        refine: "crf" for mean-field inference of a CRF with one bilateral kernel, or "none".
        spatial_width: of the bilateral kernel, as a share of the longer side.
        intensity_width: of the bilateral kernel, the root mean square over the channels of a difference on the
            [-1, 1] scale: three equal channels are refined as one.
        potts_weight: of the kernel against the heatmap, 0 or more.
        stride: distance of the landmarks that approximate the kernel, pixels; 1 is exact.
        tight: from this value on, a pixel of the heatmap is target, in (0, 1).
        loose: below this value, a pixel of the heatmap is background, in (0, tight].
    """

    sigma: float = 0.08
    refine: str = "crf"
    spatial_width: float = 0.25
    intensity_width: float = 0.06
    potts_weight: float = 1.0
    stride: int = 4
    tight: float = 0.5
    loose: float = 0.3

    def __post_init__(self) -> None:
        if self.refine not in REFINEMENTS:
            raise ConfigError(f"refine is '{self.refine}'; choose one of {', '.join(REFINEMENTS)}")
        for name in ("sigma", "spatial_width", "intensity_width"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        if self.potts_weight < 0:
            raise ConfigError(f"potts_weight is {self.potts_weight}; it must be at least 0")
        if self.stride < 1:
            raise ConfigError(f"stride is {self.stride}; it must be at least 1")
        if not 0 < self.tight < 1:
            raise ConfigError(f"tight is {self.tight}; choose a threshold between 0 and 1")
        if not 0 < self.loose <= self.tight:
            raise ConfigError(f"loose is {self.loose}; choose a threshold above 0, up to tight ({self.tight})")

    def to_dict(self) -> dict[str, float | str]:
        """JSON-able."""
        return asdict(self)


def heatmap(fixations: np.ndarray, shape: tuple[int, int], sigma: float) -> np.ndarray | None:
    """Blurred map of fixation durations.

    Args:
        fixations: (n, 3) row, column, milliseconds; positions outside of the slice are moved to its border.
        shape: height and width of the slice.
        sigma: standard deviation of the blur, as a share of the longer side.

    Returns: (H, W) scaled to [0, 1]; None if the slice was not viewed long enough (MIN_FIXATIONS, MIN_DURATION).
    """
    durations = fixations[:, 2]
    if len(fixations) < MIN_FIXATIONS or durations.sum() < MIN_DURATION:
        return None
    canvas = np.zeros(shape)
    rows, columns = (np.clip(np.round(fixations[:, axis]), 0, shape[axis] - 1).astype(int) for axis in (0, 1))
    np.add.at(canvas, (rows, columns), np.minimum(durations, np.percentile(durations, DURATION_PERCENTILE)))
    blurred = gaussian_filter(canvas, sigma * max(shape), mode="reflect", truncate=4)
    low, high = blurred.min(), blurred.max()
    return (blurred - low) / (high - low) if high > low else None


def refine_heatmap(heat: np.ndarray, image: np.ndarray, config: GazeConfig) -> np.ndarray:
    """Align a heatmap with the edges of the image.

    Mean field of a dense CRF of two labels with one bilateral kernel K (Kraehenbuehl and Koltun 2011), normalised by
    its row sums: q <- sigmoid(u + w K~ (2 q - 1)). Computed exactly between landmarks on a regular grid, each of which
    represents its share of the pixels (Nystroem approximation); the last update is computed for every pixel.

    Args:
        heat: (H, W) in [0, 1].
        image: (C, H, W) in [-1, 1]; one channel may be given as (H, W).
        config: its kernel, weight and stride.

    Returns: probability of the target, (H, W) in (0, 1).
    """
    u = logit(np.clip(heat, MIN_PROBABILITY, 1 - MIN_PROBABILITY)).ravel()
    channels = image.reshape(-1, heat.size)
    # The published width, 13 of 255, is for the sum over three channels; for one it is 13 / sqrt(3).
    intensity_width = config.intensity_width * np.sqrt(len(channels))
    scale = np.array([config.spatial_width * max(heat.shape)] * 2 + [intensity_width] * len(channels))
    features = np.stack([*np.indices(heat.shape).reshape(2, -1), *channels], axis=1) / scale
    grid = np.zeros(heat.shape, bool)
    first = min(config.stride // 2, min(heat.shape) - 1)
    grid[first :: config.stride, first :: config.stride] = True
    landmarks = np.flatnonzero(grid)
    pixels_each = heat.size / len(landmarks)  # pixels that a landmark represents
    kernel = _kernel(features[landmarks], features[landmarks])
    norm = 1 / np.sqrt(pixels_each * kernel.sum(1))
    q = expit(u[landmarks])
    for _ in range(MEAN_FIELD_ITERATIONS - 1):
        q = expit(u[landmarks] + config.potts_weight * norm * (kernel @ (pixels_each * norm * (2 * q - 1))))
    message, probability = pixels_each * norm * (2 * q - 1), np.empty(heat.size)
    for start in range(0, heat.size, CHUNK):
        part = slice(start, start + CHUNK)
        kernel = _kernel(features[part], features[landmarks])
        norm = 1 / np.sqrt(pixels_each * kernel.sum(1))
        probability[part] = expit(u[part] + config.potts_weight * norm * (kernel @ message))
    return probability.reshape(heat.shape)


def candidates_from_fixations(fixations: np.ndarray, image: np.ndarray, config: GazeConfig) -> np.ndarray:
    """The first of what `graded_labels` returns."""
    return graded_labels(fixations, image, config)[0]


def graded_labels(fixations: np.ndarray, image: np.ndarray, config: GazeConfig) -> tuple[np.ndarray, np.ndarray]:
    """Candidate labels of background and target for one slice, and how certain the target is.

    Args:
        fixations: (n, 3) row, column, milliseconds.
        image: (C, H, W) in [-1, 1]; one channel may be given as (H, W).
        config: how fixations are turned into labels.

    Returns: (H, W) uint8 of TARGET_ONLY, BACKGROUND_ONLY and UNCERTAIN, and (H, W) uint8 certainty, from 0 at the
        threshold `loose` and below to 255 at `tight` and above; both 0 everywhere if the slice was not viewed long
        enough.
    """
    heat = heatmap(fixations, image.shape[-2:], config.sigma)
    if heat is None:
        return np.zeros(image.shape[-2:], np.uint8), np.zeros(image.shape[-2:], np.uint8)
    q = refine_heatmap(heat, image, config) if config.refine == "crf" else heat
    candidates = np.where(q >= config.tight, TARGET_ONLY, np.where(q >= config.loose, UNCERTAIN, BACKGROUND_ONLY))
    between = (q - config.loose) / max(config.tight - config.loose, MIN_PROBABILITY)
    certainty = np.floor(np.clip(between, 0, 1) * MAX_CERTAINTY)
    return candidates.astype(np.uint8), certainty.astype(np.uint8)


def config_for_target_share(
    views: Sequence[tuple[np.ndarray, np.ndarray]], target_share: float, config: GazeConfig
) -> GazeConfig:
    """`config` with the blur for which the target fills, on average, a known share of the slice.

    A wider blur makes larger targets, so the blur is found by bisection; 24 slices are enough.

    Args:
        views: fixations (n, 3) and image (C, H, W) of slices, as for `candidates_from_fixations`.
        target_share: mean share of a viewed slice that the target fills, in (0, 1).
        config: everything but the blur.

    Raises: ConfigError if no blur in SIGMA_RANGE gives this share.
    """

    def share_with(sigma: float) -> float:
        candidates = np.stack([candidates_from_fixations(*view, replace(config, sigma=sigma)) for view in views])
        viewed = candidates[(candidates > 0).any(axis=(1, 2))]
        return float((viewed == TARGET_ONLY).mean()) if len(viewed) else 0.0

    low, high = SIGMA_RANGE
    smallest, largest = share_with(low), share_with(high)
    if not smallest < target_share < largest:
        raise ConfigError(
            f"target_share is {target_share:.1%} of a slice; for these fixations it must be between {smallest:.1%} "
            f"and {largest:.1%}"
        )
    while high - low > SIGMA_TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if share_with(middle) < target_share else (low, middle)
    return replace(config, sigma=round((low + high) / 2, 4))


def simulate_fixations(
    mask: np.ndarray, rng: np.random.Generator, *, inside: float = 0.85, noise: float = 0.03
) -> np.ndarray:
    """Simulated fixations of a person who searches for a target.

    15 to 60 fixations with log-normal durations (median 250 ms, at least 50 ms), a share near `inside` of them in the
    target, the others anywhere; positions have tracker noise. In a slice without target they are anywhere.

    Args:
        mask: of the target, (H, W).
        rng: source of everything random.
        inside: mean share of the fixations in the target (0.3 for a poor tracker).
        noise: standard deviation of positions, as a share of the longer side (0.2 for a poor tracker).

    Returns: (n, 3) row, column, milliseconds.
    """
    count = int(rng.integers(15, 61))
    target, anywhere = np.argwhere(mask), np.argwhere(np.ones(mask.shape, bool))
    share = rng.beta(20 * inside, 20 * (1 - inside)) if len(target) else 0.0
    in_target = rng.random(count) < share
    positions = np.where(
        in_target[:, None],
        target[rng.integers(len(target), size=count)] if len(target) else 0,
        anywhere[rng.integers(len(anywhere), size=count)],
    ).astype(float)
    positions += rng.normal(0, noise * max(mask.shape), positions.shape)
    return np.column_stack([positions, np.maximum(50.0, rng.lognormal(np.log(250), 0.5, count))])


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """exp(-|a_i - b_j|^2 / 2), (n, m), of features a (n, d) and b (m, d)."""
    squares = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * a @ b.T
    return np.exp(-np.maximum(squares, 0) / 2)
