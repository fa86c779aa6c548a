"""Federated segmentation at a site: one plan for all methods."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from fedbiomed.common.datamanager import DataManager
from fedbiomed.common.dataset import CustomDataset
from fedbiomed.common.logger import logger
from torch import Tensor, nn

from ...adaptation.labels.candidate_labels import SiteSlices
from ...adaptation.methods.federated_method import FederatedMethod
from ...adaptation.methods.method_config import MethodConfig
from ...adaptation.methods.registry import make_method
from ...adaptation.methods.site_round import MethodState, SiteContext, SiteRound, SiteUpdate
from ...adaptation.segmenter import Segmenter
from ...adaptation.segmenter_card import FEDERATED, FederatedDesign, SegmenterCard, TrainingFacts
from ...errors import FedFactoryError, NodeDataError, UsageError
from ..fedbiomed_hooks import PersistentOptimizerPlan
from ..site_choices import SiteChoices, digest
from ..store.slice_store import SliceStore
from .adaptation_plan import SEGMENTERS_SUFFIX
from .error_redaction import redact_errors
from .site_settings import SiteSettings
from .site_slices import held_out_scores, site_slices

MAX_UPDATES = 10_000  # in a round
SHOWN_NUMBERS = ("loss", "global_", "own_", "accepted", "adopted", "distilled")  # prefixes, for TensorBoard


class SegmentationDataset(CustomDataset):
    """A site's training slices. Set `config` and `site_settings` on the instance before the framework calls `read`.

    Attributes:
        config: of the method. site_settings: what the researcher says of this site, see `SegmentationTrainingPlan`.
        store, public_store, stores: opened, the last by modality. choices, data, public, modalities: see `SiteRound`.
    """

    config: MethodConfig
    site_settings: SiteSettings

    @redact_errors
    def read(self) -> None:
        """Open the store. Raises NodeDataError with a text that may leave the site; details go to its log."""
        try:
            self.store = SliceStore(self.path)
            self.choices = SiteChoices.load(self.store)
            self.stores = self.choices.stores(self.store)
            self.public_store = SliceStore(self.choices.public) if self.choices.public else None
        except FedFactoryError as error:
            logger.error(f"fedfactory: {error}")
            raise NodeDataError("this site's slice store cannot be read; see the node's log") from None
        if self.store.format.size != self.config.size:
            raise NodeDataError(f"this site's slices have {self.store.format.size} px, the method {self.config.size}")
        if self.store.classes > self.config.classes:
            raise NodeDataError(f"this site has {self.store.classes} label values, the method {self.config.classes}")
        announced, held = self.site_settings.label_kinds, self.store.label_kinds()
        if announced is not None and announced != held:
            raise NodeDataError(
                f"this site announced {_listed(announced)} and holds {_listed(held)}; register its store again"
            )
        self.data = site_slices(self.store, self.config.classes)
        self.modalities = {name: site_slices(store, self.config.classes) for name, store in self.stores.items()}
        self.public = self._public()

    def _public(self) -> SiteSlices | None:
        """The slices that all have. Raises: NodeDataError if they are not the researcher's."""
        expected = self.site_settings.public_digest
        if expected is None:
            return None
        if self.public_store is None:
            raise NodeDataError(
                "this site has no public slices; register its store again with `fedfactory site add ... --public STORE`"
            )
        if digest(self.public_store) != expected:
            raise NodeDataError("this site's public slices are not the researcher's")
        return site_slices(self.public_store, self.config.classes)

    def __len__(self) -> int:
        return len(self.data)

    @redact_errors
    def get_item(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.from_numpy(self.data.images[index])[None]}


