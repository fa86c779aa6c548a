"""The segmenter for other contrasts that travels in a labelled factory: of one site, or trained by several together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fedfactory.adaptation.engine.segmenter_config import SegmenterConfig
from fedfactory.adaptation.labelled_factory import LabelledFactory
from fedfactory.adaptation.methods.registry import make_method
from fedfactory.adaptation.segmenter import Segmenter
from fedfactory.adaptation.training.label_branch_training import train_label_branch
from fedfactory.errors import UsageError
from fedfactory.node import labelling
from fedfactory.node.labelling import label_factory, train_on_store
from helpers import method_of, site

BRIEF = SegmenterConfig(updates=2, width=8, batch_size=2)


def test_random_contrast_reverses_the_order_of_grey_levels_in_some_slices():
    data = site()

    def reversed_share(first_guess: bool) -> float:
        """Share of the augmented slices whose structures are darker than the tissue around them."""
        method = method_of("fedavg")
        method = make_method(replace(method.config, first_guess=first_guess))
        torch.manual_seed(0)
        chosen = np.tile(np.arange(len(data)), 8)
        images, allowed = method.augmented(data, chosen, torch.device("cpu"))
        structure, background = allowed[:, 1:].any(1, keepdim=True), allowed[:, :1]
        inside, outside = (
            (images * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1) for mask in (structure, background)
        )
        return float((inside < outside).float().mean())

    assert reversed_share(False) == 0.0
    assert reversed_share(True) > 0.1


def test_a_given_segmenter_travels_in_place_of_one_that_is_trained_here(trained, store, tmp_path):
    trained.save(tmp_path / "f.safetensors")
    given = train_on_store(store, replace(BRIEF, seed=5))
    given.save(tmp_path / "g.safetensors")
    files = (tmp_path / "f.safetensors", store.path, tmp_path / "l.safetensors")
    label_factory(*files, config=BRIEF, branch_updates=2, first_guess_file=tmp_path / "g.safetensors")
    found = LabelledFactory.load(tmp_path / "l.safetensors").robust
    for parameter, expected in zip(found.network.parameters(), given.network.parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_with_both_segmenters_given_only_the_branch_is_trained(trained, store, tmp_path, monkeypatch):
    trained.save(tmp_path / "f.safetensors")
    for name, seed in (("own", 1), ("guess", 2)):
        train_on_store(store, replace(BRIEF, seed=seed)).save(tmp_path / f"{name}.safetensors")
    teachers = []

    def seen(factory, teacher, robust, **options):
        teachers.append(teacher)
        return train_label_branch(factory, teacher, robust, **options)

    monkeypatch.setattr(labelling, "train_label_branch", seen)
    monkeypatch.setattr(labelling, "train_on_store", lambda *_: pytest.fail("a segmenter was trained"))
    label_factory(
        tmp_path / "f.safetensors", store.path, tmp_path / "l.safetensors", branch_updates=2,
        segmenter_file=tmp_path / "own.safetensors", first_guess_file=tmp_path / "guess.safetensors",
    )  # fmt: skip
    (teacher,), own = teachers, Segmenter.load(tmp_path / "own.safetensors")
    assert equal_weights(teacher, own) and not equal_weights(teacher, Segmenter.load(tmp_path / "guess.safetensors"))


def equal_weights(first: Segmenter, second: Segmenter) -> bool:
    pairs = zip(first.network.parameters(), second.network.parameters(), strict=True)
    return all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("change", [{"size": 32}, {"classes": 4}])
def test_a_first_guess_for_other_slices_or_labels_is_refused(change, trained, store, tmp_path):
    trained.save(tmp_path / "f.safetensors")
    made = train_on_store(store, BRIEF)
    if "size" in change:
        made.format = replace(made.format, **change)
    else:
        plan = replace(made.card.plan, **change)
        made.card = replace(made.card, plan=plan, **change)
        made = Segmenter.from_dict(made.to_dict())
    made.save(tmp_path / "g.safetensors")
    (name,) = change
    with pytest.raises(UsageError, match=f"{name} is {change[name]}; it must be"):
        label_factory(
            tmp_path / "f.safetensors", store.path, tmp_path / "l.safetensors", config=BRIEF,
            first_guess_file=tmp_path / "g.safetensors",
        )  # fmt: skip
    assert not (tmp_path / "l.safetensors").exists()
