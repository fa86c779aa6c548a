"""Phase two through Fed-BioMed: a site adapts alone, for a researcher who has no other access to it."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fedbiomed.common.datamanager import DataManager
from torch import Tensor, nn

from ...adaptation.labelled_factory import LabelledFactory
from ...adaptation.labelled_slices import foreground_dice
from ...adaptation.segmenter import Segmenter
from ...errors import NodeDataError, UsageError
from ..fedbiomed_hooks import PersistentOptimizerPlan
from ..site_adaptation import Adaptation, adapt_site
from ..store.slice_store import SliceStore
from .error_redaction import redact_errors
from .factory_dataset import SliceDataset

FOLDER = ".segmenters"  # behind the store's name: where the site finds what was made
MOST_VOLUMES, MOST_UPDATES = 1000, 200_000  # a researcher may ask a site for


class LabelledFactoryNetworks(nn.Module):
    """A labelled factory's networks under one roof, for the framework to carry."""

    def __init__(self, labelled: LabelledFactory) -> None:
        super().__init__()
        self.generator, self.robust = labelled.factory.generator, labelled.robust.network
        self.branches = nn.ModuleList(labelled.branches)


class AdaptationDataset(SliceDataset):
    """The site's slices; phase two reads no embedding."""

    def _read_embedding(self) -> None:
        self.encoding = self.guide = None


class AdaptationTrainingPlan(PersistentOptimizerPlan):
    """Phase two at a site: from a labelled factory that comes to the site's own segmenter, which stays.

    model_args: {"card": of the labelled factory, "adaptation": `Adaptation` as a dict}. The factory's weights come as
    the model's. Nothing of it is changed, and no weight goes back.

    Attributes:
        sends_weights: False; a researcher's side refuses any that come nevertheless.
    """

    sends_weights = False

    def init_model(self, model_args: dict[str, Any]) -> LabelledFactoryNetworks:
        try:
            self.labelled = LabelledFactory.from_card(model_args["card"])
        except UsageError as error:
            raise NodeDataError(f"the labelled factory cannot be used: {error}") from None
        self.adaptation = Adaptation.from_dict(model_args["adaptation"])
        asked = self.adaptation
        updates = max(asked.segmenter.updates, asked.translator.updates + asked.translator.pretraining)
        if asked.volumes > MOST_VOLUMES or updates > MOST_UPDATES:
            raise NodeDataError(f"a site makes at most {MOST_VOLUMES} volumes and {MOST_UPDATES} updates")
        return LabelledFactoryNetworks(self.labelled)

    def make_optimizers(self, model: LabelledFactoryNetworks) -> dict[str, torch.optim.Optimizer]:
        return {}

    def training_data(self) -> DataManager:
        self.dataset = AdaptationDataset()
        self.dataset.config = self.labelled.factory.config
        return DataManager(self.dataset, shuffle=True, drop_last=True)

    def training_step(self, data: Any, target: Any) -> None:
        raise NotImplementedError("a site's segmenter is trained by `training_routine`")

    @redact_errors
    def training_routine(self, history_monitor: Any = None, node_args: dict | None = None) -> int:
        """Train the site's segmenter and keep it beside the store. Returns the number of the site's slices."""
        started, store = time.monotonic(), self.dataset.store
        self.model().eval()
        made = adapt_site(
            store.path, segmenter_file(store, self.model()), factory_file=self.labelled, adaptation=self.adaptation
        )
        facts = made.card
        self._summary = {
            "domain": store.domain,
            "slices": len(self.dataset),
            "labelled_slices": facts["labelled_slices"],
            "synthetic_slices": facts["slices"],
            "alarms": len(facts["alarms"]),
            "seconds": round(time.monotonic() - started, 1),
            **{f"explained_{name}": value for name, value in facts["explained"].items()},
            **{f"quality_{name}": value for name, value in facts["quality"].items()},
            **_held_out_dice(store, made),
        }
        return len(self.dataset)

    @redact_errors
    def after_training_params(self, flatten: bool = False) -> dict[str, Tensor] | list[float]:
        """At a site: nothing. At the researcher: the factory that is sent."""
        if self.node_id() is None or not hasattr(self, "_summary"):
            return super().after_training_params(flatten)
        return [] if flatten else {}

    def optimizer_args(self) -> dict[str, Any]:
        """All that the researcher learns: counts, seconds, and how well classes and synthetic slices fit the site's;
        Dice where the site has labelled cases that it keeps for testing."""
        return {**super().optimizer_args(), **getattr(self, "_summary", {})}


def segmenter_file(store: SliceStore, networks: nn.Module) -> Path:
    """Where a site keeps the segmenter made by a factory: the same factory again takes its own one's place."""
    digest = hashlib.sha256()
    for name, tensor in sorted(networks.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    folder = store.path.with_name(store.path.name + FOLDER)
    return folder / f"{store.domain}_{digest.hexdigest()[:12]}.safetensors"


def _held_out_dice(store: SliceStore, segmenter: Segmenter) -> dict[str, float]:
    """Mean foreground Dice on labelled test cases; nothing where there are none, or labels of another kind."""
    cases = [case for case in store.cases if case.split == "test" and case.label_kind == "dense"]
    if not cases or store.classes != segmenter.classes:
        return {}
    scores = []
    for case in cases:
        chosen = slice(case.first, case.first + case.count)
        images = torch.from_numpy(store.images[chosen].astype(np.float32))[:, None]
        truth = torch.from_numpy(store.labels[chosen].astype(np.int64))
        scores.append(foreground_dice(segmenter.probabilities(images).argmax(1), truth, store.classes))
    return {"test_dice": float(np.nanmean(scores)), "test_cases": len(cases)}
