"""Which of this package's trainings a request is for: its `model_args` tell, without the plan that is sent."""

from __future__ import annotations

from collections.abc import Mapping

FACTORY, SEGMENTATION, ADAPTATION = "factory", "segmentation", "adaptation"
MODEL_ARGS = {
    FACTORY: {"factory", "seed", "transport"},
    SEGMENTATION: {"config", "train"},
    ADAPTATION: {"card", "adaptation"},
}
MARKS = {FACTORY: "factory", SEGMENTATION: "config", ADAPTATION: "card"}  # the argument that the plan begins with


def kind_of(model_args: object) -> str | None:
    """FACTORY, SEGMENTATION or ADAPTATION; None for anything else, mixtures included.

    Each plan reads its own arguments and fails without them, so a request cannot pass for another kind.
    """
    if not isinstance(model_args, Mapping):
        return None
    kinds = [kind for kind, mark in MARKS.items() if mark in model_args and set(model_args) <= MODEL_ARGS[kind]]
    return kinds[0] if kinds else None
