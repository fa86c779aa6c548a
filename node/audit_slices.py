"""The slices that an audit compares: real ones from a store, in equal numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .store.slice_store import SliceStore


@dataclass(frozen=True)
class AuditSlices:
    """Slices of one kind.

    Attributes:
        images: (N, C, S, S) float32 in [-1, 1].
        z_bin: (N,) int64 height bins.
        group: (N,) int64 number of the patient or synthetic subject.
    """

    images: Tensor
    z_bin: Tensor
    group: Tensor

    def take(self, chosen: Tensor) -> AuditSlices:
        """The slices with the given numbers, (n,) int64."""
        return AuditSlices(self.images[chosen], self.z_bin[chosen], self.group[chosen])


def real_slices(store: SliceStore, splits: tuple[str, ...]) -> AuditSlices:
    """The slices of some splits of a store, grouped by patient."""
    chosen = np.concatenate([store.slices(split) for split in splits])
    numbers = {patient: number for number, patient in enumerate(dict.fromkeys(case.patient for case in store.cases))}
    patients = np.concatenate(
        [np.full(case.count, numbers[case.patient]) for split in splits for case in store.cases if case.split == split]
        or [np.empty(0, np.int64)]
    )
    images = torch.from_numpy(store.images[chosen].astype(np.float32))
    return AuditSlices(images, torch.from_numpy(store.z_bin[chosen]), torch.from_numpy(patients))


def equal_sides(first: AuditSlices, second: AuditSlices, rng: torch.Generator) -> tuple[AuditSlices, AuditSlices]:
    """As many patients and slices of either side, drawn at random: the nearest of many is nearer than that of few."""
    num_patients = min(len(side.group.unique()) for side in (first, second))
    parts = []
    for side in (first, second):
        patients = side.group.unique()
        kept = patients[torch.randperm(len(patients), generator=rng)[:num_patients]]
        parts.append(side.take(torch.nonzero(torch.isin(side.group, kept))[:, 0]))
    count = min(len(part.images) for part in parts)
    drawn = [part.take(torch.randperm(len(part.images), generator=rng)[:count]) for part in parts]
    return drawn[0], drawn[1]
