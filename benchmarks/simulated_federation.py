"""Phase one in a single process, for studies: the nodes' trainer and the researcher's aggregator, without sockets."""

from __future__ import annotations

import atexit
import copy
import os
import shutil
import tempfile
from collections.abc import Mapping

import numpy as np
import torch
from fedfactory.generative import Factory, FactoryConfig, FactoryTrainer
from fedfactory.generative.networks.generator import Generator
from fedfactory.generative.trainer import make_optimizers
from fedfactory.generative.trainer_state import TrainerState
from fedfactory.node.plans.transport import pack, restore
from fedfactory.node.store.slice_store import SliceStore

PREFIX = "generator."


class SimulatedFederation:
    """A federation whose sites all take part in every round, one after the other.

    Args:
        config: of the factory.
        stores: the store of each domain.
        seed: of the initial weights and of every site's draws.
        persistent: whether sites keep optimizer moments, augmentation strength and counters between rounds.
        momentum: of the server (FedAvgM, Hsu et al. 2019); 0 is federated averaging.
        grey_rate: learning rate of the palette's grey levels, as a multiple of that of all other parameters.
        transport: of the sites' weights, see `fedfactory.node.plans.transport`.
        labels: for a factory that draws labels, by domain the labels (N, S, S) of its training slices, 255 where they
            are unknown; domains that are left out have none.
        device: on which the sites train.

    Attributes:
        generator: the moving average of the shared generator, as the researcher has it; on the CPU.
    """

    def __init__(
        self,
        config: FactoryConfig,
        stores: Mapping[str, SliceStore],
        seed: int,
        *,
        persistent: bool = True,
        momentum: float = 0.0,
        grey_rate: float = 1.0,
        transport: str = "float32",
        labels: Mapping[str, np.ndarray] | None = None,
        device: str = "cpu",
    ) -> None:
        if "FBM_RESEARCHER_COMPONENT_ROOT" not in os.environ:  # the framework opens a component when it is imported
            os.environ["FBM_RESEARCHER_COMPONENT_ROOT"] = (root := tempfile.mkdtemp())
            atexit.register(shutil.rmtree, root, ignore_errors=True)
        from fedfactory.researcher.aggregator import FactoryAverage

        self.config, self.stores, self.persistent, self.grey_rate = config, dict(stores), persistent, grey_rate
        self.labels, self.transport = labels or {}, transport
        self.residuals: dict[str, dict[str, torch.Tensor]] = {}
        torch.manual_seed(seed)
        start = Factory(config)
        self.sites = {domain: copy.deepcopy(start).to(device) for domain in self.stores}
        self.rngs = {d: torch.Generator(device).manual_seed(1000 * seed + n) for n, d in enumerate(self.stores)}
        self.optimizers = {domain: self._optimizers(site) for domain, site in self.sites.items()}
        self.states = {domain: TrainerState() for domain in self.stores}
        self.momentum, self.velocity = momentum, {}
        self.shared = self._shared(start)
        self.generator = copy.deepcopy(start.generator).eval()
        self.aggregator = FactoryAverage(config)

    def run_round(self, updates: int) -> None:
        """Every site makes `updates` updates; then the weights are averaged in proportion to the numbers of slices."""
        self.aggregator.updates_per_round = updates
        before = self.shared
        for domain in self.stores:
            self._train(domain, updates)
        counts = {domain: len(store.slices("train")) for domain, store in self.stores.items()}
        replies = {d: {"optimizer_args": {"domain": d}, "sample_size": counts[d]} for d in self.stores}
        self.shared = self.aggregator.aggregate(
            {domain: self._sent(domain, before) for domain in self.sites},
            {domain: count / sum(counts.values()) for domain, count in counts.items()},
            training_replies=replies,
            global_model=before,
        )
        if self.momentum:
            for name, tensor in self.shared.items():
                previous = self.velocity.get(name, torch.zeros_like(tensor))
                self.velocity[name] = self.momentum * previous + tensor - before[name]
                self.shared[name] = before[name] + self.velocity[name]
        for site in self.sites.values():
            site.load_state_dict(self.shared, strict=False)
        average = {k.removeprefix(PREFIX): v.float() for k, v in self.aggregator.ema.items() if k.startswith(PREFIX)}
        self.generator.load_state_dict(average, strict=False)  # fixed noise has no average

    def _sent(self, domain: str, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights of a site as the researcher restores them from what the site sends."""
        weights = self._shared(self.sites[domain])
        packed, self.residuals[domain] = pack(weights, before, self.transport, self.residuals.get(domain))
        return restore(packed, before)

    def _train(self, domain: str, updates: int) -> None:
        site, store, rng = self.sites[domain], self.stores[domain], self.rngs[domain]
        device = rng.device
        if not self.persistent:
            self.optimizers[domain], self.states[domain] = self._optimizers(site), TrainerState()
        trainer = FactoryTrainer(site, self.optimizers[domain], rng, state=self.states[domain])
        chosen = store.slices("train")
        for _ in range(updates):
            drawn = torch.randint(len(chosen), (self.config.batch_size,), generator=rng, device=device)
            place = drawn.cpu().numpy()
            batch = chosen[place]
            z_bin = torch.from_numpy(store.z_bin[batch]).to(device)
            labels = torch.from_numpy(self.labels[domain][place]).to(device) if domain in self.labels else None
            domains = torch.full_like(z_bin, self.config.domain_index(domain))
            trainer.train_step(slices_of(store, batch).to(device), z_bin, domains, labels)

    def _optimizers(self, site: Factory) -> dict[str, torch.optim.Optimizer]:
        made = make_optimizers(site)
        if self.grey_rate != 1.0:
            (group,), grey = made["generator"].param_groups, site.generator.head.grey
            group["params"] = [parameter for parameter in group["params"] if parameter is not grey]
            made["generator"].add_param_group({"params": [grey], "lr": self.grey_rate * group["lr"]})
        return made

    def _shared(self, site: Factory) -> dict[str, torch.Tensor]:
        local = self.config.discriminator == "local"
        kept = [name for name, _ in site.named_parameters() if name.startswith(PREFIX) or not local]
        return {name: site.get_parameter(name).detach().cpu().clone() for name in kept}


def slices_of(store: SliceStore, chosen: np.ndarray) -> torch.Tensor:
    """Slices (N, 1, S, S) in [-1, 1] by their numbers."""
    return torch.from_numpy(store.images[chosen].astype(np.float32))


@torch.no_grad()
def distance_to_real(generator: Generator, store: SliceStore, *, domain: int, split: str, samples: int = 400) -> float:
    """Kernel distance between synthetic slices and real slices of a split of the store, at equal heights."""
    from fedfactory.generative.metrics.quality import kernel_distance, random_features

    rng = torch.Generator().manual_seed(7)
    chosen = store.slices(split)
    chosen = chosen[torch.randint(len(chosen), (samples,), generator=rng).numpy()]
    z_bin = torch.from_numpy(store.z_bin[chosen])
    z = torch.randn(samples, generator.config.latent_dim, generator=rng)
    drawn = generator(z, z_bin, torch.full_like(z_bin, domain), noise=generator.draw_noise(samples, rng)).clamp(-1, 1)
    return kernel_distance(random_features(slices_of(store, chosen)), random_features(drawn))
