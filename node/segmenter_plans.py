"""Which segmenter a site would train on its store, and how long that takes on this machine."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..adaptation.adapt import pseudo_label
from ..adaptation.engine.planned_network import PlannedNetwork
from ..adaptation.engine.segmenter_config import SegmenterConfig
from ..adaptation.engine.training_plan import TrainingPlan
from ..adaptation.labelled_factory import LabelledFactory
from ..adaptation.training.segmenter_training import SegmenterData, plan_segmenter, seconds_per_update
from ..common.records import record_to_dict
from .labelling import labelled_slices
from .store.slice_store import SliceStore


@dataclass(frozen=True, kw_only=True)
class PlannedTraining:
    """A plan with what it costs.

    Attributes:
        plan: network and training.
        spacing: millimetres per pixel.
        slices: number of slices that are trained on.
        parameters: of the network.
        memory: estimated memory of the training, bytes.
        seconds_per_update: measured on this machine.
    """

    plan: TrainingPlan
    spacing: float
    slices: int
    parameters: int
    memory: float
    seconds_per_update: float

    @property
    def minutes(self) -> float:
        """Expected minutes of the whole training."""
        return self.plan.updates * self.seconds_per_update / 60

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**record_to_dict(self), "minutes": self.minutes}

    def rows(self) -> list[tuple[str, str]]:
        """What a user reads: names and values."""
        plan = self.plan
        window = f"{plan.window} x {plan.window} pixels, {plan.window * self.spacing:.0f} mm"
        return [
            ("network", f"{plan.network}, {self.parameters / 1e6:.2f} million parameters, {plan.precision}"),
            ("channels by level", " ".join(str(width) for width in plan.widths)),
            ("window", window if plan.slices == 1 else f"{window}, {plan.slices} slices"),
            ("pixels", f"{plan.fold} x {plan.fold} folded into channels" if plan.fold > 1 else "not folded"),
            ("classes", f"{plan.classes}, background included"),
            ("training slices", str(self.slices)),
            ("batch", f"{plan.batch_size} windows"),
            ("random angle", f"up to {math.degrees(plan.rotation):.0f} degrees{', mirrored' if plan.mirror else ''}"),
            ("learning rate", f"{plan.learning_rate:g}"),
            ("memory", f"about {self.memory / 2**30:.1f} GiB"),
            ("updates", f"{plan.updates}, {self.seconds_per_update:.3f} s each"),
            ("training", f"about {max(1, math.ceil(self.minutes))} min on this machine"),
        ]


def plan_on_store(
    store_dir: str | Path,
    config: SegmenterConfig,
    *,
    factory_file: str | Path | None = None,
    device: str = "cpu",
) -> PlannedTraining:
    """Plan a training on a store, and time a few updates.

    Args:
        store_dir: slice store; with labels, or with a factory.
        config: what is chosen.
        factory_file: labelled factory, whose first guess gives the store's slices their labels and is trained further.
        device: to train on.

    Raises: StoreError for a store without dense labels where no factory is given.
    """
    store = SliceStore(store_dir)
    if factory_file is None:
        data = SegmenterData(labelled=labelled_slices(store))
    else:
        first_guess = LabelledFactory.load(factory_file).robust
        chosen = store.slices("train")
        images, volume = store.images[chosen].astype(np.float32), store.volume_of_slices()[chosen]
        data = SegmenterData(labelled=pseudo_label(images, first_guess, volume), start=first_guess)
    plan = plan_segmenter(data, store.format, config, device=device)
    return PlannedTraining(
        plan=plan,
        spacing=store.format.spacing,
        slices=len(data.labelled.images),
        parameters=sum(values.numel() for values in PlannedNetwork(plan).parameters()),
        memory=plan.memory,
        seconds_per_update=seconds_per_update(data, plan, config, device=device),
    )
