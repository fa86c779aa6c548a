"""How synthetic volumes are written: NIfTI pairs, an nnU-Net raw data set, or slices as the published program had."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..common.files import write_json
from ..imaging.volume_files import write_volume
from ..imaging.volumes import Volume


@dataclass(frozen=True, kw_only=True)
class SyntheticVolume:
    """One labelled synthetic subject.

    Attributes:
        number: of the subject, from 0.
        images: (N, S, S) float32 in [-1, 1].
        labels: (N, S, S) uint8, below `classes`.
        affine: (4, 4), of the volume (S, S, N) in right-anterior-superior axes, millimetres.
        classes: number of label values, background included.
    """

    number: int
    images: np.ndarray
    labels: np.ndarray
    affine: np.ndarray
    classes: int

    @property
    def name(self) -> str:
        return name_of(self.number)


Writer = Callable[[Path, SyntheticVolume], None]


def name_of(number: int) -> str:
    """Of a synthetic subject, from 0."""
    return f"synthetic_{number:04d}"


def write_pair(folder: Path, volume: SyntheticVolume) -> None:
    """`<name>/{image,label}/<name>.nii.gz`, Fed-BioMed's medical-folder layout."""
    name = volume.name
    write_volume(folder / name / "image" / f"{name}.nii.gz", _volume(volume.images, volume.affine))
    write_volume(folder / name / "label" / f"{name}.nii.gz", _volume(volume.labels, volume.affine))


def write_nnunet(folder: Path, volume: SyntheticVolume) -> None:
    """`imagesTr/<name>_0000.nii.gz` and `labelsTr/<name>.nii.gz`."""
    name = volume.name
    write_volume(folder / "imagesTr" / f"{name}_0000.nii.gz", _volume(volume.images, volume.affine))
    write_volume(folder / "labelsTr" / f"{name}.nii.gz", _volume(volume.labels, volume.affine))


def write_slices(folder: Path, volume: SyntheticVolume) -> None:
    """`fakeVolume<n>_slice<NNN>.npz` with the published fields as plain arrays: no pickle."""
    for position, record in enumerate(_records(volume)):
        np.savez(folder / f"fakeVolume{volume.number}_slice{position:03d}.npz", **record)


def write_legacy_slices(folder: Path, volume: SyntheticVolume) -> None:
    """`fakeVolume<n>_slice<NNN>.npy` as the published program wrote and reads them: pickled dictionaries."""
    for position, record in enumerate(_records(volume)):
        path = folder / f"fakeVolume{volume.number}_slice{position:03d}.npy"
        np.save(path, np.array({**record, "weight": None}, dtype=object))


def nnunet_description(domain: str, volumes: int, classes: int) -> dict[str, object]:
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


def finish(folder: Path, *, layout: str, domain: str, volumes: int, classes: int) -> None:
    """Write the files that a layout needs beside its volumes."""
    if layout == "nnunet":
        write_json(folder / "dataset.json", nnunet_description(domain, volumes, classes))


def _volume(slices: np.ndarray, affine: np.ndarray) -> Volume:
    """Slices (N, S, S) as a volume (S, S, N)."""
    return Volume(np.ascontiguousarray(np.moveaxis(slices, 0, 2)), affine)


def _records(volume: SyntheticVolume) -> list[dict[str, np.ndarray]]:
    """By slice: "data" (S, S, 1) float32 in [-1, 1] and "mask" (S, S, classes) bool."""
    values = np.arange(volume.classes)
    return [
        {"data": image[..., None].astype(np.float32), "mask": label[..., None] == values}
        for image, label in zip(volume.images, volume.labels, strict=True)
    ]
