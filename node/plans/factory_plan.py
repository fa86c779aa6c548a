"""Training plans of the installed package. What travels is a few lines that subclass them."""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fedbiomed.common.datamanager import DataManager

from ...errors import NodeDataError
from ...generative.config import FactoryConfig
from ...generative.factory import Factory
from ...generative.metrics.quality import site_quality
from ...generative.trainer import FactoryTrainer, make_optimizers
from ...generative.trainer_state import TrainerState, mean_losses
from ..fedbiomed_hooks import SECAGG_RANGE, PersistentOptimizerPlan, use_fine_quantisation
from .error_redaction import redact_errors
from .factory_dataset import SliceDataset
from .transport import pack

MAX_SEED = 2**31
MEASURE_EVERY = 10  # rounds of a site from one comparison of synthetic with real slices to the next
MEASURED = 512  # real slices it looks at, at most
# Parameters of which index d, along the given axis, belongs to domain d: no other site has a gradient for it.
OWNED = {
    "generator.head.grey": 0,
    "generator.head.log_sigma": 0,
    "generator.domain_embedding": 0,
    "generator.label_embed.weight": 1,
    "discriminator.domain_embedding": 0,
    "discriminator.label_embed.weight": 1,
}


def owned_parameters(config: FactoryConfig) -> dict[str, int]:
    """Which parameters only the sites of a domain move, with the axis of the domains; the published program averaged
    all alike."""
    return {} if config.compatibility == "published" else OWNED


