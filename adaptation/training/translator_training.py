"""Training the translator: reconstruction in an image's own role, translation to the other role and back."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss
from pytorch_msssim import SSIM
from torch import Tensor

from ...common.seeding import seeded
from ...errors import ConfigError, UsageError
from ...generative.networks.generator import Synthesis
from ...imaging.slice_format import SliceFormat
from ..choices import ROTATION
from ..engine.augmentation import Augmentation, augmented_slices
from ..engine.random_windows import WindowVariation
from ..engine.training_loop import Checkpoint, LoopConfig, Trainer, one_cycle, train
from ..labelled_factory import LabelledFactory
from ..labelled_slices import LabelledSlices, foreground_dice, with_channels
from ..networks.translator_network import SOURCE, TARGET, EncoderConfig, RoleNorm, Translator
from ..segmenter import Segmenter
from ..segmenter_card import TRANSLATOR, ChosenState, SegmenterCard, TrainingFacts, TranslatorDesign

SSIM_WINDOW = 11  # pixels
VALIDATION_SLICES = 64  # of an evaluation


@dataclass(frozen=True, kw_only=True)
class TranslatorConfig:
    """How a translator is trained. Raises: ConfigError if a value is out of range.

    Attributes:
        pretraining: updates on labelled source slices alone, which train the encoder and the source branch.
        updates: of the adaptation, alternately reconstruction and translation.
        batch_size: slices per update, half of them source slices; if target slices have labels, half of the target
            slices are labelled ones.
        learning_rate: of the encoder.
        head_learning_rate: of the label branches.
        ramp: share of all updates after which the encoder's content has fully replaced the generator's maps.
        l2_weight: of the squared difference in the image loss; the published program has 2.
        ssim_weight: of the structural similarity in the image loss; the published program has 0.
        mask_weight: of cross entropy and Dice; 1 / classes gives the published scale.
        target_synthesis: whether synthetic slices of the site's domain, with the factory's labels, are used as labelled
            target slices. Without them only reconstruction relates the site's grey levels to anatomy (as published,
            where no target slice has labels).
        encoder: size of the encoder.
        mirror: whether slices are flipped left to right at random.
        rotation: largest random angle in the plane of the slice, radians.
        seed: of everything random.
    """

    pretraining: int = 200
    updates: int = 400
    batch_size: int = 16
    learning_rate: float = 1e-3
    head_learning_rate: float = 1e-3
    ramp: float = 0.5
    l2_weight: float = 1.0
    ssim_weight: float = 1.0
    mask_weight: float = 1.0
    target_synthesis: bool = True
    encoder: EncoderConfig = field(default_factory=lambda: EncoderConfig(width=16, blocks=(1, 2, 4, 1), shrink=1))
    mirror: bool = True
    rotation: float = ROTATION
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("updates", 2), ("pretraining", 0), ("batch_size", 4)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        for name in ("learning_rate", "head_learning_rate"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        if not 0 < self.ramp <= 1:
            raise ConfigError(f"ramp is {self.ramp}; choose a share above 0, up to 1")

    def to_dict(self) -> dict[str, object]:
        """JSON-able."""
        return asdict(self) | {"encoder": self.encoder.to_dict()}


@dataclass(frozen=True, kw_only=True)
class TranslatorData:
    """Slices for the training of a translator.

    Attributes:
        source: labelled synthetic slices of the labelled domain.
        validation: further ones that are not trained on, to choose checkpoints.
        unlabelled: the site's slices, (N, C, S, S) in [-1, 1]; slices of one channel may be given as (N, S, S).
        own_labelled: labelled slices of the site's domain, if there are any.
    """

    source: LabelledSlices
    validation: LabelledSlices
    unlabelled: np.ndarray
    own_labelled: LabelledSlices | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "unlabelled", with_channels(self.unlabelled))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Source slices, then labelled target slices, then unlabelled target slices.

    Attributes:
        images: (B, C, S, S) in [-1, 1].
        labels: of the source slices and the labelled target slices, (sources + labelled, 1, S, S) float.
        sources: number of source slices.
        labelled: number of labelled target slices.
    """

    images: Tensor
    labels: Tensor
    sources: int
    labelled: int

    @property
    def roles(self) -> Tensor:
        """(B,) integers, SOURCE or TARGET."""
        role = torch.full((len(self.images),), TARGET, device=self.images.device)
        role[: self.sources] = SOURCE
        return role


