"""Three sites of different contrast from one data set of hippocampus MRI."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from scipy.ndimage import gaussian_filter, zoom

TRAIN, TEST = 40, 20  # volumes of a site


def make_hippocampus_sites(source: Path, out: Path) -> None:
    """Write `site_a`, `site_b` and `site_c`, each with train and test cases in Fed-BioMed's folder layout.

    a has the images as they are, scaled to 0..1; b stands for another modality: inverted contrast, gamma .7, a smooth
    bias field of a quarter, Rician noise of .03; c for another scanner: gamma 1.6, blur of a voxel, noise of .02.

    Args:
        source: nnU-Net raw data set with imagesTr and labelsTr.
        out: new folder.
    """
    images = sorted((source / "imagesTr").glob("[!.]*.nii.gz"))
    images = [images[index] for index in np.random.default_rng(0).permutation(len(images))]
    for number, site in enumerate("abc"):
        chosen = images[number * (TRAIN + TEST) : (number + 1) * (TRAIN + TEST)]
        for index, file in enumerate(chosen):
            name = file.name.removesuffix(".nii.gz").removesuffix("_0000")
            image = nibabel.load(file)
            label = nibabel.load(source / "labelsTr" / f"{name}.nii.gz")
            rng = np.random.default_rng((number, index))
            folder = out / f"site_{site}" / ("train" if index < TRAIN else "test") / name
            changed = changed_contrast(image.get_fdata(), site, rng)
            for kind, data in (("image", changed.astype(np.float32)), ("label", np.asarray(label.dataobj, np.uint8))):
                (folder / kind).mkdir(parents=True)
                nibabel.save(nibabel.Nifti1Image(data, image.affine), folder / kind / f"{name}.nii.gz")


def changed_contrast(image: np.ndarray, site: str, rng: np.random.Generator) -> np.ndarray:
    """A volume (X, Y, Z) with the contrast of a site, about 0 to 1."""
    low, high = np.quantile(image, [0.005, 0.995])
    image = np.clip((image - low) / (high - low), 0, 1)
    if site == "a":
        return image
    if site == "c":
        return gaussian_filter(image**1.6, (1, 1, 0)) + rng.normal(0, 0.02, image.shape)
    nodes = rng.uniform(-1, 1, (3, 3, 3))
    field = zoom(nodes, np.array(image.shape) / 3, order=3, mode="nearest", grid_mode=True)
    image = (1 - image) ** 0.7 * (1 + 0.25 * np.clip(field, -1, 1))
    return np.hypot(image + rng.normal(0, 0.03, image.shape), rng.normal(0, 0.03, image.shape))
