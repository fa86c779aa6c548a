"""What a site should know about synthetic volumes before it uses or shares them; runs where the real images are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from monai.metrics import MultiScaleSSIMMetric
from torch import Tensor

from .. import __version__
from ..adaptation.labelled_factory import LabelledFactory
from ..adaptation.labelled_slices import foreground_dice
from ..common.files import atomic_folder, refuse_existing, sha256_of, write_json
from ..common.html_pages import write_page
from ..common.progress import track
from ..errors import StoreError
from ..generative.metrics.fidelity import (
    Estimate,
    attack_auc,
    copying_ratio,
    frechet_distance,
    nearest,
    precision_and_recall,
)
from ..generative.metrics.quality import kernel_distance, layout_agreement, random_features
from ..generative.synthesis import subject_heights
from ..imaging.overlays import shown_slice
from .audit_page import audit_page
from .audit_result import AuditResult, AuditSource, Fidelity, LabelCheck, Privacy
from .audit_slices import AuditSlices, equal_sides, real_slices
from .store.patient_split import SPLITS
from .store.slice_store import SliceStore

MAX_COPYING_RATIO = 0.8  # below it, synthetic slices are called copies, if the interval agrees
MIN_ATTACK_AUC = 0.6  # above it, patients are called recognisable, if the interval agrees
MIN_PATIENTS = 4  # on either side, for an interval that means anything
NUM_PAIRS = 10  # closest pairs to show
BATCH_SIZE = 64  # slices in a network at once
SIMILARITY_PAIRS = 300  # pairs of slices for the measure of diversity
PAIRS_AT_ONCE = 32  # two to three times as fast on a CPU as all at once, and in less memory
MAX_PIXELS = 100_000  # for percentiles of grey levels
FeatureExtractor = Callable[[Tensor], Tensor]  # (N, C, S, S) in [-1, 1] to (N, d)


def audit_factory(
    factory_file: str | Path,
    store_dir: str | Path,
    out: str | Path,
    *,
    held_out_dir: str | Path | None = None,
    volumes: int = 40,
    features: FeatureExtractor = random_features,
    seed: int = 0,
) -> AuditResult:
    """Compare a labelled factory's volumes of a site's domain with the site's images; write `audit.json`, `audit.html`.

    Args:
        factory_file: labelled factory.
        store_dir: the site's store, with patients held out from training (validation or test).
        out: new folder. The page shows real slices and stays at the site; the JSON holds numbers only.
        held_out_dir: another store in the same format, of patients of the site that were never trained on; they
            replace those held out in the first store.
        volumes: number of synthetic subjects to draw.
        features: (N, C, S, S) in [-1, 1] to (N, d); default: random filters, which measure texture and layout but not
            diagnosis.
        seed: of the first synthetic subject and of all random draws.

    Raises: UsageError, CheckpointError or StoreError, the last also if no patient was held out.
    """
    refuse_existing(out)
    labelled, store = LabelledFactory.load(factory_file), SliceStore(store_dir)
    config = labelled.factory.config
    config.domain_index(store.domain)
    store.require_factory(config)
    trained, held_out = real_slices(store, ("train",)), real_slices(store, ("validation", "test"))
    if held_out_dir is not None:
        other = SliceStore(held_out_dir)
        other.require_factory(config)
        held_out = real_slices(other, SPLITS)
    synthetic, labels = _draw_synthetic(labelled, store.domain, volumes=volumes, seed=seed)
    result = audit(synthetic, trained, held_out, features=features, pictures=config.pictures, seed=seed)
    result = replace(result, labels=_check_labels(labelled, synthetic, labels, store=store))
    source = AuditSource(
        made_by=f"fedfactory {__version__}",
        factory_sha256=sha256_of(factory_file),
        domain=store.domain,
        volumes=volumes,
        seed=seed,
    )
    with atomic_folder(out) as folder:
        write_json(folder / "audit.json", {**source.to_dict(), "findings": result.findings, **result.numbers()})
        write_page(folder / "audit.html", f"Audit of {store.domain}", audit_page(result, source))
    return result


def audit(
    synthetic: AuditSlices,
    trained: AuditSlices,
    held_out: AuditSlices,
    *,
    features: FeatureExtractor = random_features,
    pictures: bool = False,
    seed: int = 0,
) -> AuditResult:
    """Fidelity, coverage, diversity, memorisation and membership of synthetic slices.

    Args:
        synthetic: slices of synthetic subjects.
        trained: real slices of patients that were trained on.
        held_out: real slices of patients that were not.
        features: (N, C, S, S) in [-1, 1] to (N, d).
        pictures: whether the slices are pictures, which are shown in colour.
        seed: of all random draws.

    Raises: StoreError if either side of the real slices is empty.
    """
    if not len(trained.images) or not len(held_out.images):
        raise StoreError(
            f"{len(trained.images)} slices were trained on and {len(held_out.images)} held out, an audit needs both; "
            "prepare with a test share"
        )
    trained, held_out = equal_sides(trained, held_out, torch.Generator().manual_seed(seed))
    spaces = {
        "features": _standardised_features(features, trained, held_out, synthetic=synthetic),
        "pixels": _pixels(trained, held_out, synthetic),
    }
    _, unseen, made = spaces["features"]
    fidelity = _fidelity(unseen, made, synthetic=synthetic, real=held_out)
    privacy, findings, pairs = {}, [], np.empty(0)
    for name, (seen, unseen, made) in spaces.items():
        (to_seen, nearest_seen), (to_unseen, _) = nearest(made, seen), nearest(made, unseen)
        found = Privacy(
            copying_ratio=copying_ratio(to_seen, to_unseen, synthetic.group, seed=seed),
            attack_auc=attack_auc(
                nearest(seen, made)[0],
                nearest(unseen, made)[0],
                member_group=trained.group,
                other_group=held_out.group,
                seed=seed,
            ),
        )
        privacy[name] = found
        findings += _findings(name, found.copying_ratio, found.attack_auc)
        if name == "pixels":
            closest = to_seen.argsort()[:NUM_PAIRS]
            closest_pairs = zip(synthetic.images[closest], trained.images[nearest_seen[closest]], strict=True)
            pairs = np.stack([[shown_slice(side.numpy(), picture=pictures) for side in pair] for pair in closest_pairs])
    patients = {"trained": len(trained.group.unique()), "held_out": len(held_out.group.unique())}
    enough_patients = min(patients.values()) >= MIN_PATIENTS
    if not enough_patients:
        findings.append(f"fewer than {MIN_PATIENTS} patients on a side: membership cannot be assessed")
    return AuditResult(
        fidelity=fidelity,
        privacy=privacy,
        patients=patients,
        slices_each=len(trained.images),
        enough_patients=enough_patients,
        findings=findings,
        pairs=pairs,
    )


def _draw_synthetic(
    labelled: LabelledFactory, domain: str, *, volumes: int, seed: int
) -> tuple[AuditSlices, np.ndarray]:
    """Slices of synthetic subjects, two per height bin, and their labels (N, S, S) uint8."""
    heights = subject_heights(labelled.factory.config, 2)
    drawn = [
        labelled.draw_volume(domain, heights, seed=seed + number)
        for number in track(range(volumes), f"drawing volumes of {domain}")
    ]
    synthetic = AuditSlices(
        torch.from_numpy(np.concatenate([images for images, _ in drawn])),
        heights.round().long().repeat(volumes),
        torch.arange(volumes).repeat_interleave(len(heights)),
    )
    return synthetic, np.concatenate([labels for _, labels in drawn])


def _findings(space: str, ratio: Estimate, area: Estimate) -> list[str]:
    """One sentence per leak that was measured in a feature space."""
    found = []
    if ratio.value < MAX_COPYING_RATIO and ratio.high < 1:
        found.append(
            f"synthetic slices are nearer to patients that were trained on than to others ({space}: {ratio.value:.2f}, "
            f"interval {ratio.low:.2f} to {ratio.high:.2f}): the generator copies"
        )
    if area.value > MIN_ATTACK_AUC and area.low > 0.5:
        found.append(
            f"patients that were trained on can be distinguished from others ({space}: area {area.value:.2f}, interval "
            f"{area.low:.2f} to {area.high:.2f})"
        )
    return found


def _fidelity(unseen: Tensor, made: Tensor, *, synthetic: AuditSlices, real: AuditSlices) -> Fidelity:
    """Fidelity against held-out patients: against those that were trained on, copies would score best.

    Args:
        unseen: (N, d) features of the held-out slices.
        made: (M, d) features of the synthetic slices.
        synthetic: the M synthetic slices.
        real: the N held-out slices.
    """
    precision, recall = precision_and_recall(unseen, made)
    grey_real, grey_synthetic = _grey_levels(real.images), _grey_levels(synthetic.images)
    return Fidelity(
        kernel_distance=kernel_distance(unseen, made),
        frechet_distance=frechet_distance(unseen, made),
        precision=precision,
        recall=recall,
        layout=layout_agreement(real.images, real.z_bin, synthetic=synthetic.images, synthetic_bin=synthetic.z_bin),
        similarity_within_synthetic=_similarity(synthetic),
        similarity_within_real=_similarity(real),
        intensity_distance=float((grey_real - grey_synthetic).abs().mean()),  # first Wasserstein distance
    )


def _grey_levels(images: Tensor) -> Tensor:
    """Percentiles 0 to 100 of up to MAX_PIXELS pixels, (101,), of images of any shape."""
    pixels = images.flatten().double()
    return torch.quantile(pixels[:: -(-len(pixels) // MAX_PIXELS)], torch.linspace(0, 1, 101, dtype=torch.float64))


def _similarity(slices: AuditSlices) -> float:
    """Mean MS-SSIM of slices of different patients or subjects at one height: 1 if they are all the same.

    By MONAI: `pytorch_msssim.ms_ssim` gives the same values, but none for sides of up to 64 pixels, however few scales
    are asked for.
    """
    rng, first, second = torch.Generator().manual_seed(0), [], []
    for _ in range(SIMILARITY_PAIRS):
        number = int(torch.randint(len(slices.images), (), generator=rng))
        same_height, other_group = slices.z_bin == slices.z_bin[number], slices.group != slices.group[number]
        partners = torch.nonzero(same_height & other_group)[:, 0]
        if len(partners):
            first.append(number)
            second.append(int(partners[torch.randint(len(partners), (), generator=rng)]))
    if not first:
        return float("nan")
    scales = max(1, min(5, int(np.log2(slices.images.shape[-1] / 6))))
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])  # Wang et al. 2003, as many as fit
    metric = MultiScaleSSIMMetric(2, data_range=2.0, kernel_size=5, weights=(weights / weights.sum()).tolist())
    found = []
    for start in range(0, len(first), PAIRS_AT_ONCE):
        part = slice(start, start + PAIRS_AT_ONCE)
        a, b = ((slices.images[chosen[part]].clamp(-1, 1) + 1).float() for chosen in (first, second))
        found.append(metric(a, b).flatten())
    return float(torch.cat(found).mean())


def _check_labels(
    labelled: LabelledFactory, synthetic: AuditSlices, labels: np.ndarray, *, store: SliceStore
) -> LabelCheck:
    """Compare the labels (N, S, S) of synthetic slices with another segmenter's and with the site's own."""
    classes, shares_real = labelled.card.classes, None
    # The drawn slices are of unrelated subjects and heights: each is a volume of its own.
    found = labelled.robust.probabilities(synthetic.images, np.arange(len(synthetic.images))).argmax(1)
    if store.labels is not None and len(chosen := store.slices("train", kinds=("dense",))):
        shares_real = _class_shares(store.labels[chosen], classes)
    return LabelCheck(
        agreement_with_independent_segmenter=foreground_dice(torch.from_numpy(labels), found, classes),
        shares_synthetic=_class_shares(labels, classes),
        shares_real=shares_real,
    )


def _class_shares(labels: np.ndarray, classes: int) -> list[float]:
    """Share of each class among the labelled pixels of label maps (N, S, S) uint8."""
    counts = np.bincount(labels.ravel(), minlength=256)[:classes]  # unlabelled pixels lie above
    return [round(float(share), 5) for share in counts / max(1, counts.sum())]


def _standardised_features(
    features: FeatureExtractor, trained: AuditSlices, held_out: AuditSlices, *, synthetic: AuditSlices
) -> tuple[Tensor, Tensor, Tensor]:
    """Features (N, d) of the three kinds of slices; each feature is standardised by all real slices."""
    with torch.no_grad():
        seen, unseen, made = (
            torch.cat([features(part).double() for part in slices.images.clamp(-1, 1).split(BATCH_SIZE)])
            for slices in (trained, held_out, synthetic)
        )
    real = torch.cat([seen, unseen])
    mean, deviation = real.mean(0), real.std(0) + 1e-6
    return (seen - mean) / deviation, (unseen - mean) / deviation, (made - mean) / deviation


def _pixels(trained: AuditSlices, held_out: AuditSlices, synthetic: AuditSlices) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels (N, C * S * S) of the three kinds of slices, in [-1, 1]."""
    seen, unseen, made = (slices.images.clamp(-1, 1).flatten(1).double() for slices in (trained, held_out, synthetic))
    return seen, unseen, made
