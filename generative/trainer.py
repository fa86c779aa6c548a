"""The factory's training algorithm at one site; no files, no sockets, no logging."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import TrainingError
from .config import FactoryConfig
from .discriminator import Discriminator
from .generator import Generator
from .losses import discriminator_logistic, generator_non_saturating, r1_penalty

ADAM_BETAS = (0.0, 0.99)


class Factory(nn.Module):
    """Generator and discriminator side by side: what a site trains."""

    def __init__(self, config: FactoryConfig) -> None:
        super().__init__()
        self.config = config
        # Channels last in memory: a quarter faster on CPUs, the same numbers.
        self.generator = Generator(config).to(memory_format=torch.channels_last)
        self.discriminator = Discriminator(config).to(memory_format=torch.channels_last)


@dataclass(frozen=True)
class StepLosses:
    """Losses of one step, for curves."""

    discriminator: float
    generator: float
    r1: float | None  # only on the updates that computed it


def make_optimizers(factory: Factory) -> dict[str, torch.optim.Optimizer]:
    """One Adam per network, by name."""
    rate = factory.config.learning_rate
    return {
        name: torch.optim.Adam(getattr(factory, name).parameters(), lr=rate, betas=ADAM_BETAS, fused=True)
        for name in ("generator", "discriminator")
    }


class FactoryTrainer:
    """Alternating updates with a lazy R1 penalty (StyleGAN2), on batches of one site.

    Args:
        factory: the networks; changed in place.
        optimizers: as made by `make_optimizers`.
        rng: source of latents, noise and jitter, on the networks' device.
        updates_done: updates before this trainer existed, so that the lazy penalty keeps its rhythm.
    """

    def __init__(
        self,
        factory: Factory,
        optimizers: dict[str, torch.optim.Optimizer],
        rng: torch.Generator,
        *,
        updates_done: int = 0,
    ) -> None:
        self.factory, self.optimizers, self.rng = factory, optimizers, rng
        self.updates_done = updates_done

    def train_step(self, real: Tensor, z_bin: Tensor, domain: Tensor) -> StepLosses:
        """One update of each network: real is (B, 1, S, S) in [-1, 1]; z_bin and domain are (B,) integers.

        The generator's slices are made once: the discriminator learns from them, then scores them again with its
        new weights for the generator.
        """
        real = self.jitter(real)
        fake = self.generate(z_bin, domain)
        d_loss, r1 = self.update_discriminator(real, fake.detach(), z_bin, domain)
        g_loss = self.update_generator(fake, z_bin, domain)
        self.updates_done += 1
        return StepLosses(discriminator=d_loss, generator=g_loss, r1=r1)

    def update_discriminator(
        self, real: Tensor, fake: Tensor, z_bin: Tensor, domain: Tensor
    ) -> tuple[float, float | None]:
        config, discriminator = self.factory.config, self.factory.discriminator
        penalise = config.r1_gamma > 0 and self.updates_done % config.r1_every == 0
        real = real.requires_grad_(penalise)
        real_score = discriminator(real, z_bin, domain)
        loss = logistic = discriminator_logistic(real_score, discriminator(fake, z_bin, domain))
        r1 = None
        if penalise:
            penalty = r1_penalty(real_score, real).mean()
            # Computed on one update in r1_every, so weighted by r1_every: the same pull on average.
            loss = logistic + config.r1_gamma / 2 * config.r1_every * penalty
            r1 = penalty.item()
        self._descend("discriminator", loss)
        return logistic.item(), r1

    def update_generator(self, fake: Tensor, z_bin: Tensor, domain: Tensor) -> float:
        self.factory.discriminator.requires_grad_(False)
        try:
            loss = generator_non_saturating(self.factory.discriminator(fake, z_bin, domain))
            self._descend("generator", loss)
        finally:
            self.factory.discriminator.requires_grad_(True)
        return loss.item()

    def generate(self, z_bin: Tensor, domain: Tensor) -> Tensor:
        """Fresh slices (B, 1, S, S) with the given conditions."""
        config, device = self.factory.config, z_bin.device
        z = torch.randn(len(z_bin), config.latent_dim, generator=self.rng, device=device)
        noise = torch.randn(len(z_bin), 1, config.image_size, config.image_size, generator=self.rng, device=device)
        return self.factory.generator(z, z_bin, domain, noise)

    def jitter(self, real: Tensor) -> Tensor:
        """Real slices shifted by up to one pixel and, if the organ allows, mirrored left to right.

        Slices keep the stored order of the store: dimension 2 runs left-right, dimension 3 back-front.
        """
        down, right = torch.randint(-1, 2, (2,), generator=self.rng, device=real.device).tolist()
        real = torch.roll(real, shifts=(down, right), dims=(2, 3))
        if self.factory.config.mirror:
            flip = torch.rand(len(real), 1, 1, 1, generator=self.rng, device=real.device) < 0.5
            real = torch.where(flip, real.flip(2), real)
        return real

    def _descend(self, name: str, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise TrainingError(f"the {name} loss is {loss.item()} at update {self.updates_done}; nothing was changed")
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
