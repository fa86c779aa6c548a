"""A site's ledger: any change in it is found, interruptions are survived, and quotas hold across restarts."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import stat
import time
from datetime import datetime, timedelta, timezone
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from connections import make_component
from fedfactory.cli import main
from fedfactory.errors import ConfigError, StoreError
from fedfactory.node.connection.component import NODE
from fedfactory.node.ledger import ledger as ledger_module
from fedfactory.node.ledger.ledger import Ledger
from fedfactory.node.ledger.ledger_check import LedgerCheck
from fedfactory.node.ledger.ledger_entry import GENESIS, MAX_LINE, Entry
from fedfactory.node.ledger.ledger_page import MAX_ROWS, ledger_page
from hypothesis import given, settings
from hypothesis import strategies as st

HOSTILE = "R\x1b[2J\u202e\n</td><script>alert(1)</script>[bold]"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def filled(root: Path, count: int = 6) -> Ledger:
    ledger = Ledger(root)
    for number in range(count):
        ledger.append(
            "round", researcher="R", experiment=f"e{number % 2}", numbers={"loss": 0.5 / (number + 1)}, bytes=9
        )
    return ledger


def restored(root: Path, content: bytes) -> Ledger:
    """A node's ledger with other content and the head that it had."""
    ledger = Ledger(root)
    ledger.path.write_bytes(content)
    return ledger


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Ledger:
    """A ledger of six entries; tests put its content back."""
    return filled(tmp_path_factory.mktemp("node"))


@pytest.fixture(scope="module")
def content(whole) -> bytes:
    return whole.path.read_bytes()


def test_entries_come_back_as_they_were_written_and_only_the_owner_may_read_them(tmp_path):
    mask = os.umask(0)
    try:
        ledger = Ledger(tmp_path)
        first = ledger.append("round", researcher="R", numbers={"dice": 0.812}, withheld=[], epsilon=None)
        second = ledger.append("refused", reasons=["too few patients"])
    finally:
        os.umask(mask)
    assert list(Ledger(tmp_path).entries()) == [first, second]
    assert (first.number, first.previous, second.number, second.previous) == (1, GENESIS, 2, first.sha256)
    assert first.facts == {"researcher": "R", "numbers": {"dice": 0.812}, "withheld": [], "epsilon": None}
    assert abs(datetime.now(timezone.utc) - first.moment) < timedelta(minutes=1)
    assert ledger.verify() == LedgerCheck(entries=2, problem=None, line=None, last=second.sha256)
    for path in (ledger.path, ledger.head):
        assert stat.filemode(path.stat().st_mode) == "-rw-------"


def test_the_hash_can_be_checked_by_another_program(content):
    import hashlib

    previous = GENESIS
    for line in content.splitlines():
        entry = json.loads(line)
        digest = entry.pop("sha256")
        assert entry["previous"] == previous
        text = json.dumps(entry, sort_keys=True, separators=(",", ":"))
        assert hashlib.sha256(text.encode()).hexdigest() == digest
        previous = digest


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_changed_byte_is_found_with_its_line(whole, content, data):
    place = data.draw(st.integers(0, len(content) - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != content[place]))
    check = restored(whole.path.parents[1], content[:place] + bytes([byte]) + content[place + 1 :]).verify()
    assert check.problem is not None
    assert check.line == content[:place].count(b"\n") + 1


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_line_that_is_removed_moved_or_repeated_is_found(whole, content, data):
    lines = content.splitlines(keepends=True)
    one, other = data.draw(st.lists(st.integers(0, len(lines) - 1), min_size=2, max_size=2, unique=True))
    kind = data.draw(st.sampled_from(["remove", "swap", "repeat", "cut", "empty"]))
    if kind == "remove":
        del lines[one]
    elif kind == "swap":
        lines[one], lines[other] = lines[other], lines[one]
    elif kind == "repeat":
        lines.insert(other, lines[one])
    elif kind == "cut":
        del lines[one:]
    else:
        lines.insert(one, b"\n")
    assert restored(whole.path.parents[1], b"".join(lines)).verify().problem is not None


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_bytes_that_are_cut_out_or_put_in_are_found(whole, content, data):
    place = data.draw(st.integers(0, len(content)))
    length = data.draw(st.integers(1, 600))
    added = data.draw(st.binary(max_size=5))
    changed = content[:place] + added + content[place + length :]
    if changed == content:
        return
    check = restored(whole.path.parents[1], changed).verify()
    # Behind the last entry, a piece without an end is what an interrupted write leaves: named, and no problem.
    torn = changed.startswith(content) and b"\n" not in changed[len(content) :]
    assert (check.problem is None) == torn == bool(check.notes)


