"""Speed and peak memory of `generate_volumes`, compared with the published way of drawing in the same run.

    uv run python benchmarks/synthesis.py --out benchmarks/results/synthesis_cpu.json

Both draw with the same published generator, label with the same five branches and write a file per slice. The published
way encodes every slice again and reads five checkpoints for every small batch (`published_synthesis.py`). Its volumes
take long, so fewer of them are drawn, and the rates are compared. Ours is measured with all branches and with one in
their place, as `fedfactory label --distil` trains it, each in float32 and in bfloat16, and part by part on one core.
First, the labels of equal features are compared. The weights are untrained, because speed does not depend on them; how
far labels agree, which does, is measured by `distilled_labels.py`. Each way has a process of its own. No data are
needed. This takes about 9 minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from factory_step import configuration
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.engine.training_plan import DataFacts, plan_training
from fedfactory.adaptation.generate_volumes import Drawing, generate_volumes
from fedfactory.adaptation.labelled_factory import LabelledFactory, LabelledFactoryCard
from fedfactory.adaptation.labelled_slices import LabelAgreement
from fedfactory.adaptation.networks.label_branch import BranchEnsemble, LabelBranch
from fedfactory.adaptation.networks.translator_network import SOURCE, EncoderConfig, Translator
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.adaptation.volume_formats import WRITERS, SyntheticVolume
from fedfactory.common.files import write_json
from fedfactory.generative import Factory, TrainedFactory
from fedfactory.generative.networks.generator import Generator, Synthesis
from fedfactory.generative.synthesis import group_size, synthesise_volume
from fedfactory.imaging.slice_format import SliceFormat
from measuring import in_own_process, interleaved, machine, peak_resident_mib
from plain_twin import make_plain
from published_synthesis import PublishedSynthesis

SEED, MEMBERS, CLASSES = 0, 5, 3
VARIANTS = {  # name: which branches, in which precision
    "ensemble": ("ensemble", "float32"),
    "ensemble_bfloat16": ("ensemble", "bfloat16"),
    "distilled": ("distilled", "float32"),
    "distilled_bfloat16": ("distilled", "bfloat16"),
}
REPEATS = 15  # of every part
DOMAIN = "a"  # the first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--limit", type=int, default=64, help="widest layer; the published width is 512")
    parser.add_argument("--slices-per-bin", type=int, default=10)
    parser.add_argument("--batch", type=int, default=4, help="bins and slices at once, of the published way")
    parser.add_argument("--volumes", type=int, default=10, help="of each variant of ours")
    parser.add_argument("--published-volumes", type=int, default=1)
    parser.add_argument("--few-volumes", type=int, default=2, help="to see whether memory grows with their number")
    parser.add_argument("--out", type=Path, help="JSON file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        content = measure(arguments, Path(folder))
    if arguments.out:
        write_json(arguments.out, content)
    published = content["published"]
    print(f"equal labels for equal features: {content['equal_labels']}")
    for name, ours in content["ours"].items():
        print(
            f"{name}: {ours['volumes_per_second']:.3f} volumes/s, {ours['peak_mib']:.0f} MiB, {ours['ratio']:.1f} times"
        )
    print(f"few volumes: {content['ours_few']['peak_mib']:.0f} MiB")
    print(f"published {published['volumes_per_second']:.5f} volumes/s, {published['peak_mib']:.0f} MiB")
    for name, seconds in content["seconds_by_part"].items():
        print(f"{name}: {seconds:.2f} s of a volume on one core")


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compare the labels, and measure both ways of drawing in processes of their own."""
    write_members(arguments, folder)
    equal = equal_labels(arguments, folder)
    common = {"arguments": arguments, "folder": folder}
    few = in_own_process(draw_ours, **common, volumes=arguments.few_volumes, variant="ensemble")
    ours = {name: in_own_process(draw_ours, **common, volumes=arguments.volumes, variant=name) for name in VARIANTS}
    published = in_own_process(draw_published, **common)
    for result in ours.values():
        result["ratio"] = result["volumes_per_second"] / published["volumes_per_second"]
    config = configuration(arguments.size, arguments.batch, arguments.limit)
    return {
        "machine": machine("cpu"),
        "seed": SEED,
        "size": arguments.size,
        "z_bins": config.z_bins,
        "slices_per_bin": arguments.slices_per_bin,
        "widest_layer": arguments.limit,
        "members": MEMBERS,
        "published_batch": arguments.batch,
        "equal_labels": equal,
        "ours": ours,
        "ours_few": few,
        "published": published,
        "seconds_by_part": in_own_process(time_parts, **common),
    }


def write_members(arguments: argparse.Namespace, folder: Path) -> None:
    """Write the same generator and label branches twice: as a labelled factory, and as five published checkpoints."""
    torch.manual_seed(SEED)
    config = configuration(arguments.size, arguments.batch, arguments.limit)
    factory = Factory(config)
    network = translator(arguments, factory)
    network.phi.fill_(1.0)
    branches = []
    for number in range(MEMBERS):
        branch = LabelBranch.for_generator(factory.generator, CLASSES).eval()
        network.heads[SOURCE].load_state_dict(branch.state_dict())
        torch.save(network.state_dict(), folder / f"member{number}.pt")
        branches.append(branch)
    fmt = SliceFormat(size=arguments.size, spacing=1.0, window=(-1.0, 1.0), z_bins=config.z_bins)
    plan = plan_training(DataFacts(size=arguments.size, extent=None, classes=CLASSES), SegmenterConfig())
    robust = Segmenter(PlannedNetwork(plan), fmt, SegmenterCard(classes=CLASSES, network=plan.network, plan=plan))
    card = LabelledFactoryCard(
        classes=CLASSES,
        labelled_domain=DOMAIN,
        agreement=0.0,
        validated_on="nothing",
        labels_from=dict.fromkeys(config.domains, "own"),
        distilled=LabelAgreement(equal_pixels=0.0, dice=(0.0,) * (CLASSES - 1), slices=0),
    )
    distilled = LabelBranch.for_generator(factory.generator, CLASSES).eval()
    trained = TrainedFactory(generator=factory.generator, latest={}, spacing=1.0, height=145.0)
    LabelledFactory(trained, branches, card, robust, distilled=distilled).save(folder / "labelled.safetensors")


