"""What a malicious researcher learns of a site's slices and labels, without and with the site's protection.

Each attack is measured twice by the code that a node runs; without protection it must succeed, or the test proves
nothing. `benchmarks/attacks.py` has larger variants.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from attacking import answered_layouts, correlations, guessed_labels, rebuilt_slice, smooth_anatomy, trained_slice
from fedfactory.adaptation.labels.candidate_labels import SiteSlices, candidates_from_labels
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.site_secret import mixed_seed
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


def test_labels_by_scoring_rounds(patients, monkeypatch):
    monkeypatch.setattr(
        "fedfactory.adaptation.evaluation.scores.surface_distances", lambda *masks: (0.0, 0.0)
    )  # unread
    store = SliceStore(patients)
    assert guessed_labels(store, None, among=12) > 0.9
    assert guessed_labels(store, POLICY) < 0.55


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
