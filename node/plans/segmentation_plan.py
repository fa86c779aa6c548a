"""Federated segmentation at a site: one training plan for all methods."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from fedbiomed.common.datamanager import DataManager
from fedbiomed.common.dataset import CustomDataset
from fedbiomed.common.logger import logger
from torch import Tensor, nn

from ...adaptation.labels.candidate_labels import SiteSlices
from ...adaptation.methods.interface.federated_method import FederatedMethod
from ...adaptation.methods.interface.method_config import MethodConfig
from ...adaptation.methods.interface.site_round import MethodState, SiteContext, SiteRound, SiteUpdate
from ...adaptation.methods.registry import make_method
from ...adaptation.segmenter import Segmenter
from ...adaptation.segmenter_card import FEDERATED, FederatedDesign, SegmenterCard, TrainingFacts
from ...errors import FedFactoryError, NodeDataError, UsageError
from ..fedbiomed_hooks import PersistentOptimizerPlan
from ..protection import guarded_round
from ..site_choices import SiteChoices, digest
from ..site_data.held_out_scores import held_out_scores
from ..site_data.training_slices import site_slices
from ..store.slice_store import SliceStore
from .adaptation_plan import SEGMENTERS_SUFFIX
from .error_redaction import redact_errors
from .private_round import PRIVATE_EXPERIMENT, PrivateRound
from .site_settings import SiteSettings

MAX_UPDATES = 10_000  # in a round
SHOWN_NUMBERS = (
    "loss",
    "global_",
    "own_",
    "accepted",
    "adopted",
    "assessor",
    "distilled",
    "epsilon",
    "mix_",
)  # prefixes, for TensorBoard


class SegmentationDataset(CustomDataset):
    """A site's training slices. Set `config` and `site_settings` on the instance before the framework calls `read`.

    Attributes:
        config: of the method.
        site_settings: what the researcher sent for this site.
        store: the site's slice store.
        choices: of the site's administrator.
        stores: modality to store; empty for a site that has not chosen its modality.
        public_store: the store of public slices; None without any.
        data: the site's training slices.
        modalities: modality to training slices.
        public: the public slices that all sites have; None for methods that need none.
    """

    config: MethodConfig
    site_settings: SiteSettings

    @redact_errors
    def read(self) -> None:
        """Open the store. Raises: NodeDataError with a text that may leave the site; details go to the site's log."""
        try:
            self.store = SliceStore(self.path)
            self.choices = SiteChoices.load(self.store)
            self.stores = self.choices.stores(self.store)
            self.public_store = SliceStore(self.choices.public) if self.choices.public else None
        except FedFactoryError as error:
            logger.error(f"fedfactory: {error}")
            raise NodeDataError("this site's slice store cannot be read; see the node's log") from None
        if self.store.format.size != self.config.size:
            raise NodeDataError(
                f"this site's slices have {self.store.format.size} px, the method {self.config.size}; both must agree"
            )
        if (self.store.format.channels, self.store.format.colour) != (self.config.channels, self.config.colour):
            raise NodeDataError(
                f"this site's slices have {_channels(self.store.format.channels, colour=self.store.format.colour)}, "
                f"the method {_channels(self.config.channels, colour=self.config.colour)}; both must agree"
            )
        if self.store.classes > self.config.classes:
            raise NodeDataError(
                f"this site has {self.store.classes} label values, the method {self.config.classes}; it must have at "
                "least as many"
            )
        announced, held = self.site_settings.label_kinds, self.store.label_kinds()
        if announced is not None and announced != held:
            raise NodeDataError(
                f"this site announced {_listed(announced)} and holds {_listed(held)}; register its store again"
            )
        self.data = site_slices(self.store, self.config.classes)
        self.modalities = {name: site_slices(store, self.config.classes) for name, store in self.stores.items()}
        self.public = self._public()

    def _public(self) -> SiteSlices | None:
        """The public slices that all sites have. Raises: NodeDataError if they are not the researcher's."""
        expected = self.site_settings.public_digest
        if expected is None:
            return None
        if self.public_store is None:
            raise NodeDataError(
                "this site has no public slices; register its store again with `fedfactory site add ... --public STORE`"
            )
        if digest(self.public_store) != expected:
            raise NodeDataError("this site's public slices are not the researcher's; it must register a copy of those")
        return site_slices(self.public_store, self.config.classes)

    def __len__(self) -> int:
        return len(self.data)

    @redact_errors
    def get_item(self, index: int) -> dict[str, Tensor]:
        """{"image": (C, S, S) float32 in [-1, 1]} of one slice."""
        return {"image": torch.from_numpy(self.data.images[index])}


