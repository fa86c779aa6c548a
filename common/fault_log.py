"""A log file for the tracebacks of errors that nobody foresaw: the terminal shows one line that names the file."""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from ..errors import FedFactoryError, VolumeError, one_line, plain_lines

LOG = "errors.log"
MAX_BYTES = 1 << 20  # of the log; then it becomes errors.log.old, in place of an earlier one


def log_fault(error: BaseException, what: object) -> Path:
    """Append the traceback of an error to the user's log, which nobody else can read: it may name patients.

    The log is `fedfactory/errors.log` in the user's folder for state (`$XDG_STATE_HOME`, or `~/.local/state`). Where
    that cannot be written, it is a new file in the folder for temporary files.

    Args:
        error: that was caught.
        what: was being read or done.

    Returns: the log file.
    """
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    text = f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M:%S} UTC, {one_line(str(what))}\n{plain_lines(trace)}\n".encode(
        "utf-8", "backslashreplace"
    )
    with suppress(OSError, RuntimeError):  # RuntimeError: there is no home folder
        path = _state_folder() / LOG
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if path.exists() and path.stat().st_size > MAX_BYTES:
            os.replace(path, path.with_name(f"{LOG}.old"))
        # One write with O_APPEND: threads and processes do not mix their lines. A link could point anywhere.
        handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
        with os.fdopen(handle, "wb", buffering=0) as file:
            file.write(text)
        return path
    handle, name = tempfile.mkstemp(prefix="fedfactory-errors-", suffix=".log")  # readable for its owner alone
    with os.fdopen(handle, "wb") as file:
        file.write(text)
    return Path(name)


def unforeseen(error: BaseException, what: object) -> str:
    """One line about an error that nobody foresaw, after its traceback was logged, see `log_fault`."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    kind = f"{type(error).__name__}: {first[:200]}" if first else type(error).__name__
    return f"{what}: failed with an unforeseen error ({kind}); its traceback is in {log_fault(error, what)}"


@contextmanager
def faults_named(path: object) -> Iterator[None]:
    """Turn every unforeseen error of a reader into a VolumeError of one line that names the file and the log.

    Args:
        path: what is read.

    Raises: VolumeError; errors of this package and lack of memory pass through.
    """
    try:
        yield
    except (FedFactoryError, MemoryError):
        raise
    except Exception as error:  # readers of foreign formats raise whatever they like
        raise VolumeError(unforeseen(error, path)) from error


def _state_folder() -> Path:
    given = os.environ.get("XDG_STATE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".local" / "state") / "fedfactory"
