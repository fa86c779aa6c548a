"""The contact sheet of a segmentation: a picture and the volumes of every case, the unusual cases first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import median_abs_deviation

from ..common.html_pages import pixels, plain, table, write_page
from ..imaging.class_names import class_name
from ..imaging.overlays import CLASS_COLOURS

SHEET = "cases.html"  # beside the label maps
SIDE = 224  # pixels of the longer side of a picture
FEWEST_CASES = 3  # fewer have no median that one of them could differ from
PICKS = (np.median, np.min, np.max)  # what is shown of each class
OUTLIER = 3.5  # robust z score; Iglewicz and Hoaglin, "How to detect and handle outliers" (1993)
RULE = (
    "The robust z score of a volume is its difference from the median of all cases, divided by 1.4826 times their "
    f"median absolute deviation (MAD). Cases with a score beyond {OUTLIER} in either direction are named unusual; the "
    "cases are in the order of their largest score. Where half of the cases or more have the same volume, such as none "
    "at all, the MAD is 0, and every other volume counts as unusual. Unusual is not wrong: look at these first."
)


@dataclass(frozen=True)
class SheetCase:
    """A case on the sheet.

    Attributes:
        name: of the case.
        picture: (rows, columns, 3) uint8, with contours.
        volumes: class to the volume that was found: millilitres, of pictures the number of pixels.
    """

    name: str
    picture: np.ndarray
    volumes: Mapping[int, float]


def robust_scores(values: Sequence[float]) -> np.ndarray:
    """Differences of values from their median in robust standard deviations (1.4826 times the MAD).

    Args:
        values: (N,), finite.

    Returns: (N,); if the MAD is 0, 0 for values equal to the median and infinity for others. NaN for fewer than
        FEWEST_CASES values.
    """
    given = np.asarray(values, dtype=float)
    if len(given) < FEWEST_CASES:
        return np.full(len(given), np.nan)
    difference, spread = given - np.median(given), float(median_abs_deviation(given, scale="normal"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(difference == 0, 0.0, difference / spread)


def write_sheet(path: Path, cases: Sequence[SheetCase], names: Mapping[int, str], *, unit: str) -> None:
    """Write the page.

    Args:
        path: HTML file.
        cases: at least one, all with the same classes.
        names: class to its name, where it is known.
        unit: of the volumes: "mL", or "px" for pictures.
    """
    labels = sorted(cases[0].volumes)
    scores = np.stack([robust_scores([case.volumes[label] for case in cases]) for label in labels], axis=1)
    largest = np.nan_to_num(np.abs(scores), nan=0.0).max(axis=1)
    order = sorted(range(len(cases)), key=lambda k: (-largest[k], cases[k].name))
    unusual = int((largest > OUTLIER).sum())
    compared = len(cases) >= FEWEST_CASES
    body = [
        f"<h1>{len(cases)} case{'s' if len(cases) > 1 else ''}, {unusual} unusual</h1>",
        f"<p>{_legend(labels, names)}</p>",
        f"<p><small>{RULE if compared else 'Fewer than three cases are not compared.'}</small></p>",
        "<h2>Median of all cases</h2>",
        table(
            ["class", f"median ({unit})", "lowest", "highest"],
            [
                [
                    class_name(label, names),
                    *(_number(pick([case.volumes[label] for case in cases]), unit) for pick in PICKS),
                ]
                for label in labels
            ],
        ),
        '<h2>Cases</h2><div class="cards">',
        *(_card(cases[k], scores[k], labels, names, unit=unit) for k in order),
        "</div>",
    ]
    write_page(path, "segmented cases", body)


def _card(case: SheetCase, scores: np.ndarray, labels: Sequence[int], names: Mapping[int, str], *, unit: str) -> str:
    odd = bool((np.abs(scores) > OUTLIER).any())
    title = f"{plain(case.name)}{' <b>unusual</b>' if odd else ''}"
    rows = [
        [class_name(label, names), _number(case.volumes[label], unit), _score(score)]
        for label, score in zip(labels, scores, strict=True)
    ]
    image = pixels(case.picture, f"{case.name} with contours")
    return f'<div class="card{" odd" if odd else ""}"><p>{title}</p>{image}{table(["class", unit, "z"], rows)}</div>'


def _legend(labels: Sequence[int], names: Mapping[int, str]) -> str:
    """The colour of every class."""
    return ", ".join(
        f'<span style="color:{CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]}">&#9632;</span> '
        + plain(class_name(label, names))
        for label in labels
    )


def _number(value: float, unit: str) -> str:
    return f"{value:.0f}" if unit == "px" or value >= 100 else f"{value:.2f}"


def _score(score: float) -> str:
    return "" if np.isnan(score) else f"{score:+.1f}" if np.isfinite(score) else "unlike most"
