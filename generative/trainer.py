"""The factory's training algorithm at one site; no files, no sockets, no logging."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..errors import ConfigError, TrainingError
from .adaptive_augmentation import AugmentationStrength, augment
from .config import FactoryConfig
from .losses import (
    discriminator_logistic,
    generator_non_saturating,
    path_lengths,
    path_penalty,
    r1_penalty,
    squared_angle,
)
from .networks.build import make_discriminator, make_generator
from .networks.generator import Generator, Style

ADAM_BETAS = (0.0, 0.99)
ENCODING_KEPT = 0.5  # share of updates that see the site's embedding; the others train the networks to do without
GENERATOR = "generator."  # prefix of its tensors among a factory's
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Factory(nn.Module):
    """Generator and discriminator side by side: what a site trains.

    Args:
        precision: float32, or bfloat16 or float16 for the four largest sides (published networks only); weights
            stay float32.

    Raises: ConfigError if the networks know no such precision.
    """

    def __init__(self, config: FactoryConfig, *, precision: str = "float32") -> None:
        super().__init__()
        self.config = config
        self.generator, self.discriminator = make_generator(config), make_discriminator(config)
        if precision not in PRECISIONS or (precision != "float32" and config.head == "palette"):
            raise ConfigError(f"precision '{precision}': head {config.head} knows {_known_precisions(config)}")
        self.precision = precision
        if precision != "float32":
            self.generator.low_precision = self.discriminator.low_precision = PRECISIONS[precision]
        if precision != "float32" or config.head == "palette":
            # Faster for narrow layers and in half precision; a third slower backwards for wide ones in float32.
            self.to(memory_format=torch.channels_last)


def _known_precisions(config: FactoryConfig) -> str:
    return "float32" if config.head == "palette" else ", ".join(PRECISIONS)


@dataclass(frozen=True)
class StepLosses:
    """Losses of one step, for curves; None where this update did not compute the term."""

    discriminator: float | None = None
    generator: float | None = None
    r1: float | None = None
    path: float | None = None
    guidance: float | None = None


def mean_losses(steps: list[StepLosses]) -> dict[str, float]:
    """Per term, the mean over the steps that computed it; terms that none computed are left out."""
    means = {}
    for term in StepLosses.__dataclass_fields__:
        values = [getattr(step, term) for step in steps if getattr(step, term) is not None]
        if values:
            means[term] = sum(values) / len(values)
    return means


@dataclass
class TrainerState:
    """What a site keeps between rounds besides the moments of its optimizers; never sent.

    Attributes:
        updates_done: updates so far, so that lazy penalties keep their rhythm.
        path_mean: running mean of the path lengths.
    """

    updates_done: int = 0
    path_mean: float = 0.0
    augmentation: AugmentationStrength = field(default_factory=AugmentationStrength)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainerState:
        augmentation = AugmentationStrength(**values["augmentation"])
        return cls(int(values["updates_done"]), float(values["path_mean"]), augmentation)


@dataclass(frozen=True)
class Guide:
    """Pulls synthetic slices towards the site's mean embedding.

    Attributes:
        embed: a frozen image encoder, (B, 1, S, S) in [-1, 1] to unit vectors (B, encoding_dim).
        mean: (encoding_dim,), the site's mean embedding.
    """

    embed: nn.Module | Callable[[Tensor], Tensor]
    mean: Tensor

    def to(self, device: torch.device | str) -> Guide:
        embed = self.embed.to(device) if isinstance(self.embed, nn.Module) else self.embed
        return Guide(embed, self.mean.to(device))


@dataclass(frozen=True)
class Conditions:
    """What a batch is asked to show: z_bin and domain (B,) integers, encoding (1, encoding_dim) or None."""

    z_bin: Tensor
    domain: Tensor
    encoding: Tensor | None

    def first(self, count: int) -> Conditions:
        return Conditions(self.z_bin[:count], self.domain[:count], self.encoding)


def make_optimizers(factory: Factory) -> dict[str, torch.optim.Optimizer]:
    """One Adam per network, by name; with the published correction for lazy penalties in compatibility mode."""
    config = factory.config
    every = {"generator": config.path_every, "discriminator": config.r1_every}
    optimizers = {}
    for name in ("generator", "discriminator"):
        # A penalty that replaces an update leaves every/(every + 1) of the updates to the losses.
        share = every[name] / (every[name] + 1) if config.compatibility == "published" else 1.0
        betas = tuple(beta**share for beta in ADAM_BETAS) if share != 1.0 else ADAM_BETAS
        rate = config.learning_rate * share
        optimizers[name] = torch.optim.Adam(getattr(factory, name).parameters(), lr=rate, betas=betas, fused=True)
    return optimizers


class FactoryTrainer:
    """Updates of generator and discriminator on batches of one site.

    The default schedule updates both networks in every step and adds the lazy penalties. With
    `compatibility="published"` an update is one of four: discriminator loss, R1 instead of it, generator loss, path
    length instead of it.

    Args:
        factory: the networks; changed in place.
        optimizers: as made by `make_optimizers`.
        rng: source of latents, noise and jitter, on the networks' device.
        state: of the updates before this trainer existed.
        encoding: (encoding_dim,), the site's mean embedding as an input of the networks.
        guide: needed if the configuration has a clip_weight.
        ema: a copy of the generator that follows it; None where the average is kept elsewhere.
        accumulate: parts a batch is cut into to save memory.

    Raises: ConfigError if the batch cannot be cut so, or encoding or guide do not fit the configuration.
    """

    def __init__(
        self,
        factory: Factory,
        optimizers: dict[str, torch.optim.Optimizer],
        rng: torch.Generator,
        *,
        state: TrainerState | None = None,
        encoding: Tensor | None = None,
        guide: Guide | None = None,
        ema: Generator | None = None,
        accumulate: int = 1,
    ) -> None:
        config = factory.config
        if accumulate < 1 or config.batch_size % accumulate:
            raise ConfigError(f"a batch of {config.batch_size} cannot be cut into {accumulate} equal parts")
        if encoding is not None and tuple(encoding.shape) != (config.encoding_dim,):
            raise ConfigError(f"the embedding has shape {tuple(encoding.shape)}, expected ({config.encoding_dim},)")
        if config.clip_weight and guide is None:
            raise ConfigError("clip_weight is set, but this site has no image encoder")
        self.factory, self.optimizers, self.rng = factory, optimizers, rng
        self.state = state or TrainerState()
        self.encoding, self.guide, self.ema, self.accumulate = encoding, guide, ema, accumulate
        self.published = config.compatibility == "published"
        half = factory.precision == "float16"
        self.scalers = {name: torch.amp.GradScaler(rng.device.type, enabled=half) for name in optimizers}

    def train_step(self, real: Tensor, z_bin: Tensor, domain: Tensor) -> StepLosses:
        """One update: real is (B, 1, S, S) in [-1, 1]; z_bin and domain are (B,) integers.

        Raises: TrainingError that names the term if a loss or its gradient is not finite, before its optimizer moves.
        """
        side = self.factory.config.image_size
        if real.shape[1:] != (1, side, side):
            raise TrainingError(f"slices have shape {tuple(real.shape[1:])}, this factory wants (1, {side}, {side})")
        real = self.jitter(real)
        conditions = Conditions(z_bin, domain, self._choose_encoding())
        losses = (self._published_step if self.published else self._joint_step)(real, conditions)
        self.state.updates_done += 1
        return losses

    def _joint_step(self, real: Tensor, conditions: Conditions) -> StepLosses:
        """Both networks. Slices are made once: D learns from them, then scores them again for G."""
        config, update = self.factory.config, self.state.updates_done
        parts = self._parts(real, conditions)
        kept = [self.generate(parts[0][1])] if len(parts) == 1 else []  # keeping the graphs of parts saves nothing

        self._zero("discriminator")
        d_loss = 0.0
        for number, (real_part, wanted) in enumerate(parts):
            fake = kept[number].detach() if kept else self._generate_without_graph(wanted)
            d_loss += self._backward_logistic(real_part, fake, wanted, 1 / len(parts))
        r1 = None
        if config.r1_gamma > 0 and update % config.r1_every == 0:
            r1 = sum(self._backward_r1(part, wanted, 1 / len(parts)) for part, wanted in parts)
        self._step("discriminator")

        self._zero("generator")
        g_loss, guidance = 0.0, None
        for number, (_, wanted) in enumerate(parts):
            fake = kept[number] if kept else self.generate(wanted)
            part_loss, part_guidance = self._backward_adversarial(fake, wanted, 1 / len(parts))
            g_loss += part_loss
            if part_guidance is not None:
                guidance = (guidance or 0.0) + part_guidance
        path = None
        if config.path_weight > 0 and update % config.path_every == 0:
            path = self._backward_path(conditions)
        self._step("generator")
        self._follow()
        return StepLosses(d_loss, g_loss, r1, path, guidance)

    def _published_step(self, real: Tensor, conditions: Conditions) -> StepLosses:
        """One network, and a penalty replaces its loss; the average follows before the step, as published."""
        config, pair = self.factory.config, self.state.updates_done // 2
        for name in self.optimizers:
            self._zero(name)
        if self.state.updates_done % 2 == 0:
            if pair % config.r1_every == 0:
                losses = StepLosses(r1=self._backward_r1(real, conditions, 1.0))
            else:
                fake = self._generate_without_graph(conditions)
                losses = StepLosses(discriminator=self._backward_logistic(real, fake, conditions, 1.0))
            self._step("discriminator")
            return losses
        if pair % config.path_every == 0:
            losses = StepLosses(path=self._backward_path(conditions))
        else:
            g_loss, guidance = self._backward_adversarial(self.generate(conditions), conditions, 1.0)
            losses = StepLosses(generator=g_loss, guidance=guidance)
        self._follow()
        self._step("generator")
        return losses

    def _backward_logistic(self, real: Tensor, fake: Tensor, wanted: Conditions, share: float) -> float:
        real_score = self._score(self._augment(real), wanted)
        loss = discriminator_logistic(real_score, self._score(self._augment(fake), wanted))
        self._backward("discriminator", "logistic loss", loss * share)
        config = self.factory.config
        if config.augment and not config.augment_p:
            self.state.augmentation.observe(real_score, target=config.augment_target, length=config.augment_length)
        return loss.item() * share

    def _backward_r1(self, real: Tensor, wanted: Conditions, share: float) -> float:
        config = self.factory.config
        real = real.detach().requires_grad_(True)
        penalty = r1_penalty(self._score(self._augment(real), wanted), real).mean()
        # Computed on one update in r1_every, so weighted by r1_every: the same pull on average.
        self._backward("discriminator", "R1 penalty", config.r1_gamma / 2 * config.r1_every * penalty * share)
        return penalty.item() * share

    def _backward_adversarial(self, fake: Tensor, wanted: Conditions, share: float) -> tuple[float, float | None]:
        """Slopes of the terms with respect to the slices first: D's graph is freed before G's is walked."""
        config, scaler = self.factory.config, self.scalers["generator"]
        shown = self._augment(image := fake.detach().requires_grad_(True))
        self.factory.discriminator.requires_grad_(False)
        try:
            loss = generator_non_saturating(self._score(shown, wanted))
        finally:
            self.factory.discriminator.requires_grad_(True)
        self._check("non-saturating loss", loss)
        guidance, guided = None, config.clip_weight > 0 and (wanted.encoding is not None or self.encoding is None)
        (slope,) = torch.autograd.grad(scaler.scale(loss * share), image, retain_graph=guided and self.published)
        if guided:
            angle = squared_angle(self.guide.embed(shown if self.published else image), self.guide.mean).mean()
            self._check("guidance", angle)
            (pull,) = torch.autograd.grad(scaler.scale(config.clip_weight * angle * share), image)
            if not scaler.is_enabled():
                self._check("gradient of the guidance", pull)
            slope, guidance = slope + pull, angle.item() * share
        fake.backward(slope)
        self._check_gradients("generator", "non-saturating loss")
        return loss.item() * share, guidance

    def _backward_path(self, conditions: Conditions) -> float:
        """On fewer slices, the first of the batch, without augmentation."""
        config, generator = self.factory.config, self.factory.generator
        wanted = conditions.first(max(1, len(conditions.z_bin) // config.path_batch_shrink))
        style = self._draw_style(wanted)
        w = style.w.contiguous()
        noise = generator.draw_noise(len(wanted.z_bin), self.rng)
        image = generator.synthesise(Style(w, style.constant, style.domain), noise).image
        direction = torch.randn(image.shape, generator=self.rng, device=image.device)
        mean = torch.tensor(self.state.path_mean, device=image.device)
        penalty, moved = path_penalty(path_lengths(image, w, direction), mean)
        self._backward("generator", "path length penalty", config.path_weight * config.path_every * penalty)
        self.state.path_mean = moved.item()
        return penalty.item()

    def generate(self, wanted: Conditions) -> Tensor:
        """Fresh slices (B, 1, S, S) under the given conditions."""
        style = self._draw_style(wanted)
        noise = self.factory.generator.draw_noise(len(wanted.z_bin), self.rng)
        return self.factory.generator.synthesise(style, noise).image

    @torch.no_grad()
    def _generate_without_graph(self, wanted: Conditions) -> Tensor:
        return self.generate(wanted)

    def _draw_style(self, wanted: Conditions) -> Style:
        """One latent a slice, or two with a random crossover; the published program never mixed."""
        config, generator = self.factory.config, self.factory.generator

        def draw() -> Style:
            z = torch.randn(len(wanted.z_bin), config.latent_dim, generator=self.rng, device=self.rng.device)
            encoding = wanted.encoding if wanted.encoding is None else wanted.encoding.expand(len(z), -1)
            return generator.style_of(z, wanted.z_bin, wanted.domain, encoding)

        style = draw()
        if config.style_mixing and not self.published and self._uniform() < config.style_mixing:
            crossover = int(torch.randint(1, generator.n_latent, (), generator=self.rng, device=self.rng.device))
            style = style.mixed_with(draw(), crossover)
        return style

    def jitter(self, real: Tensor) -> Tensor:
        """Real slices shifted by a few pixels and, if the organ allows, mirrored left to right.

        Slices keep the stored order of the store: dimension 2 runs left-right, dimension 3 back-front.
        """
        config = self.factory.config
        if config.shift:
            reach = (-config.shift, config.shift + 1, (2,))
            down, right = torch.randint(*reach, generator=self.rng, device=real.device).tolist()
            real = torch.roll(real, shifts=(down, right), dims=(2, 3))
        if config.mirror:
            flip = torch.rand(len(real), 1, 1, 1, generator=self.rng, device=real.device) < 0.5
            real = torch.where(flip, real.flip(2), real)
        return real

    def _choose_encoding(self) -> Tensor | None:
        """The embedding, or nothing: tossed once per update, for both networks."""
        if self.encoding is None or self._uniform() >= ENCODING_KEPT:
            return None
        return self.encoding[None].to(self.rng.device)

    def _augment(self, image: Tensor) -> Tensor:
        config = self.factory.config
        if not config.augment:
            return image
        return augment(image, config.augment_p or self.state.augmentation.p, self.rng, published=self.published)

    def _score(self, image: Tensor, wanted: Conditions) -> Tensor:
        return self.factory.discriminator(image, wanted.z_bin, wanted.domain, wanted.encoding)

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.rng, device=self.rng.device))

    def _parts(self, real: Tensor, conditions: Conditions) -> list[tuple[Tensor, Conditions]]:
        if len(real) % self.accumulate:
            raise TrainingError(f"a batch of {len(real)} slices cannot be cut into {self.accumulate} equal parts")
        size = len(real) // self.accumulate
        cut = zip(real.split(size), conditions.z_bin.split(size), conditions.domain.split(size), strict=True)
        return [(part, Conditions(z_bin, domain, conditions.encoding)) for part, z_bin, domain in cut]

    def _zero(self, name: str) -> None:
        # As published, a parameter that this update does not reach has a zero gradient and its moments decay.
        self.optimizers[name].zero_grad(set_to_none=not self.published)

    def _backward(self, network: str, term: str, loss: Tensor) -> None:
        self._check(term, loss)
        self.scalers[network].scale(loss).backward()
        self._check_gradients(network, term)

    def _check(self, term: str, value: Tensor) -> None:
        if not torch.isfinite(value).all():
            raise TrainingError(f"the {term} is not finite at update {self.state.updates_done}; stopped before it")

    def _check_gradients(self, network: str, term: str) -> None:
        if self.scalers[network].is_enabled():
            return  # float16 overflows now and then; the scaler leaves such a step out and lowers its scale
        parameters = getattr(self.factory, network).parameters()
        self._check(f"gradient of the {term}", get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def _step(self, name: str) -> None:
        self.scalers[name].step(self.optimizers[name])
        self.scalers[name].update()

    @torch.no_grad()
    def _follow(self) -> None:
        """Parameters only: noise buffers belong to each copy."""
        if self.ema is not None:
            share = 1 - self.factory.config.ema_decay
            for kept, new in zip(self.ema.parameters(), self.factory.generator.parameters(), strict=True):
                kept.lerp_(new, share)
