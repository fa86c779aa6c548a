"""What a malicious researcher learns of a site's slices and labels, without and with the site's protection.

Each attack is measured twice by the code that a node runs; without protection it must succeed, or the test proves
nothing. `benchmarks/attacks.py` has larger variants.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from attacking import answered_layouts, correlations, rebuilt_slice, smooth_anatomy, trained_slice
from fedfactory.adaptation.labels.candidate_labels import SiteSlices, candidates_from_labels
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.segmenter_card import SegmenterCard
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.numbers import leaving_numbers
from fedfactory.node.protection.site_secret import mixed_seed
from fedfactory.node.site_data.held_out_scores import held_out_scores
from fedfactory.node.store.slice_store import SliceStore
from helpers import SITE_SECRET

REGION = (8, 24)  # rows and columns that are asked for
POLICY = Policy()
REQUESTS = 1024  # in a day
MOST = 0.2  # correlation


def site_of(count: int) -> SiteSlices:
    images, labels = smooth_anatomy(count)
    return SiteSlices(images, candidates_from_labels(labels, 3), np.array(["dense"] * count), 3)


def test_pixels_in_averaged_weights():
    """Detectors of one pixel each, in the last layer of the network that is sent."""
    data = site_of(16)
    target = trained_slice(data)  # the researcher's seed says which slice, and how it was moved
    part = (REGION[0], REGION[0] + 8)
    found = rebuilt_slice(data, region=part, seeds=lambda network, query: None)
    assert np.corrcoef(found.ravel(), target.augmented[slice(*part), slice(*part)].ravel())[0, 1] > 0.99

    def seeds(network: torch.nn.Module, query: int) -> int:  # as `PersistentOptimizerPlan.site_seed`
        weights = network.final_conv.weight.detach().numpy().tobytes()
        return mixed_seed(SITE_SECRET, hashlib.sha256(weights).hexdigest())

    limits = {"batch_size": POLICY.least_batch, "updates": POLICY.least_updates}
    found = rebuilt_slice(data, region=REGION, seeds=seeds, **limits)
    own = target.augmented[slice(*REGION), slice(*REGION)]
    assert abs(np.corrcoef(found.ravel(), own.ravel())[0, 1]) < MOST
    measured = np.abs(correlations(found, data.images, REGION))
    assert measured[target.number] < MOST
    assert measured.mean() < MOST


class Painter(torch.nn.Module):
    """A "segmenter" that marks one pixel of one slice, which it knows by its grey values."""

    def __init__(self, image: np.ndarray, row: int, column: int) -> None:
        super().__init__()
        self.image, self.row, self.column = torch.from_numpy(image), row, column

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = torch.zeros(len(x), 3, *x.shape[2:])
        logits[:, 0] = 50.0
        for number, image in enumerate(x):
            if torch.equal(image, self.image):
                logits[number, 1, self.row, self.column] = 100.0
        return logits


def test_labels_by_scoring_rounds(patients):
    store = SliceStore(patients)
    case = next(case for case in store.cases if case.has_reference)
    number = case.first + case.count // 2
    image, truth = store.images[number].astype(np.float32), store.labels[number] == 1
    card = SegmenterCard(classes=3, network="federated")
    rng = np.random.default_rng(0)
    marked, other = np.argwhere(truth), np.argwhere(~truth)

    def score(row: int, column: int, **rules: int) -> dict[str, float]:
        return held_out_scores(store, Segmenter(Painter(image, row, column), store.format, card), **rules)

    pixels = [*rng.permutation(marked)[:12], *rng.permutation(other)[:12]]
    said = [score(*pixel)["dice_1"] > 0 for pixel in pixels]
    right = np.array(said) == [truth[tuple(pixel)] for pixel in pixels]
    assert right.mean() > 0.9

    # All pixels in random order; what is not answered is guessed, which is right for half of either kind.
    answers = POLICY.scorings_a_day + POLICY.scores_a_day
    asked = rng.permutation(np.argwhere(np.ones_like(truth)))[:answers]
    hits = {True: 0.5 * len(marked), False: 0.5 * len(other)}
    for pixel in asked:
        values = score(*pixel, least_patients=POLICY.least_patients_scored)
        kept, _ = leaving_numbers({f"global_{name}": value for name, value in values.items()}, POLICY)
        held = bool(truth[tuple(pixel)])
        hits[held] += (kept["global_dice_1"] > 0) == held
        hits[held] -= 0.5
    balanced = (hits[True] / len(marked) + hits[False] / len(other)) / 2
    assert balanced < 0.55


def test_grey_values_by_the_layout_number():
    """Generators that paint one pixel in one height bin."""
    rng = np.random.default_rng(1)
    images, _ = smooth_anatomy(16, size=16)
    real, z_bin = torch.from_numpy(images), torch.from_numpy(rng.permutation(np.arange(16) % 4))
    means = np.stack([images[z_bin.numpy() == value, 0].mean(0) for value in range(4)])

    def learnt(answers: dict[int, float]) -> float:
        """Correlation of the answers with the site's mean slices, where nothing is known 0."""
        found = np.array([answers.get(query, 0.0) for query in range(REQUESTS)])
        return abs(np.corrcoef(found, means.ravel())[0, 1]) if found.std() else 0.0

    assert learnt(answered_layouts(real, z_bin, policy=None)) > 0.99
    assert learnt(answered_layouts(real, z_bin, policy=POLICY, patient=False)) < MOST
    assert learnt(answered_layouts(real, z_bin, policy=POLICY, patient=True)) < MOST
