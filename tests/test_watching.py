"""The page of a run: what it shows, to whom it is served, what it must not do with what others sent."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPConnection
from itertools import combinations
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from fedfactory.cli import main
from fedfactory.errors import CheckpointError, UsageError
from fedfactory.generative.config import FactoryConfig
from fedfactory.generative.factory_facts import SharedAnatomy
from fedfactory.imaging.pictures.decoding import write_picture
from fedfactory.researcher.node_selection import Federation
from fedfactory.researcher.round_records import ReceivedUpdate, RoundEvent, add_answers
from fedfactory.researcher.run_state import RESULTS, RunState, Stage
from fedfactory.researcher.segmentation import SegmentationResult
from fedfactory.researcher.segmenting.run_progress import RunProgress
from fedfactory.researcher.watching.run_facts import Missed, gather, missed_rounds
from fedfactory.researcher.watching.run_page import MOST_PREVIEWS, WEB, write_report
from fedfactory.researcher.watching.run_server import RunServer
from helpers import CONFIG, site_facts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from skimage.color import deltaE_ciede2000, rgb2lab

HOSTILE = '</script><script>window.broken=1</script><img src=x onerror="window.broken=1">\u202e'
REASON = "no reply: disconnected, too late, or failed; see the site's log"


class Run:
    """A run of phase one in a folder, without a federation: rounds are added as `train` records them."""

    def __init__(self, folder: Path, *, names: tuple[str, str] = ("alpha", "beta"), rounds: int = 40) -> None:
        self.folder, self.names = folder, names
        config = FactoryConfig.preset("tiny", ("bright", "dark"))
        federation = Federation(tag="brains", min_nodes=1)
        self.state = RunState(config=config, federation=federation, stages=(Stage(rounds),), seed=3, save_every=10)
        self.state.save(folder)

    def add(self, rounds: int, *, without: int | None = None, reason: str = REASON) -> None:
        """Finish further rounds, if asked for without one of the two sites."""
        for number in range(self.state.round_done + 1, self.state.round_done + 1 + rounds):
            updates = {
                f"NODE_{k}": ReceivedUpdate(
                    node_name=self.names[k], domain=domain, num_bytes=1_000_000,
                    numbers={"loss_generator": 1.0 + k + number / 100, "quality_layout": 0.25},
                )
                for k, domain in enumerate(self.state.config.domains) if k != without
            }  # fmt: skip
            if without is not None:
                event = RoundEvent(round=number, node=f"NODE_{without}", kind="lost", reason=reason)
                self.state.events.append(event)
            self.state.round_done = number
            self.state.seconds.append(6.0)
            add_answers(self.state.answers, number, updates)
            for update in updates.values():
                self.state.history[update.domain].append({"round": number, **update.numbers})
            if number % 10 == 0:
                self.state.shared_anatomy.append(SharedAnatomy(round=number, pairs={"bright / dark": number / 100}))
                picture = np.full((8, 16, 3), number % 256, np.uint8)
                write_picture(self.folder / "previews" / f"round_{number:04d}.png", picture)
        self.state.save(self.folder)


@pytest.fixture
def run(tmp_path) -> Run:
    run = Run(tmp_path / "run")
    run.add(3)
    run.add(2, without=1)
    run.add(7)
    return run


@contextmanager
def serving(run: Run) -> Iterator[RunServer]:
    with RunServer(run.folder) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(server: RunServer, rest: str = "", *, method: str = "GET", path: str | None = None, host: str | None = None):
    """Status, headers and body of an answer; `rest` is behind the secret."""
    connection = HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    headers = {"Host": host} if host is not None else {}
    connection.request(method, urlsplit(server.address).path + rest if path is None else path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, answer.headers, body


def charts_of(page: str) -> dict[str, dict]:
    """Title to the chart as the page's script reads it."""
    charts = json.loads(re.search(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S)[1])
    return {chart["title"]: chart for chart in charts}


