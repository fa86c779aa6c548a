"""Labelled synthetic volumes from a labelled factory: `fedfactory generate-volumes`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from monai.transforms import KeepLargestConnectedComponent
from torch import Tensor

from .. import __version__
from ..common.files import atomic_folder, refuse_existing, require_folder, sha256_of, write_json
from ..common.progress import track
from ..common.seeding import seed_of
from ..errors import UsageError
from ..generative.factory_file import TrainedFactory
from ..generative.image_encoder import read_embedding
from ..generative.synthesis import between_latents, slice_heights, subject_heights
from .adapt import MANIFEST
from .choices import LABEL_WITH, PRECISIONS
from .labelled_factory import DrawingFactory, Labeller
from .labeller import choose_labeller
from .volume_formats import WRITERS, SetFacts, SyntheticVolume, finish, refuse_unsuitable

LATENTS = "latents.npy"  # (volumes, latent_dim), in the manifest's order
ATTEMPTS = 50  # draws of a volume before least_share counts as too high
NOISE = 1  # marks the seed of a volume's noise, beside that of its latent


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What is drawn; volume n depends on this and on n alone, "auto" on the device too.

    Attributes:
        domain: the domain that the images belong to.
        volumes: number of volumes, at least 1.
        slices_per_bin: a volume has (z_depth - 1) * slices_per_bin slices; a subject of a factory of pictures has one.
        z_depth: height bins to walk from the lowest up; None walks all.
        largest_component: keep only each class's largest 26-connected part.
        truncation: 1 draws all the variety the factory has, lower values fewer unusual subjects.
        least_share: share of a volume's voxels that every class must have, in [0, 1); a draw with less is discarded.
        between: number of volumes between every two drawn subjects, interpolated between their latents.
        label_with: which label branches give the labels, see `choose_labeller`.
        precision: of the labels' computation, see `choose_labeller`; images are always drawn in float32.
        seed: of all random numbers.
    """

    domain: str
    volumes: int = 1
    slices_per_bin: int = 2
    z_depth: int | None = None
    largest_component: bool = False
    truncation: float = 1.0
    least_share: float = 0.0
    between: int = 0
    label_with: str = "auto"
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("volumes", 1), ("slices_per_bin", 1), ("between", 0)):
            if getattr(self, name) < lowest:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        for name, choices in (("label_with", LABEL_WITH), ("precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise UsageError(f"{name} is '{getattr(self, name)}'; choose one of {', '.join(choices)}")
        if not 0 <= self.truncation <= 1:
            raise UsageError(f"truncation is {self.truncation}; it must be from 0 to 1")
        if not 0 <= self.least_share < 1:
            raise UsageError(f"least_share is {self.least_share}; it must be at least 0 and below 1")
        # A subject that is drawn again would no longer be the end of the interpolations towards its neighbours.
        if self.between and self.least_share:
            raise UsageError(
                f"least_share is {self.least_share} and between is {self.between}: volumes between subjects cannot be "
                "drawn again; use only one of the two"
            )


@dataclass(frozen=True)
class ManifestEntry:
    """One volume in the manifest.

    Attributes:
        name: of the synthetic subject.
        attempt: number of the draw that was kept, from 0.
        shares: share of the voxels of every class, background first.
    """

    name: str
    attempt: int
    shares: list[float]


def generate_volumes(
    factory_file: str | Path,
    out: str | Path,
    drawing: Drawing,
    *,
    layout: str = "nifti",
    only: Sequence[int] | None = None,
    workers: int = 1,
    device: str = "cpu",
    clip_mean: Path | None = None,
) -> list[str]:
    """Write labelled synthetic subjects with a manifest and their latents.

    Args:
        factory_file: labelled factory, or exported one that draws labels with its images.
        out: new folder; nothing is left there if anything fails.
        layout: "nifti" (pairs `<name>/{image,label}/<name>.nii.gz`), "nnunet", "images" (of pictures), "slices" or
            "legacy-slices" (pickled), see `volume_formats`.
        only: numbers of the volumes to write, out of those that the drawing describes; None writes all.
        workers: volumes drawn at once; does not change the files.
        clip_mean: array file with the domain's mean embedding, for a factory trained with embeddings.

    Returns: the subjects' names. Images are in [-1, 1]; spacing and height come from the factory's card.
    Raises: UsageError for unknown domains, depths or devices, for a layout or label branches that do not suit the
        factory, or if no draw has enough of every class; CheckpointError for an unusable file.
    """
    refuse_existing(out)
    if workers < 1:
        raise UsageError(f"workers is {workers}; it must be at least 1")
    if layout not in WRITERS:
        raise UsageError(f"layout is '{layout}'; choose one of {', '.join(WRITERS)}")
    numbers = range(drawing.volumes) if only is None else sorted(set(only))
    if not numbers or not 0 <= numbers[0] <= numbers[-1] < drawing.volumes:
        raise UsageError(f"only is {list(numbers)}; choose from the volumes 0 to {drawing.volumes - 1}")
    labelled = DrawingFactory.load(factory_file)
    config, classes = labelled.factory.config, labelled.card.classes
    config.domain_index(drawing.domain)
    refuse_unsuitable(layout, pictures=config.pictures, channels=config.image_channels)
    encoding = _mean_embedding(clip_mean, config.encoding_dim) if clip_mean is not None else None
    heights, thickness = _slices(drawing, labelled.factory)
    _move(labelled, device)
    chosen = choose_labeller(labelled, drawing.domain, label_with=drawing.label_with, precision=drawing.precision)
    affine = _affine(config.image_size, len(heights), spacing=labelled.factory.spacing, thickness=thickness)
    latents = _Latents(drawing, config.latent_dim)

    def make(number: int, folder: Path) -> ManifestEntry:
        images, labels, attempt = _draw(
            labelled, latents, number, heights=heights, encoding=encoding, labeller=chosen.labels_of
        )
        volume = SyntheticVolume(number=number, images=images, labels=labels, affine=affine, classes=classes)
        WRITERS[layout](folder, volume)
        shares = np.bincount(labels.ravel(), minlength=classes) / labels.size
        return ManifestEntry(volume.name, attempt, [round(float(share), 5) for share in shares])

    with atomic_folder(out) as folder, _one_thread_each(), ThreadPoolExecutor(workers) as pool:
        made = pool.map(lambda number: make(number, folder), numbers)
        entries = list(track(made, f"generating volumes of {drawing.domain}", total=len(numbers)))
        facts = SetFacts(
            domain=drawing.domain, volumes=len(numbers), classes=classes, channels=config.image_channels,
            names=labelled.class_names,
        )  # fmt: skip
        finish(folder, layout, facts)
        drawn = [latents.of(number, entry.attempt) for number, entry in zip(numbers, entries, strict=True)]
        np.save(folder / LATENTS, torch.cat(drawn).numpy(), allow_pickle=False)
        manifest = {
            "made_by": f"fedfactory {__version__}",
            "factory_sha256": sha256_of(factory_file),
            "classes": classes,
            "class_names": {str(value): name for value, name in labelled.class_names.items()},
            "original_values": labelled.original_values,
            "channels": config.image_channels,
            "layout": layout,
            "latents": LATENTS,
            "clip_mean_sha256": None if clip_mean is None else sha256_of(clip_mean),
            **asdict(drawing),
            **chosen.facts(),
            "z_depth": int(heights.max()) + 1,
            "alarms": [text for text in labelled.factory.facts.alarms if text.startswith(f"{drawing.domain}:")],
            "volumes": [asdict(entry) for entry in entries],
        }
        write_json(folder / MANIFEST, manifest)
    return [entry.name for entry in entries]


def _slices(drawing: Drawing, factory: TrainedFactory) -> tuple[Tensor, float]:
    """Heights (N,) of a subject's slices in [0, z_bins - 1], and how thick these are, millimetres."""
    config, depth = factory.config, drawing.z_depth
    if config.pictures:
        if depth not in (None, 1):
            raise UsageError(f"z_depth is {depth}; this factory draws pictures, which have 1 bin: leave it out")
        return subject_heights(config, drawing.slices_per_bin), factory.spacing  # no thickness: pixels become cubes
    heights = slice_heights(config.z_bins if depth is None else depth, drawing.slices_per_bin)
    if heights.max() > config.z_bins - 1:
        raise UsageError(f"z_depth is {depth}; this factory has {config.z_bins} bins, choose at most as many")
    return heights, factory.height * float(heights.max()) / (config.z_bins - 1) / len(heights)


class _Latents:
    """Latent of every volume and attempt; any of them can be had alone."""

    def __init__(self, drawing: Drawing, width: int) -> None:
        self.drawing, self.width = drawing, width

    def of(self, number: int, attempt: int) -> Tensor:
        """(1, latent_dim): of a drawn subject, or interpolated between two subjects."""
        subject, step = divmod(number, self.drawing.between + 1)
        first = self._drawn(subject, attempt)
        if step == 0:
            return first
        return between_latents(first, self._drawn(subject + 1, attempt), step / (self.drawing.between + 1))

    def _drawn(self, subject: int, attempt: int) -> Tensor:
        """(1, latent_dim), unit normal."""
        rng = torch.Generator().manual_seed(seed_of(self.drawing.seed, subject, attempt))
        return torch.randn(1, self.width, generator=rng)


def _draw(
    labelled: DrawingFactory,
    latents: _Latents,
    number: int,
    *,
    heights: Tensor,
    encoding: Tensor | None,
    labeller: Labeller,
) -> tuple[np.ndarray, np.ndarray, int]:
    """Images (N, C, S, S) float32 in [-1, 1], labels (N, S, S) uint8, and the number of the attempt that was kept.

    Args:
        heights: (N,) in [0, z_bins - 1].
        encoding: (encoding_dim,), or None.
        labeller: gives the labels.
    """
    drawing, classes = latents.drawing, labelled.card.classes
    keep_largest = KeepLargestConnectedComponent(range(1, classes), independent=True, connectivity=3)
    for attempt in range(ATTEMPTS if drawing.least_share else 1):
        images, labels = labelled.draw_volume(
            drawing.domain,
            heights,
            seed=seed_of(drawing.seed, number, attempt, NOISE),
            z=latents.of(number, attempt),
            encoding=encoding,
            truncation=drawing.truncation,
            labeller=labeller,
        )
        if drawing.largest_component:
            labels = np.asarray(keep_largest(torch.from_numpy(labels)[None]))[0]
        if np.bincount(labels.ravel(), minlength=classes).min() >= drawing.least_share * labels.size:
            return images, labels, attempt
    raise UsageError(
        f"least_share is {drawing.least_share}, but none of {ATTEMPTS} draws of volume {number} has that much of every "
        "class; choose a lower value"
    )


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Inside, PyTorch computes a volume on one thread, whatever the number of workers: the same files, and threads of
    several workers do not wait for each other."""
    kept = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


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
        raise UsageError(f"factory is {factory} and ckpt_dir is {ckpt_dir}; give exactly one of them")
    if (domain is None) == (label is None):
        raise UsageError(f"domain is {domain} and label is {label}; give exactly one of them")
    file = factory if factory is not None else find_factory_file(ckpt_dir)
    labelled = DrawingFactory.load(file)
    names = labelled.factory.config.domains
    if clip_mean is not None and not labelled.factory.config.encoding_dim:
        raise UsageError(
            f"clip_mean is {clip_mean}, but this factory was trained without CLIP embeddings; leave it out"
        )
    if domains is not None and domains != len(names):
        raise UsageError(f"domains is {domains}, but this factory has {len(names)} ({', '.join(names)}); leave it out")
    if classes is not None and classes != labelled.card.classes:
        raise UsageError(
            f"classes is {classes}, but this factory draws {labelled.card.classes}; give that number or leave it out"
        )
    if label is not None and label >= len(names):
        raise UsageError(f"label is {label}; choose one of the factory's domains 0 to {len(names) - 1}")
    return file, domain if domain is not None else names[label]


def find_factory_file(folder: str | Path) -> Path:
    """The only labelled factory in a folder, as the original program expects it. Raises UsageError otherwise."""
    folder = Path(folder)
    require_folder(folder, "give the folder of a labelled factory")
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise UsageError(f"{folder}: holds {len(found)} .safetensors files, it must hold one labelled factory")
    return found[0]


def _mean_embedding(path: Path, width: int) -> torch.Tensor:
    """(width,), read from an array file."""
    mean = read_embedding(path)
    if len(mean) != width:
        raise UsageError(f"{path}: has {len(mean)} numbers; it must have {width} for this factory")
    return mean


def _move(labelled: DrawingFactory, device: str) -> None:
    try:
        labelled.to(device)
        if device == "cpu":  # a tenth to a third faster, with equal results up to rounding
            labelled.factory.generator.to(memory_format=torch.channels_last)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device is '{device}', which cannot be used ({str(error).splitlines()[0]}); choose cpu"
        ) from None


def _affine(size: int, slices: int, *, spacing: float, thickness: float) -> np.ndarray:
    """(4, 4), millimetres. Right-anterior-superior axes, origin in the middle of the volume."""
    affine = np.diag([spacing, spacing, thickness, 1.0])
    affine[:3, 3] = -affine.diagonal()[:3] * (np.array([size, size, slices]) - 1) / 2
    return affine
