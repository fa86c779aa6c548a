"""What of a plan's report leaves a site: names, digits, and enough patients."""

from __future__ import annotations

import math

import pytest
from fedfactory.node.policy.policy import Policy
from fedfactory.node.protection.numbers import leaving_numbers

POLICY = Policy()


@pytest.mark.parametrize(
    ("name", "value", "leaves"),
    [
        ("loss", 0.123456, 0.123),
        ("loss_discriminator", 1.23456e-5, 1.23e-5),
        ("loss", math.nan, math.nan),
        ("global_dice", 0.87654321, 0.877),
        ("own_dice_12", 0.12349, 0.123),
        ("own_t2-w_dice_1", 0.5004, 0.5),
        ("global_hd95_1", 123.456, 123.0),
        ("global_hd95_undefined", 2, 2),
        ("test_dice", 0.99951, 1.0),
        ("quality_layout", 0.98765, 0.99),
        ("quality_distance", 0.012345, 0.012),
        ("explained_adapted", 0.5149, 0.51),
        ("spacing", 1.23456789, 1.23456789),
        ("height", 123.456789, 123.456789),
        ("samples", 12345, 12345),
        ("slices_dense", 7, 7),
        ("modality_slices_ct", 7.0, 7.0),
        ("seconds", 12.3456, 12.3),
    ],
)
def test_numbers_leave_with_the_digits_of_their_kind(name, value, leaves):
    kept, withheld = leaving_numbers({name: value}, POLICY)
    assert not withheld
    assert kept[name] == pytest.approx(leaves, abs=0, rel=1e-12, nan_ok=True)
    again, _ = leaving_numbers(kept, POLICY)
    assert again == pytest.approx(kept, abs=0, rel=0, nan_ok=True)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pixel_7", 0.5),
        ("loss_", 0.5),
        ("loss_17", 0.5),
        ("own_dice_1\n", 0.5),
        ("xglobal_dice", 0.5),
        ("quality_layout_3", 0.5),  # of one height bin
        ("loss", math.inf),
        ("loss", True),
        ("loss", "0.5"),
        ("loss", [0.5, 0.25]),
        ("samples", None),
        ("domain", 7),
        ("domain", "a" * 101),
        ("domain", "mri\x1b[2J"),
        (("loss",), 0.5),
    ],
)
def test_other_names_and_types_stay(name, value):
    kept, withheld = leaving_numbers({name: value, "domain" if name != "domain" else "samples": "x"}, POLICY)
    assert name not in kept
    assert withheld[name]


def test_a_policy_keeps_scores_and_qualities():
    values = {"global_dice": 0.5, "own_hd95_1": 3.0, "test_dice": 0.5, "quality_layout": 0.5, "samples": 3}
    kept, withheld = leaving_numbers(values, Policy(scores_leave=False, quality_leaves=False))
    assert kept == {"samples": 3}
    assert set(withheld) == set(values) - {"samples"}
    assert leaving_numbers(values, POLICY)[0] == values
