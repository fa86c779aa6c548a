"""Seconds and memory of `fedfactory prepare` on real cases, beside an earlier version of this package in the same run.

    git worktree add /tmp/before d2f800f
    uv run python benchmarks/prepare_versions.py --before /tmp/before --source CASES --out prepare_versions.json

The cases of a folder (SUBJECT/image, SUBJECT/label) are copied under new names until there are as many as wanted, each
copy with voxels of its own: every voxel is moved by -1, 0 or 1. The versions prepare them in turns, each in a new
process, whose seconds, processor time and peak memory are those that the system tells. This takes about 5 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np

HERE = Path(__file__).resolve().parents[1]
SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the earlier version")
    parser.add_argument("--source", type=Path, required=True, help="folder of SUBJECT/image and SUBJECT/label")
    parser.add_argument("--cases", type=int, default=160)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    versions = {"before": arguments.before.resolve(), "now": HERE}
    runs: dict[str, list[dict[str, float]]] = {version: [] for version in versions}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_cases(arguments.source, folder / "cases", arguments.cases)
        for repeat in range(arguments.repeats + 1):
            for version, checkout in versions.items():  # in turns: other load on the machine affects all alike
                found = run(checkout, folder, workers=arguments.workers)
                if repeat:  # the first run compiles the modules and fills the caches
                    runs[version].append(found)
    content = {
        "cases": arguments.cases,
        "source": arguments.source.name,
        "seed": SEED,
        "workers": arguments.workers,
        "commits": {version: commit(checkout) for version, checkout in versions.items()},
        "cores": os.cpu_count(),
        "versions": {
            version: {key: statistics.median(one[key] for one in found) for key in found[0]}
            for version, found in runs.items()
        },
        "ratios": {
            key: statistics.median(
                before[key] / now[key] for before, now in zip(runs["before"], runs["now"], strict=True)
            )
            for key in runs["now"][0]
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=2))


def copy_cases(source: Path, out: Path, count: int) -> None:
    """Write `count` cases: those of `source`, again and again, with voxels moved by -1, 0 or 1."""
    rng = np.random.default_rng(SEED)
    subjects = sorted(path for path in source.iterdir() if (path / "image").is_dir() and (path / "label").is_dir())
    for number in range(count):
        subject = subjects[number % len(subjects)]
        for kind in ("image", "label"):
            volume = nib.load(next((subject / kind).iterdir()))
            data = np.asarray(volume.dataobj)
            if kind == "image":
                data = data.astype(np.int16) + rng.integers(-1, 2, data.shape, dtype=np.int16)
            path = out / f"p{number:03d}" / kind
            path.mkdir(parents=True)
            nib.save(nib.Nifti1Image(data, volume.affine), path / f"{kind}.nii.gz")


def run(checkout: Path, folder: Path, *, workers: int) -> dict[str, float]:
    """Prepare the cases by the package of a checkout. Returns: seconds, processor seconds and peak memory in MiB."""
    packages, out = folder / "packages", folder / "store"
    packages.mkdir(exist_ok=True)
    (packages / "fedfactory").unlink(missing_ok=True)
    (packages / "fedfactory").symlink_to(checkout)
    start = [sys.executable, "-c", "from fedfactory.cli import main; main()"]
    command = [*start, "prepare", folder / "cases", "--out", out, "--domain", "bench"]
    search = os.pathsep.join(filter(None, [str(packages), os.environ.get("PYTHONPATH")]))
    shown = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    started = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--workers", str(workers)], env={**os.environ, "PYTHONPATH": search}, cwd=folder, **shown
    )
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(f"{checkout}: prepare failed: {message.decode(errors='replace')[-2000:]}")
    shutil.rmtree(out)
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 2**10,  # the workers are threads of the process
    }


def commit(checkout: Path) -> str:
    """The commit of a checkout."""
    return subprocess.check_output(["git", "-C", checkout, "rev-parse", "--short", "HEAD"], text=True).strip()


if __name__ == "__main__":
    main()
