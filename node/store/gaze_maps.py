"""What a site makes of its fixations, once, beside its store: label candidates that training only reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ...adaptation.labels.fixations import GazeConfig, blur_for_share, candidates_from_fixations
from ...common.files import atomic_file, write_json
from ...common.progress import track
from ...errors import StoreError, UsageError
from .slice_store import SliceStore

ARRAY, CARD = "gaze_candidates.npy", "gaze_candidates.json"
ENOUGH = 24  # slices to choose a blur by


def read_gaze(
    store_dir: str | Path, config: GazeConfig | None = None, *, target_share: float | None = None
) -> dict[str, float]:
    """Turn a store's fixations into label candidates, kept in its folder; they never leave it.

    Args:
        target_share: of a slice that the target fills, where the site knows it; chooses the blur.

    Returns: number of slices, of slices that were looked at, of these the mean shares of the target and of what may be
        either, and the blur. Raises: UsageError if the store has no fixations; ConfigError if no blur gives the share.
    """
    store, config = SliceStore(store_dir), config or GazeConfig()
    if store.gaze is None:
        raise UsageError(f"{store.path}: no fixations here; run `fedfactory prepare ... --label-kind gaze`")
    candidates = np.zeros(store.images.shape, np.uint8)
    fixated = np.unique(store.gaze[:, 0]).astype(int).tolist()

    def look(number: int) -> tuple[np.ndarray, np.ndarray]:
        return store.gaze[store.gaze[:, 0] == number, 1:], store.images[number].astype(np.float64)

    if target_share is not None:
        some = fixated[:: max(1, len(fixated) // ENOUGH)]
        config = blur_for_share([look(number) for number in some], target_share, config)
    for number in track(fixated, "reading gaze"):
        candidates[number] = candidates_from_fixations(*look(number), config)
    with atomic_file(store.path / ARRAY) as temporary, temporary.open("wb") as file:
        np.save(file, candidates, allow_pickle=False)
    write_json(store.path / CARD, {"options": config.to_dict(), "gaze": store.files["gaze"]})
    seen = candidates[(candidates > 0).any(axis=(1, 2))]
    shares = {"target": float((seen == 2).mean()), "unsure": float((seen == 3).mean())} if len(seen) else {}
    return {"slices": len(candidates), "looked_at": len(seen), "sigma": config.sigma, **shares}


def gaze_candidates(store: SliceStore) -> np.ndarray:
    """(N, S, S) uint8 candidates. Raises: StoreError if they were not made, or of other fixations."""
    hint = f"run `fedfactory gaze {store.path}`"
    try:
        card = json.loads((store.path / CARD).read_text(encoding="utf-8"))
        candidates = np.load(store.path / ARRAY, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise StoreError(f"{store.path}: its fixations have not been read ({error}); {hint}") from None
    if (
        card.get("gaze") != store.files.get("gaze")
        or candidates.shape != store.images.shape
        or candidates.dtype != np.uint8
    ):
        raise StoreError(f"{store.path}: its fixations have changed since they were read; {hint}")
    return candidates
