"""Training of a planned segmenter: from labelled slices to a segmenter with its card."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ...common.records import record_to_dict
from ...errors import ConfigError, UsageError
from ...imaging.slice_format import SliceFormat
from ..engine.augmentation import Augmentation
from ..engine.labelled_volumes import data_facts
from ..engine.object_rule import learn_single_objects
from ..engine.orientation import orientation_spread
from ..engine.planned_network import fast_bfloat16
from ..engine.segmenter_config import SegmenterConfig
from ..engine.training_loop import LoopConfig, train
from ..engine.training_plan import TrainingPlan, plan_training, with_batch_in_memory
from ..engine.window_training import Stream, WindowTrainer
from ..labelled_slices import LabelledSlices
from ..network_names import dimensions
from ..segmenter import Segmenter
from ..segmenter_card import ChosenState, SegmenterCard, TrainingFacts

UNKNOWN_ANISOTROPY = 4.0  # distance of slices that lie as acquired, in pixels: in most scans they are further apart
WARM_UP_UPDATES, TIMED_UPDATES = 2, 5
SAME_NETWORK = ("network", "network_size", "width", "depth")  # of two configurations with equal networks
FURTHER_RATE = 0.5  # learning rate of a training that begins with a trained network, relative to a new one's


@dataclass(frozen=True, kw_only=True)
class SegmenterData:
    """Slices for the training of a segmenter.

    Attributes:
        labelled: slices to train on.
        further: more of them with their share of every batch, such as slices with pseudo-labels; `labelled` has the
            rest.
        validation: labelled slices that are not trained on, to choose checkpoints; None chooses the last checkpoint.
        start: segmenter whose network is trained further, if the configuration describes an equal one; None begins
            with random weights.
    """

    labelled: LabelledSlices
    further: tuple[tuple[LabelledSlices, float], ...] = ()
    validation: LabelledSlices | None = None
    start: Segmenter | None = None

    def __post_init__(self) -> None:
        shares = [share for _, share in self.further]
        if any(share <= 0 for share in shares) or sum(shares) >= 1:
            raise ConfigError(
                f"the shares of further slices are {shares}; they must be positive and sum to less than 1"
            )

    def streams(self, config: SegmenterConfig, plan: TrainingPlan) -> list[Stream]:
        """What a batch is drawn from."""
        augmentation = Augmentation.of(config, plan)
        parts = ((self.labelled, 1 - sum(share for _, share in self.further)), *self.further)
        return [Stream(slices=slices, augmentation=augmentation, share=share) for slices, share in parts]


def plan_segmenter(
    data: SegmenterData, fmt: SliceFormat, config: SegmenterConfig, *, device: str = "cpu"
) -> TrainingPlan:
    """The plan of a training; where the configuration sets a time, updates are timed on this machine.

    Args:
        data: slices to train on.
        fmt: their format.
        config: how to train.
        device: to train on.

    Raises: UsageError if slices have another number of channels than their format.
    """
    anisotropy = fmt.slice_spacing / fmt.spacing if fmt.slice_spacing else UNKNOWN_ANISOTROPY
    parts = [data.labelled, *(slices for slices, _ in data.further)]
    for part in parts:
        if part.channels != fmt.channels:
            raise UsageError(
                f"slices have {part.channels} channel(s); they must have {fmt.channels}, as their slice format says"
            )
    facts = data_facts(parts, anisotropy=anisotropy, colour=fmt.colour)
    facts = replace(facts, orientation_spread=orientation_spread(parts))
    fast = fast_bfloat16(torch.device(device), dimensions=dimensions(config.network))
    plan = plan_training(facts, config, fast_bfloat16=fast)
    if (was := _plan_to_continue(data, fmt, config)) is not None:
        rate = config.learning_rate or FURTHER_RATE * TrainingPlan.learning_rate
        batch = config.batch_size or was.batch_size
        turning = {name: getattr(config, name) for name in ("rotation", "mirror") if getattr(config, name) is not None}
        plan = replace(
            was, updates=plan.updates, learning_rate=rate, precision=plan.precision, batch_size=batch, **turning
        )
        plan = with_batch_in_memory(plan, config.memory)
    if config.minutes is not None:
        seconds = seconds_per_update(data, plan, config, device=device)
        plan = replace(plan, updates=max(1, round(60 * config.minutes / seconds)))
    return plan


def seconds_per_update(
    data: SegmenterData, plan: TrainingPlan, config: SegmenterConfig, *, device: str = "cpu"
) -> float:
    """Mean seconds of a few updates on this machine, after warming up."""
    trainer = WindowTrainer(data.streams(config, plan), plan, seed=config.seed, device=device)
    for number in range(WARM_UP_UPDATES):
        trainer.update(number)
    began = time.perf_counter()
    for number in range(WARM_UP_UPDATES, WARM_UP_UPDATES + TIMED_UPDATES):
        trainer.update(number)
    return (time.perf_counter() - began) / TIMED_UPDATES


def train_segmenters(
    data: SegmenterData,
    fmt: SliceFormat,
    config: SegmenterConfig,
    *,
    title: str,
    facts: TrainingFacts | None = None,
    loop: LoopConfig | None = None,
    device: str = "cpu",
) -> list[Segmenter]:
    """Segmenters from the best checkpoints, the best first; as many as `loop.keep`.

    Args:
        data: slices to train on.
        fmt: format of the slices, kept with the network.
        config: how to train.
        title: text of the progress bar.
        facts: description of the data, for the segmenter's card.
        loop: evaluations and checkpoints; None evaluates at the end alone.
        device: to train on.

    Raises: TrainingError if the loss becomes NaN or infinite, UsageError if slices have another number of channels than
        their format.
    """
    plan, start = plan_segmenter(data, fmt, config, device=device), data.start
    continues = _plan_to_continue(data, fmt, config) is not None
    facts = replace(facts or TrainingFacts(slices=len(data.labelled.images)), continued=continues)
    trainer = WindowTrainer(
        data.streams(config, plan),
        plan,
        settings={**config.to_dict(), **record_to_dict(facts)},
        validation=data.validation,
        start=start.network.state_dict() if start is not None and continues else None,
        seed=config.seed,
        device=device,
    )
    checkpoints = train(trainer, plan.updates, loop or LoopConfig(evaluations=1), title=title, seed=config.seed)
    card = SegmenterCard(
        classes=plan.classes,
        network=plan.network,
        plan=plan,
        settings=config.to_dict(),
        training=facts,
        single_objects=learn_single_objects(data.labelled) if start is None else start.card.single_objects,
        class_names={} if start is None else start.card.class_names,
        original_values={} if start is None else start.card.original_values,
    )
    made = []
    for checkpoint in checkpoints:
        score = checkpoint.score if data.validation is not None else None
        network = _with_weights(trainer.network, checkpoint.weights)
        made.append(Segmenter(network, fmt, replace(card, chosen=ChosenState(update=checkpoint.update, score=score))))
    return made


def train_segmenter(
    data: LabelledSlices,
    fmt: SliceFormat,
    config: SegmenterConfig,
    *,
    title: str,
    facts: TrainingFacts | None = None,
) -> Segmenter:
    """A segmenter trained on labelled slices alone, see `train_segmenters`."""
    return train_segmenters(SegmenterData(labelled=data), fmt, config, title=title, facts=facts)[0]


def _plan_to_continue(data: SegmenterData, fmt: SliceFormat, config: SegmenterConfig) -> TrainingPlan | None:
    """The plan of the segmenter to begin with, if the configuration describes its network; otherwise None."""
    start = data.start
    if start is None or start.classes != data.labelled.classes:
        return None
    if (start.format.channels, start.format.colour) != (fmt.channels, fmt.colour):
        return None
    alike = all(start.card.settings.get(name) == getattr(config, name) for name in SAME_NETWORK)
    return start.card.plan if alike else None


def _with_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the network on the CPU with other weights."""
    made = copy.deepcopy(network).cpu()
    made.load_state_dict(weights)
    return made
