"""How synthetic volumes are written: NIfTI pairs, an nnU-Net raw data set, or slices as the published program had."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ..common.files import write_json
from ..imaging.volume_files import write_volume
from ..imaging.volumes import Volume

Writer = Callable[[Path, int, np.ndarray, np.ndarray, np.ndarray, int], None]


def name_of(number: int) -> str:
    """Of a synthetic subject, from 0."""
    return f"synthetic_{number:04d}"


def write_pair(
    folder: Path, number: int, images: np.ndarray, labels: np.ndarray, affine: np.ndarray, classes: int
) -> None:
    """`<name>/{image,label}/<name>.nii.gz`, Fed-BioMed's medical-folder layout. Arrays are (N, S, S)."""
    name = name_of(number)
    write_volume(folder / name / "image" / f"{name}.nii.gz", _volume(images, affine))
    write_volume(folder / name / "label" / f"{name}.nii.gz", _volume(labels, affine))


def write_nnunet(
    folder: Path, number: int, images: np.ndarray, labels: np.ndarray, affine: np.ndarray, classes: int
) -> None:
    """`imagesTr/<name>_0000.nii.gz` and `labelsTr/<name>.nii.gz`."""
    name = name_of(number)
    write_volume(folder / "imagesTr" / f"{name}_0000.nii.gz", _volume(images, affine))
    write_volume(folder / "labelsTr" / f"{name}.nii.gz", _volume(labels, affine))


def write_slices(
    folder: Path, number: int, images: np.ndarray, labels: np.ndarray, affine: np.ndarray, classes: int
) -> None:
    """`fakeVolume<n>_slice<NNN>.npz` with the published fields as plain arrays: no pickle."""
    for position, record in enumerate(_records(images, labels, classes)):
        np.savez(folder / f"fakeVolume{number}_slice{position:03d}.npz", **record)


def write_legacy_slices(
    folder: Path, number: int, images: np.ndarray, labels: np.ndarray, affine: np.ndarray, classes: int
) -> None:
    """`fakeVolume<n>_slice<NNN>.npy` as the published program wrote and reads them: pickled dictionaries."""
    for position, record in enumerate(_records(images, labels, classes)):
        path = folder / f"fakeVolume{number}_slice{position:03d}.npy"
        np.save(path, np.array({**record, "weight": None}, dtype=object))


def nnunet_description(domain: str, volumes: int, classes: int) -> dict[str, Any]:
    """`dataset.json` of nnU-Net version 2."""
    labels = {"background": 0, **{f"class {value}": value for value in range(1, classes)}}
    return {
        "channel_names": {"0": domain},
        "labels": labels,
        "numTraining": volumes,
        "file_ending": ".nii.gz",
        "name": f"synthetic {domain}",
        "description": "synthetic, made by fedfactory; not patients",
    }


WRITERS: dict[str, Writer] = {
    "nifti": write_pair,
    "nnunet": write_nnunet,
    "slices": write_slices,
    "legacy-slices": write_legacy_slices,
}


def finish(folder: Path, layout: str, domain: str, volumes: int, classes: int) -> None:
    """What a layout needs besides its volumes."""
    if layout == "nnunet":
        write_json(folder / "dataset.json", nnunet_description(domain, volumes, classes))


def _volume(slices: np.ndarray, affine: np.ndarray) -> Volume:
    return Volume(np.ascontiguousarray(np.moveaxis(slices, 0, 2)), affine)


def _records(images: np.ndarray, labels: np.ndarray, classes: int) -> list[dict[str, np.ndarray]]:
    values = np.arange(classes)
    return [
        {"data": image[..., None].astype(np.float32), "mask": label[..., None] == values}
        for image, label in zip(images, labels, strict=True)
    ]