def test_a_changed_or_missing_head_and_a_missing_ledger_are_found(tmp_path):
    ledger = filled(tmp_path, 3)
    kept = ledger.head.read_bytes()
    for place in range(len(kept)):
        ledger.head.write_bytes(kept[:place] + bytes([kept[place] ^ 1]) + kept[place + 1 :])
        assert ledger.verify().problem
    ledger.head.unlink()
    assert "names another entry 0" in ledger.verify().problem
    ledger.head.write_bytes(kept)
    assert ledger.verify().problem is None
    ledger.path.unlink()
    assert "the end is missing" in ledger.verify().problem and ledger.exists()


@pytest.mark.parametrize("damage", ["cut", "head", "changed", "repeated"])
def test_the_next_entry_does_not_hide_a_damage(tmp_path, damage):
    ledger = filled(tmp_path, 4)
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    if damage == "cut":
        ledger.path.write_bytes(b"".join(lines[:2]))
    elif damage == "head":
        ledger.head.unlink()
    elif damage == "changed":
        ledger.path.write_bytes(b"".join(lines[:3]) + lines[3].replace(b'"bytes":9', b'"bytes":1'))
    else:
        ledger.path.write_bytes(b"".join([*lines, lines[1]]))
    before = ledger.verify()
    ledger.append("round")
    ledger.append("round")
    after = ledger.verify()
    assert before.problem and after.problem
    assert list(ledger.entries())[-1].event == "round"  # the record goes on all the same


def test_a_kill_between_the_two_writes_is_accepted_and_said(tmp_path):
    ledger = filled(tmp_path, 3)
    head = ledger.head.read_bytes()
    ledger.append("round")
    ledger.head.write_bytes(head)
    check = ledger.verify()
    assert check.problem is None and check.entries == 4 and "one entry behind" in check.notes[0]
    ledger.append("round")
    assert ledger.verify() == LedgerCheck(entries=5, problem=None, line=None, last=ledger.verify().last)
    first = Ledger(tmp_path / "other")
    first.append("round")
    first.head.unlink()  # killed after the very first entry
    assert first.verify().problem is None and first.append("round").number == 2


@pytest.mark.parametrize("torn", [b"{", b'{"event":"round","facts":{"researcher":"R"', b"\0" * 4096, b"\xff\r\x1b"])
def test_after_a_torn_line_the_chain_goes_on_and_an_entry_says_so(tmp_path, torn):
    ledger = filled(tmp_path, 3)
    with ledger.path.open("ab") as file:
        file.write(torn)
    check = ledger.verify()
    assert check.problem is None and check.entries == 3 and f"torn line of {len(torn)} bytes" in check.notes[0]
    entry = ledger.append("round")
    mended = list(ledger.entries())[-2]
    assert (mended.event, mended.number, mended.facts["after"], mended.facts["bytes"]) == ("mended", 4, 3, len(torn))
    assert (entry.number, entry.previous) == (5, mended.sha256)
    check = ledger.verify()
    assert check.problem is None and check.entries == 5 and "entry 4 names it" in check.notes[0]
    # What was torn cannot be changed afterwards, nor used to hide a line.
    content = ledger.path.read_bytes()
    ledger.path.write_bytes(content.replace(torn + b"\n", b"!" + torn[1:] + b"\n"))
    assert ledger.verify().line == 4


def test_half_an_acknowledged_entry_is_a_damage_and_no_torn_line(tmp_path):
    ledger = filled(tmp_path, 3)
    ledger.path.write_bytes(ledger.path.read_bytes()[:-40])
    assert "entry 3 is damaged" in ledger.verify().problem
    ledger.append("round")
    assert ledger.verify().line == 3


def append_many(root: Path, name: str, count: int) -> None:
    ledger = Ledger(root)
    for number in range(count):
        ledger.append("round", researcher=name, samples=number, text="x" * (number % 7) * 1500)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    names = [f"process {number}" for number in range(4)]
    context = multiprocessing.get_context("fork")
    running = [context.Process(target=append_many, args=(tmp_path, name, 40)) for name in names]
    for process in running:
        process.start()
    for process in running:
        process.join()
    assert [process.exitcode for process in running] == [0] * 4
    ledger = Ledger(tmp_path)
    assert ledger.verify().problem is None
    entries = list(ledger.entries())
    assert [entry.number for entry in entries] == list(range(1, 161))
    for name in names:
        assert [entry.facts["samples"] for entry in entries if entry.facts["researcher"] == name] == list(range(40))
        assert ledger.count("round", START, researcher=name) == 40


