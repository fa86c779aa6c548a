"""Training the translator: reconstruction within a role, translation to the other role and back."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, SSIMLoss
from torch import Tensor

from ...common.seeding import seeded
from ...errors import ConfigError
from ...generative.networks.generator import Synthesis
from ...imaging.slice_format import SliceFormat
from ..augmentation import ROTATION, augmentation
from ..labelled_factory import LabelledFactory
from ..labelled_slices import LabelledSlices, foreground_dice
from ..networks.translator_network import SOURCE, TARGET, EncoderConfig, RoleNorm, Translator
from ..segmenter import Segmenter
from ..segmenter_card import TRANSLATOR, ChosenState, SegmenterCard, TrainingFacts, TranslatorDesign
from .training_loop import Kept, Learner, LoopConfig, one_cycle, train

SSIM_WINDOW = 11
VALIDATION_SAMPLES = 64  # slices of a look


@dataclass(frozen=True, kw_only=True)
class TranslatorConfig:
    """How a translator is trained. Raises: ConfigError if a value is out of range.

    Attributes:
        pretraining: updates on labelled source slices alone, which teach encoder and source branch.
        updates: of the adaptation; every other one reconstructs, the others translate.
        batch_size: half of it source slices; where target slices have labels, half of the rest are those.
        learning_rate: of the encoder. head_learning_rate: of the label branches.
        ramp: share of all updates after which the encoder's content has taken the place of the generator's maps.
        l2_weight, ssim_weight: of the image loss. The published program adds the squared difference twice and
            structural similarity never: 2 and 0 repeat that.
        mask_weight: of cross entropy and Dice; 1 / classes repeats the published scale.
        target_synthesis: synthetic slices of the site's domain, with the factory's labels, count as labelled target
            slices. Without them nothing ties the site's grey levels to anatomy but reconstruction (the published way,
            where no target slice has labels).
        encoder: its size.
        mirror, rotation: of random flips and angles, as for a segmenter.
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
        if self.updates < 2 or self.pretraining < 0 or self.batch_size < 4:
            raise ConfigError("a translator needs at least two updates and four slices in a batch")
        if min(self.learning_rate, self.head_learning_rate) <= 0 or not 0 < self.ramp <= 1:
            raise ConfigError("learning rates must be positive, ramp above 0 and at most 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"encoder": self.encoder.to_dict()}


@dataclass(frozen=True)
class Batch:
    """Slices (B, 1, S, S), source first, then target; the first `labelled` of the target ones have labels.

    Attributes:
        labels: (sources + labelled, 1, S, S).
    """

    images: Tensor
    labels: Tensor
    sources: int
    labelled: int

    @property
    def roles(self) -> Tensor:
        role = torch.full((len(self.images),), TARGET, device=self.images.device)
        role[: self.sources] = SOURCE
        return role


def detached(made: Synthesis) -> Synthesis:
    """Features through which no gradient reaches the encoder."""
    return Synthesis(made.image.detach(), made.anatomy.detach(), [one.detach() for one in made.features])


def part_of(made: Synthesis, rows: slice) -> Synthesis:
    return Synthesis(made.image[rows], made.anatomy[rows], [one[rows] for one in made.features])


class TranslatorLosses:
    """The two steps of the published training; which loss reaches which parameters is the spec's routing table.

    The source branch is trusted and shapes the encoder. The target branch begins untaught and must not: it learns from
    translated source slices, whose labels are known, on features that are cut off. True labels of target slices are
    trusted again.
    """

    def __init__(self, translator: Translator, config: TranslatorConfig) -> None:
        self.translator, self.config = translator, config
        side = translator.generator.config.image_size // translator.config.shrink
        window = min(SSIM_WINDOW, side - 1 + side % 2)
        self.ssim = SSIMLoss(spatial_dims=2, data_range=1.0, win_size=window)
        self.dice_and_entropy = DiceCELoss(to_onehot_y=True, softmax=True, batch=True)

    def intra(self, batch: Batch) -> dict[str, Tensor]:
        """Every slice shown in its own role."""
        translator, given = self.translator, self.translator.downsampled(batch.images)
        made = translator.decode(given, batch.roles, self._noise(len(given)))
        losses = {"reconstruction": self._image_loss(given, made)}
        n, m = batch.sources, batch.labelled
        losses["source labels"] = self._mask_loss(SOURCE, part_of(made, slice(0, n)), batch.labels[:n])
        if m:
            own = detached(part_of(made, slice(n, n + m)))
            losses["target labels"] = self._mask_loss(TARGET, own, batch.labels[n:])
        return losses

    def inter(self, batch: Batch) -> dict[str, Tensor]:
        """Every slice translated to the other role, and the translation, cut off, back to its own."""
        translator, given = self.translator, self.translator.downsampled(batch.images)
        n, m = batch.sources, batch.labelled
        other, losses = 1 - batch.roles, {}
        with torch.no_grad():
            there = translator.decode(given, other, self._noise(len(given)))
        losses["translated labels"] = self._mask_loss(TARGET, part_of(there, slice(0, n)), batch.labels[:n])
        if m:  # the encoder must translate so that the source branch reads the known labels
            rows = slice(n, n + m)
            known = translator.decode(given[rows], other[rows], self._noise(m))
            losses["labels read in the source role"] = self._mask_loss(SOURCE, known, batch.labels[n:])
        back = translator.decode(translator.downsampled(there.image), batch.roles, self._noise(len(given)))
        losses["cycle"] = self._image_loss(given, back)
        losses["labels after the cycle"] = self._mask_loss(SOURCE, part_of(back, slice(0, n)), batch.labels[:n])
        if m:
            losses["target labels after the cycle"] = self._mask_loss(
                TARGET, part_of(back, slice(n, n + m)), batch.labels[n:]
            )
        return losses

    def _noise(self, batch: int) -> list[Tensor]:
        generator = self.translator.generator
        device = next(generator.parameters()).device
        return [torch.randn(batch, 1, side, side, device=device) for side in generator.noise_sides]

    def _image_loss(self, given: Tensor, made: Synthesis) -> Tensor:
        shown = self.translator.downsampled(made.image)
        similar = self.ssim((shown + 1) / 2, (given + 1) / 2)
        return self.config.l2_weight * F.mse_loss(shown, given) + self.config.ssim_weight * similar

    def _mask_loss(self, role: int, made: Synthesis, labels: Tensor) -> Tensor:
        return self.config.mask_weight * self.dice_and_entropy(self.translator.heads[role](made), labels)


class TranslatorLearner(Learner):
    """Pre-training at the source, then adaptation; judged on source slices that were not trained on."""

    def __init__(
        self,
        translator: Translator,
        config: TranslatorConfig,
        *,
        source: LabelledSlices,
        validation: LabelledSlices,
        own: np.ndarray,
        few: LabelledSlices | None,
        facts: dict[str, Any],
    ) -> None:
        self.network, self.config, self.facts = translator, config, facts
        self.device = next(translator.parameters()).device
        self.source, self.validation, self.own, self.few = source, validation, own, few
        self.losses = TranslatorLosses(translator, config)
        self.augment = augmentation(mirror=config.mirror, remap_contrast=0.0, rotation=config.rotation)
        total = config.pretraining + config.updates
        encoder = torch.optim.RAdam(translator.encoder.parameters(), config.learning_rate)
        heads = torch.optim.Adam(translator.heads.parameters(), config.head_learning_rate)
        self.optimizers = [(encoder, one_cycle(encoder, total)), (heads, None)]
        self.total, self.done = total, 0

    def update(self, number: int) -> dict[str, float]:
        translator, config = self.network, self.config
        pretraining = number < config.pretraining
        if number == config.pretraining:
            self.start_adaptation()
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
        self.done = number + 1
        return {name: float(value.detach()) for name, value in losses.items()}

    def start_adaptation(self) -> None:
        """The target role begins as the source role ended: norms and label branch."""
        for module in self.network.encoder.modules():
            if isinstance(module, RoleNorm):
                module.copy_source_to_target()
        self.network.heads[TARGET].load_state_dict(self.network.heads[SOURCE].state_dict())

    @torch.no_grad()
    def score(self) -> float:
        """Dice of source slices read in their own role, without any label of the site; -1 for a state of the
        pre-training, which knows no target yet."""
        if self.done <= self.config.pretraining:
            return -1.0
        translator = self.network.eval()
        images = torch.from_numpy(self.validation.images[:VALIDATION_SAMPLES].astype(np.float32))[:, None].to(
            self.device
        )
        labels = torch.from_numpy(self.validation.labels[:VALIDATION_SAMPLES].astype(np.int64))
        made = translator.decode(translator.downsampled(images), torch.full((len(images),), SOURCE, device=self.device))
        return foreground_dice(translator.heads[SOURCE](made).argmax(1).cpu(), labels, self.validation.classes)

    def _batch(self, sources: int, targets: int) -> Batch:
        labelled = targets // 2 if self.few is not None else 0
        images, labels = [], []
        for data, count in ((self.source, sources), (self.few, labelled)):
            if count:
                chosen = np.random.randint(0, len(data.images), count)
                one = self.augment(
                    data=data.images[chosen].astype(np.float32)[:, None],
                    seg=data.labels[chosen].astype(np.float32)[:, None],
                )
                images.append(one["data"])
                labels.append(one["seg"])
        if targets - labelled:
            chosen = np.random.randint(0, len(self.own), targets - labelled)
            shown = self.own[chosen].astype(np.float32)[:, None]
            images.append(self.augment(data=shown, seg=np.zeros_like(shown))["data"])
        found, known = (torch.from_numpy(np.concatenate(one)).float().to(self.device) for one in (images, labels))
        return Batch(found, known, sources, labelled)


def train_translator(
    labelled: LabelledFactory,
    domain: str,
    fmt: SliceFormat,
    config: TranslatorConfig,
    *,
    source: LabelledSlices,
    validation: LabelledSlices,
    own: np.ndarray,
    few: LabelledSlices | None = None,
    loop: LoopConfig | None = None,
    device: str = "cpu",
    facts: TrainingFacts | None = None,
) -> list[Segmenter]:
    """Translators for a site's images, the best first.

    Args:
        labelled: factory whose generator decodes and whose first branch is where the source branch starts from.
        domain: the site's. fmt: its slice format.
        source: labelled synthetic slices of the labelled domain. validation: others, for choosing states.
        own: the site's unlabelled slices (N, S, S). few: slices of the site with labels, if there are any.
        facts: where the data came from, for the segmenter's card.
    """
    factory, home = labelled.factory, labelled.card.labelled_domain
    domains = (factory.config.domain_index(home), factory.config.domain_index(domain))
    with seeded(config.seed):
        translator = Translator(copy.deepcopy(factory.generator), labelled.card.classes, domains, config=config.encoder)
    for head in translator.heads:
        head.load_state_dict(labelled.branches[0].state_dict())
    translator.compute_mean_codes(config.seed)
    translator.to(device)
    facts = replace(facts or TrainingFacts(), domain=domain, slices=len(source.images))
    learner = TranslatorLearner(
        translator,
        config,
        source=source,
        validation=validation,
        own=own,
        few=few,
        facts={**asdict(facts), **config.to_dict()},
    )
    total = config.pretraining + config.updates
    kept = train(learner, total, loop or LoopConfig(), title=f"translating to {domain}", seed=config.seed)
    card = SegmenterCard(
        classes=labelled.card.classes,
        network=TRANSLATOR,
        translator=TranslatorDesign(factory=factory.config, domains=domains, encoder=config.encoder),
        settings=config.to_dict(),
        training=facts,
    )
    return [_segmenter(translator, state, fmt, card) for state in kept]


def _segmenter(translator: Translator, kept: Kept, fmt: SliceFormat, card: SegmenterCard) -> Segmenter:
    network = copy.deepcopy(translator).cpu()
    network.load_state_dict(kept.weights)
    chosen = ChosenState(update=kept.update, score=kept.score)
    return Segmenter(network.requires_grad_(False), fmt, replace(card, chosen=chosen))
