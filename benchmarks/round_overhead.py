"""Seconds and bytes of a round without its training, with real nodes: the published traffic compared with ours.

    uv run python benchmarks/round_overhead.py --million 25 --nodes 4 --out benchmarks/results/round_overhead.json

Published: generator, discriminator and moving average are sent, and the strategy and average of Fed-BioMed are used.
Ours: only the generator is sent; the replies are collected on disk and averaged site by site. A third variant also
sends the changes in half precision. All plans train a single, very small update, so that the overhead of the round
remains; the policies of these sites, unlike the default, allow that. No data are needed; the published variant needs
more than 6 GiB of memory at 25 million parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fedfactory.common.files import write_json
from fedfactory.demo.local_federation import LocalFederation
from fedfactory.generative import FactoryConfig
from fedfactory.node.policy.policy import Policy
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig

TAG = "overhead"
SIZE = 16  # pixels per side; small, so that a round is mostly communication
APPROVAL_TIMEOUT = 300  # seconds; on a busy machine the processes begin slowly
VARIANTS = ("ours", "ours_half", "published")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--million", type=float, default=25, help="parameters of the generator, about")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--researcher-of", help=argparse.SUPPRESS)  # runs this script as the process of the researcher
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.researcher_of:
        run_rounds(arguments)
        return
    from measuring import machine

    names = [f"site{k}" for k in range(arguments.nodes)]
    rows = {}
    with tempfile.TemporaryDirectory() as name, LocalFederation(Path(name), names) as federation:
        folders = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(folders)  # the first is that of published_traffic.py
        federation.begin()
        stores = make_stores(Path(name), names, SIZE)
        federation.wait_for("create")
        add = {n: federation.site_command("add", str(federation.nodes[n]), "--store", str(stores[n]), "--tag", TAG)
               for n in names}  # fmt: skip
        federation.run_together("add", add)
        for path in federation.nodes.values():
            Policy(least_batch=1, least_updates=1).save(path)
        federation.start_nodes()
        for variant in VARIANTS:
            out = Path(name) / f"{variant}.json"
            command = [sys.executable, __file__, "--researcher-of", variant, "--folder", name, "--out", str(out)]
            command += ["--million", str(arguments.million), "--nodes", str(arguments.nodes)]
            child = subprocess.Popen([*command, "--rounds", str(arguments.rounds)], env=federation._environment())
            approve = {
                n: federation.site_command(
                    "approve", str(federation.nodes[n]), "--yes", "--wait", str(APPROVAL_TIMEOUT)
                )
                for n in names
            }
            if variant != "ours_half":  # the plan is that of "ours"
                federation.run_together(f"approve-{variant}", approve)
            # The published variant may exhaust the memory; that the system kills the researcher is a result too.
            code = child.wait()
            rows[variant] = json.loads(out.read_text()) if code == 0 else {"exit_code": code}
            print(variant, rows[variant], flush=True)
    if arguments.out:
        write_json(arguments.out, {"machine": machine("cpu"), "nodes": arguments.nodes, "variants": rows})


def make_stores(folder: Path, names: list[str], size: int = 64) -> dict[str, Path]:
    """Paths of small slice stores of random images, by node; size: pixels per side."""
    stores = {}
    for seed, name in enumerate(names):
        make_volumes(folder / "volumes" / name, seed)
        config = PrepareConfig(domain=name, size=size, z_bins=4, validation_share=0, test_share=0)
        stores[name] = prepare(folder / "volumes" / name, folder / f"{name}.store", config).store.path
    return stores


def make_volumes(folder: Path, seed: int = 0) -> None:
    """Write two small volumes of random intensities."""
    import nibabel as nib
    import numpy as np

    rng = np.random.default_rng(seed)
    for case in range(2):
        path = folder / f"case{case}" / "image"
        path.mkdir(parents=True)
        data = rng.normal(100, 10, (64, 64, 8)).astype(np.float32)
        nib.save(nib.Nifti1Image(data, np.eye(4)), path / "v.nii.gz")


def configuration(domains: tuple[str, ...], million: float) -> FactoryConfig:
    """The published networks, with the width that gives about `million` million parameters."""
    width = int((million * 1e6 / 45) ** 0.5)  # five 3 x 3 layers of equal width hold nearly all of them
    return FactoryConfig.preset(
        "tiny", domains, image_size=SIZE, z_bins=4, head="image", start_size=4, channels=(width,) * 3, batch_size=1,
        latent_dim=64, r1_every=1000, path_every=1000,
    )  # fmt: skip


def run_rounds(arguments: argparse.Namespace) -> None:
    """Run one variant's experiment and write seconds and memory of a round, without its training."""
    from fedfactory.researcher.experiment import (
        factory_experiment,
        guarded,
        request_approval,
        run_round,
        use_researcher,
        wait_for_nodes,
    )

    use_researcher(arguments.folder / "researcher")
    wait_for_nodes(arguments.nodes, APPROVAL_TIMEOUT, TAG)
    from measuring import peak_resident_mib

    config = configuration(tuple(f"site{k}" for k in range(arguments.nodes)), arguments.million)
    if arguments.researcher_of == "published":
        from fedbiomed.researcher.aggregators import FedAverage
        from fedbiomed.researcher.federated_workflows import Experiment
        from published_traffic import EverythingTravels

        experiment = Experiment(
            tags=[TAG],
            training_plan_class=EverythingTravels,
            model_args={"factory": config.to_dict(), "seed": 0},
            training_args={"loader_args": {"batch_size": 1}, "num_updates": 1},
            aggregator=FedAverage(),
            round_limit=arguments.rounds,
            retain_full_history=False,
        )
        run_next_round = lambda: guarded(experiment.run_once, "round")  # noqa: E731
    else:
        transport = "float16" if arguments.researcher_of == "ours_half" else "float32"
        experiment = factory_experiment(
            config, tag=TAG, rounds=arguments.rounds, updates_per_round=1, transport=transport
        )
        run_next_round = lambda: run_round(experiment)  # noqa: E731
    request_approval(experiment, APPROVAL_TIMEOUT)
    seconds = []
    for number in range(arguments.rounds):
        started = time.monotonic()
        run_next_round()
        round_seconds = time.monotonic() - started
        replies = experiment.training_replies()[number]
        seconds.append(round_seconds - max(reply["timing"]["rtime_training"] for reply in replies.values()))
    plan = experiment.training_plan()
    down = sum(t.nbytes for t in plan.get_model_params(local_params=plan.local_params).values())
    up = down // 2 if arguments.researcher_of == "ours_half" else down
    parameters = sum(p.numel() for p in plan.model().generator.parameters())
    content = {
        "generator_parameters": parameters,
        "rounds": arguments.rounds,
        "seconds_beside_training": round(statistics.median(seconds[1:]), 2),
        "mib_to_each_site": round(down / 2**20, 1),
        "mib_from_each_site": round(up / 2**20, 1),
        "researcher_peak_mib": round(peak_resident_mib()),
    }
    write_json(arguments.out, content)


if __name__ == "__main__":
    main()
