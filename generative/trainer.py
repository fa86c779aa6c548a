"""The factory's training algorithm at a site; no files, no sockets, no logging."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from ..errors import ConfigError, TrainingError
from .adaptive_augmentation import augment
from .conditions import Conditions, Guide, draw_encoding, draw_slices, draw_style, jitter
from .factory import Factory
from .losses import (
    discriminator_logistic,
    generator_non_saturating,
    path_lengths,
    path_penalty,
    r1_penalty,
    squared_angle,
)
from .networks.generator import Generator, Style
from .pairs import label_channels, shown_labels
from .trainer_state import StepLosses, TrainerState
from .turning import turned

ADAM_BETAS = (0.0, 0.99)


def make_optimizers(factory: Factory) -> dict[str, torch.optim.Optimizer]:
    """One Adam optimizer per network, "generator" and "discriminator".

    With compatibility "published", learning rate and betas have StyleGAN2's correction for lazy penalties.
    """
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

    The default schedule updates both networks in every step and adds the lazy penalties. With compatibility
    "published" a step is one of four updates: discriminator loss, R1 penalty instead of it, generator loss, path
    length penalty instead of it.

    Args:
        factory: the networks; changed in place.
        optimizers: as made by `make_optimizers`.
        rng: source of latents, noise and jitter, on the networks' device.
        state: where earlier updates of this site ended; None starts anew.
        encoding: (encoding_dim,), the site's mean embedding as an input of the networks, or None.
        guide: guidance by an image encoder; required if the configuration has a clip_weight.
        ema: a copy of the generator that becomes its moving average; None if the average is kept elsewhere.
        accumulate: number of parts that a batch is cut into to save memory.

    Raises: ConfigError if the batch cannot be cut into these parts, or encoding or guide do not fit the configuration.
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
            raise ConfigError(f"accumulate is {accumulate}; it must divide batch_size, which is {config.batch_size}")
        if encoding is not None and tuple(encoding.shape) != (config.encoding_dim,):
            raise ConfigError(f"the embedding has shape {tuple(encoding.shape)}, expected ({config.encoding_dim},)")
        if config.clip_weight and guide is None:
            raise ConfigError(
                f"clip_weight is {config.clip_weight}, but this site has no image encoder; set up one, or choose 0"
            )
        self.factory, self.optimizers, self.rng = factory, optimizers, rng
        self.state = state or TrainerState()
        self.encoding, self.guide, self.ema, self.accumulate = encoding, guide, ema, accumulate
        self.published = config.compatibility == "published"
        half = factory.precision == "float16"
        self.scalers = {name: torch.amp.GradScaler(rng.device.type, enabled=half) for name in optimizers}

    def train_step(self, real: Tensor, z_bin: Tensor, domain: Tensor, labels: Tensor | None = None) -> StepLosses:
        """One step of training.

        Args:
            real: (B, C, S, S) slices in [-1, 1], with the configuration's image_channels.
            z_bin: (B,) integers, the height bins.
            domain: (B,) integers, the domain indices.
            labels: (B, S, S) integers below the configuration's classes, 255 where the label is unknown; None if no
                label is known, and for a factory of images alone.

        Returns: the losses that this step computed.
        Raises: TrainingError for slices or labels that do not fit the configuration, and, naming the term, if a loss or
            its gradient is not finite, before its optimizer steps.
        """
        channels, side = self.factory.config.image_channels, self.factory.config.image_size
        if real.shape[1:] != (channels, side, side):
            raise TrainingError(f"slices have shape {tuple(real.shape[1:])}, expected ({channels}, {side}, {side})")
        real, known = self._jittered(real, labels)
        # The embedding is used or left out for the whole step, in both networks alike.
        conditions = Conditions(z_bin, domain, draw_encoding(self.encoding, self.rng), known)
        losses = (self._published_step if self.published else self._joint_step)(real, conditions)
        self.state.updates_done += 1
        return losses

    def generate(self, conditions: Conditions) -> Tensor:
        """New slices (B, C, S, S), about [-1, 1], under the given conditions, with gradients; C counts the channels of
        the image and of the labels that are drawn with it, here and below."""
        return draw_slices(self.factory.generator, conditions, self.rng)

    def _jittered(self, real: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Real slices with their label channels, moved at random, and which pixels have a known label."""
        config = self.factory.config
        if not config.classes:
            if labels is not None:
                raise TrainingError(
                    "labels are given and classes is 0; leave them out, or choose the number of classes"
                )
            return jitter(real, config, self.rng), None
        channels, known = label_channels(labels, classes=config.classes, like=real)
        moved = jitter(torch.cat([real, channels, known], dim=1), config, self.rng)
        return moved[:, :-1], moved[:, -1:]

    def _joint_step(self, real: Tensor, conditions: Conditions) -> StepLosses:
        """Update both networks on real (B, C, S, S).

        Slices are generated once: the discriminator is trained on them and then scores them again for the generator.
        """
        config, update = self.factory.config, self.state.updates_done
        parts = self._parts(real, conditions)
        # With several parts, slices are generated twice: keeping the graphs of all parts would save no memory.
        graph = [self.generate(parts[0][1])] if len(parts) == 1 else []

        self._zero("discriminator")
        d_loss = 0.0
        for number, (real_part, wanted) in enumerate(parts):
            fake = graph[number].detach() if graph else self._generate_without_graph(wanted)
            d_loss += self._backward_logistic(real_part, fake, wanted, share=1 / len(parts))
        r1 = None
        if config.r1_gamma > 0 and update % config.r1_every == 0:
            r1 = sum(self._backward_r1(part, wanted, share=1 / len(parts)) for part, wanted in parts)
        self._step("discriminator")

        self._zero("generator")
        g_loss, guidance = 0.0, None
        for number, (_, wanted) in enumerate(parts):
            fake = graph[number] if graph else self.generate(wanted)
            part_loss, part_guidance = self._backward_adversarial(fake, wanted, share=1 / len(parts))
            g_loss += part_loss
            if part_guidance is not None:
                guidance = (guidance or 0.0) + part_guidance
        path = None
        if config.path_weight > 0 and update % config.path_every == 0:
            path = self._backward_path(conditions)
        self._step("generator")
        self._update_average()
        return StepLosses(discriminator=d_loss, generator=g_loss, r1=r1, path=path, guidance=guidance)

    def _published_step(self, real: Tensor, conditions: Conditions) -> StepLosses:
        """Update one network on real (B, C, S, S), by its loss or by the penalty that replaces it.

        As in the published program, the moving average is updated before the generator's optimizer steps.
        """
        config, pair = self.factory.config, self.state.updates_done // 2
        for name in self.optimizers:
            self._zero(name)
        if self.state.updates_done % 2 == 0:
            if pair % config.r1_every == 0:
                losses = StepLosses(r1=self._backward_r1(real, conditions, share=1.0))
            else:
                fake = self._generate_without_graph(conditions)
                losses = StepLosses(discriminator=self._backward_logistic(real, fake, conditions, share=1.0))
            self._step("discriminator")
            return losses
        if pair % config.path_every == 0:
            losses = StepLosses(path=self._backward_path(conditions))
        else:
            g_loss, guidance = self._backward_adversarial(self.generate(conditions), conditions, share=1.0)
            losses = StepLosses(generator=g_loss, guidance=guidance)
        self._update_average()
        self._step("generator")
        return losses

    def _backward_logistic(self, real: Tensor, fake: Tensor, conditions: Conditions, *, share: float) -> float:
        """Add the gradient of the discriminator's loss on slices (B, C, S, S), times `share`; returns loss * share."""
        real_score = self._score(self._shown(real, conditions), conditions)
        loss = discriminator_logistic(real_score, self._score(self._shown(fake, conditions), conditions))
        self._backward("discriminator", "logistic loss", loss * share)
        config = self.factory.config
        if config.augment and not config.augment_p:
            self.state.augmentation.observe(real_score, target=config.augment_target, length=config.augment_length)
        return loss.item() * share

    def _backward_r1(self, real: Tensor, conditions: Conditions, *, share: float) -> float:
        """Add the gradient of the R1 penalty on real (B, C, S, S), times `share`; returns penalty * share."""
        config = self.factory.config
        at = real.detach() if self._slope_before_augmentation else self._shown(real, conditions).detach()
        at.requires_grad_(True)
        shown = self._shown(at, conditions) if self._slope_before_augmentation else at
        penalty = r1_penalty(self._score(shown, conditions), at).mean()
        # Computed in one update of r1_every, so weighted by r1_every: the same strength on average.
        self._backward("discriminator", "R1 penalty", config.r1_gamma / 2 * config.r1_every * penalty * share)
        return penalty.item() * share

    def _backward_adversarial(
        self, fake: Tensor, conditions: Conditions, *, share: float
    ) -> tuple[float, float | None]:
        """Add the gradient of the generator's loss and of the guidance on fake (B, C, S, S), times `share`.

        The gradient with respect to the slices is computed first, so that the graph of the discriminator is freed
        before the backward pass through the generator.

        Returns: loss * share and, if there is guidance, mean squared angle * share.
        """
        config, scaler = self.factory.config, self.scalers["generator"]
        shown = self._shown(image := fake.detach().requires_grad_(True), conditions)
        self.factory.discriminator.requires_grad_(False)
        try:
            loss = generator_non_saturating(self._score(shown, conditions))
        finally:
            self.factory.discriminator.requires_grad_(True)
        self._check("non-saturating loss", loss)
        guidance, guided = None, config.clip_weight > 0 and (conditions.encoding is not None or self.encoding is None)
        (gradient,) = torch.autograd.grad(scaler.scale(loss * share), image, retain_graph=guided and self.published)
        if guided:
            seen = shown if self.published else image[:, : config.image_channels]
            angle = squared_angle(self.guide.embed(seen), self.guide.mean).mean()
            self._check("guidance", angle)
            (towards,) = torch.autograd.grad(scaler.scale(config.clip_weight * angle * share), image)
            if not scaler.is_enabled():
                self._check("gradient of the guidance", towards)
            gradient, guidance = gradient + towards, angle.item() * share
        fake.backward(gradient)
        self._check_gradients("generator", "non-saturating loss")
        return loss.item() * share, guidance

    def _backward_path(self, conditions: Conditions) -> float:
        """Add the gradient of the path length penalty on the first slices of the batch, without augmentation."""
        config, generator = self.factory.config, self.factory.generator
        conditions = conditions.first(max(1, len(conditions.z_bin) // config.path_batch_shrink))
        style = draw_style(generator, conditions, self.rng)
        w = style.w.contiguous()
        noise = generator.draw_noise(len(conditions.z_bin), self.rng)
        image = generator.synthesise(Style(w, style.constant, style.domain), noise).image
        direction = torch.randn(image.shape, generator=self.rng, device=image.device)
        mean = torch.tensor(self.state.path_mean, device=image.device)
        penalty, moved = path_penalty(path_lengths(image, w, direction), mean)
        self._backward("generator", "path length penalty", config.path_weight * config.path_every * penalty)
        self.state.path_mean = moved.item()
        return penalty.item()

    @torch.no_grad()
    def _generate_without_graph(self, conditions: Conditions) -> Tensor:
        """New slices (B, C, S, S) without gradients."""
        return self.generate(conditions)

    def _shown(self, slices: Tensor, conditions: Conditions) -> Tensor:
        """Slices (B, C, S, S) as the discriminator is shown them: image and labels are moved together, and the
        intensities of the image alone are changed."""
        config, count = self.factory.config, self.factory.config.image_channels
        if conditions.known is not None:
            labels = shown_labels(slices[:, count:], conditions.known, self.rng)
            slices = torch.cat([slices[:, :count], labels], dim=1)
        if config.turn:
            slices = turned(slices, config.turn, self.rng)
        if not config.augment:
            return slices
        p = config.augment_p or self.state.augmentation.p
        return augment(slices, p, self.rng, published=self.published, label_channels=config.label_channels)

    @property
    def _slope_before_augmentation(self) -> bool:
        """Whether R1 is the slope at real slices before they are augmented, as published, instead of at what is shown:
        labels have a slope only where they are shown."""
        return not (self.factory.config.classes or self.factory.config.turn)

    def _score(self, image: Tensor, conditions: Conditions) -> Tensor:
        """The discriminator's scores (B, 1) of slices (B, C, S, S)."""
        return self.factory.discriminator(image, conditions.z_bin, conditions.domain, encoding=conditions.encoding)

    def _parts(self, real: Tensor, conditions: Conditions) -> list[tuple[Tensor, Conditions]]:
        """Slices (B, C, S, S) and their conditions, cut into `accumulate` equal parts."""
        if len(real) % self.accumulate:
            raise TrainingError(
                f"the batch has {len(real)} slices; to be cut into {self.accumulate} equal parts it must be a multiple"
            )
        size = len(real) // self.accumulate
        return list(zip(real.split(size), conditions.split(size), strict=True))

    def _zero(self, name: str) -> None:
        # As published, a parameter that this update does not reach has a zero gradient and its moments decay.
        self.optimizers[name].zero_grad(set_to_none=not self.published)

    def _backward(self, network: str, term: str, loss: Tensor) -> None:
        """Backward pass of a scalar loss, with checks that it and the gradient of `network` are finite."""
        self._check(term, loss)
        self.scalers[network].scale(loss).backward()
        self._check_gradients(network, term)

    def _check(self, term: str, value: Tensor) -> None:
        """Raises TrainingError if a tensor of any shape holds NaN or infinite values."""
        if not torch.isfinite(value).all():
            raise TrainingError(f"the {term} is not finite at update {self.state.updates_done}; stopped before it")

    def _check_gradients(self, network: str, term: str) -> None:
        if self.scalers[network].is_enabled():
            return  # float16 overflows now and then; the scaler skips such a step and lowers its scale
        parameters = getattr(self.factory, network).parameters()
        self._check(f"gradient of the {term}", get_total_norm([p.grad for p in parameters if p.grad is not None]))

    def _step(self, name: str) -> None:
        self.scalers[name].step(self.optimizers[name])
        self.scalers[name].update()

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the generator. Parameters only: each copy has its own noise buffers."""
        if self.ema is not None:
            share = 1 - self.factory.config.ema_decay
            for average, new in zip(self.ema.parameters(), self.factory.generator.parameters(), strict=True):
                average.lerp_(new, share)
