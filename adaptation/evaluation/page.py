"""The page of an evaluation: warnings, means with intervals, and pictures of the worst cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from skimage.measure import block_reduce

from ...common.html_pages import pixels, plain, table, write_page
from ...imaging.class_names import class_name
from ...imaging.formats.label_values import LabelValues
from ...imaging.overlays import CLASS_COLOURS, strip
from ...imaging.pictures.colour_table import Colour
from .cross_check import CrossCheck
from .label_files import is_label_picture, read_label_picture, read_labels
from .scores import Score, measure_name
from .summary import mean_over_classes, summarise

WORST = 5
LONGEST_SIDE = 512  # pixels of a label picture on the page; longer ones are reduced
RULES = (
    "Every class is averaged over its cases, and the classes are averaged then. In brackets: 95 % confidence interval, "
    "by drawing patients with replacement. A class that is absent in prediction and reference of a case is undefined "
    "there: the case is left out and counted. A class that is absent in one of the two has Dice and IoU 0; its "
    "distances are undefined and counted. The volume error is undefined without a reference volume."
)
PICTURE_RULES = (
    RULES.replace("volume error", "area error").replace("reference volume", "reference area")
    + " Distances are in pixels (px) of the pictures, whose pixels may differ in size."
)


@dataclass(frozen=True)
class EvaluationPage:
    """What the page tells.

    Attributes:
        scores: one for every case and class.
        names: class to its name.
        warnings: sentences about the cases.
        check: comparison with a second library, if there was one.
        values: class of each value in the references, if they are no class numbers.
    """

    scores: Sequence[Score]
    names: Mapping[int, str]
    warnings: Sequence[str]
    check: CrossCheck | None
    values: LabelValues | None = None
    colours: Mapping[Colour, int] | None = None

    def write(self, path: Path, *, predicted: Mapping[str, Path], reference: Mapping[str, Path]) -> None:
        """Write the page.

        Args:
            path: of the page.
            predicted: case to label map, for the pictures of the worst cases.
            reference: case to label map.
            colours: class of each colour or grey value of references that are pictures.
        """
        by_case: dict[str, list[Score]] = {}
        for score in self.scores:
            by_case.setdefault(score.case, []).append(score)
        means = {case: mean_over_classes(own, "dice") for case, own in by_case.items()}
        worst = sorted((case for case in means if np.isfinite(means[case])), key=means.__getitem__)[:WORST]
        patients = len({score.patient for score in self.scores})
        in_pixels = any(score.unit == "px" for score in self.scores)
        body = [
            f"<h1>{len(by_case)} cases of {patients} patients</h1>",
            "<h2>Warnings</h2>",
            _paragraphs(self.warnings) or "<p>none</p>",
            f"<h2>Scores</h2><p>{PICTURE_RULES if in_pixels else RULES}</p>",
            table(["measure", "class", "mean", "patients", "cases", "undefined"], self._rows()),
        ]
        if self.check is not None:
            body += ["<h2>Check</h2>", _paragraphs([self.check.summary(), *self.check.beyond])]
        body += [
            "<h2>The worst cases</h2><p>Upper row: predicted; lower row: reference.</p>",
            self._legend(),
        ]
        for case in worst:
            ours, theirs = _shown(predicted[case]), _shown(reference[case], values=self.values, colours=self.colours)
            title = f"{case}, mean Dice {means[case]:.3f}"
            body.append(f"<p>{plain(title)}<br>{pixels(strip(np.zeros(ours.shape), ours, theirs), title)}</p>")
        write_page(path, "evaluation", body)

    def _rows(self) -> list[list[str]]:
        """One row of texts for each measure and class."""
        unit = self.scores[0].unit if self.scores else "mm"
        return [
            [
                measure_name(row.measure, unit),
                class_name(row.label, self.names) if row.label else "mean of classes",
                f"{row.mean:.3f} ({row.low:.3f} to {row.high:.3f})",
                str(row.patients),
                str(row.cases),
                str(row.undefined),
            ]
            for row in summarise(self.scores)
        ]

    def _legend(self) -> str:
        """The colour of every class."""
        shown = [
            f'<span style="color:{CLASS_COLOURS[(label - 1) % len(CLASS_COLOURS)]}">&#9632;</span> '
            + plain(class_name(label, self.names))
            for label in sorted({score.label for score in self.scores})
        ]
        return f"<p>{', '.join(shown)}</p>"


def _shown(path: Path, *, values: LabelValues | None = None, colours: Mapping[Colour, int] | None = None) -> np.ndarray:
    """A label map (X, Y, Z) as `strip` takes it: axes rise to the right and upwards, slices last.

    A large picture is reduced; every block of pixels shows its highest class, so that small structures stay visible.
    """
    if not is_label_picture(path):
        return read_labels(path, values=values).turned("axial").data
    labels = read_label_picture(path, colours)
    step = -(-max(labels.shape) // LONGEST_SIDE)
    return np.flipud(block_reduce(labels, (step, step), np.max)).T[..., None]


def _paragraphs(texts: Sequence[str]) -> str:
    return "".join(f"<p>{plain(text)}</p>" for text in texts)
