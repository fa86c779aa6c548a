"""Differences of scores that are paired by patient and seed, with intervals."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

DRAWS = 2000  # of the bootstrap
Scores = Mapping[int, Mapping[tuple[str, str, str], float]]


def paired(ours: Scores, theirs: Scores) -> dict[str, float | dict[str, float]]:
    """Mean difference over sites of means over patients, of the seeds that both have, with its 95 % interval.

    A bootstrap draws seeds, and patients within each site.

    Args:
        ours: by seed, the score of every patient; patients are (site, modality, name).
        theirs: the scores to compare with; patients that one of them lacks in a seed are left out.

    Returns: "mean" (ours less theirs), "low", "high", "by_site", "seeds" and "patients", the numbers of both.
    """
    seeds = sorted(set(ours) & set(theirs))
    patients = sorted(set.intersection(*(set(scores[seed]) for scores in (ours, theirs) for seed in seeds)))
    sites = sorted({site for site, _, _ in patients})
    # (seeds, patients) of each site
    values = [
        np.array([[ours[s][p] - theirs[s][p] for p in patients if p[0] == site] for s in seeds]) for site in sites
    ]
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(DRAWS):
        chosen = rng.integers(len(seeds), size=len(seeds))
        means = [v[chosen][:, rng.integers(v.shape[1], size=v.shape[1])].mean() for v in values]
        draws.append(np.mean(means))
    low, high = np.percentile(draws, (2.5, 97.5))
    by_site = {site: round(float(v.mean()), 4) for site, v in zip(sites, values, strict=True)}
    mean = float(np.mean(list(by_site.values())))
    return {
        "mean": round(mean, 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "by_site": by_site,
        "seeds": len(seeds),
        "patients": len(patients),
    }
