"""The tasks of the study of federated methods: real images of several sites, with weak labels made from dense ones.

A task has sites with dense labels in slice stores. What a site of a run may use of its labels is derived from them
here, for the training slices only: scribbles, points, blocks, boxes, the classes that an image shows, simulated
fixations, or nothing. The test part of every site is scored against its dense labels.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fedfactory.adaptation.labels.candidate_labels import (
    UNKNOWN,
    SiteSlices,
    candidates_from_boxes,
    candidates_from_labels,
    candidates_from_presence,
    candidates_of_all_structures,
)
from fedfactory.adaptation.labels.fixations import GazeConfig, graded_labels, simulate_fixations
from fedfactory.adaptation.labels.weak_labels import CONVERTERS
from fedfactory.imaging.cases import find_cases
from fedfactory.imaging.volume_files import read_volume, write_volume
from fedfactory.imaging.volumes import Volume
from fedfactory.node.site_data.training_slices import site_slices
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from fedfactory.node.store.slice_store import SliceStore
from scipy import ndimage

PICTURE_SIZE = 96  # pixels per side
HEART_SIZE, HEART_SIDE = 64, 160.0  # pixels per side, and mm around the middle of the scan, where the heart is
TWIN_ROTATION, TWIN_SHIFT = 20.0, 10.0  # of the misaligned second modality: degrees, pixels of the scan
GAMMA = 0.7  # of the inverted contrast, as site b of the cardiac data was made


@dataclass(frozen=True)
class Task:
    """Sites of one kind of image.

    Attributes:
        classes: number of label values, background included.
        sites: names of the stores of the sites, in order.
        colour: whether images are colour pictures.
        rotation: largest random angle of the augmentation, radians.
        mirror: whether slices are mirrored at random.
    """

    classes: int
    sites: tuple[str, ...]
    colour: bool = False
    rotation: float = np.pi
    mirror: bool = True


TASKS = {
    "polyp": Task(2, ("c1_paris", "c2_padova", "c3_aviano", "c5_oxford", "kvasir_norway"), colour=True),
    "breast": Task(2, ("busi", "busbra_logiq7", "breast_poland", "busbra_logiq5"), rotation=0.3),
    "heart": Task(4, ("a", "b", "c"), mirror=False),
}
FOLDERS = {"polyp": "polyp", "breast": "breast_us"}  # in the folder of pictures


def make_stores(pictures: Path, hearts: Path, work: Path) -> None:
    """Prepare the stores of all tasks that do not exist yet.

    Args:
        pictures: folder with a folder of each task and site: images, masks, train.txt, test.txt, groups.csv.
        hearts: folder with site_a, site_b, site_c, each with train and test.
        work: folder for the stores.
    """
    for task, folder in FOLDERS.items():
        for site in TASKS[task].sites:
            _make_picture_store(pictures / folder / site, store_path(work, task, site), site, TASKS[task])
    for site in TASKS["heart"].sites:
        make_heart_store(hearts / f"site_{site}", store_path(work, "heart", site), site)
    twin = work / "heart_a_inverted"
    if not twin.is_dir():
        make_twin(hearts / "site_a", twin)
    make_heart_store(twin, store_path(work, "heart", "a_inverted"), "a")


def store_path(work: Path, task: str, site: str) -> Path:
    """Folder of a site's store."""
    return work / f"{task}_{site}.store"


def training_slices(store: SliceStore, kind: str, classes: int, *, seed: int) -> SiteSlices:
    """The training slices of a densely labelled store with labels of another kind.

    Args:
        store: with dense labels.
        kind: "dense", "none", "image", "gaze", or one of `weak_labels.CONVERTERS`.
        classes: number of label values, background included.
        seed: of the weak labels.
    """
    dense = site_slices(store, classes)
    if kind == "dense":
        return dense
    labels = np.concatenate([store.labels[case.span] for case in store.cases if case.split == "train"])
    rng = np.random.default_rng(seed)
    certainty = None
    if kind == "none":
        found = np.full(dense.candidates.shape, UNKNOWN, dense.candidates.dtype)
    elif kind == "image":
        presence = np.stack([[(label == value).any() for value in range(1, classes)] for label in labels])
        found = candidates_from_presence(presence, labels.shape[-1], classes)
    elif kind == "gaze":
        found, certainty = _labels_of_gaze(store, dense.images, labels, seed=seed)
        found = candidates_of_all_structures(found, classes)
    elif kind == "box":
        found = np.stack([candidates_from_boxes(CONVERTERS[kind](label, rng), classes) for label in labels])
    else:
        found = candidates_from_labels(np.stack([CONVERTERS[kind](label, rng) for label in labels]), classes)
    return SiteSlices(dense.images, found, np.full(len(labels), kind), classes, dense.patients, certainty)


