"""A training plan that is shown as something else than it runs is refused before anybody approves it."""

from __future__ import annotations

import inspect

import pytest
from fedfactory.errors import FedFactoryError, UsageError
from fedfactory.node.plan_source import refuse_disguised

PLAN = "import fedfactory\n\n\nclass Plan:\n    # decoding is done elsewhere\n    pass\n"


def test_the_plans_of_this_package_and_plain_plans_are_shown():
    from fedfactory.researcher.plans import factory_plans, segmentation_plans

    refuse_disguised("plain", PLAN)
    for module in (factory_plans, segmentation_plans):
        refuse_disguised(module.__name__, inspect.getsource(module))


@pytest.mark.parametrize(
    ("source", "line"),
    [
        (PLAN.replace("pass", "pass\u202e"), 6),  # turns the direction of what follows
        (PLAN.replace("pass", "\u0440ass"), 6),  # a Cyrillic letter
        (PLAN.replace("pass", "\uff50ass"), 6),  # a wide letter, which Python takes for "p"
        (PLAN.replace("pass", "pass\x1b[2K"), 6),
        (PLAN.replace("pass", "pass\rother"), 6),
        (PLAN.replace("pass", "pass\x0cother"), 6),
        (PLAN.replace("pass", "pass\x00"), 6),
        (PLAN.replace("pass", "pass\u2028other"), 6),
        ("\ufeff" + PLAN, 1),
        ("# -*- coding: utf-8 -*-\n" + PLAN, 1),
        ("\n  # vim: set fileencoding=latin-1 :\n" + PLAN, 2),
    ],
)
def test_other_signs_and_encodings_are_refused_with_their_line(source, line):
    with pytest.raises(UsageError, match=f"in line {line}") as refused:
        refuse_disguised("Plan", source)
    assert str(refused.value).isprintable()


def test_no_error_commands_a_terminal_or_breaks_a_line():
    error = FedFactoryError("a\nb\x1b[2J\u202e\x00 é 病")
    assert str(error) == "a b\\x1b[2J\\u202e\\x00 é 病"
