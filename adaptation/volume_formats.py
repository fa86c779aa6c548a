"""Files of synthetic volumes: NIfTI pairs, nnU-Net raw data sets, pictures, or the published program's slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..common.files import write_json
from ..errors import UsageError, VolumeError
from ..imaging.class_names import class_name
from ..imaging.pictures.decoding import read_picture, write_picture
from ..imaging.volume_files import read_volume, write_volume
from ..imaging.volumes import Volume


@dataclass(frozen=True, kw_only=True)
class SyntheticVolume:
    """One labelled synthetic subject.

    Attributes:
        number: of the subject, from 0.
        images: (N, C, S, S) float32 in [-1, 1].
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


@dataclass(frozen=True, kw_only=True)
class SetFacts:
    """What is known of all subjects together.

    Attributes:
        domain: that the images belong to.
        volumes: number of subjects.
        classes: number of label values, background included.
        channels: of the images.
        names: name by label value, of the classes that have one.
    """

    domain: str
    volumes: int
    classes: int
    channels: int
    names: Mapping[int, str] = field(default_factory=dict)


Writer = Callable[[Path, SyntheticVolume], None]
# From folder, name and number of channels: images (N, C, S, S) float32 in [-1, 1] and labels (N, S, S) integer.
Reader = Callable[[Path, str, int], tuple[np.ndarray, np.ndarray]]


def name_of(number: int) -> str:
    """Of a synthetic subject, from 0."""
    return f"synthetic_{number:04d}"


def write_pair(folder: Path, volume: SyntheticVolume) -> None:
    """`<name>/{image,label}/<name>.nii.gz`, Fed-BioMed's medical-folder layout.

    Images of several channels have a modality folder for each: `<name>/{image0,image1,...,label}/<name>.nii.gz`.
    """
    name, channels = volume.name, volume.images.shape[1]
    for channel, modality in enumerate(modalities(channels)):
        image = _volume(volume.images[:, channel], volume.affine)
        write_volume(folder / name / modality / f"{name}.nii.gz", image)
    write_volume(folder / name / "label" / f"{name}.nii.gz", _volume(volume.labels, volume.affine))


def read_pair(folder: Path, name: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """What `write_pair` wrote, see `Reader`. Raises: VolumeError if files are damaged or do not fit together."""
    label = read_volume(folder / name / "label" / f"{name}.nii.gz", integer=True).data
    images = [read_volume(folder / name / modality / f"{name}.nii.gz").data for modality in modalities(channels)]
    if any(image.shape != label.shape for image in images):
        raise VolumeError(f"{folder / name}: image and label do not fit together")
    return np.moveaxis(np.stack(images), 3, 0), np.moveaxis(label, 2, 0)


def write_nnunet(folder: Path, volume: SyntheticVolume) -> None:
    """`imagesTr/<name>_0000.nii.gz`, for further channels `_0001` and so on, and `labelsTr/<name>.nii.gz`."""
    name = volume.name
    for channel in range(volume.images.shape[1]):
        image = _volume(volume.images[:, channel], volume.affine)
        write_volume(folder / "imagesTr" / f"{name}_{channel:04d}.nii.gz", image)
    write_volume(folder / "labelsTr" / f"{name}.nii.gz", _volume(volume.labels, volume.affine))


def write_pictures(folder: Path, volume: SyntheticVolume) -> None:
    """`images/<name>.png`, grey or red, green and blue, of 8 bits, and `masks/<name>.png` with class numbers."""
    pixels = np.round((volume.images[0] + 1) * 127.5).astype(np.uint8)
    write_picture(folder / "images" / f"{volume.name}.png", np.moveaxis(pixels, 0, 2))
    write_picture(folder / "masks" / f"{volume.name}.png", volume.labels[0])


def read_picture_pair(folder: Path, name: str, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """What `write_pictures` wrote, see `Reader`. Raises: VolumeError if files are damaged or do not fit together."""
    pixels, labels = (read_picture(folder / part / f"{name}.png") for part in ("images", "masks"))
    if pixels.shape != (*labels.shape[:2], channels) or labels.shape[2] != 1:
        raise VolumeError(f"{folder}: image and mask of {name} do not fit together")
    return np.moveaxis(pixels.astype(np.float32) / 127.5 - 1, 2, 0)[None], labels[None, :, :, 0]


def write_slices(folder: Path, volume: SyntheticVolume) -> None:
    """`fakeVolume<n>_slice<NNN>.npz` with the published fields as plain arrays: no pickle."""
    for position, record in enumerate(_records(volume)):
        np.savez(folder / f"fakeVolume{volume.number}_slice{position:03d}.npz", **record)


def write_legacy_slices(folder: Path, volume: SyntheticVolume) -> None:
    """`fakeVolume<n>_slice<NNN>.npy` as the published program wrote and reads them: pickled dictionaries."""
    for position, record in enumerate(_records(volume)):
        path = folder / f"fakeVolume{volume.number}_slice{position:03d}.npy"
        np.save(path, np.array({**record, "weight": None}, dtype=object))


def nnunet_description(facts: SetFacts) -> dict[str, object]:
    """`dataset.json` of nnU-Net version 2."""
    labels = {"background": 0, **{class_name(value, facts.names): value for value in range(1, facts.classes)}}
    several = facts.channels > 1
    names = {str(n): f"{facts.domain} {n}" if several else facts.domain for n in range(facts.channels)}
    return {
        "channel_names": names,
        "labels": labels,
        "numTraining": facts.volumes,
        "file_ending": ".nii.gz",
        "name": f"synthetic {facts.domain}",
        "description": "synthetic, made by fedfactory; not patients",
    }


WRITERS: dict[str, Writer] = {
    "nifti": write_pair,
    "nnunet": write_nnunet,
    "images": write_pictures,
    "slices": write_slices,
    "legacy-slices": write_legacy_slices,
}


READERS: dict[str, Reader] = {"nifti": read_pair, "images": read_picture_pair}


def finish(folder: Path, layout: str, facts: SetFacts) -> None:
    """Write the files that a layout needs beside its volumes."""
    if layout == "nnunet":
        write_json(folder / "dataset.json", nnunet_description(facts))


def refuse_unsuitable(layout: str, *, pictures: bool, channels: int) -> None:
    """Raises: UsageError for a layout in which a factory's subjects cannot be written.

    Args:
        layout: one of WRITERS.
        pictures: whether a subject is one picture.
        channels: of its images.
    """
    if layout == "images" and not (pictures and channels in (1, 3)):
        kind = "pictures" if pictures else "volumes"
        raise UsageError(
            f"layout is 'images' and this factory draws {kind} of {channels} channel(s); it must draw pictures, of 1 "
            "or 3 channels: choose nifti or nnunet"
        )


def modalities(channels: int) -> list[str]:
    """Names of the folders of a subject's image files in the layout "nifti": image, or image0, image1, ..."""
    return ["image"] if channels == 1 else [f"image{channel}" for channel in range(channels)]


def _volume(slices: np.ndarray, affine: np.ndarray) -> Volume:
    """Slices (N, S, S) as a volume (S, S, N)."""
    return Volume(np.ascontiguousarray(np.moveaxis(slices, 0, 2)), affine)


def _records(volume: SyntheticVolume) -> list[dict[str, np.ndarray]]:
    """By slice: "data" (S, S, C) float32 in [-1, 1] and "mask" (S, S, classes) bool."""
    values = np.arange(volume.classes)
    return [
        {"data": np.moveaxis(image, 0, 2).astype(np.float32), "mask": label[..., None] == values}
        for image, label in zip(volume.images, volume.labels, strict=True)
    ]
