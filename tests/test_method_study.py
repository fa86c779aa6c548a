"""What the study of federated methods says of its rows: which was best, and how far from floor and ceiling."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import method_page
import method_summary

sys.path.pop(0)


def row(question: str, name: str, dice: float, *, before: bool = False, task: str = "heart") -> dict:
    """A run of three patients at one site, all with the same Dice; `before`: of an earlier version."""
    return {
        "question": question, "task": task, "name": name, "seed": 0, "method": name, "labels": ["dense"],
        "which": "average", "bytes_per_round": 1, "machine": {"device": "cpu"},
        "config": {"size": 64, "rounds": 2, "updates": 3, "sites": 1} | ({} if before else {"fold": 2}),
        "scores": [["a", "", f"p{number}", dice] for number in range(3)],
    }  # fmt: skip


def test_the_best_row_is_set_beside_local_training_and_drawn_masks():
    rows = [row("fedicra", "local", 0.5), row("fedicra", "fedbn", 0.625), row("dense", "fedavg", 0.75)]
    (best,) = method_summary.summary(rows)["best"]
    assert (best["name"], best["dice"]) == ("fedbn", 0.625)
    assert best["floor"]["mean"] == pytest.approx(0.125) and best["ceiling"]["mean"] == pytest.approx(-0.125)
    assert method_page.advice(best) == (
        "Heart: fedbn was best, .125 above local; drawn masks at every site give +.125."
    )


def test_a_floor_that_nothing_exceeds_is_the_best_row():
    (best,) = method_summary.summary([row("cmc", "each modality alone", 0.75), row("cmc", "cmc", 0.5)])["best"]
    assert method_page.advice(best) == "Heart: each modality alone was best."


def test_masks_are_what_fixations_are_compared_with_and_no_rival():
    rows = [row("gaze", "masks", 0.75), row("gaze", "fixations", 0.625), row("gaze", "fixations, one level", 0.5)]
    (best,) = method_summary.summary(rows)["best"]
    assert best["name"] == "fixations" and best["ceiling"]["against"] == "masks"


def test_a_single_row_says_nothing():
    assert method_summary.summary([row("dense", "local", 0.5)])["best"] == []


def test_runs_of_an_earlier_version_are_marked_and_compared_with_one_another_only():
    before = {"before": True, "task": "polyp"}
    rows = [
        row("fedicra", "local", 0.25, **before), row("fedicra", "fedicra", 0.375, **before),
        row("fedicra", "fedavg", 0.5), row("fedicra", "fedicra", 0.625), row("dense", "fedavg", 0.75, **before),
    ]  # fmt: skip
    found = method_summary.summary(rows)
    assert [(each["against"], each["mean"], each["earlier"]) for each in found["differences"]] == [
        ("fedavg", pytest.approx(0.125), False),
        ("local", pytest.approx(0.125), True),
        ("dense/fedavg", pytest.approx(-0.375), True),
    ]
    assert [(each["name"], each["dice"], each["earlier"]) for each in found["best"]] == [
        ("fedicra", 0.625, False),
        ("fedicra", 0.375, True),
    ]
    assert "ceiling" not in found["best"][0] and found["best"][1]["ceiling"]["mean"] == pytest.approx(-0.375)


def test_runs_of_an_earlier_version_are_left_out_where_the_question_was_asked_again():
    rows = [
        row("fedicra", "local", 0.25, before=True), row("fedicra", "fedicra", 0.375, before=True),
        row("fedicra", "local", 0.5), row("dense", "fedavg", 0.75, before=True),
    ]  # fmt: skip
    found = method_summary.summary(rows)
    shown = [(each["question"], each["name"], each["dice"], each["earlier"]) for each in found["rows"]]
    assert shown == [("fedicra", "local", 0.5, False), ("dense", "fedavg", 0.75, True)]
    assert not found["differences"] and not found["best"]


def test_a_ceiling_that_still_rises_is_called_too_short():
    rows = [row("dense", "fedavg", 0.75), row("dense", "fedavg, half as long", 0.5)]
    (difference,) = method_summary.summary(rows)["differences"]
    assert method_page.length(difference) == (
        "heart: **fedavg** gains +.250 by twice the length, so all methods would gain from longer runs."
    )
    assert method_page.length({**difference, "mean": 0.015}).endswith("twice the length, so runs are long enough.")
