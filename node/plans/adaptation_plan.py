"""Phase two through Fed-BioMed: a site trains its own segmenter at the request of a researcher."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fedbiomed.common.datamanager import DataManager
from torch import Tensor, nn

from ...adaptation.labelled_factory import LabelledFactory
from ...adaptation.segmenter import Segmenter
from ...errors import NodeDataError, UsageError
from ..fedbiomed_hooks import PersistentOptimizerPlan
from ..protection import guarded_round
from ..protection.usual_generator import GeneratorRecord
from ..site_adaptation import Adaptation, adapt_site
from ..site_data.held_out_scores import held_out_scores
from ..store.slice_store import SliceStore
from .error_redaction import redact_errors
from .factory_dataset import SliceDataset
from .leaving_quality import leaving_quality

SEGMENTERS_SUFFIX = ".segmenters"  # after the store's name: folder of the segmenters that the site keeps
MAX_VOLUMES = 1000  # synthetic subjects that a site draws at the request of a researcher
MAX_UPDATES = 200_000  # of a training at the request of a researcher


class LabelledFactoryNetworks(nn.Module):
    """The networks of a labelled factory as one module, which the framework can send."""

    def __init__(self, labelled: LabelledFactory) -> None:
        super().__init__()
        self.generator, self.robust = labelled.factory.generator, labelled.robust.network
        self.branches = nn.ModuleList(labelled.branches)


class AdaptationDataset(SliceDataset):
    """The site's slices without image embeddings and labels, which phase two does not read here."""

    def _read_embedding(self) -> None:
        self.encoding = self.guide = None

    def _read_labels(self) -> None:
        self.labels = None


@dataclass(frozen=True, kw_only=True)
class AdaptationReport:
    """All that the researcher learns from an adaptation; scores and measures of a few decimals, see `leaving_numbers`.

    Attributes:
        domain: of the site.
        slices: number of the site's training slices.
        labelled_slices: number of the site's labelled slices that were trained on.
        synthetic_slices: number of slices in the training set.
        alarms: number of problems that the site found.
        seconds: duration of the training.
        explained_adapted: see `SiteAssessment`, in [0, 1].
        explained_first_guess: see `SiteAssessment`, in [0, 1].
        quality: numbers of `SiteQuality` by name; empty where the site keeps them, see `leaving_quality`.
        test_dice: mean foreground Dice on the site's labelled test cases; None without enough patients.
        test_cases: number of these cases.
    """

    domain: str
    slices: int
    labelled_slices: int
    synthetic_slices: int
    alarms: int
    seconds: float
    explained_adapted: float
    explained_first_guess: float
    quality: dict[str, float]
    test_dice: float | None = None
    test_cases: int = 0

    def to_dict(self) -> dict[str, str | float]:
        """The values that there are; those about slices as `quality_NAME`."""
        values = asdict(self)
        quality = {f"quality_{name}": value for name, value in values.pop("quality").items()}
        if self.test_dice is None:
            del values["test_dice"]
        return values | quality


