"""Rerun every result table of the documentation, stage by stage, and write the results page.

    uv run python benchmarks/study.py --data ../shared/data --work study
    uv run python benchmarks/study.py --small --work study-small          # eleven minutes on two cores
    uv run python benchmarks/study.py --page docs/results.md              # the page of what is in benchmarks/results

A stage is one of the scripts beside this one. Finished stages are not repeated, and most scripts go on within a stage
too, so that the same command continues after an interruption. Stages that need data which --data does not hold are left
out and named. Where a GPU is, those scripts that can use one do. The full study takes about 16 hours on two cores: the
sum of its stages' times, which were run one by one.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from results_page import page

HERE = Path(__file__).parent
SMALL_BRAINS = ["--variants", "default", "--seeds", "0"]
SHORT = ["--seeds", "0", "--rounds", "2", "--updates", "3"]


@dataclass(frozen=True)
class Stage:
    """One script.

    Attributes:
        result: name of its JSON file. script: without `.py`. full, small: arguments; None leaves the stage out.
        minutes: on two cores, of the full stage. data: folder it needs. gpu: whether it has `--device cuda`.
        out: whether it takes --out; work: a shared folder of data and finished runs, and stages may need others'.
    """

    result: str
    script: str
    full: list[str]
    minutes: int
    small: list[str] | None = None
    data: str = ""
    gpu: bool = False
    work: str = ""


STAGES = [
    Stage("tree_filter_cpu", "tree_filter", [], 1, ["--sides", "64"]),
    Stage("generator_speed_cpu", "generator_speed", [], 3, ["--sizes", "64", "--repeats", "1"], gpu=True),
    Stage(
        "factory_step_cpu", "factory_step", ["--sizes", "32", "64"], 20, ["--sizes", "32", "--repeats", "1"], gpu=True
    ),
    Stage("synthesis_cpu", "synthesis", [], 6, ["--volumes", "1", "--size", "32"]),
    Stage("prepare_cpu", "prepare", [], 8, ["--volumes", "4", "--repeats", "1"]),
    Stage(
        "adaptation_cpu", "adaptation", ["--updates", "200"], 5, ["--networks", "unet", "--updates", "200"], gpu=True
    ),
    Stage("many_sites", "many_sites", [], 2),
    Stage(
        "sharing", "sharing", ["--seeds", "0", "1", "2", "3", "4", "10", "11", "12", "13", "14"], 480, work="brains"
    ),
    Stage("label_agreement", "label_agreement", [], 15, work="brains"),
    Stage("demo_seeds", "demo_seeds", [], 22, work="demos"),
    Stage(
        "sharing_cardiac", "sharing",
        ["--data", "cardiac", "--times", "3", "--variants", "default", "--seeds", "0", "1", "2"],
        50, data="cardiac", work="cardiac",
    ),
    Stage("cardiac_study", "cardiac_study", ["--seeds", "0", "1", "2"], 50, data="cardiac", work="cardiac"),
    Stage("segmentation_study", "segmentation_study", [], 130, SHORT, data="cardiac", work="methods"),
    Stage("heterogeneous_study", "heterogeneous_study", [], 130, SHORT, data="cardiac", work="methods"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds `cardiac`")
    parser.add_argument("--work", type=Path, help="folder for results, logs and what the stages keep")
    parser.add_argument("--small", action="store_true", help="short versions of those stages that have one")
    parser.add_argument("--only", nargs="+", choices=[stage.result for stage in STAGES], help="these stages alone")
    parser.add_argument("--page", type=Path, help="write the page of benchmarks/results and end")
    arguments = parser.parse_args()
    if arguments.page:
        arguments.page.write_text(page(HERE / "results"), encoding="utf-8")
        return
    if not arguments.work:
        parser.error("give --work")
    results = arguments.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    failed = []
    for stage in STAGES:
        if (arguments.only and stage.result not in arguments.only) or (arguments.small and stage.small is None):
            continue
        if stage.data and not (arguments.data and (arguments.data / stage.data).is_dir()):
            print(f"{stage.result}: left out, no {stage.data} under --data", flush=True)
        elif (results / f"{stage.result}.json").is_file():
            print(f"{stage.result}: finished earlier", flush=True)
        elif not run(stage, arguments, results):
            failed.append(stage.result)
        (arguments.work / "results.md").write_text(page(results), encoding="utf-8")
    demo = arguments.work / "demos" / "seed0"
    if (demo / "report.html").is_file():
        made = [sys.executable, str(HERE / "gallery.py"), str(demo), "--page", str(arguments.work / "gallery.md")]
        subprocess.run(made, check=True)
    print(f"{arguments.work / 'results.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


def run(stage: Stage, arguments: argparse.Namespace, results: Path) -> bool:
    """Whether the stage ended well; its output goes to a log."""
    words = list(stage.small if arguments.small else stage.full)
    if stage.data:
        words += ["--folder", str((arguments.data / stage.data).resolve())]
    if stage.work:
        words += ["--work", str((arguments.work / stage.work).resolve())]
    if stage.gpu and torch.cuda.is_available():
        words += ["--device", "cuda"]
    log = arguments.work / f"{stage.result}.log"
    print(f"{stage.result}: about {stage.minutes} min in full; {log}", flush=True)
    began = time.monotonic()
    command = [sys.executable, str(HERE / f"{stage.script}.py"), *words]
    with log.open("w") as file:
        done = subprocess.run(
            [*command, "--out", str((results / f"{stage.result}.json").resolve())],
            stdout=file,
            stderr=file,
            check=False,
        )
    said = "done" if done.returncode == 0 else f"failed with code {done.returncode}"
    print(f"{stage.result}: {said} after {(time.monotonic() - began) / 60:.1f} min", flush=True)
    times = arguments.work / "minutes.json"
    known = json.loads(times.read_text()) if times.is_file() else {}
    times.write_text(json.dumps({**known, stage.result: round((time.monotonic() - began) / 60, 1)}, indent=2))
    return done.returncode == 0


if __name__ == "__main__":
    main()
