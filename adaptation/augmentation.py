"""Random variations of labelled slices, from batchgenerators, plus one remapping of contrast."""

from __future__ import annotations

import numpy as np
from batchgenerators.transforms.abstract_transforms import AbstractTransform, Compose
from batchgenerators.transforms.color_transforms import BrightnessMultiplicativeTransform, GammaTransform
from batchgenerators.transforms.noise_transforms import GaussianNoiseTransform
from batchgenerators.transforms.spatial_transforms import MirrorTransform, SpatialTransform

from ..imaging.slice_format import BACKGROUND

ROTATION = 0.15  # radians; patients lie that straight in most scanners
KNOTS = 3  # of the random contrast curve: air, middle, bright; more bends were measured to be weaker


class ContrastRemapTransform(AbstractTransform):
    """Replace the grey scale of a slice by a random piecewise linear curve, not necessarily rising.

    The darkest value stays dark: air is dark in every scanner. This is a baseline without any adaptation:
    a network trained in this way must find anatomy by shape alone.
    """

    def __init__(self, probability: float) -> None:
        self.probability = probability

    def __call__(self, **batch: np.ndarray) -> dict[str, np.ndarray]:
        """A batch {"data": (B, 1, S, S), "seg": (B, 1, S, S)}, whose data is changed in place."""
        places = np.linspace(-1, 1, KNOTS)
        for image in batch["data"]:
            if np.random.uniform() < self.probability:
                values = np.random.uniform(-0.7, 1, KNOTS)
                values[0] = -1
                image[:] = np.interp(image, places, values)
        return batch


def augmentation(*, mirror: bool, remap_contrast: float, rotation: float = ROTATION) -> Compose:
    """Transforms of batches {"data": (B, 1, S, S) float32 in [-1, 1], "seg": (B, 1, S, S)}.

    Args:
        mirror: left-right flips, for organs that are symmetric.
        remap_contrast: share of slices with a random grey scale, 0 to 1.
        rotation: largest angle in the slice's plane, radians.

    They draw from numpy's global generator: seed it for repeatable runs.
    """
    return Compose([geometry(mirror=mirror, rotation=rotation), appearance(remap_contrast=remap_contrast)])


def geometry(*, mirror: bool, rotation: float = ROTATION, dimensions: int = 2) -> Compose:
    """Changes of position: rotations in the slice's plane, small changes of size, flips. 3-D: (B, 1, D, S, S)."""
    transforms: list[AbstractTransform] = [
        SpatialTransform(
            None,
            do_elastic_deform=False,
            angle_x=(-rotation, rotation),
            angle_y=(0, 0),
            angle_z=(0, 0),
            scale=(0.9, 1.1),
            border_mode_data="constant",
            border_cval_data=BACKGROUND,
            border_cval_seg=0,
            order_data=1,
            order_seg=0,
            random_crop=False,
        )
    ]
    if mirror:
        transforms.append(MirrorTransform(axes=(dimensions - 2,)))
    return Compose(transforms)


def appearance(*, remap_contrast: float = 0.0) -> Compose:
    """Changes of grey values: contrast, brightness, noise."""
    transforms: list[AbstractTransform] = [
        GammaTransform((0.7, 1.5), retain_stats=False, p_per_sample=0.5),
        _AboveBackground(BrightnessMultiplicativeTransform((0.85, 1.15), p_per_sample=0.5)),
        GaussianNoiseTransform((0, 0.01), p_per_sample=0.5),
    ]
    return Compose([ContrastRemapTransform(remap_contrast), *transforms] if remap_contrast else transforms)


class _AboveBackground(AbstractTransform):
    """Apply a transform to intensities counted from the background up, so that gain leaves air dark."""

    def __init__(self, transform: AbstractTransform) -> None:
        self.transform = transform

    def __call__(self, **batch: np.ndarray) -> dict[str, np.ndarray]:
        """A batch {"data": (B, 1, S, S), "seg": (B, 1, S, S)}."""
        batch["data"] = batch["data"] - BACKGROUND
        batch = self.transform(**batch)
        batch["data"] = batch["data"] + BACKGROUND
        return batch
