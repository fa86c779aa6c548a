"""The memory that a site's policy estimates for a round of each method, beside what the round takes.

    uv run python benchmarks/request_memory.py --out benchmarks/results/request_memory.json

No data are needed: slices and labels are drawn at random, of the kind with which a method takes most. Every run has a
process of its own, on one thread: a small round first, for what is loaded at the first use, and then the round that is
measured, by the largest resident memory less that before it. The estimate must not be smaller.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteRound
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.common.files import write_json
from fedfactory.node.policy.request_kind import SEGMENTATION
from fedfactory.node.policy.request_size import size_of
from measuring import in_own_process, machine, peak_resident_mib
from method_cost import slices

BATCH, UPDATES, MIB_IN_GIB = 8, 2, 1024
PUBLIC = {"warmup": 0.0, "min_assessor_accuracy": 0.0, "min_slice_confidence": 0.0, "public_slices": 2 * BATCH}
# method: kind of labels, options with which a round takes the most
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("box", {}),
    "local": ("box", {}),
    "fedprox": ("box", {}),
    "fedbn": ("box", {}),
    "fedicra": ("box", {"adaptive_from": 2}),
    "fedmix": ("box", {"agreement": 0.0, "empty": "accept", "box_cover": 0.0}),
    "gaze": ("dense", {}),
    "hssf": ("none", PUBLIC),
    "lssl": ("none", PUBLIC),
    "cmc": ("dense", {"modalities": ["one", "other"]}),
}
EVERY = {"size": 96}  # settings with which every method is measured, before single ones with others
SINGLE: tuple[dict[str, Any], ...] = (
    {"method": "fedavg", "size": 32},
    {"method": "fedavg", "size": 64, "width": 32},
    {"method": "fedavg", "size": 64, "width": 32, "fold": 1},
    {"method": "fedavg", "size": 128},
    {"method": "fedavg", "size": 96, "classes": 16, "channels": 4},
    {"method": "fedavg", "size": 32, "width": 96},
    {"method": "fedicra", "size": 64, "options": {"learnt_trees": True, "embedding": 256}},
    {"method": "fedmix", "size": 64, "classes": 16, "count": 400},
    {"method": "gaze", "size": 64, "options": {"levels": 4, "window": 9}},
    {"method": "hssf", "size": 64, "fold": 1, "options": {"network": "segresnet-standard"}},
    {"method": "hssf", "size": 64, "options": {"held_out": 1.0, "public_slices": 80}},
    {"method": "lssl", "size": 64, "options": {"held_out": 0.0, "public_slices": 400, "public_epochs": 1}},
    {"method": "lssl", "size": 64, "classes": 16},
    {"method": "cmc", "size": 64, "options": {"views": "all", "descriptor": "block", "encoder_sharing": "separate"}},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    rows = []
    for settings in [*({"method": name, **EVERY} for name in METHODS), *SINGLE]:
        row = in_own_process(memory, settings=settings)
        rows.append({**settings, **row, "ratio": round(row["estimated_mib"] / row["measured_mib"], 2)})
        print(rows[-1], flush=True)
    if arguments.out:
        write_json(arguments.out, {"machine": machine("cpu"), "batch_size": BATCH, "updates": UPDATES, "rows": rows})


def memory(*, settings: dict[str, Any], sender: Any) -> None:
    """Send the estimate and the memory of one round, MiB."""
    torch.set_num_threads(1)
    count = settings.get("count", 2 * settings.get("batch_size", BATCH))
    config = config_of({name: value for name, value in settings.items() if name != "count"})
    small = config_of({"method": config.method, "size": 32, "width": 4, "batch_size": 2})
    prepared(small, count=4)()
    run = prepared(config, count=count)
    before = psutil.Process().memory_info().rss / 2**20
    run()
    measured = peak_resident_mib() - before
    estimated = size_of(SEGMENTATION, {"config": config.to_dict()}, slices=count).memory * MIB_IN_GIB
    sender.send({"estimated_mib": round(estimated), "measured_mib": round(measured)})


def config_of(settings: dict[str, Any]) -> MethodConfig:
    """The method with the settings and with the options by which it takes most memory."""
    options = {**METHODS[settings["method"]][1], **settings.get("options", {})}
    usual = {"classes": 3, "sites": 3, "rounds": 3, "updates": UPDATES, "batch_size": BATCH}
    return MethodConfig(**{**usual, **settings, "options": options})


def prepared(config: MethodConfig, *, count: int) -> Callable[[], None]:
    """Two rounds of a site with `count` slices, whose data are there already."""
    method, kind = make_method(config), METHODS[config.method][0]
    shape = {"size": config.size, "classes": config.classes, "channels": config.channels}
    data, other = slices(kind, 0, count=count, **shape), slices("none", 2, count=count, **shape)
    public = None
    if "public_slices" in config.options:
        public = slices("dense", 1, count=int(config.options["public_slices"]), **shape)

    def run() -> None:
        model = method.build()
        optimizers, state = method.optimizers(model), method.new_state()
        for number in (1, 2):
            method.train_round(
                SiteRound(
                    model=model, optimizers=optimizers, data=data, site=0, number=number, state=state, public=public,
                    modalities={"one": data, "other": other} if config.method == "cmc" else {},
                )
            )  # fmt: skip

    return run


if __name__ == "__main__":
    main()
