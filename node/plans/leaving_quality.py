"""Numbers about a generator's slices that may leave a site: when, and from which of its slices."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...generative.metrics.quality import site_quality
from ...generative.networks.generator import Generator
from ..protection import guarded_round
from ..protection.usual_generator import GeneratorRecord
from ..store.slice_store import SliceStore

MAX_SLICES = 512  # real slices in a comparison
MIN_BINS = 3  # height bins over which a number is averaged; fewer only if the store has fewer


def leaving_quality(
    store: SliceStore,
    generator: Generator,
    record: GeneratorRecord,
    *,
    domain: int,
    encoding: Tensor | None = None,
) -> dict[str, float]:
    """How slices of the received generator compare with this site's: the numbers of `SiteQuality` by name.

    Args:
        store: of the site.
        generator: as received.
        record: of the store, from before this round.
        domain: index of the store's domain.
        encoding: (encoding_dim,), the site's mean embedding, or None.

    Returns: empty if the policy keeps the numbers, today's quota is used up, too few patients or height bins with
        enough patients are there, the generator is not the usual next one, or the last answer was a few rounds ago, see
        `GeneratorRecord`. For all but the last the site's ledger gets a line.
    """
    guard = guarded_round.current()
    chosen = comparable_slices(store, guard.policy.least_patients)
    if reason := _why_held_back(generator, record, enough=bool(len(chosen))):
        guard.held_back.append(f"quality ({reason})")
        return {}
    if not record.is_due:
        return {}
    chosen = chosen[:: -(-len(chosen) // MAX_SLICES)]
    real = torch.from_numpy(store.images[chosen].astype(np.float32))
    z_bin = torch.from_numpy(store.z_bin[chosen])
    return site_quality(generator, real, z_bin, domain=domain, encoding=encoding).to_dict()


def _why_held_back(generator: Generator, record: GeneratorRecord, *, enough: bool) -> str:
    """Why no number about the generator leaves, whenever it is asked for; empty if one may."""
    guard = guarded_round.current()
    if not guard.policy.quality_leaves:
        return "the site's policy keeps it"
    if not guard.qualities_left:
        return "as many as the policy allows have left in 24 hours"
    if not enough:
        return "too few patients or height bins"
    if not record.sketch:
        return "this site has sent no generator yet"
    # Buffers hold fixed noise, which does not travel: parameters only.
    is_usual = record.is_usual(dict(generator.named_parameters()), guard.secret)
    return "" if is_usual else "the generator is not the usual next one"


def comparable_slices(store: SliceStore, least_patients: int) -> np.ndarray:
    """Numbers (N,) int64 of the training slices in height bins with slices of enough patients; none in too few bins."""
    chosen = store.slices("train")
    z_bin, volume = store.z_bin[chosen], store.volume_of_slices()[chosen]
    patient = np.array([case.patient for case in store.cases])[volume]
    good = [value for value in np.unique(z_bin) if len(np.unique(patient[z_bin == value])) >= least_patients]
    if len(good) < min(MIN_BINS, store.format.z_bins):
        return chosen[:0]
    return chosen[np.isin(z_bin, good)]