class SegmentationTrainingPlan(PersistentOptimizerPlan):
    """A site's share in a federated segmentation.

    model_args: {"config": MethodConfig as a dict, "train": False for a round in which the average is only scored}.
    aggregator_args, by site: `SiteSettings` as a dict.

    Kept at the site between rounds: the optimizers' states, the number of rounds and the method's own state.

    Attributes:
        method_name: the method that the site approved; a configuration with another method is refused.
        config: of the method.
        method: made from the configuration.
    """

    method_name = ""

    def post_init(self, model_args: dict, training_args: dict, aggregator_args: dict | None = None, **kw: Any) -> None:
        self._site_settings = SiteSettings.from_dict(aggregator_args or {})
        super().post_init(model_args, training_args, aggregator_args, **kw)

    def init_model(self, model_args: dict[str, Any]) -> nn.Module:
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
        raise NotImplementedError("methods have their own rounds; see `training_routine`")

    @redact_errors
    def training_routine(self, history_monitor: Any = None, node_args: dict | None = None) -> int:
        """Score the received average, train, then score the site's own model. Returns the number of slices."""
        started, store, site = time.monotonic(), self.dataset.store, self._site_settings.site
        self.enter_training(node_args)
        average = self._score(site, "global") if self.method.has_average else {}
        report, own = SiteUpdate(0, math.nan), {}
        if self.model_args().get("train", True):
            report, state = self._train(site)
            own = self._score(site, "own", state)
        self._summary = {
            "domain": store.domain,
            **report.to_dict(),
            **{f"slices_{kind}": count for kind, count in store.label_kinds().items()},
            **{f"global_{name}": value for name, value in average.items()},
            **{f"own_{name}": value for name, value in own.items()},
            "seconds": round(time.monotonic() - started, 2),
        }
        self._show(history_monitor)
        self.leave_training()
        return len(self.dataset)

    def _train(self, site: int) -> tuple[SiteUpdate, MethodState]:
        """The next round of the method at this site; its state goes to what the framework keeps between rounds."""
        kept, data = self.optimizers().extra, self.dataset
        state = self.method.State.from_dict(kept["method"]) if "method" in kept else self.method.new_state()
        number = kept.get("rounds", 0) + 1
        site_round = SiteRound(
            model=self.model(),
            optimizers=self.optimizers().optimizer,
            data=data.data,
            site=site,
            number=number,
            state=state,
            network=data.choices.network,
            public=data.public,
            modalities=data.modalities,
        )
        report = self.method.train_round(site_round)
        kept |= {"rounds": number, "method": state.to_dict()}
        return report, state

    def optimizer_args(self) -> dict[str, Any]:
        """What the researcher learns besides weights: domain, counts of slices by kind of label, losses, seconds, and
        scores of the average and of the site's own model where the site has densely labelled test cases."""
        return {**super().optimizer_args(), **getattr(self, "_summary", {})}

    def _score(self, site: int, which: str, state: MethodState | None = None) -> dict[str, float]:
        """Scores on the site's test cases, in evaluation mode, of every modality and their means; the segmenters are
        written beside the store.

        Args:
            site: index of the site.
            which: "global" for the average, "own" for the site's own model.
            state: of the method at the site, for the own model.
        """
        stores = self.dataset.stores if self.method.description.needs_modalities else {"": self.dataset.store}
        found = {}
        for name, store in stores.items():
            context = SiteContext(site=site, network=self.dataset.choices.network, modality=name)
            found[name] = self._score_modality(context, store, which=which, state=state)
        if not self.method.description.needs_modalities:
            return found[""]
        row: dict[str, float] = {}
        for measure in ("dice", "hd95"):
            values = [scores[measure] for scores in found.values() if math.isfinite(scores.get(measure, math.nan))]
            row |= {measure: sum(values) / len(values)} if values else {}
        return row | {f"{name}_{key}": value for name, scores in found.items() for key, value in scores.items()}

    def _score_modality(
        self, context: SiteContext, store: SliceStore, *, which: str, state: MethodState | None
    ) -> dict[str, float]:
        model = self.model()
        card = SegmenterCard(
            classes=self.config.classes,
            network=FEDERATED,
            federated=FederatedDesign(method=self.config, context=context, weights=which),
            training=TrainingFacts(domain=store.domain),
        )
        device, was = next(iter(model.state_dict().values())).device, model.training
        segmenter = Segmenter(self.method.segmenter(model, context, state).cpu(), store.format, card)
        folder = self.dataset.store.path.with_name(self.dataset.store.path.name + SEGMENTERS_SUFFIX)
        parts = (store.domain, context.modality, self.method_name, which)
        segmenter.save(folder / f"{'_'.join(filter(None, parts))}.safetensors")
        scores = held_out_scores(store, segmenter)
        model.to(device).train(was)
        return scores

    def _show(self, monitor: Any) -> None:
        """Numbers of the round for TensorBoard."""
        metric = {
            name: float(value)
            for name, value in self._summary.items()
            if name.startswith(SHOWN_NUMBERS) and math.isfinite(value)
        }
        if monitor is None or not metric:
            return
        count = len(self.dataset)
        monitor.add_scalar(
            metric=metric, iteration=1, epoch=None, train=True, total_samples=count, batch_samples=count,
            num_batches=1, num_samples_trained=count,
        )  # fmt: skip


def _listed(kinds: dict[str, int]) -> str:
    return ", ".join(f"{count} slices with {kind} labels" for kind, count in kinds.items()) or "nothing"
