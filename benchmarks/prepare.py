"""Speed and peak memory of `fedfactory prepare`, compared with a plain single-process implementation in the same run.

    uv run python benchmarks/prepare.py --out benchmarks/results/prepare_cpu.json

The volumes are generated: a smooth random body with labels, in noise, 256 x 256 x 30 voxels of 16 bits, with different
spacings, so that all of them are resampled. Each run has a process of its own, and only the preparation is timed, not
the imports. The slices under the published rules are compared with those of the plain implementation. No data are
needed. This takes about 8 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import nibabel as nib
import numpy as np
from fedfactory.common.files import write_json
from fedfactory.imaging.accounting.account import account_for
from fedfactory.imaging.cases import find_cases
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from measuring import in_own_process, machine, peak_resident_mib
from plain_preparation import prepare_plainly
from scipy import ndimage

SHAPE, SIZE, Z_BINS, SEED = (256, 256, 30), 256, 29, 0
VARIANTS = ("twin", "published", "default")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volumes", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for count in (arguments.volumes // 4, arguments.volumes):
            make_site(folder / str(count), count)
        runs = {variant: [] for variant in VARIANTS}
        for _ in range(arguments.repeats):  # in turns, so that other load on the machine affects all alike
            for variant in VARIANTS:
                runs[variant].append(measure(folder, variant, count=arguments.volumes, workers=arguments.workers))
        difference = compare(folder, arguments.volumes, arguments.workers)
        quarter = {"count": arguments.volumes // 4, "workers": arguments.workers}
        accounting = accounting_seconds(folder / str(arguments.volumes))
        fewer = {variant: measure(folder, variant, **quarter)["peak_mib"] for variant in VARIANTS}
    seconds = {variant: statistics.median(run["seconds"] for run in repeats) for variant, repeats in runs.items()}
    rows = {
        variant: {
            "seconds": seconds[variant],
            "slices_per_second": runs[variant][0]["slices"] / seconds[variant],
            "peak_mib": max(run["peak_mib"] for run in runs[variant]),
            "peak_mib_of_a_quarter_of_the_volumes": fewer[variant],
            "ratio": runs[variant][0]["slices"] / seconds[variant] / (runs["twin"][0]["slices"] / seconds["twin"]),
        }
        for variant in VARIANTS
    }
    content = {
        "machine": machine("cpu"),
        "seed": SEED,
        "volumes": arguments.volumes,
        "shape": SHAPE,
        "workers": arguments.workers,
        "variants": rows,
        "published_against_twin": difference,
        "accounting": {"seconds": accounting, "share_of_default": accounting / seconds["default"]},
    }
    if arguments.out:
        write_json(arguments.out, content)
    print(json.dumps({"variants": rows, "published_against_twin": difference}, indent=1))


def make_site(folder: Path, count: int) -> None:
    """Write `count` volumes with labels; each has a spacing of its own."""
    rng = np.random.default_rng(SEED)
    body = ndimage.zoom(rng.normal(0, 1, (8, 8, 5)), np.array(SHAPE) / (8, 8, 5), order=3)
    x, y = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE[:2]), indexing="ij")
    inside = (x**2 + y**2 < 0.8)[..., None] * np.ones(SHAPE[2])
    for number in range(count):
        clean = inside * (600 + 200 * np.roll(body, 7 * number, axis=0))
        label = (inside * ((clean > 650).astype(int) + (clean > 850))).astype(np.uint8)
        image = (clean + np.abs(rng.normal(0, 15, SHAPE))).astype(np.int16)
        spacing = rng.uniform(0.85, 1.15) * np.array([1, 1, 4 * rng.uniform(0.9, 1.1)])
        for kind, data in (("image", image), ("label", label)):
            path = folder / f"case{number:03d}" / kind
            path.mkdir(parents=True)
            nib.save(nib.Nifti1Image(data, np.diag([*spacing, 1.0])), path / "v.nii.gz")


def measure(folder: Path, variant: str, *, count: int, workers: int) -> dict:
    """`run` in a new process."""
    return in_own_process(run, folder=folder, count=count, variant=variant, workers=workers)


def run(*, folder: Path, count: int, variant: str, workers: int, sender: Connection) -> None:
    """Prepare `count` volumes and send the seconds, the number of slices and the peak memory (MiB)."""
    source, out = folder / str(count), folder / "result"
    before, started = peak_resident_mib(), time.perf_counter()
    if variant == "twin":
        slices = prepare_plainly(source, out, size=SIZE, z_bins=Z_BINS)
    else:
        slices = len(prepare(source, out, settings(variant), workers=workers).store)
    seconds = time.perf_counter() - started
    sender.send({"seconds": seconds, "slices": slices, "peak_mib": peak_resident_mib(), "imports_mib": before})
    shutil.rmtree(out)


def accounting_seconds(folder: Path) -> float:
    """Seconds that the accounting of all entries of the folder takes, a part of every run but the twin's."""
    found = find_cases(folder)
    started = time.perf_counter()
    account_for(folder, found)
    return time.perf_counter() - started


def settings(variant: str) -> PrepareConfig:
    """The settings of a variant: our defaults, or the published rules."""
    config = PrepareConfig(domain="bench", size=SIZE, z_bins=Z_BINS, test_share=0)
    return config if variant == "default" else replace(config, compatibility="published", plane="stored")


def compare(folder: Path, count: int, workers: int) -> dict[str, float]:
    """Differences between our slices under the published rules and the twin's slices of the same volumes."""
    plain, ours = folder / "plain", folder / "ours"
    total = prepare_plainly(folder / str(count), plain, size=SIZE, z_bins=Z_BINS)
    prepare(folder / str(count), ours, settings("published"), workers=workers)
    store = SliceStore(ours)
    assert len(store) == total
    largest, squares, labels = 0.0, 0.0, 0
    for case in store.cases:
        for number in range(case.count):
            expected = np.load(plain / f"{case.name}_slice{number:03d}.npy")[..., 0]
            difference = np.abs(expected - store.images[case.first + number].astype(np.float32))
            largest, squares = max(largest, float(difference.max())), squares + float((difference**2).mean())
            mask = np.load(next(plain.glob(f"{case.name}_mask{number:03d}_*.npy"))).argmax(2)
            labels += int((mask != store.labels[case.first + number]).sum())
    return {
        "largest_difference": largest,
        "root_mean_square_difference": float(np.sqrt(squares / total)),
        "share_of_differing_labels": labels / store.labels.size,
    }


if __name__ == "__main__":
    main()
