"""Speed and peak memory of `fedfactory prepare` on JPEG pictures, beside a plain loop in the same run.

    uv run python benchmarks/prepare_pictures.py --out benchmarks/results/prepare_pictures_cpu.json

The pictures are generated: smooth random colours with grain, 1000 x 1000 pixels, JPEG of quality 90. The plain loop
reads each with OpenCV and resizes it to 256 x 256; it checks nothing and writes nothing. Each run has a process of its
own, and only the work is timed, not the imports. No data are needed. This takes about 3 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import cv2
import numpy as np
from fedfactory.common.files import write_json
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from measuring import in_own_process, machine, peak_resident_mib

SIDE, SIZE, QUALITY, SEED = 1000, 256, 90, 0
VARIANTS = {"plain loop": 0, "one worker": 1, "two workers": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, counts = Path(name), (arguments.pictures // 4, arguments.pictures)
        for count in counts:
            make_site(folder / str(count), count)
        runs: dict[str, list[dict]] = {variant: [] for variant in VARIANTS}
        for _ in range(arguments.repeats):  # in turns, so that other load on the machine affects all alike
            for variant, workers in VARIANTS.items():
                runs[variant].append(in_own_process(run, folder=folder, count=counts[1], workers=workers))
        fewer = in_own_process(run, folder=folder, count=counts[0], workers=2)
    seconds = {variant: statistics.median(row["seconds"] for row in rows) for variant, rows in runs.items()}
    content = {
        "machine": machine("cpu"),
        "seed": SEED,
        "pictures": arguments.pictures,
        "side": SIDE,
        "size": SIZE,
        "variants": {
            variant: {
                "seconds": seconds[variant],
                "pictures_per_second": arguments.pictures / seconds[variant],
                "peak_mib": max(row["peak_mib"] for row in rows),
                "ratio": seconds["plain loop"] / seconds[variant],
            }
            for variant, rows in runs.items()
        },
        "peak_mib_of_a_quarter_of_the_pictures": fewer["peak_mib"],
    }
    if arguments.out:
        write_json(arguments.out, content)
    print(json.dumps({name: content[name] for name in content if name != "machine"}, indent=1))


def make_site(folder: Path, count: int) -> None:
    """Write `count` pictures."""
    rng = np.random.default_rng(SEED)
    colours = rng.uniform(0, 255, (40, 40, 3)).astype(np.float32)
    grain = rng.normal(0, 6, (2 * SIDE, SIDE, 1)).astype(np.float32)
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        smooth = cv2.resize(np.roll(colours, number, axis=0), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        picture = (smooth + grain[number % SIDE : number % SIDE + SIDE]).clip(0, 255).astype(np.uint8)
        cv2.imwrite(str(folder / "images" / f"p{number:05d}.jpg"), picture, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def run(*, folder: Path, count: int, workers: int, sender: Connection) -> None:
    """Read or prepare `count` pictures and send the seconds and the peak memory (MiB). Without workers: plain loop."""
    source, out = folder / str(count), folder / "result"
    started = time.perf_counter()
    if workers:
        config = PrepareConfig(domain="bench", size=SIZE, label_kind="none", test_share=0)
        prepare(source, out, config, workers=workers)
    else:
        for path in sorted((source / "images").iterdir()):
            cv2.resize(cv2.imread(str(path)), (SIZE, SIZE))
    sender.send({"seconds": time.perf_counter() - started, "peak_mib": peak_resident_mib()})
    shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
