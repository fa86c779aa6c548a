"""Dividing a site's patients into training, validation and test."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

SPLITS = ("train", "validation", "test")


def split_patients(
    patients: Mapping[str, bool],
    *,
    validation_share: float,
    test_share: float,
    seed: int,
    known: Mapping[str, str] | None = None,
    ranks: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Patient to split.

    Held-out patients are drawn among the labelled ones, where there are any: only those can be scored. Their number is
    floor(share * all patients). Patients of `known` stay where they are.

    Args:
        patients: whether each has labels.
        ranks: what patients are put in order by before they are drawn, where it is not their name.
    """
    ordered = sorted(patients, key=lambda name: (ranks or {}).get(name, name))
    known = {name: part for name, part in (known or {}).items() if name in patients}
    result = {name: "train" for name in patients} | known
    labelled = [name for name in ordered if patients[name]]
    candidates = [name for name in (labelled or ordered) if name not in known]
    order = np.random.default_rng(seed).permutation(len(candidates))
    wanted = {part: math.floor(share * len(patients) + 1e-9) for part, share in
              (("validation", validation_share), ("test", test_share))}  # fmt: skip
    for part, count in wanted.items():
        missing = max(0, count - sum(p == part for p in known.values()))
        chosen, order = order[:missing], order[missing:]
        result |= {candidates[n]: part for n in chosen}
    if candidates and not any(part == "train" for part in result.values()):
        result[candidates[0]] = "train"
    return result
