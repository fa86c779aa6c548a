"""The documentation: its commands and links exist, its numbers are those of the results, its reference is complete."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import fedfactory
import pytest
import typer
import yaml
from fedfactory.adaptation.methods.registry import METHODS
from fedfactory.cli import app

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import method_page  # noqa: E402
import results_page  # noqa: E402

sys.path.pop(0)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
RESULTS = ROOT / "benchmarks" / "results"
ROOMS = ("common", "imaging", "generative", "adaptation", "node", "researcher", "demo", "commands")


def commands_of(page: Path) -> list[str]:
    """Indented lines of a page that call fedfactory, continuation lines joined, comments taken off."""
    text = re.sub(r"\\\n\s*", "", page.read_text(encoding="utf-8"))
    lines = [line.strip().split("  #")[0].strip() for line in text.splitlines() if line.startswith("    ")]
    found = [line.split("&& ")[-1].removeprefix("uv run ") for line in lines]
    return [line for line in found if line.startswith("fedfactory ") and "..." not in line]


COMMANDS = sorted({line for page in PAGES for line in commands_of(page)})


def test_the_documentation_contains_commands():
    assert len(COMMANDS) > 25 and any("--method hssf" in line for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_documented_command_is_parsed(line):
    command, words = typer.main.get_command(app), shlex.split(line)[1:]
    context = command.make_context("fedfactory", list(words), resilient_parsing=True)
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, f"no such command: {line}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context(line, list(words), parent=context)  # fails for an unknown option or a missing argument


def test_the_reference_shows_every_public_module():
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
    for room in ROOMS:
        shown = re.findall(r"^::: ([\w.]+)$", pages[room], re.M)
        paths = [path for path in (ROOT / room).rglob("*.py") if not path.name.startswith("_")]
        modules = {".".join(("fedfactory", *path.relative_to(ROOT).with_suffix("").parts)) for path in paths}
        assert len(shown) == len(set(shown))
        assert set(shown) - modules == set(), f"docs/reference/{room}.md: these modules are gone, remove them"
        assert modules - set(shown) == set(), f"docs/reference/{room}.md: add a line `::: MODULE` for each of these"


def test_the_citation_names_the_version_and_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors", "version"} <= citation.keys()
    assert citation["version"] == fedfactory.__version__
    notes = " ".join(reference["notes"] for reference in citation["references"])
    assert all(re.search(rf"\b{name}\b", notes) for name in METHODS if name != "local")
    for reference in citation["references"]:
        assert reference["type"] and reference["title"] and reference["authors"] and reference["year"] > 2000


def test_every_link_between_pages_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_method_has_its_row_of_what_leaves_a_site():
    text = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in METHODS)


def test_the_page_of_methods_is_that_of_the_study():
    page = method_page.page(RESULTS)
    assert (ROOT / "docs" / "methods-results.md").read_text(encoding="utf-8") == page


def test_the_results_page_is_that_of_the_result_files():
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == results_page.page(RESULTS)


def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


def share(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".removeprefix("0")


def claims() -> list[tuple[str, str]]:
    """Sentences and rows with numbers, written from the result files."""
    found = []
    for name, row in result("adaptation_cpu")["networks"].items():
        speed = row["volumes_per_second"]
        rate = f"{speed:.0f}" if speed > 10 else f"{speed:.2g}"
        cells = (name, row["seconds_to_target"], row["seconds"], share(row["dice"]), rate)
        found.append(("adapting.md", "| " + " | ".join(str(cell) for cell in cells) + " |"))
    rounds = result("round_overhead_10m")["variants"]
    for name in ("published", "ours"):
        row = rounds[name]
        gib = row["researcher_peak_mib"] / 1024
        text = f"{row['seconds_beside_training']:.1f} s, {row['mib_to_each_site']:.0f} MiB"
        found += [("federation.md", text), ("federation.md", f"{gib:.1f} GiB")]
    many = result("many_sites")["rounds"][-1]
    found.append(
        ("federation.md", f"{many['streaming']['mib_above_start']} MiB and {many['streaming']['seconds']:.1f} s")
    )
    last = result("persistence")["mean_last_distance"]
    assert last["persistent"] < last["forgetful"]
    trees = [row for row in result("tree_filter_cpu")["rows"] if row["side"] == 256]
    found.append(("decisions.md", f"{share(min(row['filter'] for row in trees), 2)} s instead of"))
    for row in result("private_segmentation")["table"]:
        dice = [share(row[name], 2) for name in ("dice", "lowest", "highest")]
        target = "no limit" if row["target"] is None else f"{row['target']:g}"
        found.append(("segmentation.md", f"| {target} | {row['seeds']} | {dice[0]} ({dice[1]} to {dice[2]}) |"))
    for name in ("shared_anatomy", "shared_anatomy_cardiac"):
        found += [("sharing.md", row) for row in results_page.shared_anatomy(result(name)) if row.startswith("| ")]
    content = result("cardiac_study")
    for site, methods in content["mean"].items():
        for method, row in methods.items():
            seeds = ", ".join(share(seed[site][method]["dice"], 2) for seed in content["seeds"].values())
            found.append(("adapting.md", f"{share(row['dice'])} ({seeds})"))
    return found


@pytest.mark.parametrize("page, text", claims())
def test_a_number_in_the_documentation_is_that_of_its_result(page, text):
    words = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    assert " ".join(text.split()) in words


def test_the_alarms_table_adds_up_to_the_study():
    text = (ROOT / "docs" / "sharing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (sites that failed|good sites)[^|]*\| (\d+) \| (\d+) \|$", text, re.M)
    counted = {"sites that failed": [0, 0], "good sites": [0, 0]}
    for kind, *cells in rows:
        counted[kind] = [a + int(b) for a, b in zip(counted[kind], cells, strict=True)]
    alarm = result("shared_anatomy")["alarm"]
    assert counted["sites that failed"] == [alarm["failed, alarm"], alarm["failed, silent"]]
    assert counted["good sites"] == [alarm["good, alarm"], alarm["good, silent"]]
