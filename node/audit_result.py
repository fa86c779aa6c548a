"""What an audit of synthetic volumes found, as records."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from ..generative.metrics.fidelity import Estimate


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """How close synthetic slices are to the slices of patients held out from training.

    Attributes:
        kernel_distance: see `kernel_distance`; 0 for equal distributions.
        frechet_distance: see `frechet_distance`; 0 for equal distributions.
        precision: share of synthetic slices that lie among real ones, in [0, 1].
        recall: share of real slices that lie among synthetic ones, in [0, 1].
        layout: see `layout_agreement`; 1 for equal mean slices.
        similarity_within_synthetic: mean MS-SSIM of synthetic slices of different subjects; 1 if all are the same.
        similarity_within_real: the same for the real slices.
        intensity_distance: first Wasserstein distance of the grey levels, on the [-1, 1] scale.
    """

    kernel_distance: float
    frechet_distance: float
    precision: float
    recall: float
    layout: float
    similarity_within_synthetic: float
    similarity_within_real: float
    intensity_distance: float


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """What synthetic slices disclose about the patients that were trained on, measured in one feature space.

    Attributes:
        copying_ratio: distance to slices that were trained on over distance to held-out ones; 1 without copying.
        attack_auc: area under the curve of an attacker who guesses who was trained on; 0.5 for mere guessing.
    """

    copying_ratio: Estimate
    attack_auc: Estimate


@dataclass(frozen=True, kw_only=True)
class LabelCheck:
    """How credible the labels of synthetic slices are.

    Attributes:
        agreement_with_independent_segmenter: mean foreground Dice with the factory's robust segmenter.
        shares_synthetic: share of each class among the labelled pixels of synthetic slices.
        shares_real: the same for the site's densely labelled training slices; None if there are none.
    """

    agreement_with_independent_segmenter: float
    shares_synthetic: list[float]
    shares_real: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """The numbers of an audit, which may travel, and the closest pairs, which stay at the site.

    Attributes:
        fidelity: against patients held out from training.
        privacy: feature space ("features", "pixels") to what was measured in it.
        patients: number of patients "trained" on and "held_out", equal by design.
        slices_each: number of real slices of either side.
        enough_patients: whether there are enough patients for a statement on membership.
        findings: one sentence per problem; empty if none was found.
        pairs: (n, 2, S, S, 3) float32 in [0, 1], the closest synthetic and real slices, for the site's own eyes.
        labels: of the synthetic slices; None if they were not checked.
    """

    fidelity: Fidelity
    privacy: dict[str, Privacy]
    patients: dict[str, int]
    slices_each: int
    enough_patients: bool
    findings: list[str]
    pairs: np.ndarray
    labels: LabelCheck | None = None

    def numbers(self) -> dict[str, object]:
        """All numbers as JSON-able values; no image, no name."""
        labels = {} if self.labels is None else asdict(self.labels)
        if labels and self.labels.shares_real is None:
            del labels["shares_real"]
        return {
            "fidelity": asdict(self.fidelity),
            "privacy": {space: asdict(found) for space, found in self.privacy.items()},
            "patients": self.patients,
            "slices_each": self.slices_each,
            "enough_patients": self.enough_patients,
            **({"labels": labels} if labels else {}),
        }


@dataclass(frozen=True, kw_only=True)
class AuditSource:
    """What was audited.

    Attributes:
        made_by: program and version.
        factory_sha256: digest of the factory file.
        domain: of the site.
        volumes: number of synthetic subjects.
        seed: of the first subject.
    """

    made_by: str
    factory_sha256: str
    domain: str
    volumes: int
    seed: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)
