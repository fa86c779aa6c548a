"""What the study of federated methods says of its rows: which was best, and how far from floor and ceiling."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import method_page
import method_study

sys.path.pop(0)


def row(question: str, name: str, dice: float) -> dict:
    """A run of three patients at one site, all with the same Dice."""
    return {
        "question": question, "task": "heart", "name": name, "seed": 0, "method": name, "labels": ["dense"],
        "which": "average", "bytes_per_round": 1, "config": {"size": 64, "rounds": 2, "updates": 3, "sites": 1},
        "scores": [["a", "", f"p{number}", dice] for number in range(3)],
    }  # fmt: skip


def test_the_best_row_is_set_beside_local_training_and_drawn_masks():
    rows = [row("fedicra", "local", 0.5), row("fedicra", "fedbn", 0.625), row("dense", "fedavg", 0.75)]
    (best,) = method_study.summary(rows)["best"]
    assert (best["name"], best["dice"]) == ("fedbn", 0.625)
    assert best["floor"]["mean"] == pytest.approx(0.125) and best["ceiling"]["mean"] == pytest.approx(-0.125)
    assert method_page.advice(best) == (
        "Heart: fedbn was best, .125 above local; drawn masks at every site give +.125."
    )


def test_a_floor_that_nothing_exceeds_is_the_best_row():
    (best,) = method_study.summary([row("cmc", "each modality alone", 0.75), row("cmc", "cmc", 0.5)])["best"]
    assert method_page.advice(best) == "Heart: each modality alone was best."


def test_masks_are_what_fixations_are_compared_with_and_no_rival():
    rows = [row("gaze", "masks", 0.75), row("gaze", "fixations", 0.625), row("gaze", "fixations, one level", 0.5)]
    (best,) = method_study.summary(rows)["best"]
    assert best["name"] == "fixations" and best["ceiling"]["against"] == "masks"


def test_a_single_row_says_nothing():
    assert method_study.summary([row("dense", "local", 0.5)])["best"] == []
