"""Training of the data factory at a site (phase one), called by the short plan that travels and is approved."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from fedbiomed.common.datamanager import DataManager

from ...errors import NodeDataError
from ...generative.config import FactoryConfig
from ...generative.factory import Factory
from ...generative.trainer import FactoryTrainer, make_optimizers
from ...generative.trainer_state import TrainerState, mean_losses
from ..fedbiomed_hooks import SECAGG_RANGE, PersistentOptimizerPlan, use_fine_quantisation
from ..protection import guarded_round
from ..protection.usual_generator import GeneratorRecord
from .error_redaction import redact_errors
from .factory_dataset import SliceDataset
from .leaving_quality import leaving_quality
from .transport import pack, packed_shapes

MAX_SEED = 2**31
# Name to axis of parameters of which index d along that axis belongs to domain d: other sites have no gradient for it.
DOMAIN_AXES = {
    "generator.head.grey": 0,
    "generator.head.log_sigma": 0,
    "generator.domain_embedding": 0,
    "generator.label_embed.weight": 1,
    "discriminator.domain_embedding": 0,
    "discriminator.label_embed.weight": 1,
}


def owned_parameters(config: FactoryConfig) -> dict[str, int]:
    """Name to domain axis of the parameters that only the sites of a domain train; none for the published program,
    which averaged all parameters in the same way."""
    return {} if config.compatibility == "published" else DOMAIN_AXES


class FactoryTrainingPlan(PersistentOptimizerPlan):
    """Phase one at a site: local updates of generator and discriminator on the site's own slices, with their labels if
    the factory draws labels.

    Shared with the researcher: the generator. It stays at the site, from round to round: the discriminator (which
    memorises patients most; unless the configuration shares it), both Adam states, augmentation strength, path-length
    mean, update counter, random state, and what eight bits left over of the weights' changes.

    model_args has these entries:
        factory: FactoryConfig as a dict.
        seed: of the initial weights; with a secret of the site, also of what it draws.
        transport: see `fedfactory.node.plans.transport`.

    training_args has these entries:
        num_updates: updates in a round.
        loader_args: with batch_size.

    Attributes:
        discriminator_leaves: whether the plan that the sites approved states that discriminators are averaged too.
        learns_labels: whether the plan that the sites approved states that the generator learns to draw their labels.
    """

    discriminator_leaves = False
    learns_labels = False

    def post_init(self, model_args: dict, training_args: dict, aggregator_args: dict | None = None, **kw: Any) -> None:
        super().post_init(model_args, training_args, aggregator_args, **kw)
        self._row_factor = (aggregator_args or {}).get("row_factor", 1.0)

    def init_model(self, model_args: Mapping[str, Any]) -> Factory:
        self.config = FactoryConfig.from_dict(model_args["factory"])
        if self.config.discriminator == "shared" and not self.discriminator_leaves:
            # Settings are not part of what a site approves; what leaves it must be.
            raise NodeDataError(
                "discriminator is 'shared'; this plan was approved for local ones, use `SharedDiscriminatorPlan`"
            )
        if self.config.classes and not self.learns_labels:
            raise NodeDataError(
                f"classes is {self.config.classes}; this plan was approved for images alone, use `LabelledFactoryPlan`"
            )
        # Every site starts from the same discriminator and has the same fixed noise; the generator is replaced by the
        # researcher's. What a site draws does not follow from this seed alone, see `_resume`.
        torch.manual_seed(model_args["seed"])
        factory = Factory(self.config)
        if self.node_id() is None:  # at the researcher, which does not train it, the framework flattens the weights
            factory.to(memory_format=torch.contiguous_format)
        return factory

    def make_optimizers(self, model: Factory) -> dict[str, torch.optim.Optimizer]:
        return make_optimizers(model)

    def tag_parameters(self, name: str) -> set[str]:
        stays = name.startswith("discriminator.") and self.config.discriminator == "local"
        return {"local", "persistent"} if stays else set()

    def training_data(self) -> DataManager:
        self.dataset = SliceDataset()
        self.dataset.config = self.config
        return DataManager(self.dataset, shuffle=True, drop_last=True)

    def training_step(self, data: Any, target: Any) -> None:
        raise NotImplementedError("a factory has two losses, not one; use `training_routine` to train it")

    @redact_errors
    def training_routine(self, history_monitor: Any = None, node_args: dict | None = None) -> int:
        """Run the updates of a round. Returns the number of slices in their batches."""
        started = time.monotonic()
        self._before = {k: v.detach().clone() for k, v in super().after_training_params().items()}
        device = self.enter_training(node_args)
        store = self.dataset.store
        domain = self.config.domain_index(store.domain)
        rng, state, rounds = self._resume(domain, device)
        record = GeneratorRecord.load(store.path)
        received = _generator_weights(self._before)
        quality = leaving_quality(store, self.model().generator, record, domain=domain, encoding=self.dataset.encoding)
        trainer = FactoryTrainer(
            self.model(),
            self.optimizers().optimizer,
            rng,
            state=state,
            encoding=None if self.dataset.encoding is None else self.dataset.encoding.to(device),
            guide=None if self.dataset.guide is None else self.dataset.guide.to(device),
        )
        updates, losses, num_slices = self.training_args()["num_updates"], [], 0
        batches = self._batches(rng)
        for _ in range(updates):
            batch = next(batches)
            image, z_bin = batch["image"].to(device), batch["z_bin"].to(device)
            labels = batch["labels"].to(device) if self.config.classes else None
            step = trainer.train_step(image, z_bin, torch.full_like(z_bin, domain), labels)
            losses.append(step)
            num_slices += len(image)
        self.optimizers().extra = {
            "trainer": trainer.state.to_dict(), "random_state": rng.get_state(), "rounds": rounds + 1
        }  # fmt: skip
        report = {
            "domain": store.domain,
            "spacing": store.format.spacing,
            "height": store.height,
            "augment_p": float(trainer.state.augmentation.p),
            "images_per_second": num_slices / (time.monotonic() - started),
            **{f"loss_{name}": value for name, value in mean_losses(losses).items()},
            **{f"quality_{name}": value for name, value in quality.items()},
        }
        self._summary = self.leaving_numbers(report)
        self._log_scalars(history_monitor, updates, num_slices)
        self.leave_training()
        sent = _generator_weights(dict(self.model().named_parameters()))
        secret = guarded_round.current().secret
        record.after_round(received, sent, secret, answered=bool(quality)).save(store.path)
        return num_slices

    @redact_errors
    def after_training_params(self, flatten: bool = False) -> dict[str, torch.Tensor] | list[float]:
        """What leaves the site: weights, or their change in half precision or eight bits (see `transport.pack`), or
        with `flatten` a list of numbers to be encrypted."""
        if self.node_id() is None or not hasattr(self, "_before"):  # at the researcher, or before any training
            return super().after_training_params(flatten)
        if flatten:
            use_fine_quantisation()
            self.model().to(memory_format=torch.contiguous_format)  # the framework flattens the weights
            self._scale_domain_rows()
            self._require_encryptable_range()
            return super().after_training_params(flatten)
        sent, residual = pack(super().after_training_params(), self._before, self._transport, self._residual)
        if residual:  # stays with the rest of the site's state, which the framework saves afterwards
            self.optimizers().extra["residual"] = residual
        return sent

    @property
    def _transport(self) -> str:
        return self.model_args().get("transport", "float32")

    def leaving_tensors(self, *, flatten: bool = False) -> dict[str, tuple[int, ...]]:
        """Name to shape of the tensors that may leave, by the names under which they are sent."""
        shapes, weights = super().leaving_tensors(), self.model().state_dict()
        if flatten:
            return shapes
        return {
            sent: shape
            for name in shapes
            for sent, shape in packed_shapes(name, weights[name], self._transport).items()
        }

    def _scale_domain_rows(self) -> None:
        """Multiply this site's change of its domain's row by the factor by which the average will divide it.

        With encryption, the researcher sees a sum over all sites only and cannot average a domain's row over the sites
        of that domain alone.
        """
        index = self.config.domain_index(self.dataset.store.domain)
        weights = dict(self.model().named_parameters())
        with torch.no_grad():
            for name, axis in owned_parameters(self.config).items():
                if name in weights and name in self._before:
                    before, now = self._before[name].select(axis, index), weights[name].select(axis, index)
                    now.copy_(before + (now - before) * self._row_factor)

    def _require_encryptable_range(self) -> None:
        """Raises: NodeDataError if a weight would be clipped by the encryption."""
        largest = max(float(tensor.abs().max()) for tensor in super().after_training_params().values())
        if not largest < SECAGG_RANGE:
            raise NodeDataError(f"the largest weight is {largest:.3g}; for encryption it must be below {SECAGG_RANGE}")

    def optimizer_args(self) -> dict[str, object]:
        """What the researcher learns besides weights: domain, pixel spacing, organ height, mean losses, strength of
        augmentation, speed, and in some rounds how synthetic slices compare with the site's, see `leaving_quality`."""
        return {**super().optimizer_args(), **getattr(self, "_summary", {})}

    def _resume(self, domain: int, device: str) -> tuple[torch.Generator, TrainerState, int]:
        """Random state, trainer state and number of rounds after this site's last round."""
        rng = torch.Generator(device)
        kept = self.optimizers().extra
        self._residual = kept.get("residual", {})
        if kept:
            rng.set_state(kept["random_state"])
            return rng, TrainerState.from_dict(kept["trainer"]), kept["rounds"]
        # Different in every domain, and equal in a repeated run: domains stay the same, node ids are random.
        settings = json.dumps(self.config.to_dict(), sort_keys=True)
        rng.manual_seed(self.site_seed("factory", settings, self.model_args()["seed"], domain))
        return rng, TrainerState(), 0

    def _batches(self, rng: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches of what `SliceDataset.get_item` gives; the loader shuffles with PyTorch's global generator,
        which is seeded from the site's."""
        while True:
            torch.manual_seed(int(torch.randint(MAX_SEED, (1,), generator=rng, device=rng.device)))
            for data, _ in self.training_data_loader:
                yield data

    def _log_scalars(self, monitor: Any, updates: int, num_slices: int) -> None:
        """Scalars of the round for TensorBoard, one point per term."""
        if monitor is None:
            return
        metric = {
            name: value
            for name, value in self._summary.items()
            if name.startswith(("loss_", "quality_", "augment", "images"))
        }
        monitor.add_scalar(
            metric=metric,
            iteration=updates,
            epoch=None,
            train=True,
            total_samples=num_slices,
            batch_samples=num_slices // updates,
            num_batches=updates,
            num_samples_trained=num_slices,
        )


def _generator_weights(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The generator's own parameters among weights by name."""
    prefix = "generator."
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
