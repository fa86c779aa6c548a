"""Simulated subjects: the MNI152 template, randomly deformed and drawn in the contrast of a site's scanner."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from ..imaging.volume_files import write_volume
from ..imaging.volumes import Volume

FIELD_OF_VIEW = 192.0  # mm, left to right and back to front
HEIGHTS = -34.0 + 4.2 * np.arange(24)  # (24,) mm, heights of the axial slices
FLUID_SHARE = 0.4  # of a voxel, from which on it is labelled as fluid
CLASSES = {1: "cerebrospinal fluid", 2: "grey matter", 3: "white matter"}


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """How a scanner shows tissue.

    Attributes:
        csf: grey level of cerebrospinal fluid, in [0, 1].
        grey: grey level of grey matter, in [0, 1].
        white: grey level of white matter, in [0, 1].
        template_share: share of the template's own T1 texture in the image, in [0, 1].
        bias_field: standard deviation of the logarithm of the smooth gain.
        noise: standard deviation of the two channels of the Rician noise.
        orientation: axis codes in which the site stores its volumes.
    """

    csf: float
    grey: float
    white: float
    template_share: float
    bias_field: float
    noise: float
    orientation: str


CONTRASTS: dict[str, Contrast] = {
    "t1": Contrast(
        csf=0.25,
        grey=0.60,
        white=0.90,
        template_share=0.75,
        bias_field=0.05,
        noise=0.012,
        orientation="RAS",
    ),
    "t2": Contrast(
        csf=0.95,
        grey=0.60,
        white=0.33,
        template_share=0.0,
        bias_field=0.08,
        noise=0.025,
        orientation="LPS",
    ),
    "pd": Contrast(
        csf=0.42,
        grey=0.95,
        white=0.62,
        template_share=0.0,
        bias_field=0.15,
        noise=0.018,
        orientation="LAS",
    ),
}


def simulate_site(folder: Path, contrast: Contrast, subjects: int, *, size: int, seed: int, prefix: str) -> None:
    """Write subjects as `folder/<subject>/{image,label}/<subject>.nii.gz` (Fed-BioMed's medical-folder layout).

    Args:
        folder: folder of the site.
        contrast: how the site's scanner shows tissue.
        subjects: number of subjects.
        size: voxels per side in the axial plane; the spacing is 192 mm / size, slices are 4.2 mm apart.
        seed: subject n of a site depends on (seed, n) only.
        prefix: subjects are named prefix_000, prefix_001, ...
    """
    for number in range(subjects):
        image, label = simulate_subject(contrast, size, np.random.default_rng([seed, number]))
        name = f"{prefix}_{number:03d}"
        write_volume(folder / name / "image" / f"{name}.nii.gz", image)
        write_volume(folder / name / "label" / f"{name}.nii.gz", label)


def simulate_subject(contrast: Contrast, size: int, rng: np.random.Generator) -> tuple[Volume, Volume]:
    """Simulate one subject.

    Args:
        contrast: how the site's scanner shows tissue.
        size: voxels per side in the axial plane.
        rng: source of anatomy, grey levels and noise.

    Returns: image, (size, size, 24) float32 of about 0 to 1000, and tissue labels, uint8 in 0..3, on the same grid;
        axes in the order and directions of `contrast.orientation`.
    """
    maps, to_index = _template(FIELD_OF_VIEW / size)
    spacing = FIELD_OF_VIEW / size
    corner = np.array([-FIELD_OF_VIEW / 2 + spacing / 2, -FIELD_OF_VIEW / 2 - 17 + spacing / 2, HEIGHTS[0]])
    affine = np.diag([spacing, spacing, HEIGHTS[1] - HEIGHTS[0], 1.0])
    affine[:3, 3] = corner
    shape = (size, size, len(HEIGHTS))
    points = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1).reshape(-1, 3)
    points = points @ affine[:3, :3].T + corner
    points = _deform(points, rng) @ to_index[:3, :3].T + to_index[:3, 3]
    t1, grey, white, brain = (
        ndimage.map_coordinates(m, points.T, order=1, mode="constant").reshape(shape) for m in maps
    )
    csf = np.clip(brain - grey - white, 0, 1)
    label = np.argmax(np.stack([np.clip(1 - brain, 0, 1), csf, grey, white]), axis=0).astype(np.uint8)
    # Fluid is thinner than a voxel nearly everywhere, so a share of 40 % is enough for its label.
    label[(csf >= FLUID_SHARE) & (label > 0)] = 1

    levels = np.array([contrast.csf, contrast.grey, contrast.white]) * rng.normal(1, 0.06, 3)
    tissue = csf * levels[0] + grey * levels[1] + white * levels[2]
    clean = contrast.template_share * t1 * rng.normal(1, 0.06) + (1 - contrast.template_share) * tissue
    clean = clean * np.exp(_smooth_field(shape, (3, 3, 3), contrast.bias_field, rng=rng))
    disturbed = np.hypot(clean + rng.normal(0, contrast.noise, shape), rng.normal(0, contrast.noise, shape))
    return _stored(1000 * disturbed.astype(np.float32), affine, contrast), _stored(label, affine, contrast)


def _stored(data: np.ndarray, affine: np.ndarray, contrast: Contrast) -> Volume:
    """A (X, Y, Z) array in RAS orientation with its (4, 4) affine, in the orientation of the site."""
    target = nib.orientations.axcodes2ornt(contrast.orientation)
    change = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), target)
    stored = nib.orientations.apply_orientation(data, change)
    return Volume(np.ascontiguousarray(stored), affine @ nib.orientations.inv_ornt_aff(change, data.shape))


def _deform(points: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rotate, scale and shift points, then add two smooth displacement fields: (N, 3) to (N, 3), millimetres."""
    x, y, z = rng.uniform(-0.07, 0.07, 3)
    rotate = _rotation(0, x) @ _rotation(1, y) @ _rotation(2, z)
    moved = points @ rotate.T * rng.uniform(1.0, 1.12, 3) + rng.uniform(-4, 4, 3)
    span = np.array([-100.0, -130.0, -60.0]), np.array([100.0, 100.0, 90.0])
    unit = np.clip((points - span[0]) / (span[1] - span[0]), 0, 1)
    for knots, amplitude in ((4, 4.0), (8, 2.0)):
        field = rng.normal(0, amplitude, (3, knots, knots, knots))
        grid = (unit * (knots - 1)).T
        moved += np.stack([ndimage.map_coordinates(f, grid, order=3, mode="nearest") for f in field], axis=1)
    return moved


def _rotation(axis: int, angle: float) -> np.ndarray:
    """(3, 3) rotation by an angle in radians around an axis in 0..2."""
    matrix = np.eye(3)
    i, j = [a for a in range(3) if a != axis]
    matrix[i, i] = matrix[j, j] = np.cos(angle)
    matrix[i, j], matrix[j, i] = -np.sin(angle), np.sin(angle)
    return matrix


def _smooth_field(
    shape: tuple[int, ...], knots: tuple[int, ...], deviation: float, *, rng: np.random.Generator
) -> np.ndarray:
    """Smooth random field of the shape (X, Y, Z), interpolated from normal values at the knots."""
    coarse = rng.normal(0, deviation, knots)
    return ndimage.zoom(coarse, np.array(shape) / knots, order=3, mode="nearest", grid_mode=True)


@functools.lru_cache(maxsize=2)
def _template(spacing: float) -> tuple[list[np.ndarray], np.ndarray]:
    """The template at 2 mm.

    Args:
        spacing: millimetres between the points at which the maps will be sampled; sets their blur.

    Returns: T1 image, grey matter, white matter and brain maps, each (X, Y, Z) float32 in [0, 1], and the (4, 4)
        matrix from millimetres to index.
    """
    from nilearn import datasets  # slow to import, and only the demo needs it

    images = [
        datasets.load_mni152_template(resolution=2),
        datasets.load_mni152_gm_template(resolution=2),
        datasets.load_mni152_wm_template(resolution=2),
        datasets.load_mni152_brain_mask(resolution=2),
    ]
    # Point sampling of fine maps on a coarse grid aliases; the blur replaces the averaging within a real voxel.
    sigma = 0.42 * np.array([spacing, spacing, HEIGHTS[1] - HEIGHTS[0]]) / 2.0
    maps = []
    for image in images:
        data = np.asarray(image.dataobj, dtype=np.float32)
        maps.append(ndimage.gaussian_filter(data / data.max(), sigma))
    return maps, np.linalg.inv(images[0].affine)
