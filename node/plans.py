"""Training plans of the installed package. What travels is a few lines that subclass them."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from fedbiomed.common.datamanager import DataManager

from ..generative.config import FactoryConfig
from ..generative.trainer import Factory, FactoryTrainer, StepLosses, TrainerState, make_optimizers, mean_losses
from .dataset import SliceDataset
from .fedbiomed_hooks import PersistentOptimizerPlan

MAX_SEED = 2**31


class FactoryTrainingPlan(PersistentOptimizerPlan):
    """Phase one at a site: local updates of generator and discriminator on the site's own slices.

    model_args: {"factory": FactoryConfig as a dict, "seed": int}.
    training_args: num_updates (per round), loader_args with batch_size.

    Shared: the generator. Kept at the site, between rounds too: the discriminator (what remembers patients best),
    both Adam states, augmentation strength, path-length mean, update counter and random state.
    """

    def init_model(self, model_args: dict[str, Any]) -> Factory:
        self.config = FactoryConfig.from_dict(model_args["factory"])
        # Every site starts from the same discriminator; the researcher's generator replaces this one.
        torch.manual_seed(model_args["seed"])
        return Factory(self.config)

    def make_optimizers(self, model: Factory) -> dict[str, torch.optim.Optimizer]:
        return make_optimizers(model)

    def tag_parameters(self, name: str) -> set[str]:
        return {"local", "persistent"} if name.startswith("discriminator.") else set()

    def training_data(self) -> DataManager:
        self.dataset = SliceDataset()
        self.dataset.config = self.config
        return DataManager(self.dataset, shuffle=True, drop_last=True)

    def training_step(self, data: Any, target: Any) -> None:
        raise NotImplementedError("a factory is trained by `training_routine`: it has two losses, not one")

    def training_routine(self, history_monitor: Any = None, node_args: dict | None = None) -> int:
        """Run the round's updates. Returns the number of slices seen."""
        device = self.enter_training(node_args)
        store = self.dataset.store
        domain = self.config.domain_index(store.domain)
        rng, state = self._resume(domain, device)
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
        for update in range(updates):
            batch = next(batches)
            image, z_bin = batch["image"].to(device), batch["z_bin"].to(device)
            step = trainer.train_step(image, z_bin, torch.full_like(z_bin, domain))
            losses.append(step)
            seen += len(image)
            self._report(history_monitor, step, update + 1, updates, len(image))
        self.optimizers().extra = {"trainer": trainer.state.to_dict(), "random_state": rng.get_state()}
        self._summary = {
            "domain": store.domain,
            "spacing": store.format.spacing,
            "height": store.height,
            **{f"loss_{name}": value for name, value in mean_losses(losses).items()},
        }
        self.leave_training()
        return seen

    def optimizer_args(self) -> dict[str, Any]:
        """What the researcher learns besides weights: domain, pixel spacing, organ height, mean losses."""
        return {**super().optimizer_args(), **getattr(self, "_summary", {})}

    def _resume(self, domain: int, device: str) -> tuple[torch.Generator, TrainerState]:
        rng = torch.Generator(device)
        kept = self.optimizers().extra
        if kept:
            rng.set_state(kept["random_state"])
            return rng, TrainerState.from_dict(kept["trainer"])
        # Different at every site, and the same again in a repeated run: node ids are random, domains are not.
        rng.manual_seed(zlib.crc32(f"{self.model_args()['seed']}/{domain}".encode()))
        return rng, TrainerState()

    def _batches(self, rng: torch.Generator) -> Iterator[dict[str, torch.Tensor]]:
        """Endless batches; the loader shuffles by PyTorch's global generator, which is seeded from ours."""
        while True:
            torch.manual_seed(int(torch.randint(MAX_SEED, (1,), generator=rng, device=rng.device)))
            for data, _ in self.training_data_loader:
                yield data

    def _report(self, monitor: Any, step: StepLosses, update: int, updates: int, batch: int) -> None:
        if monitor is None or update not in (1, updates):
            return
        metric = {f"loss_{name}": value for name, value in mean_losses([step]).items()}
        monitor.add_scalar(
            metric=metric,
            iteration=update,
            epoch=None,
            train=True,
            total_samples=updates * batch,
            batch_samples=batch,
            num_batches=updates,
            num_samples_trained=update * batch,
        )
