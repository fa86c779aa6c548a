"""Slices that the published program prepared: what they hold, and what their pickles may not do."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fedfactory.imaging.slice_choices import UNLABELLED
from fedfactory.node.store.original_slices import import_slices
from fedfactory.node.store.prepare_config import PrepareConfig


def write_slices(folder, cases=3, count=5, size=16, **extra):
    rng = np.random.default_rng(0)
    folder.mkdir()
    for case in range(cases):
        for number in range(count):
            mask = rng.integers(0, 3, (size, size))
            record = {"data": rng.uniform(-1, 1, (size, size, 1)).astype(np.float32),
                      "mask": np.stack([mask == k for k in range(3)], axis=2), "weight": None, **extra}  # fmt: skip
            np.save(folder / f"p{case}_slice{number:03d}.npy", record, allow_pickle=True)


def test_original_slices_become_a_store(tmp_path):
    write_slices(tmp_path / "s")
    result = import_slices(tmp_path / "s", tmp_path / "out", PrepareConfig(domain="x", z_bins=4))
    store = result.store
    assert (len(store), store.classes, store.format.size) == (15, 3, 16)
    record = np.load(tmp_path / "s" / "p1_slice002.npy", allow_pickle=True).item()
    np.testing.assert_allclose(store.images[7, 0], record["data"][..., 0], atol=5e-4)
    np.testing.assert_array_equal(store.labels[7], record["mask"].argmax(2))
    assert store.z_bin[5:10].tolist() == [0, 0, 1, 2, 3]


def test_references_of_original_slices_are_those_of_test_cases_alone(tmp_path):
    write_slices(tmp_path / "s")
    store = import_slices(tmp_path / "s", tmp_path / "out", PrepareConfig(domain="x", z_bins=4, test_share=0.4)).store
    held_out = {case.first for case in store.cases if case.split == "test"}
    assert held_out and len(held_out) < len(store.cases)
    assert set(store.references[:, 0]) == held_out
    store.verify()


def test_pixels_of_weight_zero_are_unlabelled(tmp_path):
    weight = np.ones((16, 16, 1), bool)
    weight[3] = False
    write_slices(tmp_path / "s", weight=weight)
    store = import_slices(tmp_path / "s", tmp_path / "out", PrepareConfig(domain="x", z_bins=4)).store
    assert (store.labels[:, 3] == UNLABELLED).all()
    assert (store.labels[:, 4:] != UNLABELLED).all()


class Hostile:
    def __reduce__(self):
        return os.mkdir, (Hostile.target,)


def test_a_slice_that_would_execute_code_is_refused(tmp_path):
    write_slices(tmp_path / "s")
    Hostile.target = str(tmp_path / "executed")
    np.save(tmp_path / "s" / "p1_slice002.npy", {"data": Hostile()}, allow_pickle=True)
    result = import_slices(tmp_path / "s", tmp_path / "out", PrepareConfig(domain="x", z_bins=4))
    assert "mkdir, which is no part of an array" in result.failed["p1"]
    assert len(result.store.cases) == 2
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("what", ["plain", "shape", "range", "missing", "text", "some masks", "object"])
def test_damaged_original_slices_are_refused_by_case(tmp_path, what):
    write_slices(tmp_path / "s")
    path = tmp_path / "s" / "p1_slice002.npy"
    record = np.load(path, allow_pickle=True).item()
    changed = {
        "shape": {**record, "data": record["data"][:8]},
        "range": {**record, "data": record["data"] * 100},
        "some masks": {**record, "mask": None},
        "object": {**record, "data": np.array([[1], "a"], dtype=object)},
    }
    if what == "plain":
        np.save(path, record["data"])
    elif what == "missing":
        path.unlink()
    elif what == "text":
        path.write_text("x")
    else:
        np.save(path, changed[what], allow_pickle=True)
    result = import_slices(tmp_path / "s", tmp_path / "out", PrepareConfig(domain="x", z_bins=4))
    assert list(result.failed) == ["p1"]
    assert len(result.store) == 10
