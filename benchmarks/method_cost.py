"""What a round of each method costs a site, beside FedAvg: time, bytes and memory.

    uv run python benchmarks/method_cost.py --out benchmarks/results/method_cost.json

No data are needed: slices and labels are drawn at random, of the kinds that each method takes. Every method runs in a
process of its own, on one thread, FedAvg first and last. Seconds are those of the processor, the median of the rounds
after the first, for a site's part of a round; of FedICRA a round with adaptive aggregation, of HSSF and LSSL one with
self-training. Bytes are what a site sends in a round; memory is the largest of the process, less that before the model
was built.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedfactory.adaptation.labels.candidate_labels import (
    SiteSlices,
    candidates_from_boxes,
    candidates_from_labels,
    candidates_from_presence,
)
from fedfactory.adaptation.labels.weak_labels import CONVERTERS
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteRound
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.common.files import write_json
from measuring import in_own_process, machine, peak_resident_mib

SIZE, SLICES, CLASSES, BATCH, UPDATES, ROUNDS = 96, 48, 3, 12, 6, 4
# method: kind of labels, options
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("dense", {}),
    "local": ("dense", {}),
    "fedprox": ("dense", {}),
    "fedbn": ("dense", {}),
    "fedicra": ("scribble", {"adaptive_from": 2}),
    "fedmix": ("image", {"agreement": 0.0, "empty": "accept", "image_rule": "reference"}),
    "gaze": ("dense", {}),
    "hssf": ("none", {"warmup": 0.0, "min_assessor_accuracy": 0.0, "public_slices": SLICES}),
    "lssl": ("none", {"warmup": 0.0, "min_assessor_accuracy": 0.0, "public_slices": SLICES}),
    "cmc": ("dense", {"modalities": ["one", "other"]}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows = {name: in_own_process(cost, name=name) for name in METHODS}
    again = in_own_process(cost, name="fedavg")
    seconds = (rows["fedavg"]["seconds"] + again["seconds"]) / 2
    for name, row in rows.items():
        row["ratio"] = round(row["seconds"] / seconds, 2)
        print(f"{name:8s} {row}", flush=True)
    content = {
        "machine": machine("cpu"), "size": SIZE, "slices": SLICES, "batch_size": BATCH, "updates": UPDATES,
        "methods": rows,
        "fedavg_again": again["seconds"],
    }  # fmt: skip
    if arguments.out:
        write_json(arguments.out, content)


def cost(*, name: str, sender: Any) -> None:
    """Send the cost of a method's rounds."""
    torch.set_num_threads(1)
    kind, options = METHODS[name]
    method = make_method(
        MethodConfig(
            method=name, classes=CLASSES, size=SIZE, sites=3, rounds=ROUNDS, updates=UPDATES, batch_size=BATCH,
            options=options,
        )
    )  # fmt: skip
    data, public, other = slices(kind, 0), slices("dense", 1), slices("none", 2)
    before = peak_resident_mib()
    model = method.build()
    received = copy.deepcopy(model.state_dict())
    optimizers, state, seconds = method.optimizers(model), method.new_state(), []
    for number in range(1, ROUNDS + 1):
        began = time.process_time()
        method.train_round(
            SiteRound(
                model=model, optimizers=optimizers, data=data, site=0, number=number, state=state, public=public,
                modalities={"one": data, "other": other} if name == "cmc" else {},
            )
        )  # fmt: skip
        seconds.append(time.process_time() - began)
    local = method.local_parameters(model)
    sent = sum(value.nbytes for key, value in received.items() if key not in local)
    sender.send(
        {
            "seconds": round(statistics.median(seconds[1:]), 3),
            "bytes_sent": sent,
            "memory_mib": round(peak_resident_mib() - before),
            "weights": sum(value.numel() for value in model.parameters()),
        }
    )


def slices(
    kind: str, seed: int, *, size: int = SIZE, count: int = SLICES, classes: int = CLASSES, channels: int = 1
) -> SiteSlices:
    """Smooth random images (count, channels, size, size) whose brightest parts are labelled."""
    rng = np.random.default_rng(seed)
    rows, columns = np.indices((size, size))
    images, labels = [], []
    for _ in range(count):
        centre, radius = rng.uniform(size / 3, 2 * size / 3, 2), rng.uniform(size / 8, size / 5)
        distance = np.hypot(rows - centre[0], columns - centre[1])
        labels.append((1 * (distance < radius) + (classes > 2) * (distance < radius / 2)).astype(np.uint8))
        shown = 0.4 * labels[-1] - 0.5 + rng.normal(0, 0.1, (channels, *distance.shape))
        images.append(shown.clip(-1, 1))
    if kind == "none":
        found = np.zeros((count, size, size), candidates_from_labels(labels[0], classes).dtype)
    elif kind == "image":
        presence = np.stack([[(label == value).any() for value in range(1, classes)] for label in labels])
        found = candidates_from_presence(presence, size, classes)
    elif kind == "box":
        found = np.stack([candidates_from_boxes(CONVERTERS[kind](label, rng), classes) for label in labels])
    else:
        weak = labels if kind == "dense" else [CONVERTERS[kind](label, rng) for label in labels]
        found = candidates_from_labels(np.stack(weak), classes)
    return SiteSlices(np.stack(images).astype(np.float32), found, np.full(count, kind), classes)


if __name__ == "__main__":
    main()
