"""The published preparation in plain form, for comparison: a single process, one volume at a time, SciPy splines."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from fedfactory.imaging.cropping import crop_box
from scipy import ndimage


def prepare_plainly(source: Path, out: Path, *, size: int, z_bins: int) -> int:
    """Write every slice of `source` (SUBJECT/image, SUBJECT/label) as an array file: as published, but not pickled.

    Returns: number of slices.
    """
    out.mkdir(parents=True)
    subjects = sorted(path for path in source.iterdir() if path.is_dir())
    spacings, shapes = [], []
    for subject in subjects:
        data, spacing, box = _read(subject)
        spacings.append(spacing)
        shapes.append([stop - start for start, stop in box])
    middle = np.median(spacings, axis=0)
    fits = np.max(np.round(np.array(spacings) / middle * shapes), axis=0)
    target = np.where(fits > size, middle * fits / size, middle)
    volumes = []
    low, high = np.inf, -np.inf
    for subject in subjects:
        data, spacing, box = _read(subject)
        crop = tuple(slice(*ends) for ends in box)
        data = data[crop]
        label = np.asarray(nib.load(next((subject / "label").iterdir())).dataobj)[crop]
        shape = np.round(spacing / target * data.shape).astype(int)
        if tuple(shape) != data.shape:
            zoom = shape / np.array(data.shape)
            image = ndimage.zoom(data, zoom, order=3, mode="nearest", grid_mode=True).clip(data.min(), data.max())
            labels = np.zeros(shape, np.uint8)
            for value in np.unique(label)[1:]:
                share = ndimage.zoom((label == value).astype(float), zoom, order=1, mode="nearest", grid_mode=True)
                labels[share >= 0.5] = value
        else:
            image, labels = data, label
        image = (image - image.mean()) / (image.std() + 1e-8)
        low, high = min(low, image.min()), max(high, image.max())
        np.save(out / f"{subject.name}.image.npy", image.astype(np.float32))
        np.save(out / f"{subject.name}.label.npy", labels)
        volumes.append(subject.name)
    counts = np.zeros(256)
    for name in volumes:
        image = np.load(out / f"{name}.image.npy")
        for number in range(image.shape[2]):
            counts += np.histogram(image[:, :, number], 256, (low, high))[0]
    edges, share = np.linspace(low, high, 257)[1:], np.cumsum(counts) / counts.sum()
    first, last = edges[np.argmax(share >= 0.001)], edges[np.argmax(share >= 0.999)]
    total = 0
    for name in volumes:
        image, labels = (np.load(out / f"{name}.{kind}.npy") for kind in ("image", "label"))
        image = 2 * (np.clip(image, first, last) - first) / (last - first) - 1
        for number in range(image.shape[2]):
            around = [((size - n) // 2, size - n - (size - n) // 2) for n in image.shape[:2]]
            padded = np.pad(image[:, :, number], around, constant_values=-1).astype(np.float32)
            label = np.pad(labels[:, :, number], around)
            mask = np.stack([label == value for value in range(3)], axis=2)
            height = z_bins * number // image.shape[2]
            np.save(out / f"{name}_slice{number:03d}.npy", padded[..., None])
            np.save(out / f"{name}_mask{number:03d}_{height:02d}.npy", mask)
            total += 1
    return total


def _read(subject: Path) -> tuple[np.ndarray, np.ndarray, tuple]:
    """The image (X, Y, Z), its voxel spacing (3,) in mm, and the crop box: (start, stop) for each axis."""
    image = nib.load(next((subject / "image").iterdir()))
    data = np.asarray(image.dataobj, dtype=np.float64)
    return data, np.array(image.header.get_zooms()), crop_box(data, "air", published=True)