def test_the_facts_of_a_run_are_those_of_its_rounds(run):
    facts = gather(run.folder)
    assert (facts.round_done, facts.rounds, facts.finished) == (12, 40, False)
    assert facts.progress == "round 12 of 40, about 3 min left"  # 28 rounds of 6 s
    assert facts.sites.rows == [
        ["alpha", "bright", "12", "12", "0", "12.0 MB"],
        ["beta", "dark", "10", "12", "2", "10.0 MB"],
    ]
    assert facts.missed == [Missed("beta", "lost", REASON, 4, 5)]
    assert facts.numbers.rows == [["bright", "1.12", "0.25"], ["dark", "2.12", "0.25"]]
    charts = {chart.title: chart for chart in facts.charts}
    losses = charts["loss of the generator"]
    assert losses.rounds == list(range(1, 13)) and list(losses.series) == ["bright", "dark"]
    assert losses.series["dark"][2:6] == [2.03, None, None, 2.06]
    assert charts["number of sites in a round"].series["missed"] == [0] * 3 + [1] * 2 + [0] * 7
    assert facts.shared_anatomy == {"bright / dark": 0.1} and list(facts.previews) == [10]


def test_status_prints_what_the_page_shows(run, capsys):
    with pytest.raises(SystemExit) as done:
        main(["status", str(run.folder)])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert "round 12 of 40, about 3 min left" in printed and "12.0 MB" in printed
    assert f"rounds 4 to 5: beta lost: {REASON}" in printed and "anatomy shared by bright / dark: 0.10" in printed


def test_a_site_that_answered_when_a_round_was_repeated_did_not_miss_it(run):
    run.state.events.append(RoundEvent(round=12, node="NODE_0", kind="lost", reason=REASON))
    run.state.save(run.folder)
    facts = gather(run.folder)
    assert facts.sites.rows[0][4] == "0" and facts.missed[-1] == Missed("alpha", "lost", REASON, 12, 12)


events = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from("ab"), st.sampled_from(["lost", "failed"]), st.sampled_from("xy")),
    max_size=30,
).map(sorted)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(events)
def test_rounds_in_a_row_are_put_together_and_none_is_lost(found):
    """Expanded again, the entries are the events, except for repetitions of a round."""
    given_ = [RoundEvent(round=number, node=node, kind=kind, reason=why) for number, node, kind, why in found]
    entries = missed_rounds(given_, {"a": "alpha"})
    expanded = {
        (number, entry.site, entry.kind, entry.reason)
        for entry in entries
        for number in range(entry.first, entry.last + 1)
    }
    names = {"a": "alpha", "b": "b"}
    assert expanded == {(number, names[node], kind, why) for number, node, kind, why in found}
    assert len(entries) <= len(given_)


def segmentation(folder: Path, *, private: bool = False) -> SegmentationResult:
    """Two of three rounds by two sites of one name, without the second in the second round."""
    from dataclasses import replace

    config = replace(CONFIG, rounds=3, **({"dp_epsilon": 8.0, "norm": "group"} if private else {}))
    facts = {"N0": site_facts(), "N1": site_facts()}
    progress = RunProgress(tag="hearts", min_nodes=1, facts=facts)
    result = SegmentationResult(config, {n: ReceivedUpdate(node_name=n) for n in facts}, run=progress, seconds=120.0)

    def update(k: int, number: int) -> ReceivedUpdate:
        numbers = {"epsilon": 2.0 * number, "delta": 1e-4} if private else {"loss": 0.5, "own_dice": 0.8 + k / 10}
        return ReceivedUpdate(node_name="clinic", domain="ct", num_bytes=500, numbers=numbers)

    result.add_round({"N0": update(0, 1), "N1": update(1, 1)}, trained=True)
    result.add_round({"N0": update(0, 2)}, trained=True)
    progress.require_answers(2, round_done=1)
    result.events = [RoundEvent(round=2, node="N1", kind="rejected", reason="sent NaN or infinite weights")]
    result.save(folder)
    return result


def test_the_facts_of_a_segmentation_have_its_scores_and_who_was_refused(tmp_path):
    result = segmentation(tmp_path)
    assert SegmentationResult.load(tmp_path).events == result.events
    facts = gather(tmp_path)
    assert facts.progress == "round 2 of 3, about 1 min left"
    assert facts.settings["answers needed"] == "2 (1 before round 2)"
    assert facts.missed == [Missed("clinic (N1)", "rejected", "sent NaN or infinite weights", 2, 2)]
    assert [row[:5] for row in facts.sites.rows] == [
        ["clinic (N0)", "ct", "2", "2", "0"],
        ["clinic (N1)", "ct", "1", "1", "1"],
    ]
    charts = {chart.title: chart.series for chart in facts.charts}
    assert charts["Dice of the sites' own models"] == {"clinic (N0)": [0.8, 0.8], "clinic (N1)": [0.9, None]}
    assert facts.numbers.rows[0][0] == "clinic" and facts.numbers.rows[0][2] == "0.800"


