"""Candidate labels from a store's fixations, computed once and kept in the store's folder for training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ....adaptation.labels.fixations import (
    TARGET_ONLY,
    UNCERTAIN,
    GazeConfig,
    config_for_target_share,
    graded_labels,
)
from ....common.files import atomic_file, write_json
from ....common.json_text import read_json
from ....common.progress import track
from ....errors import StoreError, UsageError
from ..slice_store import SliceStore

ARRAY, CERTAINTY, CARD = "gaze_candidates.npy", "gaze_certainty.npy", "gaze_candidates.json"
SLICES_FOR_BLUR = 24  # number of slices, at least, from which the blur is chosen


@dataclass(frozen=True, kw_only=True)
class GazeSummary:
    """What the fixations of a store gave.

    Attributes:
        slices: number of slices in the store.
        viewed_slices: number of slices that were viewed long enough to have candidate labels.
        sigma: blur that was used, as a share of the longer side.
        target_share: of the pixels of viewed slices, the share that is target; NaN without viewed slices.
        uncertain_share: the share that may be target or background; NaN without viewed slices.
    """

    slices: int
    viewed_slices: int
    sigma: float
    target_share: float
    uncertain_share: float


def read_gaze(
    store_dir: str | Path, config: GazeConfig | None = None, *, target_share: float | None = None
) -> GazeSummary:
    """Turn a store's fixations into candidate labels with their certainty, kept in its folder; they never leave it.

    Args:
        store_dir: folder of a store that was prepared with fixations.
        config: how fixations are turned into labels; None for the defaults.
        target_share: share of a slice that the target fills, if the site knows it; chooses the blur.

    Raises: UsageError if the store has no fixations; ConfigError if no blur gives the target share.
    """
    store, config = SliceStore(store_dir), config or GazeConfig()
    if store.gaze is None:
        raise UsageError(f"{store.path}: no fixations here; run `fedfactory prepare ... --label-kind gaze`")
    candidates, certainty = (np.zeros(_shape(store), np.uint8) for _ in range(2))
    fixated = np.unique(store.gaze[:, 0]).astype(int).tolist()

    def view(number: int) -> tuple[np.ndarray, np.ndarray]:
        """Fixations (n, 3) and image (C, S, S) of a slice."""
        return store.gaze[store.gaze[:, 0] == number, 1:], store.images[number].astype(np.float64)

    if target_share is not None:
        some = fixated[:: max(1, len(fixated) // SLICES_FOR_BLUR)]
        config = config_for_target_share([view(number) for number in some], target_share, config)
    for number in track(fixated, "reading gaze"):
        candidates[number], certainty[number] = graded_labels(*view(number), config)
    for name, values in ((ARRAY, candidates), (CERTAINTY, certainty)):
        with atomic_file(store.path / name) as temporary, temporary.open("wb") as file:
            np.save(file, values, allow_pickle=False)
    write_json(store.path / CARD, {"options": config.to_dict(), "gaze": store.files["gaze"]})
    viewed = candidates[(candidates > 0).any(axis=(1, 2))]
    return GazeSummary(
        slices=len(candidates),
        viewed_slices=len(viewed),
        sigma=config.sigma,
        target_share=float((viewed == TARGET_ONLY).mean()) if len(viewed) else float("nan"),
        uncertain_share=float((viewed == UNCERTAIN).mean()) if len(viewed) else float("nan"),
    )


def _shape(store: SliceStore) -> tuple[int, int, int]:
    """Of the candidate labels, (N, S, S)."""
    return len(store), store.format.size, store.format.size


def gaze_candidates(store: SliceStore) -> tuple[np.ndarray, np.ndarray]:
    """Candidate labels (N, S, S) uint8, 0 to 3, and their certainty (N, S, S) uint8, see `graded_labels`.

    Raises: StoreError if they are missing or of other fixations.
    """
    hint = f"run `fedfactory gaze {store.path}`"
    try:
        card = dict(read_json(store.path / CARD))
        found = tuple(np.load(store.path / name, mmap_mode="r", allow_pickle=False) for name in (ARRAY, CERTAINTY))
        fits = all((array.shape, array.dtype) == (_shape(store), np.uint8) for array in found)
    except Exception as error:  # numpy parses the header with Python's own parser, which raises many types
        raise StoreError(f"{store.path}: its fixations have not been read ({error}); {hint}") from None
    if card.get("gaze") != store.files.get("gaze") or not fits:
        raise StoreError(f"{store.path}: its fixations have changed since they were read; {hint}")
    return found
