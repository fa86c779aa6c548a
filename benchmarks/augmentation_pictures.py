"""Pictures of what the segmentation engine shows to a network: random windows of a slice, for the documentation.

    uv run python benchmarks/augmentation_pictures.py --folder docs/pictures

One slice of the MNI152 template, which nilearn contains, stands for the scans of a site; its labels are grey and white
matter. In all pictures the first column is the middle of this slice as it is. `augmentation_mild.png` and
`augmentation_strong.png` show random windows under the presets of appearance, each above the same window with its
labels. `random_contrast.png` shows the middle of the slice with random contrast, a row each for intensity curves,
random networks, and inversion followed by the preset strong. Every window is shown on its own range of grey levels,
because the engine standardises it. No data are needed. This takes a few seconds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from fedfactory.adaptation.engine.augmentation import Augmentation, augmented_windows
from fedfactory.adaptation.engine.random_appearance import PRESETS, STRONG, random_appearance
from fedfactory.adaptation.engine.random_contrast import random_contrast
from fedfactory.adaptation.engine.segmenter_config import ContrastMix
from fedfactory.imaging.overlays import coloured
from nilearn import datasets
from PIL import Image
from torch import Tensor

HEIGHT = 43  # index of the axial slice, at which the ventricles are visible
SIDE, WINDOW = 128, 96  # pixels of 2 mm
CHANGED = 6  # random windows in a row
SHOWN_RANGE = (0.002, 0.998)  # quantiles of a window that are black and white
GAP = 3  # white pixels between windows
COLOURS = 48  # per picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="folder for the pictures")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    image, labels = template_slice()
    for name in PRESETS:
        rows = augmentation_rows(image, labels, name, seed=arguments.seed)
        save(rows, arguments.folder / f"augmentation_{name}.png")
    save(contrast_rows(image, seed=arguments.seed), arguments.folder / "random_contrast.png")


def template_slice() -> tuple[Tensor, Tensor]:
    """An axial slice of the template (SIDE, SIDE) in [0, 1], front at the top, and its labels: 1 grey, 2 white matter.

    Outside of the brain both are 0.
    """
    brain, image, grey, white = (
        np.asarray(load(resolution=2).dataobj, np.float32)[:, :, HEIGHT].T[::-1]
        for load in (
            datasets.load_mni152_brain_mask,
            datasets.load_mni152_template,
            datasets.load_mni152_gm_template,
            datasets.load_mni152_wm_template,
        )
    )
    low, high = np.quantile(image[brain > 0], (0.01, 0.995))
    image = (np.clip((image - low) / (high - low), 0, 1) * (brain > 0)).astype(np.float32)
    rest = np.maximum(brain - grey - white, 0)
    labels = np.stack([rest, grey, white]).argmax(0) * (brain > 0)
    return torch.from_numpy(_square(image)), torch.from_numpy(_square(labels))


def augmentation_rows(image: Tensor, labels: Tensor, preset: str, *, seed: int) -> list[np.ndarray]:
    """Two rows of pictures (1 + CHANGED, W, W, 3): windows under a preset, and the same windows with their labels.

    Args:
        image: (S, S) in [0, 1].
        labels: (S, S) integer.
        preset: of the appearance.
        seed: of the windows; equal seeds give both presets the same places.
    """
    windows, found = augmented_windows(
        image.expand(CHANGED, 1, SIDE, SIDE),
        labels.expand(CHANGED, 1, SIDE, SIDE),
        torch.full((CHANGED, 2), (SIDE - 1) / 2),
        window=WINDOW,
        augmentation=Augmentation(appearance=PRESETS[preset]),
        rng=torch.Generator().manual_seed(seed),
    )
    shown = torch.cat([_middle(image)[None], windows[:, 0]])
    with_labels = torch.cat([_middle(labels)[None], found[:, 0]])
    return [pictures(shown, torch.zeros_like(with_labels)), pictures(shown, with_labels)]


def contrast_rows(image: Tensor, *, seed: int) -> list[np.ndarray]:
    """Three rows of pictures (1 + CHANGED, W, W, 3), of an image (S, S): curves, random networks, inversion."""
    rng = torch.Generator().manual_seed(seed)
    windows = _middle(image).expand(CHANGED, 1, WINDOW, WINDOW)
    curved = random_contrast(windows, ContrastMix(unchanged=0, curves=1, inverted=0), rng=rng)
    networked = random_contrast(windows, ContrastMix(unchanged=0, curves=0, inverted=0), rng=rng)
    inverted = random_contrast(windows, ContrastMix(unchanged=1, curves=0, inverted=1), rng=rng)
    rows = [
        torch.cat([windows[:1], made])[:, 0]
        for made in (curved, networked, random_appearance(inverted, STRONG, rng=rng))
    ]
    return [pictures(row, torch.zeros(row.shape, dtype=torch.int64)) for row in rows]


def pictures(windows: Tensor, labels: Tensor) -> np.ndarray:
    """Windows (N, W, W), each on its own range of grey levels, and their labels (N, W, W) as pictures (N, W, W, 3)."""
    low, high = torch.quantile(windows.flatten(1), torch.tensor(SHOWN_RANGE), dim=1)[:, :, None, None]
    return coloured(((windows - low) / (high - low)).numpy(), labels.numpy())


def save(rows: list[np.ndarray], path: Path) -> None:
    """Write rows of pictures (N, W, W, 3) as one picture with few colours."""
    framed = [np.pad(row, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255) for row in rows]
    picture = np.concatenate([np.concatenate(list(row), axis=1) for row in framed])[:-GAP, :-GAP]
    Image.fromarray(picture).quantize(COLOURS).save(path, optimize=True)


def _middle(plane: Tensor) -> Tensor:
    """The middle (WINDOW, WINDOW) of a plane (SIDE, SIDE)."""
    first = (SIDE - WINDOW) // 2
    return plane[first : first + WINDOW, first : first + WINDOW]


def _square(plane: np.ndarray) -> np.ndarray:
    """(H, W), at most SIDE each, to (SIDE, SIDE), with zeros around it."""
    missing = [SIDE - length for length in plane.shape]
    return np.pad(plane, [(count // 2, count - count // 2) for count in missing])


if __name__ == "__main__":
    main()
