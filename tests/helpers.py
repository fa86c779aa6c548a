"""Volumes, sites and networks for the tests, made on the spot."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import socket
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import fedfactory
import nibabel as nib
import numpy as np
import psutil
import torch
from fedfactory.adaptation.engine.planned_network import PlannedNetwork
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.engine.training_plan import TrainingPlan
from fedfactory.adaptation.labelled_factory import LabelledFactory, LabelledFactoryCard
from fedfactory.adaptation.labels.candidate_labels import SiteSlices, candidates_from_labels
from fedfactory.adaptation.labels.fixations import simulate_fixations
from fedfactory.adaptation.methods.interface.federated_method import FederatedMethod
from fedfactory.adaptation.methods.interface.method_config import MethodConfig
from fedfactory.adaptation.methods.interface.site_round import SiteRound
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.networks.label_branch import LabelBranch
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.generative import FactoryConfig, TrainedFactory
from fedfactory.imaging.images import VolumeImage
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.imaging.slice_format import SliceFormat
from fedfactory.imaging.slice_grid import SliceGrid
from fedfactory.imaging.volume_files import write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.connection.component import NODE, read_component
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.guarded_round import GuardedRound, begin
from fedfactory.node.site_facts import INTENSITIES, SiteFacts
from safetensors.torch import save_file

DOMAINS = ("bright", "dark")
TAG = "balls"
SITES = {"bright": "bright", "dark": "dark", "west": "dark"}  # nodes of the tests' federation, and their domains
CONFIG = MethodConfig(method="fedavg", classes=3, size=32, sites=3, rounds=4, updates=4, batch_size=4, width=4)
SMALL = {  # options with which a method is fast
    "fedicra": {"learnt_trees": True, "embedding": 4, "body_share": 0.5, "adaptive_from": 2},
    "hssf": {"public_slices": 12, "public_epochs": 1},
    "lssl": {"public_slices": 12, "public_epochs": 1},
    "cmc": {"modalities": ["ct", "mri"]},
}
SITE_SECRET = bytes(range(32))  # of a simulated node
PATIENT = "DOE_JANE"  # in the name of every case and store of the tests' federation
SHADES = np.array([[30, 40, 60], [220, 60, 40], [60, 200, 120]], np.uint8)  # of background and two classes


def ball_volume(shape=(20, 24, 8), radius=7.0, spacing=(3.0, 3.0, 5.0), seed=0) -> tuple[Volume, Volume]:
    """A bright ball (label 1) with a brighter core (label 2) in noise; image and label map."""
    rng = np.random.default_rng(seed)
    centre = (np.array(shape) - 1) / 2 + rng.uniform(-1, 1, 3)
    voxels = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    distance = np.linalg.norm((voxels - centre) * [1, 1, 1.5], axis=-1)
    label = (distance < radius).astype(np.uint8) + (distance < radius / 2)
    image = np.array([10.0, 60.0, 100.0], np.float32)[label] + rng.normal(0, 2, shape).astype(np.float32)
    return Volume(image, np.diag([*spacing, 1.0])), Volume(label.astype(np.uint8), np.diag([*spacing, 1.0]))


def site_facts(**changes) -> SiteFacts:
    """What a small site with three densely labelled slices announces."""
    values = {
        "version": fedfactory.__version__, "domain": "x", "size": 32, "z_bins": 4, "plane": "axial", "crop": "air",
        "compatibility": "none", "intensities": INTENSITIES, "slices": 3, "classes": 3, "label_kinds": {"dense": 3},
        "channels": 1, "colour": False,
    }  # fmt: skip
    return SiteFacts(**{**values, **changes})


def kernels_of(layer, w):
    """Kernels of a modulated convolution, sample by sample, as the paper defines them."""
    for style in layer.modulation(w):
        kernel = layer.weight / math.sqrt(layer.weight[0].numel()) * style[None, :, None, None]
        if layer.demodulate:
            kernel = kernel / (kernel.square().sum(dim=(1, 2, 3), keepdim=True) + 1e-8).sqrt()
        yield kernel


def figure(rows: int, columns: int) -> np.ndarray:
    """Labels (rows, columns) uint8 that no mirroring, turning or transposing leaves as they are."""
    y, x = np.meshgrid((np.arange(rows) + 0.5) / rows, (np.arange(columns) + 0.5) / columns, indexing="ij")
    labels = ((y > 0.1) & (y < 0.45) & (x > 0.1) & (x < 0.4)).astype(np.uint8)
    labels[(y > 0.55) & (y < 0.85) & (x > 0.3) & (x < 0.9)] = 2
    return labels


def image_of(*volumes: Volume | None) -> VolumeImage:
    """An image with these volumes as channels."""
    return VolumeImage(Path("image"), volumes)


def oriented(volume: Volume, codes: str) -> Volume:
    """The same anatomy in another axis order."""
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(codes))
    data = nib.orientations.apply_orientation(volume.data, change)
    return Volume(data, volume.affine @ nib.orientations.inv_ornt_aff(change, volume.data.shape))


def small_config(**changes) -> SegmenterConfig:
    """A segmenter of the smallest size that is trained in a moment."""
    values = {"network_size": "small", "width": 8, "updates": 3, "batch_size": 4, "rotation": 0.15, "mirror": True}
    return SegmenterConfig(**{**values, **changes})


def untrained_segmenter(network="dynunet", **changes) -> Segmenter:
    """A segmenter of three classes for slices of 16 px, of one channel unless the plan has more, with random weights.

    Args:
        network: one of NETWORKS.
        **changes: of its plan.
    """
    channels = changes.get("channels", 1)
    colour = changes.get("colour", False)
    fmt = SliceFormat(size=16, spacing=4.5, window=((-1.0, 2.0),) * channels, z_bins=4, colour=colour)
    given = {"window": 16, "widths": (8, 8, 8), "fold": 1, "classes": 3, "batch_size": 4, "updates": 1}
    if network.endswith("3d"):
        given |= {"slices": 8, "slice_strides": (1, 2, 2)}
    plan = TrainingPlan(network=network, **{**given, **changes})
    return Segmenter(PlannedNetwork(plan), fmt, SegmenterCard(classes=plan.classes, network=network, plan=plan))


def untrained_labelled_factory(factory: TrainedFactory, branch: LabelBranch) -> LabelledFactory:
    """A labelled factory of three classes with a single, untrained and unvalidated branch."""
    card = LabelledFactoryCard(
        classes=3,
        labelled_domain="bright",
        agreement=1.0,
        validated_on="nothing",
        labels_from=dict.fromkeys(factory.config.domains, "view"),
    )
    return LabelledFactory(factory, [branch], card, untrained_segmenter())


def write_site(folder, cases=3, **options) -> None:
    """Cases in the medical-folder layout."""
    for number in range(cases):
        image, label = ball_volume(seed=number, **options)
        write_volume(folder / f"case{number}" / "image" / "scan.nii.gz", image)
        write_volume(folder / f"case{number}" / "label" / "mask.nii.gz", label)


def fixate(folder: Path) -> None:
    """Replace the label maps that `write_site` wrote by simulated fixations."""
    rng = np.random.default_rng(0)
    for case in sorted(folder.iterdir()):
        label = np.asanyarray(nib.load(case / "label" / "mask.nii.gz").dataobj)
        with (case / "label" / "gaze.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["CURRENT_FIX_X", "CURRENT_FIX_Y", "SLICE", "CURRENT_FIX_DURATION"])
            for z in range(label.shape[2]):
                for row, column, ms in simulate_fixations(label[..., z] > 0, rng):
                    writer.writerow([(row + 0.5) / label.shape[0], (column + 0.5) / label.shape[1], z, ms])
        (case / "label" / "mask.nii.gz").unlink()


def write_dicom(
    folder: Path, volume: Volume, *, patient="DOE^JANE", uid="1.2.3.4", leave_out=(), description=""
) -> None:
    """Write a volume of whole numbers as a DICOM series, one file per slice."""
    import itk

    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    writer_io = itk.GDCMImageIO.New()
    writer_io.KeepOriginalUIDOn()
    for number in range(volume.data.shape[2]):
        if number in leave_out:
            continue
        image = itk.image_from_array(np.ascontiguousarray(volume.data[:, :, number : number + 1].T.astype(np.int16)))
        image.SetSpacing(spacing.tolist())
        image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / spacing)))
        image.SetOrigin((lps @ [0, 0, number, 1])[:3].tolist())
        header = image.GetMetaDataDictionary()
        header["0010|0010"], header["0010|0020"], header["0008|0060"] = patient, f"{patient}-7", "MR"
        header["0020|000d"], header["0020|000e"], header["0008|0018"] = "1.2.3", uid, f"{uid}.{number + 1}"
        header["0020|0013"] = str(number + 1)
        if description:
            header["0008|103e"] = description
        writer = itk.ImageFileWriter.New(Input=image, FileName=str(folder / f"{uid}.{number:03d}.dcm"))
        writer.SetImageIO(writer_io)
        writer.Update()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def with_head(config: FactoryConfig, head: str) -> FactoryConfig:
    """The same small factory with the published networks, which start at 4 x 4."""
    if head == config.head:
        return config
    return replace(config, head=head, start_size=4, channels=(config.channels[0], *config.channels))


CLIP_WIDTH = 12


def write_clip(folder: Path):
    """A small randomly initialised CLIP model in a folder, with its configuration, as open_clip reads it."""
    import open_clip

    config = {
        "embed_dim": CLIP_WIDTH,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config).eval()
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "weights.safetensors")
    return model


def train(federation, config, out, *extra) -> None:
    """`fedfactory train` with the nodes of a federation; raises FederationError if it fails."""
    path = federation.folder / f"{out.name}-config.json"
    path.write_text(json.dumps(config.to_dict()))
    words = ["train", "--researcher", federation.researcher, "--tag", TAG, "--config", path, "--out", out]
    words += ["--rounds", 3, "--updates-per-round", 3, "--node-timeout", 60, "--min-nodes", len(SITES), *extra]
    with federation.background(f"train-{out.name}", [str(word) for word in words], rounds=3):
        pass


def processes_of(folder) -> list[psutil.Process]:
    """Living processes that were started with `folder` in their command line or environment."""
    found = []
    for process in psutil.process_iter():
        try:
            text = " ".join(process.cmdline()) + " ".join(process.environ().values())
            if str(folder) in text and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def port_is_free(port) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", port)) != 0


def state_files(federation, domain) -> list[Path]:
    """The state files that a node wrote after each round, oldest first."""
    found = (federation.nodes[domain] / "var").rglob("optim_state_*")
    return sorted(found, key=lambda path: path.stat().st_mtime)


def squares(count=12, seed=0) -> tuple[np.ndarray, np.ndarray]:
    """Slices of 32 px with a square and a smaller square inside it, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((count, 32, 32), np.uint8)
    for label in labels:
        row, column = rng.integers(2, 14, 2)
        label[row : row + 14, column : column + 14] = 1
        label[row + 4 : row + 9, column + 4 : column + 9] = 2
    images = np.choose(labels, [-1.0, 0.0, 0.8]) + rng.normal(0, 0.05, labels.shape)
    return images.astype(np.float32), labels


