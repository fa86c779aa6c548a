"""What the study of federated methods found: means of its rows, paired differences, and what was best."""

from __future__ import annotations

from typing import Any

import numpy as np
from method_tasks import TASKS
from paired_differences import paired

# What is compared: question, row, rows against which it is compared.
COMPARISONS = [
    ("dense", "fedavg", ("local", "fedavg, half as long")),
    ("dense", "fedbn", ("local", "fedavg")),
    ("fedicra", "fedicra", ("local", "fedavg", "fedprox", "fedbn", "dense/fedavg")),
    (
        "fedicra",
        "fedicra",
        (
            "fedicra, no tree energy",
            "fedicra, published trees",
            "fedicra, no CRF",
            "fedicra, no contrast",
            "fedicra, all layers together",
            "fedicra, not adaptive",
        ),
    ),
    ("fedmix", "fedavg of all labels", ("dense site alone",)),
    ("fedmix", "fedmix", ("dense site alone", "fedavg of all labels", "fedmix, refined", "dense/fedavg")),
    ("hssf", "hssf", ("public slices alone", "local", "lssl", "hssf, no self-training", "hssf, assessor not asked")),
    (
        "cmc",
        "cmc",
        (
            "each modality alone",
            "cmc, no consistency",
            "cmc, no channels",
            "cmc, no classes",
            "cmc, views at all sites",
            "cmc, never fused",
        ),
    ),
    ("gaze", "fixations", ("masks", "masks, two networks", "fixations, one level")),
]

# What a hospital would do without the methods of a question, and what more labelling would give: question, row.
FLOORS = {
    "dense": "local", "fedicra": "local", "fedmix": "dense site alone", "hssf": "public slices alone",
    "cmc": "each modality alone",
}  # fmt: skip
CEILINGS = {
    "fedicra": ("dense", "fedavg"), "fedmix": ("dense", "fedavg"), "hssf": ("dense", "fedavg"),
    "gaze": ("gaze", "masks"),
}  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of all rows, paired differences with intervals, and what was best for each question and task.

    Runs of an earlier version of the package are compared with one another only, and marked "earlier". They are left
    out where the question has been asked of its task again.
    """
    found: dict[str, Any] = {"devices": sorted({row["machine"]["device"] for row in rows}), "tasks": {}}
    found |= {"rows": [], "differences": [], "best": []}
    again = {(row["question"], row["task"]) for row in rows if not earlier(row)}
    for before in (False, True):
        part = _summary_of([row for row in rows if earlier(row) == before])
        for kind, cells in part.items():
            found[kind] += [
                {**cell, "earlier": before}
                for cell in cells
                if not before or (cell["question"], cell["task"]) not in again
            ]
    for row in rows:
        config = row["config"]
        task = found["tasks"].setdefault(
            row["task"], {"size": config["size"], "rounds": 0, "updates": config["updates"], "sites": 0}
        )
        task["rounds"], task["sites"] = max(task["rounds"], config["rounds"]), max(task["sites"], config["sites"])
    return found


def earlier(row: dict[str, Any]) -> bool:
    """Whether a run is of a version of the package whose networks did not fold pixels: their normalisation and learning
    rate were others too."""
    return "fold" not in row["config"]


def _summary_of(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The "rows", "differences" and "best" of runs of one version."""
    table: dict[tuple[str, str, str], dict[int, dict[tuple[str, str, str], float]]] = {}
    facts: dict[tuple[str, str, str], dict[str, Any]] = {}
    for row in rows:
        cell = (
            row["question"],
            row["task"],
            "each modality alone" if row["name"].endswith(" alone") and row["question"] == "cmc" else row["name"],
        )
        table.setdefault(cell, {}).setdefault(row["seed"], {}).update(
            {tuple(patient): dice for *patient, dice in row["scores"]}
        )
        facts.setdefault(cell, {}).update(
            {name: row[name] for name in ("method", "labels", "which", "bytes_per_round")}
        )
    shown = []
    for (question, task, name), seeds in table.items():
        sites = sorted({site for scores in seeds.values() for site, _, _ in scores})
        by_site = {
            s: round(
                float(np.mean([v for scores in seeds.values() for (site, _, _), v in scores.items() if site == s])), 3
            )
            for s in sites
        }
        fact = facts[question, task, name]
        shown.append({
            "question": question, "task": task, "name": name, "dice": round(float(np.mean(list(by_site.values()))), 4),
            "seeds": len(seeds), "by_site": by_site, **fact,
        })  # fmt: skip
    differences = []
    for question, name, others in COMPARISONS:
        for task in TASKS:
            for other in others:
                ours = table.get((question, task, name))
                key = tuple(other.split("/")) if "/" in other else (question, other)
                theirs = table.get((key[0], task, key[1]))
                if ours and theirs:
                    differences.append(
                        {"question": question, "task": task, "name": name, "against": other, **paired(ours, theirs)}
                    )
    return {"rows": shown, "differences": differences, "best": best_rows(shown, table)}


def best_rows(shown: list[dict[str, Any]], table: dict[tuple[str, str, str], dict]) -> list[dict[str, Any]]:
    """The best row of each question and task, and its distances from the floor and the ceiling, where they have run."""
    found = []
    for question, task in dict.fromkeys((row["question"], row["task"]) for row in shown):
        floor, ceiling = (question, FLOORS.get(question)), CEILINGS.get(question)
        rivals = [
            row
            for row in shown
            if (row["question"], row["task"]) == (question, task) and (question, row["name"]) != ceiling
        ]
        if len(rivals) < 2:
            continue
        best = max(rivals, key=lambda row: row["dice"])
        ours, distances = table[question, task, best["name"]], {}
        for kind, other in (("floor", floor), ("ceiling", ceiling)):
            theirs = table.get((other[0], task, other[1])) if other else None
            if theirs and theirs is not ours:
                distances[kind] = {"against": other[1], **paired(ours, theirs)}
        found.append({"question": question, "task": task, "name": best["name"], "dice": best["dice"], **distances})
    return found
