"""What the study of a factory's worth found: differences of paired patients, and a table on the screen."""

from __future__ import annotations

from typing import Any

import numpy as np
from paired_differences import paired

COMPARISONS_IN_FULL = {
    "first_guess_and_synthetic_slices": ("first_guess", "first_guess_and_own_slices"),
    "first_guess_own_and_synthetic_slices": ("first_guess", "first_guess_and_own_slices"),
}
COMPARISONS = {  # what a variant gives: what a site has without it, at equal updates
    "synthetic_alone_four_times": ("first_guess",),
    "first_guess_own_and_synthetic_slices": ("first_guess", "first_guess_and_own_slices"),
}


def differences(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What every variant gives beyond its rivals at the unlabelled sites, paired by patient and seed."""
    found = []
    for name in runs[0]["variants"]:
        for key, comparisons in (("scores", COMPARISONS), ("scores_in_full", COMPARISONS_IN_FULL)):
            if key not in runs[0]["baselines"]:
                continue
            for row, rivals in comparisons.items():
                ours = {run["seed"]: by_patient(run["variants"][name][key], row) for run in runs}
                for rival in rivals:
                    theirs = {run["seed"]: by_patient(run["baselines"][key], rival) for run in runs}
                    start = "in full" if key == "scores_in_full" else "equal updates"
                    facts = {"variant": name, "updates": start, "row": row, "against": rival}
                    found.append({**facts, **paired(ours, theirs)})
    return found


def by_patient(scores: dict[str, dict[str, Any]], row: str) -> dict[tuple[str, str, str], float]:
    """The scores of a row by site and number of the patient."""
    return {
        (domain, "", str(number)): value
        for domain, rows in scores.items()
        if row in rows
        for number, value in enumerate(rows[row]["patients"])
    }


def report(content: dict[str, Any]) -> None:
    """Print the means over seeds, the differences, and what was measured of the factories."""
    print("one update with labels against images alone:", content["step"]["ratio"])
    seeds = content["seeds"]
    for domain in list(seeds[0]["baselines"]["scores"])[1:]:
        for name in ("baselines", *seeds[0]["variants"]):
            found = [(s["baselines"] if name == "baselines" else s["variants"][name])["scores"][domain] for s in seeds]
            for key in found[0]:
                print(domain, name, key, round(float(np.mean([row[key]["dice"] for row in found])), 3))
    for row in content["differences"]:
        print(row)
    for seed in seeds:
        for name, row in seed["variants"].items():
            print(seed["seed"], name, "shared", row["shared_anatomy"], "drawn labels", row["drawn_labels"])