def test_a_kill_at_any_moment_loses_no_entry_that_was_acknowledged(tmp_path):
    """20 kills, half of them among writes of several pages."""
    ledger, rng, acknowledged = Ledger(tmp_path), random.Random(0), 0
    child = multiprocessing.get_context("fork")
    for kill in range(20):
        reader, writer = os.pipe()
        process = child.Process(target=_append_until_killed, args=(tmp_path, writer, 1 if kill % 2 else 20))
        process.start()
        os.close(writer)
        first = os.read(reader, 8)  # it has begun
        time.sleep(rng.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        said = first
        while part := os.read(reader, 1 << 16):
            said += part
        os.close(reader)
        acknowledged += len(said) // 8
        check = ledger.verify()
        assert check.problem is None, check
        rounds = ledger.count("round", START)
        assert acknowledged <= rounds <= acknowledged + 1
        acknowledged = rounds
    before = ledger.verify().entries
    assert ledger.append("round").number in (before + 1, before + 2)
    assert ledger.verify().problem is None


def _append_until_killed(root: Path, acknowledge: int, parts: int) -> None:
    ledger = Ledger(root)
    while True:
        ledger.append("round", text=["x" * 1000] * parts)
        os.write(acknowledge, b"acknowl.")


def test_a_full_disk_leaves_no_half_entry(tmp_path, monkeypatch):
    ledger = filled(tmp_path, 2)
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:30]))
    with pytest.raises(StoreError, match="disk is full"):
        ledger.append("round")

    def refuse(handle, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", refuse)
    with pytest.raises(StoreError, match="No space left"):
        ledger.append("round")
    monkeypatch.undo()
    assert ledger.append("round").number == 3
    assert ledger.verify() == LedgerCheck(entries=3, problem=None, line=None, last=ledger.verify().last)


def test_an_entry_is_on_the_disk_before_it_counts_and_a_new_ledger_with_its_names(tmp_path, synced):
    ledger = Ledger(tmp_path)
    ledger.append("round")
    own = [ledger.path.stat().st_ino, ledger.head.stat().st_ino]
    assert synced == [*own, ledger.path.parent.stat().st_ino]
    ledger.append("round")
    assert synced[3:] == own


def test_the_ledger_is_not_written_through_a_link(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.path.parent.mkdir()
    (tmp_path / "elsewhere").write_text("")
    ledger.path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        ledger.append("round")
    assert (tmp_path / "elsewhere").read_text() == ""


def test_texts_and_numbers_of_a_researcher_are_written_harmlessly(tmp_path):
    ledger = Ledger(tmp_path)
    nested: list = []
    for _ in range(2000):
        nested = [nested]
    entry = ledger.append(
        "round",
        researcher=HOSTILE,
        experiment="\ud800" + "e" * 5000,
        numbers={
            "a": math.nan,
            "b": -math.inf,
            "c": 10**5000,
            "d": np.float32(0.5),
            "e": np.int64(7),
            "f": np.bool_(True),
        },
        nested=nested,
        array=np.zeros((3, 4)),
        many=list(range(30_000)),
        twice={"x" * 2000: 1, "x" * 1999 + "y": 2},
        tensors=[("w", (3, 4), "float32", 48)],
    )
    facts = entry.facts
    line = ledger.path.read_bytes()
    assert line.isascii() and line.count(b"\n") == 1 and b"\x1b" not in line
    assert facts["researcher"].startswith("R\\x1b[2J\\u202e <") and facts["experiment"].endswith(
        "(5001 characters in all)"
    )
    assert facts["numbers"] == {
        "a": "nan",
        "b": "-inf",
        "c": "a whole number of 16610 bits",
        "d": 0.5,
        "e": 7,
        "f": True,
    }
    assert facts["array"] == "an array of shape (3, 4)" and "nested too deeply" in json.dumps(facts["nested"])
    assert facts["many"][-1] == "(left out: 10000 more)" and sorted(facts["twice"].values()) == [1, 2]
    assert facts["tensors"] == [["w", [3, 4], "float32", 48]]
    assert list(ledger.entries()) == [entry]
    ledger.append("round", small=1, huge=["x" * 1000] * 6000)
    huge = list(ledger.entries())[-1]
    assert huge.facts["small"] == 1 and "left out: 60" in huge.facts["huge"] and "SHA-256" in huge.facts["huge"]
    assert ledger.path.stat().st_size < MAX_LINE
    assert ledger.verify().problem is None


def test_quotas_count_what_all_processes_wrote_and_survive_a_restart(tmp_path, monkeypatch):
    ledger, now = Ledger(tmp_path), datetime.now(timezone.utc)
    yesterday = now - timedelta(days=1)
    for number in range(5):
        ledger.append("round", experiment="a" if number < 2 else "b", samples=3)
    assert ledger.count("round", yesterday) == 5 and ledger.count("round", yesterday, experiment="b") == 3
    assert Ledger(tmp_path).count("round", yesterday, experiment="a", samples=3) == 2
    Ledger(tmp_path).append("round", experiment="b")  # by another process
    ledger.append("scoring", experiment="b")
    assert ledger.count("round", yesterday, experiment="b") == 4 and ledger.count("scoring", yesterday) == 1
    assert ledger.count("round", yesterday, experiment="c") == ledger.count("round", yesterday, domain="pd") == 0
    assert ledger.count("round", now + timedelta(hours=1)) == 0
    with pytest.raises(ConfigError, match="time zone"):
        ledger.count("round", datetime.now())
    assert Ledger(tmp_path / "none").count("round", yesterday) == 0


def at(moment: datetime):
    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return moment

    return Clock


def test_a_day_begins_where_it_is_asked_for_even_if_the_clock_was_put_back(tmp_path, monkeypatch):
    from fedfactory.node.ledger import ledger_entry

    ledger = Ledger(tmp_path)
    for hour in (0, 30, 10, 20):
        monkeypatch.setattr(ledger_entry, "datetime", at(START + timedelta(hours=hour)))
        ledger.append("round")
        assert ledger.count("round", START) > 0
    monkeypatch.undo()
    for restarted in (ledger, Ledger(tmp_path)):
        counts = [restarted.count("round", START + timedelta(hours=hour)) for hour in (0, 5, 10, 15, 25, 31)]
        assert counts == [4, 3, 3, 2, 1, 0]


def test_a_call_for_a_quota_does_not_read_the_ledger_again(tmp_path, monkeypatch):
    ledger = filled(tmp_path, 30)
    assert ledger.count("round", START, experiment="e1") == 15
    read = []
    original = ledger_module.read_entry
    monkeypatch.setattr(ledger_module, "read_entry", lambda line: read.append(line) or original(line))
    ledger.count("round", START, experiment="e1")
    assert read == []
    ledger.append("round", experiment="e1")
    read.clear()
    assert ledger.count("round", START, experiment="e1") == 16
    assert len(read) == 1


def test_appending_reads_only_the_end(tmp_path, monkeypatch):
    ledger = filled(tmp_path, 3)
    long = b"#" * 99 + b"\n"
    ledger.path.write_bytes(long * 50_000 + ledger.path.read_bytes())  # 5 MB that no append may look at
    read = []
    original = os.pread
    monkeypatch.setattr(os, "pread", lambda handle, size, start: read.append(size) or original(handle, size, start))
    ledger.append("round")
    assert sum(read) <= 1 << 16


class Page(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, parts: list[str]) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed("".join(parts))

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)

    def handle_data(self, data):
        self.text += data


def page_of(ledger: Ledger) -> str:
    return "".join(ledger_page(ledger.entries(), ledger.verify(), site="hospital-c", made=START))


def test_the_page_says_what_left_and_what_was_refused(tmp_path):
    ledger = Ledger(tmp_path)
    assert "Nothing has left" in page_of(ledger)
    ledger.append("policy", policy_sha256="f" * 64)
    ledger.append("approved", plan="FedAvgPlan", plan_sha256="a" * 64, package_sha256="b" * 64)
    for dice in (0.25, 0.75):
        ledger.append(
            "round", researcher="R", experiment="E1", domain="pd", plan="FedAvgPlan", bytes=1_500_000,
            tensors=[["w", [3], "float32", 12]], numbers={"dice": dice}, withheld=["hd95"],
            epsilon=dice, epsilon_budget=8,
        )  # fmt: skip
    ledger.append("refused", researcher="R", experiment="E2", plan="FedAvgPlan", reasons=["updates is 1", "batch is 1"])
    page = Page([page_of(ledger)])
    words = " ".join(page.text.split())
    assert "took part in 2 training rounds and 0 scorings for 1 experiment" in words
    assert "3.0 MB of network weights and 2 single numbers left" in words and "Refused: 1 request, for which" in words
    assert "0.75; the limit is 8" in words and "updates is 1; batch is 1" in words and "The record is whole" in words
    assert "0.25" in words and "hd95" in words and "a" * 64 in words and ledger.verify().last in words
    assert page.tags <= {"h1", "h2", "p", "ul", "li", "b", "code", "div", "table", "tr", "th", "td"}
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"bytes":1500000', b'"bytes":15', 1))
    assert "The record is not whole" in page_of(ledger) and "line 3" in page_of(ledger)


def test_a_page_of_10_000_rounds_and_of_hostile_names_stays_small(tmp_path):
    facts = {
        "researcher": HOSTILE, "plan": "&" * 1000, "domain": "<" * 1000, "reasons": ["'" * 1000] * 20, "bytes": 10**6,
        "tensors": [[f"layer{number}.weight", [64, 64, 3, 3], "float32", 147456] for number in range(20)],
        "withheld": "not a list", "epsilon": "not a number",
    }  # fmt: skip

    def entries():
        for number in range(10_000):
            yield Entry(
                number=number + 1,
                time=(START + timedelta(minutes=number)).isoformat(timespec="milliseconds"),
                event="refused" if number % 4 == 0 else "round",
                facts={**facts, "experiment": f"{number}{'&' * 900}", "numbers": {f"n{number}{'&' * 900}": 0.5}},
                previous=GENESIS,
                sha256=GENESIS,
            )

    check = LedgerCheck(entries=10_000, problem=None, line=None)
    page = "".join(ledger_page(entries(), check, site=HOSTILE, made=START))
    assert len(page.encode()) < 2_000_000
    assert f"{10_000 - MAX_ROWS} earlier rows" in page and "script" not in Page([page]).tags
    assert "\x1b" not in page and "\u202e" not in page and "7500 training rounds" in page


@pytest.mark.parametrize("odd", [None, 3, "text", [], [[]], {"": None}, [None, {"a": []}], -1e300, True])
def test_the_page_and_the_table_take_facts_of_any_type(tmp_path, odd, capsys):
    ledger = Ledger(tmp_path)
    names = (
        "researcher",
        "experiment",
        "plan",
        "reasons",
        "numbers",
        "tensors",
        "withheld",
        "bytes",
        "epsilon",
        "request",
    )
    for event in ("round", "scoring", "refused", "answered", "approved", "policy", "other"):
        ledger.append(event, **{name: odd for name in names})
    assert "The record is whole" in page_of(ledger)
    assert run("site", "ledger", tmp_path) == 0


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(word) for word in words])
    return end.value.code or 0


