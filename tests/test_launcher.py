"""Processes forked from one that has imported before: they must be like new ones, and end with their program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fedfactory.demo import launcher as module
from fedfactory.demo.launcher import Launcher
from fedfactory.demo.local_federation import LocalFederation
from fedfactory.errors import FederationError
from fedfactory.node.connection.running_nodes import FOLDER_FLAG, MODULE, running_nodes

pytestmark = pytest.mark.skipif(not module.can_fork(), reason="a launcher is used on Linux alone")

STATE = """
import json, os, random, sys, tempfile, threading
before = {name.partition(".")[0] for name in sys.modules}
import numpy as np, torch, uuid
print(json.dumps({
    "differ": [random.random(), np.random.random(), torch.rand(1).item(), str(uuid.uuid4()), tempfile.mkdtemp()],
    "temporary": tempfile.gettempdir(), "folder": os.getcwd(), "arguments": sys.argv[1:], "stdin": sys.stdin.read(),
    "group": os.getpgid(0) - os.getpid(), "threads": threading.active_count(), "torch": "torch" in before,
    "fedbiomed": "fedbiomed" in before, "name": __name__,
    "open": [os.readlink(link) for link in map("/proc/self/fd/{}".format, os.listdir("/proc/self/fd"))
             if os.path.lexists(link)],
}))
"""

DAMAGED = "raise RuntimeError('damaged')"
THREAD = "import threading, time; threading.Thread(target=time.sleep, args=(300,), daemon=True).start()"

PROGRAM = """
import os, sys, time
from pathlib import Path
from fedfactory.demo.launcher import Launcher
launcher = Launcher(Path("launcher.log"), os.environ)
child = launcher.start([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(300)"], Path("log"))
print(launcher._process.pid, child.pid, flush=True)
time.sleep(300)
"""


@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launcher")
    made = Launcher(folder / "log", {**os.environ, "TMPDIR": str(folder), "OMP_NUM_THREADS": "1"})
    yield made
    made.kill()


def python(*words) -> list[str]:
    return [sys.executable, *words]


def with_packages(folder, **sources) -> dict[str, str]:
    """An environment in which packages have another source; without most of what it imports a launcher is quick."""
    sources = {"torchvision": DAMAGED, "declearn": DAMAGED, "opacus": DAMAGED, **sources}
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source)
    paths = filter(None, (str(folder), os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def gone(pid, seconds=10) -> bool:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("-c", "print('done')"), 0),
        (("-c", "import sys; sys.exit(3)"), 3),
        (("-c", "import sys; sys.exit('no such site')"), 1),
        (("-c", "raise ValueError('wrong')"), 1),
        (("-c", "import atexit; atexit.register(print, 'at the end')"), 0),
        (
            ("-c", "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()"),
            0,
        ),
        (("-m", "json.tool", "nowhere.json"), 2),
        (("-c", "from fedfactory.cli import main; main()", "status", "nowhere"), 2),
        (("-V",), 0),  # neither -m nor -c
    ],
)
def test_exit_codes_and_last_lines_are_those_of_a_new_process(launcher, tmp_path, words, code):
    """The last line is what an error of the federation quotes."""
    new = subprocess.run(python(*words), check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert new.returncode == code
    assert launcher.start(python(*words), tmp_path / "log").wait() == code
    assert (tmp_path / "log").read_text().splitlines()[-1:] == new.stdout.splitlines()[-1:]


def test_forked_processes_are_like_new_ones(launcher, tmp_path, monkeypatch):
    """Two are started at once: what they draw at random must differ, as node and state ids do between nodes."""
    monkeypatch.chdir(tmp_path)
    children = [launcher.start(python("-c", STATE, "a b"), tmp_path / name) for name in ("first", "second")]
    assert [child.wait() for child in children] == [0, 0]
    first, second = (json.loads((tmp_path / name).read_text()) for name in ("first", "second"))
    assert not any(one == other for one, other in zip(first.pop("differ"), second.pop("differ"), strict=True))
    opened = [name for name in first.pop("open") + second.pop("open") if not name.startswith("pipe:")]
    assert set(opened) == {"/dev/null", str(tmp_path / "first"), str(tmp_path / "second")}
    assert os.path.basename(first.pop("temporary")) == os.path.basename(second.pop("temporary")) == "launcher0"
    assert first == second == {
        "folder": str(tmp_path), "arguments": ["a b"], "stdin": "", "group": 0, "threads": 1, "name": "__main__",
        "torch": True,  # it had been imported, so the process was forked: the launcher has one thread
        "fedbiomed": False,
    }  # fmt: skip


def test_a_signal_reaches_a_process_as_soon_as_its_number_is_known(launcher, tmp_path):
    children = [launcher.start(python("-c", "import time; time.sleep(300)"), tmp_path / str(n)) for n in range(3)]
    for child, number in zip(children, (signal.SIGTERM, signal.SIGKILL, signal.SIGSTOP), strict=True):
        os.killpg(child.pid, number)
    assert [child.wait() for child in children[:2]] == [-signal.SIGTERM, -signal.SIGKILL]
    time.sleep(0.2)
    assert children[2].poll() is None
    os.killpg(children[2].pid, signal.SIGKILL)
    assert children[2].wait() == -signal.SIGKILL


def test_a_forked_node_is_found_like_any_other(launcher, tmp_path):
    """`site check` and `site clean` look for nodes by their command lines, and read their environments."""
    node = "import time; print('begun', flush=True); time.sleep(300)"
    child = launcher.start(python("-c", node, MODULE, FOLDER_FLAG, str(tmp_path / "the node")), tmp_path / "log")
    while "begun" not in (tmp_path / "log").read_text():
        time.sleep(0.05)
    (found,) = [node for node in running_nodes() if node.root == tmp_path / "the node"]
    assert found.pid == child.pid and time.time() - found.started < 30
    assert Path(found.environment["TMPDIR"]).name == "launcher0"
    too_long = launcher.start(python("-c", "import sys; print(len(sys.argv[1]))", "x" * 20_000), tmp_path / "long")
    assert too_long.wait() == 0 and (tmp_path / "long").read_text() == "20000\n"
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def test_what_was_launched_ends_with_a_killed_program(tmp_path):
    environment = with_packages(tmp_path)
    program = subprocess.Popen(python("-c", PROGRAM), cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=environment)
    started = [int(word) for word in program.stdout.readline().split()]
    while not (tmp_path / "log").exists() or "begun" not in (tmp_path / "log").read_text():
        time.sleep(0.05)
    assert len(started) == 2 and all(psutil.pid_exists(pid) for pid in started)
    program.kill()
    program.wait()
    program.stdout.close()
    assert all(gone(pid) for pid in started)


def test_a_launcher_that_is_killed_while_it_imports_has_ended_what_it_was_asked_for(tmp_path):
    launcher = Launcher(tmp_path / "log", os.environ)
    child = launcher.start(python("-c", "print('never')"), tmp_path / "child")
    assert launcher.imports and child.poll() is None
    launcher.kill()
    assert child.poll() == child.wait() == -signal.SIGKILL
    with pytest.raises(ProcessLookupError, match="ended"):
        child.pid  # noqa: B018
    assert launcher.start(python("-c", "print('never')"), tmp_path / "child").poll() == -signal.SIGKILL
    assert (tmp_path / "child").read_text() == ""


def test_a_launcher_with_a_second_thread_starts_new_processes(tmp_path):
    """It imports the other package although one is damaged: commands that need that one will report it."""
    launcher = Launcher(tmp_path / "log", with_packages(tmp_path, opacus=THREAD))
    try:
        ask = "import os, sys; print('torch' in sys.modules, os.getpgid(0) == os.getpid()); sys.exit(4)"
        child = launcher.start(python("-c", ask), tmp_path / "child")
        assert child.wait() == 4
        assert (tmp_path / "child").read_text() == "False True\n"
    finally:
        launcher.kill()


def test_without_a_launcher_every_process_of_a_federation_is_a_new_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "can_fork", lambda: False)
    with LocalFederation(tmp_path, []) as federation:
        federation.begin()
        children = list(federation._children.values())
        assert children and all(isinstance(child, subprocess.Popen) for child in children)
        with pytest.raises(FederationError, match=r"step do-it failed with code 3: sorry; see .*do-it\.log"):
            federation.run_together("do", {"it": python("-c", "import sys; print('sorry'); sys.exit(3)")})
    assert all(child.returncode for child in children)


def test_a_federation_that_is_left_while_it_imports_waits_for_nothing(tmp_path):
    start = time.monotonic()
    with LocalFederation(tmp_path, ["a"]) as federation:
        federation.begin()
        launched = federation._launcher._process.pid
    assert time.monotonic() - start < 2
    assert gone(launched) and not (tmp_path / "a").exists()