class SegmentationTrainingPlan(PersistentOptimizerPlan):
    """A site's part in a federated segmentation.

    aggregator_args are `SiteSettings` as a dict. model_args has these entries:
        config: MethodConfig as a dict.
        train: False for a round in which the average is scored only.

    Kept at the site between rounds: the optimizers' states, the number of rounds and the method's own state.

    Attributes:
        method_name: the method that the site approved; a configuration with another method is refused.
        config: of the method.
        method: made from the configuration.
    """

    method_name = ""

    def post_init(self, model_args: dict, training_args: dict, aggregator_args: dict | None = None, **kw: Any) -> None:
        super().post_init(model_args, training_args, aggregator_args, **kw)
        self._site_settings = SiteSettings.from_dict(aggregator_args or {})

    def init_model(self, model_args: Mapping[str, Any]) -> nn.Module:
        self.config = MethodConfig.from_dict(model_args["config"])
        if self.config.method != self.method_name:
            # Settings are not part of what a site approves; the method, and with it what leaves the site, is.
            raise NodeDataError(
                f"method is '{self.config.method}'; this plan was approved for '{self.method_name}' only"
            )
        if self.config.updates > MAX_UPDATES:
            raise NodeDataError(f"updates is {self.config.updates}; a site makes at most {MAX_UPDATES} in a round")
        try:
            self.method: FederatedMethod = make_method(self.config)
        except UsageError as error:
            raise NodeDataError(str(error)) from None
        model = self.method.build()
        self._local_names = self.method.local_parameters(model)
        return model

    def make_optimizers(self, model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return self.method.optimizers(model)

    def tag_parameters(self, name: str) -> set[str]:
        return {"local", "persistent"} if name in self._local_names else set()

    def training_data(self) -> DataManager:
        self.dataset = SegmentationDataset()
        self.dataset.config, self.dataset.site_settings = self.config, self._site_settings
        return DataManager(self.dataset, shuffle=False)

    def training_step(self, data: Any, target: Any) -> None:
        raise NotImplementedError("methods have their own rounds; use `training_routine`")

    @redact_errors
    def training_routine(self, history_monitor: Any = None, node_args: dict | None = None) -> int:
        """Evaluate the received average, train, then evaluate the site's own model; the segmenters of both are written
        beside the store. With differential privacy nothing is evaluated, and neither losses nor durations leave.
        Returns the number of slices."""
        started, store, site = time.monotonic(), self.dataset.store, self._site_settings.site
        self.enter_training(node_args)
        self._private = self._private_round()
        average = self._evaluate(site, "global") if self.method.has_average else {}
        report, own = SiteUpdate(0, math.nan), {}
        if self.model_args().get("train", True):
            report, state = self._train(site)
            own = self._evaluate(site, "own", state)
        counts = {f"slices_{kind}": count for kind, count in store.label_kinds().items()}
        if self._private is None:
            values = {
                "domain": store.domain,
                **report.to_dict(),
                **counts,
                **{f"global_{name}": value for name, value in average.items()},
                **{f"own_{name}": value for name, value in own.items()},
                "seconds": time.monotonic() - started,
            }
        else:  # all of this was announced, or follows from settings and the number of patients
            spent = asdict(self._private.spent())
            values = {"domain": store.domain, "samples": report.samples, **counts, **spent}
        self._summary = self.leaving_numbers(values)
        self._log_scalars(history_monitor)
        self.leave_training()
        return len(self.dataset)

    def _train(self, site: int) -> tuple[SiteUpdate, MethodState]:
        """The next round of the method at this site; its state goes to what the framework keeps between rounds."""
        kept, data = self.optimizers().extra, self.dataset
        state = self.method.State.from_dict(kept["method"]) if "method" in kept else self.method.new_state()
        number = kept.get("rounds", 0) + 1
        private = self._private.begin() if self._private is not None else None
        site_round = SiteRound(
            model=self.model(),
            optimizers=self.optimizers().optimizer,
            data=data.data,
            site=site,
            number=number,
            seed=self.site_seed("segmentation", json.dumps(self.config.to_dict(), sort_keys=True)),
            state=state,
            network=data.choices.network,
            public=data.public,
            modalities=data.modalities,
            private=private,
        )
        report = self.method.train_round(site_round)
        kept |= {"rounds": number, "method": state.to_dict()}
        return report, state

    def _private_round(self) -> PrivateRound | None:
        """Privacy of this round; None without. Raises: NodeDataError, see `PrivateRound`."""
        kept = self.optimizers().extra
        if kept.get("rounds") and self.config.private != (PRIVATE_EXPERIMENT in kept):
            raise NodeDataError("dp_epsilon has changed; it must be set from the first round of an experiment or never")
        return (
            PrivateRound(self.config, self.dataset.store.path, self.dataset.data, kept) if self.config.private else None
        )

    def optimizer_args(self) -> dict[str, object]:
        """What the researcher learns besides weights: domain, counts of slices by kind of label, losses, seconds, and
        scores of the average and of the site's own model where the site has densely labelled test cases; with
        differential privacy domain, counts of slices and patients, epsilon and delta alone."""
        return {**super().optimizer_args(), **getattr(self, "_summary", {})}

    def _evaluate(self, site: int, which: str, state: MethodState | None = None) -> dict[str, float]:
        """Write the site's segmenters and return their scores; none if the site's policy keeps them, and none with
        differential privacy, which they lack.

        Args:
            site: index of the site.
            which: "global" for the average, "own" for the site's own model.
            state: of the method at the site, for the own model.
        """
        model = self.model()
        device, training = next(iter(model.state_dict().values())).device, model.training
        segmenters = self._make_segmenters(site, which, state)
        self._write_segmenters(segmenters, which)
        if reason := self._why_no_scores():
            guarded_round.current().held_back.append(f"{which} scores ({reason})")
        scores = {} if reason else self._score(segmenters)
        model.to(device).train(training)  # segmenters, which may share its layers, are on the CPU in evaluation mode
        return scores

    def _why_no_scores(self) -> str:
        """Why no score leaves in this round, for the site's ledger; empty if scores may."""
        guard = guarded_round.current()
        if self._private is not None:
            return "differential privacy"
        if not guard.policy.scores_leave:
            return "the site's policy keeps them"
        return "" if guard.scores_left else "as many as the policy allows have left in 24 hours"

    def _make_segmenters(self, site: int, which: str, state: MethodState | None) -> dict[str, Segmenter]:
        """Modality to segmenter on the CPU; only "" where the method does not distinguish modalities."""
        segmenters = {}
        spent = None if self._private is None else self._private.spent()
        for modality, store in self._stores().items():
            context = SiteContext(site=site, network=self.dataset.choices.network, modality=modality)
            card = SegmenterCard(
                classes=self.config.classes,
                network=FEDERATED,
                single_objects=self.config.single_objects,
                federated=FederatedDesign(method=self.config, context=context, weights=which),
                training=TrainingFacts(
                    domain=store.domain,
                    centred=store.centred,
                    epsilon=None if spent is None else spent.epsilon,
                    delta=None if spent is None else spent.delta,
                ),
                **store.card_entries,
            )
            network = self.method.segmenter(self.model(), context, state).cpu()
            segmenters[modality] = Segmenter(network, store.format, card)
        return segmenters

    def _write_segmenters(self, segmenters: dict[str, Segmenter], which: str) -> None:
        """Write segmenters beside the store, one file per modality."""
        store, stores = self.dataset.store, self._stores()
        folder = store.path.with_name(store.path.name + SEGMENTERS_SUFFIX)
        for modality, segmenter in segmenters.items():
            parts = (stores[modality].domain, modality, self.method_name, which)
            segmenter.save(folder / f"{'_'.join(filter(None, parts))}.safetensors")

    def _score(self, segmenters: dict[str, Segmenter]) -> dict[str, float]:
        """Scores on the site's test cases, for every modality and their means, of enough patients."""
        least = guarded_round.current().policy.least_patients_scored
        found = {
            name: held_out_scores(store, segmenters[name], least_patients=least)
            for name, store in self._stores().items()
        }
        if not self.method.description.needs_modalities:
            return found[""]
        row: dict[str, float] = {}
        for measure in ("dice", "hd95"):
            values = [scores[measure] for scores in found.values() if math.isfinite(scores.get(measure, math.nan))]
            row |= {measure: sum(values) / len(values)} if values else {}
        return row | {f"{name}_{key}": value for name, scores in found.items() for key, value in scores.items()}

    def _stores(self) -> dict[str, SliceStore]:
        """Modality to store, where the method distinguishes modalities; otherwise "" to the site's store."""
        return self.dataset.stores if self.method.description.needs_modalities else {"": self.dataset.store}

    def _log_scalars(self, monitor: Any) -> None:
        """Scalars of the round for TensorBoard."""
        metric = {
            name: float(value)
            for name, value in self._summary.items()
            if name.startswith(SHOWN_NUMBERS) and isinstance(value, (int, float)) and math.isfinite(value)
        }
        if monitor is None or not metric:
            return
        count = len(self.dataset)
        monitor.add_scalar(
            metric=metric, iteration=1, epoch=None, train=True, total_samples=count, batch_samples=count,
            num_batches=1, num_samples_trained=count,
        )  # fmt: skip


def _channels(number: int, *, colour: bool) -> str:
    return "red, green and blue" if colour else f"{number} channels"


def _listed(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} slices with {kind} labels" for kind, count in kinds.items()) or "nothing"
