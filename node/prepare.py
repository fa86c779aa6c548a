"""Volumes to a slice store: canonical orientation, standardised, one size, one intensity window per site."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import __version__
from ..errors import ConfigError, StoreError, UsageError, VolumeError
from ..files import atomic_folder, refuse_existing
from ..progress import track
from ..slicing import WINDOW_BINS, SliceFormat, SliceGrid, intensity_window, standardise, z_bins_of
from ..sources import CaseFiles, find_cases
from ..volumes import Volume, read_volume
from .store import IMAGES, LABELS, Case, SliceStore, write_index

MAX_CLASSES = 255  # labels are stored in one byte


def prepare(
    source: str | Path,
    out: str | Path,
    *,
    domain: str,
    size: int = 256,
    z_bins: int = 29,
    spacing: float | None = None,
    image_key: str = "image",
    label_key: str = "label",
    label_kind: str = "dense",
) -> SliceStore:
    """Prepare one site's volumes.

    Args:
        source: folder of volumes, see `find_cases`.
        out: new store folder; nothing is left there if anything fails.
        domain: name of the site's scanner, modality or organ, as in the factory's configuration.
        size: pixels per side of the slices.
        z_bins: number of height bins.
        spacing: millimetres per pixel; default: the widest volume just fits.
        image_key, label_key: modality folders in the medical-folder layout.
        label_kind: "dense" (labels where a case has them) or "none" (labels are not read).

    Raises: UsageError for a wrong request, VolumeError naming the file of an unusable volume.
    """
    if label_kind not in ("dense", "none"):
        raise UsageError(f"label kind '{label_kind}' is not known: choose dense or none")
    if size < 1 or z_bins < 1 or (spacing is not None and spacing <= 0):
        raise ConfigError("size, z-bins and spacing must be positive")
    if not domain.strip():
        raise UsageError("the domain name is empty")
    refuse_existing(out)
    files = find_cases(Path(source), image_key=image_key, label_key=label_key if label_kind == "dense" else None)
    spacing = spacing or _fitting_spacing(files, size)
    with atomic_folder(out) as folder:
        _write_store(folder, files, domain=domain, size=size, z_bins=z_bins, spacing=spacing)
    return SliceStore(out)


def _fitting_spacing(files: list[CaseFiles], size: int) -> float:
    extents = []
    for case in track(files, "measuring"):
        canonical = read_volume(case.image).to_canonical()
        extents.append((np.array(canonical.data.shape[:2]) * canonical.spacing[:2]).max())
    return float(max(extents)) / size


def _write_store(folder: Path, files: list[CaseFiles], *, domain: str, size: int, z_bins: int, spacing: float) -> None:
    labelled = any(case.label for case in files)
    raw, labels = folder / "standardised.bin", folder / "labels.bin"
    cases, bins, heights, classes = [], [], [], 0
    low, high = np.inf, -np.inf
    with raw.open("wb") as raw_file, labels.open("wb") as label_file:
        for case in track(files, f"preparing {domain}"):
            image, label = _read_case(case)
            grid = SliceGrid(image, size, spacing)
            slices = grid.image_slices(_standardised(case, image))
            raw_file.write(slices.astype(np.float32).tobytes())
            low, high = min(low, float(np.nanmin(slices))), max(high, float(np.nanmax(slices)))
            if labelled:
                stored = np.zeros_like(slices, dtype=np.uint8) if label is None else grid.label_slices(label)
                classes = max(classes, int(label.data.max()) + 1) if label is not None else classes
                label_file.write(stored.tobytes())
            heights.append(len(slices) * float(grid.canonical.spacing[2]))
            cases.append(Case(case.name, len(bins), len(slices), label is not None))
            bins.extend(z_bins_of(len(slices), z_bins).tolist())
    shape = (len(bins), size, size)
    window = _window(raw, shape, low, high)
    fmt = SliceFormat(size=size, spacing=spacing, window=window, z_bins=z_bins)
    source = np.memmap(raw, np.float32, "r", shape=shape)
    images = np.lib.format.open_memmap(folder / IMAGES, "w+", np.float16, shape)
    for case in cases:
        part = slice(case.first, case.first + case.count)
        images[part] = fmt.scale(source[part])
    images.flush()
    if labelled:
        target = np.lib.format.open_memmap(folder / LABELS, "w+", np.uint8, shape)
        target[:] = np.memmap(labels, np.uint8, "r", shape=shape)
        target.flush()
    del source
    raw.unlink()
    labels.unlink()
    write_index(
        folder,
        {
            "made_by": f"fedfactory {__version__}",
            "domain": domain,
            "label_kind": "dense" if labelled else "none",
            "classes": classes,
            "height": float(np.median(heights)),
            "format": fmt.to_dict(),
            "cases": [vars(case) for case in cases],
            "z_bin": bins,
        },
    )


def _read_case(case: CaseFiles) -> tuple[Volume, Volume | None]:
    image = read_volume(case.image)
    if case.label is None:
        return image, None
    label = read_volume(case.label, integer=True)
    if label.data.shape != image.data.shape:
        raise VolumeError(f"{case.label}: shape {label.data.shape}, but its image has {image.data.shape}")
    if not np.allclose(label.affine, image.affine, atol=1e-2):
        raise VolumeError(f"{case.label}: its affine differs from that of {case.image.name}")
    if label.data.max() >= MAX_CLASSES:
        raise VolumeError(f"{case.label}: label {label.data.max()}; at most {MAX_CLASSES - 1} is supported")
    return image, label


def _standardised(case: CaseFiles, image: Volume) -> Volume:
    try:
        return standardise(image)
    except VolumeError as error:
        raise VolumeError(f"{case.image}: {error}") from None


def _window(raw: Path, shape: tuple[int, ...], low: float, high: float) -> tuple[float, float]:
    if not high > low:
        raise StoreError("the slices hold no contrast after resampling; check --spacing and --size")
    values = np.memmap(raw, np.float32, "r", shape=shape)
    counts = np.zeros(WINDOW_BINS, dtype=np.int64)
    for one in values:
        counts += np.histogram(one[np.isfinite(one)], WINDOW_BINS, (low, high))[0]
    return intensity_window(low, high, counts)