class FactoryTrainingPlan(PersistentOptimizerPlan):
    """Phase one at a site: local updates of generator and discriminator on the site's own slices.

    model_args: {"factory": FactoryConfig as a dict, "seed": int, "transport": see `fedfactory.node.plans.transport`}.
    training_args: num_updates (per round), loader_args with batch_size.

    Shared: the generator. Kept at the site, between rounds too: the discriminator (what remembers patients best;
    unless the configuration shares it), both Adam states, augmentation strength, path-length mean, update counter and
    random state.

    Attributes:
        discriminator_leaves: whether the text that the sites approved says that discriminators are averaged too.
    """

    discriminator_leaves = False

    def post_init(self, model_args: dict, training_args: dict, aggregator_args: dict | None = None, **kw: Any) -> None:
        super().post_init(model_args, training_args, aggregator_args, **kw)
        self._told = aggregator_args or {}

    def init_model(self, model_args: dict[str, Any]) -> Factory:
        self.config = FactoryConfig.from_dict(model_args["factory"])
        if self.config.discriminator == "shared" and not self.discriminator_leaves:
            # Settings are not part of what a site approves; what leaves it must be.
            raise NodeDataError("this plan was approved to keep discriminators at their sites")
        # Every site starts from the same discriminator; the researcher's generator replaces this one.
        torch.manual_seed(model_args["seed"])
        factory = Factory(self.config)
        if self.node_id() is None:  # the researcher never trains it, and the framework views weights as one row
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
        raise NotImplementedError("a factory is trained by `training_routine`: it has two losses, not one")

    @redact_errors
    def training_routine(self, history_monitor: Any = None, node_args: dict | None = None) -> int:
        """Run the round's updates. Returns the number of slices seen."""
        started = time.monotonic()
        self._before = {k: v.detach().clone() for k, v in super().after_training_params().items()}
        device = self.enter_training(node_args)
        store = self.dataset.store
        domain = self.config.domain_index(store.domain)
        rng, state, rounds = self._resume(domain, device)
        quality = self._measure(domain) if rounds % MEASURE_EVERY == 0 else {}
        trainer = FactoryTrainer(
            self.model(),
            self.optimizers().optimizer,
            rng,
            state=state,
            encoding=None if self.dataset.encoding is None else self.dataset.encoding.to(device),
            guide=None if self.dataset.guide is None else self.dataset.guide.to(device),
        )
        updates, losses, seen = self.training_args()["num_updates"], [], 0
        batches = self._batches(rng)
        for _ in range(updates):
            batch = next(batches)
            image, z_bin = batch["image"].to(device), batch["z_bin"].to(device)
            step = trainer.train_step(image, z_bin, torch.full_like(z_bin, domain))
            losses.append(step)
            seen += len(image)
        self.optimizers().extra = {
            "trainer": trainer.state.to_dict(), "random_state": rng.get_state(), "rounds": rounds + 1
        }  # fmt: skip
        self._summary = {
            "domain": store.domain,
            "spacing": store.format.spacing,
            "height": store.height,
            "augment_p": float(trainer.state.augmentation.p),
            "images_per_second": seen / (time.monotonic() - started),
            **{f"loss_{name}": value for name, value in mean_losses(losses).items()},
            **{f"quality_{name}": value for name, value in quality.items()},
        }
        self._report(history_monitor, updates, seen)
        self.leave_training()
        return seen

    @redact_errors
    def after_training_params(self, flatten: bool = False) -> dict[str, torch.Tensor] | list[float]:
        """What leaves the site: weights, their change in half precision, or numbers to be encrypted (`flatten`)."""
        if self.node_id() is None or not hasattr(self, "_before"):  # the researcher's own copy, or nothing trained
            return super().after_training_params(flatten)
        if flatten:
            use_fine_quantisation()
            self.model().to(memory_format=torch.contiguous_format)  # the framework views weights as one row
            self._scale_own_rows()
            self._refuse_values_that_would_be_clipped()
            return super().after_training_params(flatten)
        return pack(super().after_training_params(), self._before, self.model_args().get("transport", "float32"))

    def _scale_own_rows(self) -> None:
        """Where only a sum over all sites is seen, nobody can average a domain's row over its sites alone. So each
        site enlarges its change of its row, by the factor that the average will divide it by."""
        factor = self._told.get("row_factor", 1.0)
        index = self.config.domain_index(self.dataset.store.domain)
        weights = dict(self.model().named_parameters())
        with torch.no_grad():
            for name, axis in owned_parameters(self.config).items():
                if name in weights and name in self._before:
                    before, own = (one[name].select(axis, index) for one in (self._before, weights))
                    own.copy_(before + (own - before) * factor)

    def _refuse_values_that_would_be_clipped(self) -> None:
        largest = max(float(tensor.abs().max()) for tensor in super().after_training_params().values())
        if not largest < SECAGG_RANGE:
            raise NodeDataError(f"a weight of {largest:.3g} cannot be encrypted; the range ends at {SECAGG_RANGE}")

    def optimizer_args(self) -> dict[str, Any]:
        """What the researcher learns besides weights: domain, pixel spacing, organ height, mean losses, strength of
        augmentation, speed, and now and then how synthetic slices compare with the site's (`SiteQuality`)."""
        return {**super().optimizer_args(), **getattr(self, "_summary", {})}

    def _resume(self, domain: int, device: str) -> tuple[torch.Generator, TrainerState, int]:
        """Random state, trainer's state and number of rounds as this site left them."""
        rng = torch.Generator(device)
        kept = self.optimizers().extra
        if kept:
            rng.set_state(kept["random_state"])
            return rng, TrainerState.from_dict(kept["trainer"]), kept["rounds"]
        # Different at every site, and the same again in a repeated run: node ids are random, domains are not.
        rng.manual_seed(zlib.crc32(f"{self.model_args()['seed']}/{domain}".encode()))
        return rng, TrainerState(), 0

    def _measure(self, domain: int) -> dict[str, float]:
        """How the generator that came compares with this site's slices: three numbers that may leave."""
        chosen = self.dataset.chosen
        chosen = chosen[:: -(-len(chosen) // MEASURED)]
        store, encoding = self.dataset.store, self.dataset.encoding
        real = torch.from_numpy(store.images[chosen].astype(np.float32))[:, None]
        z_bin = torch.from_numpy(store.z_bin[chosen])
        return site_quality(self.model().generator, real, z_bin, domain=domain, encoding=encoding).to_dict()

    def _batches(self, rng: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches; the loader shuffles by PyTorch's global generator, which is seeded from ours."""
        while True:
            torch.manual_seed(int(torch.randint(MAX_SEED, (1,), generator=rng, device=rng.device)))
            for data, _ in self.training_data_loader:
                yield data

    def _report(self, monitor: Any, updates: int, seen: int) -> None:
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
            total_samples=seen,
            batch_samples=seen // updates,
            num_batches=updates,
            num_samples_trained=seen,
        )
