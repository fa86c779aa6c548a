"""Seconds until a command answers: help, wrong words, missing files, and a small task; warm, and as on a fresh machine.

    uv run python benchmarks/start_time.py --out benchmarks/results/start_time.json

Every command runs in a process of its own, in turns, beside a Python that does nothing and one that imports PyTorch.
Wall time counts for a user; the processor's time is also given, for wall time grows when a machine has other work.

Fresh means: no bytecode of any package (an empty `PYTHONPYCACHEPREFIX` for every start). Where this process may, it
also asks the system to drop its page cache; the JSON file says so. A container's system need not follow.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedfactory.common.files import write_json
from measuring import machine
from round_overhead import make_volumes

DROP_CACHES = Path("/proc/sys/vm/drop_caches")
PROGRAM = "from fedfactory.cli import main; main()"
# Name: (arguments of Python, exit code).
COMMANDS = {
    "python alone": (["-c", "pass"], 0),
    "python that imports PyTorch": (["-c", "import torch"], 0),
    "--help": (["-c", PROGRAM, "--help"], 0),
    "methods": (["-c", PROGRAM, "methods"], 0),
    "wrong option": (["-c", PROGRAM, "segment", "--nonsense"], 2),
    "missing image of segment": (["-c", PROGRAM, "segment", "no.nii", "--model", "model", "--out", "y"], 2),
    "missing store of adapt": (["-c", PROGRAM, "adapt", "--store", "no", "--factory", "model", "--out", "y"], 2),
    "missing folder of prepare": (["-c", PROGRAM, "prepare", "no", "--out", "y", "--domain", "a"], 2),
    "missing researcher of train": (
        ["-c", PROGRAM, "train", "--researcher", "no", "--tag", "abc", "--domains", "a,b", "--out", "y"],
        2,
    ),
}
SMALL_TASK = "prepare 2 small volumes"
numbers = itertools.count()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="warm starts of each command")
    parser.add_argument("--fresh-repeats", type=int, default=2, help="starts without bytecode; they are slow")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model").write_bytes(b"is there")
        make_volumes(folder / "volumes")
        measure(folder, fresh=False, repeats=1)  # bytecode and page cache
        warm = measure(folder, fresh=False, repeats=arguments.repeats)
        fresh = measure(folder, fresh=True, repeats=arguments.fresh_repeats)
    rows = {
        command: {**warm[command], **{f"fresh_{key}": value for key, value in fresh[command].items()}}
        for command in warm
    }
    for command, row in rows.items():
        print(f"{command:<30}", *(f"{key} {value:.2f}" for key, value in row.items()))
    content = {
        "machine": machine("cpu"),
        "load_average": os.getloadavg()[0],
        "repeats": arguments.repeats,
        "fresh_repeats": arguments.fresh_repeats,
        "fresh_starts": {"bytecode": "none", "asked_to_drop_page_cache": can_drop_caches()},
        "seconds": rows,
    }
    if arguments.out:
        write_json(arguments.out, content)


def measure(folder: Path, *, fresh: bool, repeats: int) -> dict[str, dict[str, float]]:
    """By command, the median seconds of wall time and of the processor's time."""
    found: dict[str, list[tuple[float, float]]] = {}
    for _ in range(repeats):
        for name, (words, code) in {**COMMANDS, SMALL_TASK: small_task()}.items():
            found.setdefault(name, []).append(start(words, code, folder, fresh=fresh))
    return {
        name: {"wall": statistics.median(w for w, _ in times), "processor": statistics.median(p for _, p in times)}
        for name, times in found.items()
    }


def small_task() -> tuple[list[str], int]:
    """A task of a command whose libraries have to be imported; each store has a new name."""
    words = ["--domain", "a", "--size", "64", "--z-bins", "4", "--workers", "1", "--label-kind", "none"]
    return ["-c", PROGRAM, "prepare", "volumes", "--out", f"store{next(numbers)}", *words], 0


def start(words: list[str], code: int, folder: Path, *, fresh: bool) -> tuple[float, float]:
    """Seconds of wall time and of the processor's time of one process, which must end with this exit code."""
    with tempfile.TemporaryDirectory() as bytecode:
        environment = {**os.environ, **({"PYTHONPYCACHEPREFIX": bytecode} if fresh else {})}
        if fresh and can_drop_caches():
            os.sync()
            DROP_CACHES.write_text("1")
        began = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != code:
        raise SystemExit(f"{words} ended with {process.returncode}, not {code}")
    return wall, usage.ru_utime + usage.ru_stime


def can_drop_caches() -> bool:
    """Whether this process may empty the page cache, which only an administrator of the whole machine may."""
    return os.access(DROP_CACHES, os.W_OK)


if __name__ == "__main__":
    main()
