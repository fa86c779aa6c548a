"""The notebooks of `examples/`, executed with tiny settings: `pytest -m tutorial`."""

from __future__ import annotations

import pytest
from fedfactory.generative import load_factory
from fedfactory.node.store.prepare import prepare
from fedfactory.node.store.prepare_config import PrepareConfig
from helpers import DOMAINS, TAG, run_notebook

pytestmark = pytest.mark.tutorial


def test_the_notebook_of_phase_one_is_an_ordinary_experiment(approved, config, tmp_path):
    settings = {"researcher": approved.researcher, "tag": TAG, "rounds": 1, "config": approved.folder / "config.json"}
    run_notebook("phase_one.ipynb", tmp_path, out=tmp_path, **settings)
    factory = load_factory(tmp_path / "factory.safetensors")
    assert factory.config.domains == DOMAINS and (tmp_path / "preview.png").stat().st_size > 1000


def test_the_notebook_of_phase_two_goes_from_a_factory_to_scores(trained, site, store, tmp_path):
    trained.save(tmp_path / "factory.safetensors")
    prepare(site, tmp_path / "other", PrepareConfig(domain="dark", size=16, z_bins=4, label_kind="none"))
    settings = {"factory": tmp_path / "factory.safetensors", "labelled_store": store.path, "store": tmp_path / "other"}
    printed = run_notebook("phase_two.ipynb", tmp_path, volumes=site, updates=3, out=tmp_path, **settings)
    assert "mean Dice" in "".join(printed) and "3 label maps" in "".join(printed)
