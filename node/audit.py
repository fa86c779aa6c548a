"""What a site should know of synthetic volumes before they are used or handed on; run where the real images are."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from monai.metrics import MultiScaleSSIMMetric
from torch import Tensor

from .. import __version__
from ..adaptation.labelled_factory import LabelledFactory
from ..adaptation.labelled_slices import foreground_dice
from ..common.files import atomic_folder, refuse_existing, sha256_of, write_json
from ..common.html_pages import picture, write_page
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
from ..generative.synthesis import slice_heights
from .store.patient_split import SPLITS
from .store.slice_store import SliceStore

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COPIES = 0.8  # of the distance to held-out slices: nearer ones are called copies, if the interval agrees
KNOWN = 0.6  # area under the attacker's curve from which on patients are called recognisable, if the interval agrees
FEWEST = 4  # patients on either side, for an interval that means anything
SHOWN = 10  # closest pairs
BATCH = 64  # slices a feature extractor sees at once
PAIRS = 300  # of slices, for diversity
Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Slices:
    """Slices of one kind: images (N, 1, S, S) in [-1, 1], height bins and groups (patients or subjects) (N,)."""

    images: Tensor
    z_bin: Tensor
    group: Tensor

    def take(self, chosen: Tensor) -> Slices:
        return Slices(self.images[chosen], self.z_bin[chosen], self.group[chosen])


@dataclass
class Audit:
    """Numbers that may travel, and what stays at the site.

    Attributes:
        numbers: JSON-able; no image, no name.
        findings: one sentence each; empty if nothing was found.
        pairs: the closest synthetic and real slices, for the site's own eyes: (n, 2, S, S).
    """

    numbers: dict[str, Any]
    findings: list[str]
    pairs: np.ndarray


def audit_factory(
    factory_file: str | Path,
    store_dir: str | Path,
    out: str | Path,
    *,
    held_out_dir: str | Path | None = None,
    volumes: int = 40,
    features: Features = random_features,
    seed: int = 0,
) -> Audit:
    """Compare a labelled factory's volumes of a site's domain with the site's images; write `audit.json`, `audit.html`.

    Args:
        store_dir: the site's store, with patients held out from training (validation or test), or
        held_out_dir: another store of the same format, of patients of the site that never trained.
        out: new folder. The page holds real slices and stays at the site; the JSON holds numbers only.
        volumes: synthetic subjects to draw.
        features: (N, 1, S, S) to (N, d); default: random filters, which tell texture and layout, not diagnosis.

    Raises: UsageError, CheckpointError or StoreError, the last if no patient was held out.
    """
    refuse_existing(out)
    labelled, store = LabelledFactory.load(factory_file), SliceStore(store_dir)
    config = labelled.factory.config
    config.domain_index(store.domain)
    store.require(size=config.image_size, z_bins=config.z_bins)
    trained, held_out = _real(store, ("train",)), _real(store, ("validation", "test"))
    if held_out_dir is not None:
        other = SliceStore(held_out_dir)
        other.require(size=config.image_size, z_bins=config.z_bins)
        held_out = _real(other, SPLITS)
    heights = slice_heights(config.z_bins, 2)
    drawn = [
        labelled.draw_volume(store.domain, heights, seed=seed + number)
        for number in track(range(volumes), f"drawing volumes of {store.domain}")
    ]
    synthetic = Slices(
        torch.from_numpy(np.concatenate([images for images, _ in drawn]))[:, None],
        heights.round().long().repeat(volumes),
        torch.arange(volumes).repeat_interleave(len(heights)),
    )
    result = audit(synthetic, trained, held_out, features=features, seed=seed)
    labels = np.concatenate([one for _, one in drawn])
    result.numbers["labels"] = _label_numbers(labelled, synthetic, labels, store)
    facts = {
        "made_by": f"fedfactory {__version__}",
        "factory_sha256": sha256_of(factory_file),
        "domain": store.domain,
        "volumes": volumes,
        "seed": seed,
        "findings": result.findings,
    }
    with atomic_folder(out) as folder:
        write_json(folder / "audit.json", {**facts, **result.numbers})
        write_page(folder / "audit.html", f"Audit of {store.domain}", _page(result, facts))
    return result


def audit(
    synthetic: Slices, trained: Slices, held_out: Slices, *, features: Features = random_features, seed: int = 0
) -> Audit:
    """Fidelity, coverage, diversity, memorisation and membership of synthetic slices.

    Raises: StoreError if either side of the real slices is empty.
    """
    if not len(trained.images) or not len(held_out.images):
        raise StoreError("an audit needs patients that trained and patients that did not; prepare with a test share")
    rng = torch.Generator().manual_seed(seed)
    some, other = _equal(trained, held_out, rng)
    spaces = {"features": _standardised(features, some, other, synthetic), "pixels": _pixels(some, other, synthetic)}
    numbers: dict[str, Any] = {"fidelity": _fidelity(spaces["features"], synthetic, other), "privacy": {}}
    findings, pairs = [], np.empty(0)
    for name, (seen, unseen, made) in spaces.items():
        (to_seen, which), (to_unseen, _) = nearest(made, seen), nearest(made, unseen)
        ratio = copying_ratio(to_seen, to_unseen, synthetic.group, seed=seed)
        known = attack_auc(
            nearest(seen, made)[0],
            nearest(unseen, made)[0],
            member_group=some.group,
            other_group=other.group,
            seed=seed,
        )
        numbers["privacy"][name] = {"copying_ratio": asdict(ratio), "attack_auc": asdict(known)}
        findings += _findings(name, ratio, known)
        if name == "pixels":
            closest = to_seen.argsort()[:SHOWN]
            pairs = torch.cat([synthetic.images[closest], some.images[which[closest]]], dim=1).numpy()
    patients = {"trained": len(some.group.unique()), "held_out": len(other.group.unique())}
    numbers["patients"], numbers["slices_each"] = patients, len(some.images)
    numbers["enough_patients"] = min(patients.values()) >= FEWEST
    if not numbers["enough_patients"]:
        findings.append(f"fewer than {FEWEST} patients on a side: membership cannot be judged")
    return Audit(numbers, findings, pairs)


def _equal(first: Slices, second: Slices, rng: torch.Generator) -> tuple[Slices, Slices]:
    """As many patients and slices of either side, drawn at random: the nearest of many is nearer than that of few."""
    patients = min(len(one.group.unique()) for one in (first, second))
    parts = []
    for one in (first, second):
        known = one.group.unique()
        kept = known[torch.randperm(len(known), generator=rng)[:patients]]
        parts.append(one.take(torch.nonzero(torch.isin(one.group, kept))[:, 0]))
    count = min(len(one.images) for one in parts)
    drawn = [one.take(torch.randperm(len(one.images), generator=rng)[:count]) for one in parts]
    return drawn[0], drawn[1]


def _findings(space: str, ratio: Estimate, known: Estimate) -> list[str]:
    found = []
    if ratio.value < COPIES and ratio.high < 1:
        found.append(
            f"synthetic slices are nearer to patients that trained than to others ({space}: {ratio.value:.2f}, "
            f"interval {ratio.low:.2f} to {ratio.high:.2f}): the generator copies"
        )
    if known.value > KNOWN and known.low > 0.5:
        found.append(
            f"who trained can be told from who did not ({space}: area {known.value:.2f}, interval {known.low:.2f} to "
            f"{known.high:.2f})"
        )
    return found


def _fidelity(space: tuple[Tensor, Tensor, Tensor], synthetic: Slices, real: Slices) -> dict[str, Any]:
    """Against patients that did not train: against those that did, copies would look best."""
    _, unseen, made = space
    precision, recall = precision_and_recall(unseen, made)
    grey = [_grey_levels(one.images) for one in (real, synthetic)]
    return {
        "kernel_distance": kernel_distance(unseen, made),
        "frechet_distance": frechet_distance(unseen, made),
        "precision": precision,
        "recall": recall,
        "layout": layout_agreement(real.images, real.z_bin, synthetic=synthetic.images, synthetic_bin=synthetic.z_bin),
        "similarity_within_synthetic": _similarity(synthetic),
        "similarity_within_real": _similarity(real),
        "intensity_distance": float((grey[0] - grey[1]).abs().mean()),  # first Wasserstein distance
    }


def _grey_levels(images: Tensor) -> Tensor:
    """The percentiles of up to 100 000 pixels, (101,)."""
    pixels = images.flatten().double()
    return torch.quantile(pixels[:: -(-len(pixels) // 100_000)], torch.linspace(0, 1, 101, dtype=torch.float64))


def _similarity(slices: Slices) -> float:
    """Mean MS-SSIM of slices of different patients or subjects at one height: 1 if they are all the same."""
    rng, first, second = torch.Generator().manual_seed(0), [], []
    for _ in range(PAIRS):
        one = int(torch.randint(len(slices.images), (), generator=rng))
        fitting = torch.nonzero((slices.z_bin == slices.z_bin[one]) & (slices.group != slices.group[one]))[:, 0]
        if len(fitting):
            first.append(one)
            second.append(int(fitting[torch.randint(len(fitting), (), generator=rng)]))
    if not first:
        return float("nan")
    scales = max(1, min(5, int(np.log2(slices.images.shape[-1] / 6))))
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363, 0.1333][:scales])  # Wang et al. 2003, as many as fit
    metric = MultiScaleSSIMMetric(2, data_range=2.0, kernel_size=5, weights=(weights / weights.sum()).tolist())
    a, b = ((slices.images[chosen].clamp(-1, 1) + 1).float() for chosen in (first, second))
    return float(metric(a, b).mean())


def _label_numbers(
    labelled: LabelledFactory, synthetic: Slices, labels: np.ndarray, store: SliceStore
) -> dict[str, Any]:
    classes = labelled.card.classes
    parts = [labelled.robust.probabilities(part).argmax(1) for part in synthetic.images.split(64)]
    numbers: dict[str, Any] = {
        "agreement_with_independent_segmenter": foreground_dice(torch.from_numpy(labels), torch.cat(parts), classes),
        "shares_synthetic": _shares(labels, classes),
    }
    if store.labels is not None and len(chosen := store.slices("train", kinds=("dense",))):
        numbers["shares_real"] = _shares(store.labels[chosen], classes)
    return numbers


def _shares(labels: np.ndarray, classes: int) -> list[float]:
    counts = np.bincount(labels.ravel(), minlength=256)[:classes]  # unlabelled pixels lie above
    return [round(float(one), 5) for one in counts / max(1, counts.sum())]


def _real(store: SliceStore, splits: tuple[str, ...]) -> Slices:
    chosen = np.concatenate([store.slices(split) for split in splits])
    names = {patient: number for number, patient in enumerate(sorted({case.patient for case in store.cases}))}
    patients = np.concatenate(
        [np.full(case.count, names[case.patient]) for split in splits for case in store.cases if case.split == split]
        or [np.empty(0, np.int64)]
    )
    images = torch.from_numpy(store.images[chosen].astype(np.float32))[:, None]
    return Slices(images, torch.from_numpy(store.z_bin[chosen]), torch.from_numpy(patients))


def _standardised(features: Features, *sets: Slices) -> tuple[Tensor, ...]:
    """Features of every set, each number standardised by the real slices (the first two sets)."""
    with torch.no_grad():
        found = [torch.cat([features(part).double() for part in one.images.clamp(-1, 1).split(BATCH)]) for one in sets]
    real = torch.cat(found[:2])
    mean, deviation = real.mean(0), real.std(0) + 1e-6
    return tuple((one - mean) / deviation for one in found)


def _pixels(*sets: Slices) -> tuple[Tensor, ...]:
    return tuple(one.images.clamp(-1, 1).flatten(1).double() for one in sets)


def _page(result: Audit, facts: dict[str, Any]) -> list[str]:
    rows = "".join(
        f"<tr><td>{html.escape(group)}</td><td>{html.escape(name.replace('_', ' '))}</td><td>{_shown(value)}</td></tr>"
        for group, values in result.numbers.items()
        if isinstance(values, dict)
        for name, value in values.items()
    )
    findings = "".join(f"<li>{html.escape(text)}</li>" for text in result.findings)
    return [
        f"<h1>Audit of synthetic slices of {html.escape(facts['domain'])}</h1>",
        '<p class="note">This page shows real slices of patients: it stays at the site. audit.json holds numbers only.'
        "</p>",
        f"<p>{facts['volumes']} synthetic subjects, seed {facts['seed']}; real slices each side: "
        f"{result.numbers['slices_each']}. Intervals are 95 %, by bootstrap over subjects or patients.</p>",
        f"<h2>Findings</h2><ul>{findings}</ul>" if findings else "<h2>Findings</h2><p>None.</p>",
        f"<h2>Numbers</h2><table><tr><th></th><th></th><th>value</th></tr>{rows}</table>",
        f"<h2>The {len(result.pairs)} closest pairs</h2><p>Upper row: synthetic. Lower row: the nearest slice that "
        "trained. Copies would be hard to tell apart.</p>",
        picture(lambda: _draw_pairs(result.pairs), "closest synthetic and real slices"),
    ]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{html.escape(str(k).replace('_', ' '))}: {_shown(v)}" for k, v in value.items())
    if isinstance(value, float):
        return f"{value:.3g}"
    return html.escape(str(value))


def _draw_pairs(pairs: np.ndarray) -> Figure:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(pairs), figsize=(1.3 * len(pairs), 2.8), squeeze=False)
    for column, pair in enumerate(pairs):
        for row in range(2):
            axes[row, column].imshow(np.rot90(pair[row]), cmap="gray", vmin=-1, vmax=1)
            axes[row, column].set(xticks=[], yticks=[])
    return figure
