"""A Fed-BioMed federation of local processes that end with the program that started them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from ..common.files import make_folder
from ..common.progress import track, watch
from ..errors import FederationError
from ..node.connection.proxies import without_proxy_on_loopback
from . import launcher

READY = b"Starting task manager"  # the last line in a node's log before it accepts requests
READY_TIMEOUT = 180.0  # seconds; a node that imports on its own takes 5 to 20 s
STOP_GRACE = 3.0  # seconds between SIGTERM and SIGKILL
POLL_SECONDS = 0.2  # between two checks of the processes

# Every child that is not forked runs this first.
END_WITH_PARENT = """
import os, sys
from fedfactory.demo.launcher import end_with
end_with(int(sys.argv[1]))
os.execvp(sys.argv[2], sys.argv[2:])
"""


class LocalFederation:
    """One researcher component and several nodes below one folder; a context manager that stops all its processes.

    Args:
        folder: folder for components, logs and temporary files.
        nodes: names of the nodes.

    Attributes:
        researcher: folder of the researcher component.
        nodes: name of the node to the folder of its component.
        port: port of the researcher's server.
    """

    def __init__(self, folder: Path, nodes: Sequence[str]) -> None:
        self.folder = folder
        self.researcher = folder / "researcher"
        self.nodes = {name: folder / name for name in nodes}
        self._children: dict[str, subprocess.Popen | launcher.Launched] = {}
        self._launcher: launcher.Launcher | None = None  # without one, every process imports on its own
        self._beside: str | None = None  # name of the command that runs beside the others
        self.port = _free_port()

    def __enter__(self) -> LocalFederation:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def begin(self) -> None:
        """Start to create the components, with plan approval and a free port; `wait_for("create")` waits for them.

        One more process imports the modules that nodes need: in a new environment Python compiles them for half a
        minute, during which the caller can do something else.
        """
        make_folder(self.folder / "logs")
        make_folder(self.folder / "tmp")
        if launcher.can_fork():
            self._launcher = launcher.Launcher(self._log("launcher"), self._environment())
        commands = {
            name: _fedbiomed("component", "create", "-c", "node", "-p", str(path), "-n", name)
            for name, path in self.nodes.items()
        }
        commands["researcher"] = _fedbiomed("component", "create", "-c", "researcher", "-p", str(self.researcher))
        commands["imports"] = [
            sys.executable,
            "-c",
            "import fedbiomed.node.node_pm, fedfactory.node.plans.factory_plan",
        ]
        self._launch("create", commands)

    def start_nodes(self) -> None:
        """Start every node as `fedbiomed node start` does, and wait until it accepts requests.

        Raises: FederationError if a node ends or is not ready in time.
        """
        self.start(list(self.nodes))

    def start(self, names: Sequence[str]) -> None:
        """Start the named nodes, also nodes that have ended. Raises: FederationError as `start_nodes`."""
        options = json.dumps({"gpu": False, "gpu_num": 0, "gpu_only": False, "debug": False})
        for name in names:
            path = str(self.nodes[name])
            self._spawn(
                name, [sys.executable, "-m", "fedbiomed.node.node_pm", "--config", path, "--node-args", options]
            )
        deadline = time.monotonic() + READY_TIMEOUT
        for name in track(names, "starting nodes"):
            while READY not in self._log(name).read_bytes():
                self.check_nodes()
                if time.monotonic() > deadline:
                    raise FederationError(f"node {name} was not ready in {READY_TIMEOUT:.0f} s; see {self._log(name)}")
                time.sleep(POLL_SECONDS)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a node or command and to its child processes, such as SIGKILL to simulate a power cut."""
        _signal_group(self._children[name], number)

    def forget(self, name: str) -> None:
        """Wait for the end of a node or command that was killed on purpose; it can be started again."""
        self._children.pop(name).wait()

    def pid_of(self, name: str) -> int:
        """Process (and process group) id of a running node or background command."""
        return self._children[name].pid

    def check_nodes(self) -> None:
        """Raises: FederationError if a node that was started is not running any more."""
        for name in self.nodes:
            child = self._children.get(name)
            if child is not None and child.poll() is not None:
                raise FederationError(f"node {name} stopped with code {child.returncode}; see {self._log(name)}")

    @contextlib.contextmanager
    def background(self, name: str, arguments: Sequence[str], *, rounds: int) -> Iterator[None]:
        """Run a `fedfactory train` command during the block; then show a progress bar of its rounds until it ends.

        Args:
            name: name of the command's log file.
            arguments: arguments of `fedfactory`.
            rounds: number of rounds of the run.

        Raises: FederationError if the command fails, or if a node stops in the meantime.
        """
        child = self._spawn(name, _fedfactory(*arguments))
        self._beside = name
        try:
            yield
        finally:
            self._beside = None

        def running() -> bool:
            self.check_nodes()
            return child.poll() is None

        def completed() -> int:
            return self._log(name).read_bytes().count(b"\nround ")

        watch("training the factory", rounds, completed=completed, running=running)
        self._finish(name)

    def run_together(self, step: str, commands: dict[str, Sequence[str]]) -> None:
        """Run commands at the same time, one process each.

        Args:
            step: name of the step, for progress and errors.
            commands: name to command line.

        Raises: FederationError if a command fails.
        """
        self._launch(step, commands)
        self.wait_for(step)

    def _launch(self, step: str, commands: dict[str, Sequence[str]]) -> None:
        for name, command in commands.items():
            self._spawn(f"{step}-{name}", command)

    def wait_for(self, step: str) -> None:
        """Wait for the commands of a step. Raises: FederationError if a command fails."""
        names = [name for name in self._children if name.startswith(f"{step}-")]
        for name in track(names, f"federation: {step}"):
            while self._children[name].poll() is None:
                self.check_nodes()
                self._check_beside()
                time.sleep(POLL_SECONDS)
            self._finish(name)

    def site_command(self, *arguments: str) -> list[str]:
        """Command line of `fedfactory site ...`, for `run_together`."""
        return _fedfactory("site", *arguments)

    def stop(self) -> None:
        """End every process that is still running: SIGTERM, then SIGKILL after a short while."""
        if self._launcher is not None and self._launcher.imports:
            self._launcher.kill()  # nothing that it was asked for has begun
        running = [child for child in self._children.values() if child.poll() is None]
        for child in running:
            _signal_group(child, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE
        while any(child.poll() is None for child in running) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
        for child in self._children.values():
            _signal_group(child, signal.SIGKILL)  # to the process group: also to the children of a child
            child.wait()
        self._children.clear()
        if self._launcher is not None:
            self._launcher.kill()
            self._launcher = None

    def _spawn(self, name: str, command: Sequence[str]) -> subprocess.Popen | launcher.Launched:
        if self._launcher is not None:
            child = self._launcher.start(command, self._log(name))
        else:
            with self._log(name).open("wb") as log:
                child = subprocess.Popen(
                    [sys.executable, "-c", END_WITH_PARENT, str(os.getpid()), *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=self._environment(),
                    start_new_session=True,  # Ctrl-C reaches only this program, which then stops the others in order
                )
        self._children[name] = child
        return child

    def _check_beside(self) -> None:
        """Raises: FederationError if the command in the background has failed; what waits for it would time out."""
        child = None if self._beside is None else self._children.get(self._beside)
        if child is not None and child.poll():
            self._finish(self._beside)

    def _finish(self, name: str) -> None:
        child = self._children.pop(name)
        if child.returncode != 0:
            lines = self._log(name).read_text(errors="replace").strip().splitlines()
            detail = f": {lines[-1].strip()}" if lines else ""
            raise FederationError(f"step {name} failed with code {child.returncode}{detail}; see {self._log(name)}")

    def _log(self, name: str) -> Path:
        return self.folder / "logs" / f"{name}.log"

    def _environment(self) -> dict[str, str]:
        # A hospital's proxy does not know this machine's localhost, on which the nodes find the researcher.
        environment = without_proxy_on_loopback(os.environ)
        own = {key: value for key, value in environment.items() if not key.startswith("FBM_")}
        port = str(self.port)
        return {
            **own,
            "FBM_SERVER_HOST": "localhost",
            "FBM_SERVER_PORT": port,
            "FBM_RESEARCHER_IP": "localhost",
            "FBM_RESEARCHER_PORT": port,
            "FBM_RESEARCHER_COMPONENT_ROOT": str(self.researcher),
            "FBM_SECURITY_TRAINING_PLAN_APPROVAL": "True",
            "FBM_SECURITY_ALLOW_DEFAULT_TRAINING_PLANS": "False",
            "TMPDIR": str(self.folder / "tmp"),  # killed nodes leave files there
            # Several nodes on few cores: threads that wait in a loop would slow each other down.
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
        }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _signal_group(child: subprocess.Popen | launcher.Launched, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _fedbiomed(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "fedbiomed.cli", *arguments]


def _fedfactory(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from fedfactory.cli import main; main()", *arguments]
