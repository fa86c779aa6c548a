"""All result tables of the documentation: run their benchmarks one after the other and write the results page.

    uv run python benchmarks/study.py --data ../shared/data --work study
    uv run python benchmarks/study.py --small --work study-small          # eleven minutes on two cores
    uv run python benchmarks/study.py --page docs/results.md              # the page of the files in benchmarks/results

A stage is a script in this folder. Finished stages are not repeated, and most scripts can resume within a stage, so the
same command continues after an interruption. Stages whose data --data does not hold are left out and named. If there is
a GPU, the scripts that can use it do. The full study takes about 16 hours on two cores (the sum of the times of its
stages, which were run separately).
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
    """A script with its arguments.

    Attributes:
        result: name of its JSON file, without `.json`.
        script: name of the script, without `.py`.
        full: arguments in the full study.
        minutes: duration of the full stage on two CPU cores.
        small: arguments in the small study; None leaves the stage out of it.
        data: folder below --data that the script needs; "" if it needs none.
        gpu: whether the script can use `--device cuda`.
        work: folder below --work for data and finished runs; stages with the same folder use each other's results.
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
        "shared_anatomy", "shared_anatomy", ["--seeds", *"01234", "10", "11", "12", "13", "14"], 480, work="brains",
    ),
    Stage("label_agreement", "label_agreement", [], 15, work="brains"),
    Stage("demo_seeds", "demo_seeds", [], 22, work="demos"),
    Stage("distilled_labels", "distilled_labels", [], 10, work="demos"),
    Stage(
        "shared_anatomy_cardiac", "shared_anatomy",
        ["--data", "cardiac", "--times", "3", "--variants", "default", "--seeds", "0", "1", "2"],
        50, data="cardiac", work="cardiac",
    ),
    Stage("cardiac_study", "cardiac_study", ["--seeds", "0", "1", "2"], 50, data="cardiac", work="cardiac"),
    Stage("box_labels", "box_labels", ["--updates", "200"], 5, ["--seeds", "0", "--updates", "20"]),
    Stage("box_labels_cardiac", "box_labels", ["--updates", "240"], 30, data="cardiac_dealt", work="methods"),
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds `cardiac`")
    parser.add_argument("--work", type=Path, help="folder for results, logs and the stages' data and finished runs")
    parser.add_argument(
        "--small",
        action="store_true",
        help="run the short versions of the stages; stages without a short version are left out",
    )
    parser.add_argument("--only", nargs="+", choices=[stage.result for stage in STAGES], help="run only these stages")
    parser.add_argument("--page", type=Path, help="write the page of benchmarks/results and run nothing")
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
        command = [sys.executable, str(HERE / "gallery.py"), str(demo), "--page", str(arguments.work / "gallery.md")]
        subprocess.run(command, check=True)
    print(f"{arguments.work / 'results.md'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    sys.exit(1 if failed else 0)


def run(stage: Stage, arguments: argparse.Namespace, results: Path) -> bool:
    """Run a stage with its output in a log; returns whether it succeeded."""
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
    outcome = "done" if done.returncode == 0 else f"failed with code {done.returncode}"
    print(f"{stage.result}: {outcome} after {(time.monotonic() - began) / 60:.1f} min", flush=True)
    times = arguments.work / "minutes.json"
    finished = json.loads(times.read_text()) if times.is_file() else {}
    times.write_text(json.dumps({**finished, stage.result: round((time.monotonic() - began) / 60, 1)}, indent=2))
    return done.returncode == 0


if __name__ == "__main__":
    main()
