"""Texts of unknown origin on the terminal, in logs and on pages."""

from __future__ import annotations

import os

import pytest
from fedfactory.commands.terminal import PlainConsole
from fedfactory.common.fault_log import log_fault
from fedfactory.common.html_pages import table
from fedfactory.errors import plain_lines
from rich.table import Table
from rich.text import Text

EVIL = "a\x1b[31m[bold]b[/bold]\u202e:smile:\x07\x9b2J"


def test_lines_stay_lines_and_other_signs_become_escapes():
    assert plain_lines("a\nb\x1b[2J\u2066\n") == "a\nb\\x1b[2J\\u2066\n"


@pytest.mark.parametrize("kind", ["text", "cell", "heading", "rule", "styled", "lines"])
def test_nothing_that_is_printed_commands_the_terminal(kind, capsys):
    shown = Table("x" if kind != "heading" else EVIL)
    shown.add_row(EVIL)
    console = PlainConsole()
    what = {"text": EVIL, "styled": Text(EVIL, style="bold"), "lines": f"{EVIL}\n{EVIL}"}.get(kind, shown)
    console.rule(EVIL) if kind == "rule" else console.print(what)
    out = capsys.readouterr().out
    assert not any(sign in out for sign in "\x1b\u202e\x07\x9b")
    assert "[bold]b" in out and ":smile:" in out and "\\x1b[31m" in out
    assert out.count("\n") == {"text": 1, "styled": 1, "lines": 2, "rule": 1}.get(kind, out.count("\n"))


def test_a_page_and_a_log_show_such_signs_as_escapes(tmp_path, monkeypatch):
    assert table([EVIL], [[f"<b>{EVIL}"]]).count("\\x1b[31m[bold]b[/bold]\\u202e") == 2
    monkeypatch.setitem(os.environ, "XDG_STATE_HOME", str(tmp_path))
    text = log_fault(ValueError(EVIL), EVIL).read_text()
    assert "\x1b" not in text and "\u202e" not in text and text.count("\\x1b[31m") >= 2
    assert text.count("\n") >= 2
