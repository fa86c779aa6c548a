"""Labelled synthetic volumes from a labelled factory: `python generate_volumes.py` or `fedfactory generate-volumes`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from fedfactory import __version__
from fedfactory.adaptation.adapt import MANIFEST
from fedfactory.adaptation.label_branch import LabelledFactory
from fedfactory.errors import UsageError
from fedfactory.files import atomic_folder, refuse_existing, sha256_of
from fedfactory.generative.image_encoder import read_embedding
from fedfactory.generative.synthesis import slice_heights
from fedfactory.progress import track
from fedfactory.volumes import Volume, write_volume
from monai.transforms import KeepLargestConnectedComponent


def generate_volumes(
    factory_file: str | Path,
    out: str | Path,
    *,
    domain: str,
    volumes: int,
    slices_per_bin: int = 2,
    z_depth: int | None = None,
    batch_size: int = 32,
    device: str = "cpu",
    clip_mean: Path | None = None,
    largest_component: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Write labelled synthetic subjects as `out/<name>/{image,label}/<name>.nii.gz`, with a manifest.

    Args:
        factory_file: labelled factory.
        out: new folder; nothing is left there if anything fails.
        domain: whose look the images have.
        slices_per_bin: a volume has (z_depth - 1) * slices_per_bin slices.
        z_depth: height bins to walk from the lowest up; default: all.
        batch_size: slices synthesised at once; does not change the result.
        clip_mean: array file with the domain's mean embedding, for a factory trained with embeddings.
        largest_component: keep only each class's largest 26-connected part.
        seed: volume n depends on seed + n alone.

    Returns: the subjects' folders. Images are in [-1, 1]; spacing and height come from the factory's card.
    Raises: UsageError for unknown domains, depths or devices; CheckpointError for an unusable file.
    """
    refuse_existing(out)
    if volumes < 1 or batch_size < 1:
        raise UsageError("the number of volumes and the batch size must be at least 1")
    labelled = LabelledFactory.load(factory_file)
    config = labelled.factory.config
    config.domain_index(domain)
    encoding = _mean_embedding(clip_mean, config.encoding_dim) if clip_mean is not None else None
    heights = slice_heights(config.z_bins if z_depth is None else z_depth, slices_per_bin)
    if heights.max() > config.z_bins - 1:
        raise UsageError(f"z_depth is {z_depth}, this factory has {config.z_bins} bins")
    _move(labelled, device)
    extent = labelled.factory.height * float(heights.max()) / (config.z_bins - 1)
    affine = _affine(config.image_size, labelled.factory.spacing, extent / len(heights), len(heights))
    keep_largest = KeepLargestConnectedComponent(range(1, labelled.card["classes"]), independent=True, connectivity=3)
    entries, drawing = [], {"batch_size": batch_size, "encoding": encoding}
    with atomic_folder(out) as folder:
        for number in track(range(volumes), f"generating volumes of {domain}"):
            images, labels = labelled.draw_volume(domain, heights, seed=seed + number, **drawing)
            if largest_component:
                labels = np.asarray(keep_largest(torch.from_numpy(labels)[None]))[0]
            name = f"synthetic_{number:04d}"
            for kind, slices in (("image", images), ("label", labels)):
                volume = Volume(np.ascontiguousarray(np.moveaxis(slices, 0, 2)), affine)
                write_volume(folder / name / kind / f"{name}.nii.gz", volume)
            entries.append({"name": name, "seed": seed + number})
        manifest = {
            "made_by": f"fedfactory {__version__}",
            "factory_sha256": sha256_of(factory_file),
            "domain": domain,
            "classes": labelled.card["classes"],
            "slices_per_bin": slices_per_bin,
            "z_depth": int(heights.max()) + 1,
            "largest_component": largest_component,
            "volumes": entries,
        }
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return [Path(out) / entry["name"] for entry in entries]


def choose_factory(
    *,
    factory: Path | None,
    ckpt_dir: Path | None,
    domain: str | None,
    label: int | None,
    classes: int | None,
    domains: int | None,
    clip_mean: Path | None,
) -> tuple[Path, str]:
    """Factory file and domain name from the new options or the original program's; the others are checked.

    Raises: UsageError if they contradict each other or the factory.
    """
    if (factory is None) == (ckpt_dir is None):
        raise UsageError("give either --factory FILE or --ckpt_dir FOLDER")
    if (domain is None) == (label is None):
        raise UsageError("give either --domain NAME or --label NUMBER")
    file = factory if factory is not None else find_factory_file(ckpt_dir)
    labelled = LabelledFactory.load(file)
    names = labelled.factory.config.domains
    if clip_mean is not None and not labelled.factory.config.encoding_dim:
        raise UsageError("this factory was trained without CLIP embeddings; leave --clip_mean out")
    if domains is not None and domains != len(names):
        raise UsageError(f"--n_domains is {domains}, this factory has {len(names)}: {', '.join(names)}")
    if classes is not None and classes != labelled.card["classes"]:
        raise UsageError(f"--n_segmentation_labels is {classes}, this factory draws {labelled.card['classes']}")
    if label is not None and label >= len(names):
        raise UsageError(f"--label is {label}, this factory has domains 0 to {len(names) - 1}")
    return file, domain if domain is not None else names[label]


def find_factory_file(folder: str | Path) -> Path:
    """The one labelled factory in a folder, for the original program's `--ckpt_dir`. Raises UsageError otherwise."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder")
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise UsageError(f"{folder}: holds {len(found)} .safetensors files, expected one labelled factory")
    return found[0]


def _mean_embedding(path: Path, width: int) -> torch.Tensor:
    mean = read_embedding(path)
    if len(mean) != width:
        raise UsageError(f"{path}: has {len(mean)} numbers, this factory takes {width}")
    return mean


def _move(labelled: LabelledFactory, device: str) -> None:
    try:
        labelled.factory.generator.to(device)
        labelled.branch.to(device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device '{device}' cannot be used ({str(error).splitlines()[0]}); try --device cpu") from None


def _affine(size: int, spacing: float, thickness: float, slices: int) -> np.ndarray:
    """Right-anterior-superior axes, origin in the middle of the volume."""
    affine = np.diag([spacing, spacing, thickness, 1.0])
    affine[:3, 3] = -affine.diagonal()[:3] * (np.array([size, size, slices]) - 1) / 2
    return affine


if __name__ == "__main__":
    import sys

    from fedfactory.cli import main

    sys.argv[0] = "generate_volumes.py"
    main(["generate-volumes", *sys.argv[1:]])
