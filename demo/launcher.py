"""A process that imports what Fed-BioMed imports once, and forks a process for every command of a federation.

A node or command needs 5 to 7 CPU seconds to import PyTorch, torchvision, scikit-learn and others, a federation of
three nodes a dozen times. A forked process has them already. Fed-BioMed and what is ours are imported after the fork:
they read the environment when they are imported, and they import Polars, which starts a thread (a process with threads
cannot be forked safely).
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

IMPORTED_ONCE = ("torch", "torchvision", "grpc", "declearn.model.api", "opacus")
# PyArrow's allocator has a thread of its own otherwise. The name is Arrow's prefix of jemalloc's MALLOC_CONF.
NO_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false"}
LAUNCH = "from fedfactory.demo.launcher import main; main()"
LONGEST = 1 << 20  # bytes of a request: a command line
ROOM = " " * 8192  # an argument without a meaning, which a forked process overwrites with its command line
POLL_SECONDS = 0.05
PR_SET_PDEATHSIG = 1  # of Linux' prctl


def can_fork() -> bool:
    """Whether a launcher can be used: on Linux alone. The frameworks of macOS may not be used after a fork."""
    return sys.platform == "linux"


class Launched:
    """A process that a launcher has started, with what a federation uses of `subprocess.Popen`.

    Attributes:
        returncode: exit code, negative for a signal; None until `poll` or `wait` has seen the end of the process.
    """

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self.returncode: int | None = None

    @property
    def pid(self) -> int:
        """Process (and process group) id; waits while the launcher imports.

        Raises: ProcessLookupError if the launcher has ended before.
        """
        return self._launcher.pid_of(self)

    def poll(self) -> int | None:
        """Exit code; None while the process runs or is still to be started."""
        if self.returncode is None:
            self.returncode = self._launcher.exit_code_of(self)
        return self.returncode

    def wait(self) -> int:
        """Exit code, at the end of the process."""
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code


class Launcher:
    """The launcher's process as its program sees it. It ends with the program, and what it has launched ends with it.

    Args:
        log: file for what the launcher itself prints.
        environment: environment of the launcher and of everything that it launches.
    """

    def __init__(self, log: Path, environment: Mapping[str, str]) -> None:
        # One message is one request or answer; every request is answered by one number (or null), in order.
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, log.open("wb") as printed:
            self._process = subprocess.Popen(
                [sys.executable, "-c", LAUNCH, str(os.getpid()), str(theirs.fileno()), ROOM],
                stdin=subprocess.DEVNULL,
                stdout=printed,
                stderr=subprocess.STDOUT,
                env={**environment, **NO_THREAD},
                start_new_session=True,
                pass_fds=[theirs.fileno()],
            )
        self._starting: list[Launched] = []
        self._pids: dict[Launched, int] = {}

    def start(self, command: Sequence[str], log: Path) -> Launched:
        """Start a command in the current folder, as soon as the launcher has imported; its output goes to `log`."""
        log.write_bytes(b"")  # at once: who waits for a line there must not find an earlier one
        child = Launched(self)
        self._starting.append(child)
        with contextlib.suppress(OSError):  # the launcher has ended, and so has the child: `exit_code_of` says it
            self._send({"command": list(command), "log": str(log.resolve()), "folder": os.getcwd()})
        return child

    @property
    def imports(self) -> bool:
        """Whether something still waits for the launcher's imports."""
        with contextlib.suppress(OSError):
            self._receive_pids(wait=False)
        return bool(self._starting)

    def pid_of(self, child: Launched) -> int:
        """See `Launched.pid`."""
        try:
            self._receive_pids(wait=True)
            return self._pids[child]
        except (OSError, KeyError):
            raise ProcessLookupError("the launcher has ended") from None

    def exit_code_of(self, child: Launched) -> int | None:
        """See `Launched.poll`."""
        try:
            self._receive_pids(wait=False)
            self._send({"poll": self._pids[child]})
            return self._receive(wait=True)
        except BlockingIOError:
            return None
        except (OSError, KeyError):
            return -signal.SIGKILL  # the launcher has ended, and the kernel has killed what it launched

    def kill(self) -> None:
        """End the launcher and everything that it has launched."""
        self._process.kill()
        self._process.wait()
        self._channel.close()

    def _receive_pids(self, *, wait: bool) -> None:
        while self._starting:
            self._pids[self._starting[0]] = self._receive(wait=wait)
            self._starting.pop(0)

    def _send(self, request: dict[str, object]) -> None:
        self._channel.sendall(json.dumps(request).encode())

    def _receive(self, *, wait: bool) -> int | None:
        message = self._channel.recv(LONGEST, 0 if wait else socket.MSG_DONTWAIT)
        if not message:
            raise ConnectionResetError("the launcher has ended")
        return json.loads(message)


