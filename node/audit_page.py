"""The page of an audit, with real slices of patients on it: for the site's own eyes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..common.html_pages import new_figure, picture, plain
from .audit_result import AuditResult, AuditSource

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def audit_page(result: AuditResult, source: AuditSource) -> list[str]:
    """Parts of the page's body, as HTML."""
    rows = "".join(
        f"<tr><td>{plain(group)}</td><td>{plain(name.replace('_', ' '))}</td><td>{_text(value)}</td></tr>"
        for group, values in result.numbers().items()
        if isinstance(values, dict)
        for name, value in values.items()
    )
    findings = "".join(f"<li>{plain(text)}</li>" for text in result.findings)
    return [
        f"<h1>Audit of synthetic slices of {plain(source.domain)}</h1>",
        '<p class="note">This page shows real slices of patients: it stays at the site. audit.json holds numbers only.'
        "</p>",
        f"<p>{source.volumes} synthetic subjects, seed {source.seed}; {result.slices_each} real slices on each side. "
        "Intervals are 95 %, by bootstrap over subjects or patients.</p>",
        f"<h2>Findings</h2><ul>{findings}</ul>" if findings else "<h2>Findings</h2><p>None.</p>",
        f"<h2>Numbers</h2><table><tr><th></th><th></th><th>value</th></tr>{rows}</table>",
        f"<h2>The {len(result.pairs)} closest pairs</h2><p>Upper row: synthetic. Lower row: the nearest slice that "
        "was trained on. A copy is hard to distinguish from it.</p>",
        picture(lambda: _draw_pairs(result.pairs), "closest synthetic and real slices"),
    ]


def _text(value: object) -> str:
    """A number, a text or a table of them as HTML."""
    if isinstance(value, dict):
        return ", ".join(f"{plain(str(k).replace('_', ' '))}: {_text(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}"
    return plain(str(value))


def _draw_pairs(pairs: np.ndarray) -> Figure:
    """A row of synthetic slices over a row of real ones; pairs is (n, 2, S, S, 3) in [0, 1]."""
    figure, axes = new_figure(2, len(pairs), size=(1.3 * len(pairs), 2.8))
    for column, pair in enumerate(pairs):
        for row in range(2):
            axes[row, column].imshow(pair[row])
            axes[row, column].set(xticks=[], yticks=[])
    return figure