def site(kind="dense", count=12, seed=0) -> SiteSlices:
    images, labels = squares(count, seed)
    candidates = candidates_from_labels(labels if kind == "dense" else np.full_like(labels, UNLABELLED), 3)
    return SiteSlices(images, candidates, np.array([kind] * count), 3)


def with_channels(data: SiteSlices, channels: int) -> SiteSlices:
    """Slices of one channel with further channels of another contrast, none of which another one predicts exactly."""
    rng = np.random.default_rng(channels)
    gains = np.linspace(1, -0.5, channels)[:, None, None]
    images = gains * data.images + rng.normal(0, 0.05, (len(data), channels, *data.images.shape[2:]))
    return replace(data, images=images.astype(np.float32))


def method_of(name, **changes) -> FederatedMethod:
    return make_method(replace(CONFIG, method=name, options=SMALL.get(name, {}), **changes))


def site_round_of(method, data, *, model=None, state=None, index=0, number=1) -> SiteRound:
    """A round at a site that has what any of the methods needs."""
    model = method.build() if model is None else model
    return SiteRound(
        model=model,
        optimizers=method.optimizers(model),
        data=data,
        site=index,
        number=number,
        state=method.new_state() if state is None else state,
        public=site(),
        modalities={"ct": data},
    )


def run_notebook(name: str, folder: Path, **settings: object) -> list[str]:
    """Execute a notebook of `examples/` in a kernel of its own, with its EXAMPLE_ settings; what its cells printed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(Path(__file__).parents[1] / "examples" / name, as_version=4)
    given = {f"EXAMPLE_{key.upper()}": str(value) for key, value in settings.items()}
    before = dict(os.environ)
    os.environ.update(given)
    os.environ.pop("FBM_RESEARCHER_COMPONENT_ROOT", None)  # the notebook opens its own component
    try:
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        os.environ.clear()
        os.environ.update(before)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return [output["text"] for output in outputs if output.output_type == "stream" and output.name == "stdout"]


def guarded(**policy) -> AbstractContextManager[GuardedRound]:
    """A round as a guarded node runs it: a policy with these changes, and a secret that is the same in every test."""
    return begin(GuardedRound(policy=Policy(**policy), secret=SITE_SECRET))


def plans_of(node) -> set[str]:
    """Names of the classes of the training plans that were sent to a node."""
    sources = [plan["training_plan"] for plan in read_component(node, NODE).records("TrainingPlans")]
    return set(re.findall(r"^class (\w+)\(", "\n".join(sources), re.MULTILINE))


def image_slices(grid: SliceGrid, volume: Volume) -> np.ndarray:
    """(slices, size, size) float32 of a volume on a grid; NaN outside the volume."""
    return grid.padded(grid.inner_image(volume)[:, None], np.nan)[:, 0]
