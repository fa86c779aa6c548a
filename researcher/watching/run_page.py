"""The page of a run: one HTML text without references to other files or places, for a browser or for the record."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ... import __version__
from ...common.files import atomic_file
from ...errors import one_line
from .run_facts import RunFacts, gather

WEB = Path(__file__).parent / "web"  # templates, style, script, and uPlot, which draws the charts
STYLES, SCRIPTS = ("uPlot.min.css", "page.css"), ("uPlot.iife.min.js", "page.js")
LICENCE = "uPlot-LICENSE.txt"
PAGE, LIVE = "page.html.jinja", "live.html.jinja"
REPORT = "report.html"  # in the folder of a run
REFRESH = 2.0  # seconds between two looks at a run that is watched
MOST_PREVIEWS = 12  # in a file, where each takes its size; a page that is served has all


def served_page(facts: RunFacts, *, whole: bool = True) -> str:
    """The page for a browser that asks for news every REFRESH seconds; previews are at `previews/ROUND.png` beside it.

    Args:
        facts: what is known of the run.
        whole: False leaves out style and scripts: the parts that change.
    """
    previews = {number: f"previews/{number}.png" for number in facts.previews}
    return _render(PAGE if whole else LIVE, facts, previews, refresh=REFRESH)


def write_report(experiment: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run as one file that holds all it shows.

    Args:
        experiment: folder of the run.
        out: HTML file to write; None: `report.html` in that folder.

    Returns: the file.
    Raises: UsageError if there is no run, CheckpointError if its file is damaged.
    """
    facts, path = gather(experiment), Path(out) if out is not None else Path(experiment) / REPORT
    numbers = list(facts.previews)
    step = max(1, -(-len(numbers) // MOST_PREVIEWS))
    chosen = sorted(numbers[::-step])  # the newest is always among them
    previews = {number: _embedded(facts.previews[number]) for number in chosen}
    with atomic_file(path) as temporary:
        temporary.write_text(_render(PAGE, facts, previews), encoding="utf-8")
    return path


@cache
def policy(*, live: bool) -> str:
    """The Content-Security-Policy of a page: its own script and style by their SHA-256, and nothing from elsewhere.

    Args:
        live: whether previews and news come from the page's own server.
    """
    style, script = (f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in _own())
    own, asks = ("'self' data:", "connect-src 'self'; ") if live else ("data:", "")
    return (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src {own}; {asks}"
        "base-uri 'none'; form-action 'none'"
    )


def _render(template: str, facts: RunFacts, previews: Mapping[int, str], *, refresh: float | None = None) -> str:
    """The page, or its parts that change.

    Args:
        template: name of the template.
        facts: what is known of the run.
        previews: number of a round, rising, to the address of the round's picture.
        refresh: seconds between two looks; None for a file.
    """
    now = datetime.now(timezone.utc)
    seconds = max(0, round(now.timestamp() - facts.changed))
    style, script = _own()
    return (
        _environment()
        .get_template(template)
        .render(
            facts=facts,
            # Lists: an object of JSON has no order, and a browser puts names that are numbers first.
            charts=[
                {"title": chart.title, "rounds": chart.rounds, "series": [list(pair) for pair in chart.series.items()]}
                for chart in facts.charts
            ],
            previews=previews,
            refresh=refresh,
            left_out=len(facts.previews) - len(previews),
            ago=f"{seconds} s" if seconds < 120 else f"{seconds // 60} min",
            now=now.strftime("%Y-%m-%d %H:%M UTC"),
            version=__version__,
            policy=policy(live=refresh is not None),
            style=Markup(style),
            script=Markup(script),
            licence=(WEB / LICENCE).read_text(encoding="utf-8"),
        )
    )


@cache
def _own() -> tuple[str, str]:
    """Style and script of the page, files of this package."""
    style, script = (
        "\n".join((WEB / name).read_text(encoding="utf-8") for name in names) for names in (STYLES, SCRIPTS)
    )
    return style, script


@cache
def _environment() -> Environment:
    """Escapes every text; those in one line also lose signs that cannot be shown."""

    def finalize(value: object) -> object:
        return "\n".join(map(one_line, value.split("\n"))) if type(value) is str else value

    return Environment(
        loader=FileSystemLoader(WEB), autoescape=True, undefined=StrictUndefined, finalize=finalize, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip


def _embedded(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