def main() -> None:
    """The launcher's process: import, then fork for every request until the program ends."""
    parent, descriptor = (int(word) for word in sys.argv[1:3])
    end_with(parent)
    _show(sys.orig_argv[:-1])
    for name in IMPORTED_ONCE:
        with contextlib.suppress(Exception):  # a command that needs what is missing or damaged reports it
            importlib.import_module(name)
    fork = multiprocessing.get_context("fork")
    gc.freeze()  # a collection in a forked process would copy all pages that it shares with the others
    children: dict[int, multiprocessing.process.BaseProcess] = {}
    with socket.socket(fileno=descriptor) as channel:
        while message := channel.recv(LONGEST):
            request = json.loads(message)
            if "poll" in request:
                answer = children[request["poll"]].exitcode
            else:
                child = fork.Process(target=_fulfil, args=(request, os.getpid(), channel))
                child.start()
                answer = child.pid
                children[answer] = child
                _make_group(answer)
            channel.sendall(json.dumps(answer).encode())
    os._exit(0)  # without waiting for the children: they end with this process


def end_with(parent: int) -> None:
    """Have Linux kill this process when its parent dies, even by SIGKILL; end it if that has happened already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit(1)


def _make_group(pid: int) -> None:
    """Give a child a process group. Parent and child both do it: neither goes on before the group exists."""
    with contextlib.suppress(OSError):  # the other has done it, and the child is another program or has ended
        os.setpgid(pid, pid)


def _fulfil(request: dict, launcher: int, channel: socket.socket) -> None:
    """In a forked process: become like a new one (group, output, folder, random numbers), and run the command."""
    import numpy as np
    import torch

    channel.close()
    end_with(launcher)
    _make_group(os.getpid())
    with open(request["log"], "wb", buffering=0) as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
    os.chdir(request["folder"])
    # Python's `random` seeds itself after a fork; these two would go on alike in all forked processes.
    np.random.seed()
    torch.default_generator.seed()
    try:
        _run(request["command"])
    finally:
        atexit._run_exitfuncs()  # `multiprocessing` does the rest: exit code, traceback, end of threads


def _run(command: list[str]) -> None:
    """Do what the command line does: `python -m` and `python -c` in this process, anything else in its place."""
    is_python = command[0] == sys.executable and command[1] in ("-m", "-c")
    threads = len(os.listdir(f"/proc/{os.getppid()}/task"))  # of the launcher; a fork does not copy the second one
    if not is_python or threads > 1 or not _show(command):
        os.execvp(command[0], command)
    _, kind, what, *arguments = command
    sys.argv = [what if kind == "-m" else kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})


def _show(command: Sequence[str]) -> bool:
    """Make `ps`, and whoever else looks for nodes (`fedfactory site check`), see this command; False if it is too long.

    Linux shows the memory that held the arguments when the process began.
    """
    after_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    begin, end = int(after_name[45]), int(after_name[46])  # arg_start and arg_end, see proc(5)
    words = b"\0".join(map(os.fsencode, command))
    if len(words) >= end - begin:
        return False
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, words, len(words))
    return True
