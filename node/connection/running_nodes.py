"""Nodes that run on this machine, and the environment that they were started with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MODULE = "fedbiomed.node.node_pm"  # what Fed-BioMed starts as a node's process
FOLDER_FLAG = "--config"


@dataclass(frozen=True, kw_only=True)
class RunningNode:
    """A node's process.

    Attributes:
        pid: number of the process.
        root: folder of the node.
        started: seconds since 1970.
        environment: as the process was started.
    """

    pid: int
    root: Path
    started: float
    environment: Mapping[str, str]


def running_nodes() -> list[RunningNode]:
    """Nodes of this machine, by process number. Those of other users cannot be seen and are not listed."""
    import psutil  # only now: no command line needs it to be read

    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            if MODULE not in words or FOLDER_FLAG not in words[:-1]:
                continue
            folder = Path(process.cwd(), words[words.index(FOLDER_FLAG) + 1]).resolve()
            started, environment = process.create_time(), process.environ()
        except (psutil.Error, OSError):  # it has ended, or it belongs to another user
            continue
        found.append(RunningNode(pid=process.pid, root=folder, started=started, environment=environment))
    return sorted(found, key=lambda node: node.pid)