def translator(arguments: argparse.Namespace, factory: Factory) -> Translator:
    """A translator that is narrowed by the same factor as the generator."""
    width = max(1, 64 * arguments.limit // 512)
    network = Translator(factory.generator, CLASSES, (0, 1), config=EncoderConfig(width=width)).eval()
    return network.requires_grad_(False)


def published(arguments: argparse.Namespace, folder: Path) -> PublishedSynthesis:
    """The published program with the five checkpoints in `folder`."""
    labelled = LabelledFactory.load(folder / "labelled.safetensors")
    torch.manual_seed(SEED)
    factory = Factory(labelled.factory.config)
    factory.generator.load_state_dict(labelled.factory.generator.state_dict())
    plain = make_plain(factory)
    files = [folder / f"member{number}.pt" for number in range(MEMBERS)]
    return PublishedSynthesis(plain.generator.eval(), translator(arguments, plain), files, domain=0)


@torch.no_grad()
def equal_labels(arguments: argparse.Namespace, folder: Path) -> bool:
    """Whether our labels and the published ones are equal for the same features."""
    labelled, other = LabelledFactory.load(folder / "labelled.safetensors"), published(arguments, folder)
    z, bins = torch.randn(4, labelled.factory.config.latent_dim), torch.arange(4)
    style = labelled.factory.generator.style_of(z, bins, torch.zeros(4, dtype=torch.long))
    synthesis: Synthesis = labelled.factory.generator.synthesise(style, labelled.factory.generator.fixed_noise())
    return torch.equal(labelled.labels(synthesis).long(), other.labels_of(synthesis))


def draw_ours(*, arguments: argparse.Namespace, folder: Path, volumes: int, variant: str, sender: Connection) -> None:
    """Draw labelled volumes with the package and send the time and the memory."""
    label_with, precision = VARIANTS[variant]
    drawing = Drawing(
        domain=DOMAIN, volumes=volumes, slices_per_bin=arguments.slices_per_bin, label_with=label_with,
        precision=precision, seed=SEED,
    )  # fmt: skip
    out = Path(tempfile.mkdtemp(dir=folder)) / variant
    start = time.perf_counter()
    generate_volumes(folder / "labelled.safetensors", out, drawing, layout="slices", workers=os.cpu_count())
    send(sender, volumes, time.perf_counter() - start)


def draw_published(*, arguments: argparse.Namespace, folder: Path, sender: Connection) -> None:
    """Draw labelled volumes in the published way and send the time and the memory."""
    program, out = published(arguments, folder), folder / "published"
    out.mkdir()
    start = time.perf_counter()
    for number in range(arguments.published_volumes):
        program.volume(
            out, number, z_depth=program.generator.config.z_bins, slices_in_one_z=arguments.slices_per_bin,
            batch_size=arguments.batch,
        )  # fmt: skip
    send(sender, arguments.published_volumes, time.perf_counter() - start)


def time_parts(*, arguments: argparse.Namespace, folder: Path, sender: Connection) -> None:
    """Send the seconds that every part of a volume takes on one core."""
    torch.set_num_threads(1)
    labelled = LabelledFactory.load(folder / "labelled.safetensors")
    config, generator = labelled.factory.config, labelled.factory.generator
    ordered = copy.deepcopy(generator).to(memory_format=torch.channels_last)
    size, slices = group_size(config, torch.device("cpu")), (config.z_bins - 1) * arguments.slices_per_bin
    heights = torch.linspace(0, config.z_bins - 1, size)

    def group(network: Generator) -> Synthesis:
        return next(synthesise_volume(network, heights, domain=0, rng=torch.Generator().manual_seed(SEED)))

    made = group(ordered)
    parts: dict[str, Callable[[], Any]] = {
        "generator": lambda: group(ordered),
        "generator_channels_first": lambda: group(generator),
    }
    for name, (label_with, precision) in VARIANTS.items():
        branches = labelled.branches if label_with == "ensemble" else [labelled.distilled]
        parts[f"labels_{name}"] = functools.partial(BranchEnsemble(branches, precision=precision).labels, made)
    images, labels = made.image.clamp(-1, 1).numpy(), parts["labels_ensemble"]().numpy()
    volume = SyntheticVolume(number=0, images=images, labels=labels, affine=np.eye(4), classes=CLASSES)
    parts["writing"] = lambda: WRITERS["slices"](folder, volume)
    for run in parts.values():
        run()
    seconds = interleaved(parts, repeats=REPEATS, device="cpu")
    sender.send({name: value * slices / size for name, value in seconds.items()})


def send(sender: Connection, volumes: int, seconds: float) -> None:
    """Send the rate and the peak memory (MiB) of this process."""
    sender.send(
        {
            "volumes": volumes,
            "seconds": seconds,
            "volumes_per_second": volumes / seconds,
            "peak_mib": peak_resident_mib(),
        }
    )


if __name__ == "__main__":
    main()