def test_the_command_shows_the_newest_entries_and_checks_all(tmp_path, capsys):
    ledger = filled(tmp_path, 25)
    assert run("site", "ledger", tmp_path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [str(number) for number in range(6, 26)]
    assert lines[-1].startswith("whole: 25 entries")
    assert run("site", "ledger", tmp_path, "--last", 0) == 0
    assert len(capsys.readouterr().out.splitlines()) == 27
    assert run("site", "ledger", tmp_path, "--json") == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [Entry(**entry) for entry in printed] == list(ledger.entries())
    ledger.path.write_bytes(ledger.path.read_bytes().replace(b'"e1"', b'"e0"', 1))
    for more in ((), ("--json",)):
        assert run("site", "ledger", tmp_path, *more) == 1
        shown = capsys.readouterr().err.splitlines()
        assert len(shown) == 1 and "line 2: the ledger is not whole: entry 2 is damaged" in shown[0]


def test_a_hostile_text_commands_neither_terminal_nor_page(tmp_path, capsys):
    ledger = Ledger(tmp_path)
    ledger.append(
        "round", researcher=HOSTILE, experiment=HOSTILE, plan=HOSTILE, numbers={HOSTILE: 1}, withheld=[HOSTILE]
    )
    ledger.append("refused", researcher=HOSTILE, reasons=[HOSTILE])
    assert run("site", "ledger", tmp_path, "--html", tmp_path / "page.html") == 0
    out = capsys.readouterr().out
    assert all(sign.isprintable() or sign == "\n" for sign in out) and "[bold]" in out
    page = (tmp_path / "page.html").read_text()
    assert all(sign.isprintable() or sign == "\n" for sign in page) and "script" not in Page([page]).tags
    assert stat.filemode((tmp_path / "page.html").stat().st_mode) == "-rw-------"


def test_a_node_without_a_ledger_and_a_folder_that_is_no_node(tmp_path, capsys):
    make_component(tmp_path / "node", NODE, 50051)
    assert run("site", "ledger", tmp_path / "node") == 0
    assert "nothing left it" in capsys.readouterr().err
    assert not (tmp_path / "node" / "var" / "ledger.jsonl").exists()
    assert run("site", "ledger", tmp_path / "node", "--html", tmp_path / "page.html") == 0
    assert "What left this hospital: hospital-a" in (tmp_path / "page.html").read_text()
    assert run("site", "ledger", tmp_path) == 2
