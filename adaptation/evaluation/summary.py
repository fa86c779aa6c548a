"""Means of scores: over cases for each class, then over classes; intervals by bootstrap over patients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import bootstrap

from ...errors import UsageError
from ...imaging.class_names import class_name
from .scores import MEASURES, Score, measure_name

RESAMPLES = 2000
CONFIDENCE = 0.95
BATCH_VALUES = 1 << 22  # resampled values in memory at once


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One measure of one class over all cases where it is defined.

    Attributes:
        label: class, or 0 for the mean over the classes.
        measure: one of MEASURES.
        mean: over the cases of a class; for label 0 the mean of these means. NaN where nothing is defined.
        low: lower end of the 95 % confidence interval of the mean; NaN with fewer than two patients.
        high: its upper end.
        cases: number of cases in which the measure is defined, for label 0 for at least one class.
        undefined: number of the other cases.
        patients: number of patients of these `cases`.
    """

    label: int
    measure: str
    mean: float
    low: float
    high: float
    cases: int
    undefined: int
    patients: int


def summarise(scores: Sequence[Score], *, seed: int = 0) -> list[Summary]:
    """Means with confidence intervals, of every class and over the classes.

    Args:
        scores: one for every case and class.
        seed: of the bootstrap.
    """
    labels = sorted({score.label for score in scores})
    rows = []
    for measure in MEASURES:
        table = _Table(scores, measure, labels)
        columns = [list(range(len(labels))), *([k] for k in range(len(labels)))]
        rows += [table.summary(label, chosen, seed=seed) for label, chosen in zip([0, *labels], columns, strict=True)]
    return rows


def class_means(scores: Sequence[Score], measure: str) -> dict[int, float]:
    """Class to the mean of a measure over the cases where it is defined; NaN where it never is."""
    means = {}
    for label in sorted({score.label for score in scores}):
        values = np.array([getattr(score, measure) for score in scores if score.label == label])
        means[label] = _mean(values)
    return means


def mean_over_classes(scores: Sequence[Score], measure: str) -> float:
    """The mean of `class_means` over the classes where the measure is defined at all; NaN without any."""
    return _mean(np.array(list(class_means(scores, measure).values())))


def mean_dice(scores: Sequence[Score]) -> float:
    """Mean foreground Dice: over cases for each class, then over classes. Raises: UsageError without any score."""
    if not scores:
        raise UsageError("there are 0 scores, for no case has foreground; give at least one labelled case")
    return mean_over_classes(scores, "dice")


def class_lines(scores: Sequence[Score], names: Mapping[int, str]) -> list[str]:
    """One line for every class: its name and the means of all measures.

    Args:
        scores: one for every case and class.
        names: class to its name.
    """
    means = {measure: class_means(scores, measure) for measure in MEASURES}
    return [
        f"{class_name(label, names)}: "
        + ", ".join(f"{measure_name(measure, scores[0].unit)} {means[measure][label]:.3f}" for measure in MEASURES)
        for label in means["dice"]
    ]


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values (N,); NaN if there are none."""
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


class _Table:
    """One measure of all cases, added up by patient and class.

    Attributes:
        measure: one of MEASURES.
        values: (cases, classes), NaN where the measure is undefined.
        patient: (cases,) number of each case's patient.
        sums: (patients, classes) sum of the defined values.
        counts: (patients, classes) number of the defined values.
    """

    def __init__(self, scores: Sequence[Score], measure: str, labels: list[int]) -> None:
        self.measure = measure
        cases = {name: row for row, name in enumerate(dict.fromkeys(score.case for score in scores))}
        patients = {name: row for row, name in enumerate(dict.fromkeys(score.patient for score in scores))}
        self.values = np.full((len(cases), len(labels)), np.nan)
        self.patient = np.zeros(len(cases), dtype=int)
        for score in scores:
            self.values[cases[score.case], labels.index(score.label)] = getattr(score, measure)
            self.patient[cases[score.case]] = patients[score.patient]
        defined = np.isfinite(self.values)
        self.sums, self.counts = np.zeros((2, len(patients), len(labels)))
        np.add.at(self.sums, self.patient, np.where(defined, self.values, 0.0))
        np.add.at(self.counts, self.patient, defined)

    def summary(self, label: int, chosen: list[int], *, seed: int) -> Summary:
        """Summary of the classes with the numbers `chosen`."""
        defined = np.isfinite(self.values[:, chosen]).any(axis=1)
        patients = np.unique(self.patient[defined])
        sums, counts = self.sums[np.ix_(patients, chosen)], self.counts[np.ix_(patients, chosen)]
        low, high = _interval(sums, counts, seed)
        return Summary(
            label=label,
            measure=self.measure,
            mean=float(_mean_of_means(sums.sum(0), counts.sum(0))),
            low=low,
            high=high,
            cases=int(defined.sum()),
            undefined=int((~defined).sum()),
            patients=len(patients),
        )


def _mean_of_means(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Means of the classes (..., K) averaged over the classes that have a value: (...); NaN where none has."""
    with np.errstate(invalid="ignore"):
        means = np.where(counts > 0, sums / np.maximum(counts, 1), 0.0)
        return means.sum(-1) / (counts > 0).sum(-1)


def _interval(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float]:
    """Interval of the mean over the classes when patients are drawn with replacement; NaN for fewer than two.

    Args:
        sums: (P, K) sum of the values of each patient and class.
        counts: (P, K) number of these values; every patient has at least one.
        seed: of the draws.
    """
    patients = len(sums)
    if patients < 2:
        return float("nan"), float("nan")

    def mean(drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        """Mean for patients (..., P) drawn along the last axis."""
        rows = drawn.astype(int)
        return _mean_of_means(sums[rows].sum(-2), counts[rows].sum(-2))

    found = bootstrap(
        (np.arange(patients),),
        mean,
        n_resamples=RESAMPLES,
        batch=max(1, BATCH_VALUES // sums.size),
        vectorized=True,
        axis=-1,
        confidence_level=CONFIDENCE,
        method="percentile",  # defined for equal values too, unlike the corrected ones
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)