def detached(synthesis: Synthesis) -> Synthesis:
    """The same slices (B, C, S, S) and feature maps, without gradients to the encoder."""
    features = [layer.detach() for layer in synthesis.features]
    return Synthesis(synthesis.image.detach(), synthesis.anatomy.detach(), features)


def part_of(synthesis: Synthesis, rows: slice) -> Synthesis:
    """Some of the slices (B, C, S, S) with their feature maps."""
    features = [layer[rows] for layer in synthesis.features]
    return Synthesis(synthesis.image[rows], synthesis.anatomy[rows], features)


class TranslatorLosses:
    """Losses of the two alternating steps of the published training (its Table 4.2: which loss trains what).

    The source branch is trained before, so that its losses train the encoder. The target branch starts without training
    on the target domain, so that its losses must not train the encoder: it is trained on translated source slices,
    whose labels are known, with detached features. Only after a full cycle do true labels of target slices train the
    encoder through it.

    Args:
        translator: with a frozen generator.
        config: weights of the losses.
    """

    def __init__(self, translator: Translator, config: TranslatorConfig) -> None:
        self.translator, self.config = translator, config
        side = translator.generator.config.image_size // translator.config.shrink
        window = min(SSIM_WINDOW, side - 1 + side % 2)
        channels = translator.generator.config.image_channels
        self.ssim = SSIM(data_range=1.0, win_size=window, channel=channels)
        self.dice_and_entropy = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)

    def intra(self, batch: Batch) -> dict[str, Tensor]:
        """Losses () of the reconstruction step, by name: every slice is decoded in its own role."""
        translator, images = self.translator, self.translator.downsampled(batch.images)
        reconstruction = translator.decode(images, batch.roles, self._noise(len(images)))
        losses = {"reconstruction": self._image_loss(images, reconstruction)}
        n, m = batch.sources, batch.labelled
        losses["source labels"] = self._mask_loss(SOURCE, part_of(reconstruction, slice(0, n)), batch.labels[:n])
        if m:
            target = detached(part_of(reconstruction, slice(n, n + m)))
            losses["target labels"] = self._mask_loss(TARGET, target, batch.labels[n:])
        return losses

    def inter(self, batch: Batch) -> dict[str, Tensor]:
        """Losses () of the translation step, by name: every slice is translated to the other role, and the translation,
        without gradients, back to its own role."""
        translator, images = self.translator, self.translator.downsampled(batch.images)
        n, m = batch.sources, batch.labelled
        other, losses = 1 - batch.roles, {}
        with torch.no_grad():
            translation = translator.decode(images, other, self._noise(len(images)))
        losses["translated labels"] = self._mask_loss(TARGET, part_of(translation, slice(0, n)), batch.labels[:n])
        if m:  # trains the encoder to translate so that the source branch predicts the known labels
            rows = slice(n, n + m)
            in_source_role = translator.decode(images[rows], other[rows], self._noise(m))
            losses["target labels in the source role"] = self._mask_loss(SOURCE, in_source_role, batch.labels[n:])
        cycle = translator.decode(translator.downsampled(translation.image), batch.roles, self._noise(len(images)))
        losses["cycle"] = self._image_loss(images, cycle)
        losses["labels after the cycle"] = self._mask_loss(SOURCE, part_of(cycle, slice(0, n)), batch.labels[:n])
        if m:
            target = part_of(cycle, slice(n, n + m))
            losses["target labels after the cycle"] = self._mask_loss(TARGET, target, batch.labels[n:])
        return losses

    def _noise(self, batch: int) -> list[Tensor]:
        """Unit normal noise maps of the generator, (batch, 1, r, r) each."""
        generator = self.translator.generator
        device = next(generator.parameters()).device
        return [torch.randn(batch, 1, side, side, device=device) for side in generator.noise_sides]

    def _image_loss(self, images: Tensor, synthesis: Synthesis) -> Tensor:
        """Weighted sum () of squared difference and SSIM loss against downsampled images (B, C, s, s) in [-1, 1]."""
        decoded = self.translator.downsampled(synthesis.image)
        dissimilarity = 1 - self.ssim((decoded + 1) / 2, (images + 1) / 2)
        return self.config.l2_weight * F.mse_loss(decoded, images) + self.config.ssim_weight * dissimilarity

    def _mask_loss(self, role: int, synthesis: Synthesis, labels: Tensor) -> Tensor:
        """Weighted cross entropy and Dice () of a role's label branch against labels (B, 1, S, S)."""
        return self.config.mask_weight * self.dice_and_entropy(self.translator.heads[role](synthesis), labels)


