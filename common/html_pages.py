"""Self-contained HTML pages: one style, tables, and pictures inside the page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from ..errors import one_line
from .files import atomic_file

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .3rem .8rem; border-bottom: 1px solid #ccc }
td { text-align: right } td:first-child, th:first-child { text-align: left }
img { max-width: 100%; min-width: 60% }
.note { background: #fff6d8; padding: .6rem 1rem; border-left: 4px solid #d9a400 }
.texts td, .texts th { text-align: left; vertical-align: top; overflow-wrap: anywhere }
small { color: #666 }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem }
.card { border: 1px solid #ccc; padding: .6rem; overflow-wrap: anywhere } .odd { border: 3px solid #d55e00 }
.card p { margin: 0 0 .4rem } .card table { margin: .4rem 0; font-size: .85rem }
.card td, .card th { padding: .1rem .4rem }
@media print { body { max-width: none; margin: 0 } tr { break-inside: avoid } h2 { break-after: avoid } }
"""


def write_page(path: Path, title: str, body: Iterable[str]) -> None:
    """Write a page atomically.

    Args:
        path: the file.
        title: plain text, which is escaped.
        body: parts of the page in HTML.
    """
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{plain(title)}</title>'
        f"<style>{STYLE}</style></head><body>{''.join(body)}</body></html>"
    )
    with atomic_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def plain(text: str) -> str:
    """A text of unknown origin for a page: escaped, and with escapes for signs that cannot be shown."""
    return html.escape(one_line(text))


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table of plain texts, which are escaped."""
    lines = [f"<tr>{''.join(f'<th>{plain(cell)}</th>' for cell in head)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{plain(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(lines)}</table>"


def new_figure(rows: int, columns: int, *, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches (width, height) and its axes (rows, columns), without a window system.

    Not by `pyplot`, whose import takes as long as the drawing, and which holds on to every figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size)
    return figure, figure.subplots(rows, columns, squeeze=False)


def picture(draw: Callable[[], Figure], description: str, *, trim: bool = True) -> str:
    """An HTML image of a figure.

    Args:
        draw: returns the figure.
        description: its alternative text.
        trim: cut the margins to what is drawn, for which it is drawn twice.
    """
    figure, buffer = draw(), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight" if trim else None)
    return _image(buffer.getvalue(), description)


def pixels(values: np.ndarray, description: str) -> str:
    """An HTML image of an array (H, W, 3) uint8; `description` is its alternative text."""
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, format="png", compress_level=1)
    return _image(buffer.getvalue(), description)


def _image(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{plain(description)}" src="data:image/png;base64,{data}">'
