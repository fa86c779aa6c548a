"""The page of an evaluation: warnings, means with intervals, and pictures of the worst cases."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...common.html_pages import pixels, table, write_page
from ...imaging.overlays import strip
from ...imaging.volume_files import read_volume
from .scores import MEASURES, Score
from .summary import mean_over_classes, summarise

WORST = 5
RULES = (
    "Every class is averaged over its cases, and the classes are averaged then. In brackets: 95 % confidence interval, "
    "by drawing patients with replacement. A class that is absent in prediction and reference of a case is undefined "
    "there: the case is left out and counted. A class that is absent in one of the two has Dice 0; its distances are "
    "undefined and counted. The volume error is undefined without a reference volume."
)


def write_evaluation_page(
    path: Path,
    scores: Sequence[Score],
    warnings: Sequence[str],
    *,
    predicted: Mapping[str, Path],
    reference: Mapping[str, Path],
) -> None:
    """Write the page.

    Args:
        path: of the page.
        scores: one for every case and class.
        warnings: sentences about the cases.
        predicted: case to label map.
        reference: case to label map.
    """
    by_case: dict[str, list[Score]] = {}
    for score in scores:
        by_case.setdefault(score.case, []).append(score)
    means = {case: mean_over_classes(own, "dice") for case, own in by_case.items()}
    worst = sorted((case for case in means if np.isfinite(means[case])), key=means.__getitem__)[:WORST]
    patients = len({score.patient for score in scores})
    body = [
        f"<h1>{len(by_case)} cases of {patients} patients</h1>",
        "<h2>Warnings</h2>",
        "".join(f"<p>{html.escape(text)}</p>" for text in warnings) or "<p>none</p>",
        f"<h2>Scores</h2><p>{RULES}</p>",
        table(["measure", "class", "mean", "patients", "cases", "undefined"], _rows(scores)),
        "<h2>The worst cases</h2><p>Upper row: predicted; lower row: reference.</p>",
    ]
    for case in worst:
        ours, theirs = (read_volume(files[case], integer=True).turned("axial").data for files in (predicted, reference))
        title = f"{case}, mean Dice {means[case]:.3f}"
        body.append(f"<p>{html.escape(title)}<br>{pixels(strip(np.zeros(ours.shape), ours, theirs), title)}</p>")
    write_page(path, "evaluation", body)


def _rows(scores: Sequence[Score]) -> list[list[str]]:
    """One row of texts for each measure and class."""
    return [
        [
            MEASURES[row.measure],
            f"class {row.label}" if row.label else "mean of classes",
            f"{row.mean:.3f} ({row.low:.3f} to {row.high:.3f})",
            str(row.patients),
            str(row.cases),
            str(row.undefined),
        ]
        for row in summarise(scores)
    ]