class TranslatorTrainer(Trainer):
    """Pre-training on source slices, then adaptation; evaluated on source slices that are not trained on.

    Args:
        translator: on the device to train on.
        config: how to train.
        data: slices to train on.
        facts: description of the data, part of the settings of the training.
        colour: whether the channels of slices are red, green and blue.
    """

    def __init__(
        self,
        translator: Translator,
        config: TranslatorConfig,
        data: TranslatorData,
        *,
        facts: TrainingFacts,
        colour: bool = False,
    ) -> None:
        self.network, self.config, self.data = translator, config, data
        self.settings = {**asdict(facts), **config.to_dict()}
        self.device = next(translator.parameters()).device
        self.losses = TranslatorLosses(translator, config)
        self.augmentation = Augmentation(
            windows=WindowVariation(rotation=config.rotation, mirror=config.mirror), colour=colour
        )
        total = config.pretraining + config.updates
        encoder = torch.optim.RAdam(translator.encoder.parameters(), config.learning_rate)
        heads = torch.optim.Adam(translator.heads.parameters(), config.head_learning_rate)
        self.optimizers = [(encoder, one_cycle(encoder, total)), (heads, None)]
        self.total, self.updates_done = total, 0

    def update(self, number: int) -> dict[str, float]:
        translator, config = self.network, self.config
        pretraining = number < config.pretraining
        if number == config.pretraining:
            self._start_adaptation()
        translator.heads[SOURCE].requires_grad_(pretraining)
        translator.train()
        translator.phi.fill_(min(1.0, number / (config.ramp * self.total)))
        if pretraining:
            losses = self.losses.intra(self._batch(config.batch_size, 0))
        else:
            batch = self._batch(config.batch_size // 2, config.batch_size - config.batch_size // 2)
            even = (number - config.pretraining) % 2 == 0
            losses = self.losses.intra(batch) if even else self.losses.inter(batch)
        for optimizer, _ in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        for optimizer, schedule in self.optimizers:
            optimizer.step()
            if schedule is not None:
                schedule.step()
        self.updates_done = number + 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def _start_adaptation(self) -> None:
        """Initialise the target role's norms and label branch with those of the source role."""
        for module in self.network.encoder.modules():
            if isinstance(module, RoleNorm):
                module.copy_source_to_target()
        self.network.heads[TARGET].load_state_dict(self.network.heads[SOURCE].state_dict())

    @torch.no_grad()
    def score(self) -> float:
        """Dice of source slices decoded in their own role, which needs no label of the site; -1 during pre-training,
        when the translator has not been trained on the target domain yet."""
        if self.updates_done <= self.config.pretraining:
            return -1.0
        translator, validation = self.network.eval(), self.data.validation
        images = torch.from_numpy(validation.images[:VALIDATION_SLICES].astype(np.float32)).to(self.device)
        labels = torch.from_numpy(validation.labels[:VALIDATION_SLICES].astype(np.int64))
        roles = torch.full((len(images),), SOURCE, device=self.device)
        synthesis = translator.decode(translator.downsampled(images), roles)
        return foreground_dice(translator.heads[SOURCE](synthesis).argmax(1).cpu(), labels, validation.classes)

    def _batch(self, sources: int, targets: int) -> Batch:
        """Random augmented slices: source slices, and target slices of which half are labelled if there are labels."""
        labelled = targets // 2 if self.data.own_labelled is not None else 0
        images, labels = [], []
        for data, count in ((self.data.source, sources), (self.data.own_labelled, labelled)):
            if count:
                chosen = np.random.randint(0, len(data.images), count)
                varied, with_labels = self._augmented(data.images[chosen], data.labels[chosen])
                images.append(varied)
                labels.append(with_labels)
        if targets - labelled:
            chosen = np.random.randint(0, len(self.data.unlabelled), targets - labelled)
            unlabelled = self.data.unlabelled[chosen]
            images.append(self._augmented(unlabelled, np.zeros_like(unlabelled[:, 0], np.uint8))[0])
        all_images, all_labels = (torch.cat(tensors).float().to(self.device) for tensors in (images, labels))
        return Batch(images=all_images, labels=all_labels, sources=sources, labelled=labelled)

    def _augmented(self, images: np.ndarray, labels: np.ndarray) -> tuple[Tensor, Tensor]:
        """Slices (B, C, S, S) in [-1, 1] and labels (B, S, S) to augmented ones, (B, C, S, S) and (B, 1, S, S)."""
        return augmented_slices(
            torch.from_numpy(images.astype(np.float32)),
            torch.from_numpy(labels.astype(np.int64))[:, None],
            self.augmentation,
            rng=torch.default_generator,
        )


def train_translator(
    labelled: LabelledFactory,
    domain: str,
    fmt: SliceFormat,
    *,
    config: TranslatorConfig,
    data: TranslatorData,
    facts: TrainingFacts | None = None,
    loop: LoopConfig | None = None,
    device: str = "cpu",
) -> list[Segmenter]:
    """Translators for a site's images from the best checkpoints, the best first.

    Args:
        labelled: factory whose generator decodes; its first branch initialises both label branches.
        domain: of the site.
        fmt: slice format of the site.
        config: how to train.
        data: slices to train on.
        facts: description of the data, for the segmenter's card.
        loop: evaluations and checkpoints; None for the defaults.
        device: to train on.

    Raises: TrainingError if a loss becomes NaN or infinite, UsageError if factory and format differ in their number of
        channels.
    """
    factory, classes = labelled.factory, labelled.card.classes
    if factory.config.image_channels != fmt.channels:
        raise UsageError(
            f"the factory draws {factory.config.image_channels} channel(s), the slice format has {fmt.channels}; they "
            "must be equal: give the factory that was trained on such slices"
        )
    domains = (factory.config.domain_index(labelled.card.labelled_domain), factory.config.domain_index(domain))
    with seeded(config.seed):
        translator = Translator(copy.deepcopy(factory.generator), classes, domains, config=config.encoder)
    for head in translator.heads:
        head.load_state_dict(labelled.branches[0].state_dict())
    translator.compute_mean_codes(config.seed)
    translator.to(device)
    facts = replace(facts or TrainingFacts(), domain=domain, slices=len(data.source.images))
    trainer = TranslatorTrainer(translator, config, data, facts=facts, colour=fmt.colour)
    checkpoints = train(
        trainer, trainer.total, loop or LoopConfig(), title=f"translating to {domain}", seed=config.seed
    )
    card = SegmenterCard(
        classes=classes,
        network=TRANSLATOR,
        translator=TranslatorDesign(factory=factory.config, domains=domains, encoder=config.encoder),
        settings=config.to_dict(),
        training=facts,
    )
    return [_segmenter(translator, checkpoint, fmt, card=card) for checkpoint in checkpoints]


def _segmenter(translator: Translator, checkpoint: Checkpoint, fmt: SliceFormat, *, card: SegmenterCard) -> Segmenter:
    network = copy.deepcopy(translator).cpu()
    network.load_state_dict(checkpoint.weights)
    chosen = ChosenState(update=checkpoint.update, score=checkpoint.score)
    return Segmenter(network.requires_grad_(False), fmt, replace(card, chosen=chosen))