def _labels_of_gaze(
    store: SliceStore, images: np.ndarray, labels: np.ndarray, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Candidates and certainty (N, S, S) of simulated fixations, with a site's default settings; computed once."""
    file = store.path.with_name(f"{store.path.stem}_gaze_{seed}.npz")
    if not file.is_file():
        rng = np.random.default_rng(seed)
        graded = [
            graded_labels(simulate_fixations(label > 0, rng), image, GazeConfig())
            for image, label in zip(images, labels, strict=True)
        ]
        np.savez_compressed(file, candidates=[pair[0] for pair in graded], certainty=[pair[1] for pair in graded])
    with np.load(file) as found:
        return found["candidates"], found["certainty"]


def part(data: SiteSlices, chosen: np.ndarray) -> SiteSlices:
    """The slices for which `chosen` (N,) is true."""
    patients = None if data.patients is None else data.patients[chosen]
    return SiteSlices(data.images[chosen], data.candidates[chosen], data.kinds[chosen], data.classes, patients)


def without_labels(data: SiteSlices, labelled: np.ndarray) -> SiteSlices:
    """The same slices; only those for which `labelled` (N,) is true keep their labels."""
    candidates = np.where(labelled[:, None, None], data.candidates, np.array(UNKNOWN, data.candidates.dtype))
    kinds = np.where(labelled, data.kinds, "none")
    return SiteSlices(data.images, candidates, kinds, data.classes, data.patients)


def make_twin(source: Path, out: Path) -> None:
    """Copy a site's scans with inverted contrast, rotated and shifted: a second modality that is not aligned."""
    for name in ("train", "test"):
        for case in find_cases(source / name).cases:
            image, label = read_volume(case.channels[0]), read_volume(case.labels[0].path, integer=True)
            grey = image.data / max(float(image.data.max()), 1e-6)
            inverted = np.where(grey > 0.05, (1 - grey).clip(0) ** GAMMA, grey).astype(np.float32) * 1000
            folder = out / name / case.name
            write_volume(folder / "image" / "image.nii.gz", _moved(inverted, image, order=1))
            write_volume(folder / "label" / "label.nii.gz", _moved(label.data, label, order=0))


def _moved(data: np.ndarray, like: Volume, *, order: int) -> Volume:
    turned = ndimage.rotate(data, TWIN_ROTATION, axes=(0, 1), reshape=False, order=order, mode="constant")
    return Volume(ndimage.shift(turned, (TWIN_SHIFT, 0, 0), order=order).astype(data.dtype), like.affine)


def _make_picture_store(folder: Path, store: Path, site: str, task: Task) -> None:
    if (store / "store.json").is_file():
        return
    groups = _groups(folder / "groups.csv")
    for split in ("train", "test"):
        source = store.with_name(f"{store.stem}_{split}")
        _select(folder, source, (folder / f"{split}.txt").read_text().split())
        config = PrepareConfig(
            domain=site, size=PICTURE_SIZE, z_bins=1, content="pictures", label_kind="dense", classes=task.classes,
            crop="none", colour="colour" if task.colour else "grey", patients=groups, split=split,
        )  # fmt: skip
        prepare(source, store, config)
        shutil.rmtree(source)


def _select(folder: Path, out: Path, names: list[str]) -> None:
    """Copy images and masks with these names, without their endings."""
    wanted = set(names)
    for kind in ("images", "masks"):
        (out / kind).mkdir(parents=True)
        for path in (folder / kind).iterdir():
            if path.stem in wanted:
                shutil.copyfile(path, out / kind / path.name)


def _groups(table: Path) -> Mapping[str, str]:
    """Patient, or group of alike images, of each image by name."""
    with table.open(newline="", encoding="utf-8") as file:
        return {row["name"]: row["group"] for row in csv.DictReader(file)}


def make_heart_store(folder: Path, store: Path, site: str) -> None:
    """Prepare a cardiac site, a folder with train and test, as a window on the heart, unless the store exists."""
    if (store / "store.json").is_file():
        return
    for split in ("train", "test"):
        config = PrepareConfig(
            domain=site, size=HEART_SIZE, spacing=HEART_SIDE / HEART_SIZE, z_bins=6, patient_pattern=r"patient\d+",
            label_key="label", label_kind="dense", split=split,
        )  # fmt: skip
        prepare(folder / split, store, config)
