"""When numbers about a received generator leave a site."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.generative import make_generator
from fedfactory.node.plans.leaving_quality import comparable_slices, leaving_quality
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.guarded_round import GuardedRound, begin
from fedfactory.node.protection.usual_generator import INTERVAL, MAX_RATIO, GeneratorRecord, record_file, sketch_of
from fedfactory.node.store.slice_store import SliceStore
from helpers import SITE_SECRET, guarded


def moved(weights, length, seed=0):
    """Weights at a distance."""
    rng = torch.Generator().manual_seed(seed)
    step = {name: torch.randn(value.shape, generator=rng) for name, value in weights.items()}
    norm = math.sqrt(sum(float(value.square().sum()) for value in step.values()))
    return {name: value + step[name] * (length / norm) for name, value in weights.items()}


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {"a": torch.randn(300, 20), "b": torch.randn(50)}


@pytest.fixture
def record(weights):
    """After a round in which the site changed the weights by 2."""
    return GeneratorRecord().after_round(moved(weights, 2.0), weights, SITE_SECRET, answered=False)


def test_a_sketch_keeps_distances_and_cannot_be_made_without_the_secret(weights):
    other = moved(weights, 3.0)
    distance = float((sketch_of(other, SITE_SECRET) - sketch_of(weights, SITE_SECRET)).norm())
    assert distance == pytest.approx(3.0, rel=0.15)
    assert not torch.allclose(sketch_of(weights, SITE_SECRET), sketch_of(weights, bytes(32)))


def test_only_the_usual_next_generator_is_answered(weights, record):
    assert record.ratio(moved(weights, 2.0, seed=1), SITE_SECRET) == pytest.approx(1.0, rel=0.15)
    assert record.answers(moved(weights, 0.8 * 2 * MAX_RATIO, seed=1), SITE_SECRET)
    assert not record.answers(moved(weights, 1.2 * 2 * MAX_RATIO, seed=1), SITE_SECRET)
    assert not GeneratorRecord().answers(weights, SITE_SECRET)  # a site's first round


def test_the_next_answer_needs_further_rounds_whatever_state_is_asked_for(weights, record, tmp_path):
    record = record.after_round(weights, moved(weights, 1.0), SITE_SECRET, answered=True)
    for _ in range(INTERVAL):
        assert not record.answers(moved(weights, 1.0), SITE_SECRET)
        record.save(tmp_path / "x.store")
        record = GeneratorRecord.load(tmp_path / "x.store")
        record = record.after_round(weights, moved(weights, 1.0), SITE_SECRET, answered=False)
    assert record.answers(moved(weights, 1.0), SITE_SECRET)


def test_the_record_is_private_and_a_damaged_one_answers_nothing(weights, record, tmp_path):
    store = tmp_path / "x.store"
    record.save(store)
    assert GeneratorRecord.load(store) == record
    assert record_file(store).stat().st_mode & 0o077 == 0
    assert record_file(store).stat().st_size < 10_000
    for text in ("", "{", '{"sketch": [1.0], "changed": 1.0, "rounds": 0}', '{"sketch": "x"}'):
        record_file(store).write_text(text)
        assert not GeneratorRecord.load(store).answers(weights, SITE_SECRET)


def test_quality_leaves_for_enough_patients_and_within_the_quota(patients, config):
    store = SliceStore(patients)
    torch.manual_seed(0)
    generator = make_generator(replace(config, image_size=32, channels=(8, 8, 8)))
    weights = dict(generator.named_parameters())
    record = GeneratorRecord().after_round(weights, moved(weights, 1.0), SITE_SECRET, answered=False)
    with guarded() as guard:
        found = leaving_quality(store, generator, record, domain=0)
        assert set(found) == {"distance", "layout", "contrast"}
        assert leaving_quality(store, generator, replace(record, rounds=0), domain=0) == {}
        assert guard.held_back == []  # it was not due
    used_up = begin(GuardedRound(policy=Policy(), secret=SITE_SECRET, qualities_left=False))
    far = replace(record, changed=record.changed / 1000)
    for context, known, reason in (
        (guarded(), GeneratorRecord(), "this site has sent no generator yet"),
        (guarded(), far, "the generator is not the usual next one"),
        (guarded(least_patients=4), record, "too few patients or height bins"),
        (guarded(quality_leaves=False), record, "the site's policy keeps it"),
        (used_up, record, "as many as the policy allows have left in 24 hours"),
    ):
        with context as guard:
            assert leaving_quality(store, generator, known, domain=0) == {}
            assert guard.held_back == [f"quality ({reason})"]


def test_height_bins_of_too_few_patients_are_left_out(patients):
    store = SliceStore(patients)
    chosen = store.slices("train")
    bins = store.z_bin[chosen]
    assert set(comparable_slices(store, 1)) == set(chosen)
    store.z_bin = store.z_bin.copy()
    first = np.flatnonzero(store.volume_of_slices() == store.volume_of_slices()[chosen[0]])
    store.z_bin[chosen[bins == 0]] = 1
    store.z_bin[first[0]] = 0  # one patient's slice alone at this height
    found = comparable_slices(store, 2)
    assert first[0] not in found
    assert len(found) == len(chosen) - 1
    store.z_bin[:] = 1
    assert not len(comparable_slices(store, 2))  # one bin of four: a single mean slice