def test_the_facts_of_a_private_segmentation_have_the_epsilon_that_was_spent(tmp_path):
    segmentation(tmp_path, private=True)
    facts = gather(tmp_path)
    assert facts.settings["epsilon planned"] == "8 per training patient"
    assert {chart.title: chart.series for chart in facts.charts}["epsilon spent per training patient"] == {
        "clinic (N0)": [2.0, 4.0],
        "clinic (N1)": [2.0, None],
    }


def test_results_of_a_version_that_kept_no_events_are_read(tmp_path):
    segmentation(tmp_path)
    content = json.loads((tmp_path / RESULTS).read_text())
    del content["events"]
    (tmp_path / RESULTS).write_text(json.dumps(content))
    assert gather(tmp_path).missed == []


def test_the_page_shows_what_is_known(run):
    with serving(run) as server:
        status, headers, body = ask(server)
        page = body.decode()
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    for text in ("round 12 of 40", "alpha", "beta", "12.0 MB", "rounds 4 to 5", "no reply", "bright / dark: 0.10"):
        assert text in page
    chart = charts_of(page)["loss of the generator"]
    assert [name for name, _ in chart["series"]] == ["bright", "dark"] and len(chart["rounds"]) == 12


def test_the_page_follows_a_run_that_goes_on(run):
    with serving(run) as server:
        before = ask(server, "live")[2].decode()
        run.add(8, without=0, reason="it rebooted")
        after = ask(server, "live")[2].decode()
        assert "round 12 of 40" in before and "round 20 of 40" in after
        assert "it rebooted" in after and "previews/20.png" in after and "previews/20.png" not in before
        assert len(charts_of(after)["loss of the generator"]["rounds"]) == 20
        status, headers, picture = ask(server, "previews/20.png")
        assert (status, headers["Content-Type"]) == (200, "image/png")
        assert picture == (run.folder / "previews" / "round_0020.png").read_bytes()
        run.add(20)
        assert "round 40 of 40, finished" in ask(server, "live")[2].decode()


def test_a_damaged_state_is_reported_and_the_page_recovers(run):
    state = run.folder / "experiment.json"
    whole = state.read_text()
    with serving(run) as server:
        state.write_text(whole[:100])
        status, _, body = ask(server, "live")
        assert status == 500 and b"not readable" in body
        state.write_text(whole)
        assert ask(server, "live")[0] == 200
    with pytest.raises(UsageError, match="choose a folder that a training run wrote"):
        RunServer(run.folder / "previews")
    state.write_text("{}")
    with pytest.raises(CheckpointError):
        RunServer(run.folder)


def test_a_foreign_name_of_this_machine_is_refused(run):
    """What a page of another origin could ask for after its name server changed its answer to 127.0.0.1."""
    with serving(run) as server:
        port = server.server_address[1]
        for host in ("rebound.example.org", f"rebound.example.org:{port}", "127.0.0.1.example.org", "", "0.0.0.0"):
            status, _, body = ask(server, host=host)
            assert status == 403 and b"alpha" not in body, host
        for host in (f"127.0.0.1:{port}", "localhost", f"LOCALHOST:{port}", "localhost:1"):  # the last as in a tunnel
            assert ask(server, host=host)[0] == 200, host


def test_the_server_listens_on_loopback_alone(run):
    with serving(run) as server:
        host, port = server.server_address
        assert host == "127.0.0.1"
        with pytest.raises(ConnectionRefusedError):  # would be answered by a server that listens on all addresses
            socket.create_connection(("127.0.0.2", port), timeout=5)


