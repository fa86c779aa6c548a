"""The audit separates planted copies and planted noise from an honest generator, with stated confidence."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fedfactory.errors import StoreError
from fedfactory.generative.metrics.fidelity import (
    attack_auc,
    copying_ratio,
    frechet_distance,
    nearest,
    precision_and_recall,
)
from fedfactory.node import audit as audit_module
from fedfactory.node.audit import audit, audit_factory
from fedfactory.node.audit_slices import AuditSlices
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import PATIENT, write_site
from pytorch_msssim import ms_ssim

SIDE, BINS = 32, 4


def patients(count, *, first=0) -> AuditSlices:
    """Blobs whose positions and sizes belong to a patient, in four height bins each."""
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, SIDE)] * 2, indexing="ij"))
    images = []
    for patient in range(first, first + count):
        rng = torch.Generator().manual_seed(patient)
        centres, sizes = torch.rand(3, 2, generator=rng) * 1.2 - 0.6, torch.rand(3, generator=rng) * 0.08 + 0.02
        for z_bin in range(BINS):
            squares = ((grid[None] - centres[:, :, None, None] * (1 - 0.1 * z_bin)) ** 2).sum(1)
            blobs = torch.exp(-squares / sizes[:, None, None]).sum(0).clamp(max=1)
            images.append(1.6 * blobs - 0.9 + 0.03 * torch.randn(SIDE, SIDE, generator=rng))
    z_bin = torch.arange(BINS).repeat(count)
    return AuditSlices(torch.stack(images)[:, None], z_bin, torch.arange(count).repeat_interleave(BINS))


@pytest.fixture(scope="module")
def real():
    return patients(20), patients(20, first=100)


def noisy(slices, deviation=0.05) -> AuditSlices:
    rng = torch.Generator().manual_seed(1)
    noise = deviation * torch.randn(slices.images.shape, generator=rng)
    return AuditSlices(slices.images + noise, slices.z_bin, slices.group)


def test_an_honest_generator_passes(real):
    found = audit(patients(20, first=200), *real)
    assert found.findings == []
    for space in found.privacy.values():
        assert space.copying_ratio.low < 1 < space.copying_ratio.high * 1.05
        assert space.attack_auc.low < 0.5 < space.attack_auc.high
    assert found.fidelity.precision > 0.5
    assert found.fidelity.recall > 0.25  # eighty slices of twenty patients cover little of the slices of other patients


def test_a_generator_that_copies_is_caught_in_both_spaces_and_its_pairs_are_shown(real):
    found = audit(noisy(real[0]), *real)
    text = " ".join(found.findings)
    assert "the generator copies" in text
    assert "can be distinguished from others" in text
    for space in found.privacy.values():
        assert space.copying_ratio.high < 0.8
        assert space.attack_auc.low > 0.9
    assert found.pairs.shape == (10, 2, SIDE, SIDE, 3)
    assert np.abs(found.pairs[:, 0] - found.pairs[:, 1]).mean() < 0.05


def test_a_generator_that_copies_one_patient_in_four_is_caught(real):
    trained, held_out = real
    copied = trained.take(torch.arange(5 * BINS))
    fresh = patients(15, first=300)
    mixed = AuditSlices(
        torch.cat([noisy(copied).images, fresh.images]),
        torch.cat([copied.z_bin, fresh.z_bin]),
        torch.cat([copied.group, fresh.group + 100]),
    )
    assert any("copies" in text for text in audit(mixed, trained, held_out).findings)


def test_noise_copies_nobody_and_has_no_fidelity(real):
    rng = torch.Generator().manual_seed(0)
    shape = real[0].images.shape
    noise = AuditSlices(torch.rand(shape, generator=rng) * 2 - 1, real[0].z_bin, real[0].group)
    found, honest = audit(noise, *real), audit(patients(20, first=200), *real)
    assert not any("copies" in text for text in found.findings)
    assert found.fidelity.precision == found.fidelity.recall == 0
    for name in ("kernel_distance", "frechet_distance", "intensity_distance"):
        assert getattr(found.fidelity, name) > 5 * abs(getattr(honest.fidelity, name))


def test_a_collapsed_generator_has_no_diversity(real):
    patient = real[1].take(torch.arange(BINS))
    collapsed = AuditSlices(patient.images.repeat(20, 1, 1, 1), patient.z_bin.repeat(20), real[0].group)
    fidelity = audit(noisy(collapsed, 0.01), *real).fidelity
    assert fidelity.similarity_within_synthetic > 0.9 > fidelity.similarity_within_real
    assert fidelity.recall < 0.3


def test_the_frechet_distance_of_normal_sets_is_the_closed_form():
    torch.manual_seed(0)
    x = torch.randn(4000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0.0, 0.0])
    y = torch.randn(4000, 3, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    # The axes are equal: the distance is the sum of squared differences of means and of standard deviations.
    assert frechet_distance(x, y) == pytest.approx(1 + 0 + 1 + 0.25, rel=0.1)


def test_precision_falls_with_outliers_and_recall_with_missing_parts():
    torch.manual_seed(0)
    real = torch.cat([torch.randn(100, 2), torch.randn(100, 2) + 20])
    half, outliers = torch.randn(200, 2), torch.cat([torch.randn(100, 2), torch.randn(100, 2) - 50])
    assert precision_and_recall(real, half)[0] > 0.9
    assert precision_and_recall(real, half)[1] < 0.6
    assert precision_and_recall(real, outliers)[0] < 0.6


def test_the_attackers_area_is_counted_by_patient_and_the_ratio_by_subject():
    members, others = torch.tensor([1.0, 3.0, 2.0, 2.0]), torch.tensor([2.0, 2.0, 5.0, 5.0])
    group = torch.tensor([0, 0, 1, 1])
    area = attack_auc(members, others, member_group=group, other_group=group)
    assert area.value == pytest.approx((0.5 + 1 + 0.5 + 1) / 4)
    assert area.low <= area.value <= area.high
    ratio = copying_ratio(torch.tensor([1.0, 1.0, 2.0, 2.0]), torch.full((4,), 2.0), group)
    assert ratio.value == pytest.approx(0.75)
    assert (ratio.low, ratio.high) == (0.5, 1.0)


def test_the_nearest_is_that_of_all_pairs():
    torch.manual_seed(0)
    a, b = torch.randn(300, 4), torch.randn(17, 4)
    distance, number = nearest(a, b)
    every = (a[:, None].double() - b[None].double()).norm(dim=2)
    torch.testing.assert_close(distance, every.min(1).values)
    assert torch.equal(number, every.argmin(1))


def test_an_audit_of_a_site_leaves_a_page_and_numbers_without_names(labelled_file, tmp_path):
    site = tmp_path / "site"
    write_site(site, cases=6)
    for case in list(site.iterdir()):
        case.rename(site / f"{PATIENT}{case.name}")
    config = PrepareConfig(domain="dark", size=16, z_bins=4, validation_share=0, test_share=0.5)
    store = prepare(site, tmp_path / "store", config).store
    made = audit_factory(labelled_file, store.path, tmp_path / "audit", volumes=3)
    text = (tmp_path / "audit" / "audit.json").read_text()
    numbers = json.loads(text)
    assert numbers["privacy"] == json.loads(json.dumps(made.numbers()["privacy"]))
    assert len(numbers["labels"]["shares_real"]) == len(numbers["labels"]["shares_synthetic"]) == 3
    assert any("fewer than 4 patients" in finding for finding in numbers["findings"])
    page = (tmp_path / "audit" / "audit.html").read_text()
    assert "stays at the site" in page
    for private in (PATIENT, str(tmp_path)):
        assert private not in text
        assert private not in page


def test_an_audit_needs_patients_that_were_held_out(labelled_file, store, tmp_path):
    whole = prepare(
        tmp_path / "site", tmp_path / "whole",
        PrepareConfig(domain="bright", size=16, z_bins=4, validation_share=0, test_share=0),
    ).store  # fmt: skip
    with pytest.raises(StoreError, match="test share"):
        audit_factory(labelled_file, whole.path, tmp_path / "audit", volumes=2)
    assert not (tmp_path / "audit").exists()


def test_the_similarity_of_slices_is_that_of_a_second_library(monkeypatch):
    """In batches, the last of which is not full. Of two patients with one slice each, all pairs are the same two."""
    rng = torch.Generator().manual_seed(0)
    first = torch.rand(1, 1, 96, 96, generator=rng) * 2 - 1
    second = (first + 0.3 * torch.randn(first.shape, generator=rng)).clamp(-1, 1)
    slices = AuditSlices(torch.cat([first, second]), torch.zeros(2, dtype=torch.long), torch.arange(2))
    weights = np.array([0.0448, 0.2856, 0.3001, 0.2363])  # four scales fit 96 pixels
    options = {"data_range": 2.0, "win_size": 5, "weights": (weights / weights.sum()).tolist()}
    expected = float(ms_ssim(first + 1, second + 1, **options))
    monkeypatch.setattr(audit_module, "SIMILARITY_PAIRS", 10)
    monkeypatch.setattr(audit_module, "PAIRS_AT_ONCE", 4)
    assert 0.1 < expected < 0.95
    assert audit_module._similarity(slices) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("channels", [3, 8])
def test_the_similarity_of_slices_counts_all_channels(channels):
    rng = torch.Generator().manual_seed(0)
    images = (torch.rand(1, channels, 32, 32, generator=rng) * 2 - 1).repeat(2, 1, 1, 1)
    slices = AuditSlices(images, torch.zeros(2, dtype=torch.long), torch.arange(2))
    assert audit_module._similarity(slices) == pytest.approx(1, abs=1e-5)
    images[1, -1] = torch.rand(32, 32, generator=rng) * 2 - 1
    assert audit_module._similarity(slices) < 1 - 0.5 / channels
