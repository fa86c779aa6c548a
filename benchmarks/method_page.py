"""The page of the study of federated methods, from its JSON file.

uv run python benchmarks/method_page.py --out docs/methods-results.md

The costs of a round come from `method_cost.py`, whose file is beside that of the study.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from results_page import number, table

RESULTS = Path(__file__).parent / "results"
HEAD = """# Which method for which labels

Written by `benchmarks/method_page.py` from `benchmarks/results/method_study.json`, which `benchmarks/method_study.py`
wrote.

Real images of several sites; weak labels are made from dense ones, for the training patients only. Within a task all
rows have the same rounds, updates of a site, and slices in an update, and the settings are the defaults. Dice is the
mean over classes, patients and sites on the images' own grid: of each site's own model for `local`, `fedbn`, `fedicra`
and `hssf`, of the average otherwise. Differences are paired by patient and seed; brackets are 95 % intervals of a
bootstrap over patients and seeds. The best of several rows is in part so by chance.
"""
HALF, LONG_ENOUGH = "half as long", 0.02  # end of a row's name; Dice that twice the length may still add
MARK = " ¹"  # of a row of an earlier version
EARLIER = """¹ Of an earlier version, whose networks learnt more slowly, and in `hssf` and `lssl` hardly at all
([why](decisions.md)). Such rows are compared with one another only.
"""
QUESTIONS: dict[str, tuple[str, str]] = {
    "dense": ("Is training together better than alone, with dense labels everywhere?", ""),
    "fedicra": (
        "Each site has weak labels of another kind",
        "Heart: scribbles at a, points at b (inverted contrast), boxes at c (blurred). `fedicra, all layers together` "
        "trains all\nlayers in every update (`--option body_share=null`), not the output layer and the others in turn.",
    ),
    "fedmix": (
        "Dense labels at one site; boxes, image labels and none at the others",
        "Breast ultrasound: dense at BUSI, boxes at one scanner of BUS-BRA, image labels in Poland, none at another "
        "scanner.",
    ),
    "hssf": ("No labels but public ones, and another network at each site", "Polyps: the slices of Paris are public."),
    "cmc": (
        "Two modalities, few labels",
        "Heart: site a has bright blood and its misaligned, inverted twin, b inverted, c bright; three patients "
        "of each have labels.",
    ),
    "gaze": ("Fixations instead of masks", "Fixations are simulated, with the default settings of `fedfactory gaze`."),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.write_text(page(RESULTS), encoding="utf-8")


def page(folder: Path) -> str:
    """The page in Markdown, of the result files in the folder."""
    content, cost = (json.loads((folder / f"method_{name}.json").read_text()) for name in ("study", "cost"))
    lines = [HEAD]
    lengths = "; ".join(
        f"{task}: {facts['size']} px, {facts['rounds']} rounds of {facts['updates']} updates, {facts['sites']} sites"
        for task, facts in content["tasks"].items()
    )
    lines.append(f"Trained on: {', '.join(content['devices'])}. {lengths}.\n")
    if any(row["earlier"] for row in content["rows"]):
        lines.append(EARLIER)
    for question, (title, text) in QUESTIONS.items():
        rows = [row for row in content["rows"] if row["question"] == question]
        if not rows:
            continue
        lines += [f"## {title}\n", *([f"{text}\n"] if text else [])]
        cells = [
            [row["task"], row["name"] + MARK * row["earlier"], row["seeds"], number(row["dice"]),
             ", ".join(f"{site} {number(value, 2)}" for site, value in row["by_site"].items())]
            for row in sorted(rows, key=lambda row: (row["task"], -row["dice"]))
        ]  # fmt: skip
        lines += [*table(["task", "row", "seeds", "Dice", "by site"], cells), ""]
        lines += [
            f"**{advice(row)}**{MARK * row['earlier']}\n" for row in content["best"] if row["question"] == question
        ]
        found = [row for row in content["differences"] if row["question"] == question]
        lines += [
            f"* {length(row) if row['against'].endswith(HALF) else sentence(row)}{MARK * row['earlier']}"
            for row in found
        ]
        lines.append("")
    missing = [title for question, (title, _) in QUESTIONS.items() if not _asked(content, question)]
    if missing:
        lines += ["## Not measured yet\n", *(f"* {title}" for title in missing), ""]
    lines += costs(cost)
    return "\n".join(lines).rstrip() + "\n"


def costs(content: dict[str, Any]) -> list[str]:
    """The section about what a round of each method takes."""
    rows = [
        [name, row["ratio"], f"{row['bytes_sent'] / 2**20:.2f}", row["memory_mib"]]
        for name, row in content["methods"].items()
    ]
    return [
        "## What a round costs a site\n",
        "Processor time beside FedAvg's in the same run (`benchmarks/method_cost.py`), on one thread:\n"
        f"{content['updates']} updates with {content['batch_size']} slices of {content['size']} px. `hssf` sends "
        f"predictions for {content['slices']} public slices in place of weights,\nso its bytes grow with these alone. "
        "Memory is what the training adds to the process.\n",
        *table(["method", "time, FedAvg = 1", "MiB sent", "peak MiB"], rows),
        "",
    ]  # fmt: skip


def advice(row: dict[str, Any]) -> str:
    """What a hospital can take from the best row of a question and task."""
    floor, ceiling = row.get("floor"), row.get("ceiling")
    text = f"{row['task'].capitalize()}: {row['name']} was best"
    if floor:
        gain = f"{number(abs(floor['mean']))} {'above' if floor['mean'] > 0 else 'below'} {floor['against']}"
        sure = "" if floor["low"] > 0 else ", which may be chance"
        text += f", {gain}{sure}"
    if ceiling:
        text += f"; drawn masks at every site give {signed(-ceiling['mean'])}"
    return f"{text}."


def sentence(row: dict[str, Any]) -> str:
    """What a difference says."""
    interval = f"{signed(row['mean'])} ({signed(row['low'])} to {signed(row['high'])})"
    told = "is above" if row["low"] > 0 else "is below" if row["high"] < 0 else "cannot be told from"
    return f"{row['task']}: **{row['name']}** {told} **{row['against']}**: {interval}, {row['patients']} patients."


def length(row: dict[str, Any]) -> str:
    """What a row says about the length of the runs, of which it has the whole and its rival half."""
    enough = "runs are long enough" if row["mean"] <= LONG_ENOUGH else "all methods would gain from longer runs"
    return f"{row['task']}: **{row['name']}** gains {signed(row['mean'])} by twice the length, so {enough}."


def signed(value: float) -> str:
    """A difference with its sign, without a leading zero."""
    return ("+" if value > 0 else "-") + number(abs(value))


def _asked(content: dict[str, Any], question: str) -> bool:
    return any(row["question"] == question for row in content["rows"])


if __name__ == "__main__":
    main()