def test_nothing_is_served_without_the_secret_of_the_address(run):
    (run.folder / "previews" / "secret.txt").write_text("patient")
    (run.folder / "previews" / "round_0007.png").symlink_to(run.folder / "previews" / "secret.txt")
    with serving(run) as server:
        secret = urlsplit(server.address).path
        assert len(secret) > 20 and secret not in RunServer(run.folder).address
        for path in (
            "/",
            "/live",
            "/previews/10.png",
            "//",
            secret[:-2] + "/",
            secret[:-1],  # the page's own addresses would lead elsewhere
            "/%00/",
        ):
            status, _, body = ask(server, path=path)
            assert status == 404 and b"alpha" not in body, path
        for rest in (
            "previews/../experiment.json", "previews/7.png", "previews/11.png", "previews/secret.txt",
            "experiment.json", "%2e%2e/experiment.json", "previews/10.png/",
            "live/",
        ):  # fmt: skip
            status, _, body = ask(server, rest)
            assert status == 404 and b"patient" not in body and b"brains" not in body, rest
        for path in ("/\u00e9/", f"{secret}previews/\u0661.png"):  # raw, for Python's own client sends no such bytes
            with socket.create_connection(server.server_address) as connection:
                connection.sendall(f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
                assert b" 404 " in connection.makefile("rb").readline()
        for method in ("POST", "PUT", "DELETE", "OPTIONS"):
            assert ask(server, method=method)[0] == 501


def test_answers_forbid_other_origins(run):
    with serving(run) as server:
        for rest in ("", "live", "previews/10.png", "nothing"):
            headers = ask(server, rest)[1]
            rules = dict(rule.split(" ", 1) for rule in headers["Content-Security-Policy"].split("; "))
            assert (
                rules["default-src"]
                == rules["base-uri"]
                == rules["form-action"]
                == rules["frame-ancestors"]
                == "'none'"
            )
            assert rules["connect-src"] == "'self'" and rules["img-src"] == "'self' data:"
            assert re.fullmatch(r"'sha256-[\w+/]+='", rules["script-src"])
            assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
            assert "Access-Control-Allow-Origin" not in headers and "Python" not in headers["Server"]


class _Elements(HTMLParser):
    """All elements of a page with their attributes, the text of each style and script, and the text that is shown."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements, self.inside, self.texts = [], None, {"style": [], "script": [], "shown": []}
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.inside = tag if tag in ("style", "script") else self.inside

    def handle_endtag(self, tag):
        self.inside = None if tag == self.inside else self.inside

    def handle_data(self, data):
        self.texts[self.inside or "shown"].append(data)


def test_a_page_names_no_other_place_and_runs_its_own_script_alone(run):
    with serving(run) as server:
        served = ask(server)[2].decode()
    for page in (served, write_report(run.folder).read_text()):
        found = _Elements(page)
        addresses = [
            value
            for _, attributes in found.elements
            for name, value in attributes.items()
            if name in ("src", "href", "srcset", "action", "data", "poster", "background")
        ]
        assert addresses and all(
            re.match(r"previews/\d+\.png$|data:image/png;base64,|data:,$", value) for value in addresses
        )
        assert not any(name.startswith("on") or name == "style" for _, own in found.elements for name in own)
        assert "url(" not in "".join(found.texts["style"]) and "@import" not in "".join(found.texts["style"])
        content = next(
            own["content"] for tag, own in found.elements if own.get("http-equiv") == "Content-Security-Policy"
        )
        for kind, text in (("script", found.texts["script"][-1]), ("style", "".join(found.texts["style"]))):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in content


def test_what_sites_sent_is_shown_as_text(tmp_path):
    run = Run(tmp_path / "<b>run", names=(HOSTILE, "beta"))
    run.add(2, without=1, reason=HOSTILE)
    run.add(9)
    page = write_report(run.folder).read_text()
    found = _Elements(page)
    assert not [tag for tag, own in found.elements if tag == "img" and own["src"] == "x"]
    assert len(found.texts["script"]) == 2  # the charts' numbers and the page's own
    assert "\u202e" not in page and "\\u202e" in "".join(found.texts["shown"])
    assert '</script><script>window.broken=1</script><img src=x onerror="window.broken=1">' in "".join(
        found.texts["shown"]
    )


def test_a_report_is_one_file_for_its_owner_with_the_newest_previews(tmp_path, capsys):
    run = Run(tmp_path / "run", rounds=300)
    run.add(300)
    with pytest.raises(SystemExit) as done:
        main(["report", str(run.folder), "--out", str(tmp_path / "page.html")])
    assert done.value.code == 0 and str(tmp_path / "page.html") in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    shown = [int(number) for number in re.findall(r"<figcaption>after round (\d+)<", page)]
    assert len(shown) <= MOST_PREVIEWS and shown[0] == 300 and f"{30 - len(shown)} more are in the folder" in page
    newest = base64.b64encode((run.folder / "previews" / "round_0300.png").read_bytes()).decode()
    assert newest in page and "data-refresh" not in page.partition("<style>")[0]
    assert (tmp_path / "page.html").stat().st_mode & 0o077 == 0
    with pytest.raises(SystemExit) as refused:
        main(["report", str(run.folder), "--out", str(tmp_path / "page.html")])
    assert refused.value.code == 2


def test_the_command_prints_the_address_and_ends_with_ctrl_c(run):
    command = [
        sys.executable,
        "-c",
        "from fedfactory.cli import main; main()",
        "watch",
        str(run.folder),
        "--no-browser",
    ]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    try:
        address = urlsplit(child.stdout.readline().split()[0])
        assert address.hostname == "127.0.0.1"
        connection = HTTPConnection("127.0.0.1", address.port, timeout=30)
        connection.request("GET", address.path)
        assert b"round 12 of 40" in connection.getresponse().read()
        child.send_signal(signal.SIGINT)
        _, err = child.communicate(timeout=30)
        assert (child.returncode, err) == (0, "")
    finally:
        child.kill()
        child.wait()


def test_a_port_that_is_taken_is_named(run, capsys):
    with serving(run) as server:
        port = server.server_address[1]
        with pytest.raises(SystemExit) as refused:
            main(["watch", str(run.folder), "--port", str(port), "--no-browser"])
    assert refused.value.code == 2 and f"--port is {port}, which cannot be used" in capsys.readouterr().err


def test_the_charts_program_comes_with_its_licence():
    licence, program = (WEB / "uPlot-LICENSE.txt").read_text(), (WEB / "uPlot.iife.min.js").read_text()
    assert "MIT License" in licence and "The above copyright notice and this permission notice" in licence
    assert "uPlot (v1.6.32)" in program.splitlines()[0]


# Machado, Oliveira and Fernandes, "A physiologically-based model for simulation of color vision deficiency", IEEE
# Transactions on Visualization and Computer Graphics 15 (2009), severity 1; rows give linear red, green and blue.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
}


def colours_of(name: str) -> list[list[str]]:
    """The values of a variable of the page's style: in light, then in dark."""
    return [text.split() for text in re.findall(rf"--{name}: ([^;]+);", (WEB / "page.css").read_text())]


def linear(colour: str) -> np.ndarray:
    """(3,) linear light of a colour #rrggbb, in [0, 1]."""
    values = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_colours_of_the_first_series_differ_for_colour_blind_readers(deficiency):
    """By CIEDE2000, of which 2 is a just noticeable difference side by side; from the fifth on dashes differ too."""
    for colours in colours_of("series"):
        seen = np.clip([np.array(DEFICIENCIES[deficiency]) @ linear(colour) for colour in colours[:4]], 0, 1)
        encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = rgb2lab(encoded[None])[0]
        differences = {pair: float(deltaE_ciede2000(*lab[list(pair)])) for pair in combinations(range(4), 2)}
        assert min(differences.values()) > 10, (colours, differences)


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours by WCAG 2.1, from 1 to 21."""
    light, dark = sorted((float(np.dot(linear(c), [0.2126, 0.7152, 0.0722])) for c in (first, second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_texts_and_lines_stand_out_from_the_page_in_light_and_dark():
    for name, paper, least in (("ink", "paper", 7.0), ("soft", "paper", 4.5), ("warn", "warn-paper", 4.5)):
        for (text,), (page,) in zip(colours_of(name), colours_of(paper), strict=True):
            assert contrast(text, page) >= least, (name, text, page)
    for colours, (page,) in zip(colours_of("series"), colours_of("paper"), strict=True):
        assert all(contrast(colour, page) >= 2.9 for colour in colours[:4]), [contrast(c, page) for c in colours]


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium; the tests are skipped where there is none."""
    play = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(names)} is on the path")
    with play.sync_playwright() as program:
        browser = program.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(browser, address: str, *, width: int = 1100, scheme: str = "light") -> Iterator:
    """A page in the browser; fails for errors of its script and for requests to any other place."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    problems, asked = [], []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#charts canvas")
    yield page
    place = address.rpartition("/")[0]
    page.close()
    assert problems == []
    assert asked and all(url.startswith((place, "data:")) for url in asked), asked


def test_a_browser_follows_a_run_without_being_reloaded(chromium, run):
    with serving(run) as server, opened(chromium, server.address) as page:
        page.evaluate("window.kept = document.querySelector('#charts figure')")
        page.locator("summary", has_text="Earlier rounds").click()
        run.add(8, without=0, reason="it rebooted")
        page.wait_for_selector("text=round 20 of 40", timeout=15_000)
        assert page.title().startswith("round 20 of 40")
        assert page.get_by_text("it rebooted").is_visible() and page.get_by_text("after round 10").is_visible()
        assert page.locator("img").first.evaluate("image => image.naturalWidth") == 16
        # The charts are those of before, with more rounds.
        assert page.evaluate("window.kept === document.querySelector('#charts figure')")


def test_a_browser_says_when_the_command_has_ended(chromium, run):
    with serving(run) as server:
        page = chromium.new_page()
        page.goto(server.address)
        page.wait_for_selector("#charts canvas")
    page.wait_for_selector("#trouble:not([hidden])", timeout=15_000)
    assert "has ended" in page.inner_text("#trouble") and page.get_by_text("round 12 of 40").is_visible()
    page.close()


def test_a_report_opens_from_the_disk_and_asks_for_nothing(chromium, run):
    report = write_report(run.folder).resolve().as_uri()
    with opened(chromium, report) as page:
        page.emulate_media(color_scheme="dark")  # drawn again, in other colours
        page.set_viewport_size({"width": 700, "height": 500})
        page.wait_for_timeout(300)
        assert page.locator("#charts canvas").count() == len(charts_of(Path(report[7:]).read_text()))
        assert page.locator("img").first.evaluate("image => image.naturalWidth") == 16


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_telephone_in_light_and_dark(chromium, run, scheme):
    with opened(chromium, write_report(run.folder).resolve().as_uri(), width=400, scheme=scheme) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        widths = page.eval_on_selector_all("#charts canvas", "all => all.map(one => one.getBoundingClientRect().right)")
        assert widths and max(widths) <= 400
        paper, ink = (
            page.evaluate(f"getComputedStyle(document.body)['{name}'].match(/\\d+/g).map(Number)")
            for name in ("backgroundColor", "color")
        )
        assert (max(paper) < 60 and min(ink) > 200) if scheme == "dark" else (min(paper) > 200 and max(ink) < 60)


def test_the_page_is_used_by_keyboard(chromium, run):
    with opened(chromium, write_report(run.folder).resolve().as_uri()) as page:
        reached = []
        for _ in range(40):
            page.keyboard.press("Tab")
            reached.append(
                page.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
            )
            if "loss of the generator" in str(reached[-1]):
                break
        else:
            pytest.fail(f"Tab does not reach the chart: {reached}")
        values = "document.activeElement.querySelectorAll('.u-value')"
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert page.evaluate(f"[...{values}].map(one => one.innerText)") == ["2", "1.02", "2.02"]
        page.keyboard.press("ArrowLeft")
        assert page.evaluate(f"{values}[2].innerText") == "2.01"
        page.keyboard.press("Tab")  # the first name of the legend
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.closest('.u-series').classList.contains('u-off')")
        page.locator("summary", has_text="Earlier rounds").focus()
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.parentElement.open")


def test_names_of_sites_break_out_of_nothing_in_a_browser(chromium, tmp_path):
    run = Run(tmp_path / "run", names=(HOSTILE, "beta"))
    run.add(2, without=1, reason=HOSTILE)
    run.add(8)
    with serving(run) as server, opened(chromium, server.address) as page:
        assert page.evaluate("window.broken") is None
        run.add(1, without=0, reason=HOSTILE)
        page.wait_for_selector("text=round 11 of 40", timeout=15_000)
        assert page.evaluate("window.broken") is None
        assert page.locator("img").count() == 1


def test_the_server_waits_for_no_silent_browser(run):
    """A connection that asks nothing keeps nobody else waiting."""
    with serving(run) as server, socket.create_connection(server.server_address):
        started = time.monotonic()
        assert ask(server)[0] == 200 and time.monotonic() - started < 5
