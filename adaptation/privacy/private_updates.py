"""Updates with differential privacy per patient: random patients, clipped gradients, noise (DP-SGD, Abadi et al. 2016).

Everything random here comes from the site alone. Draws for one patient depend on no other patient, so that adding or
removing one leaves what the others contribute as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ...common.seeding import seed_of, seeded
from ...errors import NodeDataError
from ..labels.candidate_labels import SiteSlices
from .patient_gradients import Batch, clipped_sum

MAX_SLICES = 16  # of a patient in an update
DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class PatientSampling:
    """How patients come into an update.

    Attributes:
        patients: number of training patients of the site.
        rate: probability with which each of them is in an update, in (0, 1], independently of the others.
        slices: number of slices of a patient who is in it.
    """

    patients: int
    rate: float
    slices: int

    @classmethod
    def of(cls, patients: int, batch_size: int) -> PatientSampling:
        """Sampling by which an update has `batch_size` slices on average, of as many patients as possible: the noise is
        one for all of them, so more patients drown it better than more slices of each do."""
        slices = min(MAX_SLICES, max(1, batch_size // patients))
        return cls(patients=patients, rate=min(1.0, batch_size / (patients * slices)), slices=slices)

    @property
    def expected(self) -> float:
        """Mean number of patients in an update."""
        return self.rate * self.patients


@dataclass(frozen=True, kw_only=True)
class PrivateUpdates:
    """What the site decides of a round with differential privacy, besides the settings of the method.

    Attributes:
        noise: standard deviation of the noise over the clipping norm.
        rng: random numbers that nobody outside the site can know or repeat. Not PyTorch's generator: on a CPU it has
            2^32 different sequences, which can all be tried.
    """

    noise: float
    rng: np.random.Generator


def patients_of(data: SiteSlices) -> list[np.ndarray]:
    """Indices of the labelled slices of every patient who has any, in the order of the patients.

    Raises: NodeDataError if it is not known whose slices they are, or for labels other than dense ones.
    """
    if data.patients is None:
        raise NodeDataError("patients of the slices are not known; differential privacy needs them")
    if others := sorted(set(data.kinds.tolist()) - {DENSE, "none"}):
        raise NodeDataError(
            f"this site has {', '.join(others)} labels; differential privacy needs dense labels: use a store of these"
        )
    dense = np.flatnonzero(data.kinds == DENSE)
    return [dense[data.patients[dense] == patient] for patient in np.unique(data.patients[dense])]


def private_gradient(
    model: nn.Module,
    patients: Sequence[np.ndarray],
    sampling: PatientSampling,
    private: PrivateUpdates,
    *,
    clip: float,
    batch_of: Callable[[np.ndarray], Batch],
) -> list[Tensor]:
    """The noised mean gradient of one update, for each trained parameter.

    Args:
        model: see `clipped_sum`.
        patients: indices of the slices of each patient.
        sampling: how they come into the update; an update without any patient is noise alone.
        private: noise and random numbers.
        clip: largest norm of a patient's gradient.
        batch_of: augmented slices and candidates of the slices with the given indices; may draw from the global
            generators, which are seeded for each patient.
    """
    present = private.rng.random(len(patients)) < sampling.rate
    seeds = private.rng.integers(2**63, size=len(patients))
    batches = [
        _batch(slices, sampling.slices, int(seed), batch_of)
        for slices, seed, drawn in zip(patients, seeds, present, strict=True)
        if drawn
    ]
    return [
        (summed + _noise(summed, private.noise * clip, private.rng)) / sampling.expected
        for summed in clipped_sum(model, batches, clip)
    ]


def _batch(slices: np.ndarray, count: int, seed: int, batch_of: Callable[[np.ndarray], Batch]) -> Batch:
    """`count` of a patient's slices, each as often as the others as far as possible, augmented."""
    with seeded(seed_of(seed)):
        order = np.concatenate([np.random.permutation(slices) for _ in range(-(-count // len(slices)))])
        return batch_of(order[:count])


def _noise(like: Tensor, deviation: float, rng: np.random.Generator) -> Tensor:
    """Normal noise of the tensor's shape, type and device."""
    return torch.from_numpy(deviation * rng.standard_normal(tuple(like.shape))).to(like)