class AdaptationTrainingPlan(PersistentOptimizerPlan):
    """Phase two at a site: from a received labelled factory to the site's own segmenter, which stays at the site.

    The weights of the factory arrive as those of the model. They are not changed, and no weight is sent back.

    model_args has these entries:
        card: of the labelled factory.
        adaptation: `Adaptation` as a dict.

    Attributes:
        sends_weights: False; the researcher's side refuses weights that are sent nevertheless.
    """

    sends_weights = False

    def init_model(self, model_args: Mapping[str, Any]) -> LabelledFactoryNetworks:
        try:
            self.labelled = LabelledFactory.from_dict(model_args["card"])
        except UsageError as error:
            raise NodeDataError(f"the labelled factory cannot be used ({error}); send another one") from None
        self.adaptation = Adaptation.from_dict(model_args["adaptation"])
        segmenter, translator = self.adaptation.segmenter, self.adaptation.translator
        updates = max(segmenter.wanted_updates, translator.updates + translator.pretraining)
        if self.adaptation.volumes > MAX_VOLUMES:
            raise NodeDataError(f"volumes is {self.adaptation.volumes}; a site draws at most {MAX_VOLUMES}")
        if segmenter.minutes is not None:
            raise NodeDataError(f"minutes is {segmenter.minutes}; give the number of updates instead")
        if updates > MAX_UPDATES:
            raise NodeDataError(f"updates is {updates}; a site makes at most {MAX_UPDATES}")
        return LabelledFactoryNetworks(self.labelled)

    def make_optimizers(self, model: LabelledFactoryNetworks) -> dict[str, torch.optim.Optimizer]:
        return {}

    def training_data(self) -> DataManager:
        self.dataset = AdaptationDataset()
        self.dataset.config = self.labelled.factory.config
        return DataManager(self.dataset, shuffle=True, drop_last=True)

    def training_step(self, data: Any, target: Any) -> None:
        raise NotImplementedError("adaptation is no loop over batches of the site; use `training_routine`")

    @redact_errors
    def training_routine(self, history_monitor: Any = None, node_args: dict | None = None) -> int:
        """Train the site's segmenter and write it beside the store. Returns the number of the site's slices."""
        started, store = time.monotonic(), self.dataset.store
        self.model().eval()
        segmenter = adapt_site(
            store.path,
            segmenter_file(store, self.model()),
            factory_file=self.labelled,
            adaptation=self._with_own_seeds(self.adaptation),
        )
        training, assessment = segmenter.card.training, segmenter.card.assessment
        dice, cases = _held_out_dice(store, segmenter)
        report = AdaptationReport(
            domain=store.domain,
            slices=len(self.dataset),
            labelled_slices=training.labelled_slices,
            synthetic_slices=training.slices,
            alarms=len(assessment.alarms),
            seconds=time.monotonic() - started,
            explained_adapted=assessment.explained["adapted"],
            explained_first_guess=assessment.explained["first_guess"],
            quality=self._leaving_quality(store),
            test_dice=dice,
            test_cases=cases,
        )
        self._report = self.leaving_numbers(report.to_dict())
        return len(self.dataset)

    def _with_own_seeds(self, adaptation: Adaptation) -> Adaptation:
        """The settings with seeds that nobody knows outside the site."""
        parts = (adaptation.segmenter, adaptation.translator)
        segmenter, translator = (replace(part, seed=self.site_seed("adaptation", part.seed)) for part in parts)
        return replace(adaptation, segmenter=segmenter, translator=translator)

    def _leaving_quality(self, store: SliceStore) -> dict[str, float]:
        factory, record = self.labelled.factory, GeneratorRecord.load(store.path)
        quality = leaving_quality(store, factory.generator, record, domain=factory.config.domain_index(store.domain))
        if quality:
            replace(record, rounds=0).save(store.path)
        return quality

    @redact_errors
    def after_training_params(self, flatten: bool = False) -> dict[str, Tensor] | list[float]:
        """At a site after training: nothing. At the researcher: the labelled factory that is sent, as tensors of the
        parameters' own shapes or, with `flatten`, as a list of numbers."""
        if self.node_id() is None or not hasattr(self, "_report"):
            return super().after_training_params(flatten)
        guarded_round.current().declare({})
        return [] if flatten else {}

    def optimizer_args(self) -> dict[str, object]:
        """All that the researcher learns, see `AdaptationReport`."""
        return {**super().optimizer_args(), **getattr(self, "_report", {})}


def segmenter_file(store: SliceStore, networks: nn.Module) -> Path:
    """File of the segmenter made with a factory; training again with the same factory overwrites it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(networks.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
    folder = store.path.with_name(store.path.name + SEGMENTERS_SUFFIX)
    return folder / f"{store.domain}_{digest.hexdigest()[:12]}.safetensors"


def _held_out_dice(store: SliceStore, segmenter: Segmenter) -> tuple[float | None, int]:
    """Mean foreground Dice on densely labelled test cases, None where the site keeps it or too few patients have a
    class; and the number of these cases."""
    guard = guarded_round.current()
    if store.classes != segmenter.classes or not (guard.policy.scores_leave and guard.scores_left):
        return None, 0
    scores = held_out_scores(store, segmenter, least_patients=guard.policy.least_patients_scored)
    return scores.get("dice"), int(scores.get("test_cases", 0))
