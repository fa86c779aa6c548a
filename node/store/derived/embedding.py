"""A site's mean image embedding: computed once where the images are, kept beside the slice store, never sent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....common.files import atomic_file, sha256_of, write_json
from ....common.json_text import read_json
from ....common.progress import track
from ....errors import StoreError
from ....generative.conditions import Guide
from ....generative.image_encoder import load_image_encoder, read_embedding
from ..slice_store import SliceStore

EMBEDDING, CARD = "embedding.npy", "embedding.json"
BATCH = 32


def embed_store(path: str | Path, *, encoder: str, weights: str | Path, device: str = "cpu") -> Tensor:
    """Embed the training slices of a store and keep their mean in it.

    Args:
        path: slice store.
        encoder, weights: as for `load_image_encoder`; the store remembers both, for guidance at this node.

    Returns: (width,), of Euclidean norm below 1.
    Raises: UsageError, StoreError, CheckpointError for an unusable store or encoder; the store stays as it was.
    """
    store, network = SliceStore(path), load_image_encoder(encoder, weights, device=device)
    chosen = store.slices("train")
    starts = track(range(0, len(chosen), BATCH), "embedding slices")
    batches = (torch.from_numpy(store.images[chosen[n : n + BATCH]].astype(np.float32)) for n in starts)
    mean = network.mean_embedding(batches)
    with atomic_file(store.path / EMBEDDING) as temporary, temporary.open("wb") as file:
        np.save(file, mean.numpy()[None], allow_pickle=False)
    weights = Path(weights).resolve()
    write_json(store.path / CARD, {"encoder": encoder, "weights": str(weights), "sha256": sha256_of(weights)})
    return mean


def site_embedding(store: SliceStore, width: int) -> Tensor:
    """(width,). Raises StoreError if the store has none, or one of another encoder."""
    if not (store.path / EMBEDDING).is_file():
        raise StoreError(f"{store.path}: holds no mean embedding; run `fedfactory embed`")
    mean = read_embedding(store.path / EMBEDDING)
    if len(mean) != width:
        raise StoreError(f"{store.path}: its embedding has {len(mean)} numbers; the factory needs {width}")
    return mean


def load_guide(store: SliceStore) -> Guide:
    """The encoder the store was embedded with, from the file it remembers.

    Raises: StoreError if the store was not embedded or the weights have changed since.
    """
    try:
        card = read_json(store.path / CARD)
        encoder, weights, expected = card["encoder"], Path(card["weights"]), card["sha256"]
        if not isinstance(encoder, str) or not weights.is_file():  # a device would be read for ever
            raise ValueError(f"its weights are in {weights}")
        unchanged = sha256_of(weights) == expected
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{store.path}: no usable image encoder ({error}); run `fedfactory embed`") from None
    if not unchanged:
        raise StoreError(f"{weights}: has changed since the store was embedded; run `fedfactory embed` again")
    network = load_image_encoder(encoder, weights)
    return Guide(network, site_embedding(store, network.width))
